"""The changes of notes/experiments.md: each applies to gpt.py, trains, and does what it says."""

import importlib.util
import re
import sys
import types

import pytest
import torch
from conftest import ROOT, RUN, stored

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
def changed(folder, no_picture, monkeypatch):
    """changed(diff): gpt.py with this change, as a module; changed() is the unchanged file."""
    def load(diff=""):
        name = "changed" if diff else "unchanged"
        path = folder / f"{name}.py"
        source = (ROOT / "gpt.py").read_text(encoding="utf-8")
        path.write_text(apply(diff, source), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module
    return load

def losses(module):
    """The validation loss before and after 20 steps of a tiny model."""
    name = module.__name__
    module.train(**RUN | dict(n_layer=2, n_embd=32, batch_size=8, max_iters=20, eval_interval=20,
                              ckpt=f"{name}.pt"))
    return [row["val_loss"] for row in stored(f"{name}.resume.pt")["history"]]

@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_change_applies_and_trains(changed, name):
    before, after = losses(changed(EXPERIMENTS[name]))
    assert after < before - 0.1
    _, unchanged = losses(changed())
    assert after != unchanged  # the changed lines are used

def test_without_residual_connections_our_initialisation_never_trains(changed):
    diff = EXPERIMENTS["No residual connections"].split("@@ Block.forward\n")[1]
    before, after = losses(changed(diff))
    assert after == pytest.approx(before, abs=1e-6)

def random_model(module):
    """A tiny model in which each weight has an effect."""
    torch.manual_seed(0)
    model = module.GPTLanguageModel(module.GPTConfig(
        n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=13))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()

@pytest.mark.parametrize("diff, sees", [("", False), (EXPERIMENTS["No mask"], True)],
                         ids=["gpt.py", "no mask"])
def test_without_the_mask_the_first_position_sees_the_last_token(changed, diff, sees):
    model = random_model(changed(diff))
    logits, _ = model(torch.tensor([[1, 2, 3], [1, 2, 4]]))
    assert torch.allclose(logits[0, 0], logits[1, 0]) != sees

def test_grouped_queries_generate_the_same_with_and_without_the_cache(changed):
    module = changed(EXPERIMENTS["Grouped-query attention"])
    model = random_model(module)
    ids = model.generate([1, 2], 8, temperature=0.0)
    for length in range(2, 10):
        assert model(ids[:, :length])[0][0, -1].argmax() == ids[0, length]
    assert module.KVCache(model, 1).keys.size(2) == 1  # half of the heads

def test_the_change_for_weights_and_biases(changed, monkeypatch):
    """With the four lines of the training guide each evaluation is logged (to a stand-in here)."""
    wandb = types.SimpleNamespace(init=lambda **options: logged.append(options["name"]),
                                  log=lambda row, step: logged.append((row["iteration"], step)))
    logged = []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    guide = (ROOT / "notes/training_guide.md").read_text(encoding="utf-8")
    changed(re.search(r"```diff\n(.*?)```", guide, re.DOTALL)[1]).train(**RUN)
    assert logged == ["run", (0, 0), (3, 3), (6, 6)]
