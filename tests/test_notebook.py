"""The walkthrough: the file's own properties, its bootstrap, its asserts and its exercises.

pytest.ini has nbval run the whole notebook; here, only the sections that a test needs are run.
Changes that only a long training notices are tried with LONG=1 in the environment (some minutes).
"""

import ast
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

import gpt

PATH = ROOT / "gpt_walkthrough.ipynb"
BOOK = nbformat.read(PATH, as_version=4)
CODE = [cell for cell in BOOK.cells if cell.cell_type == "code"]


def by_section():
    """{section number: its cells}; what stands before section 1 is 0, after the last one -1."""
    sections, number = {}, 0
    for cell in BOOK.cells:
        for title in re.findall(r"(?m)^## (.*)", cell.source):
            number = int(title.split(".")[0]) if title[0].isdigit() else -1
        sections.setdefault(number, []).append(cell)
    return sections


SECTIONS = by_section()
SOURCES = {number: [cell.source for cell in cells if cell.cell_type == "code"]
           for number, cells in SECTIONS.items()}


def outputs():
    """Each output's kinds and text, pictures left out."""
    for cell in CODE:
        for output in cell.outputs:
            data = {kind: text for kind, text in output.get("data", {}).items()
                    if not kind.startswith("image/")}
            yield output.output_type, json.dumps([output.get("text", ""), data])


# ---------------------------------------------------------------------------------- the file
def test_size_and_execution_counts():
    """One run from top to bottom, small enough that GitHub shows it."""
    assert PATH.stat().st_size <= 10**6
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))


def test_outputs_are_clean():
    """No errors, warnings, progress bars or widgets, and nothing of the machine that ran it."""
    assert "widgets" not in BOOK.metadata
    for kind, text in outputs():
        assert kind in ("stream", "display_data", "execute_result"), text
        assert "widget" not in text and r"\r" not in text and "it/s" not in text
        assert "Warning" not in text
    for text in [text for _, text in outputs()] + [cell.source for cell in BOOK.cells]:
        assert not re.search(r"/(tmp|home|root|work|usr|opt|mnt|Users)/", text), text
    assert not any(output.get("name") == "stderr" for cell in CODE for output in cell.outputs)


def test_cells_are_short():
    for cell in CODE:
        lines = cell.source.splitlines()
        assert len(lines) <= 32 and max(map(len, lines)) <= 100, cell.source


def test_every_section_predicts_shows_and_asserts():
    assert [number for number in SECTIONS if number > 0] == list(range(1, 23))
    for number in range(1, 23):
        text = "\n".join(cell.source for cell in SECTIONS[number] if cell.cell_type == "markdown")
        assert "> **Predict before you run.**" in text, f"section {number}"
    for number in range(1, 23):
        cells = [cell for cell in SECTIONS[number] if cell.cell_type == "code"]
        asserts = [node for cell in cells for node in ast.walk(ast.parse(cell.source))
                   if isinstance(node, ast.Assert)]
        assert asserts and all(node.msg for node in asserts), f"section {number}"
        pictures = [output for cell in cells for output in cell.outputs
                    if "image/png" in output.get("data", {})]
        assert pictures or number == 1, f"section {number} shows no figure"


def test_no_second_copy_of_gpt():
    """It imports gpt, and defines nothing of the same name."""
    defined = {node.name for cell in CODE for node in ast.walk(ast.parse(cell.source))
               if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    theirs = {name for name, thing in vars(gpt).items()
              if getattr(thing, "__module__", "") == "gpt"}
    assert not defined & theirs
    assert "import gpt" in SOURCES[1][1]


def test_prose_quotes_no_measured_loss():
    """A number with two decimals in prose would contradict the outputs one day."""
    for cell in BOOK.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"```.*?```|https?://\S+", "", cell.source, flags=re.S)
            assert not re.search(r"\b\d\.\d\d", text), text


# ----------------------------------------------------------------------------- the bootstrap
def bootstrap(tmp_path, where, url="/absent", before=""):
    """Run the first cell in a folder; returns the process, which prints gpt's place and WORK."""
    kaggle = tmp_path / "kaggle"
    cell = SOURCES[1][0].replace('Path("/kaggle")', f"Path({str(kaggle)!r})")
    cell, count = re.subn(r'(?m)^REPO_URL = "[^"]*"', f"REPO_URL = {str(url)!r}", cell)
    assert count == 1 and str(kaggle) in cell
    code = f"{before}\n{cell}\nimport gpt\nprint(gpt.PLACE, FOLDER, WORK, sep='|')"
    env = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=where, env=env, text=True,
                          capture_output=True)


def stub(folder, place):
    """A folder with a gpt.py that says where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpt.py").write_text(f"PLACE = {place!r}\n")
    return folder


def repository(folder):
    """A git repository in place of the one at REPO_URL."""
    stub(folder, "clone")
    git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run(git + command, check=True)
    return folder


def told(process):
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()[-1].split("|")


def test_bootstrap_beside(tmp_path):
    here = stub(tmp_path / "here", "beside")
    stub(tmp_path / "kaggle" / "input" / "set", "kaggle")  # what lies beside wins
    (tmp_path / "kaggle" / "working").mkdir()
    place, folder, _ = told(bootstrap(tmp_path, here, repository(tmp_path / "remote")))
    assert (place, folder) == ("beside", str(here))


def test_bootstrap_kaggle_input(tmp_path):
    """Attached as a data set, read-only: found however deep, and written to nowhere."""
    deep = stub(tmp_path / "kaggle" / "input" / "set" / "a" / "b", "kaggle")
    working = tmp_path / "kaggle" / "working"
    working.mkdir()
    folders = [deep, *deep.parents][:4]
    for folder in folders:
        folder.chmod(0o555)
    try:
        before = sorted((tmp_path / "kaggle" / "input").rglob("*"))
        place, folder, work = told(bootstrap(tmp_path, working))
        assert (place, folder, work) == ("kaggle", str(deep), str(working))
        assert sorted((tmp_path / "kaggle" / "input").rglob("*")) == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_bootstrap_clone(tmp_path):
    """Alone, it clones REPO_URL; run again, it takes the clone that is there."""
    alone, url = tmp_path / "alone", repository(tmp_path / "remote")
    alone.mkdir()
    place, folder, _ = told(bootstrap(tmp_path, alone, url))
    assert (place, folder) == ("clone", str(alone / "gpt-from-scratch"))
    assert told(bootstrap(tmp_path, alone, "/absent"))[0] == "clone"


def test_bootstrap_clone_on_kaggle(tmp_path):
    """With internet but no data set, the clone goes where Kaggle lets us write."""
    working = tmp_path / "kaggle" / "working"
    (tmp_path / "kaggle" / "input").mkdir(parents=True)
    working.mkdir()
    place, folder, _ = told(bootstrap(tmp_path, tmp_path, repository(tmp_path / "remote")))
    assert (place, folder) == ("clone", str(working / "gpt-from-scratch"))


@pytest.mark.parametrize("before", ["", "import os; os.environ['PATH'] = ''"])
def test_bootstrap_finds_nothing(tmp_path, before):
    """One clear sentence, with or without git, and no half of a clone left behind."""
    alone = tmp_path / "alone"
    alone.mkdir()
    process = bootstrap(tmp_path, alone, tmp_path / "absent", before)
    assert process.returncode
    last = process.stderr.splitlines()[-1]
    assert re.match(r"FileNotFoundError: gpt.py is neither .* attach the repository", last), last
    assert not list(alone.iterdir())


def test_bootstrap_drive(tmp_path):
    """On Colab, Drive is mounted only if it is asked for."""
    here = stub(tmp_path / "here", "beside")
    colab = ("import sys, types\nfor name in ('google', 'google.colab'):\n"
             "    sys.modules[name] = types.ModuleType(name)\n"
             "drive = types.SimpleNamespace(mount=lambda place: print('mounted', place))\n"
             "sys.modules['google.colab'].drive = drive")
    process = bootstrap(tmp_path, here, before=colab)
    assert told(process)[2] == str(here) and "mounted" not in process.stdout
    yes = SOURCES[1][0].replace("USE_DRIVE = False", "USE_DRIVE = True")
    assert yes != SOURCES[1][0]
    code = f"{colab}\n{yes}\nprint('', '', WORK, sep='|')"
    process = subprocess.run([sys.executable, "-c", code], cwd=here, text=True,
                             capture_output=True)
    assert "mounted /content/drive" in process.stdout
    assert told(process)[2] == "/content/drive/MyDrive"


# ------------------------------------------------------------------ asserts that notice things
# (section, what to run before it, a part of a line of gpt.py, what to put in its place, and words
# of the assert that then fails). 12f: only the functions that section 12 defines.
CHANGES = [
    ("1", "", "to(device), tokenizer, content", "to(device), tokenizer, {}", "to which loss"),
    ("2", "", "sorted(set(text).difference(stoi))", r'sorted({"\0", *text}.difference(stoi))',
     "the text has"),
    ("2", "", "sorted(set(text).difference(stoi))", "list(dict.fromkeys(text))", "another order"),
    ("2", "", "int(0.9 * len(", "int(0.8 * len(", "nine tenths"),
    ("3", "2", "self.itos, self.vocab_size = stoi, {i: s ",
     "self.itos, self.vocab_size = stoi, {i: s.lower() ", "sorted alphabet"),
    ("3", "2", "ids_of[[ord(s) for s", "ids_of[[ord(s) + 1 for s", "encode and itos agree"),
    ("3", "2", 'return "".join([self.itos', 'return "x".join([self.itos', "see decode"),
    ("4", "2", "np.arange(block_size + 1)", "np.arange(block_size)", "both be (B, T)"),
    ("4", "2", "return passages[:, :-1], passages[:, 1:]",
     "return passages[:, :-1], passages[:, :-1]", "moved on by one"),
    ("5", "2", "return (total[0] / total[1]).item()", "return (total[0] / total[1]).item() * 2",
     "should go down"),
    ("5", "2", 'if self.activation == "relu2" else x', 'if self.activation == "relu" else x',
     "still compute what it was trained with"),
    ("6", "2", ", weights  # (T, S) @ (S, hs)", " / 2, weights  # (T, S) @ (S, hs)",
     "the average by"),
    ("7", "2", 'float("-inf")), dim=-1)', 'float("-inf")), dim=-2)', "of weights should sum"),
    ("7", "2", ".triu(1 + S - T)", ".triu(2 + S - T)", "looks at its future"),
    ("7", "2", "(q / math.sqrt(q.size(-1)))", "(q / q.size(-1))", "differs from the formula"),
    ("8", "2", "(q / math.sqrt(q.size(-1)))", "(q / 1)", "far more even"),
    ("8", "2", "(q / math.sqrt(q.size(-1)))", "(q / math.sqrt(64))", "depend on the head size"),
    ("9", "2", ".triu(1 + S - T)", ".triu(2 + S - T)", "more than rounding"),
    ("9", "2", "is_causal=T > 1", "is_causal=False", "in the whole model"),
    ("10", "2", "is_causal=T > 1", "is_causal=False", "leaks into the past"),
    ("10", "2", "self.proj(out.transpose", "self.proj(v.transpose", "can't see the past"),
    ("11", "2", "if config.tie_weights:\n            model.", "if True:\n            model.",
     "what was added?"),
    ("12", "2", "nn.init.zeros_(parameter)", "nn.init.normal_(parameter)", "no blind guess"),
    ("13", "2 5 12", "return x + self.feed_forward(self.ln_2(x))",
     "return (x + self.feed_forward(self.ln_2(x))).detach()", "don't reach all weights"),
    ("14", "2 5 12f 13f", "torch.randint(len(data) - block_size,", "torch.randint(block_size,",
     "not clearly below"),
    ("15", "2 12f 13f", "(0.9, 0.95), fused=True", "(0.9, 0.95), 0.0, fused=True", "is not finite"),
    ("15", "2 12f 13f", "p not in set(muon)]", "p not in set(self.blocks.parameters())]",
     "is an optimizer at work?"),
    ("15", "2 12f 13f", "self.qkv(x).view", "self.qkv(x).detach().view", "is dead"),
    ("15", "2 12f 13f", "nn.init.zeros_(parameter)", "nn.init.normal_(parameter)",
     "how are they drawn?"),
    ("16", "2", "how.top_k or", "how.top_k + 1 or", "keep three tokens"),
    ("16", "2", "F.one_hot(logits.argmax(", "F.one_hot(logits.argmin(", "at temperature 0"),
    ("16", "2", "cumsum(dim=-1)[:, :-1] < how", "cumsum(dim=-1)[:, 1:] < how", "smallest set"),
    ("17", "2", "torch.arange(start, start + T", "torch.arange(0, T", "the cache changed"),
    ("18.1", "2", "maps.append(weights)", "maps.append(weights * 2)", "row of every map"),
    ("18.2", "2 18.1", "self.lm_head(self.ln_f(x))", "self.lm_head(x)", "the last lens"),
    ("18.3", "2", "model.load_state_dict(state, assign=True)", "model = cls(config)",
     "neighbours should be of one kind"),
    ("18.4", "2 18.1", "len(part), device=device, starts=part)", "len(part), device=device)",
     "its loss again"),
    ("18.4", "2 18.1", "self.proj(out.transpose(1, 2).reshape(B, T, C))",
     "F.linear(out.transpose(1, 2).reshape(B, T, C), self.proj.weight)", "no head matters"),
    ("18.5", "2 18.1", "qk * cos + qk.roll(C // nh // 2, dims=-1) * sin", "qk * cos",
     "a previous-character head"),
    ("18.5", "2 18.1", "triu(1 + S - T)  # the mask",
     "triu(1 + S - T) | torch.ones(T, S, dtype=torch.bool).tril(S - T - 2)", "for an even look"),
    ("20", "2 5 12f 13f 14f", "torch.randint(len(data) - block_size,", "torch.randint(block_size,",
     "clearly beat the smallest"),
    ("21", "2", "ids_of[[ord(s) for s in self.stoi]] = list(self.stoi.values())",
     "ids_of[[ord(s) for s in sorted(self.stoi)]] = range(self.vocab_size)", "digits are mixed up"),
    ("22", "2 5 12f 13f 14", "(logits / how.temperature)", "(logits * how.temperature)",
     "should write known words"),
]
# The same for cells that train for long: tried only with LONG=1 in the environment.
LONG_CHANGES = [
    ("14gpu", "2 5", "if not scaler.is_enabled() or norm.isfinite()",
     "if scaler.is_enabled() and norm.isfinite()", "it should beat a table"),
    ("19", "2 12f 13f", "rotation = self.rotation(positions)", "rotation = None",
     "with two layers"),
    ("19", "2 12f 13f", "maps.append(weights)", "maps.insert(0, weights)", "the stripe should be"),
    ("21", "2 12f 13f", 'p.dim() == 2 and config.optimizer == "muon"]', "False]",
     "far more than directly"),
]
NO_CHANGE = {  # asserts that no line of gpt.py can break, and what breaks them
    "input.txt should lie beside": "a missing file", "should lie in checkpoints": "a missing file"}
SHORTER = {  # what is put in place of what in a section, so that trying it takes seconds
    "5": {"8192": "4096"},
    "14": {"steps, size = 600": "steps, size = 84", "16_384": "4_096", "steps // 12": "steps // 6"},
    "14gpu": {"if BIG:": "if True:", 'preset="gpu"': 'preset="cpu"', "=1500": "=80",
              "eval_interval=500": "eval_interval=80, eval_tokens=4096", "65_536": "4096"},
    "15": {"small_model(n_layer=4), 1.0)": "small_model(n_layer=4), 1.0), 9"},
    "18.1": {"plt.subplots(L, H,": "plt.subplots(1, 1,"},
    "18.4": {"4096": "512", "for n in range(L)": "for n in range(1)"},
    "18.5": {"24_000": "3_000"},
    "20": {"(1, 8), (1, 16), (1, 32), (2, 48), (2, 80)": "(1, 8), (2, 48)",
           "steps = 250": "steps = 60", "32_768": "8_192"},
    "21": {'"direct", 1500': '"direct", 1', '"dots", 500': '"dots", 1'},
}
RUNNER = r"""
import contextlib, io, json, os, sys, time
import matplotlib
matplotlib.use("Agg")
job = json.load(sys.stdin)
import torch
torch.set_num_threads(1)

def execute(folder, cells, space):
    '''[the section that failed or None, the kind of error, its message, seconds].'''
    os.chdir(folder)
    sys.modules.pop("gpt", None)
    start = time.process_time()
    for section, source in cells:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(source, f"section {section}", "exec"), space)
        except Exception as error:
            return [section, type(error).__name__, str(error), time.process_time() - start]
        if "def show" in source:
            space["show"] = space["plt"].close
    return [None, "", "", time.process_time() - start]

said, space = {}, {}
said["unchanged"] = execute(job["unchanged"], job["cells"], space)
for name, (solution, check) in job["exercises"].items():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(check, space)
        for code in (solution, check, job["wrong"][name], check):
            exec(code, space)
    said[name] = printed.getvalue().splitlines()
for words, (folder, cells) in job["changes"].items():
    said[words] = execute(folder, cells, {})
print("\n" + json.dumps(said))
"""


def parts():
    """{section, or part of 18: the sources of its cells}."""
    found, name = {}, ""
    for cell in BOOK.cells:
        for title in re.findall(r"(?m)^##+ (\d\S*)", cell.source):
            name = title.rstrip(".")
        if cell.cell_type == "code":
            found.setdefault(name, []).append(cell.source)
    return found


PARTS = parts()
PARTS["14gpu"] = PARTS["14"][-1:]  # its baseline, which needs a GPU, or to be SHORTER
LONG = bool(os.environ.get("LONG"))
TRIED = CHANGES + LONG_CHANGES * LONG
UNCHANGED = [name for name in PARTS if LONG or name not in ("14gpu", "19", "21")]


def cells_of(sections):
    """[[section, source]] of "2 12f": made SHORTER; with f, only its functions."""
    found = []
    for name in sections.split():
        for source in PARTS[name.rstrip("f")]:
            tree = ast.parse(source)
            if name.endswith("f"):
                source = ast.unparse([n for n in tree.body if isinstance(n, ast.FunctionDef)])
            for long, short in SHORTER.get(name, {}).items():
                source = source.replace(long, short)
            found.append([name, source])
    return found


def exercises():
    """{name: [solution, the cell that checks it]}: a solution is folded away below its check."""
    found, check = {}, ""
    for cell in BOOK.cells:
        if cell.cell_type == "code" and 'print("Exercise' in cell.source:
            check = cell.source
        elif check and "<details>" in cell.source:
            (solution,) = re.findall(r"```python\n(.*?)```", cell.source, re.S)
            found[re.findall(r'print\("(Exercise \w+)', check)[0]] = [solution, check]
    return found


EXERCISES = exercises()
WRONG = {  # a common mistake, and what the check should say about it
    "Exercise 5": ("def trigram_loss(train_ids, val_ids, V): return np.log(V)", "blind guess"),
    "Exercise 11": ("""
def count_parameters(V, T, C, L, qkv_bias=False, tied=False, left_out=0):
    block = 4 * C + 3 * C * C + 8 * C * C + 5 * C
    return V * C + T * C + L * block + 2 * C + C * V + V
""", "attention's output projection is missing"),
    "Exercise 16": ("def min_p_rule(probs, min_p): return probs * (probs >= min_p * probs.max())",
                    "divide what is left by its sum"),
    "Exercise 22a": ("def bits_per_character(nats, characters): return nats / characters",
                     "still in nats"),
    "Exercise 22b": ("def cache_bytes(L, C, T, size=2, groups=1): return L * C * T * size",
                     "keys AND values"),
    "Exercise 22c": ("def hidden(T, window): return torch.ones(T, T).triu(1) == 1", "sees 6")}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What becomes of each change and each exercise: one process runs them all, one by one."""
    def copy(name, text):
        folder = tmp_path_factory.mktemp(name)
        (folder / "gpt.py").write_text(text, encoding="utf-8")
        for name in ("input.txt", "checkpoints"):
            (folder / name).symlink_to(ROOT / name)
        return str(folder)

    text, changed = (ROOT / "gpt.py").read_text(encoding="utf-8"), {}
    for section, needs, old, new, words in TRIED:
        if old in text:  # else its own test says so
            changed[words] = [copy(f"change{section}-", text.replace(old, new, 1)),
                              cells_of(f"1 {needs} {section}")]
    job = {"unchanged": copy("unchanged", text), "cells": cells_of(" ".join(UNCHANGED)),
           "exercises": EXERCISES, "changes": changed,
           "wrong": {name: code for name, (code, _) in WRONG.items()}}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run([sys.executable, "-c", RUNNER], input=json.dumps(job), text=True,
                             capture_output=True, env=env, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_each_assert_has_its_change():
    """Each assert of the notebook is in one of the tables, with words of its own message."""
    messages = ["".join(part.value for part in ast.walk(node.msg) if isinstance(part, ast.Constant)
                        and isinstance(part.value, str))
                for cell in CODE for node in ast.walk(ast.parse(cell.source))
                if isinstance(node, ast.Assert)]
    words = [words for *_, words in CHANGES + LONG_CHANGES] + list(NO_CHANGE)
    assert len(words) == len(set(words))
    for each in words:
        assert sum(each in message for message in messages) == 1, each
    for name, pairs in SHORTER.items():
        for long in pairs:
            assert any(long in source for source in PARTS[name]), f"section {name} has no {long}"
    for message in messages:
        assert any(each in message for each in words), f"nothing is known to break: {message}"


def test_asserts_hold(said):
    """Also where SHORTER takes most of the training away; else a change would prove nothing."""
    section, kind, message, _ = said["unchanged"]
    assert section is None, (section, kind, message)


@pytest.mark.parametrize("section, old, words", [
    pytest.param(section, old, words, id=f"{section} {words}")
    for section, _, old, _, words in TRIED])
def test_assert_notices_change(said, section, old, words):
    """One line of gpt.py changed: that assert, and none before it of those that ran, says so."""
    assert words in said, f"gpt.py no longer has {old!r}: change another line of it"
    where, kind, message, _ = said[words]
    assert (where, kind) == (section, "AssertionError") and words in message, said[words]


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(said, name):
    """Open at first; the folded solution is right; a common mistake is called by its name."""
    before, after, wrong = said[name]
    assert "open" in before, before
    assert "right" in after and "off" not in after, after
    assert WRONG[name][1] in wrong, wrong
