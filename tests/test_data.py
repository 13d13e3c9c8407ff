"""From a text to batches of token ids, and the loss that is measured on them."""
import hashlib
import http.server
import socket
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, run

import gpt

TINY = ("--train --n_layer 1 --n_head 2 --n_embd 16 --block_size 8 --batch_size 4 --max_iters 3 "
        "--eval_interval 3 --eval_tokens 256 --optimizer adamw --device cpu --ckpt run.pt").split()


@pytest.fixture(autouse=True)
def folder(empty_folder, short_samples):
    """An empty folder of its own for every test."""
    return empty_folder


def refusal(capsys, *words):
    """The one sentence with which a command is refused; no model may be left behind."""
    capsys.readouterr()
    assert run(*words) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("gpt.py: ")]
    assert len(lines) == 1 and err.rstrip().endswith(lines[0]) and "Traceback" not in err, err
    assert not list(Path().glob("run*"))
    return lines[0]


def tiny_model(vocab_size, **more):
    """A model of one block with weights that are all at work."""
    torch.manual_seed(0)
    model = gpt.GPTLanguageModel(gpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8,
                                               vocab_size=vocab_size, **more))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def vocabulary(folder):
    """A folder with the vocab.json and merges.txt of a small byte-pair encoding, and its size."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=280, show_progress=False)
    (folder / "bpe").mkdir()
    bpe.save_model(str(folder / "bpe"))
    return folder / "bpe", bpe.get_vocab_size()


# -------------------------------------------------------------------------------------- the split
def test_the_last_tenth_is_for_validation(folder):
    """Nine tenths train, the last tenth validates, and together they are the text."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer, train, val, about = gpt.load_data("text.txt", "char")
    assert len(train) == int(0.9 * len(TEXT)) and len(train) + len(val) == len(TEXT)
    assert tokenizer.decode(train) + tokenizer.decode(val) == TEXT
    assert "text.txt" in about


@pytest.mark.parametrize("count, dtype", [(2, np.uint8), (256, np.uint8), (257, np.uint16),
                                          (3000, np.uint16)])
def test_ids_are_of_the_smallest_integer_type(folder, count, dtype):
    """A byte per token where 256 ids are enough, else two."""
    text = "".join(map(chr, range(0x4E00, 0x4E00 + count))) * 2
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenizer, train, val, _ = gpt.load_data("text.txt", "char")
    assert train.dtype == val.dtype == dtype
    assert tokenizer.decode(train) + tokenizer.decode(val) == text


# ---------------------------------------------------------------------------------------- batches
def test_a_batch_has_the_shapes_it_says_and_y_is_one_later():
    """x and y are (B, T) of int64, and y is what follows each x."""
    data = np.arange(1000, 1200).astype(np.uint16)
    x, y = gpt.get_batch(data, 8, 5, torch.Generator().manual_seed(1))
    assert x.shape == y.shape == (5, 8) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1) and len(set(x[:, 0].tolist())) > 1


def test_batches_start_at_every_possible_place_and_nowhere_else():
    """Both the first and the last passage come up, and none runs past the end."""
    data = np.arange(12, dtype=np.uint8)
    x, y = gpt.get_batch(data, 8, 400, torch.Generator().manual_seed(1))
    assert set(x[:, 0].tolist()) == {0, 1, 2, 3} and int(y.max()) == 11
    counts = np.bincount(x[:, 0].numpy())
    assert counts.min() > 60  # evenly: 100 each
    x, y = gpt.get_batch(data[:9], 8, 3)
    assert x.tolist() == [list(range(8))] * 3 and y.tolist() == [list(range(1, 9))] * 3


def test_a_generator_decides_the_batch():
    """The same generator state gives the same batch, whatever the global generator does."""
    data = np.arange(200, dtype=np.uint8)
    torch.manual_seed(1)
    first = gpt.get_batch(data, 8, 4, torch.Generator().manual_seed(3))[0]
    torch.manual_seed(2)
    again = gpt.get_batch(data, 8, 4, torch.Generator().manual_seed(3))[0]
    other = gpt.get_batch(data, 8, 4, torch.Generator().manual_seed(4))[0]
    assert torch.equal(first, again) and not torch.equal(first, other)


# --------------------------------------------------------------------------------- estimate_loss
def test_estimate_loss_is_the_mean_over_all_windows():
    """With enough max_tokens it is the mean loss over the whole split, window by window."""
    data = np.random.default_rng(0).integers(0, 11, 500).astype(np.uint8)
    model = tiny_model(11).eval()
    losses = []
    for start in range(0, len(data) - 8, 8):
        window = torch.from_numpy(data[start : start + 9].astype(np.int64))
        losses.append(model(window[None, :-1], window[None, 1:])[1].item())
    assert len(losses) == 62 and max(losses) - min(losses) > 0.1
    for most in (None, 500, 10**9):
        assert gpt.estimate_loss(model, data, most) == pytest.approx(np.mean(losses), abs=1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 8, 40, 64, 160])
def test_estimate_loss_reads_no_more_than_it_may(monkeypatch, tokens):
    """max_tokens limits what is read, to within one context, spread over the whole split."""
    starts, real = [], gpt.get_batch

    def spy(*args, **kwargs):
        starts.extend(int(start) for start in kwargs["starts"])
        return real(*args, **kwargs)

    monkeypatch.setattr(gpt, "get_batch", spy)
    data = np.random.default_rng(0).integers(0, 11, 500).astype(np.uint8)
    gpt.estimate_loss(tiny_model(11), data, tokens)
    assert 1 <= len(starts) == len(set(starts)) <= tokens / 8 + 1
    if tokens >= 40:
        assert min(starts) < 100 and 400 < max(starts) <= 500 - 9


def test_estimate_loss_is_fixed_and_changes_nothing():
    """Twice the same, whatever the generators and the mode are; both stay as they were."""
    data = np.random.default_rng(0).integers(0, 11, 300).astype(np.uint8)
    model = tiny_model(11, dropout=0.5)
    values = []
    for mode, seed in ((True, 1), (True, 2), (False, 3)):
        model.train(mode)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        values.append(gpt.estimate_loss(model, data, 100))
        assert model.training is mode and all(m.training is mode for m in model.modules())
        assert torch.equal(torch.get_rng_state(), before)
    assert values[0] == values[1] == values[2]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_small_eval_tokens_is_small_for_both_splits(folder, monkeypatch, tokens):
    """--eval_tokens limits the reading of the training split too, at its smallest values too."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    read, real = [], gpt.get_batch

    def spy(data, block_size, batch_size, *args, **kwargs):
        if kwargs.get("starts") is not None:
            read.append(batch_size)
        return real(data, block_size, batch_size, *args, **kwargs)

    monkeypatch.setattr(gpt, "get_batch", spy)
    assert run(*TINY, "--data", "text.txt", "--eval_tokens", tokens) == 0
    assert 0 < sum(read) <= 8  # two evaluations of two splits


# ---------------------------------------------------------------------------------- kinds of files
def test_a_folder_of_texts_is_read_in_the_order_of_names(folder):
    """All its .txt files, sorted, with nothing else."""
    (folder / "texts").mkdir()
    for name, text in (("b.txt", "second "), ("a.txt", "first "), ("c.md", "NOT"), ("d.txt", TEXT)):
        (folder / "texts" / name).write_text(text, encoding="utf-8")
    tokenizer, train, val, _ = gpt.load_data("texts", "char")
    whole = tokenizer.decode(train) + tokenizer.decode(val)
    assert "".join(whole.split()) == "".join(("first second " + TEXT).split())
    assert "N" not in tokenizer.stoi


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_marks_and_line_ends_of_other_systems_leave_no_trace(folder, mark, newline):
    """A byte-order mark and \\r\\n never become tokens."""
    (folder / "text.txt").write_bytes(mark + TEXT.encode().replace(b"\n", newline))
    tokenizer, train, val, _ = gpt.load_data("text.txt", "char")
    assert tokenizer.decode(train) + tokenizer.decode(val) == TEXT
    assert not {"\ufeff", "\r"} & tokenizer.stoi.keys()


def test_any_script_can_be_learnt(folder):
    """Characters inside and outside the basic plane come back as they were."""
    text = "Füße, Ёлка, 你好, 😀🎭\x00\u2028\n" * 30
    (folder / "text.txt").write_text(text, encoding="utf-8", newline="")
    tokenizer, train, val, _ = gpt.load_data("text.txt", "char")
    assert tokenizer.decode(np.concatenate((train, val))) == text


@pytest.mark.parametrize("name, content", [
    ("latin.txt", "Füße ".encode("latin-1") * 100), ("utf16.txt", ("Füße " * 100).encode("utf-16")),
    ("empty.txt", b""), ("mark.txt", b"\xef\xbb\xbf"), ("short.txt", b"ten chars!"),
    ("one.txt", b"x"), ("validate.txt", b"ab" * 40), ("missing.txt", None), ("no/dir.txt", None)])
def test_a_text_that_cannot_be_used_is_named(capsys, folder, name, content):
    """One sentence that names the file, before anything is written."""
    if content is not None:
        (folder / name).write_bytes(content)
    assert Path(name).name in refusal(capsys, *TINY, "--data", name)


def test_a_folder_without_texts_is_named(capsys, folder):
    """An empty folder gets a sentence too."""
    (folder / "hollow").mkdir()
    assert "hollow" in refusal(capsys, *TINY, "--data", "hollow")


def test_the_shortest_text_that_is_enough_is_enough(folder):
    """Each split needs one passage and the token after it; one less is refused (above)."""
    (folder / "text.txt").write_text("ab" * 45, encoding="utf-8")  # 81 and 9
    assert run(*TINY, "--data", "text.txt") == 0


# ------------------------------------------------------------------------ byte pairs, train.bin
def test_a_text_can_be_cut_into_byte_pairs(folder, vocabulary):
    """--tokenizer takes a folder: fewer tokens than characters, and the same text again."""
    path, size = vocabulary
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer, train, val, _ = gpt.load_data("text.txt", str(path))
    assert tokenizer.vocab_size == size and train.dtype == np.uint16
    assert len(train) + len(val) < len(TEXT) / 2
    assert tokenizer.decode(train) + tokenizer.decode(val) == TEXT


def binary_folder(path, train, val, dtype=np.uint16):
    """A folder as nanoGPT's prepare.py writes it."""
    path.mkdir(exist_ok=True)
    np.array(train, dtype).tofile(path / "train.bin")
    np.array(val, dtype).tofile(path / "val.bin")


def test_train_bin_is_mapped_not_read(folder, vocabulary):
    """nanoGPT's files stay on disk: they are memory maps, and both splits are as they were cut."""
    path, size = vocabulary
    binary_folder(folder / "bin", np.arange(1000) % size, np.arange(90) % 7)
    tokenizer, train, val, _ = gpt.load_data("bin", str(path))
    assert isinstance(train, np.memmap) and isinstance(val, np.memmap)
    assert tokenizer.kind == "bpe" and not train.flags.writeable
    assert train.tolist() == [i % size for i in range(1000)] and val[:8].tolist()[-1] == 0
    x, y = gpt.get_batch(train, 8, 4, torch.Generator().manual_seed(0))
    assert x.dtype == torch.int64 and torch.equal(y % size, (x + 1) % size)


def test_train_bin_trains_and_the_vocabulary_goes_into_the_checkpoint(folder, capsys, vocabulary):
    """After training on ids, sampling needs neither the vocabulary's files nor a network."""
    path, size = vocabulary
    binary_folder(folder / "bin", np.arange(2000) % size, np.arange(400) % size)
    assert run(*TINY, "--data", "bin", "--tokenizer", path) == 0
    for file in path.iterdir():
        file.unlink()
    assert gpt.load_checkpoint("run.pt")[0].config.vocab_size == size
    capsys.readouterr()
    assert run("--sample", "--ckpt", "run.pt", "--prompt", "the cat", "--max_new_tokens", 5) == 0
    assert capsys.readouterr().out.startswith("the cat")


@pytest.mark.parametrize("bad", ["train.bin", "val.bin"])
def test_ids_beyond_the_vocabulary_get_a_sentence(capsys, folder, vocabulary, bad):
    """A train.bin that another tokenizer wrote is told, not indexed out of range."""
    path, size = vocabulary
    ids = {"train.bin": np.arange(2000) % size, "val.bin": np.arange(400) % size}
    ids[bad] = ids[bad] + 30_000
    binary_folder(folder / "bin", ids["train.bin"], ids["val.bin"])
    assert "bin" in refusal(capsys, *TINY, "--data", "bin", "--tokenizer", path)


@pytest.mark.parametrize("damage", ["no val.bin", "empty train.bin", "empty val.bin", "odd length",
                                    "too short"])
def test_a_damaged_binary_folder_gets_a_sentence(capsys, folder, vocabulary, damage):
    """A missing, empty, odd or short .bin file is told in one sentence."""
    binary_folder(folder / "bin", np.arange(2000) % 100, np.arange(400) % 100)
    if damage == "no val.bin":
        (folder / "bin/val.bin").unlink()
    elif damage == "odd length":
        (folder / "bin/train.bin").write_bytes(b"\0" * 2001)
    else:
        name = "val.bin" if damage == "too short" else damage.split()[1]
        (folder / "bin" / name).write_bytes(b"\0\0" * 5 if damage == "too short" else b"")
    assert "bin" in refusal(capsys, *TINY, "--data", "bin", "--tokenizer", vocabulary[0])


def test_a_character_model_does_not_take_byte_pair_ids_for_characters(capsys, folder):
    """--init_from a character model on a train.bin is refused."""
    gpt.save_checkpoint("char.pt", tiny_model(3), gpt.CharTokenizer.from_text("abc"))
    binary_folder(folder / "bin", np.arange(2000) % 200, np.arange(400) % 200)
    refusal(capsys, *TINY[:1], "--init_from", "char.pt", "--data", "bin", "--ckpt", "run.pt",
            "--device", "cpu", "--max_iters", 2)


@pytest.mark.parametrize("name", ["nowhere", "empty", "vocab.json"])
def test_a_vocabulary_that_is_not_there_gets_a_sentence(capsys, folder, name):
    """A wrong --tokenizer says which files to put where."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "vocab.json").write_text("{}")
    message = refusal(capsys, *TINY, "--data", "text.txt", "--tokenizer", name)
    assert "vocab.json" in message and "merges.txt" in message


# ------------------------------------------------------------------------------------- downloading
@pytest.fixture
def server(monkeypatch):
    """A local web server: .content is what it sends, .cut how much of it, .hits how often."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            site.hits += 1
            self.send_response(site.status)
            self.send_header("Content-Length", str(len(site.content)))
            self.end_headers()
            self.wfile.write(site.content[: site.cut])

        def log_message(self, *args):
            pass

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.content, site.cut, site.hits, site.status = TEXT.encode(), None, 0, 200
    thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(gpt, "SHAKESPEARE", f"http://127.0.0.1:{site.server_port}/input.txt")
    monkeypatch.setattr(gpt, "SHAKESPEARE_SHA256", hashlib.sha256(site.content).hexdigest())
    monkeypatch.setattr(gpt, "HERE", Path.cwd())
    yield site
    site.shutdown()
    site.server_close()
    thread.join()


def test_the_address_and_checksum_of_tiny_shakespeare_are_the_known_ones():
    """Whoever changes them should notice."""
    assert gpt.SHAKESPEARE.endswith("/karpathy/char-rnn/master/data/tinyshakespeare/input.txt")
    assert gpt.SHAKESPEARE.startswith("https://")
    assert gpt.SHAKESPEARE_SHA256 == ("86c4e6aa9db7c042ec79f339dcb96d42"
                                      "b0075e16b8fc2e86bf0ca57e2dc565ed")


def test_shakespeare_is_downloaded_once(server):
    """The second time the file that was kept is read."""
    for _ in range(2):
        tokenizer, train, val, _ = gpt.load_data("shakespeare", "char")
        assert tokenizer.decode(train) + tokenizer.decode(val) == TEXT
        assert server.hits == 1


@pytest.mark.parametrize("fault", ["another file", "cut short", "not found", "nobody there"])
def test_a_failed_download_leaves_nothing(capsys, folder, server, monkeypatch, fault):
    """One sentence that says where to get the file, no partial file, and a later try works."""
    good = gpt.SHAKESPEARE
    server.content = b"<html>Please log in</html>" if fault == "another file" else server.content
    server.cut = 700 if fault == "cut short" else None
    server.status = 404 if fault == "not found" else 200
    if fault == "nobody there":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        monkeypatch.setattr(gpt, "SHAKESPEARE", f"http://127.0.0.1:{port}/input.txt")
    message = refusal(capsys, *TINY, "--data", "shakespeare")
    assert gpt.SHAKESPEARE in message and "--data" in message
    assert not list(folder.iterdir())
    server.content, server.cut, server.status = TEXT.encode(), None, 200
    monkeypatch.setattr(gpt, "SHAKESPEARE", good)
    assert run(*TINY, "--data", "shakespeare") == 0


# -------------------------------------------------------------------- going on with another text
def fine_tune(text, tied, learning_rate=0):
    """A model of 'abc...' and what --init_from makes of it on another text."""
    tokenizer = gpt.CharTokenizer.from_text("abcdefgh \n")
    model = tiny_model(tokenizer.vocab_size, tie_weights=tied)
    gpt.save_checkpoint("old.pt", model, tokenizer)
    Path("new.txt").write_text(text, encoding="utf-8")
    gpt.train(init_from="old.pt", data="new.txt", ckpt="new.pt", device="cpu", max_iters=2,
              batch_size=2, optimizer="adamw", learning_rate=learning_rate, eval_tokens=100)
    return model, tokenizer, *gpt.load_checkpoint("new.pt")[:2]


@pytest.mark.parametrize("tied", [True, False])
def test_new_characters_join_the_alphabet(capsys, tied):
    """The old ids and the old logits stay, the new characters come after, and are named."""
    old, alphabet, new, larger = fine_tune("abé ch 你\n" * 40, tied)
    assert list(larger.stoi)[: len(alphabet.stoi)] == list(alphabet.stoi)
    assert {s: larger.stoi[s] for s in alphabet.stoi} == alphabet.stoi
    assert set(larger.stoi) - set(alphabet.stoi) == {"é", "你"}
    assert new.config.vocab_size == larger.vocab_size == len(alphabet.stoi) + 2
    assert (new.lm_head.weight is new.token_embedding.weight) is tied
    ids = torch.from_numpy(alphabet.encode("abcdefgh").astype(np.int64))[None]
    with torch.no_grad():
        before, after = old.eval()(ids)[0], new.eval()(ids)[0]
    assert torch.allclose(before, after[..., : before.size(-1)], atol=1e-6)
    out = capsys.readouterr().out
    assert "é" in out and "你" in out


def test_a_text_without_new_characters_keeps_the_model_as_it_is():
    """Without new characters every weight and the alphabet stay."""
    old, alphabet, new, same = fine_tune("abc hgf\n" * 40, True)
    assert same.stoi == alphabet.stoi and asdict(new.config) == asdict(old.config)
    for name, weight in old.state_dict().items():
        assert torch.equal(weight, new.state_dict()[name]), name


def test_fine_tuning_starts_from_the_model_and_learns():
    """With a learning rate the weights move."""
    old, _, new, _ = fine_tune("abc hgf\n" * 40, True, learning_rate=1e-2)
    assert not torch.equal(old.lm_head.weight, new.lm_head.weight)


@pytest.mark.parametrize("flag", ["--n_layer 2", "--n_embd 32", "--block_size 16",
                                  "--positions learned", "--tokenizer gpt2"])
def test_fine_tuning_refuses_what_contradicts_the_model(capsys, folder, flag):
    """The architecture and the tokenizer come from the checkpoint; another is refused by name."""
    (folder / "text.txt").write_text("abc " * 60, encoding="utf-8")
    gpt.save_checkpoint("old.pt", tiny_model(4), gpt.CharTokenizer.from_text("abc "))
    message = refusal(capsys, "--train", "--init_from", "old.pt", "--data", "text.txt", "--device",
                      "cpu", "--max_iters", 2, "--ckpt", "run.pt", *flag.split())
    assert flag.split()[0] in message
