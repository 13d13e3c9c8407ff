"""The guides are true: their Python code prints what they say, their commands and links exist."""
import contextlib
import doctest
import io
import re
import shlex
import socket

import pytest
from conftest import ROOT

import gpt

NOTES = sorted((ROOT / "notes").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
each_note = pytest.mark.parametrize("note", NOTES, ids=lambda note: note.name)
NEEDS_NETWORK = {"--data shakespeare", "--tokenizer gpt2"}

def run_python_blocks(text):
    """Run the Python blocks in one namespace. A ```text block right after one is its output."""
    namespace, printed, end = {}, "", 0
    for block in BLOCK.finditer(text):
        language, code = block.groups()
        if language == "python":
            output = io.StringIO()
            first_line = text[: block.start()].count("\n") + 1  # errors name the note's line
            with contextlib.redirect_stdout(output):
                exec(compile("\n" * first_line + code, "note", "exec"), namespace)
            printed = output.getvalue()
        elif language == "text" and text[end : block.start()] == "\n" and printed:
            same = doctest.OutputChecker().check_output(code, printed, doctest.ELLIPSIS)
            assert same, f"the note says:\n{code}\nbut its code prints:\n{printed}"
        end = block.end()

def commands(text):
    """The lines of the bash blocks, without their comments; a \\ continues a line."""
    code = "\n".join(code for language, code in BLOCK.findall(text) if language == "bash")
    lines = code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]

def gpt_arguments(text):
    """What follows gpt.py in each command that runs it."""
    return [words[words.index("gpt.py") + 1 :] for words in commands(text) if "gpt.py" in words]

@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty folder and no network."""
    def refuse(*arguments):
        raise OSError("a note must run without a network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path

@each_note
def test_the_python_code_prints_what_the_note_says(note, offline):
    run_python_blocks(note.read_text(encoding="utf-8"))

@each_note
def test_the_commands_have_existing_flags(note):
    for arguments in gpt_arguments(note.read_text(encoding="utf-8")):
        if "--help" not in arguments:
            gpt.parse(arguments)  # exits if a flag does not exist
    for words in commands(note.read_text(encoding="utf-8")):
        for script in [word for word in words if re.fullmatch(r"(notes|tests)/[\w/]+\.py", word)]:
            assert (ROOT / script).exists(), script

@each_note
def test_the_files_that_a_note_names_exist(note):
    text = BLOCK.sub("", note.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (note.parent / target).exists(), target
    for path in re.findall(r"`((?:checkpoints|notes|tests)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).exists(), path

@each_note
def test_the_tests_that_a_note_names_exist(note):
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", note.read_text(encoding="utf-8")):
        assert f"\ndef {name}(" in tests, name

@each_note
def test_the_names_in_code_style_that_look_like_flags_exist(note):
    """A renamed option must be renamed in the words too."""
    known = {f"--{name}" for config in (gpt.TrainConfig, gpt.SampleConfig)
             for name in config.__dataclass_fields__}
    for script in (ROOT / "tests").rglob("*.py"):
        known |= set(re.findall(r'add_argument\("(--[\w-]+)"', script.read_text(encoding="utf-8")))
    known |= {"--train", "--sample", "--help", "--nproc_per_node"}
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", note.read_text(encoding="utf-8")):
        assert flag in known or flag.replace("--no-", "--") in known, flag
