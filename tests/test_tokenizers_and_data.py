"""Section 2 of gpt.py: from a text file to token ids, and to batches of inputs and targets."""

import hashlib
import time
from pathlib import Path

import pytest
import torch
from conftest import TEXT, alphabet

import gpt
from gpt import CharTokenizer, UserError, get_batch, load_data


# ---------------------------------------------------------------------------- characters as tokens
@pytest.mark.parametrize("text", ["hello\n", "Füße, Ёлка, 你好, 😀🎭\u2028\ttab", ""])
def test_characters_are_encoded_and_decoded(text):
    tokenizer = alphabet(text)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.vocab_size == len(set(text))
    assert tokenizer.decode(ids) == tokenizer.decode(torch.tensor(ids)) == text

def test_the_ids_are_those_of_the_dictionary():
    tokenizer = CharTokenizer({"b": 0, "a": 1, "\n": 2})
    assert tokenizer.encode("ab\nb") == [1, 0, 2, 0]
    assert tokenizer.itos == {0: "b", 1: "a", 2: "\n"}

def test_unknown_characters_are_named_in_a_short_message():
    """A model may know 5,000 characters: the unknown ones come first."""
    tokenizer = alphabet(map(chr, range(0x4E00, 0x4E00 + 5000)))
    with pytest.raises(UserError, match="'Helo'.*\u4e00") as error:
        tokenizer.encode("Hello")
    assert len(str(error.value)) < 500


# ------------------------------------------------------------------------------ BPE tokens (GPT-2)
def test_gpt2s_tokens(bpe):
    assert bpe.vocab_size == 50257
    ids = bpe.encode("Hello, I'm a language model,")
    assert ids == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert bpe.encode("<|endoftext|>") == [50256]
    for text in ("", "a  b\n\n\tc", "naïve 你好 😀", TEXT):
        assert bpe.decode(torch.tensor(bpe.encode(text)).int()) == text

def test_a_text_file_in_gpt2s_tokens(folder, bpe):
    tokenizer, train, val = load_data("text.txt", "gpt2")
    assert tokenizer.decode(train) + tokenizer.decode(val) == TEXT
    assert len(train) + len(val) < len(TEXT) / 2


# --------------------------------------------------------------------------------------- load_data
def test_the_last_tenth_is_for_validation(folder):
    tokenizer, train, val = load_data("text.txt", "char")
    assert len(train) == int(0.9 * len(TEXT))
    assert tokenizer.decode(train) + tokenizer.decode(val) == TEXT
    assert list(tokenizer.stoi) == sorted(set(TEXT))  # the same text gives the same ids everywhere

@pytest.mark.parametrize("mark, newline", [(b"", b"\n"), (b"\xef\xbb\xbf", b"\r\n")])
def test_utf8_as_editors_save_it(folder, mark, newline):
    """Windows adds a byte-order mark and has line ends of its own."""
    text = "Füße, Ёлка,\n你好, 😀🎭\n" * 5
    Path("text.txt").write_bytes(mark + text.encode().replace(b"\n", newline))
    tokenizer, train, val = load_data("text.txt", "char")
    assert tokenizer.decode(train) + tokenizer.decode(val) == text

@pytest.mark.parametrize("content", [
    TEXT.encode("utf-16"), TEXT.encode("utf-16-le"), "Füße ".encode("latin-1"), b"a binary\0file"],
    ids=["utf-16", "utf-16 without a mark", "latin-1", "binary"])
def test_other_files_are_refused(folder, content):
    Path("text.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"text\.txt.*UTF-8"):
        load_data("text.txt", "char")

def test_a_tokenizer_keeps_its_ids(folder):
    """For fine-tuning: the ids are those of the model."""
    old = CharTokenizer({character: i for i, character in enumerate("zyx" + "".join(set(TEXT)))})
    tokenizer, train, val = load_data("text.txt", old)
    assert tokenizer is old
    assert train.tolist() + val.tolist() == old.encode(TEXT)

def test_paths(folder, monkeypatch):
    """~ is the home folder. Without a name it is input.txt, the text that comes with gpt.py."""
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    (folder / "input.txt").write_text("abc" * 10)
    assert load_data("~/input.txt", "char")[0].vocab_size == 3
    assert load_data("input.txt", "char")[0].vocab_size == 3
    assert load_data("", "char")[0].vocab_size == 62

def test_shakespeare_is_downloaded_once_and_checked(folder, monkeypatch):
    address = folder / "text.txt"
    monkeypatch.setattr(gpt, "SHAKESPEARE", address.as_uri())
    monkeypatch.setattr(gpt, "SHA256", hashlib.sha256(b"another text").hexdigest())
    with pytest.raises(Exception, match="hash"):
        load_data("shakespeare", "char")
    assert not Path("tinyshakespeare.txt").exists()
    monkeypatch.setattr(gpt, "SHA256", hashlib.sha256(address.read_bytes()).hexdigest())
    load_data("shakespeare", "char")
    address.unlink()  # the second time there is nothing to download
    tokenizer, train, val = load_data("shakespeare", "char")
    assert tokenizer.decode(train) + tokenizer.decode(val) == TEXT

def test_the_shipped_text_is_encoded_quickly():
    start = time.process_time()
    _, train, val = load_data("", "char")
    assert time.process_time() - start < 2  # 0.2 s are usual
    assert len(train) + len(val) > 1_000_000


# --------------------------------------------------------------------------------------- get_batch
def test_the_targets_are_the_inputs_one_position_later():
    data = torch.arange(100, 200, dtype=torch.int32)
    starts = torch.tensor([0, 7, 91, 7])  # 91 is the last possible start of 8 tokens and a target
    x, y = get_batch(data, starts, 8)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x, 100 + starts[:, None] + torch.arange(8))
    assert torch.equal(y, x + 1)
