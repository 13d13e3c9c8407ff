"""Damaged and hostile checkpoints, texts and command lines: each gets success or one sentence.

    python tests/soak/fuzz.py --count 1000                 # so many of each kind
    python tests/soak/fuzz.py --kind texts --count 200 --seed 3
    python tests/soak/fuzz.py --kind checkpoints --only 17 --keep /tmp/case    # one case, kept

Each case calls gpt.main in a forked child. It must end within 20 s of CPU time (120 s in all) with
exit code 0, or with 2 and one sentence on stderr; nothing may be executed; and its memory may grow
by at most --memory MiB, and 16 bytes for each byte of the text, beyond what the undamaged command
takes (the address space is limited to 4 GiB more).
"""
import argparse
import contextlib
import io
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import fields
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness  # noqa: E402
from harness import MIB, RUN, SIZES, TEXT, gpt  # noqa: E402

NAN, INF = float("nan"), float("inf")
SAMPLE = "--sample --ckpt run.pt --prompt the --max_new_tokens 5".split()
RESUME = "--train --resume --ckpt run.pt --max_iters 6".split()


class Command:
    """Pickled, it would run a command when it is opened."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


class Evaluate:
    """The same by a built-in function."""

    def __reduce__(self):
        return eval, ("open('pwned', 'w')",)


def prepare(folder):
    """Two undamaged runs, one of them in fp16 with byte pairs, to start from."""
    (folder / "bpe").mkdir(parents=True)
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator([TEXT], 300, show_progress=False)
    trainer.save_model(str(folder / "bpe"))
    for name, words in (("char", []), ("pairs", ["--tokenizer", folder / "bpe", "--precision",
                                                 "fp16", "--optimizer", "adamw", "--positions",
                                                 "learned"])):
        (folder / name).mkdir()
        (folder / name / "text.txt").write_text(TEXT, encoding="utf-8")
        done = harness.run(folder / name, *RUN, *words, "--max_iters", 4, "--eval_interval", 2)
        assert done.code == 0, done.err


# -------------------------------------------------------------------------------- checkpoints
def hostile_value(chance):
    """Anything that a file can hold and no part of a checkpoint expects."""
    return chance.choice([
        lambda: None, lambda: -1, lambda: 0, lambda: 1, lambda: 7, lambda: 2**40, lambda: 10**30,
        lambda: True, lambda: 0.5, lambda: NAN, lambda: INF, lambda: -1e300, lambda: "",
        lambda: "text", lambda: "\ud800", lambda: "a\nb\x1b[2J", lambda: b"bytes", list, dict, set,
        lambda: [1, 2], lambda: ("a",), lambda: {"a": 1}, lambda: {0: "a"}, lambda: 1j,
        lambda: torch.zeros(()), lambda: torch.zeros(0), lambda: torch.ones(3),
        lambda: torch.full((16, 16), NAN), lambda: torch.zeros(16, 48),
        lambda: torch.zeros(1).expand(2**30), lambda: torch.zeros(1).half().expand(2**24, 16),
        lambda: torch.ones(5, dtype=torch.int64), lambda: torch.ones(16, dtype=torch.complex64),
        lambda: torch.ones(4, 4).to_sparse(), lambda: torch.zeros(16, device="meta"),
        lambda: torch.zeros(9, dtype=torch.bool), lambda: torch.nn.Parameter(torch.ones(2)),
        Command, Evaluate])()


def alter(tensor, chance):
    """A tensor of another shape, type or content."""
    return chance.choice([
        lambda: tensor.flatten(), lambda: tensor[None], lambda: tensor.reshape(-1)[:1],
        lambda: tensor.reshape(-1)[:1].expand(tensor.shape), lambda: tensor.double(),
        lambda: tensor.half(), lambda: tensor.long(), lambda: tensor * NAN, lambda: tensor * INF,
        lambda: tensor + 1e30, lambda: -tensor, lambda: torch.cat((tensor.flatten(),) * 3),
        lambda: tensor.transpose(0, -1), lambda: tensor.to_sparse(),
        lambda: tensor.to(torch.complex64),
        lambda: torch.empty(0), lambda: tensor.bool()])()


def mutate(content, chance):
    """Replace, remove, rename or add one thing somewhere in the content."""
    node = content
    while True:
        keys = list(node if isinstance(node, dict) else range(len(node)))
        if not keys:
            return
        key = chance.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and chance.random() < 0.85:
            node = node[key]
            continue
        kind = chance.choice(["replace", "replace", "remove", "add", "alter", "alter"])
        if kind == "remove":
            del node[key]
        elif kind == "add" and isinstance(node, dict):
            node[chance.choice([hostile_key(chance), f"{key}."])] = hostile_value(chance)
        elif kind == "add":
            node.append(hostile_value(chance))
        elif kind == "alter" and torch.is_tensor(node[key]) and node[key].numel() < 10**6:
            with contextlib.suppress(RuntimeError):  # what an earlier change made sparse or meta
                node[key] = alter(node[key], chance)
        elif kind == "alter" and type(node[key]) in (int, float):
            node[key] = chance.choice([-node[key], node[key] * 1000, node[key] + 1, str(node[key]),
                                       float(node[key]), [node[key]], 2**31, NAN])
        else:
            node[key] = hostile_value(chance)
        return


def hostile_key(chance):
    return chance.choice(["path", "model", "device", "format", "module", "", 5, None, "\ud800"])


def rewrite_pickle(data, chance):
    """Change the instructions inside a checkpoint, with the zip's checksums set right."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            part = bytearray(old.read(entry))
            if entry.filename.endswith("data.pkl"):
                how = chance.randrange(4)
                if how == 0:
                    part = pickle.dumps(chance.choice([Command, Evaluate])(), 2)
                elif how == 1:
                    part = part.replace(b"collections\nOrderedDict", b"os\nsystem")
                    part = part.replace(b"torch._utils\n_rebuild_tensor_v2", b"builtins\nexec")
                elif how == 2:  # storages and shapes that claim other sizes
                    for _ in range(chance.randint(1, 3)):
                        places = [i for i in range(len(part) - 1) if part[i : i + 1] == b"K"]
                        part[chance.choice(places) + 1] = chance.randrange(256)
                else:
                    for _ in range(chance.randint(1, 5)):
                        part[chance.randrange(len(part))] = chance.randrange(256)
            elif chance.random() < 0.1:
                part = part[: chance.randrange(len(part) + 1)]
            new.writestr(entry.filename, bytes(part))
    return target.getvalue()


def damage(data, chance):
    """Bytes changed, cut, repeated or inserted anywhere."""
    data, place = bytearray(data), chance.randrange(len(data))
    kind = chance.choice(["flip", "flip", "cut", "zeros", "insert", "repeat", "swap"])
    if kind == "flip":
        for _ in range(chance.choice([1, 2, 10, 1000])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "zeros":
        data[place : place + 500] = bytes(len(data[place : place + 500]))
    elif kind == "insert":
        data[place:place] = chance.randbytes(chance.choice([1, 7, 512]))
    elif kind == "repeat":
        data[place:place] = data[max(0, place - 1000) : place]
    else:
        data = data[place:] + data[:place]
    return bytes(data)


def checkpoint_case(folder, base, chance):
    """A damaged file in a copy of a good run; returns a name for it and the command."""
    source = chance.choice(["char", "pairs"])
    shutil.copytree(base / source, folder)
    name, words = chance.choice([("run.pt", SAMPLE), ("run.resume.pt", RESUME)])
    data = (folder / name).read_bytes()
    kind = chance.choice(["bytes", "structure", "structure", "structure", "pickle"])
    if kind == "bytes":
        (folder / name).write_bytes(damage(data, chance))
    elif kind == "pickle" and chance.random() < 0.2:
        torch.save(Command(), folder / name, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        (folder / name).write_bytes(rewrite_pickle(data, chance))
    else:
        content = torch.load(folder / name, weights_only=True)
        for _ in range(chance.choice([1, 1, 1, 2, 4])):
            mutate(content, chance)
        torch.save(content, folder / name)
    return f"{kind} of {name} ({source})", words


# -------------------------------------------------------------------------------------- texts
def hostile_text(chance):
    """A name and the bytes of a text that somebody may give, by mistake or not."""
    letters = "abc def\n"
    size = chance.choice([0, 1, 2, 9, 50, 100, 200, 3000])
    wide = [chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000]
    astral = chance.sample(range(0x10000, 0x110000), 70_000) if chance.random() < 0.02 else []
    plain = "".join(chance.choices(letters, k=size))
    kinds = {
        "empty": lambda: b"", "one character": lambda: b"x", "plain": plain.encode,
        "one letter": lambda: b"a" * size, "NULs": lambda: bytes(size),
        "control characters": lambda: bytes(chance.choices(range(32), k=size)),
        "only newlines": lambda: b"\n" * size,
        "mixed newlines": lambda: "".join(
            chance.choices(["a", "b", "\r", "\n", "\r\n", "\u2028", "\x85"], k=size)).encode(),
        "a byte-order mark": lambda: b"\xef\xbb\xbf" * chance.randint(1, 3) + plain.encode(),
        "UTF-16": lambda: plain.encode("utf-16"), "UTF-32": lambda: plain.encode("utf-32"),
        "lone surrogates": lambda: (plain + "\ud800\udfff").encode("utf-8", "surrogatepass"),
        "invalid UTF-8": lambda: chance.randbytes(size),
        "cut UTF-8": lambda: "é😀你".encode()[: chance.randint(1, 9)] * max(1, size // 9),
        "overlong UTF-8": lambda: b"\xc0\x80" * size,
        "any letters": lambda: "".join(chance.choices(wide, k=size)).encode(),
        "combining": lambda: ("e" + "\u0301" * size).encode(),
        "right to left": lambda: "".join(chance.choices("אבג\u202e\u200f a", k=size)).encode(),
        "every letter there is": lambda: "".join(map(chr, astral)).encode() or b"few letters",
        "50,000 letters": lambda: "".join(wide[:50_000]).encode(),
        "end of text": lambda: b"<|endoftext|>" * size,
        "spaces": lambda: b" " * size * 30 + b"x" * (size % 2),
    }
    large = {
        "10 MB of one line": lambda: b"the cat sat " * 870_000,
        "10 MB of one letter": lambda: b"a" * 10_000_000,
        "10 MB of spaces": lambda: b" " * 10_000_000 + b"x",
        "10 MB of NULs": lambda: bytes(10_000_000),
        "10 MB of emojis": lambda: "😀".encode() * 2_500_000,
        "10 MB of newlines": lambda: b"\r\n" * 5_000_000,
    }
    kind = chance.choice(list(large if chance.random() < 0.04 else kinds))
    return kind, (kinds | large)[kind]()


def text_case(folder, base, chance):
    """A text to learn, to be tokenized by bytes, to go on with, or to write from."""
    kind, data = hostile_text(chance)
    use = chance.choice(["train", "train", "pairs", "prompt", "folder", "binary", "resume",
                         "init_from"])
    shutil.copytree(base / "char", folder)
    (folder / "text.txt").write_bytes(data)
    tiny = [*RUN, "--max_iters", 1]
    words = {
        "train": tiny, "folder": [*tiny, "--data", "."], "resume": RESUME,
        "pairs": [*tiny, "--tokenizer", base / "bpe"],
        "binary": [*tiny, "--tokenizer", base / "bpe", "--data", "."],
        "prompt": "--sample --ckpt run.pt --max_new_tokens 3 --prompt_file text.txt".split(),
        "init_from": ["--train", "--init_from", "run.pt", "--data", "text.txt", "--ckpt", "new.pt",
                      "--max_iters", 1, "--device", "cpu", "--eval_tokens", 99]}[use]
    if use == "folder":
        (folder / "other.txt").write_text(TEXT)
    if use == "binary":
        (folder / "train.bin").write_bytes(data)
        (folder / "val.bin").write_bytes(chance.choice([data, bytes(500), b""]))
    return f"{kind} as {use}", words


# ------------------------------------------------------------------------------ command lines
def line_case(folder, base, chance):
    """Random options with random values; what costs time is capped by the words at the end."""
    source = chance.choice(["char", "pairs"])
    shutil.copytree(base / source, folder)
    train = chance.random() < 0.6
    groups = fields(gpt.GPTConfig) + fields(gpt.TrainConfig) if train else fields(gpt.SampleConfig)
    anything = groups if chance.random() < 0.9 else fields(gpt.TrainConfig) + fields(
        gpt.SampleConfig)
    integers = [-1, 0, 1, 2, 3, 4, 7, 8, 16, 64, 2**28, 2**28 + 1, 2**63, 10**30, "x", "1.5", ""]
    floats = [0, 0.1, 0.5, 1, 2, 1e-3, 1e9, 1e300, -1, "nan", "inf", "-inf", "x", ""]
    names = ["", "run.pt", "text.txt", "nowhere", ".", "..", "/", "run.resume.pt", "é.pt", "x.pt",
             "\udce9.pt", "a b.pt", "-", "--", "gpt2", "char", "cpu", "auto", "*", "~", "a" * 300,
             "a" * 5000 + ".pt", "a/b.pt", "text.txt/x.pt", str(base / "bpe"), "\n", "the cat"]
    words = ["--train" if train else "--sample"]
    if train and chance.random() < 0.8:
        words += [*SIZES, *"--data text.txt --precision fp32".split()]
    if chance.random() < 0.7:
        words += ["--ckpt", chance.choice(["run.pt", "new.pt"])]
    for _ in range(chance.choice([0, 1, 1, 2, 2, 3, 6])):
        field = chance.choice(anything)
        choices = field.metadata["allowed"][:-2]
        pool = (integers if field.type is int else floats if field.type is float else
                [*choices, *names])
        if field.name in ("wandb", "compile", "interactive"):
            continue
        flag = chance.choice([field.name, field.name, field.name.replace("_", "-")])
        if field.type is bool:
            words.append(chance.choice([f"--{flag}", f"--no-{flag}", f"--{flag}=1"]))
        elif field.name == "n_layer":  # so many layers would be no fault, only slow
            words += [f"--{flag}", chance.choice([-1, 0, 1, 2, 3, 1001, "x"])]
        elif chance.random() < 0.05:
            words.append(f"--{flag}")
        else:
            words += [f"--{flag}", chance.choice(pool)]
    if train:
        words += ["--max_iters", chance.choice([1, 2, 5]), "--eval_tokens", 99]
    else:
        words += ["--max_new_tokens", chance.choice([0, 1, 5])]
    if train and not {"--data", "--resume", "--init_from"} & set(words):
        words += ["--data", "text.txt"]
    if train and chance.random() < 0.7 and "--n_embd" not in words and "--resume" not in words:
        words += SIZES
    return " ".join(ascii(str(word))[1:-1][:40] for word in words), words


CASES = {"checkpoints": checkpoint_case, "texts": text_case, "lines": line_case}


def fuzz(kind, count, seed, memory=256, only=None, keep=None):
    """Run so many cases of a kind; returns how they ended, the failures and the largest growth."""
    ends, failures, largest = Counter(), [], (0, "")
    with tempfile.TemporaryDirectory() as place:
        base, folder = Path(place) / "base", Path(keep or Path(place) / "case")
        prepare(base)
        usual = max(harness.run(base / source, *SAMPLE).peak for source in ("char", "pairs"))
        shutil.copytree(base / "char", folder)
        usual = max(usual, harness.run(folder, *RUN, "--max_iters", 2).peak)
        for i in [only] if only is not None else range(count):
            shutil.rmtree(folder, ignore_errors=True)
            name, words = CASES[kind](folder, base, random.Random(f"{seed} {kind} {i}"))
            allowed = memory + 16 * (folder / "text.txt").stat().st_size // MIB
            done = harness.run(folder, *words, seconds=20, memory=4096 * MIB)
            growth = (done.peak - usual) // MIB
            wrong = harness.sentence(done)
            if (folder / "pwned").exists():
                wrong = "a command was run"
            elif growth > allowed and kind != "lines" and not wrong:  # a line may ask for memory
                wrong = f"{growth} MiB more than usual"
            if kind != "lines":
                largest = max(largest, (growth, name))
            ends["exit code 0" if done.code == 0 else "refused" if done.code == 2 else "other"] += 1
            if wrong:
                failures.append(f"{kind} {i} ({name}): {wrong}")
                print(failures[-1], flush=True)
    return ends, failures, largest


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=[*CASES, "all"], default="all")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=int, default=256, help="MiB that a case may take more")
    parser.add_argument("--only", type=int, help="this case only")
    parser.add_argument("--keep", help="a folder for the case's files")
    how = parser.parse_args(argv)
    harness.warm_up()
    bad = 0
    for kind in CASES if how.kind == "all" else [how.kind]:
        began = time.monotonic()
        ends, failures, largest = fuzz(kind, how.count, how.seed, how.memory, how.only, how.keep)
        bad += len(failures)
        print(f"{kind}: {sum(ends.values())} cases in {time.monotonic() - began:.0f} s, "
              f"{len(failures)} not as promised; {dict(ends)}; largest growth of memory "
              f"{largest[0]} MiB ({largest[1]})", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
