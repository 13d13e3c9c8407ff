"""Validation loss against training time: ours and nanoGPT's recipe, three sizes each.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python tests/benchmarks/loss_against_time.py --nanogpt ../nanoGPT --text tinyshakespeare.txt
    python tests/benchmarks/loss_against_time.py --draw           # only the figures and the picture

Writes notes/loss_against_time.csv and draws notes/loss_against_time.png. The runs follow one after
the other; nothing else should run on the machine.

nanoGPT: its train.py, unchanged, with the laptop recipe of its README to the end (2,000 steps);
only the size differs. Ours: gpt.py with the `cpu` preset at the same size, for half of nanoGPT's
time: a short run before each run measures the time per step. The learning rate of both reaches its
end within the run.

Losses of both sides are over the whole validation split, by gpt.estimate_loss; nanoGPT's weights
are copied into our model for that. The time is that of training steps on both sides. A step that
follows an evaluation counts as long as the median step, because the evaluation is not training.
"""
import argparse
import csv
import io
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch
from compare import ROOT, as_ours, commit, gpt, in_new_process
from torch.nn import functional as F

SIZES = [  # nanoGPT's size (the second is that of its README) and ours (the second: `cpu` preset)
    (dict(n_layer=3, n_head=4, n_embd=64), dict(n_layer=3, n_head=4, n_embd=64)),
    (dict(n_layer=4, n_head=4, n_embd=128), dict(n_layer=3, n_head=4, n_embd=128)),
    (dict(n_layer=6, n_head=6, n_embd=192), dict(n_layer=6, n_head=6, n_embd=192))]
NANOGPT = dict(device="cpu", compile=False, eval_iters=20, log_interval=1, block_size=64,
               batch_size=12, dropout=0.0, always_save_checkpoint=True, out_dir="out")
OURS = dict(preset="cpu", block_size=128, batch_size=8, device="cpu", precision="fp32")
EVALUATIONS = 10  # of each run
NANOGPT_STEPS = 2000
OUR_SHARE = 0.5  # of nanoGPT's time
COLUMNS = ("side", "commit", "n_layer", "n_embd", "block_size", "batch_size", "parameters", "step",
           "seconds", "val_loss")
COLOURS = {"nanoGPT": "tab:orange", "ours": "tab:blue"}


def clock(step_seconds, interval):
    """Seconds of training before each step. The steps 0, interval, ... follow an evaluation."""
    median = statistics.median(step_seconds)
    return [0.0, *itertools.accumulate(
        median if step % interval == 0 else s for step, s in enumerate(step_seconds))]


def train_nanogpt(folder, options, text, steps, interval):
    """Returns the number of parameters and [(step, seconds, validation loss)]."""
    options = NANOGPT | options | dict(max_iters=steps, lr_decay_iters=steps,
                                       eval_interval=interval)
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-W", "ignore", "-u", "train.py", "config/train_shakespeare_char.py"]
    step_seconds, evaluated = [], range(interval, steps + 1, interval)
    with subprocess.Popen([*command, *flags], cwd=folder, stdout=subprocess.PIPE,
                          text=True) as process:
        for line in process.stdout:
            step = re.match(r"iter (\d+): loss .*, time ([\d.]+)ms", line)
            if step:
                step_seconds.append(float(step[2]) / 1000)
                if int(step[1]) in evaluated:  # it has just saved
                    os.replace(f"{folder}/out/ckpt.pt", f"{folder}/out/{step[1]}.pt")
    assert process.returncode == 0, "nanoGPT's train.py has failed"
    seconds = clock(step_seconds, interval)
    _, _, val_data = gpt.load_data(text, "char")
    rows, exact_gelu = [], F.gelu  # our GELU is the tanh approximation
    for step in evaluated:
        checkpoint = torch.load(f"{folder}/out/{step}.pt")
        size = {name: checkpoint["model_args"][name]
                for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
        model = as_ours(checkpoint["model"], size)
        with mock.patch.object(F, "gelu", lambda x, approximate: exact_gelu(x)):
            rows.append((step, seconds[step], gpt.estimate_loss(model, val_data)))
    return sum(p.numel() for p in model.parameters()), rows


def train_ours(folder, options, text, steps, interval):
    """The same for gpt.py. Both run in a new process."""
    ckpt = Path(folder) / f"{options['n_embd']}_{steps}.pt"
    options = OURS | options | dict(max_iters=steps, eval_interval=interval, data=text)
    training_step, ends = gpt.training_step, [0.0]

    def timed_step(*args):
        loss = training_step(*args)
        ends.append(time.perf_counter())
        return loss
    with mock.patch.object(gpt, "training_step", timed_step), redirect_stdout(io.StringIO()) as log:
        with redirect_stderr(log):
            model, _ = gpt.train(**options, ckpt=str(ckpt))
    seconds = clock([b - a for a, b in itertools.pairwise(ends)], interval)
    with open(ckpt.with_suffix(".csv"), encoding="utf-8", newline="") as file:
        rows = [(int(row["iteration"]), float(row["val_loss"])) for row in csv.DictReader(file)]
    return (sum(p.numel() for p in model.parameters()),
            [(step, seconds[step], loss) for step, loss in rows if step > 0])


def measure(args, folder):
    """Train both sides at each size and write the CSV."""
    shutil.copytree(args.nanogpt, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git"))
    data = Path(folder) / "data/shakespeare_char"
    shutil.copy(args.text, data / "input.txt")
    subprocess.run([sys.executable, data / "prepare.py"], check=True, capture_output=True)
    table = []

    def run(side, train, recipe, version, size, steps, interval):
        parameters, rows = in_new_process(train, folder, size, text, steps, interval)
        for step, seconds, loss in rows:
            print(f"{side:7} {parameters:9,} parameters, step {step:6,}: {seconds:6.1f} s, "
                  f"validation loss {loss:.4f}", flush=True)
            table.append([side, version, *[(recipe | size)[name] for name in COLUMNS[2:6]],
                          parameters, step, f"{seconds:.1f}", f"{loss:.4f}"])
        return rows[-1][1]  # seconds of the whole run

    text = str(data / "input.txt")
    for nanogpt_size, our_size in SIZES:
        seconds = run("nanoGPT", train_nanogpt, NANOGPT, commit(args.nanogpt), nanogpt_size,
                      NANOGPT_STEPS, NANOGPT_STEPS // EVALUATIONS)
        _, [(_, short, _)] = in_new_process(train_ours, folder, our_size, text, 50, 50)
        interval = max(1, round(OUR_SHARE * seconds / (short / 50) / EVALUATIONS))
        run("ours", train_ours, OURS, commit(ROOT), our_size, EVALUATIONS * interval, interval)
    with open(args.csv, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *table])


def curves(path):
    """{side: [(parameters, [seconds], [validation loss]) of each size]}"""
    result = {"nanoGPT": {}, "ours": {}}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            _, seconds, losses = result[row["side"]].setdefault(
                row["parameters"], (int(row["parameters"]), [], []))
            seconds.append(float(row["seconds"]))
            losses.append(float(row["val_loss"]))
    return {side: list(sizes.values()) for side, sizes in result.items()}


def draw(lines, path):
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    axes = Figure(figsize=(7.5, 4.5), layout="constrained").subplots()
    text = dict(textcoords="offset points", va="center", weight="bold",
                path_effects=[withStroke(linewidth=3, foreground="white")])
    for side, colour in COLOURS.items():
        for parameters, seconds, losses in lines[side]:
            axes.plot(seconds, losses, ".-", color=colour, markersize=4)
            axes.plot(seconds[-1], losses[-1], "o", color=colour)
            axes.annotate(f"{parameters / 1e6:.2f}M: {losses[-1]:.2f}", (seconds[-1], losses[-1]),
                          (7, 2), color=colour, fontsize=8, **text)
        _, seconds, losses = lines[side][0]
        axes.annotate(side, (seconds[0], losses[0]), (0, 10), color=colour, fontsize=12, **text)
    ends = [seconds[i] for sizes in lines.values() for _, seconds, _ in sizes for i in (0, -1)]
    axes.set(xscale="log", xlabel="seconds of training", ylabel="validation loss",
             title="Tiny Shakespeare, three sizes each; numbers: parameters and final loss")
    axes.margins(y=0.1)
    ticks = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.set_xlim(min(ends) / 1.2, max(ends) * 1.8)  # room for the labels on the right
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT")
    parser.add_argument("--text", help="the tiny Shakespeare file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, default=ROOT / "notes/loss_against_time.csv")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.draw:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of all processes that follow
        with tempfile.TemporaryDirectory() as folder:
            measure(args, folder)
    lines = curves(args.csv)
    for (n, seconds, losses), (m, our_seconds, our_losses) in zip(*lines.values(), strict=True):
        print(f"nanoGPT {n:,} parameters: {losses[-1]:.4f} after {seconds[-1]:.0f} s; "
              f"ours {m:,} parameters: {our_losses[-1]:.4f} after {our_seconds[-1]:.0f} s")
        reached = [s for s, loss in zip(our_seconds, our_losses, strict=True) if loss <= losses[-1]]
        if reached:  # the first evaluation at which it is: the loss may have been reached before
            print(f"  ours has nanoGPT's final loss after at most {reached[0]:.0f} s, "
                  f"{reached[0] / seconds[-1]:.2f} of nanoGPT's time")
        else:
            print("  ours does not reach nanoGPT's final loss")
    draw(lines, args.csv.with_suffix(".png"))


if __name__ == "__main__":
    main()
