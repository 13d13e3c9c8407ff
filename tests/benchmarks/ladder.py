"""Which part of the recipe brings how much? From GPT-2's recipe to the `cpu` preset, step by step.

    python tests/benchmarks/ladder.py --text tinyshakespeare.txt   # continues where it stopped
    python tests/benchmarks/ladder.py --draw                       # only the table and the picture

Every rung changes one thing and keeps the changes before it. Size, batches (8 x 128 tokens) and the
number of steps are those of all rungs. Each rung is trained with its own best learning rate: at
least four are tried with the first seed, and more while the best one is the lowest or the highest
that was tried. Then two more seeds are trained with it. The validation loss is that of the whole
validation split at the end of training. The CSV keeps every run, the tries included. At the end
the rungs take turns to measure the time per step, because the speed of a machine drifts. For the
times of one core set OMP_NUM_THREADS=1.
"""
import argparse
import csv
import math
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402

SEEDS = (1337, 1, 2)
COLUMNS = ("rung", "learning_rate", "seed", "steps", "val_loss", "ms_per_step")
# The first rung is nanoGPT's model and recipe; `compare.py base` shows that the losses are equal.
RUNGS = [
    ("GPT-2's recipe", dict(positions="learned", qk_norm=False, activation="gelu",
                            tie_weights=True, optimizer="adamw", schedule="cosine",
                            weight_decay=0.1)),
    ("output layers start at zero", dict(tie_weights=False)),  # lm_head is one of them
    ("rotary positions", dict(positions="rotary")),
    ("QK-norm", dict(qk_norm=True)),
    ("ReLU²", dict(activation="relu2")),
    ("Muon", dict(optimizer="muon")),
    ("linear schedule, no warm-up", dict(schedule="linear", warmup_iters=0, weight_decay=0.0)),
]
LEARNING_RATES = {"adamw": [1e-3, 2e-3, 4e-3, 8e-3], "muon": [2e-3, 4e-3, 8e-3, 16e-3]}


def gpt2_initialisation(model):
    """Normal, standard deviation 0.02; layers that add to the residual stream get less."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("proj.weight", "down.weight"))
            torch.nn.init.normal_(
                parameter, std=0.02 / math.sqrt(2 * model.config.n_layer) if residual else 0.02)


def options_of(rung, steps):
    options = gpt.PRESETS["cpu"] | dict(max_iters=steps, warmup_iters=steps // 10)
    for name, changes in RUNGS:
        options |= changes
        if name == rung:
            return options


def prepare(rung, learning_rate, seed, steps, vocab_size):
    """Returns the options, the model at its start and its optimizers."""
    config = gpt.TrainConfig(**options_of(rung, steps), learning_rate=learning_rate, seed=seed)
    torch.manual_seed(seed)
    shape = {name: getattr(config, name) for name in asdict(gpt.GPTConfig())}
    model = gpt.GPTLanguageModel(gpt.GPTConfig(**shape | {"vocab_size": vocab_size}))
    if rung == RUNGS[0][0]:
        gpt2_initialisation(model)
    return config, model, gpt.make_optimizers(model, config)


def train(prepared, data, steps):
    config, model, optimizers = prepared
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(steps):
        gpt.training_step(step, model, optimizers, scaler, data, config, torch.float32)


def read(path):
    """{(rung, learning rate, seed): [steps, validation loss, ms per step or an empty text]}"""
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        return {(row["rung"], float(row["learning_rate"]), int(row["seed"])):
                [int(row["steps"]), float(row["val_loss"]), row["ms_per_step"]]
                for row in csv.DictReader(file)}


def write(path, runs):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for key, (steps, loss, milliseconds) in runs.items():
            writer.writerow([*key, steps, f"{loss:.4f}", milliseconds])


def best_rate(runs, rung):
    """The learning rate with the lowest loss for the first seed, and all that were tried."""
    tried = {rate: loss for (name, rate, seed), (_, loss, _) in runs.items()
             if name == rung and seed == SEEDS[0] and math.isfinite(loss)}
    return min(tried, key=tried.get), sorted(tried)


def climb(path, steps, text):
    """Train whatever the CSV lacks."""
    tokenizer, train_data, val_data = gpt.load_data(text, "char")
    runs = read(path)
    for old_steps, _, _ in runs.values():
        assert old_steps == steps, f"{path} has runs of {old_steps} steps: choose another --csv"

    def run(rung, rate, seed):
        if (rung, rate, seed) not in runs:
            prepared = prepare(rung, rate, seed, steps, tokenizer.vocab_size)
            train(prepared, train_data, steps)
            loss = gpt.estimate_loss(prepared[1], val_data)
            runs[rung, rate, seed] = [steps, loss, ""]
            write(path, runs)
            print(f"{rung:30} learning rate {rate:<8g} seed {seed:<5}: {loss:.4f}", flush=True)

    for rung, _ in RUNGS:
        for rate in LEARNING_RATES[options_of(rung, steps)["optimizer"]]:
            run(rung, rate, SEEDS[0])
        best, tried = best_rate(runs, rung)
        while best in (tried[0], tried[-1]):
            rate = best / 2 if best == tried[0] else best * 2
            run(rung, rate, SEEDS[0])
            if not math.isfinite(runs[rung, rate, SEEDS[0]][1]):
                break
            best, tried = best_rate(runs, rung)
        for seed in SEEDS[1:]:
            run(rung, best, seed)


def measure_times(path, text, rounds=12):
    """Fill the column ms_per_step: the rungs take turns, ten steps each; the fastest round counts,
    because other programs can only make a round slower."""
    tokenizer, train_data, _ = gpt.load_data(text, "char")
    prepared = {rung: prepare(rung, 1e-3, 0, 100, tokenizer.vocab_size) for rung, _ in RUNGS}
    times = {rung: [] for rung in prepared}
    for _ in range(rounds):
        for rung in prepared:
            start = time.perf_counter()
            train(prepared[rung], train_data, 10)
            times[rung].append(1000 * (time.perf_counter() - start) / 10)
    runs = read(path)
    for (rung, _, _), row in runs.items():
        row[2] = f"{min(times[rung]):.1f}"
    write(path, runs)


def summary(path):
    """[(rung, learning rate, the losses of the seeds, ms per step)]"""
    runs = read(path)
    rows = []
    for rung, _ in RUNGS:
        rate, _ = best_rate(runs, rung)
        losses = [runs[rung, rate, seed][1] for seed in SEEDS]
        rows.append((rung, rate, losses, float(runs[rung, rate, SEEDS[0]][2])))
    return rows


def draw(rows, path, steps):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1.2])
    labels = [rows[0][0], *[f"+ {row[0]}" for row in rows[1:]]]
    means = [statistics.mean(losses) for _, _, losses, _ in rows]
    left.barh(labels, means, color=["tab:gray", *["tab:blue"] * (len(rows) - 1)])
    for y, (_, _, losses, _) in enumerate(rows):
        left.plot(losses, [y] * len(losses), "|", color="black", markersize=12)
        left.text(max(losses) + 0.02, y, f"{means[y]:.3f}", va="center")
    left.set(xlim=(0, 1.12 * max(means)),
             xlabel="validation loss, nats per character (black lines: the three seeds)",
             title=f"Loss after {steps} steps of 8 x 128 tokens")
    right.barh(labels, [row[3] for row in rows], color="tab:orange")
    for y, row in enumerate(rows):
        right.text(row[3], y, f" {row[3]:.0f}", va="center")
    right.set(xlabel="ms per step, one CPU core", title="Time per step",
              xlim=(0, 1.25 * max(row[3] for row in rows)))
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="tinyshakespeare.txt", help="the tiny Shakespeare file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--csv", type=Path, default=ROOT / "notes/ladder.csv")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.draw:
        climb(args.csv, args.steps, args.text)
        measure_times(args.csv, args.text)
    rows = summary(args.csv)
    print("\n| rung | learning rate | validation loss | seeds | ms per step |")
    print("| --- | --- | --- | --- | --- |")
    for rung, rate, losses, milliseconds in rows:
        print(f"| {rung} | {rate:g} | {statistics.mean(losses):.3f} | "
              f"{min(losses):.3f} to {max(losses):.3f} | {milliseconds:.0f} |")
    draw(rows, args.csv.with_suffix(".png"), args.steps)


if __name__ == "__main__":
    main()
