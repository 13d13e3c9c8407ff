"""What only a GPU can show. test_optimizers.py has the logic of it. Without TEST_GPU: skipped.

    TEST_GPU=0 python -m pytest tests/test_cuda.py
"""

import pytest
import torch
from conftest import ROOT, TEXT, TINY, as_flags

import gpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="TEST_GPU names no GPU")
RUN = TINY | dict(data="text.txt", ckpt="run.pt", device="cuda", precision="fp32", max_iters=60,
                  eval_interval=20, learning_rate=1e-2, batch_size=8)


@pytest.fixture(autouse=True)
def here(folder):
    """Work in a folder with text.txt."""


def train(**flags):
    """Train; returns the validation losses."""
    flags = RUN | flags
    gpt.train(**flags)
    return losses(flags["ckpt"])


def losses(ckpt="run.pt"):
    path = ckpt.replace(".pt", ".resume.pt")
    content = torch.load(path, weights_only=True, map_location="cpu")
    return [row["val_loss"] for row in content["history"]]


@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_logits_are_those_of_a_cpu(make_model, attention, positions):
    model = make_model(torch.float32, attention=attention, positions=positions)
    idx = torch.randint(13, (3, 8))
    expected = model(idx)[0]
    torch.testing.assert_close(model.cuda()(idx.cuda())[0].cpu(), expected, rtol=1e-3, atol=1e-3)


def test_the_likeliest_text_is_that_of_a_cpu():
    """The shipped model with its cache, past the end of its context."""
    model, tokenizer, _ = gpt.load_checkpoint(ROOT / "checkpoints/gpt_checkpoint.pt")
    prompt = tokenizer.encode("\n")
    expected = model.generate(prompt, 300, temperature=0)
    assert torch.equal(model.cuda().generate(prompt, 300, temperature=0).cpu(), expected)
    texts = [model.generate(prompt, 60, seed=seed).tolist() for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_losses_are_those_of_a_cpu(precision, compile):
    """The sequences differ: a GPU has its own random numbers. The checkpoint opens on a CPU."""
    expected = train(ckpt="cpu.pt", device="cpu")
    found = train(ckpt="gpu.pt", precision=precision, compile=compile,
                  batch_size=4, gradient_accumulation_steps=2)
    assert expected[0] > expected[-1] + 0.5
    assert found == pytest.approx(expected, abs=0.15)
    assert not gpt.load_checkpoint("gpu.pt")[0].lm_head.weight.is_cuda


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_has_the_losses_of_a_whole_one(precision):
    """To rounding: a GPU does not add up in the same order each time."""
    flags = dict(precision=precision, dropout=0.1, schedule="constant")
    expected = train(ckpt="whole.pt", **flags)
    train(**flags, max_iters=20)
    gpt.train(resume=True, ckpt="run.pt", max_iters=60)
    assert losses() == pytest.approx(expected, abs=1e-2)


def test_a_run_moves_between_gpu_and_cpu():
    train(max_iters=20)
    gpt.train(resume=True, ckpt="run.pt", device="cpu", max_iters=40)
    gpt.train(resume=True, ckpt="run.pt", device="cuda", precision="auto", max_iters=60)
    assert len(losses()) == 4 and losses()[-1] < losses()[0] - 0.5


def test_a_gpu_with_too_little_memory_gets_one_message(folder, capsys):
    (folder / "long.txt").write_text(TEXT * 10, encoding="utf-8")
    flags = RUN | dict(data="long.txt", batch_size=2**20, block_size=256, n_embd=128)
    assert gpt.main(["--train", *as_flags(flags)]) == 2
    err = capsys.readouterr().err
    assert "lower --batch_size" in err and "Traceback" not in err
