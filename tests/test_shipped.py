"""The models that ship: they open safely, are as good as they say, and write."""
import csv
import re

import numpy as np
import pytest
import torch
from conftest import ROOT

import gpt

FOLDER = ROOT / "checkpoints"
PATHS = [FOLDER / "gpt_checkpoint.pt", FOLDER / "shakespeare.pt"]
both = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)


@pytest.fixture
def text(path, play):
    """What the model has read. Tiny Shakespeare isn't in the repository: --data downloads it."""
    if path.stem == "gpt_checkpoint":
        return play
    try:
        return (ROOT / "tinyshakespeare.txt").read_text(encoding="utf-8")
    except FileNotFoundError:
        pytest.skip("tinyshakespeare.txt is not here")


@both
def test_it_is_small_and_opens_without_trust(path):
    """At most 25 MB, weights_only, on a CPU, with nothing that is only for resuming."""
    assert path.stat().st_size < 25e6
    content = torch.load(path, map_location="cpu", weights_only=True)
    assert {"model_state_dict", "hyperparameters", "stoi", "itos"} <= content.keys()
    assert "optimizers" not in content
    assert sum(t.numel() for t in content["model_state_dict"].values()) <= 10_800_000


@both
def test_its_table_names_the_same_loss(path):
    """The best row of the CSV is the step and the loss that the file says it is."""
    _, _, about = gpt.load_checkpoint(path)
    with open(path.with_suffix(".csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    best = min(rows, key=lambda row: float(row["val_loss"]))
    assert float(best["val_loss"]) == about["best"]
    assert int(best["iteration"]) == about["iteration"]


@both
def test_its_loss_is_what_it_claims(path, text):
    """Over the whole validation split."""
    model, tokenizer, about = gpt.load_checkpoint(path)
    loss = gpt.estimate_loss(model, tokenizer.encode(text[int(0.9 * len(text)):]))
    assert abs(loss - about["best"]) < 0.005


@both
def test_it_writes_words_of_the_text(path, text):
    """A few hundred characters: most words exist, and they are not all copied from one place."""
    model, tokenizer, _ = gpt.load_checkpoint(path)
    ids = model.generate(tokenizer.encode("\n"), 400, tokenizer, seed=3)[0]
    written = tokenizer.decode(ids)
    words, known = written.lower().split(), set(text.lower().split())
    assert len(written) == 401 and len(words) > 40
    assert np.mean([word in known for word in words]) > 0.85
    assert written[100:200] not in text


@both
def test_it_writes_speeches(path):
    """Lines that are a name in capitals and a colon, as in both texts; also without the text."""
    model, tokenizer, _ = gpt.load_checkpoint(path)
    ids = model.generate(tokenizer.encode("\n"), 400, tokenizer, seed=3)[0]
    assert re.search(r"\n[A-Z][A-Za-z ]+:\n", tokenizer.decode(ids))


def test_the_long_sample_is_long():
    """10,000 words, and speeches."""
    text = (ROOT / "checkpoints" / "generated_sample.txt").read_text(encoding="utf-8")
    assert len(text.split()) >= 10_000 and text.count(":\n") > 300
