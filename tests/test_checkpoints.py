"""Section 5 of gpt.py: checkpoints. Saving is atomic, opening is safe, resuming is exact."""

import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT, TINY

import gpt

# A run with everything that a resumed run has to draw again, or to remember.
RUN = TINY | dict(data="text.txt", ckpt="run.pt", device="cpu", precision="fp32", dropout=0.2,
                  gradient_accumulation_steps=2, warmup_iters=2, schedule="cosine")


@pytest.fixture(autouse=True)
def quick(folder, monkeypatch):
    """Work in an empty folder. Do not draw the losses: that takes most of a tiny run's time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **options: None)


def stored(name="run.resume.pt"):
    """What a file holds, read without gpt.py."""
    return torch.load(name, weights_only=True)


def assert_equal(one, other, path=""):
    """Two stored values are equal, tensors to the bit; only the names and the clock may differ."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        for key in (one.keys() | other.keys()) - {"seconds", "ckpt", "resume", "max_iters"}:
            assert_equal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{path}/{i}")
    else:
        assert one == other, path


def assert_same_run(one, other):
    """Both files of two runs: weights, optimizers, losses, options."""
    for end in (".pt", ".resume.pt"):
        assert_equal(stored(one + end), stored(other + end))


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): call the action at the end of step n, as if something happened there."""
    def plan(n, action):
        real = gpt.training_step

        def step_and_act(step, *args):
            loss = real(step, *args)
            if step == n:
                action()
            return loss
        monkeypatch.setattr(gpt, "training_step", step_and_act)
    return plan


def send(number):
    return lambda: os.kill(os.getpid(), number)


# ------------------------------------------------------------------------------ exact resumption
@pytest.mark.parametrize("optimizer, name, step", [
    ("adamw", "SIGTERM", 3), ("muon", "SIGINT", 4), ("muon", "SIGHUP", 0), ("muon", "SIGTERM", 2)])
def test_a_stopped_run_loses_no_step_and_continues_to_the_bit(at_step, optimizer, name, step):
    if not hasattr(signal, name):
        pytest.skip(f"this system has no {name}")
    number = getattr(signal, name)
    gpt.train(**RUN | dict(optimizer=optimizer, ckpt="whole.pt"))
    at_step(step, send(number))
    with pytest.raises(KeyboardInterrupt) as stopped:
        gpt.train(**RUN, optimizer=optimizer)
    assert stopped.value.args == (number,)
    assert stored()["iteration"] == step + 1
    gpt.train(ckpt="run.pt", resume=True)
    assert_same_run("whole", "run")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_continues_from_its_last_evaluation(at_step, optimizer):
    """kill -9: no handler runs. What the evaluation at step 3 saved is enough."""
    gpt.train(**RUN | dict(optimizer=optimizer, ckpt="whole.pt"))
    child = os.fork()
    if child == 0:
        at_step(4, send(signal.SIGKILL))
        gpt.train(**RUN, optimizer=optimizer)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert stored()["iteration"] == 3
    gpt.train(ckpt="run.pt", resume=True)
    assert_same_run("whole", "run")


def test_a_run_can_be_stopped_many_times(at_step):
    gpt.train(**RUN | dict(ckpt="whole.pt"))
    for step in range(5):
        at_step(step, send(signal.SIGTERM))
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
    gpt.train(**RUN | dict(ckpt="whole.pt"))
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        gpt.train(**RUN)
    assert len(written) == 3 and not list(Path().glob("*.tmp"))  # two at step 0, one at step 1
    monkeypatch.setattr(torch, "save", real)
    gpt.train(ckpt="run.pt", resume=True)
    assert_same_run("whole", "run")


def test_resume_can_raise_max_iters():
    """With a constant learning rate it is the run that had more steps from the start."""
    flags = RUN | dict(schedule="constant")
    gpt.train(**flags | dict(ckpt="whole.pt", max_iters=9))
    gpt.train(**flags)
    gpt.train(ckpt="run.pt", resume=True, max_iters=9)
    assert_same_run("whole", "run")
    gpt.train(ckpt="run.pt", resume=True)  # nothing is left to do
    gpt.train(ckpt="run.pt", resume=True, max_iters=5)  # and that was done long ago
    assert_equal(stored("whole.pt"), stored("run.pt"))
    assert_equal(stored("whole.resume.pt")["model_state_dict"], stored()["model_state_dict"])


@pytest.mark.parametrize("before, after", [("fp32", "fp16"), ("fp16", "fp32"), ("fp16", "fp16"),
                                           ("bf16", "fp16")])
def test_resume_with_another_precision(at_step, before, after):
    """Today a GPU with bf16, tomorrow one without. Only fp16 has a scaler, whose state is saved."""
    at_step(3, send(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        gpt.train(**RUN | dict(precision=before))
    assert bool(stored()["states"][-1]) == (before == "fp16")
    gpt.train(ckpt="run.pt", resume=True, precision=after)
    end = stored()
    assert end["iteration"] == 6 and end["train_config"]["precision"] == after
    scaled_steps = {"fp32": None, "fp16": 6 if before == "fp16" else 2}  # 4 before, 2 after
    assert end["states"][-1].get("_growth_tracker") == scaled_steps[after]
    assert end["history"][-1]["val_loss"] < end["history"][0]["val_loss"] - 0.05


@pytest.mark.parametrize("flags", [
    dict(n_layer=2), dict(n_embd=32), dict(n_head=4), dict(block_size=8), dict(bias=True),
    dict(positions="learned"), dict(tie_weights=True), dict(activation="gelu"),
    dict(qk_norm=False), dict(optimizer="adamw")])
def test_resume_refuses_another_architecture_or_optimizer(folder, flags):
    """Also: it touches no file."""
    gpt.train(**RUN | dict(max_iters=0))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    name, value = list(flags.items())[0]
    with pytest.raises(gpt.UserError, match=f"--{name} {value} contradicts the checkpoint"):
        gpt.train(ckpt="run.pt", resume=True, **flags)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


# ------------------------------------------------------------------------------- another start
@pytest.fixture
def start(make_model):
    """start.pt: a model with a context of 16 and random weights; returns it."""
    def save(**config):
        tokenizer = gpt.CharTokenizer({s: i for i, s in enumerate(sorted(set(TEXT)))})
        model = make_model(torch.float32, block_size=16, vocab_size=tokenizer.vocab_size, **config)
        gpt.save_checkpoint("start.pt", model, tokenizer)
        return model
    return save


@pytest.mark.parametrize("block_size", [16, 8])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_init_from_starts_with_the_weights_and_a_shorter_context(start, positions, block_size):
    """For T positions the model computes what it did before. Learned positions are cut."""
    old = start(positions=positions, dropout=0.3)
    new, _ = gpt.train(init_from="start.pt", ckpt="tuned.pt", data="text.txt", max_iters=0,
                       batch_size=4, block_size=block_size)
    assert new.config.block_size == block_size and new.config.dropout == 0.3
    if positions == "learned":
        assert new.position_embedding.weight.shape == (block_size, 16)
    idx = torch.randint(old.config.vocab_size, (2, block_size))
    assert torch.equal(new(idx)[0], old(idx)[0])


def test_init_from_trains_with_options_of_its_own(start):
    old = start()
    gpt.train(init_from="start.pt", ckpt="tuned.pt", data="text.txt", max_iters=3, eval_interval=3,
              batch_size=4, dropout=0.1, learning_rate=1e-3)
    end = stored("tuned.resume.pt")
    assert end["iteration"] == 3 and end["hyperparameters"]["dropout"] == 0.1
    assert end["history"][-1]["val_loss"] < end["history"][0]["val_loss"]
    assert not torch.equal(end["model_state_dict"]["lm_head.weight"], old.lm_head.weight)


@pytest.mark.parametrize("flags", [dict(block_size=32), dict(n_layer=3), dict(positions="learned")])
def test_init_from_refuses_what_the_weights_cannot_do(start, flags):
    start()
    name, value = list(flags.items())[0]
    with pytest.raises(gpt.UserError, match=f"--{name} {value} contradicts the checkpoint"):
        gpt.train(init_from="start.pt", ckpt="tuned.pt", data="text.txt", **flags)
    assert not Path("tuned.pt").exists()


# ---------------------------------------------------------------------------------------- saving
def test_an_error_while_writing_leaves_the_old_file_whole(start, monkeypatch):
    model = start()
    before = Path("start.pt").read_bytes()

    def half(content, file):
        file.write(before[: len(before) // 2])
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        gpt.save_checkpoint("start.pt", model, gpt.CharTokenizer({"a": 0}))
    assert Path("start.pt").read_bytes() == before


def test_a_checkpoint_has_the_names_that_tutorials_depend_on(start):
    model = start()
    gpt.save_checkpoint("start.pt", model, gpt.CharTokenizer({"a": 0, "b": 1}), iteration=3)
    content = stored("start.pt")
    assert content["stoi"] == {"a": 0, "b": 1} and content["itos"] == {0: "a", 1: "b"}
    assert gpt.GPTConfig(**content["hyperparameters"]) == model.config
    assert_equal(content["model_state_dict"], dict(model.state_dict()))
    assert content["iteration"] == 3 and len(content) == 5


# --------------------------------------------------------------------------------------- opening
def test_a_loaded_model_is_ready_to_use(start):
    """In evaluation mode: two calls give the same logits."""
    start(dropout=0.5)
    model, tokenizer, rest = gpt.load_checkpoint("start.pt")
    idx = torch.tensor([tokenizer.encode("the cat")])
    assert torch.equal(model(idx)[0], model(idx)[0])
    assert tokenizer.decode(idx[0]) == "the cat" and rest["stoi"] == tokenizer.stoi


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


def change(**changes):
    """A change of the content of a checkpoint."""
    return lambda content: content | changes


DAMAGE = {
    "a command": lambda content: Command(),
    "a command among the weights": lambda content: content | dict(model_state_dict=Command()),
    "a list": lambda content: [1, 2],
    "no weights": change(model_state_dict={}),
    "another size": lambda content: content | dict(
        hyperparameters=content["hyperparameters"] | dict(n_embd=32)),
    "an unknown option": lambda content: content | dict(
        hyperparameters=content["hyperparameters"] | dict(telepathy=1)),
    "no vocabulary": lambda content: {k: v for k, v in content.items() if k != "stoi"},
    "a truncated file": lambda content: None,
    "an empty file": b"",
    "a text": TEXT.encode(),
    "a pickle": pickle.dumps(Command()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_no_checkpoint_gets_one_message(start, folder, capsys, damage):
    """Exit code 2, and nothing in the file is executed."""
    start()
    whole, new = Path("start.pt").read_bytes(), DAMAGE[damage]
    if isinstance(new, bytes):
        Path("start.pt").write_bytes(new)
    elif new(stored("start.pt")) is None:
        Path("start.pt").write_bytes(whole[: len(whole) // 2])
    else:
        torch.save(new(stored("start.pt")), "start.pt")
    capsys.readouterr()
    assert gpt.main("--sample --ckpt start.pt --device cpu".split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("gpt.py: start.pt cannot be opened as a checkpoint") and not out
    assert err.count("gpt.py: ") == 1 and "Traceback" not in err
    assert not (folder / "executed").exists()


# ------------------------------------------------------------------------------- what is shipped
SHAKESPEARE = [ROOT / "tinyshakespeare.txt", ROOT.parent / "shared/data/tinyshakespeare.txt"]


@pytest.mark.parametrize("name, texts, loss", [
    ("gpt_checkpoint.pt", [ROOT / "input.txt"], 1.3478), ("shakespeare.pt", SHAKESPEARE, 1.4199)])
def test_the_shipped_models_have_the_stated_losses(name, texts, loss):
    """Over the whole validation split. Tiny Shakespeare is not in the repository."""
    text = next((path for path in texts if path.exists()), None)
    model, tokenizer, _ = gpt.load_checkpoint(ROOT / "checkpoints" / name)
    if text is None:
        pytest.skip("tinyshakespeare.txt is not here")
    _, _, val_data = gpt.load_data(text, tokenizer)
    assert gpt.estimate_loss(model, val_data) == pytest.approx(loss, abs=1e-4)
