"""What several test files share: tiny models, the text, and a vocabulary trained on it."""

import os
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # read at import

import pytest
import torch
from hypothesis import configuration, settings
from tokenizers import ByteLevelBPETokenizer

import gpt

torch.set_num_threads(1)  # several tests may share a machine, and one thread sums in one order
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # not here
ROOT = Path(gpt.__file__).resolve().parent


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random numbers, whichever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def play():
    """The text that ships."""
    return (ROOT / "input.txt").read_text(encoding="utf-8")


@pytest.fixture
def make_model():
    """make_model(**config): a tiny model in float64, with weights large enough to tell paths apart.

    A fresh model's scores are almost uniform: there, much that is wrong makes no difference.
    """

    def make(dtype=torch.float64, seed=0, **config):
        sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=13, bias=True,
                     tie_weights=True, activation="gelu")
        torch.manual_seed(seed)
        model = gpt.GPTLanguageModel(gpt.GPTConfig(**sizes | config)).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return model

    return make


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory):
    """A folder with vocab.json and merges.txt, laid out as GPT-2's and trained on input.txt."""
    folder = tmp_path_factory.mktemp("bpe")
    trainer = ByteLevelBPETokenizer()
    trainer.train(str(ROOT / "input.txt"), 700, show_progress=False,
                  special_tokens=["<|endoftext|>"])
    trainer.save_model(str(folder))
    return folder


@pytest.fixture(scope="session")
def bpe(bpe_folder):
    return gpt.BPETokenizer.load(bpe_folder)
