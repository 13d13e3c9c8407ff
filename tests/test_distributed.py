"""torchrun: two processes train as one process with twice the batch. On the CPU, with gloo."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT, TINY

import gpt

pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == "win32",
                                reason="needs torch.distributed with gloo, and signals")
RUN = TINY | dict(data="text.txt", device="cpu", precision="fp32", init_from="start.pt",
                  gradient_accumulation_steps=2, max_iters=6)
for name in ("preset", "n_layer", "n_head", "n_embd", "block_size", "batch_size"):
    del RUN[name]  # start.pt has the sizes
ADAMW = RUN | dict(optimizer="adamw", learning_rate=1e-3, ckpt="adamw.pt")
MUON = RUN | dict(optimizer="muon", learning_rate=2e-2, ckpt="muon.pt")
# One program does all runs: to start two processes takes longer than all training here.
PROGRAM = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import gpt

stores = iter("123")  # a new group of processes needs a new place where they find each other
real_group = gpt.dist.init_process_group
gpt.dist.init_process_group = lambda backend: real_group(
    backend, f"file://{{{{os.getcwd()}}}}/store{{{{next(stores)}}}}", rank=gpt.RANK, world_size=2)
gpt.train(batch_size=2, **{{adamw}})
real = gpt.training_step
def stopped(step, *args):
    if step == 3 and gpt.RANK == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(step, *args)
gpt.training_step = stopped
try:
    gpt.train(batch_size=2, **{{muon}})
    print("not stopped")
except KeyboardInterrupt:
    print(f"rank {{{{gpt.RANK}}}} stopped")
gpt.training_step = real
gpt.train(ckpt="muon.pt", resume=True)
"""


def prepare(folder):
    """A text, and a model with random weights: every gradient is used from the first step on."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = gpt.CharTokenizer({s: i for i, s in enumerate(sorted(set(TEXT)))})
    torch.manual_seed(0)
    model = gpt.GPTLanguageModel(gpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16,
                                               vocab_size=tokenizer.vocab_size))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    gpt.save_checkpoint(folder / "start.pt", model, tokenizer)
    return folder


def torchrun(folder, *words, until=None):
    """Run two processes of a program in a folder, up to SIGTERM when the file `until` exists.

    Returns the exit code, stdout and stderr. Whatever happens, no process is left.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         *words], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 100
        while until and not (folder / until).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        if until:
            process.terminate()
        out, err = process.communicate(timeout=100)
    finally:
        process.terminate()  # torchrun ends its processes
    return process.returncode, out, err


def stored(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of the runs of PROGRAM by two processes, and what they printed."""
    folder = prepare(tmp_path_factory.mktemp("two"))
    (folder / "program.py").write_text(PROGRAM.format(adamw=ADAMW, muon=MUON))
    code, out, err = torchrun(folder, "program.py")
    assert code == 0, err
    return folder, out


@pytest.fixture
def alone(folder):
    """alone(**flags): what one process stores with twice the batch."""
    def train(**flags):
        prepare(folder)
        gpt.train(batch_size=4, **flags)
        return stored(Path(flags["ckpt"]).with_suffix(".resume.pt"))
    return train


def test_adamw_equals_one_process_with_twice_the_batch(two, alone):
    """To rounding: the weights, and the gradients as AdamW remembers them, after 6 steps."""
    one, both = alone(**ADAMW), stored(two[0] / "adamw.resume.pt")
    for name, weight in one["model_state_dict"].items():
        torch.testing.assert_close(both["model_state_dict"][name], weight, rtol=0, atol=1e-5)
    for key, state in one["states"][0]["state"].items():
        other = both["states"][0]["state"][key]["exp_avg"]
        assert (other - state["exp_avg"]).norm() < 1e-3 * state["exp_avg"].norm()
    for ours, theirs in zip(both["history"], one["history"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-5)


def test_muon_stopped_and_resumed_has_the_same_losses(two, alone):
    """SIGTERM to the second process stops both, the state is saved, and both continue from it."""
    one, both = alone(**MUON), stored(two[0] / "muon.resume.pt")
    assert "rank 0 stopped" in two[1] and "rank 1 stopped" in two[1]
    assert both["iteration"] == 6 and len(both["history"]) == 3
    for ours, theirs in zip(both["history"], one["history"], strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-3)
    assert one["history"][-1]["val_loss"] < one["history"][0]["val_loss"] - 0.1


def test_one_process_prints_and_writes(two):
    folder, out = two
    assert out.count("step      0") == 2 and out.count("step      6") == 2  # one for each run
    assert out.count("Stopped after") == 1 and out.count("To generate text") == 2
    files = {f"{run}{end}" for run in ("adamw", "muon")
             for end in (".pt", ".resume.pt", ".csv", ".png")}
    found = {path.name for path in folder.iterdir() if not path.name.startswith("store")}
    assert found == {*files, "text.txt", "start.pt", "program.py"}  # PyTorch removes its stores


def test_sigterm_to_torchrun_saves_the_run(folder):
    """It passes the signal on to its processes. One process can continue the run."""
    prepare(folder)
    flags = [f"--{k}={v}" for k, v in (ADAMW | dict(max_iters=10**6, batch_size=2)).items()]
    code, out, err = torchrun(folder, str(ROOT / "gpt.py"), "--train", *flags, until="adamw.csv")
    assert code != 0 and out.count("--resume") == 1, err
    done = stored("adamw.resume.pt")["iteration"]
    assert f"Stopped after {done:,} steps" in out
    gpt.train(ckpt="adamw.pt", resume=True, max_iters=done + 2)
    assert stored("adamw.resume.pt")["iteration"] == done + 2
