"""The way out of the guide to GPT-2: our checkpoints as folders that transformers loads.

The function under test is the guide's own, read from its Markdown.
"""

import contextlib
import io
import re

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from test_notes import blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

import gpt

GUIDE = (ROOT / "notes" / "gpt2_guide.md").read_text(encoding="utf-8")
SHIPPED = sorted((ROOT / "checkpoints").glob("*.pt"))
ROTARY = {
    "default": dict(),
    "no QK-norm": dict(qk_norm=False),
    "biases": dict(bias=True),
    "tied": dict(tie_weights=True),
    "gelu, all of it": dict(activation="gelu", bias=True, tie_weights=True, qk_norm=False),
    "gelu, biases": dict(activation="gelu", bias=True),
    "relu": dict(activation="relu", tie_weights=True),
    "one head": dict(n_head=1, n_layer=1, bias=True),
}
LEARNED = {
    "gelu": dict(activation="gelu"),
    "gelu, biases": dict(activation="gelu", bias=True),
    "gelu, biases, tied": dict(activation="gelu", bias=True, tie_weights=True),
    "gelu, tied": dict(activation="gelu", tie_weights=True),
    "relu": dict(activation="relu"),
    "relu, biases": dict(activation="relu", bias=True, tie_weights=True),
    "relu2": dict(activation="relu2"),
}
CONFIGS = {f"rotary: {name}": config for name, config in ROTARY.items()}
CONFIGS |= {f"learned: {name}": dict(positions="learned", qk_norm=False, **config)
            for name, config in LEARNED.items()}
TEXTS = ["\nTo be,  or not\n\n  to be .", " ", "\n", "a", "   \n", "I 'm; do n't !", "NAN:\nO.\n"]


@pytest.fixture(scope="module")
def to_transformers():
    """The guide's function, from the block that defines it and the imports before it."""
    code = [code for language, code, *_ in blocks(GUIDE) if language == "python"]
    definition = next(c for c in code if "def to_transformers" in c)
    earlier = "".join(code[: code.index(definition)])
    imports = "".join(re.findall(r"^(?:from|import) .*\n", earlier, re.M))
    namespace = {}
    exec(compile(imports + definition, "gpt2_guide.md", "exec"), namespace)
    return namespace["to_transformers"]


def randomised(**config):
    """A model whose every part matters: a fresh one has a head and projections of zeros."""
    sizes = dict(n_layer=2, n_head=4, n_embd=32, block_size=32, vocab_size=62)
    model = gpt.GPTLanguageModel(gpt.GPTConfig(**sizes | config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if re.search(r"ln_\w\.weight", name) else 0.0)
    return model


@pytest.fixture
def out(to_transformers, tmp_path):
    """out(model, tokenizer): what transformers makes of the checkpoint, and the folder."""
    def write(model, tokenizer):
        gpt.save_checkpoint(tmp_path / "model.pt", model, tokenizer)
        return load(to_transformers, tmp_path / "model.pt", tmp_path / "folder")

    return write


def load(to_transformers, ckpt, folder):
    to_transformers(ckpt, folder)
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return theirs.eval(), AutoTokenizer.from_pretrained(folder), folder


def row(ids):
    """Ids (T,) as a batch of one, (1, T)."""
    return torch.tensor([[int(i) for i in ids]])


def alphabet(text):
    return gpt.CharTokenizer({s: i for i, s in enumerate(sorted(set(text)))})


@pytest.fixture(scope="module")
def characters(play):
    return alphabet(play)


@torch.no_grad()
def assert_same_logits(ours, theirs, rows=2):
    """At every position, within 1e-5 of the largest logit there, without and with a cache."""
    idx = torch.randint(ours.config.vocab_size, (rows, ours.config.block_size))
    expected = ours(idx)[0]
    allowed = 1e-5 * expected.abs().amax(dim=-1)
    assert expected.std() > 0.1 and theirs.dtype == torch.float32
    assert ((theirs(idx).logits - expected).abs().amax(dim=-1) <= allowed).all()
    past, steps = None, []
    for token in idx.split(1, dim=1):
        step = theirs(token, past_key_values=past, use_cache=True)
        past = step.past_key_values
        steps.append(step.logits)
    assert ((torch.cat(steps, dim=1) - expected).abs().amax(dim=-1) <= allowed).all()


def assert_same_greedy_text(ours, theirs, tokenizer, prompt="\nTo be,  "):
    """20 tokens that are the likeliest, with and without a cache, after this and other prompts."""
    ids = row(tokenizer.encode(prompt))
    ids = torch.cat((ids, torch.randint(tokenizer.vocab_size, (7, ids.size(1)))))
    expected = ours.generate(ids, 20, tokenizer, temperature=0.0)
    assert len(expected.unique()) > 8 and ids.size(1) + 20 <= ours.config.block_size
    for use_cache in (True, False):
        found = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                max_new_tokens=20, use_cache=use_cache)
        assert torch.equal(found, expected), use_cache


def assert_same_tokens(tokenizer, theirs, texts):
    """Text to ids and back, nothing added, nothing tidied away."""
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text).input_ids == ids and theirs.encode(text) == ids
        assert theirs.decode(ids) == tokenizer.decode(ids) == text
        assert theirs.decode(ids, skip_special_tokens=True) == text.replace("<|endoftext|>", "")
    assert len(theirs) == tokenizer.vocab_size


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_architecture_gets_out(config, out, characters):
    """Logits, tokens, greedy text, and which tensors are one."""
    ours = randomised(**config)
    theirs, tokenizer, _ = out(ours, characters)
    rotary = ours.config.positions == "rotary"
    assert type(theirs).__name__ == ("PersimmonForCausalLM" if rotary else "GPT2LMHeadModel")
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert tied == ours.config.tie_weights
    assert_same_logits(ours, theirs)
    assert_same_tokens(characters, tokenizer, TEXTS)
    assert_same_greedy_text(ours, theirs, characters)


@pytest.mark.parametrize("ckpt", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_checkpoint_gets_out(ckpt, to_transformers, tmp_path, play):
    """The models that come with the repository, over their whole context."""
    ours, tokenizer, _ = gpt.load_checkpoint(ckpt)
    theirs, their_tokenizer, _ = load(to_transformers, ckpt, tmp_path / "folder")
    assert_same_logits(ours.eval(), theirs)
    assert_same_tokens(tokenizer, their_tokenizer, [*TEXTS, play[:5000]])
    assert_same_greedy_text(ours, theirs, tokenizer)


def test_a_long_context_is_no_worse(out, characters):
    """Their angles are in single precision, ours in double: at 1,024 positions it still agrees."""
    ours = randomised(block_size=1024, n_embd=64, n_layer=1)
    assert_same_logits(ours, out(ours, characters)[0], rows=1)


def test_byte_pairs_get_out_and_come_back(out, bpe, play):
    """vocab.json and merges.txt are among the files, so that both programs open the folder."""
    ours = randomised(vocab_size=bpe.vocab_size, positions="learned", qk_norm=False,
                      activation="gelu", bias=True, tie_weights=True)
    theirs, tokenizer, folder = out(ours, bpe)
    texts = [*TEXTS, play[:5000], "na\u00efve \U0001f600\u200d\U0001f468 caf\u00e9\t\r\n \u3000x",
             "a<|endoftext|>b <|endoftext|>", "for i in range(10):\n        x[i] += 1"]
    assert_same_tokens(bpe, tokenizer, texts)
    assert_same_logits(ours, theirs)
    assert_same_greedy_text(ours, theirs, bpe)
    back, their_bpe, _ = gpt.open_model(str(folder))
    assert their_bpe.stoi == bpe.stoi
    torch.testing.assert_close(back.state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_byte_pairs_with_rotary_positions(out, bpe, play):
    """The tokenizer does not depend on the model's kind."""
    ours = randomised(vocab_size=bpe.vocab_size)
    theirs, tokenizer, _ = out(ours, bpe)
    assert_same_tokens(bpe, tokenizer, [*TEXTS, play[:5000], "a<|endoftext|>b"])
    assert_same_greedy_text(ours, theirs, bpe)


@pytest.fixture(scope="module")
def their_bpe(to_transformers, tmp_path_factory, bpe):
    folder = tmp_path_factory.mktemp("bpe_out")
    gpt.save_checkpoint(folder / "m.pt", randomised(vocab_size=bpe.vocab_size), bpe)
    return load(to_transformers, folder / "m.pt", folder / "folder")[1]


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text(" \n'stmabe1.,\u00e9"))
def test_merges_are_found_again(bpe, their_bpe, text):
    """A checkpoint has no merges: those made from its tokens split any text as its own did."""
    assert their_bpe.encode(text) == bpe.encode(text).tolist()


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_spare_ids_are_never_written(kind, out, characters, bpe):
    """A model may have more ids than its tokenizer: neither program writes one."""
    tokenizer = {"char": characters, "bpe": bpe}[kind]
    ours = randomised(vocab_size=tokenizer.vocab_size + 40)
    with torch.no_grad():
        ours.lm_head.weight[-40:] *= 5  # else they might not be the likeliest
    theirs, _, _ = out(ours, tokenizer)
    ids = row([1, 2])
    assert ours.generate(ids, 20, temperature=0.0).max() >= tokenizer.vocab_size
    assert_same_logits(ours, theirs)
    assert_same_greedy_text(ours, theirs, tokenizer)


@pytest.mark.parametrize("text", ["\u00e9", "a\U0001f600", "<unk>", "\t"])
def test_an_unknown_character_is_refused(text, out, characters):
    """By both tokenizers: there is no id that it could have."""
    tokenizer = out(randomised(), characters)[1]
    with pytest.raises(gpt.UserError):
        characters.encode(text)
    with pytest.raises(Exception, match="UNK"):
        tokenizer(text)


def test_any_alphabet_gets_out(out):
    """Line ends, tabs, accents that combine, letters of four bytes, and look-alikes of tokens."""
    text = "\r\n\t \x00\u2028e\u0301\u00e9\U0001f600\u3000\u200d#\u0120\u2581<unk>[]\\\"'."
    characters = alphabet(text)
    tokenizer = out(randomised(vocab_size=characters.vocab_size), characters)[1]
    assert_same_tokens(characters, tokenizer, [text, text[::-1], "\r\n\r\n", "  \t ", "e\u0301"])


@pytest.mark.parametrize("config", [c for name, c in CONFIGS.items() if "learned: gelu" in name])
def test_learned_positions_come_back(config, out, characters):
    """Out and in again: the same logits to the last bit; zeros where there was no bias."""
    ours = randomised(**config)
    folder = out(ours, characters)[2]
    back = gpt.GPTLanguageModel.from_pretrained(folder).eval()
    idx = torch.randint(62, (2, 32))
    expected = ours(idx)[0]
    assert (back(idx)[0] - expected).abs().max() <= 1e-6 * expected.abs().max()
    state = back.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(state.pop(name), tensor)
    assert not any(tensor.any() for tensor in state.values())


@pytest.mark.parametrize("name", ["rotary: default", "learned: relu", "learned: relu2"])
def test_what_is_no_gpt2_does_not_come_back(name, out, characters):
    """The guide says so; loading it as GPT-2 would compute something else."""
    folder = out(randomised(**CONFIGS[name]), characters)[2]
    with pytest.raises(gpt.UserError):
        gpt.GPTLanguageModel.from_pretrained(folder)


def test_character_folders_are_no_checkpoints(out, characters):
    """There is no vocab.json in them, and the error names it."""
    folder = out(randomised(**CONFIGS["learned: gelu"]), characters)[2]
    with pytest.raises(gpt.UserError, match=r"vocab\.json"):
        gpt.open_model(str(folder))


def test_learned_positions_with_qk_norm_are_refused(out, characters):
    """Nothing may be written that would load and compute something else."""
    with pytest.raises(ValueError, match="qk_norm"):
        out(randomised(positions="learned", qk_norm=True), characters)


@pytest.mark.parametrize("name", ["rotary: default", "learned: gelu"])
def test_the_pipeline_writes_text(name, out, characters):
    """From the folder alone, after a prompt with spaces that some tokenizers tidy away."""
    ours = randomised(**CONFIGS[name])
    folder = out(ours, characters)[2]
    write = pipeline("text-generation", str(folder), device="cpu")
    prompt = "\nO  no ! "
    text = write(prompt, max_new_tokens=20, do_sample=False)[0]["generated_text"]
    expected = ours.generate(characters.encode(prompt), 20, temperature=0.0)[0]
    assert text == characters.decode(expected)
    drawn = write(prompt, max_new_tokens=20, do_sample=True, num_return_sequences=3)
    assert all(len(d["generated_text"]) == len(prompt) + 20 for d in drawn)


def test_gpt2_fails_past_its_context(out, characters):
    """As the guide warns: our own model goes on."""
    ours = randomised(**CONFIGS["learned: gelu"])
    theirs = out(ours, characters)[0]
    ids = row(characters.encode("O" * 30))
    assert ours.generate(ids, 10).shape == (1, 40)
    with pytest.raises(IndexError), contextlib.redirect_stderr(io.StringIO()):
        theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10)


def test_the_table_of_names_is_right():
    """Every row of the guide, against the names and shapes of both programs."""
    V, S, C = 11, 7, 8
    shape = dict(n_layer=1, n_head=2, n_embd=C, vocab_size=V)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=S, **shape)).transformer.state_dict()
    ours = gpt.GPTLanguageModel(gpt.GPTConfig(
        **shape, block_size=S, bias=True, positions="learned", qk_norm=False,
        activation="gelu", tie_weights=True)).state_dict()
    cells = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in GUIDE.splitlines()
             if re.match(r"\| `\w.*\.weight` \|", line)]
    found, seen = set(), set()
    for our_name, their_name, *shapes, remark in cells:
        our_name, their_name = our_name.replace(".N.", ".0."), their_name.replace(".N.", ".0.")
        sizes = [tuple({"V": V, "S": S, "C": C, "3C": 3 * C, "4C": 4 * C}[s]
                       for s in re.findall(r"\w+", cell)) for cell in shapes]
        assert sizes == [tuple(ours[our_name].shape), tuple(theirs[their_name].shape)], our_name
        assert (remark == "turned") == (sizes[0] != sizes[1] or "c_proj" in their_name)
        assert (remark == "tied") == (their_name in seen)
        for ending in ("weight", "bias"):
            names = our_name.replace("weight", ending), their_name.replace("weight", ending)
            if names[0] in ours:
                assert ending == "weight" or ours[names[0]].shape == theirs[names[1]].shape
                found.add(names[0])
                seen.add(names[1])
    assert found == ours.keys() and seen == theirs.keys()


def test_the_table_of_the_two_models_is_right():
    """The guide's first table, against the presets that it names."""
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in GUIDE.splitlines()
            if line.startswith("|")][:10]
    names = gpt.GPTConfig.__dataclass_fields__
    for column, preset in enumerate(("gpt2", "gpu")):
        given = {name: value for name, value in gpt.PRESETS[preset].items() if name in names}
        c = gpt.GPTConfig(**given)
        told = [row[column] for row in rows]
        assert f"--preset {preset}`" in told[0]
        assert told[2] == f"{c.n_layer}, {c.n_head}, {c.n_embd}"
        assert told[3].startswith(f"{c.block_size:,} ")
        assert told[5].startswith(c.positions)
        assert told[6].startswith("normalised" if c.qk_norm else "as they are")
        assert told[7].startswith({"gelu": "GELU", "relu2": "squared ReLU"}[c.activation])
        assert told[8].startswith("in every" if c.bias else "none")
        assert told[9].startswith("the token table" if c.tie_weights else "a matrix")


def test_a_model_that_came_in_gets_out(out, bpe, tmp_path):
    """A GPT-2 of theirs, loaded here, fine-tuned here for two steps, and handed back."""
    shape = dict(n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=bpe.vocab_size,
                 initializer_range=0.2, bos_token_id=None, eos_token_id=None)
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "in")
    out(randomised(vocab_size=bpe.vocab_size), bpe)  # vocab.json and merges.txt
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "folder" / name).rename(tmp_path / "in" / name)
    ours, tokenizer = gpt.train(init_from=str(tmp_path / "in"), ckpt=str(tmp_path / "tuned.pt"),
                                max_iters=2, eval_interval=2, batch_size=2,
                                preset="cpu", device="cpu", precision="fp32", data="input.txt")
    theirs, their_tokenizer, _ = out(ours.eval(), tokenizer)
    assert type(theirs) is GPT2LMHeadModel
    assert_same_logits(ours, theirs)
    assert_same_tokens(tokenizer, their_tokenizer, TEXTS)
