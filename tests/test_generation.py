"""Section 4 of gpt.py: the cache changes nothing, and every option does what it says."""

import numpy as np
import pytest
import torch
from conftest import assert_close, each_kernel, each_position, tokens
from torch import nn
from transformers.generation import logits_process as theirs

from gpt import SampleConfig, generate_tokens, penalize_repetition, probabilities

greedy = {"temperature": 0.0}

def recompute(model, tokens, n):
    """The logits (B, n, V) before each of the last n tokens, computed without a cache.

    The window that is kept: up to block_size tokens. When it is full, its newer half stays.
    """
    block_size = model.config.block_size
    first = tokens.size(1) - n
    start = max(0, first - block_size)
    logits = []
    for end in range(first, tokens.size(1)):
        if end - start > block_size:
            start = end - max(1, block_size // 2)
        logits.append(model(tokens[:, start:end])[0][:, -1])
    return torch.stack(logits, dim=1)


# -------------------------------------------------------------------------------------- the cache
@each_position
@each_kernel
@pytest.mark.parametrize("block_size, T", [(8, 1), (8, 5), (8, 8), (8, 13), (7, 3), (2, 3), (1, 1)])
def test_the_cache_changes_nothing(make_model, positions, attention, block_size, T):
    """Every step's logits and greedy tokens equal those without a cache, past the context too.

    The prompts have one token, several, as many as the context, and more.
    """
    model = make_model(positions=positions, attention=attention, block_size=block_size)
    idx, steps = tokens(3, T), []
    hook = model.lm_head.register_forward_hook(lambda head, args, out: steps.append(out[:, -1]))
    out = model.generate(idx, 20, **greedy)
    hook.remove()
    expected = recompute(model, out, 20)
    assert torch.equal(out[:, :T], idx)
    assert_close(torch.stack(steps, dim=1), expected)
    assert torch.equal(out[:, T:], expected.argmax(dim=-1))

def test_each_token_is_read_once(make_model):
    """The prompt in one piece, then one token a step; after 8, the last half of the context."""
    model, lengths = make_model(), []
    model.token_embedding.register_forward_hook(lambda m, args, out: lengths.append(out.size(1)))
    model.generate(tokens(1, 5), 14)
    assert lengths == [5, 1, 1, 1] + [4, 1, 1, 1, 1] * 2


# --------------------------------------------------------------------------- what generate accepts
@pytest.mark.parametrize("idx", [
    [3, 1], [[3, 1]], np.array([3, 1], np.uint8), torch.tensor([3, 1]).int()],
    ids=["list", "nested list", "array", "tensor"])
def test_prompts(make_model, idx):
    """Any sequence of ids; the result is a tensor (B, T + max_new_tokens) that begins with it."""
    model = make_model()
    out = model.generate(idx, 3, seed=1)
    assert out.shape == (1, 5)
    assert out[0, :2].tolist() == [3, 1]
    assert torch.equal(out, model.generate(torch.tensor([[3, 1]]), 3, seed=1))

def test_tokens_come_one_by_one(make_model):
    """generate_tokens yields what generate collects, by default 500 tokens."""
    model, idx = make_model(), tokens(2, 3)
    new = list(generate_tokens(model, idx, SampleConfig(max_new_tokens=12, seed=4)))
    assert [t.shape for t in new] == [(2, 1)] * 12
    assert torch.equal(torch.cat(new, dim=1), model.generate(idx, 12, seed=4)[:, 3:])
    assert model.generate(idx).shape == (2, 503)

def test_what_was_generated_can_be_trained_on(make_model):
    model = make_model()
    out = model.generate([1], 6)
    model(out[:, :-1], out[:, 1:])[1].backward()
    assert model.lm_head.weight.grad.any()

@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated, and its successor not installed
@pytest.mark.skipif(not hasattr(torch, "ao"), reason="this PyTorch has no torch.ao")
def test_a_quantised_model_generates(make_model):
    """Its layers have no .weight tensor any more."""
    model = make_model(torch.float32)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert small.generate(tokens(2, 5), 40).shape == (2, 45)


# ------------------------------------------------------------------------------------- temperature
def test_temperature_zero_takes_the_likeliest_token():
    """However small its lead is; of two equal tokens always the same one."""
    logits = torch.tensor([[5.0, 1.0, 5.000002, 0.0], [1.0, 7.0, 7.0, 0.0]])
    for temperature in (0.0, 1e-6):
        probs = probabilities(logits, temperature)
        assert probs.tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]


# ------------------------------------------------------------------------------ top-k and top-p
def test_top_p_of_1_keeps_every_token():
    """Rounding in a sum of 50,257 probabilities cuts nothing that is ever drawn."""
    logits = 0.1 * torch.randn(4, 50257)
    torch.testing.assert_close(probabilities(logits, top_p=1.0), logits.softmax(dim=-1))

@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6), (0.8, 40, 0.95), (2.0, 10, 0.9), (1.0, 1, 1.0),
    (1.0, 60, 1.0), (1.0, 0, 0.0)])
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    """Temperature, then top-k, then top-p. `logits` itself is left alone."""
    logits = 3 * torch.randn(200, 60)
    original, expected = logits.clone(), logits.clone()
    expected = theirs.TemperatureLogitsWarper(temperature)(None, expected)
    if top_k:
        expected = theirs.TopKLogitsWarper(top_k)(None, expected)
    expected = theirs.TopPLogitsWarper(top_p)(None, expected).softmax(dim=-1)
    torch.testing.assert_close(probabilities(logits, temperature, top_k, top_p), expected)
    assert torch.equal(logits, original)

@pytest.mark.parametrize("options", [
    {"temperature": 0.6}, {"temperature": 1.5, "top_k": 6}, {"temperature": 1.5, "top_p": 0.8}],
    ids=str)
def test_draws_follow_the_probabilities(make_model, options):
    """A chi-square test of 8,000 draws of what follows token 0."""
    model, options = make_model(n_layer=1), {"top_p": 1.0} | options
    prompts = torch.zeros(8000, 1, dtype=torch.long)
    counts = model.generate(prompts, 1, seed=1, **options)[:, 1].bincount(minlength=13)
    probs = probabilities(model(prompts[:1])[0][:, -1], **options)[0]
    expected = 8000 * probs
    often = expected > 5
    assert not counts[probs == 0].any()
    chi_square = ((counts - expected) ** 2 / expected)[often].sum()
    assert chi_square < 40  # at most 12 degrees of freedom: larger once in 10,000 seeds


# ------------------------------------------------------------------------------ repetition penalty
@pytest.mark.parametrize("penalty", [1.0, 1.3, 5.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    """Positive and negative logits both become smaller; a token that occurred twice, only once."""
    logits, idx = 3 * torch.randn(7, 13), tokens(7, 9)
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(idx, logits.clone())
    torch.testing.assert_close(penalize_repetition(logits, idx, penalty), expected)

@pytest.mark.parametrize("T", [3, 8, 11])
def test_the_penalty_is_for_all_tokens_in_the_context(make_model, T):
    """Of prompt and new tokens, the last block_size count; also right after a longer prompt."""
    model = make_model()
    out = model.generate(tokens(2, T), 10, **greedy, repetition_penalty=3.0)
    logits = recompute(model, out, 10)
    for i in range(10):
        context = out[:, : T + i][:, -8:]
        likeliest = penalize_repetition(logits[:, i], context, 3.0).argmax(dim=-1)
        assert torch.equal(out[:, T + i], likeliest)


# ------------------------------------------------------------------- seeds, and what is left alone
def test_a_seed_gives_the_same_text_whatever_ran_before(make_model):
    model, idx = make_model(), tokens(1, 3)
    first = model.generate(idx, 30, seed=5)
    torch.manual_seed(123)
    assert torch.equal(model.generate(idx, 30, seed=5), first)
    assert not torch.equal(model.generate(idx, 30, seed=6), first)

def test_seed_0_gives_a_new_text_each_time(make_model):
    """It is the default. torch.manual_seed makes no difference."""
    model, texts = make_model(), set()
    for options in ({}, {}, {"seed": 0}):
        torch.manual_seed(1)
        texts.add(tuple(model.generate([1], 40, temperature=1.0, **options)[0].tolist()))
    assert len(texts) == 3

@pytest.mark.parametrize("seed", [0, 7])
def test_the_callers_random_numbers_are_left_alone(make_model, seed):
    """Training draws the same batches whether or not it generates in between."""
    model = make_model(dropout=0.5).train()
    before = torch.get_rng_state()
    model.generate([1, 2], 12, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)

@pytest.mark.parametrize("training", [False, True])
def test_there_is_no_dropout_and_the_mode_comes_back(make_model, training):
    model = make_model(dropout=0.5).train(training)
    out = model.generate([1], 12, **greedy)
    assert all(module.training is training for module in model.modules())
    assert torch.equal(out, make_model(dropout=0.0).generate([1], 12, **greedy))
