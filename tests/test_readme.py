"""What the README says about the files beside it is true."""

import re

import pytest
import torch
from conftest import ROOT
from test_notes import run_note

import gpt

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "gpt.py").read_text(encoding="utf-8")
BANNER = re.compile(r" *# -{20,} (\d\. .*)")


def test_the_line_numbers_of_the_sections():
    """Each row of the table of sections names the line of that section's banner."""
    banners = {match[1]: number for number, line in enumerate(SOURCE.splitlines(), 1)
               if (match := BANNER.fullmatch(line))}
    rows = {section: int(line)
            for line, section in re.findall(r"^\| (\d+) \| (\d\. [^|]*?) \|", README, re.M)}
    assert rows == banners


def test_the_names_of_the_sections():
    """What the same table says that a section holds is defined there."""
    sections = dict(zip(*[iter(BANNER.split(SOURCE)[1:])] * 2, strict=True))
    rows = re.findall(r"^\| \d+ \| (\d\. [^|]*?) \| (.*) \|$", README, re.M)
    assert len(rows) == len(sections)
    for section, words in rows:
        for name in re.findall(r"`(\w+)`", words):
            definition = rf"^(?: *(?:class|def) {name}\b|{name} = )"
            assert re.search(definition, sections[section], re.M), (section, name)


def test_every_flag_exists():
    """In the README's commands and in its words."""
    flags = {"--" + field for kind in (gpt.GPTConfig, gpt.TrainConfig, gpt.SampleConfig)
             for field in kind.__dataclass_fields__}
    for script in (ROOT / "tests" / "benchmarks").glob("*.py"):
        flags |= set(re.findall(r'add_argument\("(--[\w-]+)"', script.read_text(encoding="utf-8")))
    others = {"--train", "--sample", "--help", "--nproc_per_node", "--index-url"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= flags | others


@pytest.mark.parametrize("path", sorted(set(re.findall(
    r"(?:checkpoints|notes|tests)/[\w./]*\w|\w+\.(?:ipynb|txt)\b", README))
    - {"my.txt", "tinyshakespeare.txt"}))
def test_every_file_exists(path):
    """Links, pictures and files that are spoken of."""
    assert (ROOT / path).exists()


def test_the_table_of_presets():
    """All of them, with their parameters."""
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| ([\d.]+)M \|", README, re.M))
    assert rows.keys() == gpt.PRESETS.keys()
    for preset, millions in rows.items():
        config, how = gpt.configure({"preset": preset}, {})
        config.vocab_size = 50257 if how.tokenizer == "gpt2" else 62
        with torch.device("meta"):
            parameters = gpt.GPTLanguageModel(config).parameters()
        assert f"{sum(p.numel() for p in parameters) / 1e6:.2f}" == millions, preset


def test_the_library_example_runs(tmp_path, monkeypatch):
    """It writes, and draws a map."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    assert run_note(README, "README.md") == 1
    assert (tmp_path / "attention_map.png").stat().st_size > 1000


def test_the_sentences_of_the_troubleshooting_are_the_program_s():
    """A reader searches for what the program printed."""
    part = README.split("## When something goes wrong")[1].split("\n## ")[0]
    sentences = re.findall(r"^\| `([^`]+)`", part, re.M)
    assert len(sentences) > 5
    source = re.sub(r'"\s*f?"', "", SOURCE)  # strings that go on in the next line
    for sentence in sentences:
        for piece in sentence.split(" ... "):
            assert piece in source, piece
