"""Section 5 of gpt.py: `train`. What it starts from, what it writes, when it stops."""

import csv
import math
import os
import signal
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import TEXT, TINY, as_flags

import gpt

RUN = TINY | dict(data="text.txt", ckpt="run.pt", device="cpu", precision="fp32")
FILES = {"run.pt", "run.resume.pt", "run.csv", "run.png"}


@pytest.fixture(autouse=True)
def quick(folder, monkeypatch):
    """Work in an empty folder, with a quick picture of the losses."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda self, path, **options: Path(path).write_bytes(b"picture"))


def stored(name="run.resume.pt"):
    """What a file holds, read without gpt.py."""
    return torch.load(name, weights_only=True)


def weights(name="run.resume.pt"):
    return torch.cat([tensor.flatten() for tensor in stored(name)["model_state_dict"].values()])


def table(name="run.csv"):
    with open(name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def command(**flags):
    """The exit code of `python gpt.py --train` with the options of RUN and these."""
    return gpt.main(["--train", *as_flags(RUN | flags)])


@pytest.fixture
def before_step(monkeypatch):
    """before_step(action): call action(step, model) before every training step."""
    real = gpt.training_step

    def plan(action):
        def act_and_step(step, model, *args):
            action(step, model)
            return real(step, model, *args)
        monkeypatch.setattr(gpt, "training_step", act_and_step)
    return plan


# ---------------------------------------------------------------------------------- the training
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls_from_that_of_a_guess(optimizer):
    """Also with dropout, and with Head instead of the fused kernel."""
    gpt.train(**RUN | dict(optimizer=optimizer, max_iters=80, eval_interval=80, batch_size=16,
                           learning_rate=2e-2, dropout=0.05, attention="explicit"))
    first, last = stored()["history"]
    guess = math.log(len(set(TEXT)))
    assert first["train_loss"] == pytest.approx(guess, abs=1e-4)
    assert first["val_loss"] == pytest.approx(guess, abs=1e-4)
    assert max(last["train_loss"], last["val_loss"]) < 1.4


def test_a_seed_repeats_a_run():
    """To the bit, with dropout, whatever was drawn before. Another seed is another run."""
    for ckpt, seed in [("one.pt", 1), ("same.pt", 1), ("other.pt", 2)]:
        gpt.train(**RUN | dict(ckpt=ckpt, seed=seed, dropout=0.2))
        torch.rand(3)
    assert torch.equal(weights("one.resume.pt"), weights("same.resume.pt"))
    assert not torch.equal(weights("one.resume.pt"), weights("other.resume.pt"))


@pytest.mark.parametrize("interval", [1, 4, 100])
def test_evaluation_does_not_change_the_training(interval):
    gpt.train(**RUN | dict(ckpt="usual.pt", dropout=0.2))
    gpt.train(**RUN | dict(dropout=0.2, eval_interval=interval))
    assert torch.equal(weights(), weights("usual.resume.pt"))
    evaluated = [row["iteration"] for row in stored()["history"]]
    assert evaluated == sorted({*range(0, 6, interval), 6})


def test_dropout_is_used_and_is_off_during_evaluation(monkeypatch):
    seen = set()
    real = torch.nn.functional.dropout

    def spy(x, p, training, inplace=False):
        seen.add((p, training, torch.is_grad_enabled()))
        return real(x, p, training, inplace)
    monkeypatch.setattr(torch.nn.functional, "dropout", spy)
    gpt.train(**RUN, dropout=0.2)
    assert seen == {(0.2, True, True), (0.2, False, False)}


def test_compile_trains_the_same_weights(monkeypatch):
    """The names in the files do not change. "eager" is a backend that needs no C++ compiler."""
    networks, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: networks.append(
        real(model, backend="eager")) or networks[0])
    gpt.train(**RUN | dict(ckpt="plain.pt"))
    gpt.train(**RUN, compile=True)
    plain = stored("plain.pt")["model_state_dict"]
    assert networks and stored()["model_state_dict"].keys() == plain.keys()
    torch.testing.assert_close(weights(), weights("plain.resume.pt"), rtol=1e-4, atol=1e-5)


def test_estimate_loss_is_the_mean_over_sequences_spread_over_the_data(make_model):
    model = make_model(block_size=8, dropout=0.5).train()
    data = torch.randint(13, (333,))
    starts = list(range(0, 325, 8))
    losses = []
    for start in starts:
        x, y = data[start : start + 8], data[start + 1 : start + 9]
        log_probabilities = model.eval()(x[None])[0][0].log_softmax(dim=-1)
        losses.append(-log_probabilities[range(8), y].mean().item())
    model.train()
    mean = sum(losses) / len(losses)
    assert gpt.estimate_loss(model, data) == pytest.approx(mean, abs=1e-5)
    some = losses[::4]  # at most 88 of the 328 tokens
    assert gpt.estimate_loss(model, data, 88) == pytest.approx(sum(some) / len(some), abs=1e-5)
    assert model.training


# ------------------------------------------------------------------------------- what it returns
def test_it_returns_the_best_model_not_the_last(monkeypatch):
    """ckpt has the model with the lowest validation loss, the resume file the last one."""
    losses = iter([3.0, 3.0, 1.0, 1.0, 0.5, 2.0])  # training and validation at steps 0, 3 and 6
    monkeypatch.setattr(gpt, "estimate_loss", lambda *args, **options: next(losses))
    model, tokenizer = gpt.train(**RUN)
    assert stored("run.pt")["iteration"] == 3 and stored()["iteration"] == 6
    returned = torch.cat([tensor.flatten() for tensor in model.state_dict().values()])
    assert torch.equal(returned, weights("run.pt")) and not torch.equal(returned, weights())
    assert not model.training and tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


def test_the_run_shows_its_losses_and_samples(capsys):
    gpt.train(**RUN)
    out, history = capsys.readouterr().out, stored()["history"]
    for row in history:
        assert f"{row['train_loss']:.4f}" in out and f"{row['val_loss']:.4f}" in out
    model, tokenizer, _ = gpt.load_checkpoint("run.resume.pt")
    _, data, _ = gpt.load_data("text.txt", tokenizer)
    text = tokenizer.decode(model.generate(data[:1], 100, seed=1)[0])
    assert text.strip() in out
    assert "--sample --ckpt run.pt" in out


# --------------------------------------------------------------------------------- what it writes
def test_a_run_writes_four_files(folder, monkeypatch):
    """With a real picture, whatever the name: matplotlib reads $...$ as mathematics."""
    monkeypatch.undo()
    os.chdir(folder)
    gpt.train(**RUN | dict(ckpt="cost$x_1^{$.pt"))
    names = {name.replace("run", "cost$x_1^{$") for name in FILES}
    assert {path.name for path in folder.iterdir()} == {*names, "text.txt"}
    assert Path("cost$x_1^{$.png").read_bytes().startswith(b"\x89PNG\r\n")
    rows = table("cost$x_1^{$.csv")
    assert list(rows[0]) == ["iteration", "train_loss", "val_loss", "tokens", "seconds"]
    assert [(int(row["iteration"]), int(row["tokens"])) for row in rows] == [
        (0, 0), (3, 3 * 4 * 16), (6, 6 * 4 * 16)]
    for row, kept in zip(rows, stored("cost$x_1^{$.resume.pt")["history"], strict=True):
        assert {name: float(value) for name, value in row.items()} == kept


def test_the_table_exists_from_the_first_evaluation_on(before_step):
    rows = []
    before_step(lambda step, model: rows.append(len(table())))
    gpt.train(**RUN)
    assert rows == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_that_exists_already_is_never_overwritten(folder, capsys, name):
    """It may be the training text itself, poems.csv with --ckpt poems.pt. Nothing is touched."""
    (folder / name).write_text(TEXT, encoding="utf-8")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert command(data=name) == 2
    err = capsys.readouterr().err
    assert name in err and "--resume" in err and "--ckpt" in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_folders_are_created_and_the_home_folder_is_known(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("USERPROFILE", str(folder / "home"))
    flags = RUN | dict(max_iters=1)
    gpt.train(**flags | dict(ckpt="new/folder/run.pt"))
    assert {path.name for path in (folder / "new/folder").iterdir()} == FILES
    gpt.train(**flags | dict(ckpt="~/run.pt"))
    assert {path.name for path in (folder / "home").iterdir()} == FILES
    (folder / "home/text.txt").write_text(TEXT, encoding="utf-8")
    flags = dict(init_from=Path("~/run.pt"), ckpt=Path("same.pt"), data=Path("~/text.txt"))
    gpt.train(**flags, max_iters=0)  # a Path is as good as a string
    assert torch.equal(weights("same.pt"), weights(folder / "home/run.pt"))


def test_a_folder_where_nothing_can_be_written_fails_before_the_first_step(
        monkeypatch, capsys, before_step):
    assert command(max_iters=1) == 0
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    before_step(lambda step, model: pytest.fail("a step was made"))
    for flags in (dict(resume=True), dict(ckpt="folder/run.pt")):
        assert command(**flags) == 2
        assert "can be written" in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_does_not_end_a_run(monkeypatch):
    def fail(*args, **options):
        raise ValueError("mathematics")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    gpt.train(**RUN)
    assert len(table()) == 3


# --------------------------------------------------------------------------------- when it stops
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_signal_handlers_come_back(before_step, name):
    """However the run ends: Ctrl-C in a notebook works as before."""
    number = getattr(signal, name, signal.SIGINT)
    mine = lambda *args: None  # noqa: E731
    old = signal.signal(number, mine)
    try:
        gpt.train(**RUN | dict(ckpt="finished.pt"))
        assert signal.getsignal(number) is mine
        before_step(lambda step, model: os.kill(os.getpid(), number))
        with pytest.raises(KeyboardInterrupt):
            gpt.train(**RUN | dict(ckpt="stopped.pt"))
        assert signal.getsignal(number) is mine
        before_step(lambda step, model: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gpt.train(**RUN)
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, old)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_an_ignored_sighup_stays_ignored(before_step):
    """nohup: the terminal goes away, the run does not."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before_step(lambda step, model: os.kill(os.getpid(), signal.SIGHUP))
        gpt.train(**RUN)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)
    assert stored()["iteration"] == 6


def test_a_terminal_that_went_away_does_not_end_a_run(monkeypatch):
    def closed(*args, **options):
        raise OSError(5, "Input/output error")
    monkeypatch.setattr(gpt.tqdm, "write", closed)
    gpt.train(**RUN)
    assert stored()["iteration"] == 6


def test_it_trains_in_a_thread():
    """A web application: Python allows signal handlers in the main thread only."""
    thread = threading.Thread(target=lambda: gpt.train(**RUN))
    thread.start()
    thread.join()
    assert stored()["iteration"] == 6


def test_weights_that_are_not_numbers_end_the_run(before_step, capsys):
    """With one message. The files are those of the last evaluation, and good."""
    def poison(step, model):
        if step == 4:
            model.lm_head.weight.data[0, 0] = float("nan")
    before_step(poison)
    assert command() == 2
    err = capsys.readouterr().err
    assert "--learning_rate" in err and "Traceback" not in err
    assert stored("run.pt")["iteration"] == stored()["iteration"] == 3 and len(table()) == 2
    assert weights().isfinite().all()
    assert command(resume=True) == 2  # once more, from there


# ------------------------------------------------------------------------------------ its options
def test_a_flag_beats_the_checkpoint_which_beats_the_preset_which_beats_the_default():
    config = gpt.configure({}, {}, False)
    assert config == gpt.TrainConfig(**gpt.PRESETS["auto"])
    config = gpt.configure(dict(preset="lecture", learning_rate=1e-3), {}, False)
    assert (config.activation, config.learning_rate) == ("relu", 1e-3)
    assert config.gradient_accumulation_steps == gpt.TrainConfig.gradient_accumulation_steps
    known = asdict(gpt.GPTConfig(n_layer=2, n_embd=36)) | dict(preset="lecture", batch_size=7)
    config = gpt.configure(dict(batch_size=9), known, True)
    assert (config.n_layer, config.n_embd, config.batch_size) == (2, 36, 9)
    assert (config.activation, config.learning_rate) == ("relu2", 3e-4)


@pytest.mark.parametrize("preset", sorted(gpt.PRESETS))
def test_every_preset_names_options_that_exist(preset):
    config = gpt.configure(dict(preset=preset), {}, False)  # otherwise a TypeError
    assert config.n_embd % (2 * config.n_head) == 0 and config.eval_interval <= config.max_iters


@pytest.mark.parametrize("flags, words", [
    (dict(block_size=300), "too short"), (dict(ckpt="run"), ".pt"), (dict(data="none.txt"), "none"),
    (dict(n_embd=18, n_head=6), "--n_embd"), (dict(n_head=16), "--n_embd"),
    (dict(resume=True), "run.resume.pt"), (dict(init_from="none.pt"), "none.pt"),
    (dict(device="tpu"), "tpu")])
def test_a_mistake_gets_one_message_and_leaves_no_file(folder, capsys, flags, words):
    before = set(folder.iterdir())
    assert command(**flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("gpt.py: ") and words in err and "Traceback" not in err
    assert set(folder.iterdir()) == before
