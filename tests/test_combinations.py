"""Options that meet one another: each pair of values in at least one run of the real program."""
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
from conftest import TEXT
from torch.nn.modules.module import register_module_forward_hook

import gpt

VALUES = {"tokenizer": ("char", "bpe"), "attention": ("fused", "explicit"),
          "precision": ("fp32", "bf16", "fp16"), "passes": (1, 2), "optimizer": ("adamw", "muon"),
          "positions": ("rotary", "learned"), "compile": (False, True), "processes": (1, 2)}
ROWS = [dict(zip(VALUES, row, strict=True)) for row in [
    ("bpe", "explicit", "bf16", 1, "adamw", "learned", False, 1),
    ("char", "fused", "fp32", 1, "adamw", "learned", False, 2),
    ("char", "explicit", "fp16", 1, "muon", "rotary", False, 1),
    ("bpe", "explicit", "fp32", 1, "muon", "rotary", True, 1),
    ("char", "fused", "bf16", 2, "muon", "rotary", True, 2),
    ("bpe", "fused", "fp16", 1, "muon", "learned", False, 1),
    ("bpe", "explicit", "fp16", 2, "adamw", "learned", True, 2),
    ("bpe", "explicit", "fp32", 2, "adamw", "rotary", False, 1)]]


def test_the_rows_cover_all_pairs():
    """Of any two options each value of one meets each value of the other."""
    for one, other in itertools.combinations(VALUES, 2):
        met = {(row[one], row[other]) for row in ROWS}
        assert met == set(itertools.product(VALUES[one], VALUES[other])), (one, other)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def watched(words):
    """Run the program: its exit code, what ran, and how many graphs were compiled.

    What ran is a list of (class, type of its output, were gradients on).
    """
    calls = []
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()

    def look(module, inputs, output):
        if torch.compiler.is_compiling():
            return  # a list that grows would be a reason to compile again at each step
        output = output[0] if isinstance(output, tuple) else output
        calls.append((type(module).__name__, str(output.dtype)[6:], torch.is_grad_enabled()))

    handle = register_module_forward_hook(look)
    code = gpt.main(words)
    handle.remove()
    return code, calls, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def command(processes, capsys, *words):
    """Run it here, or as torchrun's two processes: what it said, what ran, graphs compiled."""
    words = [str(word) for word in words]
    if processes == 1:
        capsys.readouterr()
        code, calls, graphs = watched(words)
        assert code == 0
        return capsys.readouterr().out, calls, graphs
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        [str(Path(gpt.__file__).parent), str(Path(__file__).parent)])}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         __file__, *words], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    (calls, graphs), other = (json.loads(Path(f"{rank}.json").read_text()) for rank in (0, 1))
    assert other[1] == graphs and [call for call in other[0] if call[2]] == [
        call for call in calls if call[2]]  # both have trained alike
    return done.stdout, [tuple(call) for call in calls], graphs


def train(folder, name, row, steps, capsys):
    """The real command with the row's options; returns what the resume file holds, and all else."""
    flags = dict(tokenizer="char" if row["tokenizer"] == "char" else folder / "bpe",
                 attention=row["attention"], precision=row["precision"],
                 gradient_accumulation_steps=row["passes"], optimizer=row["optimizer"],
                 positions=row["positions"], n_layer=1, n_head=2, n_embd=16, block_size=8,
                 batch_size=4, max_iters=steps, eval_interval=2, eval_tokens=64, dropout=0.1,
                 schedule="constant", learning_rate=2e-3, device="cpu", data="text.txt",
                 ckpt=f"{name}.pt")
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    seen = command(row["processes"], capsys, "--train", *words, *["--compile"] * row["compile"])
    return torch.load(f"{name}.resume.pt", weights_only=True), seen


def check_row(row, run, seen, steps):
    """Fails if an option was ignored: by what was stored, by what ran, by what was said."""
    (out, calls, graphs), config = seen, run["hyperparameters"]
    trained = [(module, kind) for module, kind, learns in calls if learns]
    assert run["tokenizer"] == row["tokenizer"]
    assert config["vocab_size"] == len(run["stoi"])
    assert (len(run["stoi"]) == 700) == (row["tokenizer"] == "bpe")
    assert config["attention"] == row["attention"]
    assert ("Head" in [module for module, *_ in calls]) == (row["attention"] == "explicit")
    types = dict(fp32="float32", bf16="bfloat16", fp16="float16")
    assert f" in {types[row['precision']]}, " in out and f"on {row['processes']} x cpu" in out
    assert bool(run["scaler"]) == (row["precision"] == "fp16")
    assert run["train_config"]["compile"] == row["compile"] and (graphs > 0) == row["compile"]
    assert "torch.compile failed" not in out
    if not row["compile"]:  # compiled, the modules are no more to be seen
        assert {kind for module, kind in trained if module == "Linear"} == {types[row["precision"]]}
        forward = [module for module, _ in trained].count("GPTLanguageModel")
        assert forward == (steps + 2) * row["passes"]  # with two trial steps
    per_step = 4 * 8 * row["passes"] * row["processes"]
    assert run["history"][-1]["tokens"] == run["iteration"] * per_step
    muon = row["optimizer"] == "muon"
    assert len(run["optimizers"]) == 1 + muon and f"optimizer {row['optimizer']};" in out
    assert ("momentum_buffer" in run["optimizers"][-1]["state"][0]) == muon
    assert ("position_embedding.weight" in run["model_state_dict"]) == (
        row["positions"] == "learned")
    assert all(weight.dtype == torch.float32 for weight in run["model_state_dict"].values())
    assert not [name for name in run["model_state_dict"] if "_orig_mod" in name]


def losses(run):
    return [row[name] for row in run["history"] for name in ("train_loss", "val_loss")]


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_a_run_uses_all_its_options(folder, bpe_folder, capsys, row):
    """Train and save; do it again, stop half-way and go on; write."""
    if row["compile"] and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("no C++ compiler")
    shutil.copytree(bpe_folder, folder / "bpe")
    run, seen = train(folder, "run", row, 6, capsys)
    check_row(row, run, seen, 6)
    assert run["iteration"] == 6 and losses(run)[-1] < losses(run)[1]
    if row["compile"] and row["processes"] == 1:
        plain, _ = train(folder, "plain", row | {"compile": False}, 6, capsys)
        assert losses(run) == pytest.approx(losses(plain), abs=1e-4)  # sums in another order
    train(folder, "half", row, 4, capsys)
    (folder / "bpe").rename(folder / "gone")  # its tokens are in the file
    seen = command(row["processes"], capsys, *"--train --resume --ckpt half.pt".split(),
                   "--max_iters", 6)
    other = torch.load("half.resume.pt", weights_only=True)
    check_row(row, other, seen, 2)
    assert losses(run) == losses(other)  # it is the same run, to the bit
    for name, weight in run["model_state_dict"].items():
        assert torch.equal(weight, other["model_state_dict"][name]), name
    texts = []
    for attention in ("fused", "explicit"):
        out, calls, _ = command(1, capsys, *"--sample --ckpt run.pt --seed 1".split(), "--prompt",
                                "the cat", "--max_new_tokens", 20, "--attention", attention)
        texts.append(out)
        assert ("Head" in [module for module, *_ in calls]) == (attention == "explicit")
    assert texts[0] == texts[1] and texts[0].startswith("the cat") and len(texts[0]) > 20


if __name__ == "__main__":  # one of torchrun's processes
    exit_code, *all_seen = watched(sys.argv[1:])
    Path(f"{os.environ['RANK']}.json").write_text(json.dumps(all_seen))
    sys.exit(exit_code)
