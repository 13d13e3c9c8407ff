"""Stop a small training at random moments, resume it, and compare with a run left alone.

    python tests/soak/kill_sweep.py --minutes 2
"""

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import matplotlib.figure  # noqa: F401  (imported once, here, and not in every child)
import torch
import torch._dynamo  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402

STEPS, INTERVAL = 24, 6
RUN = dict(preset="cpu", n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=4,
           max_iters=STEPS, eval_interval=INTERVAL, dropout=0.1, device="cpu",
           precision="fp32", data="text.txt", ckpt="run.pt")


def start(folder, **flags):
    """Train in a child process, its output in a file; returns the child's id."""
    sys.stdout.flush()
    if (child := os.fork()) > 0:
        return child
    code = 99
    with contextlib.suppress(BaseException):
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        code = gpt.main(["--train", *[f"--{k}={v}" for k, v in flags.items() if k != "resume"],
                         *["--resume"] * ("resume" in flags)])
    os._exit(code)


def finish(child):
    """Wait for a child; returns its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def stored(path):
    return torch.load(path, weights_only=True)


def equal(one, other):
    """Whether two stored values are equal, to the bit and apart from the clock."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            equal(one[key], other[key]) for key in one.keys() - {"seconds", "resume"})
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def interrupt(folder, number, seconds):
    """Start a run, signal it after some time; returns where it stopped and what is wrong, or ""."""
    child = start(folder, **RUN)
    time.sleep(seconds)
    os.kill(child, number)
    code = finish(child)
    for path in folder.glob("run*.pt"):
        with contextlib.redirect_stderr(io.StringIO()):
            gpt.load_checkpoint(path)  # at any moment a file is whole
    saved, log = folder / "run.resume.pt", (folder / "log.txt").read_text()
    step = stored(saved)["iteration"] if saved.exists() else None
    if code not in (0, -number, 128 + number):
        return step, f"exit code {code}"
    if "Stopped after" in log and f"Stopped after {step} steps" not in log:
        return step, "a finished step is lost"
    return step, ""


def resume(folder):
    """Continue a run to its end, or begin anew where nothing is to be continued."""
    if (folder / "run.resume.pt").exists():
        return finish(start(folder, ckpt="run.pt", resume=True))
    for path in folder.glob("run*"):  # killed before the first save was complete
        path.unlink()
    return finish(start(folder, **RUN))


def sweep(folder, minutes, seed):
    """Returns how often each case occurred, and the failures."""
    text = " ".join(random.Random(0).choices("the cat sat on a mat and ran".split(), k=600))
    chance, cases, failures = random.Random(seed), Counter(), []
    whole, killed = folder / "whole", folder / "killed"
    for place in (whole, killed):
        place.mkdir()
        (place / "text.txt").write_text(text)
    began = time.monotonic()
    assert finish(start(whole, **RUN)) == 0, (whole / "log.txt").read_text()
    duration = time.monotonic() - began
    expected = [stored(whole / name) for name in ("run.pt", "run.resume.pt")]
    while time.monotonic() < began + 60 * minutes:
        for path in killed.glob("[rl]*"):
            path.unlink()
        name = chance.choice(["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"])
        step, wrong = interrupt(killed, getattr(signal, name), chance.uniform(0, duration))
        if not wrong and (code := resume(killed)) != 0:
            wrong = f"resuming ended with exit code {code}"
        if not wrong:
            found = [stored(killed / name) for name in ("run.pt", "run.resume.pt")]
            wrong = "" if equal(found, expected) else "the end differs from the whole run's"
        where = ("nothing" if step is None else "at the end" if step == STEPS else
                 "between evaluations" if step % INTERVAL else "at an evaluation")
        cases[name, where] += 1
        if wrong:
            failures.append(f"{name} at step {step}: {wrong}\n{(killed / 'log.txt').read_text()}")
            print(failures[-1], flush=True)
    return cases, failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" would ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as temporary:
        cases, failures = sweep(Path(temporary), options.minutes, options.seed)
    for (name, where), count in sorted(cases.items()):
        print(f"{count:5}  {name}, saved {where}")
    print(f"{sum(cases.values())} runs, {len(failures)} failures")
    sys.exit(bool(failures))
