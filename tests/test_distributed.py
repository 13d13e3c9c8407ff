"""torchrun: two processes train as one process with twice the batch. On the CPU, with gloo."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT, alphabet, as_flags, stored

import gpt

pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == "win32",
                                reason="needs torch.distributed with gloo, and signals")
RUN = dict(data="text.txt", device="cpu", precision="fp32", init_from="start.pt",
           gradient_accumulation_steps=2, max_iters=6, eval_interval=3)
SIGNAL_TO_ONE = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import gpt

real = gpt.training_step
def step_with_signal(step, *args):
    if step == 3 and gpt.RANK == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(step, *args)
gpt.training_step = step_with_signal
sys.exit(gpt.main())
"""

@pytest.fixture(autouse=True)
def start(folder, no_picture):
    """start.pt, a model with random weights: every gradient is used from the first step on."""
    tokenizer = alphabet(TEXT)
    model = gpt.GPTLanguageModel(gpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16,
                                               vocab_size=tokenizer.vocab_size))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    gpt.save_checkpoint("start.pt", model, tokenizer)

def torchrun(script=ROOT / "gpt.py", until=None, **flags):
    """Train with two processes, up to SIGTERM when the file `until` exists.

    Returns the exit code and stdout. Whatever happens, no process is left.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         script, "--train", *as_flags(flags)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 100
        while until and not Path(until).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        if until:
            process.terminate()
        out, _ = process.communicate(timeout=100)
    finally:
        process.terminate()  # torchrun ends its processes
    return process.returncode, out

def both_ways(**flags):
    """What one process stores, what two processes with half the batch each store and print."""
    gpt.train(**RUN, **flags, batch_size=4, ckpt="one.pt")
    code, out = torchrun(**RUN, **flags, batch_size=2, ckpt="two.pt")
    assert code == 0
    return stored("one.resume.pt"), stored("two.resume.pt"), out

def test_adamw_equals_one_process_with_twice_the_batch(folder):
    """To rounding: the weights, and the gradients as AdamW remembers them, after 6 steps.

    One of the two processes prints and writes.
    """
    one, two, out = both_ways(optimizer="adamw", learning_rate=1e-3)
    torch.testing.assert_close(two["model_state_dict"], one["model_state_dict"], rtol=0, atol=1e-5)
    for key, state in one["states"][0]["state"].items():
        other = two["states"][0]["state"][key]["exp_avg"]
        assert (other - state["exp_avg"]).norm() < 1e-3 * state["exp_avg"].norm()
    for row, expected in zip(two["history"], one["history"], strict=True):
        assert row["tokens"] == expected["tokens"]
        assert row["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)
    assert out.count("step      0") == out.count("To generate text") == 1
    assert len(list(folder.glob("two.*"))) == 4

def test_muon_has_the_losses_of_one_process_with_twice_the_batch():
    one, two, _ = both_ways(optimizer="muon", learning_rate=2e-2)
    expected = [row["val_loss"] for row in one["history"]]
    assert [row["val_loss"] for row in two["history"]] == pytest.approx(expected, abs=1e-3)
    assert expected[-1] < expected[0] - 0.1

def test_sigterm_to_torchrun_saves_the_run():
    """It passes the signal on to its processes. Two processes continue the run."""
    flags = RUN | dict(max_iters=10**6, batch_size=2, ckpt="run.pt")
    code, out = torchrun(**flags, until="run.csv")
    assert code != 0
    assert out.count("--resume") == 1
    done = stored()["iteration"]
    assert f"Stopped after {done:,} steps" in out
    code, _ = torchrun(ckpt="run.pt", resume=True, max_iters=done + 2)
    assert code == 0
    assert stored()["iteration"] == done + 2

def test_if_one_process_has_to_stop_all_do():
    Path("program.py").write_text(SIGNAL_TO_ONE)
    code, out = torchrun("program.py", **RUN, batch_size=2, ckpt="run.pt")
    assert code != 0
    assert "Stopped after 4 steps" in out
    assert stored()["iteration"] == 4
