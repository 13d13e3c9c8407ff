"""The guides' Python blocks run, in order, and print what the guides say that they print."""

import contextlib
import doctest
import io
import re
import socket

import pytest
from conftest import ROOT

NOTES = sorted((ROOT / "notes").glob("*.md"))
FENCE = re.compile(r" *(`{3,}|~{3,}) *([\w-]*)")


def blocks(text):
    """[(language, code, number of its first line, whether it directly follows another block)]."""
    found, fence, end = [], None, None
    for number, line in enumerate(text.splitlines(), 1):
        match = FENCE.match(line)
        if fence is None and match:
            fence, indent = match[1], len(line) - len(line.lstrip())
            found.append([match[2].lower(), "", number + 1, end is not None])
        elif fence and match and match[1].startswith(fence) and not match[2]:
            fence, end = None, number
        elif fence:
            space = len(line) - len(line.lstrip(" "))
            found[-1][1] += line[min(indent, space) :] + "\n"
        elif line.strip():
            end = None  # words between two blocks part them
    assert fence is None, "a block has no end"
    return [tuple(block) for block in found]


def is_python(language):
    return language in ("python", "py", "python3")


def run_note(text, name="note"):
    """Run a note's Python blocks in one namespace; AssertionError where one prints another text."""
    namespace, printed, count = {"__name__": "__main__"}, None, 0
    for language, code, line, follows in blocks(text):
        if is_python(language):
            output = io.StringIO()
            with contextlib.redirect_stdout(output):  # line numbers of errors are the note's
                exec(compile("\n" * (line - 1) + code, str(name), "exec"), namespace)
            printed, count = output.getvalue(), count + 1
        elif language == "text" and follows and printed is not None:
            same = doctest.OutputChecker().check_output(code, printed, doctest.ELLIPSIS)
            assert same, f"{name}, line {line} says:\n{code}\nbut it prints:\n{printed}"
            printed = None
        else:
            printed = None
    return count


@pytest.fixture(autouse=True)
def closed_room(tmp_path, monkeypatch):
    """An empty folder, gpt.py within reach of other processes too, and no network."""
    def refuse(self, address, *rest):
        raise OSError(f"a note must run without a network, but it asks for {address}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("note", NOTES, ids=lambda path: path.name)
def test_a_note_runs(note):
    """Every block of it; a note without code has nothing that could be wrong here."""
    text = note.read_text(encoding="utf-8")
    assert run_note(text, note) == len(re.findall(r"^ *(?:```|~~~) *py", text, re.M))


def test_the_guides_are_among_them():
    """An empty list of notes would pass."""
    guides = {f"{topic}_guide.md" for topic in
              ("logits", "attention", "generation", "training", "gpt2")}
    assert guides <= {note.name for note in NOTES}


NOTE = """
```python
x = 1
```

Words.

  ```python
  if x:
      print("one", x)
  ```

  ```text
  one 1
  ```

```text
not what Python printed
```
"""


def test_blocks_share_a_namespace_and_are_compared():
    """Also where they are indented, as in a list; a text that follows no block is not compared."""
    assert run_note(NOTE) == 2


@pytest.mark.parametrize("old, new, error", [
    ("x = 1", "x = 1 / 0", ZeroDivisionError),
    ("x = 1", "y = 1", NameError),
    ("x = 1", "x = (", SyntaxError),
    ("x = 1", "x = 2", AssertionError),
    ("one 1", "one 2", AssertionError),
    ("x = 1", "import urllib.request as r\nr.urlopen('http://localhost:9/')", OSError),
    ("x = 1", "import socket\nsocket.create_connection(('127.0.0.1', 9))", OSError),
])
def test_what_is_wrong_fails(old, new, error):
    """A block that raises, that prints something else, or that needs a network."""
    assert old in NOTE
    with pytest.raises(error):
        run_note(NOTE.replace(old, new, 1))


def test_an_open_block_fails():
    """Else its code would be skipped."""
    with pytest.raises(AssertionError, match="no end"):
        run_note(NOTE + "```python\nraise ValueError\n")
