"""GPT-2 at its full size, 124M random weights: our program against transformers.

    python tests/benchmarks/gpt2_full_size.py               # a few minutes on two cores
    python tests/benchmarks/gpt2_full_size.py --layers 2    # a quick check that it works

Largest difference of the logits; tokens/s of training steps and of greedy writing (a cache, one
text); peak memory up to each. Each side runs in a process of its own, in turn, `--rounds` times;
the best round counts, and the ratios are ours to theirs.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import gpt  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
SIDES = ("ours", "theirs")


def make(folder, layers):
    """A random GPT-2 of transformers' default configuration, saved as the hub's files are."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, bos_token_id=None, eos_token_id=None))
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh one has biases of 0: they would not count
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder)


def open_side(side, folder):
    """The model, and functions (ids -> logits), (ids -> loss), (ids, n -> longer ids)."""
    if side == "ours":
        model = gpt.GPTLanguageModel.from_pretrained(folder)
        return (model, lambda ids: model(ids)[0], lambda ids: model(ids[:, :-1], ids[:, 1:])[1],
                lambda ids, n: model.generate(ids, n, temperature=0.0))
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder)  # its sdpa attention, as a user gets it

    def write(ids, n):
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                              do_sample=False, use_cache=True)

    def loss(ids):
        targets = ids[:, 1:].contiguous()
        return model(ids[:, :-1], labels=targets, shift_labels=targets).loss

    return model, lambda ids: model(ids).logits, loss, write


def peak():
    """The most memory that this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(side, folder, options):
    """Numbers of one side; its logits and its text go into the folder."""
    torch.set_num_threads(options.threads)
    model, logits, loss, write = open_side(side, folder)
    model.eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50257, (options.batch, options.context + 1), generator=generator)
    result = {"parameters": sum(p.numel() for p in model.parameters()), "memory: opened": peak()}
    with torch.no_grad():
        torch.save(logits(ids[:1, :-1]), Path(folder) / f"{side}.logits")
    prompt = ids[:1, :8]
    write(prompt, 3)
    times = []
    for _ in range(3):
        clock = time.perf_counter()
        text = write(prompt, options.tokens)
        times.append(time.perf_counter() - clock)
    result["writing: tokens/s"] = round(options.tokens / min(times), 2)
    result["memory: written"] = peak()
    torch.save(text, Path(folder) / f"{side}.text")

    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    times, losses = [], []
    for _ in range(options.steps + 1):  # dropout is off on both sides: the same work, the same loss
        clock = time.perf_counter()
        value = loss(ids)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - clock)
        losses.append(value.item())
    best = min(times[1:])
    result["training: tokens/s"] = round(options.batch * options.context / best, 2)
    result["memory: trained"] = peak()
    result["losses"] = losses
    return result


def compare(options, folder):
    """Both sides in turn; prints what they share and how they differ."""
    make(folder, options.layers)
    flags = [f"--{name}={value}" for name, value in vars(options).items() if value is not None]
    results = {side: [] for side in SIDES}
    for turn in range(options.rounds):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            done = subprocess.run([sys.executable, __file__, *flags, f"--side={side}",
                                   f"--folder={folder}"], stdout=subprocess.PIPE, check=True)
            results[side].append(json.loads(done.stdout.splitlines()[-1]))
    logits, texts = ([torch.load(Path(folder) / f"{side}.{kind}") for side in SIDES]
                     for kind in ("logits", "text"))
    ours, theirs = (results[side] for side in SIDES)
    largest = logits[1].abs().max().item()
    difference = (logits[0] - logits[1]).abs().max().item()
    apart = max(abs(a - b) for a, b in zip(ours[0]["losses"], theirs[0]["losses"], strict=True))
    print(f"{ours[0]['parameters']:,} parameters here, {theirs[0]['parameters']:,} there; "
          f"{options.threads} threads, batch {options.batch} x {options.context}, fp32")
    print(f"largest difference of the logits: {difference:.1e}, {difference / largest:.1e} of the "
          f"largest logit; of the losses of {options.steps + 1} steps, from "
          f"{ours[0]['losses'][0]:.4f} to {ours[0]['losses'][-1]:.4f}: {apart:.1e}")
    print(f"the {options.tokens} likeliest tokens are the same: {torch.equal(*texts)}")
    for name in ours[0]:
        if name.startswith(("writing", "training", "memory")):
            choose = min if name.startswith("memory") else max
            a, b = (choose(result[name] for result in side) for side in (ours, theirs))
            unit = " MB" if name.startswith("memory") else ""
            print(f"{name}: {a:,}{unit} here, {b:,}{unit} there, ratio {a / b:.2f}")
    return difference <= 1e-5 * largest and torch.equal(*texts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 2)))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.folder, arguments)))
    else:
        with tempfile.TemporaryDirectory() as place:
            sys.exit(0 if compare(arguments, place) else "the two sides do not agree")
