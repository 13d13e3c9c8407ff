"""The recipe for beam search in notes/generation_guide.md, run as it is printed there."""

import re

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import gpt
from notes.gpt2 import export_to_transformers

GUIDE = (ROOT / "notes" / "generation_guide.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def beam_search():
    """The function in the first block of code under the heading."""
    section = GUIDE[GUIDE.index("## Beam search\n") :]
    code = re.search(r"^```python\n(.*?)^```$", section, re.M | re.S)[1]
    namespace = {}
    exec(compile(code, "generation_guide.md", "exec"), namespace)
    return namespace["beam_search"]


@torch.no_grad()
def log_probability(model, ids, new):
    """Of each continuation new (N, n) of ids, (N,): one forward pass over the whole."""
    prompt = torch.tensor([ids]).expand(len(new), -1)
    logits, _ = model(torch.cat((prompt, new), dim=1)[:, :-1])
    log_probs = F.log_softmax(logits[:, len(ids) - 1 :], dim=-1)  # (N, n, V)
    return log_probs.gather(-1, new[..., None]).sum(dim=(1, 2))


OPTIONS = [dict(positions="rotary"), dict(positions="learned", qk_norm=False, bias=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=["rotary", "learned"])
@pytest.mark.parametrize("seed", range(3))
def test_enough_beams_are_exhaustive_search(beam_search, make_model, options, seed):
    """125 beams hold every beginning of three tokens: the best of all 625 texts are found."""
    model = make_model(seed=seed, vocab_size=5, **options)
    texts = torch.cartesian_prod(*[torch.arange(5)] * 4)  # (625, 4): all texts of four tokens
    expected, order = log_probability(model, [1, 2], texts).sort(descending=True)
    beams, scores = beam_search(model, [1, 2], 125, 4)
    assert torch.equal(beams, texts[order[:125]])
    torch.testing.assert_close(scores.double(), expected[:125], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_beams", [1, 3, 5])
def test_the_scores_are_the_log_probabilities(beam_search, make_model, n_beams):
    """Of the continuation alone, not of the prompt."""
    model = make_model(block_size=16)
    beams, scores = beam_search(model, [1, 2, 3], n_beams, 10)
    assert beams.shape == (n_beams, 10) and len(beams.unique(dim=0)) == n_beams
    expected = log_probability(model, [1, 2, 3], beams)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    assert (scores[:-1] >= scores[1:]).all()


def test_one_beam_is_greedy(beam_search, make_model):
    """Up to the end of the context; more beams find a likelier text here."""
    model = make_model(block_size=16)
    greedy = model.generate([1, 2], 14, temperature=0)[:, 2:]
    beams, scores = beam_search(model, [1, 2], 1, 14)
    assert torch.equal(beams, greedy)
    assert beam_search(model, [1, 2], 8, 14)[1][0] > scores[0] + 0.1


def test_the_text_can_be_longer_than_the_context(beam_search, make_model):
    """Then each token depends on the last block_size tokens."""
    model = make_model(block_size=4)
    beams, _ = beam_search(model, [1, 2], 1, 12)
    ids = torch.cat((torch.tensor([[1, 2]]), beams), dim=1)
    for end in range(4, 14):
        logits, _ = model(ids[:, end - 4 : end])
        assert logits[0, -1].argmax() == ids[0, end]


@pytest.mark.parametrize("options", OPTIONS, ids=["rotary", "learned"])
@pytest.mark.parametrize("n_beams", [1, 2, 5])
def test_transformers_finds_the_same_beams(beam_search, make_model, tmp_path, options, n_beams):
    """All of them, for several prompts, with the same weights."""
    model = make_model(torch.float32, block_size=16, **options)
    tokenizer = gpt.CharTokenizer({letter: i for i, letter in enumerate("abcdefghijklm")})
    gpt.save_checkpoint(tmp_path / "model.pt", model, tokenizer)
    export_to_transformers(tmp_path / "model.pt", tmp_path / "folder")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    for ids in ([0], [1, 2, 3], [12, 12, 7, 1]):
        prompt = torch.tensor([ids])
        expected = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), num_beams=n_beams, do_sample=False,
            num_return_sequences=n_beams, max_new_tokens=10, pad_token_id=0)
        beams, _ = beam_search(model, ids, n_beams, 10)
        assert torch.equal(beams, expected[:, len(ids) :])
