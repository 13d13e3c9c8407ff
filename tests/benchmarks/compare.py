"""Side by side with the peers, in one run: time to a loss, training speed, generation speed.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python tests/benchmarks/compare.py loss --nanogpt ../nanoGPT --text tinyshakespeare.txt
    python tests/benchmarks/compare.py training --nanogpt ../nanoGPT  # a GPU: --compiled 1
    python tests/benchmarks/compare.py generation --nanogpt ../nanoGPT

Each side is a process of its own, in turn, round after round; what counts is the ratio within a
round, since machines drift. The peer's files are used as they are (a copy of the checkout, so that
nothing is written into it); its commit and its raw output go to --out.
"""

import argparse
import csv
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402

BASELINE = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65)


def nanogpt_module(path):
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(path) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def our_config(recipe, dropout=0.0):
    """`same`: nanoGPT's model, part by part; `ours`: what our presets train, at the same size."""
    if recipe == "same":
        return gpt.GPTConfig(
            **BASELINE,
            dropout=dropout,
            positions="learned",
            qk_norm=False,
            activation="gelu",
            tie_weights=True,
        )
    return gpt.GPTConfig(**BASELINE, dropout=dropout)


def build(side, nanogpt, dropout=0.0):
    torch.manual_seed(0)
    if side == "nanogpt":
        module = nanogpt_module(nanogpt)
        return module.GPT(module.GPTConfig(**BASELINE, dropout=dropout, bias=False))
    return gpt.GPTLanguageModel(our_config(side, dropout))


def child_training(side, nanogpt, dropout, precision, compiled):
    """Tokens per second of whole training steps with AdamW."""
    model = build(side, nanogpt, dropout)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, steps = (64, 100) if device.type == "cuda" else (16, 5)
    model.to(device).train()
    if side == "nanogpt":
        optimizers = [model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)]
    else:
        optimizers = model.make_optimizers(gpt.TrainConfig(optimizer="adamw"))
    dtype = gpt.choose_precision(precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    network = torch.compile(model) if compiled else model
    x, y = torch.randint(65, (2, batch, 256), device=device)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = network(x, y)[1]
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        return loss

    for _ in range(1 + steps // 5):
        step().item()
    times = []
    for _ in range(5):  # on a GPU many steps a time, so that it is never waited for
        clock = time.perf_counter()
        for _ in range(steps // 5):
            loss = step()
        loss.item()
        times.append((time.perf_counter() - clock) / (steps // 5))
    return {
        "tokens_per_second": batch * 256 / statistics.median(times),
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": str(dtype),
    }


def child_generation(side, nanogpt, samples):
    """Tokens per second for one stream (or several) when the context is already full."""
    prompt = torch.randint(65, (samples, 256))
    new = 10 if side == "nanogpt" else 200
    if side == "products":  # the least that a token costs: its weights times one vector
        shapes = [(1152, 384), (384, 384), (1536, 384), (384, 1536)] * 6 + [(65, 384)]
        weights = [torch.randn(shape) for shape in shapes]
        vectors = {n: torch.randn(1, n) for n in (384, 1536)}
        with torch.inference_mode():
            for tokens in (5, new):  # the first few warm up
                clock = time.perf_counter()
                for _ in range(tokens):
                    for weight in weights:
                        torch.nn.functional.linear(vectors[weight.size(1)], weight)
        return {"tokens_per_second": new / (time.perf_counter() - clock)}
    if side == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=65,
                n_positions=1024,
                n_embd=384,
                n_layer=6,
                n_head=6,
                bos_token_id=0,
                eos_token_id=None,
            )
        ).eval()

        def run(n):
            return model.generate(
                prompt,
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=True,
                use_cache=True,
                pad_token_id=0,
            )
    elif side == "nanogpt":
        model = build(side, nanogpt).eval()

        def run(n):
            return model.generate(prompt, n)
    else:
        model = build(side, nanogpt).eval()

        def run(n):
            return model.generate(prompt, n, temperature=1.0, top_p=1.0)

    run(5)
    clock = time.perf_counter()
    run(new)
    return {"tokens_per_second": samples * new / (time.perf_counter() - clock)}


def in_turn(kind, sides, rounds, **options):
    """Each side (or "side precision") in a process of its own, in turn, `rounds` times."""
    results = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            name, _, precision = side.partition(" ")
            call = [sys.executable, __file__, f"child-{kind}", "--side", name]
            call += ["--precision", precision] if precision else []
            for name, value in options.items():
                call += [f"--{name}", str(value)]
            answer = subprocess.run(call, capture_output=True, text=True, check=True).stdout
            results[side].append(json.loads(answer.splitlines()[-1])["tokens_per_second"])
            print(f"  round {number + 1} {side:15} {results[side][-1]:10,.1f} tokens/s", flush=True)
    return results


def ratio(name, ours, theirs):
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"{name}: {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})")


def compare_training(args):
    """Every side in each of the precisions; ours in the one that --train would take too."""
    peers = [f"nanogpt {name}" for name in args.precisions]
    ours = [f"{side} {name}" for side in ("same", "ours") for name in ("auto", *args.precisions)]
    for dropout in (0.0, 0.2):
        print(f"dropout {dropout}: training tokens/s")
        options = dict(nanogpt=args.nanogpt, dropout=dropout, compiled=args.compiled)
        results = in_turn("training", peers + ours, args.rounds, **options)
        for side in ours:
            for peer in peers:
                ratio(f"dropout {dropout}, {side} / {peer}", results[side], results[peer])


def compare_generation(args):
    results = in_turn(
        "generation",
        ["nanogpt", "transformers", "same", "ours", "products"],
        args.rounds,
        nanogpt=args.nanogpt,
    )
    for side in ("same", "ours"):
        for other in ("nanogpt", "transformers", "products"):
            ratio(f"{side} / {other}", results[side], results[other])
    many = in_turn("generation", ["ours"], args.rounds, nanogpt=args.nanogpt, samples=16)
    ratio("ours, 16 samples / 1 sample", many["ours"], results["ours"])


def compare_loss(args):
    """nanoGPT's recipe for a laptop against our `cpu` preset: loss against training seconds."""
    text = Path(args.text).resolve()
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            copy, out = Path(folder) / "nanoGPT", Path(args.out)
            shutil.copytree(args.nanogpt, copy, ignore=shutil.ignore_patterns(".git"))
            shutil.copy(text, copy / "data/shakespeare_char/input.txt")
            subprocess.run(
                [sys.executable, "data/shakespeare_char/prepare.py"],
                cwd=copy,
                check=True,
                capture_output=True,
            )
            flags = (
                "--device=cpu --compile=False --eval_iters=1 --eval_interval=2000 "
                "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 "
                "--n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
            ).split()
            raw = subprocess.run(
                [sys.executable, "train.py", "config/train_shakespeare_char.py", *flags],
                cwd=copy,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            (out / f"nanogpt-{number + 1}.txt").write_text(raw)
            times = [float(t) / 1e3 for t in re.findall(r"time ([\d.]+)ms", raw)]
            # The first and last steps hold the evaluations: they count as a median step.
            theirs = sum(times[1:-1]) + 2 * statistics.median(times)
            saved = torch.load(copy / "out-shakespeare-char/ckpt.pt", weights_only=False)
            module = nanogpt_module(copy)
            model = module.GPT(module.GPTConfig(**saved["model_args"]))
            model.load_state_dict(saved["model"])
            forward = model.forward  # its view() needs targets that lie in one piece
            model.forward = lambda x, y, forward=forward: forward(x, y.contiguous())
            _, _, val_data, _ = gpt.load_data(str(text), "char")
            print(
                f"round {number + 1}: nanoGPT {theirs:.1f} s, validation loss over the whole split "
                f"{gpt.estimate_loss(model, val_data):.4f}"
            )
            ckpt = Path(folder) / "ours.pt"
            raw = subprocess.run(
                [
                    sys.executable,
                    str(ROOT / "gpt.py"),
                    "--train",
                    "--preset",
                    "cpu",
                    "--data",
                    str(text),
                    "--ckpt",
                    str(ckpt),
                    "--eval_interval",
                    "25",
                    "--seed",
                    str(number),
                ],
                capture_output=True,
                text=True,
                check=True,
            )
            (out / f"ours-{number + 1}.txt").write_text(raw.stdout)
            rows = [
                {k: float(v) for k, v in row.items()}
                for row in csv.DictReader(ckpt.with_suffix(".csv").open())
            ]
            reached = next((r["seconds"] for r in rows if r["val_loss"] <= 1.88), None)
            print(
                f"round {number + 1}: ours {rows[-1]['seconds']:.1f} s, ends at "
                f"{rows[-1]['val_loss']:.4f}; 1.88 reached after {reached} s, "
                f"{reached / theirs:.2f} of nanoGPT's run; whole run "
                f"{rows[-1]['seconds'] / theirs:.2f} of it",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what")
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT")
    parser.add_argument("--text", help="the tiny Shakespeare file")
    parser.add_argument("--out", default=".", help="folder for the raw output")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--compiled", type=int, default=0, help="1: torch.compile, all sides")
    parser.add_argument("--samples", type=int, default=1)
    args = parser.parse_args()
    if args.what == "child-training":
        result = child_training(
            args.side, args.nanogpt, args.dropout, args.precision, args.compiled
        )
        print(json.dumps(result))
    elif args.what == "child-generation":
        print(json.dumps(child_generation(args.side, args.nanogpt, args.samples)))
    else:
        commit = subprocess.run(
            ["git", "-C", args.nanogpt, "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        print(f"nanoGPT {commit}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
        {"loss": compare_loss, "training": compare_training, "generation": compare_generation}[
            args.what
        ](args)


if __name__ == "__main__":
    main()
