"""A GPT from scratch in one file: it reads a text, learns to predict what comes next, and writes.

    python gpt.py --train                              # learn input.txt (--data my.txt: any text)
    python gpt.py --sample --ckpt gpt_checkpoint.pt    # write with what was learnt
    torchrun --nproc_per_node=8 gpt.py --train         # eight GPUs: 8 times the text a step

    token ids (B, T) -> embeddings (B, T, C) -> n_layer Blocks -> logits (B, T, V)
    Block: x ---+--> LayerNorm -> MultiHeadAttention --(+)--+--> LayerNorm -> FeedForward --(+)--> x
                |          (look at the past)           |   |    (think about what was seen)  |
                +---------------------------------------+   +---------------------------------+
Shapes stand at the lines that make them: B sequences in a batch, T positions, C channels (n_embd),
nh heads of hs channels each, S positions that can be looked at, V tokens in the vocabulary.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "tqdm", "matplotlib", "tiktoken", "safetensors",
#                 "huggingface_hub"]
# ///
import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
import timeit
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------- 1. configuration
class UserError(Exception):
    """A mistake a person can mend, told in one sentence: `main` prints it and exits with code 2."""

def check(good, sentence):
    """Raise the UserError with this sentence unless all is good."""
    if not good:
        raise UserError(sentence)

@contextmanager
def explain(sentence):
    """Turn any error into a UserError: what failed and what to do about it, then the reason."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{sentence} ({' '.join(str(error).split()) or repr(error)})") from error

def option(default, help, *choices, low=0, high=2**28):
    """A dataclass field that is a command-line flag too: default, help and limits, stated once."""
    return field(default=default, metadata=dict(help=help, allowed=(*choices, low, high)))

class Options:
    def __post_init__(self):
        """Check every value, whether a flag, a checkpoint or a notebook gave it."""
        for f in fields(self):
            value, (*choices, low, high) = getattr(self, f.name), f.metadata["allowed"]
            good = isinstance(value, (int, float) if f.type is float else f.type)
            if not good or (value not in (choices or [value]) if f.type is str
                            else not low <= value <= high):
                allowed = choices or f"from {low} to {high}"
                raise UserError(f"--{f.name} can't be {value!r}: {f.type.__name__}, {allowed}.")

@dataclass
class GPTConfig(Options):
    """The architecture: what a checkpoint keeps as its `hyperparameters`."""
    n_layer: int = option(6, "blocks, one after the other", low=1, high=1000)
    n_head: int = option(6, "attention heads in each block", low=1)
    n_embd: int = option(384, "channels of every position", low=1)
    block_size: int = option(256, "context: how many tokens the model can look back over", low=1)
    dropout: float = option(0.0, "share of activations zeroed while training", high=0.99)
    bias: bool = option(False, "biases in linear layers and norms, as in GPT-2")
    tie_weights: bool = option(False, "one matrix for reading tokens and for predicting them")
    positions: str = option("rotary", "how positions are told apart", "rotary", "learned")
    qk_norm: bool = option(True, "normalise queries and keys")
    activation: str = option("relu2", "in the feed-forward layers", "gelu", "relu", "relu2")
    attention: str = option("fused", "PyTorch's fast code, or Head", "fused", "explicit")
    vocab_size: int = option(65, "", low=1)  # no flag: it comes from the tokenizer

@dataclass
class TrainConfig(Options):
    """How to train; a preset (auto: cpu or gpu) replaces many defaults, here and in GPTConfig."""
    ckpt: str = option("gpt_checkpoint.pt", "the checkpoint to write, or to sample from")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = option("auto", "of the arithmetic", "auto", "fp32", "bf16", "fp16")
    seed: int = option(1337, "the same seed, the same run; -1 to sample: random", high=2**40)
    preset: str = option("auto", "sizes", "auto", "cpu", "laptop", "gpu", "lecture", "gpt2")
    data: str = option("input.txt", "text, folder of .txt or of train.bin + val.bin, 'shakespeare'")
    tokenizer: str = option("char", "char, gpt2, or a folder with vocab.json and merges.txt")
    init_from: str = option("", "fine-tune this checkpoint, 'gpt2', or GPT-2 folder")
    resume: bool = option(False, "go on where the run of --ckpt stopped")
    max_iters: int = option(2000, "optimizer steps", low=1)
    batch_size: int = option(16, "sequences in one forward pass of one process", low=1)
    gradient_accumulation_steps: int = option(1, "forward passes in one optimizer step", low=1)
    optimizer: str = option("muon", "muon: AdamW for the rest of the model", "muon", "adamw")
    learning_rate: float = option(4e-3, "the highest; Muon's steps are as long as AdamW's")
    weight_decay: float = option(0.1, "pull of the matrices towards zero")
    warmup_iters: int = option(0, "steps over which the learning rate rises")
    schedule: str = option("linear", "how it falls", "linear", "cosine", "constant")
    eval_interval: int = option(250, "steps between evaluations; each saves the run", low=1)
    eval_tokens: int = option(131_072, "tokens of the validation split to read, about", low=1)
    compile: bool = option(False, "torch.compile: slow to start, then faster on a GPU")
    wandb: str = option("", "Weights & Biases project to log to")

@dataclass
class SampleConfig(Options):
    """How to write."""
    ckpt: str = option(TrainConfig.ckpt, "")
    device: str = option(TrainConfig.device, "")
    attention: str = option(GPTConfig.attention, "", "fused", "explicit")
    seed: int = option(-1, "", low=-1, high=2**40)
    prompt: str = option("", "text to go on from")
    prompt_file: str = option("", "file with the text to go on from")
    interactive: bool = option(False, "type prompts, read continuations, until Ctrl-D")
    max_new_tokens: int = option(500, "tokens to write")
    temperature: float = option(0.8, "0: always the likeliest token; higher: bolder", high=2**40)
    top_k: int = option(0, "choose among the k likeliest tokens; 0: among all")
    top_p: float = option(0.95, "choose among the likeliest that reach p together", high=1)
    repetition_penalty: float = option(1.0, "above 1: avoid what was written", low=0.01, high=2**40)
    num_samples: int = option(1, "texts to write at once", low=1)
    beams: int = option(1, "look for the likeliest text with so many beams", low=1)
    stop: str = option("", "end once this text is written")

PRESETS = {  # README.md says how long each takes, and to which loss
    "cpu": dict(n_layer=3, n_head=4, n_embd=128, block_size=128, batch_size=8, max_iters=1500,
                eval_interval=300, weight_decay=0.0),
    "laptop": dict(n_head=4, n_embd=256, dropout=0.1, max_iters=3400, weight_decay=2.0),
    "gpu": dict(dropout=0.1, max_iters=3400, weight_decay=2.0),
    "lecture": dict(positions="learned", activation="relu", qk_norm=False, bias=True, dropout=0.2,
                    optimizer="adamw", learning_rate=3e-4, schedule="constant", batch_size=64,
                    max_iters=5000, eval_interval=500),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, positions="learned", bias=True,
                 activation="gelu", qk_norm=False, tie_weights=True, tokenizer="gpt2", batch_size=8,
                 optimizer="adamw", learning_rate=6e-4, schedule="cosine", warmup_iters=200)}

# ---------------------------------------------------------------------------------- 2. tokenizers
class CharTokenizer:
    """The plainest tokenizer: every distinct character of the text is a token."""
    kind = "char"

    def __init__(self, stoi):
        """stoi, string to integer, gives each token its id; itos is the way back."""
        self.stoi, self.itos, self.vocab_size = stoi, {i: s for s, i in stoi.items()}, len(stoi)
        self.dtype = np.uint8 if self.vocab_size <= 2**8 else np.uint16
        check(set(self.itos) == set(range(self.vocab_size)) and 0 < self.vocab_size <= 2**16,
              "A vocabulary needs 1 to 65,536 tokens, with ids that count up from 0.")

    @classmethod
    def from_text(cls, text, stoi=()):
        """The text's characters in order, after those of an alphabet that is already in use."""
        new = sorted(set(text).difference(stoi))
        return cls({**dict(stoi), **{s: len(stoi) + i for i, s in enumerate(new)}})

    def encode(self, text):
        """Text to an array of ids (len(text),); UserError names characters it doesn't know."""
        unknown = sorted(set(text) - self.stoi.keys())
        check(not unknown, f"The model's alphabet {''.join(self.stoi)!r} has no {unknown[:9]}.")
        ids_of = np.zeros(sys.maxunicode + 1, self.dtype)  # a table, looked up a million at a time
        ids_of[[ord(s) for s in self.stoi]] = list(self.stoi.values())
        parts = (text[i : i + 2**20].encode("utf-32-le") for i in range(0, len(text) or 1, 2**20))
        return np.concatenate([ids_of[np.frombuffer(part, np.uint32)] for part in parts])

    def decode(self, ids):
        return "".join([self.itos[int(i)] for i in ids])

def gpt2_files(name, *files):
    """Paths of these files in a folder, or, for 'gpt2' and its kin, fetched from the hub once."""
    if not Path(name).is_dir():
        from huggingface_hub import snapshot_download
        name = snapshot_download(f"openai-community/{name}", allow_patterns=files)
    return [Path(name) / file for file in files]

# GPT-2 merges bytes only within a word (with the space before it), a number, or punctuation.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

class BPETokenizer(CharTokenizer):
    """GPT-2's byte-pair encoding: frequent runs of bytes are tokens. A thin wrapper of tiktoken."""
    kind = "bpe"

    def __init__(self, stoi):
        """In stoi a byte stands as the character of the same number, from 0 to 255."""
        from tiktoken import Encoding
        super().__init__(stoi)
        check(stoi.keys() >= set(map(chr, range(256))), "A byte is missing: no text could have it.")
        ranks = {s.encode("latin-1"): i for s, i in stoi.items()}
        end = {s: ranks.pop(s.encode()) for s in ["<|endoftext|>"] if s in stoi}
        self.encoding = Encoding("", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=end)

    @classmethod
    def load(cls, name="gpt2"):
        """'gpt2' from the hub, or from a folder with OpenAI's vocab.json and merges.txt."""
        with explain(f"--tokenizer {name} should be a folder with GPT-2's vocab.json, merges.txt"):
            vocab, merges = gpt2_files(name, "vocab.json", "merges.txt")
            stoi = json.loads(vocab.read_text(encoding="utf-8"))
            lines = merges.read_text(encoding="utf-8").replace(" ", "").split("\n")
            order = [stoi[line] for line in lines if line and not line.startswith("#version")]
            check(order == sorted(order), "its merges are not in the order of their ids")
            # The file spells the bytes that don't print as the letters from 256 on.
            unprintable = [*range(33), *range(127, 161), 173]
            spelt = dict(enumerate(unprintable, start=256))
            return cls({s.translate(spelt): i for s, i in stoi.items()})

    def encode(self, text):
        return np.array(self.encoding.encode(text, allowed_special="all"), self.dtype)

    def decode(self, ids):
        """Ids to text; bytes that are only a part of a character show as U+FFFD."""
        return self.encoding.decode([int(i) for i in ids])

# ----------------------------------------------------------------------------------- 3. the model
class Head(nn.Module):
    """One attention head: a query q asks the past, keys k match it, their values v are mixed.

    softmax(Q K^T / sqrt(hs) + mask) V: "Attention Is All You Need" (arXiv 1706.03762), section 3.2.
    The mask hides what is still to come, which is the answer. (B, nh, T, hs): all heads at once.
    """
    def forward(self, q, k, v):
        """q (..., T, hs), the last T of S; k, v (..., S, hs) -> mix like q, weights (..., T, S)."""
        # Without the root, scores would grow with hs and the softmax would pick one position only.
        scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (T, hs) @ (hs, S) -> (T, S)
        T, S = scores.shape[-2:]
        future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1 + S - T)  # the mask
        weights = F.softmax(scores.masked_fill(future, float("-inf")), dim=-1)  # exp(-inf) is 0
        return weights.to(v.dtype) @ v, weights  # (T, S) @ (S, hs) -> (T, hs)

class KVCache:
    """Keys and values of the tokens read so far, which no later token changes: it is masked.

    A ring of block_size: once full (rotary only), the newest replaces the oldest.
    """
    def __init__(self, model, batch_size):
        c, weight = model.config, model.lm_head.weight
        shape = (2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
        self.stores, self.length = [weight.new_zeros(shape) for _ in range(c.n_layer)], 0

    def append(self, layer, k, v):
        """Add a layer's keys and values (B, nh, T, hs); return all it has, each (B, nh, S, hs)."""
        store, T = self.stores[layer], k.size(2)  # (2, B, nh, block_size, hs)
        slot = self.length % store.size(3)  # length: tokens read so far, as `forward` counts them
        store[:, :, :, slot : slot + T] = torch.stack((k, v))
        return store[:, :, :, : self.length + T].unbind()

class Dropout(nn.Dropout):
    """Zeroes a share of the activations while the model learns: never when it writes (no_grad)."""
    def forward(self, x):
        if not (self.training and self.p and torch.is_grad_enabled()):
            return x
        if x.device.type != "cpu":
            return super().forward(x)
        # Random bytes, 8 to an int64, cost a CPU half of floats; the share is rounded to 1/256.
        drawn = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-(2**63), None)
        kept = drawn.view(torch.uint8)[: x.numel()].view(x.shape) >= round(256 * self.p)
        return x * (kept.to(x.dtype) / (1 - round(256 * self.p) / 256))

class MultiHeadAttention(nn.Module):
    """Communication: several heads look at the past at once, each for something of its own."""
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.head = config, layer, Head()
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x, rotation=None, cache=None, maps=None):
        """x (B, T, C) -> (B, T, C); a list `maps` is given attention weights (B, nh, T, S)."""
        (B, T, C), nh = x.shape, self.config.n_head
        qkv = self.qkv(x).view(B, T, 3, nh, C // nh)  # (B, T, 3C) -> (B, T, 3, nh, hs)
        qk, v = qkv[:, :, :2], qkv[:, :, 2]  # (B, T, 2, nh, hs), (B, T, nh, hs)
        if self.config.qk_norm:  # mean 0, spread 1 bounds the scores, so that large steps are safe
            qk = F.layer_norm(qk, qk.shape[-1:])
        if rotation is not None:  # channels i and i + hs/2 turn together
            cos, sin = rotation
            qk = qk * cos + qk.roll(C // nh // 2, dims=-1) * sin
        q, k, v = (t.transpose(1, 2) for t in (*qk.unbind(dim=2), v))  # each (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, nh, S, hs)
        if self.config.attention == "fused" and maps is None:
            # The same mask: the model calls this with T > 1 only if S = T. T = 1 sees all keys.
            out = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # (B, nh, T, hs)
        else:
            out, weights = self.head(q, k, v)  # (B, nh, T, hs), (B, nh, T, S)
            if maps is not None:
                maps.append(weights)
        return self.dropout(self.proj(out.transpose(1, 2).reshape(B, T, C)))  # heads side by side

class FeedForward(nn.Module):
    """Computation: every position thinks by itself about what it has gathered."""
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation, self.dropout = config.activation, Dropout(config.dropout)

    def forward(self, x):
        x = self.up(x)  # (B, T, C) -> (B, T, 4C)
        # GPT-2 was trained with the tanh form of GELU; relu2 is from "Primer" (arXiv 2109.08668).
        x = F.gelu(x, approximate="tanh") if self.activation == "gelu" else F.relu(x)
        x = x * x if self.activation == "relu2" else x
        return self.dropout(self.down(x))  # (B, T, 4C) -> (B, T, C)

class Block(nn.Module):
    """Communication, then computation; each adds its result to a stream that is never rewritten."""
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = MultiHeadAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.feed_forward = FeedForward(config)

    def forward(self, x, rotation=None, cache=None, maps=None):
        x = x + self.attention(self.ln_1(x), rotation, cache, maps)  # (B, T, C)
        return x + self.feed_forward(self.ln_2(x))  # (B, T, C)

class Muon(torch.optim.Optimizer):
    """Averages a matrix's gradients over steps, and makes all directions of the mean equal.

    By itself a gradient is strong along a few of them (kellerjordan.github.io/posts/muon).
    """
    def __init__(self, parameters, lr, weight_decay):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        """Change every parameter by its gradient, p.grad."""
        for group in self.param_groups:
            parameters, means = [p for p in group["params"] if p.grad is not None], []
            if not parameters:  # all are frozen
                continue
            for p in parameters:
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"]
                average.lerp_(p.grad, 0.1)  # 0.9 of the old one, 0.1 of what is new
                x = p.grad.lerp(average, 0.9)  # the newest counts once more
                means.append(x if len(p) <= len(p.T) else x.T)  # (C, columns): all have a side of C
            # Newton-Schulz: x <- factor x, five times, brings x's singular values near 1, with
            # factor = 3.4445 I - 4.775 square + 2.0315 square^2 and square = x x^T. The new x's
            # square needs no x: first all five factors are multiplied, for all n matrices at once.
            # Before, each x is divided by its norm, whose square is the sum of square's diagonal.
            square = torch.stack([x @ x.T for x in means])  # (n, C, C)
            norm = square.diagonal(dim1=1, dim2=2).sum(dim=1).sqrt().clamp(min=1e-12)[:, None, None]
            square, product = square / norm**2, torch.eye(square.size(1), device=norm.device) / norm
            for _ in range(5):
                factor = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
                factor.diagonal(dim1=1, dim2=2).add_(3.4445)
                product, square = factor @ product, factor @ square @ factor
            for p, x, matrix in zip(parameters, means, product, strict=True):
                # The new x has entries of about 1 / sqrt(columns), AdamW's steps of about 0.2: made
                # as long, they can have the same learning rate (arXiv 2502.16982, section 2.2).
                rate = 0.2 * group["lr"] * math.sqrt(max(p.shape))
                p = p if len(p) <= len(p.T) else p.T
                p.addmm_(matrix, x, beta=1 - group["lr"] * group["weight_decay"], alpha=-rate)

# GPT-2 is this model with other numbers: its names for our weights, and what it has to be.
GPT2_IS = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
           "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
GPT2_NAMES = {"transformer.": "", "wte": "token_embedding", "wpe": "position_embedding",
              "h.": "blocks.", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.proj",
              "mlp.c_fc": "feed_forward.up", "mlp.c_proj": "feed_forward.down"}

class GPTLanguageModel(nn.Module):
    """Token ids in; out comes, for every position, a score (logit) of each possible next token."""
    def __init__(self, config):
        super().__init__()
        self.config, (C, nh) = config, (config.n_embd, config.n_head)
        # Rotary positions turn channels in pairs.
        check(C % (2 * nh) == 0, f"--n_embd {C} must be an even multiple of --n_head {nh}.")
        # Tied to lm_head, a small embedding gives near-equal scores: it starts by guessing.
        def table(rows, std=1 / C if config.tie_weights else 0.02):
            return nn.Embedding.from_pretrained(torch.normal(0.0, std, (rows, C)), freeze=False)
        self.token_embedding = table(config.vocab_size)
        if config.positions == "learned":
            self.position_embedding = table(config.block_size)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C, bias=config.bias)
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight", "lm_head.weight", "bias")):
                nn.init.zeros_(parameter)  # at first blocks add nothing, and lm_head guesses
        if config.tie_weights:  # tokens that are read alike are predicted alike
            self.lm_head.weight = self.token_embedding.weight

    def rotation(self, positions):
        """Rotary positions (RoFormer, arXiv 2104.09864): cos and sin for each, (T, 1, 1, hs)."""
        # Query and key turned by position x speed: their product depends on the distance only.
        hs = self.config.n_embd // self.config.n_head
        dtype = torch.float32 if positions.device.type == "mps" else torch.float64
        speeds = 10000 ** (-torch.arange(0, hs, 2, device=positions.device, dtype=dtype) / hs)
        # A pair (a, b) becomes (a cos - b sin, b cos + a sin): -speed turns the sign of sin only.
        angles = positions[:, None, None, None] * torch.cat((-speeds, speeds))  # (T, 1, 1, hs)
        return [t.to(self.lm_head.weight.dtype) for t in (angles.cos(), angles.sin())]

    def forward(self, idx, targets=None, cache=None, maps=None):
        """idx, targets (B, T) -> scores, called logits, (B, T, V) and, given targets, their loss.

        The loss is the mean of -log(the probability that the model gave to the token that came).
        A cache takes up to block_size tokens, then one at a time, and gives the last one's logits.
        """
        T, start, room = idx.size(1), cache.length if cache else 0, self.config.block_size
        learned, rotation = self.config.positions == "learned", None
        if (learned and start + T > room) or (cache and T > (1 if start else room)):
            raise ValueError(f"{T} tokens after {start} don't fit into block_size {room}.")
        positions = torch.arange(start, start + T, device=idx.device)  # (T,)
        x = self.token_embedding(idx)  # (B, T) -> (B, T, C)
        if learned:
            x = x + self.position_embedding(positions)  # (B, T, C) + (T, C)
        else:
            rotation = self.rotation(positions)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation, cache, maps)
        if cache:
            cache.length, x = start + T, x[:, -1:]  # only the newest position is of use
        logits = self.lm_head(self.ln_f(x))  # (B, T, C) -> (B, T, V), or (B, 1, V) with a cache
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def attention_maps(self, idx):
        """What each position looks at: idx (B, T) -> weights (B, n_layer, n_head, T, T)."""
        maps = []
        self(idx, maps=maps)
        return torch.stack(maps, dim=1)

    @classmethod
    def from_state(cls, config, state):
        """The model with these weights, {name: tensor}, no copies; UserError if one doesn't fit."""
        with explain("These are not the weights of such a model"):
            with torch.device("meta"):  # takes neither memory nor time before it has its weights
                model = cls(config)
            state = {name: tensor.float().contiguous() for name, tensor in state.items()}
            model.load_state_dict(state, assign=True)
            wrong = [name for name, p in model.named_parameters() if not p.isfinite().all()]
            check(not wrong, f"{wrong} have values that are not finite")
        if config.tie_weights:
            model.lm_head.weight = model.token_embedding.weight
        return model

    @classmethod
    def from_pretrained(cls, name):
        """OpenAI's GPT-2: 'gpt2', 'gpt2-medium', '-large' or '-xl' from the hub, or a folder."""
        from safetensors.torch import load_file
        files = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
        with explain(f"{name} is no GPT-2: name a folder that holds {', '.join(files)}"):
            theirs, weights, *_ = gpt2_files(name, *files)
            theirs, state = json.loads(theirs.read_text(encoding="utf-8")), {}
            for key, value in GPT2_IS.items():
                check(theirs.get(key, value) == value, f"its {key} should be {value}")
            config = GPTConfig(
                **{key: theirs[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
                block_size=theirs["n_positions"], bias=True, positions="learned", qk_norm=False,
                activation="gelu", tie_weights=theirs.get("tie_word_embeddings", True))
            for key, tensor in load_file(weights).items():
                for openai, ours in GPT2_NAMES.items():
                    key = key.replace(openai, ours)
                if not key.endswith((".attn.bias", ".attn.masked_bias")):  # masks, not weights
                    matrix = key.startswith("blocks.") and tensor.dim() == 2  # stored as (in, out)
                    state[key] = tensor.T if matrix else tensor
            if config.tie_weights:
                state["lm_head.weight"] = state["token_embedding.weight"]
            return cls.from_state(config, state)

    def make_optimizers(self, config):
        """[AdamW], and with `muon` one that takes the blocks' matrices off its hands."""
        muon = [p for p in self.blocks.parameters() if p.dim() == 2 and config.optimizer == "muon"]
        rest = [p for p in self.parameters() if p not in set(muon)]
        # Decay is for matrices: norms and biases have no reason to be small.
        groups = [{"params": [p for p in rest if p.dim() == dim], "weight_decay": decay}
                  for dim, decay in ((2, config.weight_decay), (1, 0.0))]
        optimizers = [torch.optim.AdamW(groups, config.learning_rate, (0.9, 0.95), fused=True)]
        if muon:
            optimizers.append(Muon(muon, config.learning_rate, config.weight_decay))
        return optimizers

    # ---------------------------------------------------------------------------- 4. generation
    def context(self, idx, tokenizer=None):
        """Any ids, (B, T) or (T,), as a tensor (B, T); an empty context becomes a newline."""
        idx = torch.as_tensor(idx, dtype=torch.long, device=self.lm_head.weight.device)
        idx, newline = torch.atleast_2d(idx), tokenizer.stoi.get("\n", 0) if tokenizer else 0
        return idx if idx.size(1) else idx.new_full((len(idx), 1), newline)

    def next_logits(self, tokens, cache, tokenizer=None):
        """Logits (B, V) for what follows tokens (B, t), reading only what the cache lacks."""
        count = 1 if cache.length else self.config.block_size
        if cache.length == self.config.block_size and self.config.positions == "learned":
            cache.length, count = 0, max(1, cache.length // 2)  # none is left: reread a half
        logits = self(tokens[:, -count:], cache=cache)[0][:, -1].float()
        if tokenizer:  # a model may have spare ids that stand for nothing
            logits[:, tokenizer.vocab_size :] = float("-inf")
        return logits

    @torch.inference_mode()  # no_grad with less bookkeeping
    def stream(self, idx, how, tokenizer=None):
        """Yield the next token of each row, (B,), until done; how: a SampleConfig."""
        tokens = self.context(idx, tokenizer)  # (B, T)
        if how.beams > 1:
            yield from self.beam_search(tokens, how, tokenizer)
            return
        rng = torch.Generator(tokens.device)  # its own: a seed gives the same whatever ran before
        rng.manual_seed(how.seed) if how.seed >= 0 else rng.seed()
        cache, penalty = KVCache(self, len(tokens)), how.repetition_penalty
        seen = tokens.new_zeros(len(tokens), self.config.vocab_size).scatter_(1, tokens, 1).bool()
        reach = len(how.stop.encode())  # tokens to look for `stop` in: each is a byte or more
        stopped, keep = np.zeros(len(tokens), bool), max(self.config.block_size, reach)
        for step in range(1, how.max_new_tokens + 1):
            logits = self.next_logits(tokens, cache, tokenizer)  # (B, V)
            if penalty != 1:  # CTRL, arXiv 1909.05858: less likely, whatever the sign
                lower = torch.where(logits > 0, logits / penalty, logits * penalty)
                logits = torch.where(seen.scatter_(1, tokens[:, -1:], True), lower, logits)
            new = torch.multinomial(probabilities(logits, how), 1, generator=rng)  # (B, 1)
            tokens = torch.cat((tokens, new), dim=1)[:, -keep:]
            yield new[:, 0]
            if how.stop:
                stopped |= [how.stop in tokenizer.decode(t) for t in tokens[:, -min(step, reach) :]]
                if stopped.all():
                    return

    def generate(self, idx, max_new_tokens=500, tokenizer=None, **how):
        """Continue idx, (B, T) or (T,), with SampleConfig's options -> (B, T + n)."""
        # n is less than max_new_tokens if every row has written `stop`, which needs the tokenizer.
        how = SampleConfig(max_new_tokens=max_new_tokens, **how)
        new = [token[:, None] for token in self.stream(idx, how, tokenizer)]
        return torch.cat([self.context(idx, tokenizer), *new], dim=1)

    def beam_search(self, tokens, how, tokenizer=None):
        """The likeliest continuation that keeping `beams` candidates at each step finds, (n, B)."""
        (B, T), beams, V = tokens.shape, how.beams, self.config.vocab_size
        tokens = tokens.repeat_interleave(beams, dim=0)  # (B * beams, T)
        scores, cache = torch.zeros(B, beams, device=tokens.device), KVCache(self, len(tokens))
        scores[:, 1:] = float("-inf")  # the beams are still alike: only the first has successors
        for _ in range(how.max_new_tokens):
            log_probs = self.next_logits(tokens, cache, tokenizer).log_softmax(dim=-1)
            totals = (scores.view(-1, 1) + log_probs).view(B, -1)  # (B, beams * V)
            scores, best = totals.topk(beams)  # (B, beams)
            first = torch.arange(0, len(tokens), beams, device=best.device)[:, None]  # (B, 1)
            rows = (first + best // V).flatten()  # the beams that go on
            tokens = torch.cat((tokens[rows], best.view(-1, 1) % V), dim=1)
            cache.stores = [store[:, rows] for store in cache.stores]
        return tokens[::beams, T:].T

def probabilities(logits, how):
    """Logits (B, V) -> what to draw by (B, V), after how's temperature, top_k and top_p."""
    if how.temperature < 1e-5:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    values, kept = (logits / how.temperature).topk(min(how.top_k or 2**40, logits.size(-1)))
    probs = F.softmax(values, dim=-1)  # (B, k), the likeliest first
    check(probs.isfinite().all(), "The model's scores are not numbers: its weights are too large.")
    # Drop a token if the likelier ones reach top_p (arXiv 1904.09751); drawing rescales the rest.
    probs[:, 1:] *= probs.cumsum(dim=-1)[:, :-1] < how.top_p
    return torch.zeros_like(logits).scatter(1, kept, probs)

# ---------------------------------------------------------------------------------------- 5. data
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

def load_data(name, tokenizer):
    """Returns tokenizer, ids to train on, ids to validate with (of a text: its last tenth), a line.

    tokenizer: the name of a new one, or one to go on with, whose alphabet may grow.
    """
    path = Path(name) if os.path.exists(name) else HERE / name  # as named, else beside gpt.py
    if name == "shakespeare" and not (path := Path("tinyshakespeare.txt")).exists():
        with explain(f"Not downloaded: get {SHAKESPEARE} some other way for --data"):
            torch.hub.download_url_to_file(SHAKESPEARE, path, SHAKESPEARE_SHA256, False)
    with explain(f"--data {name} can't be learnt: give UTF-8 text, or train.bin and val.bin"):
        binary = (path / "train.bin").exists()
        if isinstance(tokenizer, str) and (binary or tokenizer != "char"):
            tokenizer = BPETokenizer.load("gpt2" if tokenizer == "char" else tokenizer)
        if binary:
            splits = [np.memmap(path / file, np.uint16, "r") for file in ("train.bin", "val.bin")]
            check(tokenizer.kind == "bpe" and max(map(np.max, splits)) < tokenizer.vocab_size,
                  "these ids are not of this tokenizer's vocabulary")
            return tokenizer, *splits, f"{path}: {sum(map(len, splits)):,} tokens"
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        text = "\n".join([file.read_text(encoding="utf-8-sig") for file in files])
        about, known = f"{path.name}: {len(text):,} characters", getattr(tokenizer, "stoi", {})
        if tokenizer == "char" or tokenizer.kind == "char":
            tokenizer = CharTokenizer.from_text(text, known)
        if known and len(tokenizer.stoi) > len(known):
            new = "".join(tokenizer.stoi)[len(known) :]
            about += f", {sum(map(text.count, new)) / len(text):.2%} new to the model: {new!r}"
        ids = tokenizer.encode(text)
    split = int(0.9 * len(ids))
    return tokenizer, ids[:split], ids[split:], f"{about}, {len(ids):,} tokens"

def get_batch(data, block_size, batch_size, rng=None, device="cpu", starts=None):
    """Passages x and y (B, T), y one token later; they start where rng chooses, or at `starts`."""
    if starts is None:
        starts = torch.randint(len(data) - block_size, (batch_size,), generator=rng).numpy()
    passages = data[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)  # (B, T + 1)
    passages, cuda = torch.from_numpy(passages), torch.device(device).type == "cuda"
    # From pinned memory a GPU copies by itself: the CPU goes on without waiting for it.
    passages = (passages.pin_memory() if cuda else passages).to(device, non_blocking=cuda)
    return passages[:, :-1], passages[:, 1:]

def average_over_processes(*tensors):
    """Replace each tensor by its mean over torchrun's processes, one for each GPU, if there are."""
    if dist.is_initialized():
        flat = nn.utils.parameters_to_vector(tensors)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / dist.get_world_size(), tensors)

@torch.no_grad()
def estimate_loss(model, data, max_tokens=None):
    """Mean loss over windows that are spread evenly over the data: always the same ones."""
    T, device = model.config.block_size, model.lm_head.weight.device
    count = (len(data) - 1) // T  # windows there are; with max_tokens not all are read
    read = min(count, (max_tokens or len(data)) // T + 1)
    starts = np.linspace(0, count - 1, read).astype(int) * T
    if dist.is_initialized():  # the processes share the work
        starts = starts[dist.get_rank() :: dist.get_world_size()]
    total, size = torch.zeros(2, device=device), max(1, 4096 // T)  # sums; windows in a pass
    for part in (starts[i : i + size] for i in range(0, len(starts), size)):
        loss = model(*get_batch(data, T, len(part), device=device, starts=part))[1]
        total += torch.stack((loss, torch.ones_like(loss))) * len(part)
    average_over_processes(total)
    return (total[0] / total[1]).item()

# --------------------------------------------------------------------------------- 6. checkpoints
def write_atomically(path, write):
    """Write beside path, then rename: at any moment path holds all of the old or all of the new."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with explain(f"{path} can't be written: make room, or choose another place. What was there "
                 "is unharmed"):
        try:
            with open(beside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

def save_checkpoint(path, model, tokenizer, **more):
    """Weights, sizes, alphabet, and `more` of the run: only tensors and Python's own types."""
    content = {"format": 1, "model_state_dict": model.state_dict(), "tokenizer": tokenizer.kind,
               "hyperparameters": asdict(model.config), "stoi": tokenizer.stoi,
               "itos": tokenizer.itos, **more}
    write_atomically(Path(path), lambda file: torch.save(content, file))

def load_checkpoint(path, device="cpu"):
    """Returns model, tokenizer, and the rest of what was saved; the file can't run any code."""
    with explain(f"{path} can't be used as a checkpoint: name another --ckpt, or train one"):
        with zipfile.ZipFile(path) as archive:  # torch.load doesn't compare the checksums
            check(not any(entry.compress_type for entry in archive.infolist()), "it is compressed")
            check(not archive.testzip(), "its checksums don't match")
        content = torch.load(path, map_location="cpu", weights_only=True)
        check(int(content.pop("format", 1)) <= 1, "a newer gpt.py wrote it")
        state = {name.replace("module.", "").replace("_orig_mod.", ""): tensor
                 for name, tensor in content.pop("model_state_dict").items()}
        # With a stride of 0 a tensor repeats one number: a small file could claim any size.
        check(sum(t.nbytes for t in state.values()) <= 2 * os.path.getsize(path), "it lacks bytes")
        config = GPTConfig(**content.pop("hyperparameters"))
        kinds = {"char": CharTokenizer, "bpe": BPETokenizer}
        tokenizer = kinds[content.pop("tokenizer", "char")](content.pop("stoi"))
        check(config.vocab_size >= tokenizer.vocab_size, "its model knows fewer tokens")
        tokenizer.encode("")  # an error if its tokens are not what they should be
        return GPTLanguageModel.from_state(config, state).to(device), tokenizer, content

def open_model(name):
    """load_checkpoint(name), looked for in checkpoints/ too; or GPT-2 by its name or folder."""
    path = Path(name) if os.path.exists(name) else HERE / "checkpoints" / name
    if os.path.isdir(path) or name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        name = path if os.path.isdir(path) else name
        return GPTLanguageModel.from_pretrained(name), BPETokenizer.load(name), {}
    print(f"Opening {path}", file=sys.stderr)
    return load_checkpoint(path if os.path.exists(path) else name)

# ------------------------------------------------------------------------------------ 7. training
def choose_device(name):
    """What --device names; 'auto' takes CUDA (each process its own), else MPS, else the CPU."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else name
    with explain(f"--device {name} is not to be had here"):
        check(name.split(":")[0] in ("cpu", "cuda", "mps"), "only cpu, cuda and mps are known")
        return torch.zeros(1, device=name).device

def choose_precision(name, device):
    """The type to multiply in: bf16 only where it is in hardware, and fast (a T4 emulates it)."""
    def seconds(dtype):  # for a matrix product, the fastest of many
        matrix = torch.ones(256, 256, dtype=dtype)
        return min(timeit.repeat(lambda: torch.mm(matrix, matrix), number=1, repeat=100))

    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if name == "auto":  # CPUs differ: some have bf16 and lose by it
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so that the choice is the same while other programs run
        fast = device.type == "cpu" and seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)
        torch.set_num_threads(threads)
        name = "bf16" if fast else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]

def learning_rate_factor(step, config):
    """The share of the highest rate at a step: warm-up, then the schedule (linear: 30 % level)."""
    if step < config.warmup_iters:
        return (step + 1) / config.warmup_iters
    start = max(config.warmup_iters, 0.3 * config.max_iters if config.schedule == "linear" else 0)
    done = max(0, step - start) / max(1, config.max_iters - start)
    cosine = 0.5 + 0.5 * math.cos(math.pi * done)
    return {"linear": 1 - done, "cosine": cosine, "constant": 1}[config.schedule]

def write_log(ckpt, history):
    """The losses as a table, NAME.csv, and as a picture, NAME.png."""
    rows = [history[0].keys(), *(row.values() for row in history)]
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)
    write_atomically(ckpt.with_suffix(".csv"), lambda file: file.write(table.encode()))
    from matplotlib.figure import Figure
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    for name in ("train_loss", "val_loss"):
        axes.plot([row["iteration"] for row in history], [row[name] for row in history], label=name)
    best = min(history, key=lambda row: row["val_loss"])
    axes.plot(best["iteration"], best["val_loss"], "ko", label=f"best: {best['val_loss']:.4f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=ckpt.stem)
    axes.legend()
    write_atomically(ckpt.with_suffix(".png"), lambda file: axes.figure.savefig(file, dpi=100))

MAY_CHANGE = ("resume", "ckpt", "data", "device", "max_iters", "eval_interval", "eval_tokens",
              "compile", "wandb", "attention", "dropout")

def configure(flags, saved):
    """Both configurations; a value comes from its flag, the checkpoint, the preset, the default."""
    for name in flags.keys() & saved.keys() - set(MAY_CHANGE):
        check(flags[name] == saved[name], f"--{name} {flags[name]} contradicts the checkpoint's "
              f"{saved[name]}: leave it out (--resume may change {', '.join(MAY_CHANGE)}).")
    preset = (flags | saved).get("preset", "auto")
    if preset == "auto":
        preset = "cpu" if choose_device(flags.get("device", "auto")).type == "cpu" else "gpu"
    values = asdict(TrainConfig()) | PRESETS.get(preset, {}) | saved | flags | {"preset": preset}
    names = [f.name for f in fields(GPTConfig) if f.name in values]
    return GPTConfig(**{name: values.pop(name) for name in names}), TrainConfig(**values)

def set_aside(ckpt, say):
    """Rename the files of an earlier run to NAME-1 and so on: no run overwrites another's."""
    ends, n = (".pt", ".resume.pt", ".csv", ".png"), 1
    while any(os.path.exists(ckpt.with_name(f"{ckpt.stem}-{n}{end}")) for end in ends):
        n += 1
    for end in ends:
        if os.path.exists(file := ckpt.with_suffix(end)):
            with explain(f"{file} can't be renamed to make room for a new run"):
                new = file.rename(ckpt.with_name(f"{ckpt.stem}-{n}{end}"))
            say(f"The earlier run's {file} is now called {new}.")

def train(**flags):
    """Train as the flags say (torchrun: one of several processes); returns model, tokenizer."""
    from tqdm import tqdm
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = tqdm.write if rank == 0 else lambda text: None
    ckpt = Path(flags.get("ckpt", TrainConfig.ckpt))
    check(ckpt.suffix == ".pt", f"--ckpt {ckpt} must end in .pt.")
    resume_file = ckpt.with_suffix(".resume.pt")

    # What to start from: an interrupted run, another model, or nothing.
    model, tokenizer, saved = None, None, {}
    run = {"iteration": 0, "history": [], "seconds": 0.0, "run_id": f"{time.time_ns():x}",
           "fingerprint": ""}
    if flags.get("resume"):
        with explain(f"{resume_file} does not hold the state of a run"):
            model, tokenizer, held = load_checkpoint(resume_file)
            run = {key: held[key] for key in (*run, "best", "train_config", "optimizers", "scaler")}
            saved = asdict(TrainConfig(**run["train_config"])) | asdict(model.config)
            saved["wandb"] = ""  # a file can't turn on what sends to the network
            row = dict(iteration=int, train_loss=float, val_loss=float, tokens=int, seconds=float)
            check([type(run[key]) for key in ("iteration", "history", "seconds", "fingerprint")]
                  == [int, list, float, str] and run["history"] and run["iteration"] >= 0 and all(
                  {key: type(old[key]) for key in old} == row for old in run["history"]),
                  "it is damaged")
            check(not ckpt.exists() or load_checkpoint(ckpt)[2].get("run_id") == run["run_id"],
                  f"{ckpt} is of another run")
    elif flags.get("init_from"):
        model, tokenizer, _ = open_model(flags["init_from"])
        if tokenizer.kind == "bpe" and flags.get("tokenizer") != "char":  # gpt2, or its folder
            flags.pop("tokenizer", None)
        saved = asdict(model.config) | {"tokenizer": tokenizer.kind}
    architecture, config = configure(flags, saved)
    T, B, passes = architecture.block_size, config.batch_size, config.gradient_accumulation_steps
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    tokenizer, train_data, val_data, about = load_data(config.data, tokenizer or config.tokenizer)
    check(min(len(train_data), len(val_data)) > T,
          f"--data {config.data} is too short for --block_size {T}: {about}.")
    text = hashlib.sha256(np.concatenate((train_data[: 2**24], val_data[: 2**24]))).hexdigest()
    text = f"text {text[:16]} and {world} processes"
    check(not config.resume or run["fingerprint"] == text,
          f"{config.data} would be {text}; this run began with {run['fingerprint']}.")
    run.update(fingerprint=text, data=Path(config.data).name, train_config=asdict(config))

    # The model and its optimizers; one seed gives every process the same weights.
    torch.manual_seed(config.seed)
    architecture.vocab_size = max(tokenizer.vocab_size, saved.get("vocab_size", 0))
    if model:
        weights = model.state_dict()
        for name in ("token_embedding.weight", "lm_head.weight"):  # a new token starts as the mean
            new = weights[name].mean(dim=0).expand(architecture.vocab_size - len(weights[name]), -1)
            weights[name] = torch.cat((weights[name], new))
        model = GPTLanguageModel.from_state(architecture, weights)
    else:
        model = GPTLanguageModel(architecture)
    network = model.to(device).train()
    optimizers = model.make_optimizers(config)
    if world > 1 and not dist.is_initialized():
        # After the first optimizer, which imports torch.distributed.nn.functional: that would keep
        # a group that is already there for ever, and its threads could abort Python at its exit.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    if config.resume:
        with explain(f"{resume_file} does not hold the state of a run"):
            for optimizer, state in zip(optimizers, run.pop("optimizers"), strict=True):
                optimizer.load_state_dict(optimizer.state_dict() | {"state": state["state"]})
                for p, old in optimizer.state.items():  # AdamW's kernels trust these shapes
                    shapes = {"momentum_buffer": p.shape} if optimizer is not optimizers[0] else {
                        "step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                    check({key: t.shape for key, t in old.items()} == shapes and all(
                        t.is_contiguous() for t in old.values()), "it is damaged")
            known, old = scaler.state_dict(), run.pop("scaler")
            check([(k, type(old[k])) for k in old] == [(k, type(known[k])) for k in known],
                  "it is damaged")
            scaler.load_state_dict(old)

    def gradients(step):
        """Add up the gradients of this process's share of a step; returns its mean loss."""
        # Each step has its own seeds: a resumed run needs no generator's state, and the passages
        # don't depend on how passes and processes share them (dropout does).
        rng = torch.Generator().manual_seed(config.seed + 1_000_003 * step)
        torch.manual_seed(config.seed + 1_000_003 * step + rank)  # for dropout
        x, y = get_batch(train_data, T, B * passes * world, rng, device)  # (B * passes * world, T)
        total = torch.zeros((), device=device)
        for i in range(rank * B, len(x), world * B):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                loss = network(x[i : i + B], y[i : i + B])[1] / passes  # they add up to a mean
            scaler.scale(loss).backward()
            total += loss.detach()
        return total

    # Trial passes: what can't work, for want of memory above all, fails before the run begins.
    if config.compile:
        try:
            network = torch.compile(model)
            gradients(0)
        except Exception as error:
            say(f"torch.compile failed, so the run goes on without it: {str(error)[:200]}")
            network = model
    gradients(0).item()  # the first pass is slower than those that follow
    clock, per_step, steps = time.perf_counter(), T * B * passes * world, config.max_iters
    gradients(0).item()
    a_step, clock = 1.3 * (time.perf_counter() - clock), time.perf_counter()  # with the optimizer
    estimate_loss(model, val_data, max(1, min(len(val_data), config.eval_tokens) // 20))
    an_evaluation = 25 * (time.perf_counter() - clock)  # 20, and a quarter more for training
    left = steps - run["iteration"]
    minutes = (left * a_step + (1 + left // config.eval_interval) * an_evaluation) / 60
    model.zero_grad()
    say(f"{about}\n{sum(p.numel() for p in model.parameters()):,} parameters on {world} x {device} "
        f"in {str(precision)[6:]}, optimizer {config.optimizer}; {steps:,} steps of {per_step:,} "
        f"tokens: {steps * per_step / len(train_data):.1f} epochs, about {minutes:.1f} minutes "
        f"to go. Guessing is a loss of {math.log(architecture.vocab_size):.4f}.")
    if config.wandb and rank == 0:
        import wandb
        with explain(f"--wandb {config.wandb} can't be logged to: try `wandb login`"):
            wandb.init(project=config.wandb, config=asdict(config) | asdict(architecture))
    if rank == 0 and not config.resume:
        set_aside(ckpt, say)
    history, loss = run["history"], 0.0  # loss: the latest that is known, of whatever text
    stops, stopping, last, saving = [], False, True, False  # stops: signals so far
    def written():  # when the resume file was last written, to notice if another run does it too
        return resume_file.stat().st_mtime_ns if os.path.exists(resume_file) else None
    seen = written()

    def on_signal(number, frame):
        stops.append(number)
        if stops[1:] and not saving:  # the first ends the run after this step, the second at once
            raise KeyboardInterrupt(number)
    handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=steps * per_step, initial=run["iteration"] * per_step, unit="token",
               unit_scale=True, disable=rank > 0 or not sys.stderr or None)  # None: on a terminal
    try:
        for step in range(run["iteration"], steps + 1):  # the last round only evaluates
            last, improved, run["iteration"] = step == steps, False, step
            due = ((last or step % config.eval_interval == 0)
                   and step not in [row["iteration"] for row in history])
            if due:
                train_loss = estimate_loss(model, train_data, max(1, config.eval_tokens // 4))
                loss = estimate_loss(model, val_data, config.eval_tokens)
            check(math.isfinite(loss), "The loss is no longer a number: lower --learning_rate or "
                  f"take --precision fp32. {ckpt} keeps the last good model.")
            if due:
                history.append(dict(iteration=step, train_loss=train_loss, val_loss=loss,
                                    tokens=step * per_step, seconds=round(run["seconds"], 1)))
                run["best"] = min(row["val_loss"] for row in history)
                improved = loss == run["best"]
                say(f"step {step:6,}: training loss {train_loss:.4f}, validation loss {loss:.4f}"
                    f"{' *' if improved else ''}")
                if rank == 0 and (last or len(history) % 4 == 1):
                    text = tokenizer.decode(model.generate([], 150, tokenizer, seed=1)[0])
                    say("    | " + text.strip().replace("\n", "\n    | "))
                if config.wandb and rank == 0:
                    wandb.log(history[-1], step=step)
            if rank == 0 and (due or stopping):
                saving = True  # torch.save, interrupted, can abort the whole program
                check(written() in (seen, None), f"Another run writes to {ckpt}: this one stops.")
                if improved or not ckpt.exists():
                    save_checkpoint(ckpt, model, tokenizer, **run)
                save_checkpoint(resume_file, model, tokenizer, **run, scaler=scaler.state_dict(),
                                optimizers=[optimizer.state_dict() for optimizer in optimizers])
                seen, saving = written(), False
            if last or stopping:
                break
            clock = time.perf_counter()
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = config.learning_rate * learning_rate_factor(step, config)
            told = torch.full((), float(len(stops)), device=device)
            status = torch.stack((gradients(step), told))
            # This makes several GPUs one: each has the gradients of its share, then all the mean.
            average_over_processes(status, *(p.grad for p in model.parameters()))
            for optimizer in optimizers:
                scaler.unscale_(optimizer)  # fp16's were scaled up; clipping needs true lengths
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                if not scaler.is_enabled() or norm.isfinite():  # fp16 overflows now and then
                    scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
            # What one process was told all know after the same step.
            stopping = status[1] > 0 if world > 1 else bool(stops)
            if stopping or step % 10 == 0:
                loss = status[0].item()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(per_step)
            run["seconds"] += time.perf_counter() - clock  # of training: evaluations don't count
        if rank == 0:
            write_log(ckpt, history)
        average_over_processes(torch.zeros(1, device=device))  # wait until rank 0 has written
        if world > 1:
            dist.destroy_process_group()  # ends its threads, before Python goes away under them
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if not last:
        say(f"Stopped after {step:,} steps, with nothing lost: --resume goes on.")
        raise KeyboardInterrupt(stops[0] if stops else signal.SIGTERM)
    say(f"The best model (validation loss {run['best']:.4f}) is in {ckpt}, its losses in "
        f"{ckpt.with_suffix('.csv')} and .png. To write: python gpt.py --sample --ckpt {ckpt}")
    return model, tokenizer

# ---------------------------------------------------------------------------- 8. the command line
def write(model, tokenizer, prompt, how):
    """Print the prompt and what follows; the first of several texts streams as it is made."""
    def until(text):
        before, stop, _ = text.partition(how.stop or "\0\0")
        return before + stop

    ids = torch.from_numpy(tokenizer.encode(prompt).astype(np.int64)).repeat(how.num_samples, 1)
    rows, pending, text = [], [], ""
    print(prompt, end="", flush=True)
    for new in model.stream(ids, how, tokenizer):
        rows.append(new.tolist())
        pending.append(rows[-1][0])
        piece = tokenizer.decode(pending)
        if piece[-1:] != "\ufffd" or len(pending) > 3:  # else the last character is incomplete
            text, pending, shown = until(text + piece), [], len(text)
            print(text[shown:], end="", flush=True)
    print(until(text + tokenizer.decode(pending))[len(text) :])
    for row in range(1, how.num_samples):
        print("-" * 40, prompt + until(tokenizer.decode([new[row] for new in rows])), sep="\n")

def sample(**flags):
    """Write as the flags say: the text goes to stdout, what is said about it to stderr."""
    how, given = SampleConfig(**flags), flags.keys()
    drawing = given & {"temperature", "top_k", "top_p", "num_samples", "repetition_penalty", "seed"}
    check(how.beams == 1 or not drawing, f"--beams takes the likeliest text: no {drawing} for it.")
    check(len(given & {"prompt", "prompt_file", "interactive"}) < 2,
          "Of --prompt, --prompt_file and --interactive only one can be used.")
    model, tokenizer, about = open_model(how.ckpt)
    model.eval().to(choose_device(how.device)).config.attention = how.attention
    data, steps, loss = (about.get(key, "unknown") for key in ("data", "iteration", "best"))
    loss = f"{loss:.4f}" if isinstance(loss, float) else loss
    print(f"Text: {data}; steps: {steps}; validation loss: {loss}", file=sys.stderr)
    if how.prompt_file:
        with explain(f"{how.prompt_file} can't be read"):
            how.prompt = Path(how.prompt_file).read_text(encoding="utf-8-sig")
    if not how.interactive:
        return write(model, tokenizer, how.prompt, how)
    print("Type a prompt and Return, again and again; Ctrl-D ends it.", file=sys.stderr)
    for line in sys.stdin:
        try:
            write(model, tokenizer, line.removesuffix("\n"), how)
        except UserError as error:
            print(error, file=sys.stderr)

def parse(argv):
    """The command line as {name: value} of what was given; every `option` above is a flag."""
    parser = argparse.ArgumentParser("gpt.py", "python gpt.py --train|--sample [options] (--help)",
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    mode = parser.add_mutually_exclusive_group(required=True)
    for run in (train, sample):
        mode.add_argument(f"--{run.__name__}", dest="run", action="store_const", const=run,
                          help=run.__doc__)
    groups = {train: fields(GPTConfig) + fields(TrainConfig), sample: fields(SampleConfig)}
    for f in {f.name: f for f in groups[sample] + groups[train]}.values():
        if f.name != "vocab_size":
            how = {"type": f.type, "metavar": "VALUE"}
            how = {"action": argparse.BooleanOptionalAction} if f.type is bool else how
            names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))
            parser.add_argument(*names, help=f"{f.metadata['help']} [{f.default}]", **how)
    flags, strange = parser.parse_known_args(argv)
    known = {"run", *(f.name for f in groups[flags.run])}
    if strange := strange + [f"--{name}" for name in vars(flags) if name not in known]:
        parser.error(f"{strange[0]!r} is not an option of --{flags.run.__name__}")
    return vars(flags)

def main(argv=None):
    """Run one command; returns the exit code: 0, 2 for a person's mistake, 130 after Ctrl-C."""
    for console in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(console, "reconfigure"):
            console.reconfigure(errors="replace")  # a letter that it can't show becomes "?"
    try:
        flags = parse(argv)
        flags.pop("run")(**flags)
    except (UserError, ModuleNotFoundError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise  # a bug, not a mistake
        advice = {UserError: "", ModuleNotFoundError: ": pip install it"}
        advice = advice.get(type(error), ": take a smaller --batch_size, --block_size or --n_embd, "
                            "or fewer --num_samples or --beams")
        print(f"gpt.py: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except BrokenPipeError:  # whoever read the text has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0

if __name__ == "__main__":
    sys.exit(main())
