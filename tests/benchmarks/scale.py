"""Cost against size: parameters, tokens/s, peak memory, share of the measured matrix peak.

    python tests/benchmarks/scale.py  # --large adds 30M and 124M
    python tests/benchmarks/scale.py --processes  # torchrun's two processes against one

Each size runs in a process of its own, so that the peak of its memory is its own.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402

SIZES = {
    "cpu preset": dict(n_layer=3, n_head=4, n_embd=128, block_size=128, batch=8),
    "3M": dict(n_layer=4, n_head=4, n_embd=256, block_size=256, batch=16),
    "baseline": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch=16),
    "30M": dict(n_layer=10, n_head=8, n_embd=512, block_size=256, batch=16),
    "124M": dict(n_layer=12, n_head=12, n_embd=768, block_size=256, batch=4, vocab_size=50257),
}


def measure(name):
    size = dict(SIZES[name])
    batch = size.pop("batch")
    torch.manual_seed(0)
    model = gpt.GPTLanguageModel(
        gpt.GPTConfig(**{"vocab_size": 65, **size})
    )
    optimizers = model.make_optimizers(gpt.TrainConfig())
    precision = gpt.choose_precision("auto", torch.device("cpu"))
    T, V = size["block_size"], model.config.vocab_size
    x = torch.randint(V, (batch, T))
    times = []
    for _ in range(4):
        clock = time.perf_counter()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = model(x, x)[1]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        times.append(time.perf_counter() - clock)
    a = torch.randn(2048, 2048, dtype=precision)
    a @ a
    clock = time.perf_counter()
    for _ in range(5):
        a @ a
    peak = 5 * 2 * 2048**3 / (time.perf_counter() - clock)
    model.eval()
    model.generate(x[:1], 5)
    clock = time.perf_counter()
    model.generate(x[:1], 50)
    parameters = sum(p.numel() for p in model.parameters())
    speed = batch * T / sorted(times)[1]
    return {
        "size": name,
        "parameters": parameters,
        "precision": str(precision)[6:],
        "training tokens/s": round(speed),
        "share of peak": round(6 * parameters * speed / peak, 2),
        "generated tokens/s": round(50 / (time.perf_counter() - clock)),
        "peak memory MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def processes(name):
    """Training tokens/s of the program: one process with all threads, and two that share them."""
    size = dict(SIZES[name])
    batch, threads = size.pop("batch"), torch.get_num_threads()
    rates, steps = {}, 100_000 // (batch * size["block_size"])
    for count in (1, 2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        flags = dict(size, batch_size=batch // count, max_iters=steps,
                     data=ROOT / "input.txt", ckpt="run.pt", device="cpu")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, *torchrun * (count - 1), ROOT / "gpt.py", "--train",
                 *[str(word) for key, value in flags.items() for word in (f"--{key}", value)]],
                cwd=folder, check=True, capture_output=True,
                env=os.environ | {"OMP_NUM_THREADS": str(max(1, threads // count))})
            with open(Path(folder) / "run.csv", encoding="utf-8") as file:
                last = list(csv.DictReader(file))[-1]
        rates[count] = float(last["tokens"]) / float(last["seconds"])
    return {"size": name, **{f"tokens/s of {n}": round(rate) for n, rate in rates.items()},
            "2 / 1": round(rates[2] / rates[1], 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--size")
    parser.add_argument("--processes", action="store_true")
    args = parser.parse_args()
    if args.size:
        print(json.dumps(measure(args.size)))
    elif args.processes:
        for name in list(SIZES)[:3]:
            print(json.dumps(processes(name)), flush=True)
    else:
        for name in list(SIZES)[: 5 if args.large else 3]:
            subprocess.run([sys.executable, __file__, "--size", name], check=True)
