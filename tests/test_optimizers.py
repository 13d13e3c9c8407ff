"""Section 5 of gpt.py: the optimizers, the learning rate, one training step, device, precision."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import gpt


# ------------------------------------------------------------------------------------------- Muon
def muon_by_svd(weight, gradients, learning_rate, weight_decay):
    """Muon in NumPy: the Newton-Schulz polynomial is applied to the singular values themselves."""
    weight = weight.numpy().copy()
    momentum = np.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.9 * momentum + 0.1 * gradient.numpy()
        u, s, vt = np.linalg.svd(0.9 * momentum + 0.1 * gradient.numpy(), full_matrices=False)
        s = s / np.sqrt(np.sum(s**2))
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        step = 0.2 * np.sqrt(max(weight.shape)) * (u * s) @ vt
        weight = weight - learning_rate * (weight_decay * weight + step)
    return torch.tensor(weight)


def muon_steps(optimizer, weight, gradients):
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(12, 12), (8, 32), (32, 8)])
def test_muon_equals_a_reference_in_float64(shape):
    start, gradients = torch.randn(shape).double(), torch.randn(6, *shape).double()
    weight = torch.nn.Parameter(start.clone())
    muon = gpt.Muon([weight], {"lr": 0.02, "weight_decay": 0.5})
    expected = muon_by_svd(start, gradients, 0.02, 0.5)
    torch.testing.assert_close(muon_steps(muon, weight, gradients), expected, rtol=0, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon since 2.9")
@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16)])
def test_muon_equals_pytorchs_within_the_precision_of_bf16(shape):
    start, gradients = torch.randn(shape), torch.randn(10, *shape)
    ours, theirs = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    result = muon_steps(gpt.Muon([ours], {"lr": 0.02, "weight_decay": 0.5}), ours, gradients)
    expected = muon_steps(torch.optim.Muon([theirs], lr=0.02, weight_decay=0.5, momentum=0.9,
                                           adjust_lr_fn="match_rms_adamw"), theirs, gradients)
    assert (result - expected).norm() < 0.03 * (expected - start).norm()


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_orthogonalize_keeps_the_directions_and_makes_all_equally_long(shape):
    u, _, vt = torch.linalg.svd(torch.randn(shape).double(), full_matrices=False)
    s = torch.logspace(-1, 1, 16).double()  # the longest is 100 times the shortest
    result = gpt.orthogonalize((u * s) @ vt)
    new = u.T @ result @ vt.T  # diagonal: the same directions
    assert new.diagonal().min() > 0.65 and new.diagonal().max() < 1.25
    torch.testing.assert_close(new, new.diagonal().diag())
    assert torch.equal(gpt.orthogonalize(torch.zeros(shape)), torch.zeros(shape))


# --------------------------------------------------------------------------- which gets which part
@pytest.mark.parametrize("architecture", [{}, dict(bias=True, positions="learned"),
                                          dict(tie_weights=True)])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_has_one_optimizer(make_model, architecture, optimizer):
    """Muon has the matrices of the blocks, AdamW the rest. Only matrices have weight decay."""
    model = make_model(**architecture)
    config = gpt.TrainConfig(optimizer=optimizer, weight_decay=0.3)
    optimizers = gpt.make_optimizers(model, config)
    assert [type(o).__name__ for o in optimizers] == ["AdamW", "Muon"][: len(optimizers)]
    found = []
    for one in optimizers:
        for group in one.param_groups:
            found += [(id(p), type(one).__name__, group["weight_decay"]) for p in group["params"]]
    expected = []
    for name, p in model.named_parameters():
        matrix = name.startswith("blocks.") and p.dim() == 2 and optimizer == "muon"
        expected += [(id(p), "Muon" if matrix else "AdamW", 0.3 if p.dim() == 2 else 0.0)]
    assert sorted(found) == sorted(expected)


# ---------------------------------------------------------------------------------- learning rate
def factor(step, **options):
    return gpt.learning_rate_factor(step, gpt.TrainConfig(**{"max_iters": 100} | options))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 99, 100, 200])
def test_the_learning_rate_rises_in_the_warmup_and_never_after_it(schedule, warmup):
    """It is never zero and never above the highest, also if the whole run is warm-up."""
    factors = [factor(step, schedule=schedule, warmup_iters=warmup) for step in range(100)]
    rising = [(step + 1) / warmup for step in range(min(warmup, 100))]
    assert factors[: len(rising)] == pytest.approx(rising)
    assert factors[len(rising) :] == sorted(factors[len(rising) :], reverse=True)
    assert min(factors) > 0 and max(factors) == pytest.approx(min(1, 100 / max(warmup, 1)))


def test_each_schedule_has_its_form():
    assert [factor(step, schedule="constant") for step in (0, 50, 99)] == [1, 1, 1]
    # Linear: the highest for the first 30 %, then straight down to zero.
    linear = [factor(step, schedule="linear") for step in (0, 30, 65, 99)]
    assert linear == pytest.approx([1, 1, 0.5, 1 / 70])
    assert factor(60, schedule="linear", warmup_iters=60) == 1  # a long warm-up comes first
    cosine = [factor(step, schedule="cosine") for step in (0, 25, 50, 75)]
    assert cosine == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-5)
    assert factor(60, schedule="cosine", warmup_iters=20) == pytest.approx(0.5)
    assert factor(99, schedule="cosine") < 0.001
    assert factor(100, schedule="cosine", warmup_iters=100) == 1  # no division by zero


# ------------------------------------------------------------------------------- one training step
@pytest.fixture
def step(make_model):
    """step(...): one training step by plain gradient descent, whose update is the gradient.

    Returns the update divided by the learning rate, the loss, the batches that the model saw, and
    the gradient and the loss that all of them have together in one pass in float64.
    """
    def call(number=0, lm_head=1.0, dtype=torch.float64, precision=torch.float32, scale=None,
             learning_rate=0.5, **options):
        config = gpt.TrainConfig(block_size=8, schedule="constant", learning_rate=learning_rate,
                                 **options)
        model, reference = make_model().to(dtype), make_model()
        for one in (model, reference):  # a larger output layer makes larger gradients
            one.lm_head.weight.data *= lm_head
        batches = []
        model.register_forward_pre_hook(lambda _, args: batches.append(args))
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        data = torch.randint(13, (500,), generator=torch.Generator().manual_seed(1))
        sgd = torch.optim.SGD(model.parameters(), lr=123.0)
        loss = gpt.training_step(number, model, [sgd], scaler, data, config, precision)
        after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        x, y = [torch.cat(parts) for parts in zip(*batches, strict=True)]
        expected_loss = F.cross_entropy(reference(x)[0].flatten(0, 1), y.flatten())
        gradient = torch.autograd.grad(expected_loss, list(reference.parameters()))
        return SimpleNamespace(
            update=(before - after) / learning_rate, loss=loss, x=x, y=y, passes=len(batches),
            gradient=torch.cat([g.flatten() for g in gradient]), expected_loss=expected_loss,
            scale=scaler.get_scale())
    return call


@pytest.mark.parametrize("passes", [1, 2, 4, 8])
def test_accumulated_passes_equal_one_large_batch(step, passes):
    """8 sequences in 1, 2, 4 or 8 passes: the same sequences and the same gradient."""
    once = step(batch_size=8, lm_head=0.1)
    some = step(batch_size=8 // passes, gradient_accumulation_steps=passes, lm_head=0.1)
    assert some.passes == passes and torch.equal(some.x, once.x) and some.x.shape == (8, 8)
    if passes == 1:
        assert some.loss.item() == pytest.approx(once.expected_loss.item(), abs=1e-5)
    assert once.gradient.norm() < 1  # it is not clipped: that would hide a factor
    torch.testing.assert_close(some.update, once.gradient)


def test_a_long_gradient_is_clipped_to_length_one(step):
    one = step(batch_size=8, lm_head=30.0)
    assert one.gradient.norm() > 2
    torch.testing.assert_close(one.update, one.gradient / one.gradient.norm(), rtol=0, atol=1e-6)


def test_every_step_draws_its_own_sequences_from_the_seed(step):
    """All of them from the data, y one token after x, whatever was drawn before."""
    first, second, other = step(0), step(1), step(0, seed=5)
    torch.rand(3)
    assert torch.equal(step(1).x, second.x)
    assert not torch.equal(first.x, second.x) and not torch.equal(first.x, other.x)
    assert torch.equal(first.x[:, 1:], first.y[:, :-1])


def test_both_optimizers_get_the_learning_rate_of_the_step(make_model):
    model = make_model()
    config = gpt.TrainConfig(block_size=8, warmup_iters=4, learning_rate=0.1)
    optimizers = gpt.make_optimizers(model, config)
    gpt.training_step(1, model, optimizers, torch.amp.GradScaler(enabled=False),
                      torch.randint(13, (99,)), config, torch.float32)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    assert rates == pytest.approx([0.05] * 3)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, torch.float32])
def test_products_have_the_precision_that_is_asked_for(make_model, precision):
    """The weights stay in fp32."""
    model, seen = make_model(torch.float32), set()
    model.lm_head.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    config = gpt.TrainConfig(block_size=8)
    gpt.training_step(0, model, gpt.make_optimizers(model, config),
                      torch.amp.GradScaler("cpu", enabled=False), torch.randint(13, (99,)), config,
                      precision)
    assert seen == {precision}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ------------------------------------------------------------------- fp16, as on a T4, on the CPU
@pytest.mark.parametrize("lm_head", [0.1, 30.0])
def test_fp16_gradients_are_unscaled_and_then_clipped(step, lm_head):
    """With a loss that is multiplied by 1,024 the update is that of fp32."""
    one = step(lm_head=lm_head, dtype=torch.float32, precision=torch.float16, scale=1024.0)
    length = one.gradient.norm()
    assert (length < 1) == (lm_head == 0.1) and one.scale == 1024.0
    expected = one.gradient / max(1, length)
    assert (one.update - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale(make_model, optimizer):
    model = make_model(torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    config = gpt.TrainConfig(block_size=8, optimizer=optimizer)
    optimizers = gpt.make_optimizers(model, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    data = torch.randint(13, (99,))
    gpt.training_step(0, model, optimizers, scaler, data, config, torch.float16)
    assert all(map(torch.equal, before, model.parameters()))
    assert scaler.get_scale() == 2.0**99
    for step in range(1, 100):  # it recovers by itself
        gpt.training_step(step, model, optimizers, scaler, data, config, torch.float16)
    assert scaler.get_scale() < 2.0**40
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["blocks.0.feed_forward.up.weight", "lm_head.weight"])
def test_an_overflow_in_one_matrix_leaves_all_weights_finite(make_model, name, bad):
    """The gradient of one optimizer is not finite, that of the other one is."""
    model = make_model(torch.float32)
    dict(model.named_parameters())[name].register_hook(lambda grad: grad * bad)
    config = gpt.TrainConfig(block_size=8)
    scaler = torch.amp.GradScaler("cpu")
    gpt.training_step(0, model, gpt.make_optimizers(model, config), scaler,
                      torch.randint(13, (99,)), config, torch.float16)
    assert all(p.isfinite().all() for p in model.parameters())
    assert scaler.get_scale() == 2.0**15


# ---------------------------------------------------------------------------- device and precision
@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=(7, 5)): pretend to have a GPU of this compute capability, or mps."""
    def pretend(cuda=None, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **options: True)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: bool(cuda or mps))
        monkeypatch.setattr(torch.accelerator, "current_accelerator",
                            lambda: torch.device("cuda" if cuda else "mps"))
        monkeypatch.setattr(torch, "zeros", lambda *size, device="cpu", **options:
                            SimpleNamespace(device=torch.device(device)))
    return pretend


@pytest.mark.parametrize("have, device, precision", [
    (dict(cuda=(7, 5)), "cuda:0", torch.float16),  # a T4 says that it has bf16: it emulates it
    (dict(cuda=(6, 0)), "cuda:0", torch.float16), (dict(cuda=(8, 0)), "cuda:0", torch.bfloat16),
    (dict(cuda=(9, 0), mps=True), "cuda:0", torch.bfloat16),
    (dict(mps=True), "mps:0", torch.float32), ({}, "cpu", torch.float32)])
def test_device_and_precision_fit_the_machine(machine, monkeypatch, have, device, precision):
    machine(**have)
    assert gpt.choose_device("auto", "auto") == (torch.device(device), precision)
    assert gpt.choose_device("cpu", "auto") == (torch.device("cpu"), torch.float32)
    monkeypatch.setenv("LOCAL_RANK", "1")  # torchrun: a GPU for each process
    assert gpt.choose_device("auto", "auto")[0].index == {"cpu": None}.get(device, 1)
    for name, chosen in dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16).items():
        assert gpt.choose_device("auto", name)[1] is chosen


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "7"])
def test_a_device_that_is_not_available_is_named(name):
    with pytest.raises(gpt.UserError, match=f"--device {name} is not available, --device cpu is"):
        gpt.choose_device(name, "auto")
