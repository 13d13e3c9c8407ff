"""Measure the effects of the changes in notes/experiments.md, with three seeds each.

    python tests/benchmarks/experiments.py          # continues where it stopped

The diffs are read from the note, applied to a copy of gpt.py as tests/test_experiments.py does it,
and trained by the note's command: the `cpu` preset on input.txt, 300 steps. The validation loss is
that of the whole validation split at the end. The CSV keeps every run: delete it after a change to
gpt.py. The table shows the mean and the range over the seeds, and the difference from the unchanged
file with the same seed. If all differences have one sign, the change has an effect.
"""
import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_experiments import EXPERIMENTS, apply  # noqa: E402

SOURCE = (ROOT / "gpt.py").read_text(encoding="utf-8")
SEEDS = (1337, 1, 2)
# name: (diff, further options). The note also gives two losses with a lower learning rate.
VARIANTS = {"unchanged": ("", [])} | {name: (diff, []) for name, diff in EXPERIMENTS.items()}
for name in ("No residual connections", "Post-norm"):
    VARIANTS[f"{name}, learning rate 1e-3"] = EXPERIMENTS[name], ["--learning_rate", "1e-3"]


def run(diff, options, seed, steps):
    """The validation loss at the end of a run."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "my_gpt.py"
        program.write_text(apply(diff, SOURCE), encoding="utf-8")
        subprocess.run(
            [sys.executable, program, "--train", "--preset", "cpu", "--max_iters", str(steps),
             "--ckpt", "experiment.pt", "--data", ROOT / "input.txt", "--seed", str(seed),
             "--eval_interval", str(steps), "--device", "cpu", "--precision", "fp32", *options],
            cwd=folder, check=True, capture_output=True)
        with open(Path(folder) / "experiment.csv", encoding="utf-8", newline="") as file:
            return float(list(csv.DictReader(file))[-1]["val_loss"])


def read(path):
    """{(variant, seed): validation loss}"""
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        return {(row["variant"], int(row["seed"])): float(row["val_loss"])
                for row in csv.DictReader(file)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--csv", type=Path, default=ROOT / "notes/experiments.csv")
    args = parser.parse_args()
    losses = read(args.csv)
    for seed in SEEDS:
        for name, (diff, options) in VARIANTS.items():
            if (name, seed) not in losses:
                losses[name, seed] = run(diff, options, seed, args.steps)
                lines = [f'"{n}",{s},{loss:.4f}\n' for (n, s), loss in losses.items()]
                args.csv.write_text("variant,seed,val_loss\n" + "".join(lines), encoding="utf-8")
                print(f"{name}, seed {seed}: {losses[name, seed]:.4f}", flush=True)
    print("\n| change | loss, mean | range | difference, mean | range |")
    print("| --- | --- | --- | --- | --- |")
    for name in VARIANTS:
        own = [losses[name, seed] for seed in SEEDS]
        differences = [losses[name, seed] - losses["unchanged", seed] for seed in SEEDS]
        print(f"| {name} | {statistics.mean(own):.3f} | {min(own):.3f} to {max(own):.3f} | "
              f"{statistics.mean(differences):+.3f} | {min(differences):+.3f} to "
              f"{max(differences):+.3f} |")


if __name__ == "__main__":
    main()
