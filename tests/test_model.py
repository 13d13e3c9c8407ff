"""Section 3 of gpt.py, the whole model: sizes, initialisation, loss, layers, dropout, formats."""

import copy
import itertools
import math

import pytest
import torch
from conftest import assert_close, each_kernel, each_position, tokens
from torch import nn
from torch.nn import functional as F

import gpt
from gpt import GPTConfig, GPTLanguageModel, UserError

ARCHITECTURES = [dict(positions=positions, qk_norm=qk_norm, activation=activation, bias=bias,
                      tie_weights=tie_weights)
                 for positions, qk_norm, activation, bias, tie_weights in itertools.product(
                     ("rotary", "learned"), (True, False), ("gelu", "relu", "relu2"),
                     (True, False), (True, False))]
each_architecture = pytest.mark.parametrize(
    "architecture", ARCHITECTURES, ids=lambda values: "-".join(map(str, values.values())))

def fresh(**config):
    """A tiny model as it is before training."""
    sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=13)
    return GPTLanguageModel(GPTConfig(**sizes | config))


# ------------------------------------------------------------------------------------------- sizes
@each_architecture
def test_the_names_and_shapes_of_the_parameters(architecture):
    """Checkpoints depend on them: whoever renames one makes old checkpoints useless."""
    C = 16
    matrices = {"attention.qkv": (3 * C, C), "attention.proj": (C, C),
                "feed_forward.up": (4 * C, C), "feed_forward.down": (C, 4 * C)}
    expected = {"token_embedding.weight": (13, C), "lm_head.weight": (13, C), "ln_f.weight": (C,)}
    for block in ("blocks.0.", "blocks.1."):
        expected |= {f"{block}{name}.weight": shape for name, shape in matrices.items()}
        expected |= {f"{block}{name}.weight": (C,) for name in ("ln_1", "ln_2")}
    if architecture["bias"]:
        layers = expected.keys() - {"token_embedding.weight", "lm_head.weight"}
        expected |= {name.replace("weight", "bias"): expected[name][:1] for name in layers}
    if architecture["positions"] == "learned":
        expected["position_embedding.weight"] = (8, C)
    state = fresh(**architecture).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected

@pytest.mark.parametrize("n_embd, n_head", [(100, 6), (18, 6)])
def test_sizes_that_do_not_divide_are_refused(n_embd, n_head):
    """Heads share the channels evenly, and rotary positions need pairs of channels."""
    with pytest.raises(UserError, match="n_embd.*n_head"):
        fresh(n_embd=n_embd, n_head=n_head)


# ---------------------------------------------------------------------------------- initialisation
@pytest.mark.parametrize("tie_weights", [True, False])
def test_initial_weights(tie_weights):
    """Output layers and biases are 0, norms 1, embeddings small, other matrices as in PyTorch."""
    model = fresh(n_embd=128, vocab_size=512, block_size=64, bias=True, positions="learned",
                  tie_weights=tie_weights)
    zero = ("attention.proj.weight", "feed_forward.down.weight", "bias")
    for name, parameter in model.named_parameters():
        std = 1 / math.sqrt(3 * 128)  # nn.Linear: uniform between -1 / sqrt(C) and 1 / sqrt(C)
        if "embedding" in name:
            std = 1 / 128 if tie_weights else 0.02
        if name.endswith(zero) or name == "lm_head.weight":
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.1 * std, name

@pytest.mark.parametrize("tie_weights, steps", [(True, 2), (False, 3)])
@each_position
def test_weights_that_start_at_zero_still_train(tie_weights, steps, positions):
    """The first step moves the output layers, the next ones everything behind them."""
    model = fresh(tie_weights=tie_weights, positions=positions, bias=True)
    before = copy.deepcopy(model.state_dict())
    x, y = tokens(8, 8), tokens(8, 8)
    for _ in range(steps):
        model.zero_grad()
        model(x, y)[1].backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
    for name, parameter in model.state_dict().items():
        assert not torch.equal(parameter, before[name]), name

@pytest.mark.parametrize("tie_weights", [True, False])
def test_tied_weights_are_one_matrix(tie_weights):
    """Also after weights have been loaded."""
    model, other = fresh(tie_weights=tie_weights), fresh(tie_weights=tie_weights)
    model.load_state_dict(other.state_dict())
    assert (model.lm_head.weight is model.token_embedding.weight) == tie_weights


# --------------------------------------------------------------------------------------- the loss
def test_the_loss_is_the_mean_of_minus_log_probability(make_model):
    """The logits are the same with and without targets."""
    model, idx, targets = make_model(), tokens(2, 5), tokens(2, 5)
    logits, loss = model(idx, targets)
    probs = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    expected = -probs.gather(-1, targets[..., None]).log().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert model(idx)[1] is None
    assert torch.equal(model(idx)[0], logits)

@each_architecture
def test_every_architecture_trains(architecture):
    """20 steps on one batch, with the fused kernel or with Head: it begins to memorise it."""
    attention = "explicit" if architecture["bias"] else "fused"
    model = fresh(**architecture, n_layer=1, attention=attention)
    optimizer, x, y = torch.optim.AdamW(model.parameters(), lr=1e-2), tokens(2, 8), tokens(2, 8)
    losses = []
    for _ in range(20):
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


# ------------------------------------------------------------------------------------- the layers
@pytest.mark.parametrize("activation, formula", [
    ("gelu", lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))),
    ("relu", lambda x: x.clamp(min=0)), ("relu2", lambda x: x.clamp(min=0) ** 2)])
def test_feed_forward_is_up_activation_down(make_model, activation, formula):
    layer = make_model(activation=activation).blocks[0].feed_forward
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert_close(layer(x), layer.down(formula(layer.up(x))))

@each_position
def test_the_model_is_the_sum_in_its_residual_stream(make_model, positions):
    """Embeddings, plus attention of the norm, plus FeedForward of the norm; a norm at the end."""
    model, idx = make_model(positions=positions, bias=True), tokens(2, 6)
    x, rotation = model.token_embedding.weight[idx], None
    if positions == "learned":
        x = x + model.position_embedding.weight[:6]
    else:
        rotation = gpt.rotary_angles(torch.arange(6), 8, torch.float64)
    for block in model.blocks:
        normed = F.layer_norm(x, (16,), block.ln_1.weight, block.ln_1.bias)
        x = x + block.attention(normed, rotation)
        normed = F.layer_norm(x, (16,), block.ln_2.weight, block.ln_2.bias)
        x = x + block.feed_forward(normed)
    x = F.layer_norm(x, (16,), model.ln_f.weight, model.ln_f.bias)
    assert_close(model(idx)[0], x @ model.lm_head.weight.T)

@each_kernel
def test_sequences_of_a_batch_do_not_mix(make_model, attention):
    model, idx = make_model(attention=attention), tokens(3, 8)
    alone = torch.cat([model(row[None])[0] for row in idx])
    assert_close(model(idx)[0], alone)


# ----------------------------------------------------------------------------------------- dropout
def test_dropout_acts_on_embeddings_and_on_what_each_layer_adds(make_model):
    """With everything dropped, a layer adds nothing."""
    model, x = make_model(dropout=1.0, bias=True).train(), torch.randn(2, 5, 16).double()
    assert torch.equal(model.blocks[0](x), x)
    first = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: first.append(args[0]))
    model(tokens(2, 5))
    assert not first[0].any()
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == 1 + 2 * 2


# -------------------------------------------------------------------------------- number formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_position
@each_kernel
def test_number_formats(make_model, dtype, positions, attention):
    """A whole model in one number format computes nearly the same, and generates."""
    config = dict(positions=positions, attention=attention, activation="gelu")
    model, exact, idx = make_model(**config).to(dtype), make_model(**config), tokens(2, 8)
    logits, loss = model(idx, idx)
    assert logits.dtype == dtype
    assert loss.dtype == torch.float32  # a loss needs its digits
    expected, expected_loss = exact(idx, idx)
    assert (logits - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.05)
    assert model.generate(idx, 12).shape == (2, 20)
