"""Generation: the cache changes nothing, every option does what it says, nothing leaks out."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt import CharTokenizer, SampleConfig

everywhere = pytest.mark.parametrize("positions", ["learned", "rotary"])
greedy = {"temperature": 0.0}
plain = {"temperature": 1.0, "top_p": 1.0}  # draw from softmax(logits)


def tokens(*shape, vocab_size=13):
    return torch.randint(vocab_size, shape)


def record(model):
    """A list that is given the scores (B, V) of every step from now on."""
    steps = []
    model.lm_head.register_forward_hook(lambda head, args, out: steps.append(out[:, -1].clone()))
    return steps


def script(model, *steps):
    """Make the model's scores these, step after step: each (V,), or (B, V); the last one stays."""
    steps = [torch.tensor(step, dtype=torch.float64) for step in steps]

    def replace(head, args, out):
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        return step.unsqueeze(-2).expand(out.shape).clone() if step.dim() > 1 else (
            step.expand(out.shape).clone())

    model.lm_head.register_forward_hook(replace)
    return model


def wishes(*ids, vocab_size=13):
    """Scores for `script` that make these ids certain; several ids at a step are those of rows."""
    return [(F.one_hot(torch.tensor(i), vocab_size) * 200.0 - 100).tolist() for i in ids]


def draws(model, count=4000, **how):
    """How often each token follows token 0, in so many draws."""
    start = torch.zeros(count, 1, dtype=torch.long)
    new = model.generate(start, 1, **plain | {"seed": 0} | how)[:, 1]
    return new.bincount(minlength=model.config.vocab_size)


@pytest.fixture
def uncached(monkeypatch):
    """uncached(model, text, n): scores (B, n, V) for the last n tokens of text, read anew.

    Learned positions: each step reads the window that is kept, which is the last block_size tokens,
    or, each time that it is full, its newer half. Rotary positions: one pass over everything, in
    which each position sees the block_size positions up to its own (a banded mask).
    """

    def read(model, text, n):
        room, first = model.config.block_size, text.size(1) - n
        start, logits = max(0, first - room), []
        if model.config.positions == "learned":
            for end in range(first, text.size(1)):
                if end - start > room:
                    start = end - max(1, room // 2)
                logits.append(model(text[:, start:end])[0][:, -1])
            return torch.stack(logits, dim=1)

        def banded(q, k, v, **options):
            T = q.size(2)
            band = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - room)
            return kernel(q, k, v, attn_mask=band)

        kernel, attention = F.scaled_dot_product_attention, model.config.attention
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", banded)
            model.config.attention = "fused"
            logits = model(text[:, start:-1])[0][:, -n:]
            model.config.attention = attention
        return logits

    return read


# -------------------------------------------------------------------------------------- the cache
@everywhere
@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("block_size, T", [(8, 1), (8, 5), (8, 8), (8, 13), (7, 3), (1, 2)])
def test_the_cache_changes_nothing(make_model, uncached, positions, attention, block_size, T):
    """Greedy tokens and every step's scores equal an uncached pass, past the end of the context.

    The prompts have one token, several, as many as the context, and more.
    """
    model = make_model(positions=positions, attention=attention, block_size=block_size)
    idx, steps = tokens(3, T), record(model)
    out = model.generate(idx, 20, **greedy)
    cached = torch.stack(steps, dim=1)  # (B, n, V)
    expected = uncached(model, out, 20)
    assert torch.equal(out[:, :T], idx)
    assert torch.equal(out[:, T:], expected.argmax(dim=-1))
    torch.testing.assert_close(cached, expected, rtol=1e-10, atol=1e-10)


@everywhere
def test_each_token_is_read_once(make_model, positions):
    """With a cache a step reads one token; learned positions start again on half of the context."""
    model, lengths = make_model(positions=positions), []
    model.token_embedding.register_forward_hook(lambda m, args, out: lengths.append(out.size(1)))
    model.generate(tokens(1, 5), 14, **greedy)
    assert lengths == [5, 1, 1, 1] + ([4, 1, 1, 1, 1] * 2 if positions == "learned" else [1] * 10)


@everywhere
def test_rows_of_a_batch_do_not_mix(make_model, positions):
    """A row continues as it does alone."""
    model, idx = make_model(positions=positions), tokens(4, 3)
    alone = torch.cat([model.generate(row, 15, **greedy) for row in idx])
    assert torch.equal(model.generate(idx, 15, **greedy), alone)
    assert len(alone[:, 3:].unique(dim=0)) > 1


def test_a_stream_is_what_generate_collects(make_model):
    """Token by token comes the same text as at once."""
    model, idx = make_model(), tokens(2, 3)
    stream = model.stream(idx, SampleConfig(max_new_tokens=12, seed=4))
    expected = model.generate(idx, 12, seed=4)[:, 3:]
    assert torch.equal(torch.stack(list(stream), dim=1), expected)


@pytest.mark.parametrize("idx", [[3, 1], np.array([3, 1], np.uint8), torch.tensor([3, 1]),
                                 torch.tensor([[3, 1]])], ids=["list", "array", "1-D", "2-D"])
def test_a_context_may_be_any_sequence_of_ids(make_model, idx):
    """Lists, a tokenizer's arrays and tensors all work, and the context opens the result."""
    model = make_model()
    out = model.generate(idx, 3, seed=0)
    assert out.shape == (1, 5) and out[0, :2].tolist() == [3, 1]
    assert torch.equal(out, model.generate([[3, 1]], 3, seed=0))
    assert model.generate(idx, 0).tolist() == [[3, 1]]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("alphabet, first", [("\t\nabc", 1), ("abc", 0), (None, 0)])
def test_an_empty_context_starts_with_a_newline(make_model, beams, alphabet, first):
    """Where the alphabet has one; else with id 0."""
    tokenizer = alphabet and CharTokenizer.from_text(alphabet)
    model = make_model()
    expected = model.generate([first], 5, tokenizer, beams=beams, seed=0)
    assert torch.equal(model.generate([], 5, tokenizer, beams=beams, seed=0), expected)
    assert expected[0, 0] == first


# ---------------------------------------------------------------------------- how a token is drawn
@pytest.mark.parametrize("gap", [1.0, 1e-3, 2e-6])
def test_temperature_zero_takes_the_likeliest(make_model, gap):
    """However small its lead is."""
    scores = [-9.0] * 13
    scores[4], scores[7] = 5.0, 5.0 + gap
    assert draws(script(make_model(n_layer=1), scores), **greedy)[7] == 4000


@pytest.mark.parametrize("how", [greedy, {"top_k": 1}], ids=["temperature 0", "top_k 1"])
def test_a_tie_is_not_drawn_by_lot(make_model, how):
    """Greedy text is the same whatever the seed, also where two tokens are equally likely."""
    counts = draws(script(make_model(n_layer=1), [5.0, 1.0, 5.0] + [0.0] * 10), **how)
    assert counts.max() == 4000


def test_top_k_one_is_greedy(make_model):
    """One candidate leaves no choice, at any temperature."""
    model, idx = make_model(), tokens(3, 4)
    expected = model.generate(idx, 15, **greedy)
    assert torch.equal(model.generate(idx, 15, top_k=1, temperature=3.0), expected)


def test_top_k_keeps_the_k_likeliest(make_model):
    """All of the k likeliest appear, and nothing else."""
    scores = [0.1 * (5 * i % 13) for i in range(13)]
    counts = draws(script(make_model(n_layer=1), scores), top_k=4)
    assert set(counts.nonzero().flatten().tolist()) == {i for i in range(13) if 5 * i % 13 > 8}


@pytest.mark.parametrize("top_k", [13, 14, 1000])
def test_top_k_may_exceed_the_vocabulary(make_model, top_k):
    """Then it changes nothing."""
    model, idx = make_model(), tokens(2, 4)
    expected = model.generate(idx, 10, **plain, seed=3)
    assert torch.equal(model.generate(idx, 10, **plain, seed=3, top_k=top_k), expected)


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.3, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(make_model, top_p, temperature):
    """Against a search through all sets of tokens; the temperature comes first."""
    scores = torch.tensor([0.9, 1.8, 0.0, 1.3, 0.4, 2.0], dtype=torch.float64)
    probs = (scores / temperature).softmax(dim=-1).tolist()
    sets = itertools.chain.from_iterable(itertools.combinations(range(6), n) for n in range(1, 7))
    reaching = [s for s in sets if sum(probs[i] for i in s) >= top_p - 1e-9]
    fewest = min(map(len, reaching))
    best = max((s for s in reaching if len(s) == fewest), key=lambda s: sum(probs[i] for i in s))
    model = script(make_model(n_layer=1, vocab_size=6), scores.tolist())
    counts = draws(model, top_p=top_p, temperature=temperature)
    assert counts.nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("how", [
    {"temperature": 1.0}, {"temperature": 0.6}, {"temperature": 2.0},
    {"temperature": 1.5, "top_k": 6}, {"temperature": 0.9, "top_p": 0.8},
], ids=str)
def test_draws_follow_the_probabilities(make_model, how):
    """A loose chi-square test of 8000 draws against softmax(logits / temperature), cut as asked."""
    model = make_model(n_layer=1)
    scores = model(torch.zeros(1, 1, dtype=torch.long))[0][0, 0] / how["temperature"]
    if "top_k" in how:
        scores[scores < scores.sort().values[-how["top_k"]]] = float("-inf")
    probs = scores.softmax(dim=-1)
    if "top_p" in how:
        order = probs.argsort(descending=True)
        kept = int((probs[order].cumsum(0) < how["top_p"]).sum()) + 1
        probs[order[kept:]] = 0.0
        probs = probs / probs.sum()
    counts = draws(model, 8000, **how).double()
    possible = probs > 0
    assert counts[~possible].sum() == 0
    expected = 8000 * probs[possible]
    assert possible.sum() > 2 and expected.max() < 7000
    likely = expected > 5
    chi_square = ((counts[possible] - expected) ** 2 / expected)[likely].sum()
    assert chi_square < 40  # at most 12 degrees of freedom: 1 in 10,000


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_repetition_penalty_lowers_whatever_the_sign(make_model, sign):
    """A token of the prompt loses its narrow lead, for positive scores and for negative ones."""
    scores = [1.0 * sign, 0.9 if sign > 0 else -1.1] + [-5.0] * 11
    model = script(make_model(), scores)
    assert model.generate([0], 1, **greedy, repetition_penalty=1.0)[0, 1] == 0
    assert model.generate([0], 1, **greedy, repetition_penalty=1.5)[0, 1] == 1


@everywhere
@pytest.mark.parametrize("penalty", [1.3, 3.0])
def test_the_repetition_penalty_is_for_prompt_and_new_tokens(make_model, positions, penalty):
    """Greedy text against a loop that divides or multiplies the score of each token seen, once."""
    model, prompt = make_model(positions=positions, block_size=16, seed=6), [3, 3, 5]
    text = list(prompt)
    for _ in range(10):
        scores = model(torch.tensor([text]))[0][0, -1].tolist()
        for i in set(text):
            scores[i] = scores[i] / penalty if scores[i] > 0 else scores[i] * penalty
        text.append(scores.index(max(scores)))
    out = model.generate(prompt, 10, **greedy, repetition_penalty=penalty)[0].tolist()
    assert out == text
    assert out != model.generate(prompt, 10, **greedy)[0].tolist()


def test_a_long_context_takes_no_memory_for_each_token_of_the_vocabulary(make_model):
    """2**18 ids of as many tokens: a table of all pairs would have 2**36 numbers."""
    model = make_model(n_layer=1, n_head=1, n_embd=2, vocab_size=2**18, dtype=torch.float32)
    assert model.generate(torch.arange(2**18), 2, **greedy).shape == (1, 2**18 + 2)


@pytest.mark.parametrize("beams", [1, 3])
def test_ids_without_a_token_are_never_written(make_model, beams):
    """A model may have more rows than its tokenizer has tokens, as padded GPT-2s do."""
    tokenizer = CharTokenizer.from_text("abc")
    model = script(make_model(), [0.0, 0.0, 0.0] + [9.0] * 10)
    out = model.generate([0], 30, tokenizer, beams=beams, temperature=2.0, top_p=1.0)
    assert out.max() < 3
    assert len(tokenizer.decode(out[0])) == 31


def test_spare_ids_stay_out_under_every_option(make_model):
    """Streams, penalties and cuts included."""
    tokenizer = CharTokenizer.from_text("abc")
    model = script(make_model(), [-1.0, -2.0, -3.0] + [9.0] * 10)
    for how in ({"repetition_penalty": 2.0}, {"top_k": 5}, {"top_p": 0.5}, greedy):
        options = SampleConfig(max_new_tokens=10, seed=0, **how)
        assert max(int(new) for new in model.stream([1], options, tokenizer)) < 3


# ------------------------------------------------------------ seeds, and what is left alone
def test_a_seed_gives_the_same_text_whatever_ran_before(make_model):
    """Its own random numbers: neither earlier draws nor torch's seed matter, but the seed does."""
    model, idx = make_model(), tokens(1, 3)
    first = model.generate(idx, 30, seed=5)
    torch.manual_seed(123)
    model.generate(idx, 7, seed=6)
    torch.rand(11)
    assert torch.equal(model.generate(idx, 30, seed=5), first)
    assert not torch.equal(model.generate(idx, 30, seed=6), first)


def test_without_a_seed_every_text_is_new(make_model):
    """Even right after torch was seeded."""
    model, texts = make_model(), set()
    for _ in range(3):
        torch.manual_seed(0)
        texts.add(tuple(model.generate([1], 30, **plain)[0].tolist()))
    assert len(texts) == 3


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("how", [{}, {"seed": 7}], ids=["no seed", "seed 7"])
def test_the_callers_random_numbers_are_left_alone(make_model, beams, how):
    """torch's, numpy's and Python's generators stand where they stood."""
    model = make_model(dropout=0.5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    model.generate([1, 2], 12, beams=beams, **how)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]


def test_several_samples_differ(make_model):
    """Rows with the same prompt and one seed go different ways."""
    out = make_model().generate(torch.ones(8, 2, dtype=torch.long), 20, seed=0, **plain)
    assert len(out.unique(dim=0)) == 8


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_the_mode_comes_back(make_model, training, beams):
    """Text is written without dropout, and the model goes on in the mode that it was in."""
    model = make_model(dropout=0.5).train(training)
    out = model.generate([1], 12, **greedy, beams=beams)
    assert all(module.training is training for module in model.modules())
    model.eval()
    assert torch.equal(model.generate([1], 12, **greedy, beams=beams), out)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("end", ["close", "forget", "raise"])
def test_the_mode_comes_back_from_an_unfinished_stream(make_model, training, end):
    """A stream that nobody reads to its end, or that fails, restores the mode too."""
    model = make_model().train(training)
    stream = model.stream([1], SampleConfig(max_new_tokens=5))
    next(stream)
    if end == "close":
        stream.close()
    elif end == "forget":
        del stream
    else:
        def fail(*args):
            raise RuntimeError("no luck")

        model.ln_f.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="no luck"):
            next(stream)
    assert all(module.training is training for module in model.modules())


def test_two_streams_at_once_do_not_disturb_each_other(make_model):
    """Each writes what it writes alone, without dropout, and the model goes on training."""
    model, how = make_model(dropout=0.5).train(), SampleConfig(max_new_tokens=9, seed=3)
    alone = [[int(new) for new in model.stream([first], how)] for first in (1, 2)]
    streams = [model.stream([first], how) for first in (1, 2)]
    mixed = [[int(next(stream)) for _ in range(3)] for stream in streams]
    mixed = [new + list(map(int, stream)) for new, stream in zip(mixed, streams, strict=True)]
    assert mixed == alone and model.training


@pytest.mark.parametrize("beams", [1, 2])
def test_what_was_written_can_be_trained_on(make_model, beams):
    """The result is an ordinary tensor: a loss on it has gradients."""
    model = make_model()
    out = model.generate([1], 6, beams=beams)
    model(out[:, :-1], out[:, 1:])[1].backward()
    assert model.lm_head.weight.grad.any()


# ------------------------------------------------------------------------------------------- stop
LETTERS = "abcdefghijklm"


def writer(model, *texts):
    """Make the model write these texts, one a row, whatever it reads; returns a tokenizer."""
    steps = [[LETTERS.index(s) for s in letters] for letters in zip(*texts, strict=True)]
    script(model, *wishes(*steps))
    return CharTokenizer.from_text(LETTERS)


@pytest.mark.parametrize("stop, written", [
    ("b", "b"), ("a", "ba"), ("bad", "bad"), ("dabb", "badabb"), ("add", "badabbadd"),
    ("badabbadd", "badabbadd"), ("dea", "badabbadde"), ("zz", "badabbadde"), ("", "badabbadde"),
])
def test_a_stop_string_ends_the_text(make_model, stop, written):
    """The text ends with the first stop string, of one token or several; without it, it goes on."""
    model = make_model(block_size=16)
    tokenizer = writer(model, "badabbaddee")
    out = model.generate([12], 10, tokenizer, stop=stop)[0]
    assert tokenizer.decode(out) == "m" + written


@everywhere
@pytest.mark.parametrize("stop", ["abc", "abcdefghijk"])
def test_a_stop_string_is_found_past_the_context(make_model, positions, stop):
    """Also where it begins before the window, or is longer than the window."""
    model = make_model(positions=positions, block_size=8)
    tokenizer = writer(model, "mmmmmmmmmmm" + LETTERS + "mmmm")
    out = model.generate([12], 28, tokenizer, stop=stop)[0]
    assert tokenizer.decode(out) == "m" * 12 + stop


@pytest.mark.parametrize("prompt, new", [("abba", "dcba"), ("ab", "adba"), ("baba", "aaba")])
def test_the_prompt_does_not_stop_the_text(make_model, prompt, new):
    """Only what is written counts: neither the prompt nor what begins in it."""
    model = make_model()
    tokenizer = writer(model, new + "bad")
    out = model.generate(tokenizer.encode(prompt), 7, tokenizer, stop="ba")[0]
    assert tokenizer.decode(out) == prompt + new


def test_rows_stop_when_all_have_stopped(make_model):
    """Several samples go on together until each has written the stop string."""
    model = make_model()
    tokenizer = writer(model, "aaadaaaa", "aaaaaada", "adaaaaaa")
    out = model.generate(torch.zeros(3, 1, dtype=torch.long), 8, tokenizer, stop="d")
    assert [tokenizer.decode(row) for row in out[:, 1:]] == ["aaadaaa", "aaaaaad", "adaaaaa"]


def test_a_stop_string_may_begin_and_end_within_tokens(make_model, bpe):
    """Byte pairs: it ends the text although no token begins or ends where the string does."""
    long = max((s for s in bpe.stoi if s.isascii() and s.isalpha()), key=len)  # "which", say
    ids = bpe.encode(f"so {long} {long} so {long}").tolist()
    inside = next(i for i in range(len(ids)) if long[1:3] in bpe.decode(ids[: i + 1]))
    model = script(make_model(vocab_size=700), *wishes(*ids, vocab_size=700))
    out = model.generate([1], len(ids), bpe, stop=long[1:3])[0, 1:].tolist()
    assert out == ids[: inside + 1]
    text = bpe.decode(ids)
    across = text[text.index(long) + len(long) - 2 :][:5]  # from within one word into the next
    model = script(make_model(vocab_size=700), *wishes(*ids, vocab_size=700))
    out = bpe.decode(model.generate([1], len(ids), bpe, stop=across)[0, 1:])
    assert across in out and out == text[: len(out)]
    assert across not in bpe.decode(bpe.encode(out)[:-1]) and len(out) < len(text)


# ------------------------------------------------------------------------------------------- beams
def likeliest(uncached, model, idx, n):
    """The likeliest continuation (T + n,) of idx (1, T) among all there are."""
    V = model.config.vocab_size
    every = torch.tensor(list(itertools.product(range(V), repeat=n)))
    text = torch.cat((idx.expand(len(every), -1), every), dim=1)
    log_probs = uncached(model, text, n).log_softmax(dim=-1)
    scores = log_probs.gather(2, every[:, :, None]).sum(dim=(1, 2))
    return text[scores.argmax()]


@everywhere
@pytest.mark.parametrize("T, block_size", [(1, 8), (3, 4)], ids=["short", "past the context"])
def test_enough_beams_equal_exhaustive_search(make_model, uncached, positions, T, block_size):
    """With V ** (n - 1) beams nothing is lost: they find the likeliest of all continuations."""
    for seed in range(3):
        model = make_model(seed=seed, positions=positions, vocab_size=5, block_size=block_size)
        idx = tokens(1, T, vocab_size=5)
        expected = likeliest(uncached, model, idx, 4)
        assert torch.equal(model.generate(idx, 4, beams=5**3)[0], expected)


def test_beams_find_what_greed_misses(make_model):
    """A second-best first token that leads on to a sure one wins: 0.4 x 1 against 0.6 x 0.5."""
    model = make_model(n_layer=1, vocab_size=3)

    def scores(head, args, out):
        """After 0 come 1 (0.6) or 2 (0.4); after 1 anything; after 2 surely 0."""
        table = torch.tensor([[1e-9, 0.6, 0.4], [0.34, 0.33, 0.33], [1.0, 1e-9, 1e-9]]).log()
        return table[last].to(out.dtype)[:, None]

    last = []
    model.token_embedding.register_forward_hook(
        lambda m, args, out: last.__setitem__(slice(None), args[0][:, -1].tolist()))
    model.lm_head.register_forward_hook(scores)
    assert model.generate([0], 2, **greedy)[0].tolist() == [0, 1, 0]
    assert model.generate([0], 2, beams=2)[0].tolist() == [0, 2, 0]


@pytest.mark.parametrize("beams", [2, 3, 7])
def test_each_row_has_beams_of_its_own(make_model, beams):
    """A batch gives what its rows give one by one."""
    model, idx = make_model(block_size=6), tokens(4, 3)
    alone = torch.cat([model.generate(row, 8, beams=beams) for row in idx])
    assert torch.equal(model.generate(idx, 8, beams=beams), alone)
    assert len(alone[:, 3:].unique(dim=0)) > 1


@pytest.mark.parametrize("beams", [2, 3, 5, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_beams_equal_those_of_transformers(make_model, beams, seed):
    """The same weights in a GPT-2 of transformers without an end token, prompts of three tokens."""
    model = make_model(seed=seed, positions="learned", qk_norm=False, block_size=32)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=13, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=None,
        eos_token_id=None)).double().eval()
    names = {"token_embedding": "wte", "position_embedding": "wpe", "blocks": "h",
             "attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj",
             "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            turned = parameter.dim() == 2 and name.startswith("blocks")
            for ours, hf in names.items():
                name = name.replace(ours, hf)
            theirs.transformer.get_parameter(name).copy_(parameter.T if turned else parameter)
    idx = tokens(3, 3)
    expected = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), num_beams=beams, max_new_tokens=16,
        do_sample=False, early_stopping=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(idx, 16, beams=beams), expected)
    assert not torch.equal(model.generate(idx, 16, **greedy), expected)
