"""Section 3 of gpt.py, attention: what a position looks at, and what it must not see."""

import math

import pytest
import torch
from torch.nn import functional as F

from gpt import Head, KVCache, rotary_angles, rotate

close = {"rtol": 1e-10, "atol": 1e-10}  # float64
each_position = pytest.mark.parametrize("positions", ["learned", "rotary"])
each_kernel = pytest.mark.parametrize("attention", ["fused", "explicit"])


def tokens(*shape):
    return torch.randint(13, shape)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


# ------------------------------------------------------------------------------------------- Head
def test_a_head_is_the_formula():
    """softmax(q k / sqrt(hs)) v over the positions up to one's own, computed with plain loops."""
    hs = 4
    q, k, v = 2 * normal(3, 5, hs)
    out, weights = Head()(q, k, v)
    for i in range(5):
        terms = [math.exp(sum((q[i] * k[j]).tolist()) / math.sqrt(hs)) for j in range(i + 1)]
        expected = [term / sum(terms) for term in terms] + [0.0] * (4 - i)
        assert weights[i].tolist() == pytest.approx(expected, rel=1e-12)
        assert out[i].tolist() == pytest.approx([
            sum(w * value for w, value in zip(expected, v[:, c].tolist(), strict=True))
            for c in range(hs)], rel=1e-12)


@pytest.mark.parametrize("T, S", [(1, 1), (7, 7), (1, 7), (3, 7), (6, 7)])
@pytest.mark.parametrize("batch, hs", [((), 2), ((3,), 8), ((2, 3), 5)])
def test_a_head_equals_the_fused_kernel(batch, hs, T, S):
    """T queries are the last of S positions, as with a cache; any batch, several sizes."""
    q, k, v = 3 * normal(*batch, T, hs), 3 * normal(*batch, S, hs), normal(*batch, S, hs)
    visible = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    out, weights = Head()(q, k, v)
    assert out.shape == (*batch, T, hs) and weights.shape == (*batch, T, S)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(*batch, T).double(), **close)
    assert not weights[..., ~visible].any() and (weights[..., visible] > 0).all()


# --------------------------------------------------------------------------- explicit equals fused
@each_position
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_explicit_attention_equals_fused(make_model, positions, qk_norm, bias):
    """The same logits, and the same gradient of every parameter."""
    model = make_model(positions=positions, qk_norm=qk_norm, bias=bias)
    idx, direction, results = tokens(3, 8), normal(3, 8, 13), {}
    for attention in ("fused", "explicit"):
        model.config.attention = attention
        model.zero_grad()
        logits, _ = model(idx)
        (logits * direction).sum().backward()
        results[attention] = {name: p.grad for name, p in model.named_parameters()}
        results[attention]["logits"] = logits.detach()
    assert all(gradient.any() for gradient in results["fused"].values())
    for name, expected in results["fused"].items():
        torch.testing.assert_close(results["explicit"][name], expected, **close)


def test_each_choice_runs_what_its_name_says(make_model, monkeypatch):
    """A student who edits Head sees the effect with --attention explicit, and only there."""
    model, idx = make_model(), tokens(2, 6)
    before = model(idx)[0]
    monkeypatch.setattr(Head, "forward", lambda self, q, k, v: (torch.zeros_like(q), None))
    assert torch.equal(model(idx)[0], before)
    model.config.attention = "explicit"
    assert (model(idx)[0] - before).abs().max() > 1e-3


# -------------------------------------------------------------------------------- the future hidden
@each_position
@each_kernel
@pytest.mark.parametrize("changed", [1, 4, 7])
def test_no_logits_depend_on_later_tokens(make_model, positions, attention, changed):
    """Another token at one position leaves all logits before it alone, and changes those after."""
    model = make_model(positions=positions, attention=attention)
    idx = tokens(4, 8)
    other = idx.clone()
    other[:, changed] = (other[:, changed] + 1) % 13
    before, after = model(idx)[0], model(other)[0]
    torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=1e-12)
    assert ((after - before)[:, changed:].abs().amax(dim=-1) > 1e-4).all()


@each_position
@each_kernel
@pytest.mark.parametrize("pieces", [(3, 5), (1, 7), (7, 1), (2, 3, 3), (1,) * 8], ids=str)
def test_a_cache_hides_the_future_too(make_model, positions, attention, pieces):
    """A sequence that is read piece by piece gives the logits of one pass, the mask included."""
    model, idx = make_model(positions=positions, attention=attention), tokens(3, 8)
    cache = KVCache(model, 3)
    logits = [model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)]
    assert cache.length == 8
    torch.testing.assert_close(torch.cat(logits, dim=1), model(idx)[0], **close)


# ------------------------------------------------------------------------------------ several heads
@each_kernel
@pytest.mark.parametrize("n_head", [1, 4, 8])
@pytest.mark.parametrize("rotary", [False, True])
def test_many_heads_are_single_heads_side_by_side(make_model, attention, n_head, rotary):
    """Each head reads its own rows of queries, keys and values. Scores are divided by sqrt(hs)."""
    model = make_model(n_head=n_head, qk_norm=False, bias=True, attention=attention)
    layer, x, hs = model.blocks[1].attention, normal(2, 6, 16), 16 // n_head
    rotation = rotary_angles(torch.arange(6), hs, x.dtype) if rotary else None
    outputs = []
    for i in range(n_head):
        rows = [slice(16 * part + hs * i, 16 * part + hs * (i + 1)) for part in range(3)]
        q, k, v = [F.linear(x, layer.qkv.weight[r], layer.qkv.bias[r]) for r in rows]
        if rotary:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        outputs.append(Head()(q, k, v)[0])
    expected = layer.proj(torch.cat(outputs, dim=-1))
    torch.testing.assert_close(layer(x, rotation), expected, **close)


# -------------------------------------------------------------------------------- rotary positions
def test_rotation_is_a_product_of_complex_numbers():
    """Channels i and i + hs/2 are one complex number; its speed is 10000 ** (-2 i / hs)."""
    x, positions = normal(2, 5, 8), torch.tensor([0, 1, 2, 7, 40])
    cos, sin = rotary_angles(positions, 8, torch.float64)
    speeds = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angles = positions[:, None] * speeds
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((z.real, z.imag), dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin), expected, rtol=1e-5, atol=1e-5)


def test_dot_products_depend_on_the_distance():
    """One query and one key, placed everywhere: the products are constant along diagonals."""
    q, k = normal(2, 1, 8).expand(2, 20, 8)
    angles = rotary_angles(torch.arange(20), 8, torch.float64)
    products = rotate(q, *angles) @ rotate(k, *angles).T  # (T, T)
    for distance in range(-19, 20):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert products[:, 0].unique().numel() == 20


# -------------------------------------------------------------------------------------- QK-norm
@pytest.mark.parametrize("qk_norm", [False, True])
def test_qk_norm_keeps_scores_small(make_model, qk_norm):
    """Queries and keys a hundred times as long change the maps only without QK-norm."""
    model, idx = make_model(qk_norm=qk_norm), tokens(1, 8)
    before = model.attention_maps(idx)
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight[:32] *= 100
    change = (model.attention_maps(idx) - before)[:, 0].abs().max()
    assert (change < 1e-3) == qk_norm


@each_kernel
def test_qk_norm_gives_queries_and_keys_mean_0_and_variance_1(make_model, attention):
    """The values stay as they are."""
    layer, x = make_model(attention=attention).blocks[0].attention, normal(2, 6, 16)
    q, k, v = layer.qkv(x).view(2, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = [(t - t.mean(-1, keepdim=True)) / t.std(-1, correction=0, keepdim=True) for t in (q, k)]
    expected = layer.proj(Head()(q, k, v)[0].transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)  # layer_norm adds 1e-5


# ---------------------------------------------------------------------------------- attention maps
@each_position
@each_kernel
def test_maps_are_what_the_model_computed(make_model, positions, attention):
    """Rows sum to 1, nothing is in the future, and maps times values are the layer's output."""
    model = make_model(positions=positions, attention=attention, n_layer=3, n_head=4)
    idx, passes = tokens(2, 7), []
    for block in model.blocks:
        block.attention.register_forward_hook(
            lambda layer, args, out: passes.append((args[0], out)))
    logits, _ = model(idx)
    maps = model.attention_maps(idx)  # (B, n_layer, nh, T, T)
    assert maps.shape == (2, 3, 4, 7, 7) and not maps.requires_grad
    assert not maps.triu(1).any() and (maps[..., -1, :] > 0).all()
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones_like(maps[..., 0]), **close)
    for i, block in enumerate(model.blocks):
        layer, (x, out) = block.attention, passes[i]
        v = layer.qkv(x)[..., 32:].view(2, 7, 4, 4).transpose(1, 2)  # (B, nh, T, hs)
        mixed = (maps[:, i] @ v).transpose(1, 2).flatten(2)  # (B, T, C)
        torch.testing.assert_close(layer.proj(mixed), out, **close)
    torch.testing.assert_close(model(idx, maps=[])[0], logits, **close)
