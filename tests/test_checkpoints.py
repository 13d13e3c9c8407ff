"""Nothing is ever lost: what a checkpoint holds, what opens, and how a run goes on from one."""
import os
import random
import signal
import subprocess
import sys
import zipfile
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import TEXT

import gpt

TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=4, max_iters=20,
            eval_interval=5, eval_tokens=256, optimizer="adamw", learning_rate=3e-3, dropout=0.2,
            schedule="cosine", warmup_iters=4, device="cpu", precision="fp32", data="text.txt",
            ckpt="run.pt")


@pytest.fixture(autouse=True)
def folder(empty_folder, short_samples):
    """A folder of its own for every test, with a small text."""
    (empty_folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return empty_folder


def command(**flags):
    """Run a training as the command line does; returns its exit code."""
    words = [word for name, value in (TINY | flags).items() for word in (f"--{name}", str(value))]
    return gpt.main(["--train", *words])


def resume(*words, ckpt="run.pt"):
    """Go on with a run; returns the exit code."""
    return gpt.main(["--train", "--resume", "--ckpt", ckpt, *map(str, words)])


def stored(path="run.pt"):
    """What a checkpoint file holds, read without gpt.py."""
    return torch.load(path, weights_only=True)


def kill(number=signal.SIGTERM):
    """An action for at_step: send this process a signal."""
    return lambda: os.kill(os.getpid(), number)


CLOCK = {"seconds", "run_id", "ckpt", "resume", "max_iters", "eval_interval", "data", "preset"}


def difference(one, other, path="", ignored=CLOCK):
    """Where two stored states differ, to the bit; None if nowhere."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return None if same else path
    if isinstance(one, dict):
        if set(one) - ignored != set(other) - ignored:
            return f"{path}: keys {set(one) ^ set(other)}"
        pairs = [(key, one[key], other[key]) for key in one if key not in ignored]
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{path}: lengths {len(one)} and {len(other)}"
        pairs = [(i, *both) for i, both in enumerate(zip(one, other, strict=True))]
    else:
        return None if one == other and type(one) is type(other) else f"{path}: {one} {other}"
    found = (difference(a, b, f"{path}/{key}", ignored) for key, a, b in pairs)
    return next((place for place in found if place), None)


@pytest.fixture
def alphabet():
    return gpt.CharTokenizer.from_text("abc \n")


@pytest.fixture
def model(alphabet):
    return new_model(alphabet)


def new_model(alphabet, **more):
    """A small model with weights that are all different."""
    torch.manual_seed(0)
    model = gpt.GPTLanguageModel(gpt.GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8,
                                               vocab_size=alphabet.vocab_size, **more))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def assert_refused(path, *words):
    """load_checkpoint gives one sentence that names the file."""
    with pytest.raises(gpt.UserError) as error:
        gpt.load_checkpoint(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    assert all(word in message for word in words), message


# ------------------------------------------------------------------------------- going on exactly
@pytest.mark.parametrize("flags, number, n", [
    (dict(optimizer="adamw"), signal.SIGINT, 10), (dict(optimizer="muon"), signal.SIGTERM, 7),
    (dict(optimizer="muon"), signal.SIGINT, 15), (dict(optimizer="adamw"), signal.SIGTERM, 1),
    (dict(optimizer="adamw", schedule="linear"), signal.SIGINT, 13),
    (dict(optimizer="adamw", precision="fp16"), signal.SIGTERM, 12),
    (dict(optimizer="adamw", gradient_accumulation_steps=2), signal.SIGTERM, 9)])
def test_an_interrupted_run_goes_on_to_the_bit(capsys, at_step, flags, number, n):
    """Stopped at step n, at an evaluation or between two, it ends as if it never stopped."""
    assert command(**flags, ckpt="whole.pt") == 0
    at_step(n, kill(number))
    assert command(**flags) == 128 + number
    said = capsys.readouterr()
    assert "--resume" in said.out + said.err and "Traceback" not in said.err
    assert stored("run.resume.pt")["iteration"] == n  # not even a step is lost
    assert Path("run.csv").exists()
    assert resume() == 0
    assert difference(stored("whole.pt"), stored("run.pt")) is None
    assert difference(stored("whole.resume.pt"), stored("run.resume.pt")) is None
    whole, halves = (Path(f"{name}.csv").read_text().splitlines() for name in ("whole", "run"))
    assert len(whole) == len(halves) == 6


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_was_killed_goes_on_from_its_last_save(at_step, optimizer):
    """No signal handler runs when the power fails: the last evaluation's save is what counts."""
    def power_cut():
        raise ZeroDivisionError("power cut")

    assert command(optimizer=optimizer, ckpt="whole.pt") == 0
    at_step(13, power_cut)
    with pytest.raises(ZeroDivisionError):
        command(optimizer=optimizer)
    assert stored("run.resume.pt")["iteration"] == 10
    assert resume() == 0
    assert difference(stored("whole.pt"), stored("run.pt")) is None
    assert difference(stored("whole.resume.pt"), stored("run.resume.pt")) is None


def test_it_can_be_interrupted_again_and_again(at_step):
    """Five pieces make the same whole, with evaluations at other times in between."""
    assert command(ckpt="whole.pt") == 0
    at_step(3, kill())
    assert command() == 143
    for n in (4, 1, 6):
        at_step(n, kill())
        assert resume() == 143
    assert resume() == 0
    assert difference(stored("whole.resume.pt"), stored("run.resume.pt")) is None


def test_a_second_signal_stops_at_once_and_loses_nothing_saved(at_step):
    """Ctrl-C twice doesn't wait for the step; what was saved opens and goes on exactly."""
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    assert command(ckpt="whole.pt") == 0
    at_step(13, twice)
    assert command() == 130
    assert stored("run.resume.pt")["iteration"] == 10
    assert resume() == 0
    assert difference(stored("whole.resume.pt"), stored("run.resume.pt")) is None


def test_two_signals_in_the_middle_of_a_save_let_it_end(monkeypatch, capsys):
    """torch.save, torn out of its writing, aborts Python: the file is whole, then the run ends."""
    real, writes = torch.save, []

    def save(content, file):
        real(content, file)
        writes.append(file.name)
        if len(writes) == 4:  # the second save of the resume state
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    assert command(ckpt="whole.pt") == 0
    monkeypatch.setattr(torch, "save", save)
    assert command() == 130
    assert "run.resume.pt" in writes[3] and "Traceback" not in capsys.readouterr().err
    assert stored("run.resume.pt")["iteration"] in (5, 6)
    assert not list(Path().glob("*.tmp"))
    assert resume() == 0
    assert difference(stored("whole.resume.pt"), stored("run.resume.pt")) is None


def test_the_signal_handlers_come_back(at_step):
    """A notebook's Ctrl-C works as before, however the training ended."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    at_step(3, kill())
    for expected in (143, 0):
        assert command() == expected
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert command(ckpt="missing/run.pt") == 2
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_finished_run_can_go_on_with_more_steps():
    """--max_iters may grow; with a constant learning rate it equals the longer run."""
    flags = dict(schedule="constant", warmup_iters=0)
    assert command(**flags, ckpt="whole.pt") == 0
    assert command(**flags, max_iters=10) == 0
    assert resume("--max_iters", 20) == 0
    assert difference(stored("whole.resume.pt"), stored("run.resume.pt")) is None
    assert [row["iteration"] for row in stored("run.resume.pt")["history"]] == [0, 5, 10, 15, 20]


def test_resuming_a_finished_run_changes_nothing():
    """Without more steps there is nothing to do."""
    assert command() == 0
    best, last = stored("run.pt"), stored("run.resume.pt")
    assert resume() == 0
    assert difference(best, stored("run.pt")) is None
    assert difference(last, stored("run.resume.pt")) is None
    assert not list(Path().glob("run-1*"))


def test_fewer_steps_than_were_done_are_done_already():
    """--max_iters below where the run stands: nothing to do, and nothing is harmed."""
    assert command() == 0
    last = stored("run.resume.pt")
    assert resume("--max_iters", 7) in (0, 2)
    assert difference(last, stored("run.resume.pt")) is None


def test_evaluation_may_change_at_resume(at_step):
    """Another --eval_interval gives other rows and the same weights."""
    assert command(ckpt="whole.pt") == 0
    at_step(7, kill())
    assert command() == 143
    assert resume("--eval_interval", 4, "--eval_tokens", 128) == 0
    last = stored("run.resume.pt")
    assert [row["iteration"] for row in last["history"]] == [0, 5, 8, 12, 16, 20]
    weights = stored("whole.resume.pt")["model_state_dict"]
    assert difference(weights, last["model_state_dict"]) is None


def test_the_text_may_move(folder):
    """The path may change as long as the text doesn't."""
    assert command() == 0
    (folder / "text.txt").rename(folder / "moved.txt")
    assert resume("--data", "moved.txt", "--max_iters", 22) == 0


@pytest.mark.parametrize("words", [
    "--n_layer 2", "--n_embd 32", "--n_head 4", "--block_size 4", "--positions learned", "--bias",
    "--learning_rate 0.1", "--batch_size 8", "--gradient_accumulation_steps 2", "--seed 5",
    "--optimizer muon", "--schedule linear", "--weight_decay 0.5", "--warmup_iters 9",
    "--precision bf16", "--init_from run-0.pt", "--tokenizer gpt2", "--preset lecture"])
def test_resume_refuses_another_run(capsys, at_step, words):
    """What would make it another run is refused by name, and nothing is touched."""
    at_step(1, kill())
    assert command() == 143
    files = {path: path.read_bytes() for path in Path().iterdir()}
    capsys.readouterr()
    assert resume(*words.split()) == 2
    err = capsys.readouterr().err
    assert words.split()[0] in err and len(err.splitlines()) == 1
    assert {path: path.read_bytes() for path in Path().iterdir()} == files


@pytest.mark.parametrize("change", ["a letter at the start", "a letter at the end", "longer",
                                    "a new character", "gone", "letters swapped"])
def test_resume_refuses_another_text(capsys, folder, change):
    """One letter is enough."""
    assert command(max_iters=5) == 0
    text = folder / "text.txt"
    new = {"a letter at the start": "cm"[TEXT[0] == "c"] + TEXT[1:],
           "a letter at the end": TEXT[:-1] + "cm"[TEXT[-1] == "c"],
           "longer": TEXT + "the cat", "a new character": TEXT[:-1] + "é", "gone": "",
           "letters swapped": TEXT.translate(str.maketrans("ea", "ae"))}[change]
    assert new != TEXT
    text.write_text(new, encoding="utf-8")
    if change == "gone":
        text.unlink()
    before = Path("run.resume.pt").read_bytes()
    capsys.readouterr()
    assert resume("--max_iters", 10) == 2
    assert "text" in capsys.readouterr().err
    assert Path("run.resume.pt").read_bytes() == before


def test_resume_of_nothing_gets_a_sentence(capsys):
    """Which file is missing, and no new one."""
    assert resume(ckpt="never.pt") == 2
    err = capsys.readouterr().err
    assert "never" in err and len(err.splitlines()) == 1 and not list(Path().glob("never*"))


def test_a_mixed_pair_is_noticed(capsys, folder):
    """The checkpoint of one run and the resume file of another are not one run."""
    assert command(ckpt="other.pt", seed=5) == 0
    assert command(max_iters=10) == 0
    (folder / "run.pt").write_bytes((folder / "other.pt").read_bytes())
    before = (folder / "run.pt").read_bytes(), (folder / "run.resume.pt").read_bytes()
    capsys.readouterr()
    assert resume("--max_iters", 20) == 2
    assert "run.pt" in capsys.readouterr().err
    assert before == ((folder / "run.pt").read_bytes(), (folder / "run.resume.pt").read_bytes())


def test_a_missing_best_model_is_not_promised(capsys, folder):
    """If NAME.pt is gone, a resumed run either makes it again or says that it isn't there."""
    assert command(max_iters=10) == 0
    (folder / "run.pt").unlink()
    code = resume("--max_iters", 11)
    assert code == 2 or gpt.load_checkpoint("run.pt")


@pytest.mark.parametrize("second", ["fresh", "resumed"])
def test_of_two_runs_with_one_name_the_older_stops(capsys, at_step, second):
    """It says so and leaves the newer one's files as they are."""
    codes = []

    def other_run():
        codes.append(command(seed=2) if second == "fresh" else resume())
        codes.append({path.name: path.read_bytes() for path in Path().iterdir()})

    at_step(7, other_run)
    assert command(seed=1 if second == "fresh" else 2) == 2
    assert codes[0] == 0 and "run.pt" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == codes[1]
    assert stored("run.resume.pt")["iteration"] == stored("run.pt")["iteration"] == 20
    assert stored("run.pt")["run_id"] == stored("run.resume.pt")["run_id"]
    if second == "fresh":
        assert stored("run-1.pt")["run_id"] == stored("run-1.resume.pt")["run_id"]


def test_a_stop_never_saves_weights_that_are_no_numbers(monkeypatch, at_step):
    """Ctrl-C while the loss is already NaN: the state on disk is still one that goes on."""
    real = gpt.GPTLanguageModel.forward

    def forward(self, idx, targets=None, **more):
        logits, loss = real(self, idx, targets, **more)
        return logits, loss if loss is None else loss * float("nan")

    at_step(7, lambda: monkeypatch.setattr(gpt.GPTLanguageModel, "forward", forward))
    at_step(8, kill())
    assert command() in (2, 143)
    gpt.load_checkpoint("run.pt")
    gpt.load_checkpoint("run.resume.pt")
    monkeypatch.setattr(gpt.GPTLanguageModel, "forward", real)
    assert resume() == 0


# -------------------------------------------------------------------------------- writing safely
@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt, ValueError])
def test_a_write_that_fails_midway_leaves_the_old_file(folder, error):
    """All of the old or all of the new, and nothing beside it."""
    path = folder / "file.pt"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the n")
        raise error("no more")

    with pytest.raises((gpt.UserError, error)):
        gpt.write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert {file.name for file in folder.iterdir()} == {"file.pt", "text.txt"}
    gpt.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_the_old_file_is_there_until_the_new_one_is_whole(folder):
    """While the writer writes, a reader sees the old content."""
    path = folder / "file.pt"
    path.write_bytes(b"old")
    seen = []

    def write(file):
        file.write(b"new")
        seen.append(path.read_bytes())

    gpt.write_atomically(path, write)
    assert seen == [b"old"] and path.read_bytes() == b"new"


def test_a_torch_save_that_fails_leaves_the_old_checkpoint(folder, monkeypatch, model, alphabet):
    """The same through save_checkpoint."""
    gpt.save_checkpoint("file.pt", model, alphabet, steps=1)
    before = Path("file.pt").read_bytes()
    real = torch.save

    def save(content, file):
        real(content, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(gpt.UserError, match="file.pt"):
        gpt.save_checkpoint("file.pt", model, alphabet, steps=2)
    assert Path("file.pt").read_bytes() == before and len(list(folder.iterdir())) == 2


@pytest.mark.skipif(os.name == "nt", reason="needs resource limits")
def test_a_full_disk_stops_the_run_and_harms_nothing(folder, at_step):
    """With a real write error from the system: a sentence, exit code 2, the old files open."""
    at_step(7, kill())
    assert command() == 143
    sizes = [Path(name).stat().st_size for name in ("run.pt", "run.resume.pt")]
    assert sizes[0] + 2000 < sizes[1]
    names = {path.name for path in folder.iterdir()}
    last = Path("run.resume.pt").read_bytes()
    # First there is no room for the best model, then only for that one.
    program = f"""if True:
        import gpt, resource, sys
        for limit in ({sizes[0] // 2}, {sizes[0] + 1500}):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            print("code", gpt.main(["--train", "--resume", "--ckpt", "run.pt"]))
        """
    done = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(gpt.__file__).parent)})
    codes = [line for line in done.stdout.splitlines() if line.startswith("code")]
    assert codes == ["code 2", "code 2"], done.stderr
    complaints = done.stderr.strip().splitlines()
    assert len(complaints) == 2, done.stderr
    assert all("run" in line and "written" in line for line in complaints)
    assert {path.name for path in folder.iterdir()} == names
    assert Path("run.resume.pt").read_bytes() == last
    gpt.load_checkpoint("run.pt")
    assert resume() == 0


def test_a_folder_that_cannot_be_written_gets_a_sentence(capsys, folder):
    """No permission, or no such folder."""
    assert command(ckpt="missing/run.pt") == 2
    assert "missing" in capsys.readouterr().err
    (folder / "locked").mkdir(mode=0o500)
    if os.access(folder / "locked", os.W_OK):
        pytest.skip("root may write anywhere")
    assert command(ckpt="locked/run.pt") == 2
    assert "locked" in capsys.readouterr().err


def test_an_earlier_run_that_cannot_be_moved_aside_is_kept(capsys, monkeypatch):
    """Permission denied while renaming: one sentence, nothing overwritten."""
    assert command(max_iters=5) == 0
    before = Path("run.pt").read_bytes()

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, denied)
        monkeypatch.setattr(os, name, denied)
    capsys.readouterr()
    assert command(max_iters=5, seed=2) == 2
    assert "run" in capsys.readouterr().err and Path("run.pt").read_bytes() == before


# ----------------------------------------------------------------------------- what comes back
@pytest.mark.parametrize("tied", [True, False])
def test_what_was_saved_comes_back(alphabet, tied):
    """Weights to the bit, the tokenizer, and whatever else was given."""
    model = new_model(alphabet, tie_weights=tied)
    gpt.save_checkpoint("file.pt", model, alphabet, iteration=7, note="ü", history=[{"a": 1.5}])
    loaded, tokenizer, rest = gpt.load_checkpoint("file.pt")
    assert difference(dict(model.state_dict()), dict(loaded.state_dict())) is None
    assert asdict(loaded.config) == asdict(model.config) and tokenizer.stoi == alphabet.stoi
    assert (rest["iteration"], rest["note"], rest["history"]) == (7, "ü", [{"a": 1.5}])
    assert (loaded.lm_head.weight is loaded.token_embedding.weight) is tied


@pytest.mark.parametrize("name", ["file.pt", "run.pt", "run.resume.pt"])
def test_plain_torch_load_opens_it_safely(model, alphabet, name):
    """Tensors and Python's own types only."""
    command(max_iters=5)
    gpt.save_checkpoint("file.pt", model, alphabet)
    content = torch.load(name, weights_only=True, map_location="cpu")
    assert {"model_state_dict", "hyperparameters", "stoi", "itos"} <= content.keys()
    assert not [key for key in content["model_state_dict"] if "_orig_mod" in key]
    assert content["itos"] == {i: s for s, i in content["stoi"].items()}


def test_a_checkpoint_without_anything_more_can_write(capsys, model, alphabet):
    """save_checkpoint(path, model, tokenizer) makes a file that --sample takes."""
    gpt.save_checkpoint("file.pt", model, alphabet)
    assert gpt.main(["--sample", "--ckpt", "file.pt", "--max_new_tokens", "5"]) == 0


def rewritten(path, change):
    """Store the content of a checkpoint anew after a change."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.",
                                    "_orig_mod.module."])
def test_prefixes_of_wrappers_are_stripped(model, alphabet, prefix):
    """DataParallel and torch.compile, in either order."""
    gpt.save_checkpoint("file.pt", model, alphabet)
    rewritten("file.pt", lambda content: content.update(model_state_dict=OrderedDict(
        (prefix + name, tensor) for name, tensor in content["model_state_dict"].items())))
    loaded = gpt.load_checkpoint("file.pt")[0]
    assert difference(dict(model.state_dict()), dict(loaded.state_dict())) is None


def test_the_four_keys_of_the_tutorials_are_enough(capsys, model, alphabet):
    """No format, no tokenizer's name: the checkpoint of a tutorial's own training loop."""
    torch.save({"model_state_dict": model.half().state_dict(), "itos": alphabet.itos,
                "hyperparameters": asdict(model.config), "stoi": alphabet.stoi}, "file.pt")
    loaded, tokenizer, _ = gpt.load_checkpoint("file.pt")
    assert tokenizer.stoi == alphabet.stoi
    assert all(weight.dtype == torch.float32 for weight in loaded.parameters())
    assert gpt.main(["--sample", "--ckpt", "file.pt", "--max_new_tokens", "5"]) == 0


# ------------------------------------------------------------------------------ hostile files
def test_a_truncated_file_is_refused(model, alphabet):
    """Wherever it was cut."""
    gpt.save_checkpoint("file.pt", model, alphabet)
    whole = Path("file.pt").read_bytes()
    for size in [0, 1, 3, 4, 100, *range(500, len(whole), 500), len(whole) - 1]:
        Path("file.pt").write_bytes(whole[:size])
        assert_refused("file.pt")


def test_a_flipped_byte_is_noticed_or_harmless(model, alphabet):
    """The zip's checksums catch what torch.load alone would take."""
    gpt.save_checkpoint("file.pt", model, alphabet)
    whole, noticed, tries = Path("file.pt").read_bytes(), 0, 200
    chance = random.Random(0)
    for place in sorted(chance.sample(range(len(whole)), tries)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        Path("file.pt").write_bytes(damaged)
        try:
            loaded, tokenizer, _ = gpt.load_checkpoint("file.pt")
        except gpt.UserError:
            noticed += 1
        else:
            assert difference(dict(model.state_dict()), dict(loaded.state_dict())) is None
            assert tokenizer.stoi == alphabet.stoi and loaded.config == model.config
    assert noticed > tries / 3


@pytest.mark.parametrize("kind", ["text", "empty", "zip", "folder", "nothing", "pickle", "png"])
def test_a_foreign_file_is_refused(folder, kind):
    """Anything that isn't a checkpoint."""
    path = folder / "file.pt"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pickle":
        torch.save({"model_state_dict": {}}, path, _use_new_zipfile_serialization=False)
    elif kind != "nothing":
        path.write_bytes({"text": TEXT.encode(), "empty": b"", "png": b"\x89PNG\r\n\x1a\n"}[kind])
    assert_refused(path)


def test_a_compressed_bomb_is_refused_unread(folder, model, alphabet):
    """A zip of zeros that would unpack to a gigabyte is not unpacked."""
    gpt.save_checkpoint("file.pt", model, alphabet)
    with zipfile.ZipFile("file.pt") as source, zipfile.ZipFile(
            "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert_refused("bomb.pt")


class Command:
    """Pickled, it would run a command when it is opened."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("place", ["whole", "weight", "hyperparameters", "more"])
def test_a_pickle_that_would_run_a_command_is_refused_and_not_run(folder, model, alphabet, place):
    """weights_only: the file is data."""
    gpt.save_checkpoint("file.pt", model, alphabet)
    content = stored("file.pt")
    if place == "weight":
        content["model_state_dict"]["lm_head.weight"] = Command()
    elif place != "whole":
        content[place] = Command()
    torch.save(Command() if place == "whole" else content, "file.pt")
    assert_refused("file.pt")
    assert not (folder / "pwned").exists()
    torch.load("file.pt", weights_only=False)  # the trap is real
    assert (folder / "pwned").exists()


def test_a_newer_format_is_refused_by_name(model, alphabet):
    """What a later gpt.py writes is not guessed at."""
    gpt.save_checkpoint("file.pt", model, alphabet)
    rewritten("file.pt", lambda content: content.update(format=content["format"] + 1))
    assert_refused("file.pt", "newer")


HOSTILE = {
    "n_layer a string": lambda c: c["hyperparameters"].update(n_layer="1"),
    "n_layer a float": lambda c: c["hyperparameters"].update(n_layer=1.0),
    "n_layer huge": lambda c: c["hyperparameters"].update(n_layer=10**12),
    "n_layer zero": lambda c: c["hyperparameters"].update(n_layer=0),
    "n_layer two": lambda c: c["hyperparameters"].update(n_layer=2),
    "n_embd huge": lambda c: c["hyperparameters"].update(n_embd=2 * 10**9),
    "n_embd beyond 64 bits": lambda c: c["hyperparameters"].update(n_embd=2 * 10**30),
    "n_head none": lambda c: c["hyperparameters"].update(n_head=None),
    "block_size negative": lambda c: c["hyperparameters"].update(block_size=-8),
    "dropout nan": lambda c: c["hyperparameters"].update(dropout=float("nan")),
    "dropout a list": lambda c: c["hyperparameters"].update(dropout=[0.1]),
    "vocab_size zero": lambda c: c["hyperparameters"].update(vocab_size=0),
    "vocab_size negative": lambda c: c["hyperparameters"].update(vocab_size=-5),
    "vocab_size a string": lambda c: c["hyperparameters"].update(vocab_size="5"),
    "positions unknown": lambda c: c["hyperparameters"].update(positions="psychic"),
    "an unknown option": lambda c: c["hyperparameters"].update(telepathy=True),
    "hyperparameters a list": lambda c: c.update(hyperparameters=[1, 2]),
    "hyperparameters gone": lambda c: c.pop("hyperparameters"),
    "stoi gone": lambda c: c.pop("stoi"),
    "stoi empty": lambda c: c.update(stoi={}),
    "stoi a string": lambda c: c.update(stoi="abc"),
    "stoi with gaps": lambda c: c.update(stoi={"a": 0, "b": 2}),
    "stoi twice the same": lambda c: c.update(stoi={"a": 0, "b": 0}),
    "stoi of numbers": lambda c: c.update(stoi={i: i for i in range(5)}),
    "stoi of words": lambda c: c.update(stoi={f"word{i}": i for i in range(5)}),
    "stoi to strings": lambda c: c.update(stoi={"a": "0"}),
    "stoi too large": lambda c: c.update(stoi={chr(65 + i): i for i in range(6)}),
    "tokenizer unknown": lambda c: c.update(tokenizer="telepathy"),
    "tokenizer a list": lambda c: c.update(tokenizer=[]),
    "format a string": lambda c: c.update(format="one"),
    "weights gone": lambda c: c.pop("model_state_dict"),
    "weights none": lambda c: c.update(model_state_dict={}),
    "weights a list": lambda c: c.update(model_state_dict=[1]),
    "a weight missing": lambda c: c["model_state_dict"].pop("ln_f.weight"),
    "a weight too many": lambda c: c["model_state_dict"].update(extra=torch.zeros(1)),
    "a weight's name a number": lambda c: c["model_state_dict"].update({7: torch.zeros(1)}),
    "a weight of another shape": lambda c: c["model_state_dict"].update(
        {"ln_f.weight": torch.ones(9)}),
    "a weight a list": lambda c: c["model_state_dict"].update({"ln_f.weight": [1.0] * 8}),
    "a weight nan": lambda c: c["model_state_dict"]["ln_f.weight"].fill_(float("nan")),
    "a weight infinite": lambda c: c["model_state_dict"]["lm_head.weight"][0].fill_(float("inf")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_contents_that_make_no_sense_are_refused(model, alphabet, name):
    """Checked before anything is built: wrong types, wrong shapes, huge sizes, what is missing."""
    gpt.save_checkpoint("file.pt", model, alphabet)
    gpt.load_checkpoint("file.pt")
    rewritten("file.pt", HOSTILE[name])
    assert_refused("file.pt")


@pytest.mark.parametrize("content", [None, [], "text", 7, torch.zeros(3), {}])
def test_a_file_of_another_kind_is_refused(content):
    """A valid torch file that holds something else."""
    torch.save(content, "file.pt")
    assert_refused("file.pt")


@pytest.mark.parametrize("more", [{"iteration": 5}, {"best": "low"}, {"iteration": "many"},
                                  {"data": None}, {"data": 5, "iteration": None, "best": None},
                                  {"iteration": 1, "best": float("nan"), "data": "x"}])
def test_remarks_that_make_no_sense_do_not_stop_the_writing(capsys, model, alphabet, more):
    """What is only shown is either shown, left out, or refused in a sentence."""
    about = dict(iteration=3, best=1.5, data="text.txt", run_id="x", history=[])
    for extra in (more, about | more):
        gpt.save_checkpoint("file.pt", model, alphabet, **extra)
        assert gpt.main(["--sample", "--ckpt", "file.pt", "--max_new_tokens", "5"]) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err


def test_a_context_beyond_all_memory_gets_a_sentence(capsys, model, alphabet):
    """Rotary positions have no table, so any block_size fits the weights; the cache needs it."""
    for size in (10**13, 10**18):
        gpt.save_checkpoint("file.pt", model, alphabet)
        rewritten("file.pt", lambda c, n=size: c["hyperparameters"].update(block_size=n))
        capsys.readouterr()
        assert gpt.main(["--sample", "--ckpt", "file.pt", "--max_new_tokens", "5"]) == 2
        assert "Traceback" not in capsys.readouterr().err


RESUME_KEYS = ("iteration", "best", "history", "run_id", "fingerprint", "seconds", "train_config",
               "optimizers", "scaler")


@pytest.mark.parametrize("damage", ["gone", "None", "text", "number", "dict"])
def test_a_resume_file_that_makes_no_sense_gets_a_sentence(capsys, at_step, damage):
    """Any part missing or of another type: exit code 2 or a run that works, never a traceback."""
    at_step(1, kill())
    assert command() == 143
    whole, failures = Path("run.resume.pt").read_bytes(), []
    for key in RESUME_KEYS:
        Path("run.resume.pt").write_bytes(whole)
        value = {"gone": 0, "None": None, "text": "text", "number": 3, "dict": {"a": 1}}[damage]
        rewritten("run.resume.pt", lambda content, key=key, value=value: content.pop(key)
                  if damage == "gone" else content.update({key: value}))
        try:
            code = resume("--max_iters", 3)
        except Exception as error:
            failures.append(f"{key}: {error!r}")
            continue
        if code not in (0, 2):
            failures.append(f"{key}: exit code {code}")
    assert not failures
    assert "Traceback" not in capsys.readouterr().err


def test_a_plain_checkpoint_in_place_of_the_resume_file_gets_a_sentence(capsys, folder):
    """gpt_checkpoint.pt copied to where the resume file should be."""
    assert command(max_iters=5) == 0
    (folder / "copy.resume.pt").write_bytes((folder / "run.pt").read_bytes())
    capsys.readouterr()
    assert resume(ckpt="copy.pt") == 2
    assert "copy.resume.pt" in capsys.readouterr().err


def test_a_damaged_resume_file_is_refused_and_kept(capsys, folder):
    """A cut resume file is named, and the best model still writes."""
    assert command(max_iters=5) == 0
    path = folder / "run.resume.pt"
    path.write_bytes(path.read_bytes()[:5000])
    capsys.readouterr()
    assert resume() == 2
    assert "run.resume.pt" in capsys.readouterr().err and len(path.read_bytes()) == 5000
    assert gpt.main(["--sample", "--ckpt", "run.pt", "--max_new_tokens", "5"]) == 0


SPREAD = torch.zeros(1, dtype=torch.float16).expand(2**24, 8)  # two bytes that claim 268 million


@pytest.mark.parametrize("name", ["weights", "ids of tensors", "a version"])
def test_a_small_file_cannot_claim_large_tensors(model, alphabet, name):
    """Steps of 0 from number to number; and ids that only look like numbers."""
    gpt.save_checkpoint("file.pt", model, alphabet)
    content = stored("file.pt")
    if name == "ids of tensors":
        content["stoi"] = {s: torch.tensor(i) for s, i in content["stoi"].items()}
    elif name == "a version":
        content["format"] = SPREAD
    else:
        content["hyperparameters"]["vocab_size"] = len(SPREAD)
        content["model_state_dict"]["token_embedding.weight"] = SPREAD
        content["model_state_dict"]["lm_head.weight"] = SPREAD
    torch.save(content, "file.pt")
    before = peak()
    assert_refused("file.pt")
    assert peak() < before + 100


def peak():
    """MiB of memory that this process has had at most."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs /proc")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def test_a_resume_file_cannot_turn_the_network_on(at_step, monkeypatch):
    """Weights & Biases takes a flag."""
    at_step(1, kill())
    assert command() == 143
    rewritten("run.resume.pt", lambda content: content["train_config"].update(wandb="theirs"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert resume("--max_iters", 3) == 0


def test_byte_pairs_without_all_bytes_are_refused(model, alphabet):
    """A letter that has no token would be the end of the tokenizer, not a sentence."""
    gpt.save_checkpoint("file.pt", model, alphabet)
    rewritten("file.pt", lambda content: content.update(tokenizer="bpe"))
    assert_refused("file.pt", "byte")


BAD_STATES = {
    "short": lambda state: state.update(exp_avg=torch.ones(1)),
    "a number": lambda state: state.update(exp_avg=torch.tensor(1.0)),
    "long": lambda state: state.update(exp_avg_sq=torch.ones(9999)),
    "spread": lambda state: state.update(exp_avg=torch.ones(1).expand_as(state["exp_avg"])),
    "a missing one": lambda state: state.pop("exp_avg"),
    "many steps": lambda state: state.update(step=torch.ones(1000)),
    "no tensor": lambda state: state.update(step="many"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_optimizer_states_of_other_shapes_are_refused(capsys, at_step, name):
    """The fused kernel doesn't look: it would read and write beyond the end of them."""
    at_step(1, kill())
    assert command() == 143
    rewritten("run.resume.pt", lambda c: BAD_STATES[name](c["optimizers"][0]["state"][0]))
    capsys.readouterr()
    assert resume() == 2
    assert "run.resume.pt" in capsys.readouterr().err


@pytest.mark.parametrize("change", [
    dict(history=[]), dict(history=[1, 2]), dict(history=[{"val_loss": 1.0}]), dict(iteration=-5),
    dict(history=[dict(iteration="0", train_loss=1.0, val_loss=1.0, tokens=0, seconds=0.0)])])
def test_a_history_that_makes_no_sense_gets_a_sentence(capsys, at_step, change):
    """Rows without losses, losses that are words, no rows."""
    at_step(1, kill())
    assert command() == 143
    rewritten("run.resume.pt", lambda content: content.update(change))
    assert resume() == 2


def test_names_that_a_resume_file_has_too_many_are_left_out(at_step):
    """They could be those of a function's arguments."""
    at_step(1, kill())
    assert command() == 143
    rewritten("run.resume.pt", lambda content: content.update({"path": 1, "model": 2, 7: 8}))
    assert resume() == 0
