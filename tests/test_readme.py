"""What the README says about the files beside it is true."""

import re

import pytest
from conftest import ROOT

import gpt

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "gpt.py").read_text(encoding="utf-8")


def test_the_line_numbers_of_the_sections():
    """Each row of the table of sections names the line of that section's banner."""
    banners = {match[1]: number for number, line in enumerate(SOURCE.splitlines(), 1)
               if (match := re.fullmatch(r" *# -{20,} (\d\. .*)", line))}
    rows = {section: int(line)
            for line, section in re.findall(r"^\| (\d+) \| (\d\. [^|]*?) \|", README, re.M)}
    assert rows == banners


def test_every_flag_exists():
    """In the README's commands and in its words."""
    flags = {"--" + field for kind in (gpt.GPTConfig, gpt.TrainConfig, gpt.SampleConfig)
             for field in kind.__dataclass_fields__}
    others = {"--train", "--sample", "--help", "--nproc_per_node", "--index-url"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= flags | others


@pytest.mark.parametrize("path", sorted(set(re.findall(
    r"(?:checkpoints|notes|tests)/[\w./]*\w|\w+\.(?:ipynb|txt)\b", README)) - {"my.txt"}))
def test_every_file_exists(path):
    """Links, pictures and files that are spoken of."""
    assert (ROOT / path).exists()


def test_the_sentences_of_the_troubleshooting_are_the_program_s():
    """A reader searches for what the program printed."""
    part = README.split("## When something goes wrong")[1].split("\n## ")[0]
    sentences = re.findall(r"^\| `([^`]+)`", part, re.M)
    assert len(sentences) > 5
    source = re.sub(r'"\s*f?"', "", SOURCE)  # strings that go on in the next line
    for sentence in sentences:
        for piece in sentence.split(" ... "):
            assert piece in source, piece
