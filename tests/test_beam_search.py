"""The recipe for beam search in notes/generation_guide.md, run as it is printed there."""

import re

import pytest
import torch
from conftest import ROOT, alphabet
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import gpt
from notes.gpt2 import export_to_transformers

GUIDE = (ROOT / "notes" / "generation_guide.md").read_text(encoding="utf-8")
each_kind = pytest.mark.parametrize("options", [
    dict(positions="rotary"), dict(positions="learned", qk_norm=False, bias=True)], ids=str)

@pytest.fixture(scope="module")
def beam_search():
    """The function in the first block of code under the heading."""
    section = GUIDE[GUIDE.index("## Beam search\n") :]
    code = re.search(r"^```python\n(.*?)^```$", section, re.M | re.S)[1]
    namespace = {}
    exec(compile(code, "generation_guide.md", "exec"), namespace)
    return namespace["beam_search"]

@each_kind
def test_enough_beams_are_exhaustive_search(beam_search, make_model, options):
    """125 beams hold every beginning of three tokens: the best of all 625 texts are found."""
    model = make_model(vocab_size=5, **options)
    texts = torch.cartesian_prod(*[torch.arange(5)] * 4)  # (625, 4): all texts of four tokens
    ids = torch.cat((torch.tensor([[1, 2]]).expand(625, 2), texts), dim=1)
    log_probs = F.log_softmax(model(ids)[0][:, 1:-1], dim=-1)  # (625, 4, 5)
    log_probs = log_probs.gather(-1, texts[..., None]).sum(dim=(1, 2))
    expected, order = log_probs.sort(descending=True)
    beams, scores = beam_search(model, [1, 2], 125, 4)
    assert torch.equal(beams, texts[order[:125]])
    torch.testing.assert_close(scores.double(), expected[:125], rtol=1e-5, atol=1e-5)

def test_the_text_can_be_longer_than_the_context(beam_search, make_model):
    """Then each token depends on the last block_size tokens."""
    model = make_model(block_size=4)
    beams, _ = beam_search(model, [1, 2], 1, 12)
    ids = torch.cat((torch.tensor([[1, 2]]), beams), dim=1)
    for end in range(4, 14):
        logits, _ = model(ids[:, end - 4 : end])
        assert logits[0, -1].argmax() == ids[0, end]

@each_kind
@pytest.mark.parametrize("n_beams", [1, 2, 5])
def test_transformers_finds_the_same_beams(beam_search, make_model, folder, options, n_beams):
    """All of them, for several prompts, with the same weights."""
    model = make_model(torch.float32, block_size=16, **options)
    gpt.save_checkpoint("model.pt", model, alphabet("abcdefghijklm"))
    export_to_transformers("model.pt", "exported")
    theirs = AutoModelForCausalLM.from_pretrained("exported")
    for ids in ([0], [1, 2, 3], [12, 12, 7, 1]):
        prompt = torch.tensor([ids])
        expected = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), num_beams=n_beams, do_sample=False,
            num_return_sequences=n_beams, max_new_tokens=10, pad_token_id=0)
        beams, _ = beam_search(model, ids, n_beams, 10)
        assert torch.equal(beams, expected[:, len(ids) :])
