"""What only a GPU can show. test_optimizers.py has the logic of it. Without TEST_GPU: skipped.

    TEST_GPU=0 python -m pytest tests/test_cuda.py
"""

import pytest
import torch
from conftest import RUN, TEXT, as_flags, each_kernel, each_position, stored, tokens

import gpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="TEST_GPU names no GPU")
RUN = RUN | dict(device="cuda", max_iters=60, eval_interval=20, learning_rate=1e-2, batch_size=8)

@pytest.fixture(autouse=True)
def here(folder):
    """Work in a folder with text.txt."""

def losses():
    return [row["val_loss"] for row in stored()["history"]]

@each_kernel
@each_position
def test_the_logits_are_those_of_a_cpu(make_model, attention, positions):
    model, idx = make_model(torch.float32, attention=attention, positions=positions), tokens(3, 8)
    expected = model(idx)[0]
    torch.testing.assert_close(model.cuda()(idx.cuda())[0].cpu(), expected, rtol=1e-3, atol=1e-3)

def test_the_likeliest_text_is_that_of_a_cpu():
    """A shipped model with its cache, past the end of its context."""
    model, tokenizer, _ = gpt.load_checkpoint("gpt_checkpoint.pt")
    prompt = tokenizer.encode("\n")
    expected = model.generate(prompt, 300, temperature=0)
    assert torch.equal(model.cuda().generate(prompt, 300, temperature=0).cpu(), expected)
    same = [model.generate(prompt, 60, seed=1) for _ in range(2)]
    assert torch.equal(*same)

@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_losses_are_those_of_a_cpu(precision, compile):
    """The sequences differ: a GPU has its own random numbers. The checkpoint opens on a CPU."""
    gpt.train(**RUN | dict(device="cpu"))
    expected = losses()
    gpt.train(**RUN | dict(ckpt="gpu.pt", precision=precision, compile=compile,
                           batch_size=4, gradient_accumulation_steps=2))
    found = [row["val_loss"] for row in stored("gpu.resume.pt")["history"]]
    assert expected[0] > expected[-1] + 0.5
    assert found == pytest.approx(expected, abs=0.15)
    assert not gpt.load_checkpoint("gpu.pt")[0].lm_head.weight.is_cuda

def test_a_gpu_with_too_little_memory_gets_one_message(folder, capsys):
    (folder / "text.txt").write_text(TEXT * 10, encoding="utf-8")
    flags = RUN | dict(batch_size=2**20, block_size=256, n_embd=128)
    assert gpt.main(["--train", *as_flags(flags)]) == 2
    error = capsys.readouterr().err
    assert "lower --batch_size" in error and "Traceback" not in error
