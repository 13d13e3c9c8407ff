"""Attention: the heads written out are what the fast kernel computes, and what the maps show."""

import math

import pytest
import torch
from torch.nn import functional as F

from gpt import Head

close = {"rtol": 1e-10, "atol": 1e-10}  # float64
everywhere = pytest.mark.parametrize("positions", ["learned", "rotary"])


def tokens(*shape, vocab_size=13):
    return torch.randint(vocab_size, shape)


@everywhere
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_explicit_heads_equal_the_fused_kernel(make_model, positions, qk_norm, bias):
    """Both paths give the same scores and the same gradient of every parameter."""
    model = make_model(positions=positions, qk_norm=qk_norm, bias=bias)
    idx, direction, results = tokens(3, 8), torch.randn(3, 8, 13, dtype=torch.float64), {}
    for attention in ("fused", "explicit"):
        model.config.attention = attention
        model.zero_grad()
        logits = model(idx)[0]
        (logits * direction).sum().backward()
        results[attention] = {name: p.grad for name, p in model.named_parameters()}
        results[attention]["logits"] = logits.detach()
    assert all(gradient.any() for gradient in results["fused"].values())
    for name, expected in results["fused"].items():
        torch.testing.assert_close(results["explicit"][name], expected, **close)


def test_each_path_runs_what_its_name_says(make_model, monkeypatch):
    """Only the fused path calls PyTorch's kernel, or the comparison above would be of one path."""
    def kernel(*args, **options):
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    model = make_model(attention="explicit")
    model(tokens(1, 4))
    model.config.attention = "fused"
    with pytest.raises(AssertionError, match="kernel"):
        model(tokens(1, 4))


def test_a_head_is_the_formula():
    """softmax(q k / sqrt(hs)) v over the positions up to one's own, summed with plain loops."""
    (q, k, v), hs = torch.randn(3, 1, 5, 4, dtype=torch.float64).mul(2), 4
    out, weights = Head()(q, k, v)
    for i in range(5):
        terms = [math.exp(sum((q[0, i] * k[0, j]).tolist()) / math.sqrt(hs)) for j in range(i + 1)]
        expected = [term / sum(terms) for term in terms] + [0.0] * (4 - i)
        assert weights[0, i].tolist() == pytest.approx(expected, rel=1e-12)
        mixed = [sum(w * value for w, value in zip(expected, v[0, :, c].tolist(), strict=True))
                 for c in range(hs)]
        assert out[0, i].tolist() == pytest.approx(mixed, rel=1e-12)


def test_fewer_queries_than_keys_are_the_last_positions():
    """With a cache, the queries are the newest positions: the last rows of the whole."""
    q, k, v = torch.randn(3, 2, 6, 4, dtype=torch.float64)
    whole_out, whole_weights = Head()(q, k, v)
    for T in (1, 2, 5):
        out, weights = Head()(q[:, -T:], k, v)
        torch.testing.assert_close(out, whole_out[:, -T:], **close)
        torch.testing.assert_close(weights, whole_weights[:, -T:], **close)


@everywhere
def test_maps_have_a_weight_for_every_pair(make_model, positions):
    """(B, n_layer, n_head, T, T): nothing from the future, and each row sums to one."""
    model = make_model(positions=positions, n_layer=3, n_head=4)
    maps = model.attention_maps(tokens(2, 6))
    assert maps.shape == (2, 3, 4, 6, 6)
    assert maps.triu(1).count_nonzero() == 0
    assert (maps.tril()[..., 5, :] > 0).all()
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones_like(maps[..., 0]), **close)


@everywhere
@pytest.mark.parametrize("qk_norm", [False, True])
def test_maps_are_what_the_fused_model_computed(make_model, positions, qk_norm):
    """Mixing the values with the maps gives what each attention layer of a fused pass gave."""
    model = make_model(positions=positions, qk_norm=qk_norm, n_layer=3)
    seen = []
    for block in model.blocks:
        block.attention.register_forward_hook(
            lambda layer, args, out: seen.append((layer, args[0], out)))
    idx = tokens(2, 7)
    model(idx)
    fused, seen[:] = list(seen), []
    maps = model.attention_maps(idx)  # (B, n_layer, nh, T, T)
    for number, (layer, x, out) in enumerate(fused):
        v = layer.qkv(x)[..., 32:].view(2, 7, 2, 8).transpose(1, 2)  # (B, nh, T, hs)
        mixed = (maps[:, number] @ v).transpose(1, 2).flatten(2)  # (B, T, C)
        torch.testing.assert_close(layer.proj(mixed), out, **close)


def test_maps_do_not_depend_on_the_path_or_the_batch(make_model):
    """One sequence's maps are the same alone and in a batch, whichever path the model is set to."""
    model = make_model(attention="fused")
    idx = tokens(3, 8)
    maps = model.attention_maps(idx)
    model.config.attention = "explicit"
    torch.testing.assert_close(model.attention_maps(idx), maps, **close)
    torch.testing.assert_close(model.attention_maps(idx[1:2]), maps[1:2], **close)
    assert (maps[0] - maps[1]).abs().max() > 0.01


@pytest.mark.parametrize("training", [False, True])
def test_maps_are_drawn_without_dropout(make_model, training):
    """attention_maps shows the model as it writes, and leaves its mode and gradients alone."""
    model = make_model(dropout=0.5).train(training)
    idx = tokens(1, 8)
    first = model.attention_maps(idx)
    assert torch.equal(model.attention_maps(idx), first)
    assert model.training is training and not first.requires_grad


@everywhere
@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_multi_head_is_concatenated_heads(make_model, positions, attention):
    """Each head reads its own slice of the queries, keys and values; the outputs stand in order."""
    model = make_model(n_head=4, positions=positions, qk_norm=False, attention=attention)
    layer, x = model.blocks[1].attention, torch.randn(2, 6, 16, dtype=torch.float64)
    rotation = model.rotation(torch.arange(6)) if positions == "rotary" else None
    parts = []
    for i in range(4):
        q, k, v = (F.linear(x, layer.qkv.weight[rows], layer.qkv.bias[rows]) for rows in
                   (slice(16 * part + 4 * i, 16 * part + 4 * i + 4) for part in range(3)))
        if rotation:
            q, k = (turned(t) for t in (q, k))
        parts.append(Head()(q, k, v)[0])
    torch.testing.assert_close(layer(x, rotation), layer.proj(torch.cat(parts, dim=-1)), **close)


def turned(x):
    """Rotary positions by complex numbers: channels i and i + hs/2 are one number, (B, T, hs)."""
    half = x.size(-1) // 2
    speeds = 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.size(1), dtype=torch.float64)[:, None] * speeds  # (T, hs/2)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), dim=-1)


@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("n_head", [1, 2, 8])
def test_scores_are_divided_by_the_root_of_the_head_size(make_model, attention, n_head):
    """The root of hs, not of C: with 8 heads the two differ by a factor of 2.8."""
    model = make_model(n_head=n_head, positions="learned", qk_norm=False, attention=attention)
    layer, x = model.blocks[0].attention, torch.randn(1, 8, 16, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(8, 3, n_head, 16 // n_head).permute(1, 2, 0, 3)  # (nh, T, hs) each
    scores = q @ k.transpose(-2, -1) / (16 // n_head) ** 0.5
    scores = scores + torch.full((8, 8), float("-inf"), dtype=torch.float64).triu(1)
    expected = layer.proj((scores.softmax(dim=-1) @ v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(layer(x)[0], expected, **close)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_qk_norm_bounds_the_scores(make_model, qk_norm):
    """Queries and keys a hundred times as long change only maps that aren't normalised."""
    model = make_model(positions="rotary", qk_norm=qk_norm, bias=False)
    idx = tokens(1, 8)
    before = model.attention_maps(idx)
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight[:32] *= 100
    change = (model.attention_maps(idx) - before)[:, 0].abs().max()
    assert (change < 1e-3) == qk_norm
