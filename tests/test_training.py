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
from conftest import RUN, TEXT, as_flags, stored, tokens
from torch.nn.utils import parameters_to_vector

import gpt

FILES = {"run.pt", "run.resume.pt", "run.csv", "run.png"}

@pytest.fixture(autouse=True)
def quick(folder, no_picture):
    """Work in an empty folder, without a picture of the losses."""

def weights(name="run.resume.pt"):
    return torch.cat([tensor.flatten() for tensor in stored(name)["model_state_dict"].values()])

def table():
    with open("run.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))

def command(**flags):
    """The exit code of `python gpt.py --train` with the options of RUN and these."""
    return gpt.main(["--train", *as_flags(RUN | flags)])


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

    def compile_without_compiler(model):
        networks.append(real(model, backend="eager"))
        return networks[0]
    monkeypatch.setattr(torch, "compile", compile_without_compiler)
    gpt.train(**RUN | dict(ckpt="plain.pt"))
    gpt.train(**RUN, compile=True)
    assert len(networks) == 1
    torch.testing.assert_close(stored()["model_state_dict"],
                               stored("plain.resume.pt")["model_state_dict"], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("max_tokens, every", [(1000, 1), (88, 4)])
def test_estimate_loss_is_the_mean_over_sequences_spread_over_the_data(
        make_model, max_tokens, every):
    model, data, losses = make_model(dropout=0.5), tokens(333), []
    for start in range(0, 325, 8 * every):  # of the 328 tokens at most max_tokens
        x, y = data[start : start + 8], data[start + 1 : start + 9]
        losses.append(model(x[None], y[None])[1].item())
    mean = sum(losses) / len(losses)
    assert gpt.estimate_loss(model.train(), data, max_tokens) == pytest.approx(mean, abs=1e-5)
    assert model.training


# ------------------------------------------------------------------------------- what it returns
def test_it_returns_the_best_model_not_the_last(monkeypatch):
    """ckpt has the model with the lowest validation loss, the resume file the last one."""
    losses = iter([3.0, 3.0, 1.0, 1.0, 0.5, 2.0])  # training and validation at steps 0, 3 and 6
    monkeypatch.setattr(gpt, "estimate_loss", lambda *args, **options: next(losses))
    model, tokenizer = gpt.train(**RUN)
    assert stored("run.pt")["iteration"] == 3
    assert stored()["iteration"] == 6
    assert torch.equal(parameters_to_vector(model.state_dict().values()), weights("run.pt"))
    assert not torch.equal(weights(), weights("run.pt"))
    assert not model.training
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"

def test_the_run_shows_its_losses_and_samples(capsys):
    gpt.train(**RUN)
    out = capsys.readouterr().out
    for row in stored()["history"]:
        assert f"{row['train_loss']:.4f}" in out
        assert f"{row['val_loss']:.4f}" in out
    model, tokenizer, _ = gpt.load_checkpoint("run.resume.pt")
    text = tokenizer.decode(model.generate(tokenizer.encode(TEXT[:1]), 100, seed=1)[0])
    assert text.strip() in out
    assert "--sample --ckpt run.pt" in out


# --------------------------------------------------------------------------------- what it writes
def test_a_run_writes_four_files(folder, monkeypatch):
    """With a real picture."""
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    gpt.train(**RUN)
    assert {path.name for path in folder.iterdir()} == FILES | {"text.txt"}
    assert Path("run.png").read_bytes().startswith(b"\x89PNG\r\n")
    rows = table()
    assert list(rows[0]) == ["iteration", "train_loss", "val_loss", "tokens", "seconds"]
    assert [row["iteration"] for row in rows] == ["0", "3", "6"]
    assert [row["tokens"] for row in rows] == ["0", "192", "384"]  # a step has 4 sequences of 16
    for row, kept in zip(rows, stored()["history"], strict=True):
        assert {name: float(value) for name, value in row.items()} == kept

@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_that_exists_already_is_never_overwritten(folder, capsys, name):
    """It may be the training text itself, poems.csv with --ckpt poems.pt. Nothing is touched."""
    (folder / name).write_text(TEXT, encoding="utf-8")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert command(data=name) == 2
    error = capsys.readouterr().err
    assert name in error and "--resume" in error and "--ckpt" in error
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

def test_folders_are_created_and_the_home_folder_is_known(folder, monkeypatch):
    """A Path is as good as a string."""
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    flags = RUN | dict(max_iters=1)
    gpt.train(**flags | dict(ckpt="~/new/folder/run.pt"))
    assert {path.name for path in (folder / "new/folder").iterdir()} == FILES
    gpt.train(**flags | dict(init_from=Path("~/new/folder/run.pt"), data=Path("~/text.txt"),
                             ckpt=Path("same.pt"), max_iters=0))
    assert torch.equal(weights("same.pt"), weights("new/folder/run.pt"))

def test_a_picture_that_cannot_be_drawn_does_not_end_a_run(monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **options: 1 / 0)
    gpt.train(**RUN)
    assert len(table()) == 3


# --------------------------------------------------------------------------------- when it stops
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_signal_handlers_come_back(before_step, number):
    """However the run ends: Ctrl-C in a notebook works as before."""
    mine = lambda *args: None  # noqa: E731
    old = signal.signal(number, mine)
    try:
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
    before_step(lambda step, model: os.kill(os.getpid(), signal.SIGHUP))
    gpt.train(**RUN)
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
    error = capsys.readouterr().err
    assert "--learning_rate" in error and "Traceback" not in error
    assert stored("run.pt")["iteration"] == stored()["iteration"] == 3
    assert weights().isfinite().all()


# ------------------------------------------------------------------------------------ its options
def test_a_flag_beats_the_checkpoint_which_beats_the_preset_which_beats_the_default():
    known = asdict(gpt.GPTConfig(n_layer=2, n_embd=36)) | dict(preset="lecture", batch_size=7)
    config = gpt.configure(dict(batch_size=9), known, resuming=True)
    assert config.batch_size == 9  # the flag
    assert config.n_embd == 36  # the checkpoint
    assert config.learning_rate == 3e-4  # the preset
    assert config.gradient_accumulation_steps == 1  # the default
    assert gpt.configure({}, {}, False) == gpt.TrainConfig(**gpt.PRESETS["auto"])

@pytest.mark.parametrize("preset", sorted(gpt.PRESETS))
def test_every_preset_names_options_that_exist(preset):
    config = gpt.configure(dict(preset=preset), {}, False)  # otherwise a TypeError
    assert config.n_embd % (2 * config.n_head) == 0

@pytest.mark.parametrize("flags, words", [
    (dict(block_size=300), "too short"), (dict(data="none.txt"), "none"),
    (dict(n_embd=18, n_head=6), "--n_embd"), (dict(resume=True), "run.resume.pt"),
    (dict(init_from="gpt2"), "python notes/gpt2.py import gpt2 gpt2.pt"),
    (dict(device="tpu"), "--device tpu is not available"),
    (dict(ckpt="run.csv"), "must end in .pt")])
def test_a_mistake_gets_one_message_and_leaves_no_file(folder, capsys, flags, words):
    before = set(folder.iterdir())
    assert command(**flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpt.py: ") and words in error and "Traceback" not in error
    assert set(folder.iterdir()) == before
