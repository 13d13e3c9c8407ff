"""Section 6 of gpt.py: what a person types, what is printed where, and the exit code."""

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import ROOT, RUN, TEXT, as_flags, stored

import gpt


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
        return capsys.readouterr().out.removesuffix("\n")
    return call


# ---------------------------------------------------------------------------------------- options
@pytest.mark.parametrize("config, mode", [(gpt.TrainConfig, "--train"),
                                          (gpt.SampleConfig, "--sample")])
def test_every_option_is_a_flag(capsys, config, mode):
    """--help shows each with its default; what is typed arrives with its type; --no-NAME works."""
    with pytest.raises(SystemExit):
        gpt.main([mode, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert gpt.parse([mode])[1] == {}  # defaults are the dataclass's own
    for f in fields(config):
        if f.name == "vocab_size":
            assert "--vocab_size" not in text
            continue
        assert f"{f.metadata['help']} [{f.default}]" in text
        if f.type is bool:
            assert gpt.parse([mode, f"--{f.name}"])[1] == {f.name: True}
            assert gpt.parse([mode, f"--no-{f.name}"])[1] == {f.name: False}
        else:
            value = f.metadata["choices"][-1] if f.metadata["choices"] else f.type(7)
            assert gpt.parse([mode, f"--{f.name}", str(value)])[1] == {f.name: value}

@pytest.mark.parametrize("words", [
    "", "--n_layer 3", "train", "--train --n_layers 3", "--train --n_lay 3",
    "--train --n_layer two", "--train --positions none", "--train --temperature 1",
    "--sample --n_layer 3", "--sample --train"])
def test_words_that_are_no_command_are_refused(capsys, words):
    with pytest.raises(SystemExit) as end:
        gpt.parse(words.split())
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------- generation
def test_the_text_is_what_generate_returns(sample):
    model, tokenizer, _ = gpt.load_checkpoint("model.pt")
    options = dict(temperature=0.9, top_k=5, top_p=0.9, repetition_penalty=1.2, seed=3)
    ids = model.generate(tokenizer.encode("the "), 30, **options)
    assert sample("--prompt", "the ", *as_flags(options)) == tokenizer.decode(ids[0])

@pytest.mark.parametrize("words", ["--temperature 2", "--top_k 1", "--top_p 0.01", "--seed 8",
                                   "--repetition_penalty 3"])
def test_no_option_is_ignored(sample, words):
    assert sample("--seed", 7) == sample("--seed", 7)
    assert sample("--seed", 7, *words.split()) != sample("--seed", 7)

def test_head_computes_the_attention_if_asked_for(sample, monkeypatch):
    calls, real = [], gpt.Head.forward
    monkeypatch.setattr(gpt.Head, "forward", lambda *args: calls.append(1) or real(*args))
    expected = sample("--seed", 5)
    assert not calls
    assert sample("--seed", 5, "--attention", "explicit") == expected
    assert calls

def test_newlines_and_tabs_can_be_typed(sample, monkeypatch):
    """The default prompt is a newline, which also stands in for an empty one."""
    assert sample("--seed", 1) == "\n" + sample("--prompt", "", "--seed", 1)
    prompts = []
    monkeypatch.setattr(gpt.CharTokenizer, "encode", lambda self, text: prompts.append(text) or [0])
    sample("--prompt", "DABB:\\n\\tYes\n")
    assert prompts == ["DABB:\n\tYes\n"]

def test_a_prompt_can_come_from_a_file(sample):
    """With a byte-order mark and Windows line ends too. Longer than the context: all is printed."""
    expected = sample("--prompt", "the\ncat", "--seed", 1)
    Path("prompt.txt").write_bytes(b"\xef\xbb\xbfthe\r\ncat")
    assert sample("--prompt_file", "prompt.txt", "--seed", 1) == expected
    assert sample("--prompt_file", "text.txt").startswith(TEXT)

class Console(io.StringIO):
    """A console that shows what was flushed."""
    shown = ""

    def flush(self):
        self.shown = self.getvalue()

def test_text_streams_and_half_a_character_is_never_shown(monkeypatch, bpe):
    """GPT-2's tokens are bytes: an emoji is several. It appears as soon as it is complete."""
    config = gpt.GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=8, vocab_size=50257)
    gpt.save_checkpoint("bpe.pt", gpt.GPTLanguageModel(config), bpe)
    text = " naïve 😀 中文👩‍👧!"
    ids = bpe.encode(text + "😀")[:-1]  # the last character stays incomplete
    console, shown = Console(), []

    def generate(*args):
        for i in ids:
            yield torch.tensor([[i]])
            shown.append(console.shown)  # when the next token is asked for
    monkeypatch.setattr(gpt, "generate_tokens", generate)
    monkeypatch.setattr(sys, "stdout", console)
    gpt.sample(ckpt="bpe.pt", device="cpu", prompt="Hello")
    for n in range(len(ids)):
        so_far = "Hello" + bpe.decode(ids[: n + 1])
        assert shown[n] == so_far or so_far.endswith("\ufffd")
        assert "\ufffd" not in shown[n]
    assert console.getvalue() == "Hello" + text + "\ufffd\n"


# ---------------------------------------------------------------------------- messages, exit codes
def test_out_of_memory_says_what_to_lower(monkeypatch, capsys):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(gpt, "training_step", fail)
    assert gpt.main(["--train", *as_flags(RUN)]) == 2
    error = capsys.readouterr().err
    assert "--batch_size" in error and "Traceback" not in error

@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_training_says_how_to_continue(monkeypatch, capsys, name, code):
    """The exit code is 128 + the number of the signal, as shells have it."""
    monkeypatch.setattr(gpt, "training_step",
                        lambda *args: os.kill(os.getpid(), getattr(signal, name)) or torch.ones(()))
    assert gpt.main(["--train", *as_flags(RUN)]) == code
    out, err = capsys.readouterr()
    assert "--resume" in out and "Traceback" not in err

def test_ctrl_c_while_sampling_is_quiet(monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(gpt, "generate_tokens", interrupt)
    assert gpt.main(["--sample", "--ckpt", "model.pt"]) == 130

def test_an_error_that_nobody_foresaw_shows_its_traceback(monkeypatch):
    """Students change this file and need it."""
    monkeypatch.setattr(gpt, "generate_tokens", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpt.main(["--sample", "--ckpt", "model.pt"])


# ----------------------------------------------------------------- as a program, in its own process
def test_a_log_has_every_line_when_it_is_printed():
    """`python gpt.py --train > log.txt &` while it runs; then SIGTERM."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    flags = as_flags(RUN | dict(max_iters=10**6, eval_interval=10**6))
    with open("log.txt", "w") as log:
        process = subprocess.Popen([sys.executable, ROOT / "gpt.py", "--train", *flags], env=env,
                                   stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not Path("run.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "step      0" in Path("log.txt").read_text()
        process.terminate()
        assert process.wait(120) == 143
    finally:
        process.kill()
    assert "--resume" in Path("log.txt").read_text()
    assert stored()["iteration"] > 0

def test_variables_of_torchrun_without_torchrun_are_ignored():
    """Also: a console that knows ASCII only gets a question mark, not a crash."""
    Path("text.txt").write_text(TEXT.replace("cat", "çät"), encoding="utf-8")
    env = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    command = [sys.executable, ROOT / "gpt.py", "--train", *as_flags(RUN)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0
    assert "?" in done.stdout

def test_the_program_exits_with_the_code_of_main():
    """2 after a mistake, with one line on stderr."""
    command = [sys.executable, ROOT / "gpt.py", "--train", "--data", "nowhere.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert not done.stdout
    assert len(done.stderr.splitlines()) == 1
