"""Which part of the recipe brings how much? From GPT-2's recipe to the `cpu` preset, step by step.

    python tests/benchmarks/ladder.py --text tinyshakespeare.txt   # continues where it stopped
    python tests/benchmarks/ladder.py --draw                       # only the table and the picture

Every rung changes one thing and keeps the changes before it. Size, batches (8 x 128 tokens) and the
number of steps are those of all rungs. Each rung is trained with its own best learning rate: at
least four are tried with the first seed, and more while the best one is the lowest or the highest
that was tried. Then two more seeds are trained with it. The validation loss is that of the whole
validation split at the end of training. The CSV keeps every run, the tries included.
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


def train(rung, learning_rate, seed, steps, text):
    """Returns the validation loss at the end and the median of the milliseconds per step."""
    config = gpt.TrainConfig(**options_of(rung, steps), learning_rate=learning_rate, seed=seed)
    tokenizer, train_data, val_data = gpt.load_data(text, "char")
    torch.manual_seed(seed)
    shape = {name: getattr(config, name) for name in asdict(gpt.GPTConfig())}
    model = gpt.GPTLanguageModel(gpt.GPTConfig(**shape | {"vocab_size": tokenizer.vocab_size}))
    if rung == RUNGS[0][0]:
        gpt2_initialisation(model)
    optimizers = gpt.make_optimizers(model, config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    times = [time.perf_counter()]
    for step in range(steps):
        gpt.training_step(step, model, optimizers, scaler, train_data, config, torch.float32)
        times.append(time.perf_counter())
    milliseconds = [1000 * (b - a) for a, b in zip(times, times[1:], strict=False)]
    return gpt.estimate_loss(model, val_data), statistics.median(milliseconds)


def read(path):
    """{(rung, learning rate, seed): (validation loss, ms per step)}"""
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        return {(row["rung"], float(row["learning_rate"]), int(row["seed"])):
                (float(row["val_loss"]), float(row["ms_per_step"])) for row in csv.DictReader(file)}


def best_rate(runs, rung):
    """The learning rate with the lowest loss for the first seed, and all that were tried."""
    tried = {rate: loss for (name, rate, seed), (loss, _) in runs.items()
             if name == rung and seed == SEEDS[0] and math.isfinite(loss)}
    return min(tried, key=tried.get), sorted(tried)


def climb(path, steps, text):
    """Train whatever the CSV lacks."""
    runs = read(path)

    def run(rung, rate, seed):
        if (rung, rate, seed) not in runs:
            loss, milliseconds = runs[rung, rate, seed] = train(rung, rate, seed, steps, text)
            new = not path.exists()
            with open(path, "a", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerows([COLUMNS] if new else [])
                writer.writerow([rung, rate, seed, steps, f"{loss:.4f}", f"{milliseconds:.2f}"])
            print(f"{rung:30} learning rate {rate:<8g} seed {seed:<5}: {loss:.4f}, "
                  f"{milliseconds:.1f} ms a step", flush=True)

    for rung, _ in RUNGS:
        for rate in LEARNING_RATES[options_of(rung, steps)["optimizer"]]:
            run(rung, rate, SEEDS[0])
        best, tried = best_rate(runs, rung)
        while best in (tried[0], tried[-1]):
            rate = best / 2 if best == tried[0] else best * 2
            run(rung, rate, SEEDS[0])
            if not math.isfinite(runs[rung, rate, SEEDS[0]][0]):
                break
            best, tried = best_rate(runs, rung)
        for seed in SEEDS[1:]:
            run(rung, best, seed)


def summary(path):
    """[(rung, learning rate, the losses of the seeds, median of ms per step)]"""
    runs = read(path)
    rows = []
    for rung, _ in RUNGS:
        rate, _ = best_rate(runs, rung)
        losses = [runs[rung, rate, seed][0] for seed in SEEDS]
        milliseconds = [ms for (name, _, _), (_, ms) in runs.items() if name == rung]
        rows.append((rung, rate, losses, statistics.median(milliseconds)))
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
    left.set(xlim=(0, 1.12 * max(means)), xlabel="validation loss (nats per character)",
             title=f"Loss after {steps} steps of 8 x 128 tokens")
    right.barh(labels, [row[3] for row in rows], color="tab:orange")
    for y, row in enumerate(rows):
        right.text(row[3], y, f" {row[3]:.0f}", va="center")
    right.set(xlabel="ms per step, one CPU core", title="Time per step",
              xlim=(0, 1.2 * max(row[3] for row in rows)))
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
    rows = summary(args.csv)
    print("\n| rung | learning rate | validation loss | seeds | ms per step |")
    print("| --- | --- | --- | --- | --- |")
    for rung, rate, losses, milliseconds in rows:
        print(f"| {rung} | {rate:g} | {statistics.mean(losses):.3f} | "
              f"{min(losses):.3f} to {max(losses):.3f} | {milliseconds:.0f} |")
    draw(rows, args.csv.with_suffix(".png"), args.steps)


if __name__ == "__main__":
    main()
