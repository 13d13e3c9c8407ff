"""What only a GPU can show; test_training.py has the logic of it. conftest.py hides it otherwise.

    TEST_GPU=0 python -m pytest tests/test_cuda.py
"""

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, run

import gpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is named by TEST_GPU")
SIZES = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=8, optimizer="muon",
             max_iters=60, eval_interval=20, learning_rate=1e-2, dropout=0.0, seed=1)


@pytest.fixture(autouse=True)
def _here(empty_folder):
    """Every test has a folder of its own with a text in it."""
    (empty_folder / "text.txt").write_text(TEXT)


def train(ckpt="run.pt", **flags):
    """Train, and return what the resume file then holds."""
    gpt.train(**{**SIZES, "data": "text.txt", "ckpt": ckpt, "preset": "lecture", **flags})
    return torch.load(ckpt.replace(".pt", ".resume.pt"), weights_only=True, map_location="cpu")


@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_scores_are_those_of_a_cpu(make_model, attention, positions):
    """The same model on both, in fp32."""
    model = make_model(dtype=torch.float32, attention=attention, positions=positions)
    idx = torch.randint(13, (3, 8))
    there = model(idx)[0]
    here = model.cuda()(idx.cuda())[0].cpu()
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)


def test_a_batch_is_that_of_a_cpu():
    """Copied from pinned memory, without waiting: the passages are the same."""
    data = np.arange(5000, dtype=np.uint16)
    batches = [gpt.get_batch(data, 64, 32, torch.Generator().manual_seed(1), device)
               for device in ("cpu", "cuda")]
    for there, here in zip(*batches, strict=True):
        assert here.is_cuda and torch.equal(here.cpu(), there)


@pytest.mark.parametrize("how", [dict(temperature=0), dict(beams=3)])
def test_it_writes_what_a_cpu_writes(how):
    """The shipped model with its cache, past the end of its context, and with beams."""
    model, tokenizer, _ = gpt.load_checkpoint(ROOT / "checkpoints/gpt_checkpoint.pt")
    prompt, n = tokenizer.encode("DABB:\n"), 300 if "beams" not in how else 40
    there = model.generate(prompt, n, tokenizer, **how)
    here = model.cuda().generate(prompt, n, tokenizer, **how)
    assert tokenizer.decode(here[0]) == tokenizer.decode(there[0])


def test_a_seed_repeats_what_is_drawn():
    """On one GPU the same seed draws the same text, another one another."""
    model, tokenizer, _ = gpt.load_checkpoint(ROOT / "checkpoints/gpt_checkpoint.pt", "cuda")
    texts = [model.generate([], 60, tokenizer, seed=seed).tolist() for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compile", [False, True])
def test_it_learns_as_on_a_cpu(capsys, precision, compile):
    """In each precision, compiled or not, accumulated or not: the losses of a CPU in fp32."""
    there = train("cpu.pt", device="cpu", precision="fp32")
    here = train("gpu.pt", device="cuda", precision=precision, compile=compile,
                 batch_size=4, gradient_accumulation_steps=2)
    assert "torch.compile failed" not in capsys.readouterr().out
    losses = [[row["val_loss"] for row in run["history"]] for run in (there, here)]
    assert losses[0][0] > losses[0][-1] + 0.5
    assert losses[1] == pytest.approx(losses[0], abs=0.1)
    assert bool(here["scaler"]) == (precision == "fp16")
    model, tokenizer, about = gpt.load_checkpoint("gpu.pt")  # opens where there is no GPU
    assert not model.lm_head.weight.is_cuda and math.isfinite(about["best"])


def test_dropout_draws_on_the_gpu():
    """With dropout the loss falls too, and the run is not the one without."""
    plain, dropped = [train(f"{p}.pt", device="cuda", dropout=p) for p in (0.0, 0.2)]
    ends = [run["history"][-1]["train_loss"] for run in (plain, dropped)]
    assert ends[0] != ends[1] == pytest.approx(ends[0], abs=0.5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_stopped_run_goes_on(at_step, precision):
    """SIGTERM, then --resume: it ends where the run that was left alone ends."""
    whole = train("whole.pt", device="cuda", precision=precision, dropout=0.1)
    at_step(30, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        train(device="cuda", precision=precision, dropout=0.1)
    assert torch.load("run.resume.pt", weights_only=True)["iteration"] < 60
    gpt.train(resume=True, ckpt="run.pt", data="text.txt", device="cuda")
    resumed = torch.load("run.resume.pt", weights_only=True, map_location="cpu")
    for old, new in zip(whole["history"], resumed["history"], strict=True):
        assert new["val_loss"] == pytest.approx(old["val_loss"], abs=1e-2)


def test_a_run_moves_between_the_gpu_and_the_cpu():
    """Begun on one, it goes on on the other."""
    train(device="cuda", max_iters=20, precision="fp32")
    gpt.train(resume=True, ckpt="run.pt", data="text.txt", device="cpu", max_iters=40)
    gpt.train(resume=True, ckpt="run.pt", data="text.txt", device="cuda", max_iters=60)
    history = torch.load("run.resume.pt", weights_only=True, map_location="cpu")["history"]
    assert [row["iteration"] for row in history] == [0, 20, 40, 60]
    assert history[-1]["val_loss"] < history[0]["val_loss"] - 0.5


def test_too_little_memory_gets_a_sentence(capsys):
    """A batch for which no GPU has room ends in one line and code 2."""
    torch.cuda.empty_cache()
    words = [f"--{name}={value}" for name, value in dict(
        SIZES, batch_size=2**20, block_size=256, n_embd=128).items()]
    Path("long.txt").write_text(TEXT * 10)
    assert run("--train", *words, "--data=long.txt", "--device=cuda", "--preset=gpu") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "take a smaller --batch_size" in said[-1] and "Traceback" not in "".join(said)


def test_a_gpu_that_is_not_there_gets_a_sentence(capsys):
    """cuda:99, as a torchrun with too many processes would choose."""
    assert run("--train", "--data=text.txt", "--device=cuda:99") == 2
    assert "--device cuda:99 is not to be had here" in capsys.readouterr().err
