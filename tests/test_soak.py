"""Short versions of tests/soak: a few kills, a few faults, a few damaged files of each kind."""
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("needs fork and /proc", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent / "soak"))
import faults  # noqa: E402
import fuzz  # noqa: E402
import kill_sweep  # noqa: E402


@pytest.mark.parametrize("number, twice, phase, runs", [
    ("KILL", False, "any", 3), ("KILL", False, "save", 1), ("TERM", False, "any", 1),
    ("INT", False, "any", 1), ("INT", True, "any", 1)])
def test_killed_runs_go_on_to_the_bit(tmp_path, number, twice, phase, runs):
    """At a random moment, within the first save, once or twice."""
    how = SimpleNamespace(runs=runs, seed=5, signal=number, twice=twice, phase=phase)
    phases, failures = kill_sweep.sweep(tmp_path, how)
    assert not failures and sum(phases.values()) == runs


@pytest.mark.parametrize("kind, count", [("checkpoints", 30), ("texts", 20), ("lines", 20)])
def test_whatever_is_given_ends_in_success_or_a_sentence(kind, count):
    """Other cases than the long run's: another seed."""
    ends, failures, _ = fuzz.fuzz(kind, count, seed="short")
    assert not failures and sum(ends.values()) == count


@pytest.mark.parametrize("name, more", [
    ("disk", dict(every=150)), ("truncated", dict(step=9000)), ("flipped", dict(step=9000)),
    ("clock", {}), ("text", dict(runs=1)), ("twice", dict(runs=1))])
def test_faults_around_a_run_harm_nothing(tmp_path, name, more):
    """A full disk, a cut file, a jumping clock, another text, another run."""
    how = SimpleNamespace(**{"seed": 5, "every": 1, "step": 1000, "runs": 1} | more)
    cases = list(faults.FAULTS[name](tmp_path, how))
    assert cases and not [case for case in cases if case[1]]


def test_the_harness_notices_what_is_lost(tmp_path):
    """A weight that differs, a state that is behind, and a file that doesn't open are reported."""
    reference, watch = faults.whole(tmp_path), kill_sweep.Watch()
    stored = faults.stored(reference / "run.resume.pt")
    changed = faults.stored(reference / "run.resume.pt")
    changed["model_state_dict"]["ln_f.weight"][0] += 1e-6
    assert faults.harness.same(stored, stored) and not faults.harness.same(stored, changed)
    for _ in range(8):
        watch.count(8)
    assert kill_sweep.inspect(reference, watch, True) == ""
    watch.count(8)
    assert "9 steps" in kill_sweep.inspect(reference, watch, True)
    data = (reference / "run.pt").read_bytes()
    (reference / "run.pt").write_bytes(data[: random.Random(0).randrange(len(data))])
    assert "doesn't open" in kill_sweep.inspect(reference, watch, False)
