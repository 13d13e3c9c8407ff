"""torchrun: two processes with gloo on the CPU train as one process with twice the batch."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TEXT

import gpt

FLAGS = ("--train --init_from start.pt --data text.txt --ckpt run.pt --device cpu --precision fp32 "
         "--optimizer adamw --learning_rate 1e-3 --schedule constant --eval_interval 3 "
         "--eval_tokens 512 --gradient_accumulation_steps 2").split()

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="no distributed")


def prepare(folder):
    """A text and a model with random weights, from which every gradient is at work."""
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    alphabet = gpt.CharTokenizer.from_text(TEXT)
    torch.manual_seed(0)
    model = gpt.GPTLanguageModel(gpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8,
                                               vocab_size=alphabet.vocab_size))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)  # short gradients: clipping would hide a factor
    gpt.save_checkpoint(folder / "start.pt", model, alphabet)
    return folder


def launch(folder, *words, program=gpt.__file__):
    """Run two processes in a folder; returns what torchrun returned."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(gpt.__file__).parent)}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(program), *map(str, words)], cwd=folder, env=env, capture_output=True, text=True,
        timeout=120)


def alone(folder, *words):
    """The same command in this process alone; returns what it stored."""
    here = Path.cwd()
    os.chdir(prepare(folder))
    try:
        assert gpt.main([*FLAGS, *map(str, words)]) == 0
        return torch.load("run.resume.pt", weights_only=True)
    finally:
        os.chdir(here)


def assert_alike(one, other):
    """The same weights, gradients (as AdamW keeps them) and losses, tensor by tensor."""
    assert one["iteration"] == other["iteration"]
    for name, weight in one["model_state_dict"].items():
        assert torch.allclose(weight, other["model_state_dict"][name], atol=2e-5), name
    (ours,), (theirs,) = one["optimizers"], other["optimizers"]
    assert len(ours["state"]) == len(one["model_state_dict"])
    total = 0.0
    for key, state in ours["state"].items():
        mean, other_mean = state["exp_avg"], theirs["state"][key]["exp_avg"]
        assert 0 < mean.abs().max() and (mean - other_mean).abs().max() < 1e-4 * mean.abs().max()
        total += mean.square().sum().item()
    assert total**0.5 < 0.1  # were the gradients clipped to 1, it would be 0.27 after three steps


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of a run of three steps by two processes, and what torchrun said."""
    folder = prepare(tmp_path_factory.mktemp("pair") / "run")
    return folder, launch(folder, *FLAGS, "--max_iters", 3, "--batch_size", 2)


def test_two_processes_equal_one_with_twice_the_batch(pair, tmp_path):
    """The gradients, the weights and the losses of 2 x 2 sequences are those of 1 x 4."""
    folder, done = pair
    assert done.returncode == 0, done.stderr
    two = torch.load(folder / "run.resume.pt", weights_only=True)
    one = alone(tmp_path / "alone", "--max_iters", 3, "--batch_size", 4)
    assert_alike(one, two)
    for ours, theirs in zip(one["history"], two["history"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for name in ("train_loss", "val_loss"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5)


def test_one_process_writes(pair):
    """One set of files, every line once."""
    folder, done = pair
    assert {path.name for path in folder.iterdir()} == {
        "text.txt", "start.pt", "run.pt", "run.resume.pt", "run.csv", "run.png"}
    assert done.stdout.count("step      0") == 1 and done.stdout.count("run.csv") == 1
    assert "2 x cpu" in done.stdout


def test_two_processes_resume(pair, tmp_path):
    """Three and three steps are six of one process; few windows to evaluate are shared well."""
    folder = tmp_path / "resumed"
    shutil.copytree(pair[0], folder)
    done = launch(folder, "--train", "--resume", "--ckpt", "run.pt", "--max_iters", 6,
                  "--eval_tokens", 1)
    assert done.returncode == 0, done.stderr
    two = torch.load(folder / "run.resume.pt", weights_only=True)
    one = alone(tmp_path / "alone", "--max_iters", 6, "--batch_size", 4, "--eval_tokens", 1)
    assert_alike(one, two)
    rows = one["history"][-1], two["history"][-1]
    assert rows[0]["val_loss"] == pytest.approx(rows[1]["val_loss"], abs=1e-4)


def test_another_number_of_processes_is_refused(pair, tmp_path, monkeypatch, capsys):
    """One process would see other data than the two did."""
    shutil.copytree(pair[0], tmp_path / "one")
    monkeypatch.chdir(tmp_path / "one")
    before = Path("run.resume.pt").read_bytes()
    assert gpt.main("--train --resume --ckpt run.pt --max_iters 6".split()) == 2
    assert "2 processes" in capsys.readouterr().err
    assert Path("run.resume.pt").read_bytes() == before


def test_a_signal_to_one_process_stops_both_with_the_state_saved(tmp_path):
    """At whatever moment of a step it comes: here after the losses have been exchanged."""
    folder = prepare(tmp_path / "stopped")
    program = folder / "program.py"
    program.write_text("""if True:
        import os, signal, sys
        import gpt
        from torch.optim.optimizer import register_optimizer_step_post_hook
        steps = []

        def hook(optimizer, args, kwargs):
            steps.append(1)
            if len(steps) == 4 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)

        register_optimizer_step_post_hook(hook)
        sys.exit(gpt.main())
        """)
    done = launch(folder, *FLAGS, "--max_iters", 500, "--batch_size", 2, program=program)
    assert done.returncode != 0 and "--resume" in done.stdout
    assert "Traceback (most recent call last):\n  File \"" + str(program) not in done.stderr
    stored = torch.load(folder / "run.resume.pt", weights_only=True)
    assert stored["iteration"] in (4, 5)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_no_thread_of_the_group_outlives_the_training(tmp_path):
    """One that still held a tensor while Python ends would abort the process, now and then."""
    folder = prepare(tmp_path / "ended")
    program = folder / "program.py"
    program.write_text("""if True:
        import sys
        from pathlib import Path
        import gpt

        code = gpt.main()
        names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
        print("threads:", *(name.strip() for name in names))
        sys.exit(code)
        """)
    done = launch(folder, *FLAGS, "--max_iters", 2, "--batch_size", 2, program=program)
    assert done.returncode == 0, done.stderr
    threads = [line for line in done.stdout.splitlines() if line.startswith("threads:")]
    assert len(threads) == 2 and "gloo" not in "".join(threads)
