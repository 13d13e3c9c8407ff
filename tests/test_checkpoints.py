"""Section 5 of gpt.py: checkpoints. Saving is atomic, opening is safe, resuming is exact."""

import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, RUN, TEXT, alphabet, stored, tokens

import gpt

# A run with everything that a resumed run has to draw again, or to remember.
RUN = RUN | dict(dropout=0.2, gradient_accumulation_steps=2, warmup_iters=2, schedule="cosine")

@pytest.fixture(autouse=True)
def quick(folder, no_picture):
    """Work in an empty folder, without a picture of the losses."""

def assert_equal(one, other, path=""):
    """Two stored values are equal, tensors to the bit; only the names and the clock may differ."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        for key in (one.keys() | other.keys()) - {"seconds", "ckpt", "resume", "max_iters"}:
            assert_equal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for i in range(len(one)):
            assert_equal(one[i], other[i], f"{path}/{i}")
    else:
        assert one == other, path

def assert_same_run(one, other):
    """Both files of two runs: weights, optimizers, losses, options."""
    for end in (".pt", ".resume.pt"):
        assert_equal(stored(one + end), stored(other + end))

def signal_in_step(n, number):
    """An action for before_step: this process gets a signal during step n."""
    def act(step, model):
        if step == n:
            os.kill(os.getpid(), number)
    return act


# ------------------------------------------------------------------------------ exact resumption
@pytest.mark.parametrize("optimizer, name, step", [
    ("adamw", "SIGTERM", 3), ("muon", "SIGINT", 4), ("muon", "SIGHUP", 0)])
def test_a_stopped_run_loses_no_step_and_continues_to_the_bit(before_step, optimizer, name, step):
    number = getattr(signal, name, signal.SIGINT)  # Windows has no SIGHUP
    gpt.train(**RUN | dict(optimizer=optimizer, ckpt="whole.pt"))
    before_step(signal_in_step(step, number))
    with pytest.raises(KeyboardInterrupt) as stopped:
        gpt.train(**RUN, optimizer=optimizer)
    assert stopped.value.args == (number,)
    assert stored()["iteration"] == step + 1
    gpt.train(ckpt="run.pt", resume=True)
    assert_same_run("whole", "run")

@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_continues_from_its_last_evaluation(before_step, optimizer):
    """kill -9: no handler runs. What the evaluation at step 3 saved is enough."""
    gpt.train(**RUN | dict(optimizer=optimizer, ckpt="whole.pt"))
    child = os.fork()
    if child == 0:
        before_step(signal_in_step(4, signal.SIGKILL))
        gpt.train(**RUN, optimizer=optimizer)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert stored()["iteration"] == 3
    gpt.train(ckpt="run.pt", resume=True)
    assert_same_run("whole", "run")

def test_a_run_can_be_stopped_many_times(before_step):
    gpt.train(**RUN | dict(ckpt="whole.pt"))
    for step in range(5):
        before_step(signal_in_step(step, signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            gpt.train(**RUN, resume=step > 0)
    gpt.train(**RUN, resume=True)
    assert_same_run("whole", "run")

def test_a_signal_while_a_file_is_written_waits_until_it_is_whole(monkeypatch):
    real, written = torch.save, []

    def save(content, file):
        os.kill(os.getpid(), signal.SIGINT)
        real(content, file)
        written.append(file.name)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        gpt.train(**RUN)
    assert len(written) == 3  # two at step 0, one at step 1
    assert not list(Path().glob("*.tmp"))
    assert stored()["iteration"] == 1

def test_resume_can_raise_max_iters():
    """With a constant learning rate it is the run that had more steps from the start."""
    flags = RUN | dict(schedule="constant")
    gpt.train(**flags | dict(ckpt="whole.pt", max_iters=9))
    gpt.train(**flags)
    gpt.train(ckpt="run.pt", resume=True, max_iters=9)
    assert_same_run("whole", "run")
    gpt.train(ckpt="run.pt", resume=True, max_iters=5)  # nothing is left to do
    assert_equal(stored("whole.resume.pt")["model_state_dict"], stored()["model_state_dict"])

@pytest.mark.parametrize("before, after", [("fp32", "fp16"), ("fp16", "fp32"), ("fp16", "fp16")])
def test_resume_with_another_precision(before, after):
    """Today a GPU with bf16, tomorrow one without. Only fp16 has a scaler, whose state is saved."""
    gpt.train(**RUN | dict(precision=before, max_iters=4))
    gpt.train(ckpt="run.pt", resume=True, precision=after, max_iters=6)
    assert stored()["train_config"]["precision"] == after
    scaled_steps = {"fp32": None, "fp16": 6 if before == "fp16" else 2}
    assert stored()["states"][-1].get("_growth_tracker") == scaled_steps[after]

@pytest.mark.parametrize("flags", [
    dict(n_layer=2), dict(block_size=8), dict(positions="learned"), dict(optimizer="adamw")])
def test_resume_refuses_another_architecture_or_optimizer(folder, flags):
    """Also: it touches no file."""
    gpt.train(**RUN | dict(max_iters=0))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(gpt.UserError, match=f"--{list(flags)[0]} .* contradicts the checkpoint"):
        gpt.train(ckpt="run.pt", resume=True, **flags)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


# ------------------------------------------------------------------------------- another start
TUNE = dict(init_from="start.pt", ckpt="tuned.pt", data="text.txt", batch_size=4, device="cpu")

@pytest.fixture
def start(make_model):
    """start.pt: a model with a context of 16 and random weights; returns it."""
    def save(**config):
        tokenizer = alphabet(TEXT)
        config = dict(block_size=16, vocab_size=tokenizer.vocab_size) | config
        model = make_model(torch.float32, **config)
        gpt.save_checkpoint("start.pt", model, tokenizer)
        return model
    return save

@pytest.mark.parametrize("block_size", [16, 8])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_init_from_starts_with_the_weights_and_a_shorter_context(start, positions, block_size):
    """For T positions the model computes what it did before. Learned positions are cut."""
    old = start(positions=positions, dropout=0.3)
    new, _ = gpt.train(**TUNE, max_iters=0, block_size=block_size)
    assert new.config.block_size == block_size
    assert new.config.dropout == 0.3
    idx = tokens(2, block_size) % old.config.vocab_size
    assert torch.equal(new(idx)[0], old(idx)[0])

@pytest.mark.parametrize("flags", [dict(block_size=32), dict(n_layer=3), dict(positions="learned")])
def test_init_from_refuses_what_the_weights_cannot_do(start, flags):
    start()
    with pytest.raises(gpt.UserError, match=f"--{list(flags)[0]} .* contradicts the checkpoint"):
        gpt.train(**TUNE, **flags)


# ---------------------------------------------------------------------------------------- saving
def test_an_error_while_writing_leaves_the_old_file_whole(start, monkeypatch):
    model = start()
    before = Path("start.pt").read_bytes()

    def half(content, file):
        file.write(before[: len(before) // 2])
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        gpt.save_checkpoint("start.pt", model, alphabet("a"))
    assert Path("start.pt").read_bytes() == before

def test_a_checkpoint_has_the_names_that_tutorials_depend_on(start):
    model = start()
    gpt.save_checkpoint("start.pt", model, alphabet("ab"), iteration=3)
    content = stored("start.pt")
    assert content["stoi"] == {"a": 0, "b": 1}
    assert content["itos"] == {0: "a", 1: "b"}
    assert gpt.GPTConfig(**content["hyperparameters"]) == model.config
    assert_equal(content["model_state_dict"], dict(model.state_dict()))
    assert content["iteration"] == 3


# --------------------------------------------------------------------------------------- opening
def test_a_loaded_model_is_ready_to_use(start):
    """In evaluation mode: two calls give the same logits."""
    start(dropout=0.5)
    model, tokenizer, rest = gpt.load_checkpoint("start.pt")
    idx = torch.tensor([tokenizer.encode("the cat")])
    assert torch.equal(model(idx)[0], model(idx)[0])
    assert rest["stoi"] == tokenizer.stoi

def test_a_name_is_looked_for_here_and_then_in_checkpoints(start, capsys):
    gpt.load_checkpoint("shakespeare.pt")
    assert str(ROOT / "checkpoints") in capsys.readouterr().err
    start()
    Path("start.pt").rename("shakespeare.pt")
    assert gpt.load_checkpoint("shakespeare.pt")[0].config.block_size == 16

class Command:
    """Unpickled by a plain torch.load, it runs a command."""
    def __reduce__(self):
        return os.system, ("echo > executed",)

@pytest.mark.parametrize("changes", [
    dict(model_state_dict=Command()), dict(model_state_dict={}), dict(hyperparameters={"x": 1}),
    dict(stoi=7), "a truncated file", "a text"],
    ids=["a command", "no weights", "unknown option", "no vocabulary", "truncated", "a text"])
def test_a_file_that_is_no_checkpoint_gets_one_message(start, folder, capsys, changes):
    """Exit code 2, and nothing in the file is executed."""
    start()
    whole = Path("start.pt").read_bytes()
    if isinstance(changes, dict):
        torch.save(stored("start.pt") | changes, "start.pt")
    else:
        Path("start.pt").write_bytes(whole[:5000] if "truncated" in changes else TEXT.encode())
    capsys.readouterr()
    assert gpt.main("--sample --ckpt start.pt --device cpu".split()) == 2
    out, error = capsys.readouterr()
    assert error.startswith("gpt.py: start.pt cannot be opened as a checkpoint")
    assert not out and "Traceback" not in error
    assert not (folder / "executed").exists()


# ------------------------------------------------------------------------------- what is shipped
SHAKESPEARE = [ROOT / "tinyshakespeare.txt", ROOT.parent / "shared/data/tinyshakespeare.txt"]

@pytest.mark.parametrize("name, texts, loss", [
    ("gpt_checkpoint.pt", [ROOT / "input.txt"], 1.3478), ("shakespeare.pt", SHAKESPEARE, 1.3643)])
def test_the_shipped_models_have_the_stated_losses(name, texts, loss):
    """Over the whole validation split. Tiny Shakespeare is not in the repository."""
    text = next((path for path in texts if path.exists()), None)
    model, tokenizer, _ = gpt.load_checkpoint(ROOT / "checkpoints" / name)
    if text is None:
        pytest.skip("tinyshakespeare.txt is not here")
    _, _, val_data = gpt.load_data(text, tokenizer)
    torch.set_num_threads(os.cpu_count())  # the longest computation of all tests
    found = gpt.estimate_loss(model, val_data)
    torch.set_num_threads(1)
    assert found == pytest.approx(loss, abs=1e-4)
