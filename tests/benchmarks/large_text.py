"""Large texts: how long until the first step, and how much memory on top of a small text's.

    python tests/benchmarks/large_text.py                 # 1 GB of text, 2 GB of train.bin
    python tests/benchmarks/large_text.py --megabytes 50  # a twentieth of it

The text is input.txt over and over; the ids of train.bin are random, with a byte-level vocabulary.
Memory is what the process has of its own (RssAnon), and with the pages of mapped files (Rss), which
the system takes back when it needs them; both are sampled fifty times a second. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def start(folder, *words):
    """Run two steps of a tiny model: seconds until it says what it will do, peaks of memory."""
    clock, said, peaks = time.perf_counter(), None, {"RssAnon": 0, "VmRSS": 0}
    sizes = "--n_layer 1 --n_head 1 --n_embd 8 --block_size 8 --batch_size 1 --max_iters 2"
    with open(folder / "out.txt", "w+") as out:
        run = subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "gpt.py"), "--train", "--device", "cpu",
             *sizes.split(), *words], cwd=folder, stdout=out)
        while run.poll() is None:
            for line in Path(f"/proc/{run.pid}/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
            if said is None and "Guessing" in (folder / "out.txt").read_text():
                said = time.perf_counter() - clock
            time.sleep(0.02)
    assert run.returncode == 0 and said
    return said, peaks["RssAnon"], peaks["VmRSS"]


def vocabulary(folder):
    """GPT-2's files with its 256 bytes and one pair, so that they can be made without a network."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    stoi = {letter: i for i, letter in enumerate([*letters, "th"])}
    (folder / "vocab.json").write_text(json.dumps(stoi), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    count = parser.parse_args().megabytes * 10**6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        play = (ROOT / "input.txt").read_bytes()
        (folder / "small.txt").write_bytes(play)
        with open(folder / "large.txt", "wb") as file:
            for _ in range(count // len(play)):
                file.write(play)
        vocabulary(folder)
        ids = np.random.default_rng(0).integers(0, 257, 2**20, np.uint16)
        with open(folder / "train.bin", "wb") as file:
            for _ in range(count // len(ids)):
                file.write(ids.tobytes())  # two bytes each
        ids.tofile(folder / "val.bin")
        _, own, everything = start(folder, "--data", "small.txt")
        print(f"small text: {own / 1e6:,.0f} MB of its own, {everything / 1e6:,.0f} MB with files")
        for data, more in (("large.txt", []), (".", ["--tokenizer", "."])):
            size = (folder / ("train.bin" if more else data)).stat().st_size
            seconds, mine, all_of_it = start(folder, "--data", data, *more, "--ckpt", "large.pt")
            print(f"{size / 1e9:.2f} GB {'of train.bin' if more else 'of text'}: starts after "
                  f"{seconds:.1f} s, {(mine - own) / 1e6:,.0f} MB more of its own, "
                  f"{(mine - own) / size:.2f} bytes a byte; {all_of_it / 1e6:,.0f} MB with files",
                  flush=True)


if __name__ == "__main__":
    main()
