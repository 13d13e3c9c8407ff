"""Section 3 of gpt.py, attention: what a position looks at, and what it must not see."""

import math

import pytest
import torch
from conftest import assert_close, each_kernel, each_position, tokens
from torch.nn import functional as F

from gpt import Head, KVCache, rotary_angles, rotate


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


# ------------------------------------------------------------------------------------------- Head
def test_a_head_is_the_formula():
    """softmax(q k / sqrt(hs)) v over the positions up to one's own, one query at a time."""
    q, k, v = 2 * normal(3, 5, 4)
    out, weights = Head()(q, k, v)
    for i in range(5):
        terms = torch.exp(k[: i + 1] @ q[i] / math.sqrt(4))
        expected = terms / terms.sum()
        assert_close(weights[i, : i + 1], expected)
        assert not weights[i, i + 1 :].any()
        assert_close(out[i], expected @ v[: i + 1])

@pytest.mark.parametrize("T, S", [(1, 1), (7, 7), (1, 7), (3, 7), (6, 7)])
def test_a_head_equals_the_fused_kernel(T, S):
    """T queries are the last of S positions, as with a cache."""
    q, k, v = 3 * normal(2, 3, T, 5), 3 * normal(2, 3, S, 5), normal(2, 3, S, 5)
    visible = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    out, weights = Head()(q, k, v)
    assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=visible))
    assert_close(weights.sum(dim=-1), torch.ones(2, 3, T).double())
    assert not weights[..., ~visible].any()


# --------------------------------------------------------------------------- explicit equals fused
@each_position
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_explicit_attention_equals_fused(make_model, positions, qk_norm, bias):
    """The same logits, and the same gradient of every parameter."""
    model = make_model(positions=positions, qk_norm=qk_norm, bias=bias)
    idx, targets = tokens(3, 8), tokens(3, 8)
    logits, loss = model(idx, targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(gradient.any() for gradient in gradients)
    model.config.attention = "explicit"
    same_logits, loss = model(idx, targets)
    assert_close(same_logits, logits)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(torch.autograd.grad(loss, p, retain_graph=True)[0], gradient,
                                   rtol=1e-6, atol=1e-8)  # the loss is computed in float32


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
    assert_close(after[:, :changed], before[:, :changed])
    assert ((after - before)[:, changed:].abs().amax(dim=-1) > 1e-4).all()

@each_position
@each_kernel
@pytest.mark.parametrize("pieces", [(3, 5), (7, 1), (2, 3, 3), (1,) * 8], ids=str)
def test_a_cache_hides_the_future_too(make_model, positions, attention, pieces):
    """A sequence that is read piece by piece gives the logits of one pass, the mask included."""
    model, idx = make_model(positions=positions, attention=attention), tokens(3, 8)
    cache = KVCache(model, 3)
    logits = [model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)]
    assert cache.length == 8
    assert_close(torch.cat(logits, dim=1), model(idx)[0])


# ------------------------------------------------------------------------------------ several heads
@each_kernel
@pytest.mark.parametrize("n_head", [1, 4])
def test_many_heads_are_single_heads_side_by_side(make_model, attention, n_head):
    """Each head reads its own rows of the queries, keys and values."""
    model = make_model(n_head=n_head, qk_norm=False, bias=True, attention=attention)
    layer, x, hs = model.blocks[1].attention, normal(2, 6, 16), 16 // n_head
    rotation = rotary_angles(torch.arange(6), hs, x.dtype)
    outputs = []
    for i in range(n_head):
        rows = [slice(16 * part + hs * i, 16 * part + hs * (i + 1)) for part in range(3)]
        q, k, v = [F.linear(x, layer.qkv.weight[r], layer.qkv.bias[r]) for r in rows]
        outputs.append(Head()(rotate(q, *rotation), rotate(k, *rotation), v)[0])
    assert_close(layer(x, rotation), layer.proj(torch.cat(outputs, dim=-1)))

@each_kernel
def test_qk_norm_gives_queries_and_keys_mean_0_and_variance_1(make_model, attention):
    """The values stay as they are."""
    layer, x = make_model(attention=attention).blocks[0].attention, normal(2, 6, 16)
    q, k, v = layer.qkv(x).view(2, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = [(t - t.mean(-1, keepdim=True)) / t.std(-1, correction=0, keepdim=True) for t in (q, k)]
    expected = layer.proj(Head()(q, k, v)[0].transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)  # layer_norm adds 1e-5


# -------------------------------------------------------------------------------- rotary positions
def test_rotation_is_a_product_of_complex_numbers():
    """Channels i and i + hs/2 are one complex number; its speed is 10000 ** (-2 i / hs)."""
    x, positions = normal(2, 5, 8), torch.tensor([0, 1, 2, 7, 301])
    cos, sin = rotary_angles(positions, 8, torch.float64)
    speeds = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angles = positions[:, None] * speeds
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((z.real, z.imag), dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin), expected, rtol=1e-5, atol=1e-5)
    cos, _ = rotary_angles(positions, 8, torch.bfloat16)
    assert (cos - angles.cos()).abs().max() < 0.004  # the angles themselves are not rounded

def test_dot_products_depend_on_the_distance():
    """One query and one key at every position: one position later, the products are the same."""
    q, k = normal(2, 1, 8).expand(2, 20, 8)
    angles = rotary_angles(torch.arange(20), 8, torch.float64)
    products = rotate(q, *angles) @ rotate(k, *angles).T  # (T, T)
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1], rtol=0, atol=1e-5)
    assert products[:, 0].unique().numel() == 20


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
    model(idx)
    maps = model.attention_maps(idx)  # (B, n_layer, nh, T, T)
    assert maps.shape == (2, 3, 4, 7, 7)
    assert not maps.requires_grad
    assert not maps.triu(1).any()
    assert_close(maps.sum(dim=-1), torch.ones_like(maps[..., 0]))
    for i, block in enumerate(model.blocks):
        layer, (x, out) = block.attention, passes[i]
        v = layer.qkv(x)[..., 32:].view(2, 7, 4, 4).transpose(1, 2)  # (B, nh, T, hs)
        mixed = (maps[:, i] @ v).transpose(1, 2).flatten(2)  # (B, T, C)
        assert_close(layer.proj(mixed), out)
