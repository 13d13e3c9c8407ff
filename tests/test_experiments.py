"""The changes of notes/experiments.md: each applies to gpt.py, trains, and does what it says."""

import csv
import importlib.util
import re
import sys

import pytest
import torch
from conftest import ROOT, TINY

NOTE = (ROOT / "notes/experiments.md").read_text(encoding="utf-8")
EXPERIMENTS = dict(re.findall(r"## \d\. ([^\n]+)\n.*?```diff\n(.*?)```", NOTE, re.DOTALL))


def apply(diff, source):
    """Replace the lines of each hunk. What a hunk replaces must occur exactly once in the file.
    Comments do not count: they are removed first."""
    source = re.sub(r"^ *#.*\n|  #.*$", "", source, flags=re.MULTILINE)
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        # Lines that are next to each other in a hunk may be apart in the file: a change is a run
        # of removed lines and the added lines after it. A context line stands on both sides.
        for change in re.findall(r"(?:^[- ].*\n)+(?:^\+.*\n)*", hunk, flags=re.MULTILINE):
            lines = change.splitlines(keepends=True)
            old = "".join([line[1:] for line in lines if line[0] in "- "])
            new = "".join([line[1:] for line in lines if line[0] in "+ "])
            assert source.count(old) == 1, f"gpt.py has {source.count(old)} times:\n{old}"
            source = source.replace(old, new)
    return source


@pytest.fixture
def changed(folder):
    """changed(diff): gpt.py with this change, as a module; changed() is the unchanged file."""
    names = []

    def load(diff=""):
        path = folder / f"experiment_{len(names)}.py"
        source = (ROOT / "gpt.py").read_text(encoding="utf-8")
        path.write_text(apply(diff, source), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        names.append(path.stem)
        spec.loader.exec_module(module)
        return module
    yield load
    for name in names:
        del sys.modules[name]


def losses(module):
    """The validation loss before and after 20 steps of a tiny model."""
    options = TINY | dict(data="text.txt", device="cpu", n_layer=2, n_embd=32, batch_size=8,
                          max_iters=20, eval_interval=20)
    module.train(**options, ckpt=f"{module.__name__}.pt")
    with open(f"{module.__name__}.csv", encoding="utf-8") as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file)]


def test_the_note_has_eight_experiments():
    assert len(EXPERIMENTS) == 8


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_change_applies_and_trains(changed, name):
    added = re.findall(r"^\+", EXPERIMENTS[name], re.MULTILINE)
    assert len(added) <= 10
    before, after = losses(changed(EXPERIMENTS[name]))
    assert after < before - 0.1
    _, unchanged = losses(changed())
    assert after != unchanged  # the changed lines are used


def test_without_residual_connections_our_initialisation_never_trains(changed):
    diff = EXPERIMENTS["No residual connections"].split("@@ Block.forward\n")[1]
    before, after = losses(changed(diff))
    assert after == pytest.approx(before, abs=1e-6)


def logits(module, ids):
    torch.manual_seed(0)
    model = module.GPTLanguageModel(module.GPTConfig(
        n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=13)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return model(torch.tensor([ids]))[0][0]


def test_without_the_mask_the_first_position_sees_the_last_token(changed):
    module = changed(EXPERIMENTS["No mask"])
    assert not torch.allclose(logits(module, [1, 2, 3])[0], logits(module, [1, 2, 4])[0])
    module = changed()
    assert torch.equal(logits(module, [1, 2, 3])[0], logits(module, [1, 2, 4])[0])


def test_grouped_queries_generate_the_same_with_and_without_the_cache(changed):
    module = changed(EXPERIMENTS["Grouped-query attention"])
    torch.manual_seed(0)
    config = module.GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=13)
    model = module.GPTLanguageModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = model.generate([1, 2], 8, temperature=0.0)
    for length in range(2, 10):
        assert model(ids[:, :length])[0][0, -1].argmax() == ids[0, length]
    assert module.KVCache(model, 1).store.size(3) == 1  # half of the heads
