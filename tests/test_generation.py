"""Section 4 of gpt.py: the cache changes nothing, and every option does what it says."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers.generation import logits_process as theirs

from gpt import KVCache, SampleConfig, generate_tokens, penalize_repetition, probabilities

each_position = pytest.mark.parametrize("positions", ["learned", "rotary"])
greedy = {"temperature": 0.0}
plain = {"temperature": 1.0, "top_p": 1.0}  # draw from softmax(logits)


def tokens(*shape):
    return torch.randint(13, shape)


def recompute(model, tokens, n):
    """The logits (B, n, V) before each of the last n tokens, computed without a cache.

    The window that is kept: up to block_size tokens. When it is full, its newer half stays.
    """
    block_size, first, logits = model.config.block_size, tokens.size(1) - n, []
    start = max(0, first - block_size)
    for end in range(first, tokens.size(1)):
        if end - start > block_size:
            start = end - max(1, block_size // 2)
        logits.append(model(tokens[:, start:end])[0][:, -1])
    return torch.stack(logits, dim=1)


def fix_logits(model, logits):
    """Make the model's logits these, (V,), whatever it reads."""
    logits = torch.tensor(logits, dtype=torch.float64)
    model.lm_head.register_forward_hook(lambda head, args, out: logits.expand(out.shape).clone())
    return model


def draws(model, count, **options):
    """How often each token follows token 0, in so many draws."""
    prompts = torch.zeros(count, 1, dtype=torch.long)
    new = model.generate(prompts, 1, **{"seed": 1} | options)[:, 1]
    return new.bincount(minlength=model.config.vocab_size)


# -------------------------------------------------------------------------------------- the cache
@each_position
@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("block_size, T", [(8, 1), (8, 5), (8, 8), (8, 13), (7, 3), (2, 1), (2, 3),
                                           (1, 1), (1, 2)])
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
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(out[:, T:], expected.argmax(dim=-1))


@each_position
def test_each_token_is_read_once(make_model, positions):
    """The prompt in one piece, then one token a step; after 8, the last half of the context."""
    model, lengths = make_model(positions=positions), []
    model.token_embedding.register_forward_hook(lambda m, args, out: lengths.append(out.size(1)))
    model.generate(tokens(1, 5), 14)
    assert lengths == [5, 1, 1, 1] + [4, 1, 1, 1, 1] * 2


def test_the_cache_keeps_what_each_layer_appended(make_model):
    cache = KVCache(make_model(torch.bfloat16), batch_size=3)
    keys, values = torch.randn(2, 2, 3, 2, 8, 8).bfloat16()  # (layers, B, nh, T, hs) each
    for start, end in ((0, 5), (5, 6), (6, 8)):
        for layer in range(2):
            k, v = cache.append(layer, keys[layer, :, :, start:end], values[layer, :, :, start:end])
            assert torch.equal(k, keys[layer, :, :, :end]) and k.dtype == torch.bfloat16
            assert torch.equal(v, values[layer, :, :, :end])
        cache.length = end  # the model does this after its last layer


@each_position
def test_sequences_of_a_batch_do_not_mix(make_model, positions):
    model, idx = make_model(positions=positions), tokens(4, 3)
    options = greedy | {"repetition_penalty": 1.5}
    alone = torch.cat([model.generate(row, 15, **options) for row in idx])
    assert torch.equal(model.generate(idx, 15, **options), alone)
    assert len(alone[:, 3:].unique(dim=0)) > 1


# --------------------------------------------------------------------------- what generate accepts
@pytest.mark.parametrize("idx", [
    [3, 1], [[3, 1]], np.array([3, 1], np.uint8), torch.tensor([3, 1]).int(),
    torch.tensor([[3, 1]])], ids=["list", "nested list", "array", "(T,)", "(B, T)"])
def test_prompts(make_model, idx):
    """Any sequence of ids; the result is a tensor (B, T + max_new_tokens) that begins with it."""
    model = make_model()
    out = model.generate(idx, 3, seed=1)
    assert out.shape == (1, 5) and out.dtype == torch.int64 and out[0, :2].tolist() == [3, 1]
    assert torch.equal(out, model.generate(torch.tensor([[3, 1]]), 3, seed=1))
    assert model.generate(idx, 0).tolist() == [[3, 1]]


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
    model = make_model(torch.float32, block_size=32)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    idx = tokens(2, 5)
    assert not isinstance(small.blocks[0].feed_forward.up.weight, torch.Tensor)
    assert small.generate(idx, 40).shape == (2, 45)
    logits, expected = small(idx)[0], model(idx)[0]
    assert 0 < (logits - expected).abs().mean() < 0.1 * expected.abs().mean()


# ------------------------------------------------------------------------------------- temperature
@pytest.mark.parametrize("gap", [1.0, 1e-3, 2e-6])
@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-300])
def test_temperature_zero_takes_the_likeliest_token(make_model, gap, temperature):
    """However small its lead is."""
    logits = [-9.0] * 13
    logits[4], logits[7] = 5.0, 5.0 + gap
    assert draws(fix_logits(make_model(), logits), 500, temperature=temperature)[7] == 500


def test_greedy_text_does_not_depend_on_the_seed(make_model):
    """Also where two tokens are equally likely."""
    model = fix_logits(make_model(), [5.0, 1.0, 5.0] + [0.0] * 10)
    assert draws(model, 500, **greedy).max() == 500
    assert draws(model, 500, top_k=1, temperature=3.0).max() == 500


@pytest.mark.parametrize("temperature", [1e8, float("inf")])
def test_a_high_temperature_makes_all_tokens_equally_likely(temperature):
    probs = probabilities(torch.tensor([[30.0, -30.0, 0.0]]), temperature)
    torch.testing.assert_close(probs, torch.full((1, 3), 1 / 3))


# ------------------------------------------------------------------------------ top-k and top-p
@pytest.mark.parametrize("top_k", [1, 2, 5, 13, 14, 1000])
def test_top_k_keeps_the_k_likeliest(top_k):
    """More than there are changes nothing."""
    logits = torch.randn(6, 13)
    kept = probabilities(logits, top_k=top_k) > 0
    for row, keep in zip(logits, kept, strict=True):
        best = sorted(range(13), key=lambda i: -row[i])[:top_k]
        assert keep.nonzero().flatten().tolist() == sorted(best)
    if top_k >= 13:
        assert torch.equal(probabilities(logits, top_k=top_k), probabilities(logits))


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.3, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_top_p_keeps_the_fewest_tokens_that_reach_p(top_p, temperature):
    """Compared with a search through all sets of tokens; the temperature comes first."""
    logits = torch.tensor([0.9, 1.8, 0.0, 1.3, 0.4, 2.0])
    probs = (logits / temperature).softmax(dim=-1).tolist()
    sets = itertools.chain.from_iterable(itertools.combinations(range(6), n) for n in range(1, 7))
    reaching = [s for s in sets if sum(probs[i] for i in s) >= top_p - 1e-6]
    fewest = min(map(len, reaching))
    best = max((s for s in reaching if len(s) == fewest), key=lambda s: sum(probs[i] for i in s))
    kept = probabilities(logits[None], temperature, top_p=top_p)[0].nonzero().flatten()
    assert kept.tolist() == sorted(best)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_top_p_of_1_keeps_every_token(scale):
    """Rounding in a sum of 50,257 probabilities cuts nothing that is ever drawn."""
    logits = scale * torch.randn(4, 50257)
    torch.testing.assert_close(probabilities(logits, top_p=1.0), logits.softmax(dim=-1))


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6), (0.8, 40, 0.95), (2.0, 10, 0.9), (1.0, 3, 0.1)])
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    """Temperature, then top-k, then top-p. `logits` itself is left alone."""
    logits = 3 * torch.randn(200, 60)
    original, expected = logits.clone(), logits.clone()
    expected = theirs.TemperatureLogitsWarper(temperature)(None, expected)
    if top_k:
        expected = theirs.TopKLogitsWarper(top_k)(None, expected)
    expected = theirs.TopPLogitsWarper(top_p)(None, expected).softmax(dim=-1)
    probs = probabilities(logits, temperature, top_k, top_p)
    torch.testing.assert_close(probs, expected)
    assert torch.equal(logits, original)


@pytest.mark.parametrize("options", [
    {"temperature": 1.0}, {"temperature": 0.6}, {"temperature": 2.0},
    {"temperature": 1.5, "top_k": 6}, {"temperature": 1.5, "top_p": 0.8}], ids=str)
def test_draws_follow_the_probabilities(make_model, options):
    """A chi-square test of 8,000 draws."""
    model, options = make_model(n_layer=1), {"top_p": 1.0} | options
    logits = model(torch.zeros(1, 1, dtype=torch.long))[0][:, -1]
    probs = probabilities(logits, **options)[0]
    expected, counts = 8000 * probs, draws(model, 8000, **options)
    often = expected > 5
    assert often.sum() > 2 and not counts[probs == 0].any()
    chi_square = ((counts - expected) ** 2 / expected)[often].sum()
    assert chi_square < 40  # at most 12 degrees of freedom: larger once in 10,000 seeds


# ------------------------------------------------------------------------------ repetition penalty
@pytest.mark.parametrize("penalty", [1.0, 1.3, 5.0, 0.8])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    """Positive and negative logits both become smaller; a token that occurred twice, only once."""
    logits, idx = 3 * torch.randn(7, 13), tokens(7, 9)
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(idx, logits.clone())
    torch.testing.assert_close(penalize_repetition(logits, idx, penalty), expected)


@each_position
@pytest.mark.parametrize("T", [3, 8, 11])
def test_the_penalty_is_for_all_tokens_in_the_context(make_model, positions, T):
    """Of prompt and new tokens, the last block_size count; also right after a longer prompt."""
    model, penalty = make_model(positions=positions, block_size=8), 3.0
    out = model.generate(tokens(1, T), 10, **greedy, repetition_penalty=penalty)
    for i, logits in enumerate(recompute(model, out, 10)[0]):
        logits = logits.tolist()
        for seen in set(out[0, max(0, T + i - 8) : T + i].tolist()):
            logits[seen] = logits[seen] / penalty if logits[seen] > 0 else logits[seen] * penalty
        assert out[0, T + i] == logits.index(max(logits))
    assert not torch.equal(out, model.generate(out[:, :T], 10, **greedy))


# ------------------------------------------------------------------- seeds, and what is left alone
def test_a_seed_gives_the_same_text_whatever_ran_before(make_model):
    model, idx = make_model(), tokens(1, 3)
    first = model.generate(idx, 30, seed=5)
    torch.manual_seed(123)
    model.generate(idx, 7, seed=6)
    torch.rand(11)
    assert torch.equal(model.generate(idx, 30, seed=5), first)
    assert not torch.equal(model.generate(idx, 30, seed=6), first)


def test_seed_0_gives_a_new_text_each_time(make_model):
    """It is the default. torch.manual_seed makes no difference."""
    model, texts = make_model(), set()
    for options in ({}, {}, {"seed": 0}, {"seed": 0}):
        torch.manual_seed(1)
        texts.add(tuple(model.generate([1], 40, **plain, **options)[0].tolist()))
    assert len(texts) == 4


def test_sequences_with_the_same_prompt_differ(make_model):
    out = make_model().generate(torch.ones(8, 2, dtype=torch.long), 20, seed=1, **plain)
    assert len(out.unique(dim=0)) == 8


@pytest.mark.parametrize("seed", [0, 7])
def test_the_callers_random_numbers_are_left_alone(make_model, seed):
    """Training draws the same batches whether or not it generates in between."""
    model = make_model(dropout=0.5).train()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    model.generate([1, 2], 12, seed=seed)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]


@pytest.mark.parametrize("training", [False, True])
def test_there_is_no_dropout_and_the_mode_comes_back(make_model, training):
    model = make_model(dropout=0.5).train(training)
    out = model.generate([1], 12, **greedy)
    assert all(module.training is training for module in model.modules())
    assert torch.equal(model.eval().generate([1], 12, **greedy), out)
    assert torch.equal(out, make_model(dropout=0.0).generate([1], 12, **greedy))
