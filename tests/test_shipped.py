"""The model that ships: it opens safely, is as good as it says, and writes."""
import csv

import numpy as np
import torch
from conftest import ROOT

import gpt

PATH = ROOT / "checkpoints" / "gpt_checkpoint.pt"


def test_it_is_small_and_opens_without_trust():
    """At most 25 MB, weights_only, on a CPU, with nothing that is only for resuming."""
    assert PATH.stat().st_size < 25e6
    content = torch.load(PATH, map_location="cpu", weights_only=True)
    assert {"model_state_dict", "hyperparameters", "stoi", "itos"} <= content.keys()
    assert "optimizers" not in content
    assert sum(t.numel() for t in content["model_state_dict"].values()) <= 10_800_000


def test_its_loss_is_what_it_claims(play):
    """Over the whole validation split; the table beside it names the same loss as the best."""
    model, tokenizer, about = gpt.load_checkpoint(PATH)
    loss = gpt.estimate_loss(model, tokenizer.encode(play[int(0.9 * len(play)):]))
    assert abs(loss - about["best"]) < 0.005
    with open(PATH.with_suffix(".csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    best = min(rows, key=lambda row: float(row["val_loss"]))
    assert float(best["val_loss"]) == about["best"]
    assert int(best["iteration"]) == about["iteration"]


def test_it_writes_words_of_the_text(play):
    """A few hundred characters: most words exist, and they are not all copied from one place."""
    model, tokenizer, _ = gpt.load_checkpoint(PATH)
    ids = model.generate(tokenizer.encode("\n"), 400, tokenizer, seed=3)[0]
    text = tokenizer.decode(ids)
    words, known = text.lower().split(), set(play.lower().split())
    assert len(text) == 401 and len(words) > 40
    assert np.mean([word in known for word in words]) > 0.85
    assert text[100:200] not in play


def test_the_long_sample_is_long():
    """10,000 words, and speeches."""
    text = (ROOT / "checkpoints" / "generated_sample.txt").read_text(encoding="utf-8")
    assert len(text.split()) >= 10_000 and text.count(":\n") > 300
