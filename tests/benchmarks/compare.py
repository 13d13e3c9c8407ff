"""Measure gpt.py against nanoGPT, against transformers, and against an earlier version of itself.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python tests/benchmarks/compare.py base --nanogpt ../nanoGPT --text tinyshakespeare.txt
    python tests/benchmarks/compare.py training --nanogpt ../nanoGPT
    python tests/benchmarks/compare.py generation --nanogpt ../nanoGPT
    git worktree add ../previous COMMIT
    python tests/benchmarks/compare.py previous --previous ../previous --text tinyshakespeare.txt

base        nanoGPT's initial weights in our model, same batches, same AdamW: are the losses equal?
training    tokens per second of training steps, 10.7M parameters
generation  tokens per second of generation, 10.7M parameters, the same weights on each side
previous    loss, time per step and generation of this gpt.py and of the one in another folder

Each measurement runs in a new process. The sides take turns, round after round, because the speed
of a machine drifts. Only the ratio of two sides within a round counts. nanoGPT's files are used
unchanged.
"""
import argparse
import concurrent.futures
import contextlib
import importlib.util
import io
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
SIZE = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65)  # 10.7M parameters
SMALL = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65)  # 0.8M parameters
NANOGPT_PARTS = dict(positions="learned", qk_norm=False, activation="gelu", tie_weights=True)
OUR_NAMES = {"transformer.": "", "wte": "token_embedding", "wpe": "position_embedding",
             "h.": "blocks.", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.proj",
             "mlp.c_fc": "feed_forward.up", "mlp.c_proj": "feed_forward.down"}


def load_module(path, name):
    """Import a file under a name of our choice."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpt = load_module(ROOT / "gpt.py", "gpt")


def make_nanogpt(folder, size, dropout=0.0):
    module = load_module(Path(folder) / "model.py", "nanogpt")
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        return module.GPT(module.GPTConfig(**size, dropout=dropout, bias=False))


def nanogpt_optimizers(model):
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        return [model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")]


def as_ours(weights, size, dropout=0.0):
    """nanoGPT's weights, a state dict, in our model."""
    model = gpt.GPTLanguageModel(gpt.GPTConfig(**size, **NANOGPT_PARTS, dropout=dropout))
    state = {}
    for name, tensor in weights.items():
        for theirs, ours in OUR_NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    model.load_state_dict(state)
    return model


def as_transformers(nanogpt, size):
    """nanoGPT's weights in transformers' GPT-2, which stores some matrices transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=65, n_positions=size["block_size"], n_embd=size["n_embd"],
        n_layer=size["n_layer"], n_head=size["n_head"], activation_function="gelu",
        bos_token_id=None, eos_token_id=None))
    state = model.state_dict()  # its biases, which nanoGPT's model lacks, start at zero
    for name, tensor in nanogpt.state_dict().items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[name].copy_(tensor.T if transposed else tensor)
    return model


# ------------------------------------------------------------------------- the same as nanoGPT?
def losses_of(side, nanogpt, text, size, steps=50):
    """The loss of each step. side: 'nanogpt', 'ours', or 'ours, exact GELU'."""
    torch.manual_seed(0)
    _, data, _ = gpt.load_data(text, "char")
    model = make_nanogpt(nanogpt, size)
    if side == "nanogpt":
        optimizers = nanogpt_optimizers(model)
    else:
        model = as_ours(model.state_dict(), size)
        config = gpt.TrainConfig(optimizer="adamw", weight_decay=0.1)
        optimizers = gpt.make_optimizers(model, config)
        optimizers[0].param_groups[0]["lr"] = optimizers[0].param_groups[1]["lr"] = 1e-3
    if side == "ours, exact GELU":
        exact_gelu = F.gelu
        F.gelu = lambda x, approximate: exact_gelu(x)  # this process measures nothing else
    rng = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(data) - size["block_size"], (12,), generator=rng)
        x, y = gpt.get_batch(data, starts, size["block_size"])
        losses.append(training_step(model, optimizers, x, y.contiguous()))
    return losses


def training_step(model, optimizers, x, y, precision=torch.float32):
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        _, loss = model(x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def base(args):
    for size in (SMALL, SIZE):
        sides = ("nanogpt", "ours, exact GELU", "ours")
        losses = {s: in_new_process(losses_of, s, args.nanogpt, args.text, size) for s in sides}
        theirs = losses["nanogpt"]
        print(f"{size}\n  nanoGPT: loss {theirs[0]:.4f} at the first step, {theirs[-1]:.4f} at "
              f"step {len(theirs)}")
        for side in sides[1:]:
            differences = [abs(a - b) for a, b in zip(theirs, losses[side], strict=True)]
            print(f"  {side}: largest difference of a step's loss {max(differences):.1e}")


# --------------------------------------------------------------------------- tokens per second
def training_speed(side, nanogpt, dropout, precision, sequences):
    """Tokens per second. 'same': nanoGPT's model built from our parts, AdamW. 'ours': our
    architecture, AdamW. 'ours, Muon': what the presets train."""
    if side == "nanogpt":
        model = make_nanogpt(nanogpt, SIZE, dropout)
        optimizers = nanogpt_optimizers(model)
    else:
        parts = NANOGPT_PARTS if side == "same" else {}
        model = gpt.GPTLanguageModel(gpt.GPTConfig(**SIZE, **parts, dropout=dropout))
        config = gpt.TrainConfig(optimizer="muon" if side == "ours, Muon" else "adamw")
        optimizers = gpt.make_optimizers(model, config)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = 1e-3
    x, y = torch.randint(65, (2, sequences, 256))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        training_step(model, optimizers, x, y, precision)
        seconds.append(time.perf_counter() - start)
    return x.numel() / statistics.median(seconds[1:])  # the first step is slower


def training(args):
    sides = ("nanogpt", "same", "ours", "ours, Muon")
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    for dropout in (0.0, 0.2):
        print(f"training, {args.precision}, dropout {dropout}: tokens per second")
        options = (args.nanogpt, dropout, precision, args.sequences)
        speeds = in_turn(args.rounds, training_speed, sides, *options)
        print_ratios(speeds, [(side, "nanogpt") for side in sides[1:]])


@torch.no_grad()
def generation_speed(side, nanogpt, prompt_length, new_tokens):
    """Tokens per second of one sequence, or of 16 at once. The context is 256."""
    reference = model = make_nanogpt(nanogpt, SIZE).eval()
    prompt = torch.randint(65, (16 if side == "ours, 16 at once" else 1, prompt_length))
    options = {}
    if side == "transformers":
        model = as_transformers(reference, SIZE).eval()
        options = dict(do_sample=True, pad_token_id=0, top_k=0,
                       attention_mask=torch.ones_like(prompt))  # it has no token that ends a text
        difference = model(prompt).logits[:, -1:] - reference(prompt)[0]
    elif side != "nanogpt":
        parts = NANOGPT_PARTS if side == "same" else {}
        model = gpt.GPTLanguageModel(gpt.GPTConfig(**SIZE, **parts)).eval()
        options = dict(temperature=1.0, top_p=1.0)
    if side == "same":
        model = as_ours(reference.state_dict(), SIZE).eval()
        difference = model(prompt)[0][:, -1:] - reference(prompt)[0]
    if side in ("same", "transformers"):  # the same weights give the same logits
        assert difference.abs().max() < 1e-3, difference.abs().max()
    model.generate(prompt, max_new_tokens=5, **options)  # the first tokens are slower
    start = time.perf_counter()
    ids = model.generate(prompt, max_new_tokens=new_tokens, **options)
    seconds = time.perf_counter() - start
    assert ids.shape == (len(prompt), prompt_length + new_tokens)
    return len(prompt) * new_tokens / seconds


def generation(args):
    print("generation within the context (56 + 200 tokens): tokens per second")
    sides = ("nanogpt", "transformers", "same", "ours", "ours, 16 at once")
    speeds = in_turn(args.rounds, generation_speed, sides, args.nanogpt, 56, 200)
    pairs = [(ours, peer) for ours in sides[2:4] for peer in sides[:2]]
    print_ratios(speeds, [*pairs, ("ours, 16 at once", "ours")])
    print("generation past the context (256 + 384 tokens): tokens per second")
    speeds = in_turn(args.rounds, generation_speed, ("nanogpt", "same", "ours"), args.nanogpt,
                     256, 384)
    print_ratios(speeds, [("same", "nanogpt"), ("ours", "nanogpt")])


# ------------------------------------------------------------------------- an earlier version
def run_version(folder, text, seed):
    """Train the `cpu` preset for 300 steps by the gpt.py of a folder, and generate with it.
    Returns the validation loss, seconds per step, and generated tokens per second for this model
    and for the checkpoint of 4.75M parameters that is shipped with that version."""
    program = load_module(Path(folder) / "gpt.py", "gpt")
    times = []  # AdamW makes one step in each training step
    hook = mock.patch.object(torch.optim.AdamW, "step", record(torch.optim.AdamW.step, times))
    with tempfile.TemporaryDirectory() as temporary, open(f"{temporary}/log.txt", "w") as log, hook:
        sys.stdout = sys.stderr = log  # of this process, which ends with this function
        ckpt = f"{temporary}/model.pt"
        code = program.main(["--train", "--preset", "cpu", "--data", text, "--ckpt", ckpt,
                             "--device", "cpu", "--precision", "fp32", "--seed", str(seed),
                             "--max_iters", "300"])
        assert code == 0, Path(log.name).read_text()
        rows = [line.split(",") for line in Path(f"{temporary}/model.csv").read_text().split()]
        loss = float(rows[-1][rows[0].index("val_loss")])
        speeds = []
        for path in (ckpt, Path(folder) / "checkpoints" / "gpt_checkpoint.pt"):
            model, _, _ = program.load_checkpoint(str(path))
            model.generate([0], 20, temperature=0.8, top_p=0.95)
            start = time.perf_counter()
            model.generate([0], 1000, temperature=0.8, top_p=0.95, seed=1)
            speeds.append(1000 / (time.perf_counter() - start))
    steps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    return loss, statistics.median(steps), *speeds


def record(function, times):
    def recording(*args, **kwargs):
        times.append(time.perf_counter())
        return function(*args, **kwargs)
    return recording


def previous(args):
    folders = {"previous": Path(args.previous).resolve(), "this": ROOT}
    results = {side: [] for side in folders}
    print("side, seed: validation loss, ms per step, tokens per second (cpu preset, shipped model)")
    for number in range(args.rounds):
        seed = (1337, 1, 2)[number % 3]
        for side, folder in folders.items():
            results[side].append(in_new_process(run_version, folder, args.text, seed))
            loss, step, *speeds = results[side][-1]
            print(f"  {side:9} {seed:5}: {loss:.4f} {1000 * step:6.2f} ms, "
                  f"{speeds[0]:6.1f} {speeds[1]:6.1f} tokens/s", flush=True)
    for i, name in enumerate(("loss", "time per step", "generation, cpu preset",
                              "generation, shipped model")):
        columns = {side: [row[i] for row in rows] for side, rows in results.items()}
        means = {side: statistics.mean(column) for side, column in columns.items()}
        print(f"{name}: mean {means['previous']:.5g} before, {means['this']:.5g} now")
        print_ratios(columns, [("this", "previous")])


# ------------------------------------------------------------------------------------- helpers
def in_new_process(function, *args):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def in_turn(rounds, function, sides, *args):
    """{side: [result of each round]}"""
    results = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            results[side].append(in_new_process(function, side, *args))
        print("  " + ", ".join([f"{s}: {results[s][-1]:,.1f}" for s in sides]), flush=True)
    return results


def print_ratios(results, pairs):
    """The median of the ratios within a round, with the lowest and the highest."""
    for a, b in pairs:
        ratios = [x / y for x, y in zip(results[a], results[b], strict=True)]
        print(f"  {a} / {b}: {statistics.median(ratios):.3f} "
              f"(from {min(ratios):.3f} to {max(ratios):.3f})", flush=True)


def commit(folder):
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["base", "training", "generation", "previous"])
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT")
    parser.add_argument("--previous", help="a checkout of an earlier version of this project")
    parser.add_argument("--text", help="the tiny Shakespeare file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of training")
    parser.add_argument("--sequences", type=int, default=16, help="in a batch of training")
    args = parser.parse_args()
    print(f"gpt.py {commit(ROOT)}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in ("nanogpt", "previous"):
        folder = getattr(args, name)
        if folder:
            print(f"{name} {commit(folder)}")
    globals()[args.what](args)


if __name__ == "__main__":
    main()
