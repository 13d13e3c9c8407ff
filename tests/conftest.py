"""What several test files share: tiny models, the text, and a vocabulary trained on it."""

import os
import random
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # read at import
# Most tests compare bits, which a GPU doesn't repeat: it is hidden unless TEST_GPU names one.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_GPU", "")

import pytest
import torch
from hypothesis import configuration, settings
from tokenizers import ByteLevelBPETokenizer
from torch.optim.optimizer import register_optimizer_step_post_hook

import gpt

torch.set_num_threads(1)  # several tests may share a machine, and one thread sums in one order
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # not here
ROOT = Path(gpt.__file__).resolve().parent
WORDS = "the cat sat on a mat and ran to her hat\n".split(" ")
TEXT = " ".join(random.Random(0).choices(WORDS, k=600))


def run(*words):
    """The exit code of a command; argparse leaves by SystemExit."""
    try:
        return gpt.main([str(word) for word in words])
    except SystemExit as end:
        return end.code


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random numbers, whichever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """A folder of its own for a test to work in; curves are not drawn."""
    monkeypatch.chdir(tmp_path)
    picture = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(picture, lambda self, file, **how: file.write(b"picture"))
    return tmp_path


@pytest.fixture
def short_samples(monkeypatch):
    """What a run shows of its writing is three tokens long."""
    generate = gpt.GPTLanguageModel.generate
    monkeypatch.setattr(gpt.GPTLanguageModel, "generate", lambda self, idx, n=3, *args, **how:
                        generate(self, idx, min(n, 3), *args, **how))


@pytest.fixture
def at_step():
    """at_step(n, action): call action in the n-th step from now, once AdamW has stepped."""
    handles = []

    def plan(n, action):
        count = 0

        def hook(optimizer, args, kwargs):
            nonlocal count
            count += isinstance(optimizer, torch.optim.AdamW)
            if count == n and isinstance(optimizer, torch.optim.AdamW):
                count += 1000  # once only, whatever the action runs
                action()

        handles.append(register_optimizer_step_post_hook(hook))

    yield plan
    for handle in handles:
        handle.remove()


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
