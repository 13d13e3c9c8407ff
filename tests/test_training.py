"""The training loop: what it starts from, what each step does, when it stops, what it says."""
import csv
import math
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT
from torch.optim.optimizer import (
    register_optimizer_step_pre_hook,
)

import gpt

TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=4, max_iters=10,
            eval_interval=5, eval_tokens=256, optimizer="adamw", learning_rate=3e-3, device="cpu",
            precision="fp32", data="text.txt", ckpt="run.pt")


@pytest.fixture(autouse=True)
def folder(empty_folder, short_samples):
    """A folder of its own for every test, with a small text."""
    (empty_folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return empty_folder


def train(**flags):
    """Train a tiny model with these flags changed; returns what the resume file holds."""
    flags = TINY | flags
    gpt.train(**flags)
    return stored(Path(flags["ckpt"]).with_suffix(".resume.pt"))


def stored(path="run.pt"):
    """What a checkpoint file holds, read without gpt.py."""
    return torch.load(path, weights_only=True)


def command(flags):
    """The same flags as words of a command line."""
    return ["--train", *(str(word) for k, v in flags.items() for word in (f"--{k}", v))]


@pytest.fixture
def norms():
    """The length of the whole gradient that each AdamW step was given, in order."""
    lengths = []

    def hook(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        lengths.append(math.sqrt(sum(float(grad.double().square().sum()) for grad in grads)))

    handle = register_optimizer_step_pre_hook(hook)
    yield lengths
    handle.remove()


def scale_the_loss(monkeypatch, factor):
    """Multiply the loss (and so the gradients) of every model by a factor while training."""
    real = gpt.GPTLanguageModel.forward

    def forward(self, idx, targets=None, **more):
        logits, loss = real(self, idx, targets, **more)
        trains = loss is not None and self.training and torch.is_grad_enabled()
        return logits, loss * factor if trains else loss

    monkeypatch.setattr(gpt.GPTLanguageModel, "forward", forward)


@pytest.fixture
def awake(monkeypatch):
    """A start at which no weight is zero, so that every gradient is at work from the first step."""
    real = gpt.GPTLanguageModel.__init__

    def init(self, config):
        real(self, config)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.1)

    monkeypatch.setattr(gpt.GPTLanguageModel, "__init__", init)


def assert_equal_weights(one, other, **tolerance):
    """Tensor by tensor, to the bit unless a tolerance is given."""
    one, other = one["model_state_dict"], other["model_state_dict"]
    assert one.keys() == other.keys()
    for name in one:
        if tolerance:
            assert torch.allclose(one[name], other[name], **tolerance), name
        else:
            assert torch.equal(one[name], other[name]), name


def losses(history):
    """A history without its clock."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


# -------------------------------------------------------------------------------- learning rate
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup, steps", [(0, 1), (0, 2), (0, 50), (1, 1), (1, 50), (10, 50),
                                           (49, 50), (50, 50), (51, 50), (200, 50), (0, 5000)])
def test_the_learning_rate_is_never_zero_and_never_above_its_peak(schedule, warmup, steps):
    """From the first to the last step, with warm-up shorter, equal or longer than the run."""
    config = gpt.TrainConfig(schedule=schedule, warmup_iters=warmup, max_iters=steps)
    rates = [gpt.learning_rate_factor(step, config) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    rising = min(warmup, steps)
    assert rates[:rising] == pytest.approx([(i + 1) / warmup for i in range(rising)])
    falling = rates[max(warmup - 1, 0) :]
    assert falling == sorted(falling, reverse=True)
    if warmup <= steps:
        assert max(rates) == pytest.approx(1)
    elif steps:
        assert max(rates) == pytest.approx(steps / warmup)


def test_the_shapes_of_the_schedules():
    """Cosine is half-way down half-way, linear stays up and then falls evenly, constant stays."""
    def rate(schedule, step, steps=1000, warmup=0):
        config = gpt.TrainConfig(schedule=schedule, max_iters=steps, warmup_iters=warmup)
        return gpt.learning_rate_factor(step, config)

    assert rate("cosine", 500) == pytest.approx(0.5)
    assert rate("cosine", 250) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert rate("cosine", 600, warmup=200) == pytest.approx(0.5)
    assert rate("cosine", 999) < 1e-5 and rate("cosine", 0) == 1
    assert rate("linear", 0) == rate("linear", 299) == 1
    drops = [rate("linear", step) - rate("linear", step + 1) for step in range(300, 999)]
    assert min(drops) == pytest.approx(max(drops)) and min(drops) > 0
    assert rate("linear", 999) < 0.01
    assert {rate("constant", step) for step in range(0, 1000, 100)} == {1}


def test_the_learning_rates_are_what_the_optimizers_get():
    """Each step takes peak times factor, for AdamW and for Muon alike."""
    seen = {}

    def hook(optimizer, args, kwargs):
        rates = {group["lr"] for group in optimizer.param_groups}
        seen.setdefault(type(optimizer).__name__, []).append(rates.pop())
        assert not rates

    handle = register_optimizer_step_pre_hook(hook)
    flags = dict(optimizer="muon", warmup_iters=3, schedule="cosine")
    try:
        config = train(**flags)["train_config"]
    finally:
        handle.remove()
    config = gpt.TrainConfig(**config)
    factors = [gpt.learning_rate_factor(step, config) for step in range(10)]
    assert seen["AdamW"] == seen["Muon"] == pytest.approx([3e-3 * factor for factor in factors])


# -------------------------------------------------------------------------- device and precision
@pytest.mark.parametrize("capability, expected", [
    ((6, 1), torch.float16), ((7, 0), torch.float16), ((7, 5), torch.float16),
    ((8, 0), torch.bfloat16), ((8, 9), torch.bfloat16), ((9, 0), torch.bfloat16),
    ((12, 0), torch.bfloat16)])
def test_bf16_only_where_a_gpu_has_it_in_hardware(monkeypatch, capability, expected):
    """A T4 (7.5) says it supports bf16, but emulates it: fp16 there."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
    assert gpt.choose_precision("auto", torch.device("cuda")) is expected


@pytest.fixture
def products(monkeypatch):
    """products(share): a matrix product in bf16 is made to take this share of one in fp32."""
    def make(share):
        monkeypatch.setattr(torch, "mm", lambda one, other: time.sleep(
            0.001 * (share if one.dtype == torch.bfloat16 else 1)))

    return make


@pytest.mark.parametrize("share, expected", [(0.1, torch.bfloat16), (0.6, torch.bfloat16),
                                             (1.0, torch.float32), (2.0, torch.float32)])
def test_a_cpu_takes_bf16_where_it_is_faster(products, share, expected):
    """Some have the instructions and multiply no faster by them: it is measured."""
    products(share)
    assert gpt.choose_precision("auto", torch.device("cpu")) is expected


def test_mps_computes_in_fp32(products):
    """Whatever the CPU next to it can do."""
    products(0.1)
    assert gpt.choose_precision("auto", torch.device("mps")) is torch.float32


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("name, expected", [("fp32", torch.float32), ("bf16", torch.bfloat16),
                                            ("fp16", torch.float16)])
def test_a_precision_that_is_asked_for_is_taken(device, name, expected):
    """--precision overrides what is chosen automatically."""
    assert gpt.choose_precision(name, torch.device(device)) is expected


@pytest.mark.parametrize("cuda, mps, rank, expected", [
    (True, False, None, "cuda:0"), (True, True, None, "cuda:0"), (True, False, "1", "cuda:1"),
    (False, True, None, "mps"), (False, False, None, "cpu")])
def test_the_best_device_is_chosen(monkeypatch, cuda, mps, rank, expected):
    """A GPU before MPS before the CPU, and under torchrun each process its own GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "zeros", lambda *size, device="cpu", **more: SimpleNamespace(
        device=torch.device(device)))
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert gpt.choose_device("auto") == torch.device(expected)
    assert gpt.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "tpu", "meta", "", "cpu;", "7"])
def test_a_device_that_is_not_there_gets_a_sentence(monkeypatch, name):
    """A missing GPU as well as a misspelt one."""
    if name in ("cuda", "mps") and getattr(torch, name).is_available():
        pytest.skip(f"this machine has {name}")
    with pytest.raises(gpt.UserError, match="--device"):
        gpt.choose_device(name)


def test_fp16_trains_with_a_scaled_loss():
    """The path of a T4, on the CPU: fp16, GradScaler, and the loss falls as in fp32."""
    half = train(precision="fp16", max_iters=60, eval_interval=60)
    full = train(precision="fp32", max_iters=60, eval_interval=60, ckpt="full.pt")
    assert half["scaler"]["scale"] > 1 and not full["scaler"]
    start, end = (row["val_loss"] for row in half["history"])
    assert end < start - 0.3
    assert end == pytest.approx(full["history"][-1]["val_loss"], abs=0.05)
    assert all(weight.dtype == torch.float32 for weight in half["model_state_dict"].values())


def test_bf16_trains_and_is_not_fp32():
    """--precision bf16 learns as well, and isn't ignored."""
    half = train(precision="bf16", max_iters=40, eval_interval=40)
    full = train(precision="fp32", max_iters=40, eval_interval=40, ckpt="full.pt")
    ends = [run["history"][-1]["val_loss"] for run in (half, full)]
    assert ends[0] == pytest.approx(ends[1], abs=0.05) and ends[0] != ends[1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale(monkeypatch, optimizer):
    """With an absurd scale no weight moves and each step halves it; from a high one it recovers."""
    scaler = torch.amp.GradScaler

    def start_at(scale):
        monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **how: scaler(
            *args, **{"init_scale": scale, **how}))

    flags = dict(precision="fp16", optimizer=optimizer)
    start_at(2.0**100)
    stuck = train(**flags, max_iters=4)
    one = train(**flags, max_iters=1, learning_rate=0, weight_decay=0, ckpt="start.pt")
    assert stuck["scaler"]["scale"] == 2.0**96
    if optimizer == "adamw":
        assert_equal_weights(stuck, one)
    assert len({row["val_loss"] for row in stuck["history"]}) == 1
    start_at(2.0**30)
    freed = train(**flags, max_iters=60, eval_interval=60, ckpt="freed.pt")
    assert freed["scaler"]["scale"] < 2.0**30
    assert freed["history"][-1]["val_loss"] < freed["history"][0]["val_loss"] - 0.2


def test_an_overflow_in_one_matrix_skips_the_whole_step(monkeypatch):
    """Two optimizers share the verdict: if one weight's gradient overflows, no weight moves."""
    real = gpt.GPTLanguageModel.__init__

    def init(self, config):
        real(self, config)
        if self.lm_head.weight.device.type != "meta":
            self.blocks[0].feed_forward.up.weight.register_hook(lambda grad: grad * math.inf)

    monkeypatch.setattr(gpt.GPTLanguageModel, "__init__", init)
    run = train(precision="fp16", optimizer="muon", max_iters=3, weight_decay=0)
    assert len({row["val_loss"] for row in run["history"]}) == 1
    assert run["scaler"]["scale"] < 2.0**16


# ------------------------------------------------------------------------------------- learning
def test_the_loss_starts_at_a_guess_and_falls(capsys):
    """An untrained model knows nothing: ln(V). Then it learns, and the run says so."""
    run = train(max_iters=60, eval_interval=20)
    history, V = run["history"], len(set(TEXT))
    assert [row["iteration"] for row in history] == [0, 20, 40, 60]
    assert history[0]["train_loss"] == pytest.approx(math.log(V), abs=0.15)
    assert history[0]["val_loss"] == pytest.approx(math.log(V), abs=0.15)
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.4
    out = capsys.readouterr().out
    for row in history:
        assert f"{row['train_loss']:.4f}" in out and f"{row['val_loss']:.4f}" in out
    assert f"{math.log(V):.4f}" in out
    assert [row["tokens"] for row in history] == [0, 640, 1280, 1920]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_overfits_a_tiny_text(folder, optimizer):
    """Forty characters are learnt by heart: the loss goes nearly to zero."""
    (folder / "tiny.txt").write_text("0123456789abcdefghijklmnopqrstuvwxyz,.!?" * 3)
    run = train(data="tiny.txt", optimizer=optimizer, learning_rate=1e-2, max_iters=120,
                eval_interval=120, n_embd=32)
    assert run["history"][-1]["train_loss"] < 0.1


@pytest.mark.parametrize("batch, passes", [(4, 2), (2, 4), (1, 8)])
def test_accumulated_passes_equal_one_large_batch(awake, batch, passes):
    """8 sequences in one pass, or in several: the same losses and the same weights."""
    flags = dict(learning_rate=1e-3, max_iters=6, eval_interval=3)
    whole = train(**flags, batch_size=8)
    parts = train(**flags, batch_size=batch, gradient_accumulation_steps=passes, ckpt="parts.pt")
    assert_equal_weights(whole, parts, rtol=1e-4, atol=1e-5)
    for one, other in zip(whole["history"], parts["history"], strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["val_loss"] == pytest.approx(other["val_loss"], abs=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulation_gives_the_gradients_of_the_large_batch(monkeypatch, awake, norms, optimizer):
    """What the optimizers remember of the first step's gradient is equal, tensor by tensor."""
    scale_the_loss(monkeypatch, 0.1)  # short enough not to be clipped, which would hide a factor
    whole, parts = (train(max_iters=1, batch_size=batch, gradient_accumulation_steps=passes,
                          optimizer=optimizer) for batch, passes in ((8, 1), (2, 4)))
    compared = 0
    for ours, theirs in zip(whole["optimizers"], parts["optimizers"], strict=True):
        for key, state in ours["state"].items():
            name = "exp_avg" if "exp_avg" in state else "momentum_buffer"
            assert torch.allclose(state[name], theirs["state"][key][name], rtol=1e-4, atol=1e-8)
            compared += bool(state[name].abs().max() > 1e-6)
    assert compared == len(whole["model_state_dict"]) and max(norms) < 0.9


def test_long_gradients_are_clipped_to_one(monkeypatch, norms):
    """A thousandfold loss gives gradients of length 1."""
    scale_the_loss(monkeypatch, 1000)
    train(max_iters=5)
    assert norms == pytest.approx([1.0] * 5, abs=1e-4)


def test_short_gradients_stay_as_they_are(monkeypatch, awake, norms):
    """A thousandth of the loss gives a thousandth of the gradients."""
    scale_the_loss(monkeypatch, 1e-2)
    train(max_iters=1)
    scale_the_loss(monkeypatch, 1e-3)
    train(max_iters=1)
    assert 1e-3 < norms[0] < 1 and norms[1] == pytest.approx(norms[0] / 1000, rel=1e-3)


def test_fp16_gradients_are_unscaled_before_they_are_clipped(monkeypatch, awake, norms):
    """The length that the optimizer sees is the true one, not the scaled one, cut."""
    scale_the_loss(monkeypatch, 0.1)
    train(max_iters=2, precision="fp32")
    train(max_iters=2, precision="fp16")
    assert norms[2:] == pytest.approx(norms[:2], rel=0.05) and max(norms) < 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_is_for_matrices_only(optimizer):
    """Every parameter is in one group; norms and biases are in groups without decay."""
    model = gpt.GPTLanguageModel(gpt.GPTConfig(n_layer=2, n_head=2, n_embd=16, bias=True,
                                               positions="learned", vocab_size=11))
    config = gpt.TrainConfig(optimizer=optimizer, weight_decay=0.3)
    groups = [g for o in model.make_optimizers(config) for g in o.param_groups]
    listed = [(id(p), p.dim(), g["weight_decay"]) for g in groups for p in g["params"]]
    assert sorted(i for i, _, _ in listed) == sorted(id(p) for p in model.parameters())
    assert all(decay == (0.3 if dim == 2 else 0) for _, dim, decay in listed)
    assert {dim for _, dim, _ in listed} == {1, 2}


def test_muon_turns_the_blocks_matrices_and_adamw_the_rest():
    """Embeddings, the head, norms and biases stay with AdamW."""
    model = gpt.GPTLanguageModel(gpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=11,
                                               tie_weights=False))
    adamw, muon = model.make_optimizers(gpt.TrainConfig(learning_rate=0.05))
    turned = {id(p) for group in muon.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in turned) == (name.startswith("blocks.") and p.dim() == 2), name
    assert isinstance(adamw, torch.optim.AdamW) and muon.param_groups[0]["lr"] == 0.05
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95)


def test_weight_decay_pulls():
    """Without a gradient to speak of, matrices shrink by lr x decay a step, and norms don't."""
    flags = dict(max_iters=10, schedule="constant", learning_rate=1e-2)
    free = train(**flags, weight_decay=0.0)["model_state_dict"]
    pulled = train(**flags, weight_decay=5.0)["model_state_dict"]
    for name, weight in free.items():
        if weight.dim() == 2:
            assert pulled[name].norm() < weight.norm(), name


# ---------------------------------------------------------------------------------- determinism
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_same_seed_gives_the_same_run_to_the_bit(optimizer):
    """Weights and losses, with dropout, whatever the generators were before."""
    flags = dict(optimizer=optimizer, dropout=0.2)
    one = train(**flags)
    torch.manual_seed(99)
    random.seed(99)
    two = train(**flags)
    assert_equal_weights(one, two)
    assert losses(one["history"]) == losses(two["history"])


def test_another_seed_gives_another_run():
    """--seed changes the start and the data."""
    one, two = train(seed=1), train(seed=2)
    assert one["run_id"] != two["run_id"]
    assert one["history"][-1]["val_loss"] != two["history"][-1]["val_loss"]


@pytest.mark.parametrize("interval", [1, 2, 7, 100])
def test_how_often_it_evaluates_changes_nothing(interval):
    """The same losses to the bit with any --eval_interval, dropout or not."""
    usual = train(dropout=0.2)
    other = train(dropout=0.2, eval_interval=interval, ckpt="other.pt")
    assert_equal_weights(usual, other)
    ours = {row["iteration"]: row["val_loss"] for row in usual["history"]}
    theirs = {row["iteration"]: row["val_loss"] for row in other["history"]}
    assert [*theirs] == [*range(0, 10, interval), 10]
    assert {step: ours[step] for step in ours.keys() & theirs} == {
        step: theirs[step] for step in ours.keys() & theirs}


def test_dropout_drops_while_training():
    """--dropout isn't ignored."""
    one, two = train(dropout=0.0), train(dropout=0.5)
    assert one["history"][0] == two["history"][0] | {"seconds": one["history"][0]["seconds"]}
    assert one["history"][-1]["val_loss"] != two["history"][-1]["val_loss"]


# --------------------------------------------------------------------------- what the run leaves
def test_the_best_model_is_kept_and_the_last_state_apart(folder):
    """Which letters there are is learnt first, and helps; their order comes later, and hurts."""
    (folder / "odd.txt").write_text("defghijklmno" + "abc" * 140 + "acb" * 16)
    train(data="odd.txt", max_iters=200, eval_interval=10, learning_rate=1e-2, n_embd=32)
    best, last = stored("run.pt"), stored("run.resume.pt")
    values = {row["iteration"]: row["val_loss"] for row in last["history"]}
    assert min(values.values()) < values[200] - 0.3  # it did overfit
    assert best["best"] == last["best"] == min(values.values())
    assert 0 < best["iteration"] == min(values, key=values.get) < last["iteration"] == 200
    _, _, val, _ = gpt.load_data("odd.txt", "char")
    for path, expected in (("run.pt", best["best"]), ("run.resume.pt", values[200])):
        model = gpt.load_checkpoint(path)[0]
        assert gpt.estimate_loss(model, val, 256) == pytest.approx(expected, abs=1e-6)


def test_the_checkpoint_has_the_promised_keys():
    """Every tutorial depends on these four."""
    model, tokenizer = gpt.train(**TINY)
    content = stored("run.pt")
    assert content["model_state_dict"].keys() == model.state_dict().keys()
    config = gpt.GPTConfig(**content["hyperparameters"])
    assert (config.n_layer, config.n_embd, config.block_size) == (1, 16, 8)
    assert config.vocab_size == len(set(TEXT)) == len(content["stoi"])
    assert content["stoi"] == tokenizer.stoi == {s: i for i, s in enumerate(sorted(set(TEXT)))}
    assert content["itos"] == {i: s for s, i in content["stoi"].items()}


def test_the_run_leaves_a_table_and_a_picture(folder, monkeypatch):
    """The CSV holds the history; the PNG is a picture."""
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    history = train()["history"]
    with open("run.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_loss"]) for row in rows] == [row["val_loss"] for row in history]
    assert [int(row["iteration"]) for row in rows] == [0, 5, 10]
    assert [float(row["train_loss"]) for row in rows] == [row["train_loss"] for row in history]
    assert Path("run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {path.name for path in folder.iterdir()} == {
        "text.txt", "run.pt", "run.resume.pt", "run.csv", "run.png"}


def test_a_second_run_keeps_the_first(folder, capsys):
    """The earlier run's files get a number, and a line says so."""
    contents = []
    for seed in (1, 2, 3):
        train(seed=seed)
        contents.append({name: (folder / name).read_bytes() for name in
                         ("run.pt", "run.resume.pt", "run.csv", "run.png")})
    out = capsys.readouterr().out
    for number in (1, 2):
        for name, content in contents[number - 1].items():
            moved = name.replace("run", f"run-{number}", 1)
            assert (folder / moved).read_bytes() == content
        assert f"run-{number}" in out
    assert stored("run-1.pt")["run_id"] != stored("run-2.pt")["run_id"]
    assert stored("run-1.pt")["run_id"] == stored("run-1.resume.pt")["run_id"]
    assert {name: (folder / name).read_bytes() for name in contents[2]} == contents[2]


def test_a_file_in_the_way_of_the_number_is_kept_too(folder):
    """If any of NAME-1.* exists, all of the run become NAME-2.*."""
    (folder / "run-1.csv").write_text("mine")
    train()
    train()
    assert (folder / "run-1.csv").read_text() == "mine"
    assert (folder / "run-2.pt").exists() and not (folder / "run-1.pt").exists()


def test_the_files_of_a_run_with_a_longer_name_stay(folder):
    """model.v2.pt is another run than model.pt."""
    train(ckpt="model.v2.pt")
    train(ckpt="model.pt")
    before = {path: path.read_bytes() for path in folder.glob("model.v2.*")}
    assert len(before) == 4
    train(ckpt="model.pt", seed=2)
    assert {path: path.read_bytes() for path in folder.glob("model.v2.*")} == before


@pytest.mark.parametrize("name", ["mine", "model.v1", "text.txt", "notes.csv", "picture.png",
                                  "run[1].pt", "*.pt"])
def test_no_name_of_a_checkpoint_overwrites_anything(folder, name):
    """With or without .pt, what had that name still exists somewhere afterwards."""
    (folder / name).write_text(TEXT if name == "text.txt" else "precious", encoding="utf-8")
    before = (folder / name).read_bytes()
    for seed in (1, 2):
        kept = [path.read_bytes() for path in folder.iterdir()]
        code = gpt.main(command(TINY | {"ckpt": name, "seed": seed}))
        assert code in (0, 2)
        now = [path.read_bytes() for path in folder.iterdir()]
        assert before in now and all(content in now for content in kept)


def test_it_says_what_it_is_about_to_do(capsys):
    """Parameters, epochs and minutes before it starts; where the model is when it is done."""
    model, _ = gpt.train(**TINY)
    before, after = capsys.readouterr().out.split("step ", 1)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in before
    assert "epochs" in before and "minutes" in before and "text.txt" in before
    assert "run.pt" in after and "--sample" in after


def test_it_ends_with_a_sample(monkeypatch, at_step):
    """The reader sees the model write now and then, and at the end."""
    real, steps, made = gpt.GPTLanguageModel.stream, [], []
    for n in range(1, 11):
        at_step(n, lambda: steps.append(1))

    def stream(self, *args, **kwargs):
        made.append(len(steps))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(gpt.GPTLanguageModel, "stream", stream)
    train()
    assert made[0] == 0 and made[-1] == 10


# ------------------------------------------------------------------------------- configuration
def test_a_value_comes_from_flag_checkpoint_preset_default():
    """In this order."""
    default = gpt.TrainConfig().weight_decay
    model, config = gpt.configure({"preset": "lecture"}, {})
    assert (model.activation, config.learning_rate) == ("relu", 3e-4)  # preset before default
    assert config.weight_decay == default and config.preset == "lecture"
    model, config = gpt.configure({"preset": "lecture", "learning_rate": 1e-3, "bias": False}, {})
    assert (config.learning_rate, model.bias, model.activation) == (1e-3, False, "relu")
    saved = {"preset": "lecture", "n_layer": 2, "dropout": 0.3, "learning_rate": 5e-4}
    model, config = gpt.configure({}, saved)
    assert (model.n_layer, model.dropout, config.learning_rate) == (2, 0.3, 5e-4)
    assert model.activation == "relu" and config.preset == "lecture"
    model, config = gpt.configure({"dropout": 0.1, "max_iters": 7}, saved)
    assert (model.dropout, config.max_iters) == (0.1, 7)


@pytest.mark.parametrize("device, preset", [("cpu", "cpu"), ("cuda", "gpu"), ("mps", "gpu")])
def test_the_preset_fits_the_machine(monkeypatch, device, preset):
    """A CPU gets the small one, CUDA and MPS the baseline."""
    monkeypatch.setattr(gpt, "choose_device", lambda name: torch.device(device))
    model, config = gpt.configure({}, {})
    assert config.preset == preset and model.n_embd == (128 if preset == "cpu" else 384)


@pytest.mark.parametrize("preset", ["cpu", "laptop", "gpu", "lecture", "gpt2"])
def test_every_preset_names_real_options_only(preset):
    """A misspelt name in a preset would be ignored."""
    model, config = gpt.configure({"preset": preset}, {})
    for name, value in gpt.PRESETS[preset].items():
        assert getattr(model, name, None) == value or getattr(config, name, None) == value, name


def test_a_misspelt_option_is_not_ignored():
    """As a library: train(max_iter=5) is a mistake, and told."""
    with pytest.raises((gpt.UserError, TypeError), match="max_iter"):
        gpt.train(**TINY, max_iter=5)


# -------------------------------------------------------------------------- optional libraries
def test_compile_compiles_and_leaves_no_trace_in_the_checkpoint(monkeypatch):
    """The same training through torch.compile; no name begins with _orig_mod.

    The backend is "eager", which captures the graphs; the default one takes a minute to start.
    """
    compiled, real = [], torch.compile

    def spy(model, *args, **kwargs):
        network = real(model, *args, **{"backend": "eager", **kwargs})
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", spy)
    fast, plain = train(compile=True), train(ckpt="plain.pt")
    assert compiled and all(hasattr(network, "_orig_mod") for network in compiled)
    assert not [name for name in stored("run.pt")["model_state_dict"] if "_orig_mod" in name]
    assert_equal_weights(fast, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("when", ["at once", "at the first call"])
def test_a_compiler_that_fails_is_left_out(monkeypatch, capsys, when):
    """The run goes on without it, says why, and gives what a plain run gives."""
    def broken(model, *args, **kwargs):
        def call(*args, **kwargs):
            raise RuntimeError("no C++ compiler here")
        return call if when == "at the first call" else call()

    plain = train(ckpt="plain.pt")
    monkeypatch.setattr(torch, "compile", broken)
    run = train(compile=True)
    assert "no C++ compiler here" in capsys.readouterr().out
    assert_equal_weights(run, plain)


def test_wandb_gets_the_losses(folder, monkeypatch):
    """The real package, in its offline mode: every evaluation is in its file."""
    wandb = pytest.importorskip("wandb")
    for name, value in dict(MODE="offline", DIR=str(folder), SILENT="true", CONSOLE="off",
                            CACHE_DIR=str(folder), CONFIG_DIR=str(folder)).items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    history = train(wandb="mine-to-test")["history"]
    wandb.finish()
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    losses = [str(row[name]).encode() for row in history for name in ("train_loss", "val_loss")]
    for _ in range(100):  # its service writes the file in its own time
        content = path.read_bytes()  # protocol buffers: text stands in it as it is
        if all(text in content for text in (b"mine-to-test", *losses)):
            return
        time.sleep(0.1)
    pytest.fail(f"{len(content)} bytes without the losses")


@pytest.mark.parametrize("library, flags", [("wandb", {"wandb": "tests"}), ("tqdm", {}),
                                            ("matplotlib", {}), ("matplotlib.figure", {})])
def test_a_missing_library_costs_at_most_what_it_does(monkeypatch, capsys, library, flags):
    """It works without, or says what to install; a model that was trained is not lost."""
    monkeypatch.setitem(sys.modules, library, None)
    code = gpt.main(command(TINY | flags))
    err = capsys.readouterr().err
    assert code == 0 or code == 2 and "pip install" in err and len(err.splitlines()) == 1
    assert code == 2 or library != "wandb"
    if library.startswith("matplotlib"):
        assert stored("run.pt")["best"] > 0 and stored("run.resume.pt")["iteration"] == 10


# --------------------------------------------------------------------------------- bad numbers
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run(monkeypatch, capsys, at_step, precision, value):
    """With advice and exit code 2; the last good model still opens."""
    at_step(7, lambda: scale_the_loss(monkeypatch, value))
    assert gpt.main(command(TINY | {"precision": precision, "max_iters": 60})) == 2
    err = capsys.readouterr().err
    assert "learning_rate" in err and "Traceback" not in err and len(err.splitlines()) == 1
    for path in ("run.pt", "run.resume.pt"):
        model, _, rest = gpt.load_checkpoint(path)
        assert rest["iteration"] < 60 and math.isfinite(rest["best"])
        assert all(weight.isfinite().all() for weight in model.parameters())
    monkeypatch.undo()
    monkeypatch.chdir(Path("text.txt").resolve().parent)


@pytest.mark.parametrize("flags", [{"learning_rate": 1e5}, {"learning_rate": 1e8},
                                   {"optimizer": "muon", "learning_rate": 1e8},
                                   {"weight_decay": 1e8}])
def test_an_absurd_rate_never_replaces_the_best_model(capsys, flags):
    """Whether the numbers overflow or only make no sense, what is kept opens and is the best."""
    assert gpt.main(command(TINY | flags)) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
    for path in ("run.pt", "run.resume.pt"):
        model, _, rest = gpt.load_checkpoint(path)
        assert rest["best"] < 2.7 and all(p.isfinite().all() for p in model.parameters())


def test_no_memory_is_told_with_the_flags_to_change(capsys):
    """Before anything is written."""
    assert gpt.main(command(TINY | {"batch_size": 10**12})) == 2
    err = capsys.readouterr().err
    assert "--batch_size" in err and "Traceback" not in err and not list(Path().glob("run*"))
