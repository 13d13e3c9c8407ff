"""What README says about the program and the files beside it is true."""
import re

import pytest
import test_notes
import torch
from conftest import ROOT, TEXT
from test_notes import BLOCK, NEEDS_NETWORK, gpt_arguments, run_python_blocks

import gpt

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "gpt.py").read_text(encoding="utf-8")
BANNER = re.compile(r"^# -{20,} (\d\. .*)$", re.M)
COMMANDS = [arguments for arguments in gpt_arguments(README) if "--help" not in arguments]
TROUBLESHOOTING = (ROOT / "notes" / "troubleshooting.md").read_text(encoding="utf-8")
PROBLEMS = README.split("## Problems")[1].split("\n## ")[0] + TROUBLESHOOTING.split("\n## ")[1]
MESSAGES = sorted(set(re.findall(r"^\| `([^`]+)` \|", PROBLEMS, re.M)))
offline = test_notes.offline


def test_the_line_numbers_of_the_sections():
    banners = {match[1]: SOURCE[: match.start()].count("\n") + 1
               for match in BANNER.finditer(SOURCE)}
    rows = re.findall(r"^\| (\d+) \| (\d\. [^|]*?) \|", README, re.M)
    assert {section: int(line) for line, section in rows} == banners
    model = next(line for section, line in banners.items() if "the model" in section)
    assert f"the model begins at line {model}" in README


def test_the_sections_hold_what_the_table_says():
    parts = BANNER.split(SOURCE)[1:]
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    for section, names in re.findall(r"^\| \d+ \| (\d\. [^|]*?) \| (.*) \|$", README, re.M):
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(class|def) {name}\b|^{name} = ", sections[section], re.M), name


def test_the_table_of_presets():
    """Every preset is there, with its number of parameters."""
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+)M \|", README, re.M))
    assert rows.keys() == gpt.PRESETS.keys() - {"auto"}
    for preset, millions in rows.items():
        names = gpt.GPTConfig.__dataclass_fields__
        options = {name: value for name, value in gpt.PRESETS[preset].items() if name in names}
        with torch.device("meta"):  # shapes without memory
            model = gpt.GPTLanguageModel(gpt.GPTConfig(**options))
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == millions, preset


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_the_commands_run(arguments, offline):
    """In a clone, with three tokens or one small step. What needs a network, a GPU or a run of the
    reader's own is parsed only."""
    gpt.parse(arguments)
    line = " ".join(arguments)
    if any(flag in line for flag in [*NEEDS_NETWORK, "gpt2.pt", "--compile"]):
        return
    (offline / "my.txt").write_text(TEXT, encoding="utf-8")
    (offline / "checkpoints").symlink_to(ROOT / "checkpoints")
    small = ["--max_new_tokens", "3"]
    if "--train" in arguments:
        small = ["--max_iters", "1", "--device", "cpu"]
        if "--init_from" in arguments:  # a large model: with a short text
            small += ["--data", "my.txt", "--block_size", "16"]
        else:
            small += ["--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--block_size", "16"]
    if "mine.pt" in arguments and ("--resume" in arguments or "--sample" in arguments):
        tiny = dict(preset="cpu", n_layer=1, n_head=1, n_embd=8, block_size=16, max_iters=0)
        (offline / "my.txt").write_text(TEXT + "Once", encoding="utf-8")
        gpt.train(data="my.txt", ckpt="mine.pt", **tiny)
    assert gpt.main(arguments + small) == 0


def test_the_library_example_runs(offline, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    run_python_blocks(README)


def test_the_links_and_files_exist():
    text = BLOCK.sub("", README)
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    paths = re.findall(r"(?:checkpoints|notes|tests)/[\w./]*\w", README)
    for path in {*links, *paths}:
        assert (ROOT / path).exists(), path


def test_the_samples_are_parts_of_the_files():
    blocks = [code.strip() for _, code in BLOCK.findall(README) if re.match(r"[A-Z ]+:\n", code)]
    files = ["shakespeare_sample.txt", "generated_sample.txt"]
    for block, name in zip(blocks, files, strict=True):
        assert block in (ROOT / "checkpoints" / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("message", MESSAGES)
def test_the_messages_of_the_problems_are_the_program_s(message):
    """A reader searches for what the program printed."""
    source = re.sub(r'"\s*f?"', "", SOURCE)  # a string that continues in the next line
    others = ("No module named", "No such file or directory", "Permission denied",
              "Max retries exceeded")  # of Python and of tiktoken
    assert message in source or message in others


@pytest.mark.parametrize("name, loss", [("gpt_checkpoint", 1.3478), ("shakespeare", 1.3643)])
def test_the_losses_of_the_checkpoints_are_those_of_their_tables(name, loss):
    """Another test computes them; here the CSV and the notes agree."""
    table = (ROOT / "checkpoints" / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    assert f"{float(table[-1].split(',')[2]):.4f}" == str(loss)
    assert str(loss) in (ROOT / "notes" / "benchmarks.md").read_text(encoding="utf-8")
