"""OpenAI's GPT-2 in our file: a random one made by transformers must come out the same here.

The hub's own weights are out of reach of a test; their layout of names is imitated.
"""

import json
import shutil

import pytest
import torch
from conftest import TEXT, run
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt import GPTLanguageModel, UserError, open_model

SHAPES = {
    "one head": dict(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=1),
    "odd vocabulary": dict(vocab_size=257, n_positions=24, n_embd=48, n_layer=3, n_head=4),
    "untied": dict(vocab_size=101, n_positions=20, n_embd=32, n_layer=2, n_head=8,
                   tie_word_embeddings=False),
}
OURS_TO_THEIRS = {
    "token_embedding.weight": "transformer.wte.weight",
    "position_embedding.weight": "transformer.wpe.weight",
    "lm_head.weight": "lm_head.weight",
    "ln_f": "transformer.ln_f",
    "ln_1": "ln_1",
    "ln_2": "ln_2",
    "attention.qkv": "attn.c_attn",
    "attention.proj": "attn.c_proj",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
FILES = ("config.json", "model.safetensors", "vocab.json", "merges.txt")


def make_theirs(**shape):
    """A random GPT-2 with no weight left at its start: biases and norms count too."""
    config = GPT2Config(**shape, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def pair(request, tmp_path):
    """Their model, and ours from the folder that theirs was saved to."""
    theirs = make_theirs(**request.param)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    return theirs, GPTLanguageModel.from_pretrained(tmp_path).eval()


@pytest.fixture
def folder(tmp_path):
    """A saved model to damage."""
    make_theirs(**SHAPES["one head"]).save_pretrained(tmp_path, safe_serialization=True)
    return tmp_path


def change_weights(folder, change):
    """Rewrite the weights' file after change({name: tensor})."""
    state = load_file(folder / "model.safetensors")
    state = change(state) or state
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def tokens(model, *shape):
    return torch.randint(model.config.vocab_size, shape)


# ---------------------------------------------------------------------------- the same arithmetic
@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_logits_equal(pair, attention):
    """At every length the largest difference is at most 1e-5 of the largest logit, in fp32."""
    theirs, ours = pair
    ours.config.attention = attention
    for T in (1, 7, ours.config.block_size):
        idx = tokens(ours, 3, T)
        expected = theirs(idx).logits
        logits = ours(idx)[0]
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_loss_equals(pair):
    """transformers shifts its labels by itself; ours are given shifted."""
    theirs, ours = pair
    idx = tokens(ours, 4, 15)
    expected = theirs(idx, labels=idx).loss.item()
    assert ours(idx[:, :-1], idx[:, 1:])[1].item() == pytest.approx(expected, rel=1e-5)


def test_gradients_equal_for_every_parameter(pair):
    """One backward pass, parameter by parameter: theirs turned round where ours is."""
    theirs, ours = pair
    idx = tokens(ours, 4, 15)
    theirs(idx, labels=idx).loss.backward()
    ours(idx[:, :-1], idx[:, 1:])[1].backward()
    expected, compared = dict(theirs.named_parameters()), set()
    for name, parameter in ours.named_parameters():
        hf = name
        for here, there in OURS_TO_THEIRS.items():
            hf = hf.replace(here, there)
        hf = hf.replace("blocks.", "transformer.h.")
        gradient = expected[hf].grad
        if parameter.dim() == 2 and name.startswith("blocks."):
            gradient = gradient.T
        assert (parameter.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
        compared.add(hf)
    assert compared == set(expected)


def test_greedy_text_with_cache_equals(pair):
    """Both write with a cache, from prompts of several tokens to the end of the context."""
    theirs, ours = pair
    idx = tokens(ours, 3, 4)
    n = ours.config.block_size - 4
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False,
                               use_cache=True, max_new_tokens=n, pad_token_id=0)
    assert expected.shape == (3, 4 + n)
    assert torch.equal(ours.generate(idx, n, temperature=0.0), expected)


@pytest.mark.parametrize("beams", [2, 5])
def test_beams_equal(pair, beams):
    """Beam search finds what transformers' finds without an end token."""
    theirs, ours = pair
    idx = tokens(ours, 2, 3)
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), num_beams=beams,
                               do_sample=False, max_new_tokens=10, early_stopping=False,
                               eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(idx, 10, beams=beams), expected)


def test_the_gelu_is_the_tanh_one(pair):
    """GPT-2 was trained with the approximation, which is not the exact function."""
    theirs, ours = pair
    x = torch.linspace(-4, 4, 8 * ours.config.n_embd).view(8, -1)
    layer = ours.blocks[0].feed_forward
    approximate, exact = (layer.down(F.gelu(layer.up(x), approximate=kind))
                          for kind in ("tanh", "none"))
    torch.testing.assert_close(layer(x), approximate, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x), theirs.transformer.h[0].mlp(x), rtol=1e-4, atol=1e-4)
    assert (layer(x) - exact).abs().max() > 10 * (layer(x) - approximate).abs().max()


# ----------------------------------------------------------------------------- the files and names
def test_the_config_is_read(pair):
    """Sizes come from config.json; the rest is what GPT-2 is."""
    theirs, ours = pair
    for name in ("n_layer", "n_head", "n_embd", "vocab_size"):
        assert getattr(ours.config, name) == getattr(theirs.config, name)
    assert ours.config.block_size == theirs.config.n_positions
    assert ours.config.bias and not ours.config.qk_norm and ours.config.positions == "learned"
    tied = ours.lm_head.weight is ours.token_embedding.weight
    assert tied == ours.config.tie_weights == theirs.config.tie_word_embeddings
    assert all(p.requires_grad and isinstance(p, nn.Parameter) for p in ours.parameters())


def test_openais_own_layout_loads(folder):
    """The hub's file has names without "transformer." and masks beside the weights."""
    expected = GPTLanguageModel.from_pretrained(folder).state_dict()

    def as_openai(state):
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        state["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        return state

    change_weights(folder, as_openai)
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)  # older than this key
    (folder / "config.json").write_text(json.dumps(config))
    loaded = GPTLanguageModel.from_pretrained(folder).state_dict()
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


def test_a_name_is_fetched_from_the_hub(folder, monkeypatch):
    """'gpt2-medium' is OpenAI's repository there, and only the four files are asked for."""
    asked = []

    def fetch(repository, **options):
        asked.append((repository, sorted(options["allow_patterns"])))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert GPTLanguageModel.from_pretrained("gpt2-medium").config.n_embd == 16
    assert asked == [("openai-community/gpt2-medium", sorted(FILES))]


def test_no_network_says_which_files_to_fetch(monkeypatch):
    """The error names the four files and says to put them into a folder."""
    def refuse(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError) as error:
        GPTLanguageModel.from_pretrained("gpt2")
    assert all(name in str(error.value) for name in (*FILES, "folder", "no network"))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(folder, missing):
    """And the error names what belongs there."""
    (folder / missing).unlink()
    with pytest.raises(UserError) as error:
        GPTLanguageModel.from_pretrained(folder)
    assert all(name in str(error.value) for name in FILES)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 100])
def test_damaged_files_are_refused(folder, name, content):
    """Half a download, or something else altogether."""
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json"):
        GPTLanguageModel.from_pretrained(folder)


def remove(state):
    del state["transformer.h.0.mlp.c_fc.bias"]


def leave_over(state):
    state["transformer.h.0.mlp.c_extra.weight"] = torch.ones(2, 2)


def extra_block(state):
    state["transformer.h.1.ln_1.weight"] = torch.ones(16)


def widen(state):
    state["transformer.wpe.weight"] = torch.ones(17, 16)


def turn(state):
    name = "transformer.h.0.mlp.c_fc.weight"
    state[name] = state[name].T.contiguous()


@pytest.mark.parametrize("damage, name", [
    (remove, r"blocks\.0\.feed_forward\.up\.bias"), (leave_over, r"c_extra"),
    (extra_block, r"blocks\.1\.ln_1"), (widen, r"position_embedding"),
    (turn, r"blocks\.0\.feed_forward\.up\.weight"),
])
def test_weights_that_do_not_fit_are_named(folder, damage, name):
    """Missing, left over, of another shape, or not turned round: the error says which."""
    change_weights(folder, damage)
    with pytest.raises(UserError, match=name):
        GPTLanguageModel.from_pretrained(folder)


@pytest.mark.parametrize("change", [
    {"activation_function": "gelu"}, {"activation_function": "relu"}, {"layer_norm_epsilon": 1e-3},
    {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True},
], ids=str)
def test_another_arithmetic_is_refused(folder, change):
    """A GPT-2 variant that would load and silently compute something else."""
    change_config(folder, **change)
    with pytest.raises(UserError, match=next(iter(change)).split("_")[0]):
        GPTLanguageModel.from_pretrained(folder)


def test_a_folder_of_both_writes_text(folder, bpe_folder):
    """Weights and vocabulary in one folder are all that a fine-tuning or a sample needs."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(bpe_folder / name, folder)
    (folder / "model.safetensors").unlink()
    make_theirs(**SHAPES["one head"] | {"vocab_size": 704}).save_pretrained(folder)
    model, tokenizer, _ = open_model(str(folder))
    out = model.generate(tokenizer.encode("To be"), 30, tokenizer, seed=1)
    assert out.max() < 700 and tokenizer.decode(out[0]).startswith("To be")


@pytest.mark.parametrize("words, code", [("", 0), ("--tokenizer gpt2", 0), ("--tokenizer char", 2)])
def test_a_folder_is_fine_tuned_with_its_tokenizer(folder, bpe_folder, monkeypatch, words, code):
    """To name the byte pairs once more is no contradiction; to ask for characters is one."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(bpe_folder / name, folder)
    (folder / "model.safetensors").unlink()
    make_theirs(**SHAPES["one head"] | {"vocab_size": 704}).save_pretrained(folder)
    monkeypatch.chdir(folder)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    assert run("--train", "--init_from", folder, "--data", "text.txt", "--device", "cpu",
               "--max_iters", 1, "--batch_size", 2, "--ckpt", "run.pt", *words.split()) == code
    if code == 0:
        model, tokenizer, _ = open_model("run.pt")
        assert tokenizer.kind == "bpe" and model.config.vocab_size == 704
