"""What a person types, and what comes back: text on stdout, the rest on stderr, an exit code."""
import io
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import TEXT, run

import gpt

TINY = ("--train --n_layer 1 --n_head 2 --n_embd 16 --block_size 8 --batch_size 4 --max_iters 2 "
        "--eval_interval 2 --eval_tokens 99 --optimizer adamw --device cpu --data text.txt").split()
LONG = "a" * 300  # a file system's names have at most 255 letters


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The bytes of a checkpoint that has seen the text a little."""
    path = tmp_path_factory.mktemp("trained")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    gpt.train(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=8, max_iters=60,
              eval_interval=30, eval_tokens=256, learning_rate=1e-2, device="cpu",
              data=str(path / "text.txt"), ckpt=str(path / "model.pt"))
    return (path / "model.pt").read_bytes()


@pytest.fixture(autouse=True)
def folder(empty_folder, trained):
    """A folder of its own for every test, with a text and with model.pt."""
    (empty_folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (empty_folder / "model.pt").write_bytes(trained)
    return empty_folder


@pytest.fixture
def write(capsys):
    """write(words): the text that --sample puts on stdout, without the newline at its end."""
    def call(*words, length=20):
        capsys.readouterr()
        assert run("--sample", "--ckpt", "model.pt", "--max_new_tokens", length, *words) == 0
        out = capsys.readouterr().out
        assert out.endswith("\n")
        return out[:-1]

    return call


@pytest.fixture
def refusal(capsys, folder):
    """refusal(words): the one sentence on stderr; exit code 2, nothing written."""
    def call(*words):
        before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        capsys.readouterr()
        assert run(*words) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("gpt.py: ")]
        assert len(lines) == 1 and err.rstrip().endswith(lines[0]) and "Traceback" not in err, err
        assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
        return lines[0]

    return call


def program(*words, **how):
    """Run gpt.py itself, as a person does."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | how.pop("env", {})
    return subprocess.run([sys.executable, "-B", gpt.__file__, *map(str, words)], env=env,
                          capture_output=True, timeout=120, **how)


# -------------------------------------------------------------------------------------- options
def test_help_names_every_option(capsys):
    """--help lists all flags of both modes with their defaults, and exits with 0."""
    assert run("--help") == 0
    out = capsys.readouterr().out
    for kind in (gpt.GPTConfig, gpt.TrainConfig, gpt.SampleConfig):
        for field in fields(kind):
            assert (f"--{field.name}" in out) == (field.name != "vocab_size"), field.name
    assert "--train" in out and "--sample" in out and str(gpt.TrainConfig.learning_rate) in out


@pytest.mark.parametrize("layers, width", [("--n_layer", "--n_embd"), ("--n-layer", "--n-embd")])
def test_dashes_and_underscores_are_the_same(layers, width):
    """--n-layer is --n_layer."""
    assert run(*TINY, layers, 2, width, 24, "--ckpt", "run.pt") == 0
    config = gpt.load_checkpoint("run.pt")[0].config
    assert (config.n_layer, config.n_embd) == (2, 24)


@pytest.mark.parametrize("flag, name, value", [
    ("--bias", "bias", True), ("--no-bias", "bias", False), ("--tie_weights", "tie_weights", True),
    ("--no-tie_weights", "tie_weights", False), ("--no-tie-weights", "tie_weights", False),
    ("--tie-weights", "tie_weights", True), ("--no-qk-norm", "qk_norm", False)])
def test_switches_can_be_turned_on_and_off(flag, name, value):
    """--bias and --no-bias."""
    assert run(*TINY, flag, "--ckpt", "run.pt") == 0
    assert getattr(gpt.load_checkpoint("run.pt")[0].config, name) is value


@pytest.mark.parametrize("words", [
    "", "--n_layer 3", "--train --sample", "--sample --train", "train", "--train now", "--sampel",
    "--train --n_layers 3", "--train --n_lay 3", "--train --vocab_size 9", "--train --max_iters",
    "--sample --tempature 1", "-x", "--train --temperature 1", "--train --prompt hello",
    "--sample --n_layer 3", "--sample --resume", "--sample --max_iters 5", "--train --beams 2",
    "--sample --learning_rate 1", "--train --interactive", "--sample --compile"])
def test_words_that_make_no_command_are_refused(refusal, words):
    """No mode, both, unknown or cut flags, and flags of the other mode."""
    refusal(*words.split())


def test_a_word_of_several_lines_is_refused_in_one(refusal):
    """As it stands in the message, a newline is a backslash and an n."""
    assert r"'a\nb'" in refusal("--train", "a\nb")


@pytest.mark.parametrize("words", [
    "--n_layer 0", "--n_layer -1", "--n_layer 1.5", "--n_layer two", "--n_head 0", "--n_head 3",
    "--n_embd 15", "--n_embd 18 --n_head 6", "--block_size 0", "--block_size 100000",
    "--dropout 2", "--dropout -0.1", "--dropout 1", "--dropout nan", "--positions sideways",
    "--activation tanh", "--attention none", "--bias maybe", "--device tpu", "--device meta",
    "--precision fp8", "--seed -2", "--seed 1e3", "--preset huge", "--data nowhere.txt",
    "--tokenizer nowhere", "--init_from nowhere.pt", "--max_iters 0", "--max_iters many",
    "--batch_size 0", "--batch_size -4", "--gradient_accumulation_steps 0", "--optimizer sgd",
    "--learning_rate -1", "--learning_rate nan", "--learning_rate inf", "--learning_rate fast",
    "--weight_decay -1",
    "--warmup_iters -1", "--schedule never", "--eval_interval 0", "--eval_tokens 0",
    "--ckpt nowhere/run.pt", "--ckpt text.txt/run.pt", "--ckpt /", "--resume --ckpt never.pt",
    "--batch_size " + "9" * 30, "--n_embd 2" + "0" * 18, "--n_embd 2" + "0" * 30,
    "--seed " + "9" * 30, "--resume --init_from model.pt", f"--data {LONG}", f"--ckpt {LONG}.pt",
    f"--init_from {LONG}", f"--resume --ckpt {LONG}.pt", f"--tokenizer {LONG}"])
def test_bad_values_for_training_are_refused(refusal, words):
    """Out of range, of the wrong type, not dividing, missing: named in a sentence."""
    message = refusal(*TINY, *words.split())
    assert any(word.lstrip("-") in message.replace("-", "_") for word in words.split())


def test_an_empty_name_is_refused(refusal):
    """--ckpt '' and --data ''."""
    refusal(*TINY, "--ckpt", "")
    refusal(*TINY, "--tokenizer", "")


@pytest.mark.parametrize("words", [
    "--ckpt nowhere.pt", "--ckpt text.txt", "--ckpt .", "--max_new_tokens -1", "--temperature -1",
    "--temperature hot", "--temperature nan", "--top_k -3", "--top_p 2", "--top_p -0.1",
    "--top_p nan", "--repetition_penalty 0", "--repetition_penalty -1", "--num_samples 0",
    "--beams 0", "--seed -2", "--seed x", "--device tpu", "--prompt_file nowhere.txt",
    "--prompt_file .", "--prompt a --prompt_file text.txt", "--interactive --prompt a",
    "--interactive --prompt_file text.txt", "--beams 2 --temperature 0.5", "--beams 2 --top_k 5",
    "--beams 2 --top_p 0.5", "--beams 2 --num_samples 2", "--beams 2 --repetition_penalty 1.1",
    "--beams 2 --seed 3", "--seed " + "9" * 20, "--num_samples " + "9" * 30, "--beams " + "9" * 30,
    "--num_samples 1000000000000", "--prompt @", f"--ckpt {LONG}", f"--prompt_file {LONG}"])
def test_bad_values_for_writing_are_refused(refusal, words):
    """Out of range, contradicting, missing: named in a sentence."""
    words = words.split()
    message = refusal("--sample", "--ckpt", "model.pt", *words)
    if words[-1] != "1000000000000":
        assert any(word.lstrip("-") in message.replace("-", "_") for word in words)


@pytest.mark.parametrize("words", [
    "--max_new_tokens 0", "--temperature 0", "--temperature 1e-300", "--temperature 1e12",
    "--top_k 1", "--top_k 1000000", "--top_p 0", "--top_p 1", "--repetition_penalty 1e12",
    "--repetition_penalty 0.01", "--num_samples 3", "--beams 3",
    "--beams 1000", "--stop q", "--seed 0", "--attention explicit", "--max-new-tokens 3"])
def test_the_edges_of_what_is_allowed_work(write, words):
    """The extremes that have a meaning."""
    write(*words.split(), length=12)


def test_a_character_the_model_does_not_know_is_named(refusal):
    """With the alphabet that it does know."""
    message = refusal("--sample", "--ckpt", "model.pt", "--prompt", "the café")
    assert "é" in message and "acdehmnorst" in message


def test_a_text_with_bytes_that_are_not_utf8_in_the_prompt_is_refused(refusal, folder):
    """From a file, and from a terminal of another encoding."""
    (folder / "latin.txt").write_bytes("the café".encode("latin-1"))
    assert "latin.txt" in refusal("--sample", "--ckpt", "model.pt", "--prompt_file", "latin.txt")
    refusal("--sample", "--ckpt", "model.pt", "--prompt", "the caf\udce9")


# -------------------------------------------------------------------------------------- writing
def test_the_text_goes_to_stdout_and_the_rest_to_stderr(capsys):
    """stdout: the prompt and what follows, nothing else. stderr: which model wrote it."""
    words = "--sample --ckpt model.pt --prompt the --max_new_tokens 30 --seed 1".split()
    assert run(*words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("the") and len(out) == len("the") + 30 + 1
    assert set(out) <= set(TEXT)
    loss = gpt.load_checkpoint("model.pt")[2]["best"]
    assert "model.pt" in err and "text.txt" in err and "60" in err and f"{loss:.4f}" in err


def test_the_text_is_what_generate_makes(write):
    """The command and the library agree."""
    model, tokenizer, _ = gpt.load_checkpoint("model.pt")
    ids = model.generate(tokenizer.encode("the "), 25, tokenizer, temperature=0.8, top_p=0.9,
                         top_k=5, repetition_penalty=1.2, seed=3)
    words = "--temperature 0.8 --top_p 0.9 --top_k 5 --repetition_penalty 1.2 --seed 3".split()
    assert write("--prompt", "the ", *words, length=25) == tokenizer.decode(ids[0])


@pytest.mark.parametrize("words", ["--temperature 2", "--top_k 1", "--top_p 0.01",
                                   "--repetition_penalty 3", "--beams 3", "--seed 8", "--stop e"])
def test_no_option_of_writing_is_ignored(write, words):
    """Each gives another text than the same command without it."""
    usual = write("--prompt", "the ", "--seed", 7, length=40)
    words = words.split()
    seed = [] if words[0] in ("--beams", "--seed") else ["--seed", 7]
    assert write("--prompt", "the ", *seed, *words, length=40) != usual


def test_a_seed_gives_the_same_text_whatever_ran_before(write):
    """And another seed another; without one it is new each time."""
    first = write("--seed", 5, length=40)
    torch.manual_seed(123)
    torch.rand(7)
    assert write("--seed", 5, length=40) == first
    assert write("--seed", 6, length=40) != first
    assert write(length=40) != write(length=40)


def test_temperature_zero_is_always_the_same(write):
    """Greedy needs no seed."""
    assert write("--temperature", 0) == write("--temperature", 0) == write("--top_k", 1)


def test_a_prompt_can_come_from_a_file(write, folder):
    """The same as on the command line, with any line ends, and with a byte-order mark."""
    expected = write("--prompt", "the\ncat", "--seed", 1)
    for mark in (b"", b"\xef\xbb\xbf"):
        for newline in (b"\n", b"\r\n"):
            (folder / "prompt.txt").write_bytes(mark + b"the" + newline + b"cat")
            assert write("--prompt_file", "prompt.txt", "--seed", 1) == expected


def test_an_empty_prompt_starts_with_a_newline_unseen(write):
    """No prompt, an empty one, and the newline the library starts with, are the same."""
    model, tokenizer, _ = gpt.load_checkpoint("model.pt")
    expected = tokenizer.decode(model.generate([], 20, tokenizer, temperature=0)[0])
    assert write("--temperature", 0) == write("--prompt", "", "--temperature", 0) == expected[1:]


def test_a_prompt_longer_than_the_context_is_written_out_whole(write):
    """The model looks at the end of it."""
    assert write("--prompt", TEXT[:200], length=5).startswith(TEXT[:200])


@pytest.mark.parametrize("words", ["--temperature 0", "--seed 2", "--beams 2"])
def test_the_text_ends_with_the_stop_text(write, words):
    """At its first place in what is new, and the prompt doesn't count."""
    whole = write("--prompt", "the cat", *words.split(), length=60)
    new = whole[len("the cat") :]
    stop = new[10:12]
    stopped = write("--prompt", "the cat", "--stop", stop, *words.split(), length=60)
    assert stopped == "the cat" + new[: new.index(stop) + len(stop)]
    assert write("--prompt", "the cat", "--stop", "QQ", *words.split(), length=60) == whole


def test_several_samples_differ_and_are_told_apart(write):
    """Three texts, each with the prompt; every one of them stops."""
    texts = write("--prompt", "the ", "--num_samples", 3, "--seed", 1, length=30).split("\n-----")
    assert len(texts) == 3 and texts[0].startswith("the ") and len(set(texts)) == 3
    assert all("the " in text for text in texts)
    whole = write("--prompt", "c", "--num_samples", 3, "--seed", 1, "--stop", "t", length=60)
    texts = [text.lstrip("-\n") for text in whole.split("\n-----")]
    assert all(text[1:].count("t") <= 1 for text in texts)
    assert sum(text.endswith("t") for text in texts) >= 2


def test_the_text_streams(monkeypatch):
    """Each character is flushed as it is made, before the next one is computed."""
    seen, real = [], gpt.GPTLanguageModel.stream

    class Console(io.StringIO):
        def flush(self):
            self.shown = len(self.getvalue())

    def stream(self, *args, **kwargs):
        for token in real(self, *args, **kwargs):
            yield token
            seen.append(console.shown)

    console = Console()
    monkeypatch.setattr(gpt.GPTLanguageModel, "stream", stream)
    monkeypatch.setattr(sys, "stdout", console)
    run("--sample", "--ckpt", "model.pt", "--prompt", "the", "--max_new_tokens", 6)
    assert seen == [4, 5, 6, 7, 8, 9]


def ask(monkeypatch, *lines, encoding="utf-8"):
    """Let stdin hold these lines, as bytes."""
    content = io.BytesIO(b"".join(line + b"\n" for line in lines))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content, encoding=encoding))


def test_interactive_goes_on_from_each_line_until_the_end(monkeypatch, capsys, write):
    """Type a prompt, get a continuation, until Ctrl-D."""
    words = "--sample --ckpt model.pt --interactive --temperature 0 --max_new_tokens 20".split()
    expected = [write("--prompt", prompt, "--temperature", 0) for prompt in ("the cat", "her hat")]
    ask(monkeypatch, b"the cat", b"her hat")
    assert run(*words) == 0
    out = capsys.readouterr().out
    assert out.index(expected[0]) < out.index(expected[1])
    ask(monkeypatch, b"")
    assert run(*words) == 0
    ask(monkeypatch)
    assert run(*words) == 0


@pytest.mark.parametrize("line, encoding", [("the café".encode(), "utf-8"), (b"\xff\xfe", "utf-8"),
                                            ("the café".encode(), "ascii")])
def test_interactive_goes_on_after_a_mistake(monkeypatch, capsys, line, encoding):
    """A character that it doesn't know, or can't even read, is told, and the next prompt works."""
    ask(monkeypatch, line, b"her hat", encoding=encoding)
    assert run("--sample", "--ckpt", "model.pt", "--interactive", "--max_new_tokens", 5) == 0
    out, err = capsys.readouterr()
    assert "her hat" in out and "alphabet" in err and "Traceback" not in err


def test_a_missing_checkpoint_is_not_looked_for_on_the_hub(refusal):
    """Its name may begin with gpt2: only the names of OpenAI's models are fetched."""
    assert "can't be used as a checkpoint" in refusal("--sample", "--ckpt", "gpt2_mine.pt")


def test_weights_too_large_to_reckon_with_get_one_sentence(tmp_path, capsys):
    """Finite, so that the file opens; what they come to is no number any more."""
    tokenizer = gpt.CharTokenizer.from_text("ab\n")
    model = gpt.GPTLanguageModel(gpt.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8,
                                               vocab_size=3))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 1e30)
    gpt.save_checkpoint(tmp_path / "huge.pt", model, tokenizer)
    assert gpt.main(["--sample", "--ckpt", str(tmp_path / "huge.pt")]) == 2
    error = capsys.readouterr().err
    assert "its weights are too large" in error and "Traceback" not in error


def test_ctrl_c_while_writing_is_exit_code_130(monkeypatch, capsys):
    """Without a traceback."""
    def stream(self, *args, **kwargs):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(gpt.GPTLanguageModel, "stream", stream)
    assert run("--sample", "--ckpt", "model.pt") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_checkpoint_is_looked_for_here_and_then_in_the_repository(monkeypatch, capsys, folder):
    """--ckpt NAME is the path as given, else the one in checkpoints/ beside gpt.py."""
    (folder / "repository/checkpoints").mkdir(parents=True)
    (folder / "here").mkdir()
    (folder / "model.pt").rename(folder / "repository/checkpoints/model.pt")
    monkeypatch.setattr(gpt, "HERE", folder / "repository")
    monkeypatch.chdir(folder / "here")
    words = "--sample --ckpt model.pt --max_new_tokens 3".split()
    assert run(*words) == 0
    assert "checkpoints" in capsys.readouterr().err
    Path("model.pt").write_text("mine, but damaged")
    assert run(*words) == 2


def test_options_that_are_not_given_are_left_to_checkpoint_preset_and_default():
    """train() and sample() see only what was typed."""
    flags = gpt.parse(["--sample", "--top-k", "3"])
    assert {name: value for name, value in flags.items() if name != "run"} == {"top_k": 3}


# -------------------------------------------------------------------------- as a program of its own
def test_the_program_writes_on_a_console_that_knows_ascii_only(folder):
    """A letter that the console can't show doesn't crash it; stdout and stderr stay apart."""
    tokenizer = gpt.CharTokenizer.from_text("é你😀\n")
    model = gpt.GPTLanguageModel(gpt.GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8,
                                               vocab_size=tokenizer.vocab_size))
    gpt.save_checkpoint("letters.pt", model, tokenizer, data="é.txt", iteration=0, best=1.0)
    done = program("--sample", "--ckpt", "letters.pt", "--max_new_tokens", 30, "--seed", 1,
                   env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr
    assert set(done.stdout) <= set(b"?\r\n") and done.stdout.count(b"?") > 10
    assert b"letters.pt" in done.stderr and b"Traceback" not in done.stderr


def test_the_program_ends_quietly_when_its_reader_does(folder):
    """python gpt.py --sample | head -c 20."""
    command = f'"{sys.executable}" -B "{gpt.__file__}" --sample --ckpt model.pt --seed 1'
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} --max_new_tokens 5000 | "
                           "head -c 20"], capture_output=True, timeout=120)
    assert len(done.stdout) == 20 and done.returncode in (0, 141)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr


def test_the_program_explains_a_mistake(folder):
    """One sentence, exit code 2, an empty stdout."""
    done = program("--train", "--data", "nowhere.txt")
    assert done.returncode == 2 and done.stdout == b""
    assert len(done.stderr.splitlines()) == 1 and b"nowhere.txt" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_the_program_trains_without_a_console(folder, closed):
    """Any of stdin, stdout and stderr closed."""
    command = " ".join([f'"{sys.executable}" -B "{gpt.__file__}"', *TINY, "--ckpt run.pt", closed])
    assert subprocess.run(["bash", "-c", command], timeout=120).returncode == 0
    assert gpt.load_checkpoint("run.pt")[2]["iteration"] in (0, 2) and Path("run.csv").exists()
