"""The walkthrough: its set-up, exercises, asserts, figures and HTML pages.

pytest.ini lets nbval run the whole notebook. The tests here run only the cells they need.
"""

import ast
import base64
import contextlib
import io
import json
import linecache
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

PATH = ROOT / "gpt_walkthrough.ipynb"
BOOK = nbformat.read(PATH, as_version=4)
CODE = [cell for cell in BOOK.cells if cell.cell_type == "code"]
SET_UP, HELPERS = CODE[0].source, CODE[1].source


def read_sections():
    """{number of the section: sources of its code cells}; 0 is what stands before section 1."""
    sections, number = {}, 0
    for cell in BOOK.cells:
        for title in re.findall(r"(?m)^## (\w+)", cell.source) * (cell.cell_type == "markdown"):
            number = int(title) if title.isdigit() else -1  # -1: the appendix
        if cell.cell_type == "code":
            sections.setdefault(number, []).append(cell.source)
    return sections


SECTIONS = read_sections()


# ------------------------------------------------------------------------------------ the file
def test_committed_as_it_ran():
    """One run from top to bottom: no errors, no paths of a machine, small, figures described."""
    assert PATH.stat().st_size <= 1_500_000
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", output
            data = output.get("data", {})
            assert "image/png" not in data or output.metadata["image/png"]["alt"]
            data = {kind: text for kind, text in data.items() if kind != "image/png"}
            text = json.dumps([output.get("text"), data])
            assert not re.search(r"/(tmp|home|root|work|usr|opt|Users)/|it/s", text), text[:300]


def test_the_students_parts_use_torch_only():
    """What the student builds never takes a part from gpt.py."""
    found = set()
    for cell in CODE:
        for node in ast.parse(cell.source).body:
            name = getattr(node, "name", "")
            if name.startswith(("My", "my_", "Solution", "solution_")):
                found.add(name)
                assert not [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == "gpt"]
    assert {"MyHead", "MyMultiHeadAttention", "MyLayerNorm", "MyFeedForward", "MyBlock",
            "MyGPT"} <= found


def test_the_badge_has_the_address_of_the_clone():
    url = re.search(r'(?m)^REPO_URL = "https://github.com/([^"]*)"', SET_UP).group(1)
    badge = json.dumps([output.get("data") for output in CODE[0].outputs])
    assert f"colab.research.google.com/github/{url}/blob/main/gpt_walkthrough.ipynb" in badge
    assert sum(cell.source.count(url) for cell in BOOK.cells) == 1


# ---------------------------------------------------------------------------------- the set-up
def set_up(tmp_path, where, url="/absent", before=""):
    """Run the search for gpt.py in a folder; the process prints gpt's place, FOLDER and WORK."""
    kaggle = tmp_path / "kaggle"
    slow = r"(?m)^(import (matplotlib|numpy|torch)|from (IPython|PIL|torch)).*\n"
    cell = re.sub(slow, "", SET_UP.split("import gpt ")[0])
    cell = cell.replace('Path("/kaggle")', f"Path({str(kaggle)!r})")
    cell, count = re.subn(r'(?m)^REPO_URL = "[^"]*"', f"REPO_URL = {str(url)!r}", cell)
    assert count == 1 and str(kaggle) in cell
    code = f"{before}\n{cell}\nimport gpt\nprint(gpt.PLACE, FOLDER, WORK, sep='|')"
    env = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=where, env=env, text=True,
                          capture_output=True)


def stand_in(folder, place):
    """A folder with a gpt.py that says where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpt.py").write_text(f"PLACE = {place!r}\n")
    return folder


def repository(folder):
    """A git repository in place of the one at REPO_URL."""
    stand_in(folder, "clone")
    git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run(git + command, check=True)
    return folder


def places(process):
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()[-1].split("|")


def test_set_up_beside_the_notebook(tmp_path):
    here = stand_in(tmp_path / "here", "beside")
    stand_in(tmp_path / "kaggle" / "input" / "set", "kaggle")  # what lies beside wins
    (tmp_path / "kaggle" / "working").mkdir()
    place, folder, _ = places(set_up(tmp_path, here))
    assert (place, folder) == ("beside", str(here))


def test_set_up_with_kaggle_input(tmp_path):
    """Attached as a dataset, however deep; what is written goes to /kaggle/working."""
    deep = stand_in(tmp_path / "kaggle" / "input" / "set" / "a" / "b", "kaggle")
    working = tmp_path / "kaggle" / "working"
    working.mkdir()
    assert places(set_up(tmp_path, working)) == ["kaggle", str(deep), str(working)]


def test_set_up_clones(tmp_path):
    """Alone, it clones REPO_URL; run again, it takes the clone that is there."""
    alone, url = tmp_path / "alone", repository(tmp_path / "remote")
    alone.mkdir()
    place, folder, _ = places(set_up(tmp_path, alone, url))
    assert (place, folder) == ("clone", str(alone / "gpt-from-scratch"))
    assert places(set_up(tmp_path, alone, "/absent"))[0] == "clone"


@pytest.mark.parametrize("before", ["", "import os; os.environ['PATH'] = ''"])
def test_set_up_finds_nothing(tmp_path, before):
    """One clear message, with or without git."""
    alone = tmp_path / "alone"
    alone.mkdir()
    process = set_up(tmp_path, alone, tmp_path / "absent", before)
    last = process.stderr.splitlines()[-1]
    assert process.returncode and re.match(r"FileNotFoundError: gpt.py is neither", last), last


def test_set_up_on_colab_with_drive(tmp_path):
    here = stand_in(tmp_path / "here", "beside")
    colab = ("import sys, types\nfor name in ('google', 'google.colab'):\n"
             "    sys.modules[name] = types.ModuleType(name)\n"
             "drive = types.SimpleNamespace(mount=lambda place: print('mounted', place))\n"
             "sys.modules['google.colab'].drive = drive")
    process = set_up(tmp_path, here, before=colab)
    assert places(process)[2] == str(here) and "mounted" not in process.stdout


# -------------------------------------------------------------------------------- the exercises
def find_exercises():
    """{number: (cell with the stub, cell with the solution)}."""
    found = {}
    for stub, solution in zip(CODE, CODE[1:], strict=False):
        for number in re.findall(r'print\("Exercise (\d+):', stub.source):
            assert solution.metadata["jupyter"]["source_hidden"]
            found[int(number)] = stub.source, solution.source
    return found


EXERCISES = find_exercises()
BLOCK_BODY = """        collected = self.attention(self.ln_1(x), rotation)  # communication
        x = x + collected
        computed = self.feed_forward(self.ln_2(x))  # computation
        return x + computed
"""
MODEL_BODY = """        x = self.token_embedding(idx)  # (B, T) -> (B, T, C)
        for block in self.blocks:
            x = block(x, rotation)  # (B, T, C)
        logits = self.lm_head(self.ln_f(x))"""
GENERATE_BODY = EXERCISES[9][1].split("block_size):\n", 1)[1].split("\n\n")[0] + "\n"
SPLIT = """    qkv = qkv.view(B, T, 3, nh, C3 // 3 // nh)  # (B, T, 3C) -> (B, T, 3, nh, hs)
    return qkv.permute(2, 0, 3, 1, 4)  # -> (3, B, nh, T, hs)"""
TOP_P_END = """    values = values.masked_fill(likelier >= p, 0.0)
    kept = torch.zeros_like(probs).scatter(0, order, values)
    return kept / kept.sum()"""
# For each exercise: what to change in the solution, and a part of the hint that must come.
WRONG = {
    1: [("keys > queries", "keys >= queries", "must see itself"),
        ("keys > queries", "keys <= queries", "inverted"),
        ("keys > queries", "keys < queries", "hides the past"),
        ("keys > queries", "keys > queries + 1", "off by one: each position still sees"),
        ("torch.arange(S - T, S)", "torch.arange(S - T + 1, S + 1)", "still sees the next one"),
        ("[:, None]", "", "queries a column"),
        ("keys > queries", "(keys > queries).float()", "compare positions with >"),
        ("torch.arange(S - T, S)", "torch.arange(T)", "LAST T positions")],
    2: [(" / math.sqrt(hs)", "", "square root of hs"),
        ("        scores = scores.masked_fill(causal_mask(T, T).to(x.device), float(\"-inf\"))\n",
         "", "mask is missing"),
        ("math.sqrt(hs)", "math.sqrt(x.size(-1))", "root of C"),
        (" / math.sqrt(hs)", " * math.sqrt(hs)", "do not multiply"),
        ("return weights @ v", "return weights.transpose(-2, -1) @ v",
         "do not transpose the weights"),
        ("F.softmax(scores, dim=-1)", "F.softmax(scores * math.sqrt(hs), dim=-1) / math.sqrt(hs)",
         "divide the scores BEFORE the softmax"),
        ("return weights @ v", "return weights * v", "with a matrix product"),
        ("dim=-1)\n", "dim=-2)\n", "run over the keys"),
        ("q @ k.transpose", "k @ q.transpose", "exchanged"),
        ("q @ k.transpose(-2, -1)", "q @ k", "transpose the keys"),
        ("causal_mask(T, T)", "~causal_mask(T, T)", "upside down"),
        ('float("-inf")', "0.0", "-inf, not with 0"),
        ("weights @ v, weights", "v @ weights, weights", "weights @ v"),
        ("weights @ v, weights", "weights @ v.transpose(-2, -1), weights", "transpose the values"),
        ("q @ k.transpose(-2, -1)", "q.transpose(-2, -1) @ k", "both be (T, T)"),
        ("return weights @ v, weights", "return weights @ v", "two things"),
        ("return weights @ v, weights", "return weights, weights @ v", "out first"),
        ("T, hs = q.shape[-2:]", "B, T, hs = q.shape", "without a batch"),
        ("T, hs = q.shape[-2:]", "T = q.size(-2)", "last dimension of q"),
        ("k.transpose(-2, -1)", "k.T", "may be (B, T, C)"),
        ("T, hs = q.shape[-2:]", "T, hs = x.shape[1], q.size(-1)", "x.shape[1] is C"),
        ("T, hs = q.shape[-2:]", "T = hs = q.shape[1]", "yours is hs"),
        ("self.W_q(x)", "x @ self.W_q.weight", "call it, self.W_q(x)"),
        ("self.W_q(x)", "x @ self.W_q", "call it, self.W_q(x)"),
        ("        weights = F.softmax(scores, dim=-1)\n", "        weights = scores\n",
         "softmax is missing")],
    3: [("(2, 0, 3, 1, 4)", "(2, 0, 1, 3, 4)", "positions come before heads"),
        ("return qkv.permute(2, 0, 3, 1, 4)", "return qkv", "now permute"),
        ("return qkv.permute(2, 0, 3, 1, 4)", "return qkv.reshape(3, B, nh, T, -1)",
         "reshape alone mixes"),
        ("3, nh, C3 // 3 // nh", "nh, 3, C3 // 3 // nh", "first q, k, v"),
        ("C3 // 3 // nh", "C3 // nh", "sizes in view must multiply"),
        ("C3 // 3 // nh", "C3 / 3 / nh", "whole numbers"),
        ("(2, 0, 3, 1, 4)", "(2, 0, 3, 1)", "all five"),
        (SPLIT, "    qkv = qkv.chunk(3, dim=-1)\n"
         "    return torch.stack([t.view(B, nh, T, -1) for t in qkv])", "B and T come first"),
        (SPLIT, "    qkv = qkv.chunk(3, dim=-1)\n"
         "    return torch.stack([t.reshape(B, nh, T, -1) for t in qkv])", "T comes before nh"),
        (SPLIT, "    return qkv.view(B, T, nh, -1, 3).permute(4, 0, 2, 1, 3)", "the 3 (queries"),
        (".transpose(1, 2).flatten(2)", ".flatten(2)", "so that T comes before nh"),
        (".transpose(1, 2).flatten(2)", ".flatten(1, 2)", "so that T comes before nh"),
        (".flatten(2)", "", "now flatten"),
        (".flatten(2)", ".flatten(1)", "only the last two"),
        (".flatten(2)", ".view(out.size(0), out.size(2), -1)", "view is not possible"),
        (".transpose(1, 2).flatten(2)", ".reshape(out.size(0), out.size(2), -1)",
         "without the transpose"),
        (".transpose(1, 2).flatten(2)", ".permute(0, 2, 3, 1).flatten(2)", "stay together")],
    4: [("a * cos - b * sin", "a * cos + b * sin", "first half has a minus"),
        ("a * sin + b * cos", "a * sin - b * cos", "second half has a plus"),
        ("a * cos - b * sin, a * sin + b * cos", "a * cos + b * sin, b * cos - a * sin",
         "rotates backwards"),
        ("a * cos - b * sin, a * sin + b * cos", "a * cos + b * sin, a * sin - b * cos",
         "both signs"),
        ("a * cos - b * sin, a * sin + b * cos", "a * sin - b * cos, a * cos + b * sin",
         "cos and sin are exchanged"),
        ("a * cos - b * sin, a * sin + b * cos", "a * sin + b * cos, a * cos - b * sin",
         "halves are exchanged"),
        ("x.chunk(2, dim=-1)", "x[..., ::2], x[..., 1::2]", "not neighbours"),
        ("    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)",
         "    a, b = x[..., ::2], x[..., 1::2]\n    return torch.stack((a * cos - b * sin, "
         "a * sin + b * cos), dim=-1).flatten(-2)", "not neighbours"),
        ("a, b = x", "b, a = x", "a is the first half"),
        ("x.chunk(2, dim=-1)", "x, x", "split x into halves"),
        ("    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)",
         "    a = a * cos - b * sin\n    return torch.cat((a, a * sin + b * cos), dim=-1)",
         "OLD a"),
        ("    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)",
         "    old = a.clone()\n    a *= cos\n    a -= b * sin\n    b *= cos\n"
         "    b += old * sin\n    return x", "changes x itself"),
        ("torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)", "a * cos - b * sin",
         "one half only"),
        ("torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)",
         "a * cos - b * sin, a * sin + b * cos", "into one tensor"),
        ("torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)",
         "torch.complex(a, b) * torch.complex(cos, sin)", "real and imaginary part"),
        ("b * cos), dim=-1)", "b * cos), dim=-2)", "along the channels")],
    5: [("x = x + collected", "x = collected", "first residual connection"),
        (BLOCK_BODY, BLOCK_BODY.replace("ln_1", "ln").replace("ln_2", "ln_1").replace(
            "ln(", "ln_2("), "ln_1 and ln_2 are exchanged"),
        ("x = x + collected", "x = x * collected", "ADD what attention returns"),
        ("return x + computed", "return x * computed", "ADD what feed_forward returns"),
        (BLOCK_BODY, BLOCK_BODY.replace("x + co", "x * co"), "do not multiply"),
        ("return x + computed", "return computed + computed", "not feed_forward to itself"),
        ("return x + computed", "return computed", "second residual connection"),
        ("self.ln_2(x)", "self.ln_1(x)", "its own LayerNorm"),
        ("self.ln_2(x)", "x", "ln_2 is missing"),
        ("attention(self.ln_1(x), rotation)", "attention(x, rotation)", "ln_1 is missing"),
        ("x = x + collected", "pass", "lost"),
        ("x = x + collected", "x += collected", "not x += ..."),
        ("self.attention(self.ln_1(x), rotation)", "self.attention(rotation, self.ln_1(x))",
         "then the rotation"),
        ("(self.ln_2(x))", "(self.ln_2(x), rotation)", "feed_forward does not"),
        (", rotation)  # comm", ", *rotation)  # comm", "without a star"),
        ("attention(self.ln_1(x), rotation)", "attention(my_rotate(self.ln_1(x), *rotation))",
         "only queries and keys are"),
        ("(self.ln_1(x), rotation)", "(self.ln_1(x))", "pass rotation on"),
        ("return x + computed", "return x - collected + computed", "adds to the NEW x"),
        (BLOCK_BODY, "        x = x + self.feed_forward(self.ln_2(x))\n"
         "        return x + self.attention(self.ln_1(x), rotation)\n",
         "first attention (with ln_1)"),
        (BLOCK_BODY, "        x = x + self.feed_forward(self.ln_1(x))\n"
         "        return x + self.attention(self.ln_2(x), rotation)\n", "order: first attention, "),
        (BLOCK_BODY, "        x = x + self.ln_1(self.attention(x, rotation))\n"
         "        return x + self.ln_2(self.feed_forward(x))\n", "what a part READS"),
        (BLOCK_BODY, "        x = self.ln_1(x + self.attention(x, rotation))\n"
         "        return self.ln_2(x + self.feed_forward(x))\n", "post-norm")],
    6: [("x = block(x, rotation)", "x = block(x)", "rotation to every block"),
        ("logits.flatten(0, 1), targets.flatten()",
         "logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()", "targets are shifted already"),
        ("targets.flatten()", "idx.flatten()", "with targets, not with idx"),
        ("logits.flatten(0, 1), targets.flatten()",
         "logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten()", "in targets, not in idx"),
        ("logits.flatten(0, 1), targets.flatten()", "logits[:, -1], targets[:, -1]",
         "not only the last one"),
        ("x = block(x, rotation)", "block(x, rotation)", "is lost"),
        ("self.lm_head(self.ln_f(x))", "self.lm_head(x)", "ln_f"),
        ("self.ln_f(x))", "self.ln_f(x)).softmax(dim=-1)", "without a softmax"),
        ("return logits, None", "return logits", "two things"),
        ("return logits, None", "return None", "without targets nothing"),
        ("return logits, None", "return None, logits", "logits first"),
        ("return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
         "return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits",
         "logits first"),
        ("        if targets is None:\n            return logits, None\n", "", "no loss"),
        (".flatten(0, 1), targets.flatten()", ", targets", "flatten both"),
        ("        for block in self.blocks:\n            x = block", "        x = self.blocks",
         "for block in self.blocks"),
        ("x = block(x, rotation)", "x = x + block(x, rotation)", "not x + block"),
        ("            x = block(x, rotation)  # (B, T, C)\n"
         "        logits = self.lm_head(self.ln_f(x))",
         "            x = self.ln_f(block(x, rotation))\n        logits = self.lm_head(x)",
         "not inside it"),
        ("x = block(x, rotation)", "x = self.ln_f(block(x, rotation))", "not inside it too"),
        ("            x = block(x, rotation)  # (B, T, C)\n        logits",
         "            x = block(x, rotation)\n            break\n        logits",
         "only the first block"),
        ("self.token_embedding(idx)", "self.ln_f(self.token_embedding(idx))",
         "not before them too"),
        (MODEL_BODY, "        x = self.ln_f(self.token_embedding(idx))\n"
         "        for block in self.blocks:\n            x = block(x, rotation)\n"
         "        logits = self.lm_head(x)", "not before them"),
        ("self.rotation(idx)", "self.rotation", "call it once"),
        ("        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
         "        logits = logits.flatten(0, 1)\n"
         "        return logits, F.cross_entropy(logits, targets.flatten())", "inside the call"),
        ("        if targets is None:\n            return logits, None\n        return logits, "
         "F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
         "        loss = None\n        if targets:\n            loss = F.cross_entropy("
         "logits.flatten(0, 1), targets.flatten())\n        return logits, loss",
         "if targets is None"),
        ("logits.flatten(0, 1)", "logits.view(-1, V)", "take the sizes from the tensor"),
        ("x = block(x, rotation)", "x = block(x, *rotation)", "without a star"),
        ("x = block(x, rotation)", "x = block(idx, rotation)", "vectors, not ids"),
        ("logits.flatten(0, 1), targets.flatten()", "targets.flatten(), logits.flatten(0, 1)",
         "logits first, then the targets")],
    7: [("    optimizer.zero_grad()\n", "", "add up"), ("    loss.backward()\n", "", "no gradient"),
        ("    optimizer.step()\n", "", "did not move"), ("loss.item()", "loss", "return a number"),
        ("_, loss = model", "loss = model", "two things"),
        ("_, loss = model", "loss, _ = model", "SECOND thing"),
        ("model(x, y)", "model(x)", "the targets too"),
        ("model(x, y)", "model(y, x)", "then the targets y"),
        ("model(x, y)", "model(x, x)", "then the targets y"),
        ("optimizer.step()", "optimizer.step(loss)", "step() takes no loss"),
        ("    optimizer.zero_grad()\n    _, loss = model(x, y)\n    loss.backward()\n",
         "    _, loss = model(x, y)\n    loss.backward()\n    optimizer.zero_grad()\n",
         "before it, not after"),
        ("    return loss.item()", "", "return the loss"),
        ("    loss.backward()\n    optimizer.step()\n",
         "    optimizer.step()\n    loss.backward()\n", "step() after backward()"),
        ("    optimizer.zero_grad()\n    _, loss = model(x, y)\n    loss.backward()\n"
         "    optimizer.step()\n", "    _, loss = model(x, y)\n    optimizer.zero_grad()\n"
         "    loss.backward()\n    optimizer.step()\n    _, loss = model(x, y)\n",
         "BEFORE the step"),
        ("return loss.item()", "return model(x, y)[1].item()", "BEFORE the step"),
        ("    optimizer.zero_grad()\n    _, loss = model(x, y)\n    loss.backward()\n"
         "    optimizer.step()\n", "    _, loss = model(x, y)\n    loss.backward()\n"
         "    optimizer.step()\n    optimizer.zero_grad()\n", "must come BEFORE backward()"),
        ("loss.backward()", "optimizer.backward()", "belongs to the loss"),
        ("loss.backward()", "model.backward()", "belongs to the loss"),
        ("    _, loss = model(x, y)", "    with torch.no_grad():\n        _, loss = model(x, y)",
         "not inside torch.no_grad()"),
        ("    optimizer.step()\n", "    optimizer.step()\n    optimizer.step()\n", "moved twice"),
        ("    loss.backward()\n", "    loss.backward()\n    loss.backward()\n", "once")],
    8: [("return kept / kept.sum()", "return kept", "must sum to 1"),
        ("return kept / kept.sum()", "return kept / p", "not by p"),
        ("return kept / kept.sum()", "return kept.softmax(0)", "divide by the sum"),
        ("values.cumsum(dim=0) - values", "values.cumsum(dim=0)", "crosses p stays"),
        ("torch.zeros_like(probs).scatter(0, order, values)", "values", "order of the vocabulary"),
        ("torch.zeros_like(probs).scatter(0, order, values)", "values[order]", "once more"),
        ("values = values.masked_fill(likelier >= p, 0.0)",
         "values = values * (values.cumsum(dim=0) >= p)", "not those from there"),
        (TOP_P_END, "    values = values * (values.cumsum(dim=0) >= p)\n"
         "    return torch.zeros_like(probs).scatter(0, order, values)", "BEFORE the sum reaches"),
        ("return kept / kept.sum()", "return (kept > 0).float()", "not the tokens' probabilities"),
        ("kept = torch.zeros_like(probs).scatter(0, order, values)",
         "kept = torch.zeros_like(probs).scatter(0, order, (values > 0).float())",
         "its own probability"),
        ("likelier >= p", "torch.arange(len(probs)) >= int(p * len(probs))",
         "not a share of the vocabulary"),
        (", descending=True", "", "from the largest"), (">= p", "< p", "upside down"),
        ("values, order = torch.sort", "values = torch.sort", "two things"),
        ("cumsum(dim=0)", "cumsum()", "needs the dimension"),
        ("values.masked_fill(likelier >= p, 0.0)", "values[likelier < p]", "ALL V values"),
        ("return kept / kept.sum()", "return kept, order", "one tensor"),
        ("likelier >= p", "likelier > p", "exactly p"),
        ("    kept = torch.zeros_like(probs).scatter(0, order, values)\n",
         "    probs[order[likelier >= p]] = 0\n    kept = probs\n", "changes probs itself"),
        ("return kept / kept.sum()", "return kept.masked_fill(kept == 0, -math.inf).softmax(0)",
         "no softmax"),
        ("scatter(0, order", "scatter(order", "scatter needs the dimension"),
        ("torch.zeros_like(probs).scatter(0, order, values)", "probs.masked_fill(likelier >= p, 0)",
         "known for the SORTED values"),
        ("values, order = torch.sort(probs, descending=True)",
         "values, order = probs, torch.arange(len(probs))", "sort first")],
    9: [("idx[:, -block_size:]", "idx", "cut the context"),
        ("idx[:, -block_size:]", "idx[:, :block_size]", "LAST block_size"),
        ("idx[:, -block_size:]", "idx[:, -1:]", "not fewer"),
        ("idx[:, -block_size:]", "idx[-block_size:]", "cuts whole sequences away"),
        ("logits[:, -1]", "logits[:, 0]", "LAST"),
        ("logits[:, -1]", "logits", "last position only"),
        (".softmax(dim=-1)", "", "softmax before multinomial"),
        ("softmax(dim=-1)", "softmax(dim=0)", "over the vocabulary"),
        ("logits, _ = model", "logits = model", "two things"),
        ("        logits, _ = model(idx", "        idx = idx[:, -block_size:]\n"
         "        logits, _ = model(idx", "prompt in front"),
        ("dim=1)", "dim=0)", "append"),
        ("    return idx", "        return idx", "after the loop"),
        ("idx = torch.cat", "torch.cat", "is lost"),
        ("torch.multinomial(probs, num_samples=1)", "probs.argmax(dim=-1)", "must be (B, 1)"),
        ("torch.multinomial(probs, num_samples=1)", "probs.argmax(dim=-1, keepdim=True)",
         "multinomial"),
        ("range(n)", "range(n - idx.size(1))", "n NEW tokens"),
        ("    return idx", "    return idx[:, -n:]", "the new tokens only"),
        ("logits[:, -1].softmax", "(logits[:, -1] / 0.5).softmax", "the model's own probabilities"),
        (".softmax(dim=-1)", ".softmax(dim=-1).softmax(dim=-1)", "one softmax"),
        ("    for _ in range(n):\n", "    for _ in range(1):\n", "after the loop"),
        (GENERATE_BODY, "    logits, _ = model(idx[:, -block_size:])\n"
         "    probs = logits[:, -1].softmax(dim=-1)\n"
         "    return torch.cat((idx, torch.multinomial(probs, n, replacement=True)), dim=1)\n",
         "run the model again"),
        (GENERATE_BODY, "    new = []\n    for _ in range(n):\n"
         "        logits, _ = model(idx[:, -block_size:])\n"
         "        new.append(torch.multinomial(logits[:, -1].softmax(dim=-1), 1))\n"
         "    return torch.cat((idx, *new), dim=1)\n", "never reads the tokens")],
    10: [("dim=2", "dim=1", "dim=2"), ("[layer]", "[0]", "each layer has its own"),
         ("torch.cat((self.keys[layer], k)", "torch.cat((k, self.keys[layer])", "at the END"),
         ("if self.keys[layer] is not None", "if self.keys[layer]", "no condition"),
         ("if self.keys[layer] is not None", "if True", "at first nothing is stored"),
         ("        self.keys[layer], self.values[layer] = k, v\n", "", "ALL keys and values"),
         ("self.keys[layer], self.values[layer] = k, v", "self.keys, self.values = k, v",
          "one entry for each layer"),
         ("return k, v", "return k", "two things"),
         ("return k, v", "return v, k", "in this order"),
         ("        return k, v", "        self.length += k.size(2)\n        return k, v",
          "leave self.length"),
         ("v = torch.cat((self.values[layer], v)", "v = torch.cat((self.keys[layer], v)",
          "the values are wrong"),
         ("if self.keys[layer] is not None", "if self.length > 0", "counted elsewhere"),
         ("        self.keys[layer], self.values[layer] = k, v\n",
          "        self.keys.append(k)\n        self.values.append(v)\n", "not self.keys.append"),
         ("        return k, v", "        self.keys.append(k)\n"
          "        return torch.cat(self.keys, 2), v", "not self.keys.append"),
         ("        if self.keys", "        self.keys[layer] += k\n        if self.keys",
          "+= adds numbers"),
         ("torch.cat(", "torch.stack(", "makes a new dimension")],
}


@pytest.fixture(scope="module")
def space():
    """The notebook's names after the set-up and the helper cell."""
    import matplotlib
    matplotlib.use("Agg")
    names, folder = {"__name__": "notebook", "V": 62}, os.getcwd()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(SET_UP, names)
            exec(HELPERS, names)
    finally:
        os.chdir(folder)
    given = ("class MyMultiHead", "class MyLayerNorm", "class MyFeedForward", "def my_angles")
    parts = [cell.source for cell in CODE if cell.source.startswith(given)]
    assert len(parts) == len(given)
    for number in sorted(EXERCISES):  # later exercises use earlier parts
        with contextlib.redirect_stdout(io.StringIO()):
            exec(EXERCISES[number][0], names)
            exec(EXERCISES[number][1], names)
            for part in parts:
                exec(part, names)
    return names


def answers_of(number):
    """[(what the student writes, its checker, its solution)] of an exercise."""
    found = re.findall(r"(?m)^(\w+) = choose\((\w+), \1, (\w+)\)", EXERCISES[number][1])
    assert found
    return found


def verdict(space, number, source):
    """What the student sees after the cell with this answer."""
    answer = source.split(" = choose")[0].rpartition("\n")[0]
    for name, _, solution in answers_of(number):
        answer = re.sub(rf"\b{solution}\b", name, answer)
    calls = [line for line in EXERCISES[number][0].splitlines() if line.startswith("print(")]
    cell = "\n".join([answer, *calls])
    # as in Jupyter: a file of its own, whose lines can be shown beside an error
    linecache.cache["answer"] = len(cell), None, cell.splitlines(True), "answer"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(cell, "answer", "exec"), dict(space))
    return printed.getvalue()


@pytest.mark.parametrize("number", sorted(EXERCISES))
def test_exercise(space, number):
    """Open at first; the solution is right; the run goes on with the solution."""
    stub, solution = EXERCISES[number]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(stub, dict(space))
    answers = answers_of(number)
    assert printed.getvalue().count("open") == len(answers)
    assert verdict(space, number, solution).count("right\n") == len(answers)
    for name, checker, _ in answers:
        assert space["run_checker"](space[checker], space[name]) == "right"


@pytest.mark.parametrize("number, old, new, hint", [
    pytest.param(number, *case, id=f"{number} {case[2] or case[1][:20]}")
    for number, cases in WRONG.items() for case in cases])
def test_wrong_answer_gets_its_hint(space, number, old, new, hint):
    solution = EXERCISES[number][1]
    assert old in solution
    said = verdict(space, number, solution.replace(old, new))
    wrong = said.count("right\n") < len(answers_of(number))
    assert wrong and "open" not in said and hint in said, said


def test_a_right_answer_is_used(space, capsys):
    """The notebook goes on with the student's own part if it is right, and says so."""
    def own(T, S):
        return space["torch"].ones(T, S).triu(1 + S - T) == 1

    def wrong(T, S):
        return ~own(T, S)
    assert space["choose"](space["check_mask"], own, None) is own
    assert "your own" in capsys.readouterr().out
    assert space["choose"](space["check_mask"], wrong, own) is own
    assert "the solution" in capsys.readouterr().out


def test_a_wrong_block_is_not_used_as_reference(space):
    """A wrong block, left over from exercise 5, is named by exercise 6."""
    class Wrong(space["MyBlock"]):
        def forward(self, x, rotation=None):
            return 2 * super().forward(x, rotation)
    names = {**space, "MyBlock": Wrong}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(EXERCISES[6][0], names)  # defines MyGPT again, with this block
        exec(EXERCISES[6][1].split("\n\nMyGPT = choose")[0], names)
    verdict = names["run_checker"](names["check_gpt"], names["SolutionGPT"])
    assert "exercise 5" in verdict, verdict


@pytest.mark.parametrize("guess, close", [(8, True), ("8", True), (8.4, False), ("four", None),
                                          (..., None)])
def test_a_guess_may_be_a_number_or_its_text(space, capsys, guess, close):
    space["GUESSES"].clear()
    space["score_guess"]("examples", guess, 8)
    assert space["GUESSES"].get("examples") is close
    assert ("No guess" in capsys.readouterr().out) == (close is None)


def test_predictions_do_not_stand_beside_their_answers():
    """A guess has a cell of its own; the cell that prints the answer has a folded output."""
    asked = re.compile(r"(?m)^(guess_\w+) = \.\.\.")
    guesses = {name for cell in CODE for name in asked.findall(cell.source)}
    assert len(guesses) >= 10
    for cell in CODE:
        if re.search(r"(?m)^guess_\w+ = ", cell.source):
            assert not cell.outputs and len(cell.source.splitlines()) <= 2
        for name in re.findall(r"(?m)^score_guess\(.*?(guess_\w+)", cell.source):
            assert cell.metadata["jupyter"]["outputs_hidden"] and cell.metadata["collapsed"]
            guesses.remove(name)
    assert not guesses, f"without an answer: {guesses}"


# ------------------------------------------------------------- asserts that notice a broken gpt.py
SHORTER = {  # so that the cells run in seconds
    "300, temperature": "3, temperature", "gpt.estimate_loss(shipped, val_ids)": "saved_loss",
    "ladder = {": 'saved_loss = min(r["val_loss"] for r in saved["history"])\nladder = {',
    "range(60)": "range(2)", "sequences=24)": "sequences=4)", "prompt_ids, 120": "prompt_ids, 5",
    "size(1) + 120)": "size(1) + 5)"}
# What to change in gpt.py, in which sections to look, the words of the assert that notices it.
CHANGES = [
    ("sequences[:, :-1], sequences[:, 1:]", "sequences[:, :-1], sequences[:, :-1]", [2],
     "shifted by one"),
    ("self.stoi[character] for", "self.stoi[character] ^ 1 for", [2], "encode must undo decode"),
    (".triu(1 + S - T)", ".triu(2 + S - T)", [4], ""),
    ("/ math.sqrt(hs)", "/ hs", [4], ""),
    ("weights = F.softmax(scores, dim=-1)", "weights = F.softmax(scores, dim=-2)", [4], ""),
    ("is_causal=True", "is_causal=False", [4], "leaks into the past"),
    ("torch.cat((a * cos - b * sin, a * sin + b * cos)", "torch.cat((a * cos, a * sin)", [4, 5, 6],
     "rotates in another way"),
    ("k = F.layer_norm(k, (hs,))", "k = F.rms_norm(k, (hs,))", [4, 5],
     "MultiHeadAttention computes"),
    ("F.relu(x).square()", "F.relu(x)", [4, 5, 6, 7], "FeedForward computes"),
    ("return x + self.feed_forward", "return self.feed_forward", [4, 5, 6, 7], "Block computes"),
    ("self.lm_head(self.ln_f(x))", "self.lm_head(x)", [4, 5, 6, 7, 8], "MyGPT and gpt.py differ"),
    ("torch.arange(start, start + T", "torch.arange(0, T", [4, 5, 6, 7, 8, 12],
     "the cache changes the logits"),
    ("nn.init.zeros_(parameter)", "nn.init.normal_(parameter)", [4, 5, 6, 7, 8, 9], "not ln V"),
]
RUNNER = r"""
import contextlib, hashlib, io, json, os, sys
import matplotlib
matplotlib.use("Agg")
import torch
torch.set_num_threads(1)
job, answers = json.load(sys.stdin), []
figures = []

def take(alt):
    import matplotlib.pyplot as plt
    canvas = plt.gcf().canvas
    canvas.draw()
    figures.append(hashlib.sha256(bytes(canvas.buffer_rgba())).hexdigest())
    plt.close()

def execute(cells, space):
    for section, source in cells:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(source, f"section {section}", "exec"), space)
        except Exception as error:
            return [section, type(error).__name__, str(error)]
        if "def show(alt)" in source:
            space["show"] = take if job["figures"] else lambda alt: space["plt"].close()
    return [None, "", ""]

for folder, cells, again in job["runs"]:
    os.chdir(folder)
    sys.modules.pop("gpt", None)
    space = {}
    answers.append(execute(cells, space))
    first = {}
    for turn, order in enumerate((again, again[::-1])):
        for number in order:
            del figures[:]
            execute([cell for cell in cells if cell[0] == number], space)
            if turn == 0:
                first[number] = list(figures)
            else:
                answers.append([number, first[number], list(figures)])
print("\n" + json.dumps(answers))
"""


def cells_of(sections):
    cells = []
    for number in sections:
        for source in SECTIONS[number]:
            for long, short in SHORTER.items():
                source = source.replace(long, short)
            cells.append([number, source])
    return cells


def run_cells(runs, figures=False):
    """Run [folder, cells, sections to run again] one after the other, in one process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run([sys.executable, "-c", RUNNER], text=True, capture_output=True,
                             env=env, input=json.dumps({"runs": runs, "figures": figures}),
                             cwd=ROOT)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def noticed(tmp_path_factory):
    """{index of the change: [section, kind of error, message]} of the first cell that fails."""
    text, runs, indices = (ROOT / "gpt.py").read_text(encoding="utf-8"), [], []
    for index, (old, new, sections, _) in enumerate(CHANGES):
        if old in text:
            folder = tmp_path_factory.mktemp("changed")
            (folder / "gpt.py").write_text(text.replace(old, new, 1), encoding="utf-8")
            for name in ("input.txt", "checkpoints"):
                (folder / name).symlink_to(ROOT / name)
            runs.append([str(folder), cells_of([0, 1, 2, *([3] * (8 in sections)), *sections]), []])
            indices.append(index)
    return dict(zip(indices, run_cells(runs), strict=True))


@pytest.mark.parametrize("index", range(len(CHANGES)), ids=[change[1][:30] for change in CHANGES])
def test_a_broken_gpt_is_noticed(noticed, index):
    old, _, sections, words = CHANGES[index]
    assert index in noticed, f"gpt.py no longer has {old!r}: change another line of it"
    section, kind, message = noticed[index]
    assert (section, kind) == (sections[-1], "AssertionError") and words in message, noticed[index]


def test_asserts_hold_and_sections_can_run_again():
    """Sections 4, 6 and 7 run again in another order: they draw the same figures."""
    cells = cells_of([0, 1, 2, 3, 4, 5, 6, 7, 8, 12])
    first, *again = run_cells([[str(ROOT), cells, [4, 6, 7]]], figures=True)
    assert first[0] is None, first
    for section, before, after in again:
        assert before and before == after, f"section {section} drew another figure"


# ------------------------------------------------------------------------------ the HTML pages
def html_output(name):
    """The HTML of the output that holds this page."""
    (html,) = [output["data"]["text/html"] for cell in CODE for output in cell.outputs
               if f'id="{name}"' in output.get("data", {}).get("text/html", "")]
    return html


def test_the_saved_page_is_the_one_of_the_notebook():
    saved = (ROOT / "checkpoints" / "attention.html").read_text(encoding="utf-8")
    assert html_output("attention") in saved
    assert "http" not in saved.replace("http-equiv", "")  # nothing is loaded from elsewhere


def browse(folder, page, script):
    """Open a page in headless Chromium, run a script, return what it writes."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no Chromium here")
    file = folder / "page.html"
    result = '<pre id="result"></pre>'
    file.write_text(f"{page}{result}<script>const say=x=>document.getElementById('result')"
                    f".textContent=JSON.stringify(x);{script}</script>", encoding="utf-8")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=50).stdout
    return json.loads(re.search(r'<pre id="result">(.*?)</pre>', dom, re.S).group(1))


def exported(name):
    """The page inside the notebook as nbconvert exports it."""
    from nbconvert import HTMLExporter
    cell = next(cell for cell in CODE if any(
        f'id="{name}"' in output.get("data", {}).get("text/html", "") for output in cell.outputs))
    small = nbformat.v4.new_notebook(cells=[cell], metadata=BOOK.metadata)
    html = HTMLExporter(template_name="basic").from_notebook_node(small)[0]
    return re.sub(r'<script src="http[^>]*></script>', "", html)


def test_hovering_shows_the_weights(tmp_path):
    """The weights of the hovered character: in the page, and again in what it was made from."""
    shown = browse(tmp_path, exported("attention"), """
const spans=[...document.querySelectorAll('#attention .text span')];
spans[20].dispatchEvent(new MouseEvent('mouseover'));
const first=spans.map(s=>+s.dataset.weight);
const head=document.querySelector('#attention .head');head.value=7;head.onchange();
say([first,spans.map(s=>+s.dataset.weight),
document.querySelector('#attention .info').textContent])""")
    first, other, info = shown
    assert abs(sum(first) - 1) < 0.1 and sum(first[21:]) == 0, first
    assert abs(sum(other) - 1) < 0.1 and first != other
    assert "position 20" in info and "%" in info
    data = json.loads(re.search(r",D=(\{.*?\});", html_output("attention"), re.S).group(1))
    weights, T = base64.b64decode(data["weights"]), data["T"]
    start = data["head"] * T * (T + 1) // 2 + 20 * 21 // 2  # lower triangles, row after row
    row = [weight / 255 for weight in weights[start : start + 21]]
    assert first[:21] == pytest.approx(row, abs=1e-3) and len(first) == T


def test_the_slider_changes_the_bars(tmp_path):
    cold, warm, hot = browse(tmp_path, exported("temperature"), """
const slider=document.querySelector('#temperature .slider');
const at=t=>{slider.value=t;slider.oninput();
return [...document.querySelectorAll('#temperature .bars div')].map(d=>+d.dataset.p)};
say([at(0),at(1),at(2)])""")
    assert cold[0] == 1 and sum(cold) == 1
    assert cold[0] > warm[0] > hot[0] > 0 and warm[0] > warm[-1] and sum(warm) <= 1
