"""How well a character model writes: a table over the options that decide how it draws.

    python tests/benchmarks/writing.py --ckpt checkpoints/gpt_checkpoint.pt --text input.txt

Each row is 32 texts of 500 characters that start from an empty context, with a seed of their own.
The text itself (its last tenth, which the model has not learnt) stands in the first row, to
compare with. The columns:

words      share of the words written that occur in the text
speeches   share of the paragraphs that are a speech: a line with a name, then lines that are said
speakers   share of the names that are a speaker of the text
new        share of the sequences of four words that the text to learn from does not have
variety    distinct sequences of four words, as a share of all of them
copied     the longest run of characters that is in the text to learn from as well
"""

import argparse
import math
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402

NAME = re.compile(r"[A-Z][A-Z' .-]*:")


def words_of(text):
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


def fours(text):
    words = words_of(text)
    return list(zip(words, words[1:], words[2:], words[3:], strict=False))


def longest_copy(sample, text):
    """The longest run of characters of the sample that stands in the text, by bisection."""
    low, high = 0, len(sample)
    while low < high:
        length = (low + high + 1) // 2
        there = {hash(text[i : i + length]) for i in range(len(text) - length + 1)}
        found = any(hash(sample[i : i + length]) in there
                    for i in range(len(sample) - length + 1))
        low, high = (length, high) if found else (low, length - 1)
    return low


def speeches_of(text):
    """(name, lines) of the paragraphs; no name where the first line isn't one."""
    for paragraph in re.split(r"\n{2,}", text.strip("\n")):
        first, *rest = paragraph.split("\n")
        yield (first if NAME.fullmatch(first) and rest and all(rest) else None), rest


def measure(samples, learnt, vocabulary, speakers):
    """The row of figures for a list of texts."""
    words = [word for sample in samples for word in words_of(sample)]
    # The end of a text is cut off in the middle, so its last paragraph doesn't count.
    parts = [name for sample in samples for name, _ in list(speeches_of(sample))[:-1]]
    names = [name for name in parts if name]
    four = [each for sample in samples for each in fours(sample)]
    known = set(fours(learnt))
    return (sum(word in vocabulary for word in words) / len(words),
            len(names) / len(parts),
            sum(name in speakers for name in names) / max(1, len(names)),
            sum(each not in known for each in four) / len(four),
            len(set(four)) / len(four),
            longest_copy("\0".join(samples), learnt))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", default="checkpoints/gpt_checkpoint.pt")
    parser.add_argument("--text", default="input.txt")
    parser.add_argument("--temperatures", type=float, nargs="+",
                        default=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=500)
    options = parser.parse_args()
    model, tokenizer, about = gpt.load_checkpoint(options.ckpt)
    text = Path(options.text).read_text(encoding="utf-8")
    split = int(0.9 * len(text))
    learnt, kept = text[:split], text[split:]
    loss = gpt.estimate_loss(model, tokenizer.encode(kept))
    print(f"{options.ckpt}: validation loss {loss:.4f}, {loss / math.log(2):.3f} bits a character")
    vocabulary = set(words_of(text))
    speakers = {name for name, _ in speeches_of(text) if name}

    def row(label, figures):
        *shares, copied = figures
        print(f"| {label} | {' | '.join(f'{share:.1%}' for share in shares)} | {copied} |",
              flush=True)

    print("| temperature, filter | words | speeches | speakers | new | variety | copied |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    pieces = [kept[i : i + options.length]
              for i in range(0, len(kept) - options.length, len(kept) // options.samples)]
    row("the text itself", measure(pieces, learnt, vocabulary, speakers))
    for temperature in options.temperatures:
        for label, filters in {"none": dict(top_p=1.0), "top-p 0.95": dict(top_p=0.95),
                               "top-p 0.9": dict(top_p=0.9),
                               "top-k 10": dict(top_p=1.0, top_k=10)}.items():
            idx = torch.full((options.samples, 1), tokenizer.stoi["\n"])
            out = model.generate(idx, options.length, tokenizer, temperature=temperature,
                                 seed=round(1000 * temperature), **filters)
            samples = [tokenizer.decode(ids) for ids in out]
            row(f"{temperature}, {label}", measure(samples, learnt, vocabulary, speakers))


if __name__ == "__main__":
    main()
