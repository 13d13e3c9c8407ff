"""Options that meet one another: each pair of values in at least one run of the real program."""
import itertools
import shutil

import pytest
import torch
from conftest import TEXT
from torch.nn.modules.module import register_module_forward_hook

import gpt

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VALUES = {"tokenizer": ("char", "bpe"), "attention": ("fused", "explicit"),
          "precision": ("fp32", "bf16", "fp16"), "passes": (1, 2), "resume": (False, True),
          "optimizer": ("adamw", "muon"), "positions": ("rotary", "learned")}
ROWS = [
    ("char", "fused", "fp32", 1, False, "adamw", "rotary"),
    ("bpe", "explicit", "fp32", 2, True, "muon", "learned"),
    ("char", "explicit", "bf16", 1, True, "muon", "rotary"),
    ("bpe", "fused", "bf16", 2, False, "adamw", "learned"),
    ("char", "fused", "fp16", 2, True, "adamw", "rotary"),
    ("bpe", "explicit", "fp16", 1, False, "muon", "learned"),
    ("bpe", "explicit", "fp32", 1, True, "adamw", "rotary"),
    ("char", "fused", "fp32", 2, False, "muon", "learned"),
]


def test_the_rows_cover_all_pairs():
    """Of any two options each value of one meets each value of the other."""
    for (i, one), (j, other) in itertools.combinations(enumerate(VALUES.values()), 2):
        assert {(row[i], row[j]) for row in ROWS} == set(itertools.product(one, other)), (i, j)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


@pytest.fixture
def calls():
    """What ran: (class, type of its output, whether gradients were on), call by call."""
    seen = []

    def look(module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        seen.append((type(module), output.dtype, torch.is_grad_enabled()))

    handle = register_module_forward_hook(look)
    yield seen
    handle.remove()


def train(folder, name, row, steps, *words):
    """The real command with the row's options; returns what the resume file holds."""
    tokenizer, attention, precision, passes, _, optimizer, positions = row
    flags = dict(tokenizer="char" if tokenizer == "char" else folder / "bpe", attention=attention,
                 precision=precision, gradient_accumulation_steps=passes, optimizer=optimizer,
                 positions=positions, n_layer=1, n_head=2, n_embd=16, block_size=8, batch_size=4,
                 max_iters=steps, eval_interval=2, eval_tokens=64, schedule="constant", dropout=0.1,
                 device="cpu", data="text.txt", ckpt=f"{name}.pt")
    flags = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    assert gpt.main(["--train", *flags, *words]) == 0
    return torch.load(f"{name}.resume.pt", weights_only=True)


def check_row(row, run, calls, steps, out):
    """Fails if an option was ignored: by what was stored, by what ran, by what was said."""
    tokenizer, attention, precision, passes, _, optimizer, positions = row
    trained = [(module, kind) for module, kind, learns in calls if learns]
    assert run["tokenizer"] == tokenizer and (len(run["stoi"]) == 700) == (tokenizer == "bpe")
    assert run["hyperparameters"]["vocab_size"] == len(run["stoi"])
    assert run["hyperparameters"]["attention"] == attention
    assert (gpt.Head in [module for module, _ in trained]) == (attention == "explicit")
    assert str(TYPES[precision])[6:] in out
    assert {kind for module, kind in trained if module is torch.nn.Linear} == {TYPES[precision]}
    assert bool(run["scaler"]) == (precision == "fp16")
    forward = [module for module, _ in trained].count(gpt.GPTLanguageModel)
    assert forward == (steps + 2) * passes  # with two trial steps
    assert run["history"][-1]["tokens"] == run["iteration"] * 4 * passes * 8
    muon = optimizer == "muon" and hasattr(torch.optim, "Muon")
    assert len(run["optimizers"]) == 1 + muon and ("no Muon" in out) == (not muon)
    assert ("momentum_buffer" in run["optimizers"][-1]["state"][0]) == muon
    assert ("position_embedding.weight" in run["model_state_dict"]) == (positions == "learned")
    assert all(weight.dtype == torch.float32 for weight in run["model_state_dict"].values())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row)))
def test_a_run_uses_all_its_options(folder, bpe_folder, calls, capsys, row):
    """Train, save, go on where the row says so, write."""
    shutil.copytree(bpe_folder, folder / "bpe")
    run = train(folder, "run", row, 6)
    check_row(row, run, calls, 6, capsys.readouterr().out)
    history = [loss for line in run["history"] for loss in (line["train_loss"], line["val_loss"])]
    assert run["iteration"] == 6 and history[-1] < history[1]
    if row[4]:  # stopped half-way and resumed, it is the same run, to the bit
        train(folder, "half", row, 4)
        (folder / "bpe").rename(folder / "gone")  # its tokens are in the file
        calls.clear()
        capsys.readouterr()
        assert gpt.main("--train --resume --ckpt half.pt --max_iters 6".split()) == 0
        other = torch.load("half.resume.pt", weights_only=True)
        check_row(row, other, calls, 2, capsys.readouterr().out)
        assert history == [loss for line in other["history"]
                           for loss in (line["train_loss"], line["val_loss"])]
        for name, weight in run["model_state_dict"].items():
            assert torch.equal(weight, other["model_state_dict"][name]), name
    texts = []
    for attention in gpt.GPTConfig.__dataclass_fields__["attention"].metadata["allowed"][:2]:
        calls.clear()
        capsys.readouterr()
        assert gpt.main(["--sample", "--ckpt", "run.pt", "--prompt", "the cat", "--seed", "1",
                         "--max_new_tokens", "20", "--attention", attention]) == 0
        texts.append(capsys.readouterr().out)
        assert (gpt.Head in [module for module, *_ in calls]) == (attention == "explicit")
    assert texts[0] == texts[1] and texts[0].startswith("the cat") and len(texts[0]) > 20


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))),
                    reason="no C++ compiler")
def test_a_compiled_run_uses_all_its_options(folder, bpe_folder, capsys):
    """--compile with all the rest; it ends close to the run without."""
    row = ("bpe", "explicit", "bf16", 2, False, "muon", "learned")
    shutil.copytree(bpe_folder, folder / "bpe")
    plain = train(folder, "plain", row, 4)
    capsys.readouterr()
    run = train(folder, "run", row, 4, "--compile")
    out = capsys.readouterr().out
    if "torch.compile failed" in out:
        pytest.skip(out[out.index("torch.compile failed") :][:200])
    assert run["train_config"]["compile"] and len(run["optimizers"]) == len(plain["optimizers"])
    assert not [name for name in run["model_state_dict"] if "_orig_mod" in name]
    for one, other in zip(run["history"], plain["history"], strict=True):
        assert one["val_loss"] == pytest.approx(other["val_loss"], abs=0.02)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert gpt.main("--sample --ckpt run.pt --max_new_tokens 5".split()) == 0
