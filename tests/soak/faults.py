"""Faults of the world around a run: full disks, cut and flipped files, clocks, pipes, other runs.

    python tests/soak/faults.py                      # all of them
    python tests/soak/faults.py --only disk --every 1
    python tests/soak/faults.py --only truncated --step 1000

disk: a full disk (RLIMIT_FSIZE, and an error of the system's write) at every write of a run.
truncated, flipped: a tiny checkpoint cut, or with one bit flipped, at every 1,000th byte.
clock: the time jumps back and forth. console: no terminal, a closed pipe. text: it changes between
run and resume. twice: two processes with one --ckpt, begun at random distances.
"""
import argparse
import builtins
import io
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness  # noqa: E402
import torch  # noqa: E402
from harness import RUN, TEXT, finish, gpt, prepare, run, start, stored  # noqa: E402

FLAGS = [*RUN, *"--max_iters 8 --eval_interval 2 --schedule constant".split()]
RESUME = "--train --resume --ckpt run.pt --max_iters 8".split()


def whole(folder):
    """The run that nothing happens to."""
    done = run(prepare(folder / "whole"), *FLAGS)
    assert done.code == 0, done.err
    return folder / "whole"


def goes_on(folder, reference):
    """All checkpoints open, and the run goes on to the weights of the reference; else what not."""
    for path in folder.glob("run*.pt"):
        try:
            gpt.load_checkpoint(path)
        except gpt.UserError as error:
            return f"{path.name} doesn't open: {error}"
    again = run(folder, *(RESUME if (folder / "run.resume.pt").exists() else FLAGS))
    if again.code != 0:
        return f"going on: exit code {again.code}: {again.err[-500:]}"
    if not harness.same(stored(folder / "run.resume.pt"), stored(reference / "run.resume.pt")):
        return "the final weights differ"
    return ""


class FullDisk:
    """Stands for open(): the n-th write to a file opened for writing, and all later ones, fail."""

    def __init__(self, n):
        self.left, self.open = n, builtins.open

    def __call__(self, path, mode="r", *args, **how):
        file = self.open(path, mode, *args, **how)
        return FullFile(file, self) if mode == "wb" else file


class FullFile:
    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def write(self, data):
        self.disk.left -= 1
        if self.disk.left <= 0:
            self.file.write(bytes(data)[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def refused_well(done, folder, name="written"):
    """Exit code 2, one sentence, no temporary file; else what not."""
    if done.code != 2 or name not in done.err:
        return f"exit code {done.code}: {done.err[-500:]}"
    return harness.sentence(done) or ("a temporary file is left" if list(folder.glob("*.tmp"))
                                      else "")


def disk(folder, how):
    """No more room from the n-th write on, for every n until a run gets through."""
    reference, n, words = whole(folder), 1, [*FLAGS, "--max_iters", 2]
    while True:
        here = prepare(folder / "run")

        def fill(n=n):
            builtins.open = io.open = FullDisk(n)
            return harness.command(*words)

        done = finish(start(here, fill), here)
        if done.code == 0:
            break
        yield f"write {n} fails", refused_well(done, here) or goes_on(here, reference)
        n += how.every
    size = (here / "run.resume.pt").stat().st_size  # of the run that got through
    for limit in range(2048, size, 2048 * how.every):
        here = prepare(folder / "run")

        def limited(limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return harness.command(*words)

        done = finish(start(here, limited), here)
        yield (f"files of at most {limit} bytes",
               refused_well(done, here) or goes_on(here, reference))


def damaged(folder, how, change):
    """A tiny checkpoint, changed at every how.step-th byte: refused, or as if nothing was."""
    path = whole(folder) / "run.resume.pt"
    data, reference = path.read_bytes(), stored(path)
    for place in range(0, len(data), how.step):
        path.write_bytes(change(data, place))
        wrong = ""
        try:
            model, tokenizer, rest = gpt.load_checkpoint(path)
        except gpt.UserError:
            pass
        else:
            alike = all(torch.equal(weight, reference["model_state_dict"][name])
                        for name, weight in model.state_dict().items())
            wrong = "" if (alike and tokenizer.stoi == reference["stoi"] and
                           harness.same(reference, reference | rest)) else "loaded something else"
        yield f"byte {place}", wrong


def truncated(folder, how):
    yield from damaged(folder, how, lambda data, place: data[:place])


def flipped(folder, how):
    chance = random.Random(how.seed)
    yield from damaged(folder, how, lambda data, place: data[:place] + bytes(
        [data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])


def clock(folder, how):
    """The clocks jump at every call: the same weights, and no error."""
    reference, chance = whole(folder), random.Random(how.seed)
    for name, jump in (("back", -3600), ("forth", 10**6), ("anywhere", None), ("stopped", 0)):
        here = prepare(folder / "run")

        def jumping(jump=jump):
            now = [1e9]

            def tick():
                now[0] += chance.uniform(-1e6, 1e6) if jump is None else jump
                return now[0]

            time.perf_counter = time.time = tick
            time.time_ns = lambda: int(tick() * 1e9)
            return harness.command(*FLAGS)

        done = finish(start(here, jumping), here)
        wrong = f"exit code {done.code}: {done.err[-500:]}" if done.code else ""
        yield f"the clock jumps {name}", wrong or goes_on(here, reference)


def console(folder, how):
    """No terminal at all, a closed input, a reader that goes away."""
    reference = whole(folder)
    words = [f'"{sys.executable}"', "-B", f'"{gpt.__file__}"', *map(str, FLAGS)]
    python = f"env OMP_NUM_THREADS=1 {' '.join(words)}"
    for name, line, codes in (("setsid", f"setsid -w {python} </dev/null >out 2>err", (0,)),
                              ("closed", f"{python} <&- >&- 2>&-", (0,)),
                              ("nohup", f"nohup {python} >out 2>&1", (0,)),
                              ("head -1", f"set -o pipefail; {python} 2>err | head -1", (0, 141)),
                              ("head -c 1", f"set -o pipefail; {python} 2>err | head -c 1",
                               (0, 141)),
                              ("a reader that never reads", f"{python} 2>err | true", (0, 141))):
        here = prepare(folder / "run")
        done = subprocess.run(["bash", "-c", line], cwd=here, capture_output=True, timeout=200)
        said = (here / "err").read_text() if (here / "err").exists() else ""
        wrong = ("" if done.returncode in codes and "Traceback" not in said and
                 "Exception" not in said else f"exit code {done.returncode}: {said[-500:]}")
        yield name, wrong or goes_on(here, reference)


def text(folder, how):
    """Another text at resume is refused, nothing is touched; with the old one back it goes on."""
    reference, chance = whole(folder), random.Random(how.seed)
    for _ in range(how.runs):
        here = prepare(folder / "run")
        assert run(here, *FLAGS, "--max_iters", 4).code == 0
        before = (here / "run.resume.pt").read_bytes()
        place, letter = chance.randrange(len(TEXT)), chance.choice("acdehmnorstX")
        kind = chance.choice(["change", "insert", "cut", "swap"])
        new = {"change": TEXT[:place] + letter + TEXT[place + 1 :],
               "insert": TEXT[:place] + letter + TEXT[place:], "cut": TEXT[: place - 1],
               "swap": TEXT[place:] + TEXT[:place]}[kind]
        (here / "text.txt").write_text(new, encoding="utf-8")
        done, wrong = run(here, *RESUME), ""
        if new != TEXT:
            wrong = harness.sentence(done) or ("not refused" if done.code == 0 else "")
        if new != TEXT and (here / "run.resume.pt").read_bytes() != before:
            wrong = "the resume file was touched"
        (here / "text.txt").write_text(TEXT, encoding="utf-8")
        yield f"{kind} at {place}", wrong or goes_on(here, reference)


def twice(folder, how):
    """Two processes, one --ckpt: one of them gets through, and what it leaves is one run."""
    chance = random.Random(how.seed)
    whole(folder)
    for _ in range(how.runs):
        here = prepare(folder / "run")
        words, second = [*FLAGS, "--max_iters", 60], folder / "second"
        prepare(second)
        pid = start(here, lambda words=words: harness.command(*words))
        time.sleep(chance.uniform(0, 0.6))
        other = [*words, "--seed", 5, "--ckpt", here / "run.pt"]
        other_pid = start(second, lambda words=other: harness.command(*words))
        ends = finish(pid, here), finish(other_pid, second)
        wrong = next(filter(None, map(harness.sentence, ends)), "")
        if {done.code for done in ends} == {2}:
            wrong = "both stopped"
        for path in here.glob("run*.pt"):
            try:
                gpt.load_checkpoint(path)
            except gpt.UserError as error:
                wrong = f"{path.name} doesn't open: {error}"
        pair = [stored(here / name) for name in ("run.pt", "run.resume.pt")]
        if not wrong and pair[0]["run_id"] != pair[1]["run_id"]:
            wrong = "the best model and the resume state are of different runs"
        yield f"exit codes {[done.code for done in ends]}", wrong


FAULTS = {f.__name__: f for f in (disk, truncated, flipped, clock, console, text, twice)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=FAULTS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=20, help="of text and twice")
    parser.add_argument("--every", type=int, default=1, help="of the writes, only each so-many-th")
    parser.add_argument("--step", type=int, default=1000, help="bytes from damage to damage")
    how = parser.parse_args(argv)
    harness.warm_up()
    bad = 0
    for name in how.only or FAULTS:
        began, count, wrongs = time.monotonic(), 0, 0
        with tempfile.TemporaryDirectory() as folder:
            for what, wrong in FAULTS[name](Path(folder), how):
                count += 1
                if count % 50 == 0:
                    print(f"{name}: {count} cases so far", flush=True)
                if wrong:
                    wrongs += 1
                    print(f"{name}, {what}: {wrong}", flush=True)
        print(f"{name}: {count} cases in {time.monotonic() - began:.0f} s, {wrongs} not as "
              "promised", flush=True)
        bad += wrongs
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
