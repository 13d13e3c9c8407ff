"""Kill a small training at random moments of wall time, again and again; resume it each time.

    python tests/soak/kill_sweep.py --runs 200                    # SIGKILL
    python tests/soak/kill_sweep.py --runs 50 --signal TERM
    python tests/soak/kill_sweep.py --runs 50 --signal INT
    python tests/soak/kill_sweep.py --runs 50 --signal INT --twice
    python tests/soak/kill_sweep.py --runs 50 --phase save        # only within the first save
    python tests/soak/kill_sweep.py --runs 20 --torchrun 2        # one of two processes is killed

After every kill each checkpoint on disk must open and the resume state be at most one save interval
behind the steps that were done (after TERM and INT: no step behind). Then the run is resumed to the
end and must have the weights and losses, to the bit, of the run that nobody killed.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness  # noqa: E402
from harness import RUN, Watch, finish, gpt, prepare, run, start, stored  # noqa: E402

INTERVAL, STEPS = 4, 40
FLAGS = [*RUN, "--max_iters", STEPS, "--eval_interval", INTERVAL]
RESUME = "--train --resume --ckpt run.pt".split()


def training(watch):
    """What a child does: the training, watched."""
    watch.install()
    code = harness.command(*FLAGS)
    watch.phase = "end"
    return code


def wait_for(watch, phases, seconds=60):
    """Return once the child is in one of these phases."""
    deadline = time.monotonic() + seconds
    while watch.phase not in phases and time.monotonic() < deadline:
        time.sleep(0.0002)


def inspect(folder, watch, graceful):
    """What is wrong with the files that a killed run left; '' if nothing."""
    opened = {}
    for path in folder.glob("run*.pt"):
        try:
            opened[path.name] = gpt.load_checkpoint(path)[2]
        except gpt.UserError as error:
            return f"{path.name} doesn't open: {error}"
    done, saved = watch.steps, opened.get("run.resume.pt", {}).get("iteration")
    if saved is None and (watch.saves or done > 0):
        return f"no resume state after {done} steps"
    if saved is not None and not done - (0 if graceful else INTERVAL) <= saved <= done:
        return f"{done} steps were done, and the resume state is of step {saved}"
    best = opened.get("run.pt", {}).get("iteration", 0)
    if best > done:
        return f"the best model is of step {best} after {done} steps"
    return ""


def go_on(folder, launch):
    """Resume a killed run to the end, or begin anew where it had saved nothing."""
    if (folder / "run.resume.pt").exists():
        return launch(folder, *RESUME)
    if (folder / "run.pt").exists():  # killed between the two files of its first save
        refused = launch(folder, *RESUME)
        if refused.code == 0:
            refused.code = "resumed from nothing"
            return refused
    return launch(folder, *FLAGS)


def compare(folder, reference):
    """What differs from the run that nobody killed; '' if nothing."""
    for name in ("run.pt", "run.resume.pt"):
        if not harness.same(stored(folder / name), stored(reference / name)):
            return f"{name} differs from that of the uninterrupted run"
    lengths = [len((place / "run.csv").read_text().splitlines()) for place in (folder, reference)]
    return "" if lengths[0] == lengths[1] else "run.csv has other rows"


def kill_once(folder, watch, chance, how):
    """One run, killed at a random moment; returns the phase at that moment and what was wrong."""
    watch.clear()
    prepare(folder)
    number = getattr(signal, f"SIG{how.signal}")
    began = time.monotonic()
    pid = start(folder, lambda: training(watch))
    if how.phase == "save":
        wait_for(watch, ("write best model", "fsync", "rename"))
        time.sleep(chance.uniform(0, 1.1 * how.first_save))
    else:
        moment = began + chance.uniform(0, how.duration)
        while time.monotonic() < moment and watch.phase != "end":
            time.sleep(0.001)
        if watch.phase == "end":  # machines drift: few moments should be after the end
            how.duration = time.monotonic() - began
    phase, saves = watch.phase, watch.saves
    os.kill(pid, number)
    if how.twice:
        time.sleep(chance.uniform(0, 0.03))
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
    result = finish(pid, folder)
    if phase == "end" or result.code == 0:
        phase, expected = "end", (0, 128 + number, -number)
    elif number == signal.SIGKILL:
        expected = (-number,)
    else:  # before the loop, SIGTERM has no handler yet
        expected = (128 + number, -number) if phase == "start" else (128 + number,)
    if result.code not in expected:
        return phase, f"exit code {result.code}, not {expected}: {result.err[-600:]}"
    if "Traceback" in result.err:
        return phase, f"a traceback: {result.err[-600:]}"
    graceful = number != signal.SIGKILL and not how.twice
    if wrong := inspect(folder, watch, graceful):
        return phase, wrong
    if number != signal.SIGKILL and phase != "start" and list(folder.glob("*.tmp")):
        return phase, "a temporary file was left behind"
    again = go_on(folder, run)
    if again.code != 0:
        return phase, f"going on failed with {again.code}: {again.err[-600:]}"
    if phase not in ("start", "end"):
        how.duration *= 1.005
    where = f"first save, {phase}" if how.phase == "save" and not saves else phase
    return where, compare(folder, how.reference)


def sweep(folder, how):
    """All runs of a command line; returns the histogram of phases and the failures."""
    watch, chance = Watch(), random.Random(how.seed)
    how.reference = folder / "whole"
    harness.warm_up()
    pid, began = start(prepare(how.reference), lambda: training(watch)), time.monotonic()
    wait_for(watch, ("write best model", "fsync", "rename"))
    save_began = time.monotonic()
    while not watch.saves and watch.phase != "end" and time.monotonic() < began + 60:
        time.sleep(0.0002)
    how.first_save = time.monotonic() - save_began
    result, how.duration = finish(pid, how.reference), time.monotonic() - began
    assert result.code == 0 and watch.steps == STEPS, result.err
    print(f"uninterrupted: {how.duration:.2f} s, the first save {1000 * how.first_save:.0f} ms",
          flush=True)
    phases, failures, left = Counter(), [], 0
    for i in range(how.runs):
        phase, wrong = kill_once(folder / "killed", watch, chance, how)
        phases[phase] += 1
        left += bool(list((folder / "killed").glob("*.tmp")))
        if wrong:
            failures.append(f"run {i}, killed in {phase}: {wrong}")
            print(failures[-1], flush=True)
    print(f"runs that left a temporary file: {left}")
    return phases, failures


PROGRAM = """
import os, sys
sys.path[:0] = {paths!r}
import harness
with open("watch" + os.environ["RANK"], "r+b") as file:
    watch = harness.Watch(file)
with open("pid" + os.environ["RANK"], "w") as file:
    file.write(str(os.getpid()))
watch.install()
code = harness.gpt.main()
watch.phase = "end"
sys.exit(code)
"""


def start_torchrun(folder, count, *words):
    """Begin a training of several processes, each with a watch file and a file with its pid."""
    paths = [str(Path(__file__).resolve().parent), str(harness.ROOT)]
    (folder / "program.py").write_text(PROGRAM.format(paths=paths))
    for rank in range(count):
        (folder / f"watch{rank}").write_bytes(bytes(32))
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             f"--nproc_per_node={count}", "program.py", *map(str, words)], cwd=folder, stdout=out,
            stderr=err, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run_torchrun(count):
    """harness.run for several processes."""
    def launch(folder, *words):
        process = start_torchrun(folder, count, *words)
        try:
            code = process.wait(300)
        except subprocess.TimeoutExpired:
            process.kill()
            code = "hang"
        result = harness.SimpleNamespace(code=code, err=(folder / "stderr").read_text())
        return result

    return launch


def kill_rank(folder, chance, how, pace):
    """One run of several processes, one of which is killed; the phase and what was wrong."""
    number = getattr(signal, f"SIG{how.signal}")
    prepare(folder)
    process = start_torchrun(folder, how.torchrun, *FLAGS)
    rank = chance.randrange(how.torchrun)
    with open(folder / "watch0", "r+b") as file, open(folder / f"watch{rank}", "r+b") as other:
        first, watch = Watch(file), Watch(other)
    wait_for(first, ("evaluation", "end"))
    step = chance.randrange(STEPS)  # counted, as other work may change how long steps take
    while first.steps < step and first.phase != "end" and process.poll() is None:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 2 * pace))
    phase = watch.phase
    pid = int((folder / f"pid{rank}").read_text())
    if process.poll() is None and phase != "end":
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            phase = "end"
    try:
        code = process.wait(300)
    except subprocess.TimeoutExpired:
        process.kill()
        return phase, "the run did not end within 300 s"
    phase = f"rank {rank}, {'end' if code == 0 else phase}"
    if wrong := inspect(folder, first, number != signal.SIGKILL):
        return phase, wrong
    again = go_on(folder, run_torchrun(how.torchrun))
    if again.code != 0:
        return phase, f"going on failed with {again.code}: {again.err[-900:]}"
    return phase, compare(folder, how.reference)


def sweep_torchrun(folder, how):
    """The same as sweep, with several processes under torchrun."""
    chance, how.reference = random.Random(how.seed), prepare(folder / "whole")
    process = start_torchrun(how.reference, how.torchrun, *FLAGS)
    with open(how.reference / "watch0", "r+b") as file:
        watch = Watch(file)
    wait_for(watch, ("evaluation",))
    began = time.monotonic()
    wait_for(watch, ("end",), seconds=300)
    duration = time.monotonic() - began
    assert process.wait(300) == 0, (how.reference / "stderr").read_text()
    print(f"uninterrupted: {duration:.2f} s from its first evaluation on", flush=True)
    phases, failures = Counter(), []
    for i in range(how.runs):
        phase, wrong = kill_rank(folder / "killed", chance, how, duration / STEPS)
        phases[phase] += 1
        if wrong:
            failures.append(f"run {i}, killed in {phase}: {wrong}")
            print(failures[-1], flush=True)
    return phases, failures


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    parser.add_argument("--twice", action="store_true", help="a second signal within 30 ms")
    parser.add_argument("--phase", choices=["any", "save"], default="any")
    parser.add_argument("--torchrun", type=int, default=0, help="so many processes; one is killed")
    how = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        phases, failures = (sweep_torchrun if how.torchrun else sweep)(Path(folder), how)
    print(f"SIG{how.signal}{' twice' if how.twice else ''}: {sum(phases.values())} runs in "
          f"{time.monotonic() - began:.0f} s, {len(failures)} not as promised. Killed in:")
    for phase, count in phases.most_common():
        print(f"{count:6}  {phase}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
