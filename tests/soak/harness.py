"""What the soak scripts share: runs in forked children, a tiny text, comparing runs to the bit."""
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure  # noqa: F401 (imported once, here, so that no child has to)
import torch
import torch._dynamo  # noqa: F401
import tqdm  # noqa: F401
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402

torch.set_num_threads(1)
WORDS = "the cat sat on a mat and ran to her hat\n".split(" ")
TEXT = " ".join(random.Random(0).choices(WORDS, k=600))
SIZES = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 8 --batch_size 4 --device cpu".split()
RUN = ["--train", *SIZES, *"--precision fp32 --dropout 0.1 --eval_tokens 99 --data text.txt "
       "--ckpt run.pt".split()]
MIB = 2**20


def prepare(folder):
    """An empty folder with the text."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def command(*words):
    """The exit code of gpt.py with these words; argparse leaves by SystemExit."""
    try:
        return gpt.main([str(word) for word in words])
    except SystemExit as end:
        return end.code


def start(folder, action, memory=None):
    """Fork a child that runs action() in a folder, its output in files there; returns its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    for name in ("stdout", "stderr"):
        (Path(folder) / name).write_bytes(b"")
    if pid := os.fork():
        return pid
    code, generate = 99, gpt.GPTLanguageModel.generate
    gpt.GPTLanguageModel.generate = lambda self, idx, n=9, *args, **how: generate(
        self, idx, min(n, 9), *args, **how)  # short samples: half of a tiny run's time otherwise
    try:
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY), number)
        sys.stdin = io.StringIO()
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False)
                                  for number in (1, 2))
        if memory:  # the address space that is in use now, and so much more
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        code = action()
    except KeyboardInterrupt:
        code = 130  # a Ctrl-C before main has begun
    except BaseException:
        traceback.print_exc()
        code = 98
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 97)


def finish(pid, folder, seconds=60):
    """Wait for a child: its exit code (minus the signal that ended it), output, peak memory.

    It hangs if it takes more than these seconds of CPU time, or six times as many in all: others
    may be busy on this machine.
    """
    deadline, end = time.monotonic() + 6 * seconds, 0
    while not end:
        end, status, usage = os.wait4(pid, os.WNOHANG)
        if not end and (time.monotonic() > deadline or
                        time.clock_gettime(~pid << 3 | 2) > seconds):  # the clock of its CPU time
            os.kill(pid, signal.SIGKILL)
            os.wait4(pid, 0)
            return SimpleNamespace(code="hang", out="", err="", peak=0)
        time.sleep(0 if end else 0.001)
    out, err = ((Path(folder) / name).read_text(encoding="utf-8", errors="replace")
                for name in ("stdout", "stderr"))
    return SimpleNamespace(code=os.waitstatus_to_exitcode(status), out=out, err=err,
                           peak=usage.ru_maxrss * 1024)


def run(folder, *words, seconds=60, memory=None):
    """Run gpt.py with these words in a child, from beginning to end."""
    return finish(start(folder, lambda: command(*words), memory), folder, seconds)


def sentence(result):
    """What is wrong with how a command ended; None if it is a success or one clear sentence."""
    lines = [line for line in result.err.splitlines() if line.startswith("gpt.py: ")]
    if result.code not in (0, 2):
        return f"exit code {result.code}: {result.err[-600:]}"
    if "Traceback" in result.err or "panicked" in result.err:
        return f"a traceback: {result.err[-600:]}"
    if result.code == 2 and (len(lines) != 1 or not result.err.rstrip().endswith(lines[0])):
        return f"not one sentence: {result.err[-600:]}"
    return None


def same(one, other):
    """Whether two stored runs hold the same weights and losses, to the bit."""
    weights, others = one["model_state_dict"], other["model_state_dict"]
    rows, other_rows = ([{k: v for k, v in row.items() if k != "seconds"} for row in run["history"]]
                        for run in (one, other))
    return rows == other_rows and weights.keys() == others.keys() and all(
        torch.equal(weights[name], others[name]) for name in weights)


def stored(path):
    return torch.load(path, weights_only=True)


PHASES = ("start", "forward and backward", "optimizer", "between", "evaluation",
          "write best model", "write resume state", "write log", "fsync", "rename", "end")


def warm_up():
    """Draw a figure once, so that each child's first is as quick as its second."""
    axes = matplotlib.figure.Figure(layout="constrained").subplots()
    axes.plot([0, 1], label="line")
    axes.legend()
    axes.figure.savefig(io.BytesIO())


class Watch:
    """Shared memory in which a child notes its phase and its steps, read by who kills it."""

    def __init__(self, file=None):
        self.memory = mmap(file.fileno() if file else -1, 32)

    @property
    def phase(self):
        return PHASES[self.memory[0]]

    @phase.setter
    def phase(self, name):
        self.memory[0] = PHASES.index(name)

    @property
    def steps(self):
        return struct.unpack_from("q", self.memory, 8)[0]

    @property
    def saves(self):
        """The resume states that were written to the end."""
        return struct.unpack_from("q", self.memory, 16)[0]

    def count(self, offset):
        struct.pack_into("q", self.memory, offset, 1 + struct.unpack_from("q", self.memory,
                                                                          offset)[0])

    def clear(self):
        self.memory[:] = bytes(len(self.memory))

    def wrap(self, module, name, phase_of):
        """Let module.name set the phase while it runs."""
        real = getattr(module, name)

        def wrapped(*args, **kwargs):
            before, self.phase = self.phase, phase_of(args)
            result = real(*args, **kwargs)
            self.phase = "between" if before == "start" else before
            return result

        setattr(module, name, wrapped)

    def install(self):
        """In the child: from now on gpt.train says what it does."""
        def file_phase(args):
            name = str(args[0])
            return ("write resume state" if name.endswith(".resume.pt") else
                    "write best model" if name.endswith(".pt") else "write log")

        def after_step(optimizer, args, kwargs):
            if isinstance(optimizer, gpt.Muon):  # it steps last
                self.count(8)
                self.phase = "between"

        def before_step(optimizer, args, kwargs):
            self.phase = "optimizer"

        def factor(step, config):
            self.phase = "forward and backward"
            return real_factor(step, config)

        def save(path, *args, **kwargs):
            real_save(path, *args, **kwargs)
            if str(path).endswith(".resume.pt"):
                self.count(16)

        self.wrap(gpt, "estimate_loss", lambda args: "evaluation")
        self.wrap(gpt, "write_atomically", file_phase)
        self.wrap(os, "fsync", lambda args: "fsync")
        self.wrap(os, "replace", lambda args: "rename")
        real_factor, gpt.learning_rate_factor = gpt.learning_rate_factor, factor
        real_save, gpt.save_checkpoint = gpt.save_checkpoint, save
        register_optimizer_step_pre_hook(before_step)
        register_optimizer_step_post_hook(after_step)
