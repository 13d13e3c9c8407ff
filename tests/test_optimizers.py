"""Section 5 of gpt.py: the optimizers, the learning rate, one training step, device, precision."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tokens
from torch.nn.utils import parameters_to_vector

import gpt

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


# ------------------------------------------------------------------------------------------- Muon
def muon_by_svd(weight, gradients, learning_rate, weight_decay):
    """Muon in NumPy: the Newton-Schulz polynomial is applied to the singular values themselves."""
    weight = weight.numpy().copy()
    momentum = np.zeros_like(weight)
    for gradient in gradients.numpy():
        momentum = 0.9 * momentum + 0.1 * gradient
        u, s, vt = np.linalg.svd(0.9 * momentum + 0.1 * gradient, full_matrices=False)
        s = s / np.sqrt(np.sum(s**2))
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        step = 0.2 * np.sqrt(max(weight.shape)) * (u * s) @ vt
        weight = weight - learning_rate * (weight_decay * weight + step)
    return torch.tensor(weight)

@pytest.mark.parametrize("shape", [(12, 12), (8, 32), (32, 8)])
def test_muon_equals_a_reference_in_float64(shape):
    start, gradients = torch.randn(shape).double(), torch.randn(6, *shape).double()
    weight = torch.nn.Parameter(start.clone())
    muon = gpt.Muon([weight], {"lr": 0.02, "weight_decay": 0.5})
    for gradient in gradients:
        weight.grad = gradient.clone()
        muon.step()
    expected = muon_by_svd(start, gradients, 0.02, 0.5)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------- which gets which part
@pytest.mark.parametrize("architecture", [dict(bias=True, positions="learned"),
                                          dict(tie_weights=True)])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_has_one_optimizer(make_model, architecture, optimizer):
    """Muon has the matrices of the blocks, AdamW the rest. Only matrices have weight decay."""
    model = make_model(**architecture)
    config = gpt.TrainConfig(optimizer=optimizer, weight_decay=0.3)
    found = []
    for one in gpt.make_optimizers(model, config):
        for group in one.param_groups:
            found += [(id(p), type(one).__name__, group["weight_decay"]) for p in group["params"]]
    expected = []
    for name, p in model.named_parameters():
        muon = optimizer == "muon" and name.startswith("blocks.") and p.dim() == 2
        expected.append((id(p), "Muon" if muon else "AdamW", 0.3 if p.dim() == 2 else 0.0))
    assert sorted(found) == sorted(expected)


# ---------------------------------------------------------------------------------- learning rate
def factors(steps, **options):
    config = gpt.TrainConfig(max_iters=100, **options)
    return [gpt.learning_rate_factor(step, config) for step in steps]

def test_the_learning_rate_rises_in_the_warmup():
    assert factors([0, 1, 9], warmup_iters=10) == pytest.approx([0.1, 0.2, 1])
    assert factors([50, 99, 100], warmup_iters=100, schedule="cosine") == [0.51, 1, 1]

def test_each_schedule_has_its_form():
    """Linear: the highest for the first 30 % and the warm-up, then straight down to zero."""
    assert factors([0, 50, 99], schedule="constant") == [1, 1, 1]
    assert factors([0, 30, 65, 99], schedule="linear") == pytest.approx([1, 1, 0.5, 1 / 70])
    assert factors([60, 80], schedule="linear", warmup_iters=60) == pytest.approx([1, 0.5])
    expected = [1, 0.853553, 0.5, 0.146447]
    assert factors([0, 25, 50, 75], schedule="cosine") == pytest.approx(expected, abs=1e-5)
    assert factors([60], schedule="cosine", warmup_iters=20) == pytest.approx([0.5])


# ------------------------------------------------------------------------------- one training step
@pytest.fixture
def step(make_model):
    """step(...): one training step by plain gradient descent with a learning rate of 1.

    Returns the update of the weights, which is the gradient that was used; the sequences that the
    model read; and the gradient that all of them have together in one pass, in float64.
    """
    def call(number=0, lm_head=0.1, dtype=torch.float64, precision=torch.float32,
             scaler=NO_SCALER, **options):
        config = gpt.TrainConfig(block_size=8, schedule="constant", learning_rate=1.0, **options)
        model, reference = make_model().to(dtype), make_model()
        model.lm_head.weight.data *= lm_head  # a larger output layer makes a larger gradient
        reference.lm_head.weight.data *= lm_head
        batches = []
        model.register_forward_pre_hook(lambda _, args: batches.append(args))
        before = parameters_to_vector(model.parameters()).detach().clone()
        sgd = torch.optim.SGD(model.parameters(), lr=123.0)
        data = torch.randint(13, (500,), generator=torch.Generator().manual_seed(1))
        gpt.training_step(number, model, [sgd], scaler, data, config, precision)
        update = before - parameters_to_vector(model.parameters()).detach()
        x, y = [torch.cat(parts) for parts in zip(*batches, strict=True)]
        gradient = torch.autograd.grad(reference(x, y)[1], list(reference.parameters()))
        return SimpleNamespace(update=update, x=x, y=y, passes=len(batches),
                               gradient=parameters_to_vector(gradient))
    return call

@pytest.mark.parametrize("passes", [1, 2, 8])
def test_accumulated_passes_equal_one_large_batch(step, passes):
    """8 sequences in 1, 2 or 8 passes: the same sequences and the same gradient."""
    once = step(batch_size=8)
    some = step(batch_size=8 // passes, gradient_accumulation_steps=passes)
    assert some.passes == passes
    assert torch.equal(some.x, once.x)
    assert once.gradient.norm() < 1  # it is not clipped: that would hide a factor
    torch.testing.assert_close(some.update, once.gradient, rtol=1e-5, atol=1e-6)

def test_a_long_gradient_is_clipped_to_length_one(step):
    one = step(lm_head=30.0)
    assert one.gradient.norm() > 2
    torch.testing.assert_close(one.update, one.gradient / one.gradient.norm(), rtol=0, atol=1e-5)

def test_every_step_draws_its_own_sequences_from_the_seed(step):
    """y is one token after x. What was drawn before makes no difference."""
    first, second, other = step(0), step(1), step(0, seed=5)
    torch.rand(3)
    assert torch.equal(step(1).x, second.x)
    assert not torch.equal(first.x, second.x)
    assert not torch.equal(first.x, other.x)
    assert torch.equal(first.x[:, 1:], first.y[:, :-1])

def training_steps(model, numbers, precision=torch.float32, scaler=NO_SCALER, **options):
    """Training steps as in `train`. Returns the optimizers."""
    config = gpt.TrainConfig(block_size=8, **options)
    optimizers, data = gpt.make_optimizers(model, config), tokens(99)
    for number in numbers:
        gpt.training_step(number, model, optimizers, scaler, data, config, precision)
    return optimizers

def test_both_optimizers_get_the_learning_rate_of_the_step(make_model):
    optimizers = training_steps(make_model(), [1], warmup_iters=4, learning_rate=0.1)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    assert rates == pytest.approx([0.05] * 3)

@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, torch.float32])
def test_products_have_the_precision_that_is_asked_for(make_model, precision):
    """The weights stay in fp32."""
    model, seen = make_model(torch.float32), set()
    model.lm_head.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    training_steps(model, [0], precision)
    assert seen == {precision}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ------------------------------------------------------------------- fp16, as on a T4, on the CPU
@pytest.mark.parametrize("lm_head", [0.1, 30.0])
def test_fp16_gradients_are_unscaled_and_then_clipped(step, lm_head):
    """With a loss that is multiplied by 1,024 the update is that of fp32."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    one = step(lm_head=lm_head, dtype=torch.float32, precision=torch.float16, scaler=scaler)
    expected = one.gradient / max(1, one.gradient.norm())
    assert (one.gradient.norm() > 2) == (lm_head == 30.0)
    assert (one.update - expected).norm() < 0.02 * expected.norm()

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale(make_model, optimizer):
    model, scaler = make_model(torch.float32), torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = [p.detach().clone() for p in model.parameters()]
    training_steps(model, [0], torch.float16, scaler, optimizer=optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    assert scaler.get_scale() == 2.0**99
    training_steps(model, range(1, 100), torch.float16, scaler, optimizer=optimizer)
    assert scaler.get_scale() < 2.0**40  # it recovers by itself
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(map(torch.equal, before, model.parameters()))

@pytest.mark.parametrize("name", ["blocks.0.feed_forward.up.weight", "lm_head.weight"])
def test_an_overflow_in_one_matrix_leaves_all_weights_finite(make_model, name):
    """The gradient of one optimizer is not finite, that of the other one is."""
    model, scaler = make_model(torch.float32), torch.amp.GradScaler("cpu")
    model.get_parameter(name).register_hook(lambda gradient: gradient * float("inf"))
    training_steps(model, [0], torch.float16, scaler)
    assert all(p.isfinite().all() for p in model.parameters())
    assert scaler.get_scale() == 2.0**15


# ---------------------------------------------------------------------------- device and precision
@pytest.fixture
def machine(monkeypatch):
    """machine("cuda", (7, 5)): pretend to have this accelerator, with this compute capability."""
    def pretend(name, capability=None):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: name != "cpu")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(name))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
        monkeypatch.setattr(torch, "zeros", lambda *size, device:
                            SimpleNamespace(device=torch.device(device)))
    return pretend

@pytest.mark.parametrize("name, capability, precision", [
    ("cuda", (7, 5), torch.float16),  # a T4 has no bf16
    ("cuda", (8, 0), torch.bfloat16), ("cuda", (9, 0), torch.bfloat16),
    ("mps", None, torch.float32), ("cpu", None, torch.float32)])
def test_device_and_precision_fit_the_machine(machine, monkeypatch, name, capability, precision):
    machine(name, capability)
    device, found = gpt.choose_device("auto", "auto")
    assert device == torch.device(name, None if name == "cpu" else 0)
    assert found == precision
    assert gpt.choose_device("cpu", "auto") == (torch.device("cpu"), torch.float32)
    assert gpt.choose_device("auto", "fp32")[1] == torch.float32
    assert gpt.choose_device("auto", "bf16")[1] == torch.bfloat16
    assert gpt.choose_device("auto", "fp16")[1] == torch.float16

def test_each_process_of_torchrun_has_a_gpu_of_its_own(machine, monkeypatch):
    machine("cuda", (8, 0))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert gpt.choose_device("auto", "auto")[0] == torch.device("cuda:1")

@pytest.mark.parametrize("name", ["tpu", "cuda:99"])
def test_a_device_that_is_not_available_is_named(name):
    with pytest.raises(gpt.UserError, match=f"--device {name} is not available, --device cpu is"):
        gpt.choose_device(name, "auto")
