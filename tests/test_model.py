"""The model: its size, its start, its loss, what it may look at, and how it is optimised."""

import math
from dataclasses import fields

import pytest
import torch

import gpt
from gpt import CharTokenizer, GPTConfig, GPTLanguageModel, TrainConfig, UserError

everywhere = pytest.mark.parametrize("positions", ["learned", "rotary"])
both_paths = pytest.mark.parametrize("attention", ["fused", "explicit"])


def preset(name, **changes):
    """The architecture of a preset, as the command line would make it."""
    names = {f.name for f in fields(GPTConfig)}
    values = {key: value for key, value in gpt.PRESETS[name].items() if key in names}
    return GPTConfig(**values | changes)


# ----------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize("config, least, most", [
    (preset("gpu", vocab_size=65), 10_600_000, 10_800_000),
    (preset("lecture", vocab_size=65), 10_600_000, 10_900_000),
    (preset("gpu", vocab_size=65, n_layer=8), 14_150_000, 14_250_000),
    (preset("gpt2", vocab_size=50257), 124_439_808, 124_439_808),
], ids=["baseline", "lecture", "eight layers", "gpt2"])
def test_parameter_counts(config, least, most):
    """10.8M for the baseline, 14.2M with eight layers, and exactly GPT-2's 124,439,808."""
    with torch.device("meta"):  # shapes without memory
        model = GPTLanguageModel(config)
    assert least <= sum(p.numel() for p in model.parameters()) <= most


def test_bias_and_tying_change_the_count(make_model):
    """Without biases each has to go, and an untied head is one matrix more."""
    def count(**config):
        return sum(p.numel() for p in make_model(n_layer=1, **config).parameters())

    biases = 3 * 16 + 16 + 4 * 16 + 16 + 3 * 16  # qkv, proj, up, down, three norms
    assert count(bias=True) - count(bias=False) == biases
    assert count(tie_weights=False) - count(tie_weights=True) == 13 * 16
    assert count(positions="learned") - count(positions="rotary") == 8 * 16


def test_sizes_that_do_not_divide_are_refused():
    """Heads must share the channels evenly."""
    with pytest.raises(UserError, match="n_embd.*n_head"):
        GPTLanguageModel(GPTConfig(n_embd=100, n_head=6))


# ------------------------------------------------------------------------------------- the start
@pytest.mark.parametrize("tie_weights", [True, False])
def test_weights_are_tied_by_identity_also_after_loading(tmp_path, tie_weights):
    """One matrix stays one: new, from a state, and from a checkpoint."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=3, tie_weights=tie_weights)
    model = GPTLanguageModel(config)
    again = GPTLanguageModel.from_state(config, model.state_dict())
    gpt.save_checkpoint(tmp_path / "tied.pt", model, CharTokenizer.from_text("abc"))
    loaded = gpt.load_checkpoint(tmp_path / "tied.pt")[0]
    for each in (model, again, loaded):
        assert (each.lm_head.weight is each.token_embedding.weight) is tie_weights
        torch.testing.assert_close(each.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_model_takes_over_the_weights_of_a_state(make_model):
    """No second copy of a large model's weights is made on the way."""
    state = make_model(torch.float32).state_dict()
    again = GPTLanguageModel.from_state(make_model(torch.float32).config, state)
    assert all(p.data_ptr() == state[name].data_ptr() for name, p in again.named_parameters())


@pytest.mark.parametrize("damage", ["missing", "left over", "shape", "not a number"])
def test_weights_that_do_not_fit_are_named(make_model, damage):
    """A state with one wrong entry is refused, and the error says which."""
    model = make_model(torch.float32)
    state, name = model.state_dict(), "blocks.1.ln_2.weight"
    if damage == "missing":
        del state[name]
    elif damage == "left over":
        name = "blocks.2.ln_2.weight"
        state[name] = torch.ones(16)
    else:
        state[name] = torch.ones(17) if damage == "shape" else torch.full((16,), math.nan)
    with pytest.raises(UserError, match=name):
        GPTLanguageModel.from_state(model.config, state)


@pytest.mark.parametrize("name", ["cpu", "gpu", "lecture", "gpt2"])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_fresh_model_guesses(name, tie_weights):
    """Before it has learned, the loss is about ln(V): all tokens are equally likely."""
    config = preset(name, n_layer=2, vocab_size=65, tie_weights=tie_weights)
    model = GPTLanguageModel(config).eval()
    idx = torch.randint(65, (4, 64))
    loss = model(idx, torch.randint(65, (4, 64)))[1]
    assert loss.item() == pytest.approx(math.log(65), abs=0.2)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_the_start(tie_weights):
    """What adds to the stream starts at zero, what reads it does not; norms at one, no biases."""
    config = GPTConfig(n_layer=3, n_head=4, n_embd=128, vocab_size=512, bias=True,
                       positions="learned", tie_weights=tie_weights)
    model = GPTLanguageModel(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        elif name.endswith(("attention.proj.weight", "feed_forward.down.weight", "lm_head.weight")):
            assert not parameter.any(), name
        else:  # embeddings as in GPT-2 unless tied; 1 / sqrt(3 C) is PyTorch's own start
            embedding = 1 / 128 if tie_weights else 0.02
            expected = embedding if "embedding" in name else 1 / math.sqrt(3 * 128)
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.002, name
    x = torch.randn(2, 5, 128)
    assert torch.equal(model.blocks[1](x), x)


@pytest.mark.parametrize("activation, formula", [
    ("gelu", lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))),
    ("relu", lambda x: x.clamp(min=0)), ("relu2", lambda x: x.clamp(min=0) ** 2),
])
def test_activations(make_model, activation, formula):
    """The three of the feed-forward layer against their formulas: up, activation, down."""
    layer = make_model(activation=activation).blocks[0].feed_forward
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.down(formula(layer.up(x))), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------ what it does
def test_the_loss_is_the_mean_of_minus_log_probability(make_model):
    """The loss against the sum done by hand, in nats."""
    model = make_model()
    idx, targets = torch.randint(13, (2, 5)), torch.randint(13, (2, 5))
    logits, loss = model(idx, targets)
    surprises = []
    for scores, target in zip(logits.flatten(0, 1).tolist(), targets.flatten(), strict=True):
        total = sum(math.exp(score) for score in scores)
        surprises.append(-math.log(math.exp(scores[target]) / total))
    assert loss.item() == pytest.approx(sum(surprises) / 10, rel=1e-6)
    assert max(surprises) > 2 * min(surprises)


def test_without_targets_the_same_logits_and_no_loss(make_model):
    """What forward returns has one shape, whether there are targets or not."""
    model, idx = make_model(), torch.randint(13, (2, 5))
    logits, loss = model(idx)
    assert logits.shape == (2, 5, 13) and loss is None
    assert torch.equal(model(idx, idx)[0], logits)


@everywhere
@both_paths
def test_the_future_is_unseen(make_model, positions, attention):
    """Other tokens from position 5 on leave the scores before it alone, and change those after."""
    model = make_model(positions=positions, attention=attention)
    idx = torch.randint(13, (4, 8))
    other = torch.cat((idx[:, :5], (idx[:, 5:] + 1) % 13), dim=1)
    before, after = model(idx)[0], model(other)[0]
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-12)
    assert ((before - after)[:, 5:].abs().amax(dim=-1) > 1e-3).all()


@everywhere
@both_paths
def test_sequences_of_a_batch_do_not_mix(make_model, positions, attention):
    """A row's scores are the same alone and among others."""
    model = make_model(positions=positions, attention=attention)
    idx = torch.randint(13, (3, 8))
    alone = torch.cat([model(row[None])[0] for row in idx])
    torch.testing.assert_close(model(idx)[0], alone, rtol=1e-10, atol=1e-10)


@everywhere
def test_order_matters(make_model, positions):
    """In one layer only positions tell "abc" from "bac": the last scores must differ."""
    model = make_model(positions=positions, n_layer=1)
    scores = model(torch.tensor([[1, 2, 3], [2, 1, 3]]))[0][:, -1]
    assert (scores[0] - scores[1]).abs().max() > 1e-3


def test_rotary_scores_depend_on_distance_only(make_model):
    """All positions moved by a thousand change nothing; doubled distances do."""
    model = make_model(positions="rotary")
    idx, turn = torch.randint(13, (2, 8)), model.rotation
    logits, maps = model(idx)[0], model.attention_maps(idx)
    model.rotation = lambda positions: turn(positions + 1000)
    torch.testing.assert_close(model(idx)[0], logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.attention_maps(idx), maps, rtol=1e-9, atol=1e-9)
    model.rotation = lambda positions: turn(2 * positions)
    assert (model(idx)[0] - logits).abs().max() > 1e-3


def test_learned_positions_end_with_the_context(make_model):
    """One token too many is a ValueError that names the limit, not an index error."""
    model = make_model(positions="learned")
    assert model(torch.zeros(1, 8, dtype=torch.long))[0].shape == (1, 8, 13)
    with pytest.raises(ValueError, match="9 .*8"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_rotary_positions_go_on(make_model):
    """Rotary models can be asked about more than the context that they were trained with."""
    assert make_model(positions="rotary")(torch.zeros(1, 20, dtype=torch.long))[0].size(1) == 20


def test_dropout_is_for_training_only(make_model):
    """Two passes differ while training and agree in evaluation."""
    model, idx = make_model(dropout=0.3), torch.randint(13, (1, 8))
    assert not torch.equal(model.train()(idx)[0], model(idx)[0])
    assert torch.equal(model.eval()(idx)[0], model(idx)[0])
    plain = make_model(dropout=0.0)
    assert torch.equal(plain.train()(idx)[0], model(idx)[0])


# --------------------------------------------------------------------------------- the optimizers
@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_has_one_optimizer(make_model, optimizer, tie_weights):
    """Muon takes exactly the blocks' matrices, AdamW all the rest, and nothing is taken twice."""
    model = make_model(torch.float32, positions="learned", tie_weights=tie_weights)
    optimizers = model.make_optimizers(TrainConfig(optimizer=optimizer))
    taken = [[id(p) for group in each.param_groups for p in group["params"]] for each in optimizers]
    matrices = [id(p) for block in model.blocks for p in block.parameters() if p.dim() == 2]
    assert len(matrices) == 8
    assert sorted(sum(taken, [])) == sorted(map(id, model.parameters()))
    kinds = {type(each): set(ids) for each, ids in zip(optimizers, taken, strict=True)}
    if optimizer == "muon":
        assert kinds.keys() == {torch.optim.AdamW, gpt.Muon} and kinds[gpt.Muon] == set(matrices)
    else:
        assert kinds.keys() == {torch.optim.AdamW}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_decay_is_for_matrices(make_model, optimizer):
    """Norms and biases are not pulled towards zero, whatever takes them; one rate serves both."""
    model = make_model(torch.float32, positions="learned")
    config = TrainConfig(optimizer=optimizer, weight_decay=0.3, learning_rate=1e-4)
    for each in model.make_optimizers(config):
        for group in each.param_groups:
            assert group["lr"] == 1e-4
            for parameter in group["params"]:
                assert group["weight_decay"] == (0.3 if parameter.dim() == 2 else 0.0)


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32), (1, 5)])
@pytest.mark.parametrize("rank", [1, 3, 32])
def test_muon_is_newton_schulz(shape, rank):
    """A step is the published iteration, done in float64 as it is written, of Nesterov momentum."""
    rng = torch.Generator().manual_seed(rank)
    rank, last = min(rank, *shape), torch.zeros(shape, dtype=torch.float64)
    p = torch.nn.Parameter(torch.randn(shape, generator=rng))
    muon = gpt.Muon([p], lr=0.03, weight_decay=0.5)
    for _ in range(3):  # gradients whose singular values lie far apart, or are zero
        spread = 10.0 ** -torch.linspace(0, 4, rank)
        p.grad = (torch.randn(shape[0], rank, generator=rng) * spread) @ torch.randn(
            rank, shape[1], generator=rng)
        gradient, before = p.grad.double(), p.detach().double()
        muon.step()
        last = 0.9 * last + 0.1 * gradient
        x = 0.9 * last + 0.1 * gradient
        x = x / x.norm()
        for _ in range(5):
            x = 3.4445 * x + (-4.775 * x @ x.T + 2.0315 * x @ x.T @ x @ x.T) @ x
        expected = before * (1 - 0.03 * 0.5) - 0.03 * 0.2 * max(shape) ** 0.5 * x
        step = (expected - before).norm().item()
        assert (p.detach().double() - expected).norm().item() < 2e-3 * step
    assert (muon.state[p]["momentum_buffer"] - last).norm() < 1e-6 * last.norm()


def test_muon_takes_all_matrices_at_once(make_model):
    """Wide, square and tall together: each steps as it would alone."""
    together, alone = (make_model(torch.float32, n_embd=32) for _ in range(2))
    matrices = [[p for p in model.blocks.parameters() if p.dim() == 2]
                for model in (together, alone)]
    optimizers = [gpt.Muon(matrices[0], 0.03, 0.5), *(gpt.Muon([p], 0.03, 0.5)
                                                      for p in matrices[1])]
    for scale in (1.0, 1e-6, 10.0):
        for one, other in zip(*matrices, strict=True):
            one.grad = torch.randn_like(one) * scale
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert len({p.shape for p in matrices[0]}) == 4
    for one, other in zip(*matrices, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch before 2.9 has none")
def test_muon_steps_like_pytorchs():
    """PyTorch's runs in bf16, so that the two agree to a few hundredths."""
    rng = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.zeros(48, 192)) for _ in range(2))
    optimizers = [gpt.Muon([ours], lr=0.01, weight_decay=0.1), torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")]
    for _ in range(5):
        ours.grad = torch.randn(48, 192, generator=rng)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < 0.03 * ours.norm()


def test_muon_leaves_what_is_frozen(make_model):
    """A matrix without a gradient stays; also if none has one."""
    model = make_model(torch.float32)
    _, muon = model.make_optimizers(TrainConfig())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    muon.step()
    model.blocks[1].feed_forward.up.weight.grad = torch.ones(64, 16)
    muon.step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["blocks.1.feed_forward.up.weight"]


def test_muon_survives_a_gradient_of_zeros():
    """A matrix that nothing depends on yet stays where it is."""
    p = torch.nn.Parameter(torch.ones(4, 8))
    p.grad = torch.zeros(4, 8)
    gpt.Muon([p], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(p.detach(), torch.ones(4, 8))


def test_muons_steps_are_as_long_as_adamws(make_model):
    """So one rate serves both: a step's root mean square is about 0.2 of it, as AdamW's is."""
    model = make_model(torch.float32, n_embd=64)
    _, muon = model.make_optimizers(TrainConfig(learning_rate=1e-2, weight_decay=0.0))
    for parameter in muon.param_groups[0]["params"]:
        before, parameter.grad = parameter.detach().clone(), torch.randn_like(parameter)
        muon.step()
        step = (parameter - before).square().mean().sqrt()
        assert 0.1 * 1e-2 < step < 0.3 * 1e-2, tuple(parameter.shape)
        parameter.grad = None
