"""A GPT from scratch in one file: it reads a text, learns to predict the next character, and writes.

    python gpt.py --train                                # learn input.txt with this machine's preset
    python gpt.py --train --data my.txt --ckpt mine.pt   # learn any UTF-8 text
    python gpt.py --sample --ckpt gpt_checkpoint.pt      # write with what was learnt

    text -> token ids (B, T) -> embeddings (B, T, C) -> n_layer Blocks -> scores (B, T, V)

    Block:  x ---+--> LayerNorm -> MultiHeadAttention --(+)--+--> LayerNorm -> FeedForward --(+)--> x
                 |          (look at the past)           |   |    (think about what was seen)  |
                 +---------------------------------------+   +---------------------------------+

Nothing runs before it is explained. Shapes stand at the lines that make them: B sequences in a batch,
T positions, C channels (n_embd), nh heads of hs channels each, V tokens in the vocabulary.
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
import urllib.request
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

@contextmanager
def explain(sentence, *errors):
    """Turn these errors into a UserError: what failed, what to do about it, and the reason."""
    try:
        yield
    except errors as error:
        raise UserError(f"{sentence} ({' '.join(str(error).split()) or repr(error)})") from error

def option(default, help, *choices, low=0, high=2**40):
    """A dataclass field that is a command-line flag too: default, help and limits, stated once."""
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))

class Options:
    def __post_init__(self):
        """Check every value, whether a flag, a checkpoint or a notebook gave it."""
        for f in fields(self):
            value, rule = getattr(self, f.name), f.metadata or option(0, "").metadata
            good = type(value) is f.type or (f.type is float and type(value) is int)
            if good and f.type in (int, float):
                good = rule["low"] <= value <= rule["high"]
            if not good or value not in (rule["choices"] or [value]):
                allowed = rule["choices"] or f"from {rule['low']} to {rule['high']}"
                raise UserError(f"--{f.name} can't be {value!r}: {f.type.__name__}, {allowed}.")

@dataclass
class GPTConfig(Options):
    """The architecture: what a checkpoint keeps as its `hyperparameters`."""
    n_layer: int = option(6, "blocks, one after the other", low=1)
    n_head: int = option(6, "attention heads in each block", low=1)
    n_embd: int = option(384, "channels of every position", low=1)
    block_size: int = option(256, "context: how many tokens the model can look back over", low=1)
    dropout: float = option(0.0, "share of activations zeroed while training", high=0.99)
    bias: bool = option(False, "biases in linear layers and norms, as in GPT-2")
    tie_weights: bool = option(False, "one matrix for reading tokens and for predicting them")
    positions: str = option("rotary", "how positions are told apart", "rotary", "learned")
    qk_norm: bool = option(True, "normalise queries and keys")
    activation: str = option("relu2", "in the feed-forward layers", "gelu", "relu", "relu2")
    attention: str = option("fused", "PyTorch's kernel, or Head", "fused", "explicit")
    vocab_size: int = 65  # no flag: it comes from the tokenizer

@dataclass
class TrainConfig(Options):
    """How to train; a preset replaces some of these defaults."""
    ckpt: str = option("gpt_checkpoint.pt", "the checkpoint to write, or to sample from")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = option("auto", "of the arithmetic", "auto", "fp32", "bf16", "fp16")
    seed: int = option(1337, "the same seed, the same result; -1 when sampling: random", low=-1)
    preset: str = option("auto", "sizes: auto, cpu, laptop, gpu, lecture, gpt2")
    data: str = option("input.txt", "text, folder of .txt or of train.bin + val.bin, 'shakespeare'")
    tokenizer: str = option("char", "char, gpt2, or a folder with vocab.json and merges.txt")
    init_from: str = option("", "fine-tune this checkpoint, 'gpt2', or GPT-2 folder")
    resume: bool = option(False, "go on where the run of --ckpt stopped")
    max_iters: int = option(2000, "optimizer steps", low=1)
    batch_size: int = option(16, "sequences in one forward pass of one process", low=1)
    gradient_accumulation_steps: int = option(1, "forward passes in one optimizer step", low=1)
    optimizer: str = option("muon", "muon: AdamW for all but the blocks' matrices", "muon", "adamw")
    learning_rate: float = option(3e-3, "AdamW's highest learning rate")
    muon_learning_rate: float = option(0.01, "Muon's highest learning rate")
    weight_decay: float = option(0.1, "pull of the matrices towards zero")
    warmup_iters: int = option(0, "steps over which the learning rate rises")
    schedule: str = option("linear", "how it falls", "linear", "cosine", "constant")
    eval_interval: int = option(250, "steps between evaluations, each of which saves", low=1)
    eval_tokens: int = option(131_072, "tokens of the validation split to read, at most", low=1)
    compile: bool = option(False, "torch.compile: slow to start, then faster on a GPU")
    wandb: str = option("", "Weights & Biases project to log to")

@dataclass
class SampleConfig(Options):
    """How to write."""
    ckpt: str = TrainConfig.ckpt
    device: str = TrainConfig.device
    seed: int = option(-1, "", low=-1)
    prompt: str = option("", "text to go on from")
    prompt_file: str = option("", "file with the text to go on from")
    interactive: bool = option(False, "type prompts, read continuations, until Ctrl-D")
    max_new_tokens: int = option(500, "tokens to write")
    temperature: float = option(0.8, "0: always the likeliest token; higher: bolder")
    top_k: int = option(0, "choose among the k likeliest tokens; 0: among all")
    top_p: float = option(0.95, "choose among the likeliest that reach p together", high=1)
    repetition_penalty: float = option(1.0, "above 1: avoid what was written", low=0.01)
    num_samples: int = option(1, "texts to write at once", low=1)
    beams: int = option(1, "look for the likeliest text with so many beams", low=1)
    stop: str = option("", "end once this text is written")

PRESETS = {  # README.md says how long each takes, and to which loss
    "cpu": dict(n_layer=3, n_head=4, n_embd=128, block_size=128, batch_size=8, max_iters=2400,
                learning_rate=6e-3, weight_decay=0.0, attention="explicit"),
    "laptop": dict(n_head=4, n_embd=256, dropout=0.15, max_iters=3000, attention="explicit"),
    "gpu": dict(dropout=0.2, batch_size=64, max_iters=5000),
    "lecture": dict(positions="learned", activation="relu", qk_norm=False, bias=True, dropout=0.2,
                    optimizer="adamw", learning_rate=3e-4, schedule="constant", batch_size=64,
                    max_iters=5000, eval_interval=500),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, positions="learned", bias=True,
                 activation="gelu", qk_norm=False, tie_weights=True, tokenizer="gpt2", batch_size=8,
                 optimizer="adamw", learning_rate=6e-4, schedule="cosine", warmup_iters=200),
}

# ---------------------------------------------------------------------------------- 2. tokenizers
class CharTokenizer:
    """The plainest tokenizer: every distinct character of the text is a token."""
    kind = "char"

    def __init__(self, stoi):
        """stoi, string to integer, gives each token its id; itos is the way back."""
        self.stoi, self.itos, self.vocab_size = stoi, {i: s for s, i in stoi.items()}, len(stoi)
        self.dtype = np.uint8 if self.vocab_size <= 2**8 else np.uint16
        if sorted(self.itos) != list(range(self.vocab_size)) or not 0 < self.vocab_size <= 2**16:
            raise UserError("A vocabulary needs 1 to 65,536 tokens, with ids that count up from 0.")

    @classmethod
    def from_text(cls, text, stoi=()):
        """The text's characters in order, after those of an alphabet that is already in use."""
        new = sorted(set(text).difference(stoi))
        return cls({**dict(stoi), **{s: len(stoi) + i for i, s in enumerate(new)}})

    def encode(self, text):
        """Text to an array of ids (len(text),); UserError names characters it doesn't know."""
        if unknown := sorted(set(text) - self.stoi.keys()):
            raise UserError(f"The model's alphabet {''.join(self.stoi)!r} has no {unknown[:9]}.")
        ids_of = np.zeros(sys.maxunicode + 1, self.dtype)  # a table, looked up a million at a time
        ids_of[[ord(s) for s in self.stoi]] = list(self.stoi.values())
        parts = (text[i : i + 2**20].encode("utf-32-le") for i in range(0, len(text) or 1, 2**20))
        return np.concatenate([ids_of[np.frombuffer(part, np.uint32)] for part in parts])

    def decode(self, ids):
        return "".join([self.itos[int(i)] for i in ids])

class BPETokenizer(CharTokenizer):
    """GPT-2's byte-pair encoding: frequent runs of bytes are tokens. A thin wrapper of tiktoken."""
    kind = "bpe"
    # Bytes are merged only within a word (with the space before it), a number, or punctuation.
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def __init__(self, stoi):
        """In stoi a byte stands as the character of the same number, from 0 to 255."""
        from tiktoken import Encoding
        super().__init__(stoi)
        special = {s: i for s, i in stoi.items() if s == "<|endoftext|>"}
        ranks = {s.encode("latin-1"): i for s, i in stoi.items() if s not in special}
        self.encoding = Encoding("", pat_str=self.pattern, mergeable_ranks=ranks,
                                 special_tokens=special)

    @classmethod
    def load(cls, name="gpt2"):
        """'gpt2' through tiktoken's download, or a folder with OpenAI's vocab.json and merges.txt."""
        with explain(f"No vocabulary in {name}: it takes GPT-2's vocab.json, merges.txt", Exception):
            if not Path(name).is_dir():
                from tiktoken import get_encoding
                gpt2 = get_encoding(name)
                tokens = map(gpt2.decode_single_token_bytes, range(gpt2.n_vocab))
                return cls({token.decode("latin-1"): i for i, token in enumerate(tokens)})
            stoi = json.loads((Path(name) / "vocab.json").read_text(encoding="utf-8"))
            merges = (Path(name) / "merges.txt").read_text(encoding="utf-8").split("\n")
            order = [stoi[m.replace(" ", "")] for m in merges if m and not m.startswith("#version")]
            if order != sorted(order):  # tiktoken merges in the order of the ids
                raise ValueError("its merges are not in the order of their ids")
            # The file spells the bytes that don't print as the letters from 256 on.
            printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
            spelt = {chr(256 + i): chr(b) for i, b in enumerate(sorted(set(range(256)) - printing))}
            return cls({"".join(spelt.get(c, c) for c in s): i for s, i in stoi.items()})

    def encode(self, text):
        return np.array(self.encoding.encode(text, allowed_special="all"), self.dtype)

    def decode(self, ids):
        """Ids to text; bytes that are only a part of a character show as U+FFFD."""
        return self.encoding.decode([int(i) for i in ids])

# ----------------------------------------------------------------------------------- 3. the model
class Head(nn.Module):
    """One attention head: every position asks the past a question and mixes the answers it gets.

    softmax(Q K^T / sqrt(hs) + mask) V: "Attention Is All You Need" (arXiv 1706.03762), section 3.2.
    It has no parameters; given (B, nh, T, hs) it is all heads of a layer, side by side.
    """
    def forward(self, q, k, v):
        """q (..., T, hs), the last T of S positions; k, v (..., S, hs) -> (..., T, hs), (..., T, S)."""
        # Without the root, scores would grow with hs and the softmax would pick one position only.
        scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (T, hs) @ (hs, S) -> (T, S)
        T, S = scores.shape[-2:]
        future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1 + S - T)
        weights = F.softmax(scores.masked_fill(future, float("-inf")), dim=-1)  # exp(-inf) is 0
        return weights.to(v.dtype) @ v, weights  # (T, S) @ (S, hs) -> (T, hs)

class KVCache:
    """Keys and values of the tokens read so far, so that generation reads each token only once.

    A ring of block_size slots: when it is full, the newest token replaces the oldest. Rotary scores
    depend on distances only, so that is right for them; learned positions have to start again.
    """
    def __init__(self, model, batch_size):
        c, weight = model.config, model.lm_head.weight
        shape = (c.n_layer, 2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
        self.store, self.length = weight.new_zeros(shape), 0  # length: tokens read so far

    def append(self, layer, k, v):
        """Add one layer's keys and values (B, nh, T, hs); return all that it holds (B, nh, S, hs)."""
        size, T = self.store.size(4), k.size(2)
        slot = self.length % size
        self.store[layer, 0, :, :, slot : slot + T] = k
        self.store[layer, 1, :, :, slot : slot + T] = v
        return self.store[layer, :, :, :, : min(self.length + T, size)]

class MultiHeadAttention(nn.Module):
    """Communication: several heads look at the past at once, each for something of its own."""
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, self.head = config, layer, Head()
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotation=None, cache=None, maps=None):
        """x (B, T, C) -> (B, T, C); a list `maps` is given the weights (B, nh, T, S)."""
        (B, T, C), nh = x.shape, self.config.n_head
        qkv = self.qkv(x).view(B, T, 3, nh, C // nh)  # (B, T, 3C) -> (B, T, 3, nh, hs)
        qk, v = qkv[:, :, :2], qkv[:, :, 2]  # (B, T, 2, nh, hs), (B, T, nh, hs)
        if self.config.qk_norm:  # bounds the scores, so that large steps can't blow them up
            qk = F.layer_norm(qk, qk.shape[-1:])
        if rotation is not None:  # channels i and i + hs/2 turn together
            cos, sin = rotation
            qk = qk * cos + qk.roll(C // nh // 2, dims=-1) * sin
        q, k, v = (t.transpose(1, 2) for t in (*qk.unbind(dim=2), v))  # each (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, nh, S, hs)
        if self.config.attention == "fused" and maps is None:
            # One query at the end of a cache sees all; is_causal would show it the first key only.
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
        self.activation, self.dropout = config.activation, nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.up(x)  # (B, T, C) -> (B, T, 4C)
        # GPT-2 was trained with the tanh form of GELU; relu2 is from "Primer" (arXiv 2109.08668).
        x = F.gelu(x, approximate="tanh") if self.activation == "gelu" else F.relu(x)
        x = x * x if self.activation == "relu2" else x
        return self.dropout(self.down(x))  # (B, T, 4C) -> (B, T, C)

class Block(nn.Module):
    """Communication, then computation; each adds its result to a stream that is never rewritten.

    Normalising what a layer reads, not the stream itself, lets gradients reach every block.
    """
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = MultiHeadAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.feed_forward = FeedForward(config)

    def forward(self, x, rotation=None, cache=None, maps=None):
        x = x + self.attention(self.ln_1(x), rotation, cache, maps)  # (B, T, C)
        return x + self.feed_forward(self.ln_2(x))  # (B, T, C)

@contextmanager
def evaluating(model):
    """Without dropout for a while, then as it was."""
    if not model.training:  # then nothing is to be done, once for every token that is written
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()

# GPT-2 is this model with other numbers: its names, what it holds turned round, what it must be.
GPT2_NAMES = {"transformer.": "", "wte": "token_embedding", "wpe": "position_embedding",
              "h.": "blocks.", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.proj",
              "mlp.c_fc": "feed_forward.up", "mlp.c_proj": "feed_forward.down"}
GPT2_TURNED = ("qkv.weight", "proj.weight", "up.weight", "down.weight")
GPT2_IS = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
           "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}

class GPTLanguageModel(nn.Module):
    """Token ids in; out comes, at every position at once, a score for each possible next token."""
    def __init__(self, config):
        super().__init__()
        if config.n_embd % (2 * config.n_head):  # rotary positions turn channels in pairs
            raise UserError(f"--n_embd must be an even multiple of --n_head {config.n_head}, but is "
                            f"{config.n_embd}.")
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight", "lm_head.weight", "bias")):
                nn.init.zeros_(parameter)  # at first each block adds nothing, and the head guesses
            elif name.endswith("embedding.weight"):
                nn.init.normal_(parameter, std=0.02)
        self.tie()

    def tie(self):
        if self.config.tie_weights:  # tokens that are read alike are predicted alike
            self.lm_head.weight = self.token_embedding.weight

    def rotation(self, positions):
        """Rotary positions (RoFormer, arXiv 2104.09864): cos and sin for each, (T, 1, 1, hs).

        Turned by angles in proportion to their positions, a query and a key give a score that
        depends on their distance. Double precision keeps far positions apart.
        """
        hs = self.config.n_embd // self.config.n_head
        dtype = torch.float32 if positions.device.type == "mps" else torch.float64
        speeds = 10000 ** (-torch.arange(0, hs, 2, device=positions.device, dtype=dtype) / hs)
        angles = positions[:, None, None, None] * speeds  # (T, 1, 1, hs/2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def hidden(self, idx, cache=None, maps=None):
        """Token ids (B, T) -> what lm_head reads, (B, T, C). ValueError if there is no room for T.

        A cache takes up to block_size tokens at first, then one at a time.
        """
        T, start = idx.size(1), cache.length if cache else 0
        learned, room = self.config.positions == "learned", self.config.block_size
        if (learned and start + T > room) or (cache and T > (1 if start else room)):
            raise ValueError(f"{T} tokens after {start} don't fit into block_size {room}.")
        positions = torch.arange(start, start + T, device=idx.device)  # (T,)
        x, rotation = self.token_embedding(idx), None  # (B, T) -> (B, T, C)
        if learned:
            x = x + self.position_embedding(positions)  # (B, T, C) + (T, C)
        else:
            rotation = [table.to(x.dtype) for table in self.rotation(positions)]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation, cache, maps)
        if cache:
            cache.length += T
        return self.ln_f(x)

    def forward(self, idx, targets=None):
        """idx, targets (B, T) -> logits (B, T, V) and, given targets, the mean loss in nats.

        The loss at a position is -log(the probability that the model gave to the token that came).
        """
        logits = self.lm_head(self.hidden(idx))  # (B, T, C) -> (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def attention_maps(self, idx):
        """What each position looks at: idx (B, T) -> weights (B, n_layer, n_head, T, T)."""
        maps = []
        with evaluating(self):
            self.hidden(idx, maps=maps)
        return torch.stack(maps, dim=1)

    @classmethod
    def from_state(cls, config, state):
        """The model with these weights, {name: tensor}. UserError where one doesn't fit."""
        with torch.device("meta"):  # takes no memory: only to compare with
            model = cls(config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for name in sorted(shapes.keys() | state.keys()):
            if name not in shapes or name not in state or state[name].shape != shapes[name] or (
                    not state[name].isfinite().all()):
                raise UserError(f"weight {name} should be finite numbers of shape {shapes.get(name)}")
        model.load_state_dict({name: tensor.float().clone() for name, tensor in state.items()},
                              assign=True)
        model.tie()  # again: what was loaded are two tensors
        return model

    @classmethod
    def from_pretrained(cls, name):
        """OpenAI's GPT-2: 'gpt2', 'gpt2-medium', '-large' or '-xl' from the hub, or a folder."""
        files = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
        with explain(f"{name} can't be opened as GPT-2: it takes a folder with {files}", Exception):
            from safetensors.torch import load_file
            if not Path(name).is_dir():
                from huggingface_hub import snapshot_download
                name = snapshot_download(f"openai-community/{name}", allow_patterns=files)
            theirs = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
            if wrong := [key for key, value in GPT2_IS.items() if theirs.get(key, value) != value]:
                raise ValueError(f"its {wrong[0]} is {theirs[wrong[0]]}, not {GPT2_IS[wrong[0]]}")
            config = GPTConfig(
                **{key: theirs[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
                block_size=theirs["n_positions"], bias=True, positions="learned", qk_norm=False,
                activation="gelu", tie_weights=theirs.get("tie_word_embeddings", True))
            state = {}
            for key, tensor in load_file(Path(name) / "model.safetensors").items():
                for openai, ours in GPT2_NAMES.items():
                    key = key.replace(openai, ours)
                if not key.endswith((".attn.bias", ".attn.masked_bias")):  # masks, not weights
                    state[key] = tensor.T if key.endswith(GPT2_TURNED) else tensor
            if config.tie_weights:
                state["lm_head.weight"] = state["token_embedding.weight"]
            return cls.from_state(config, state)

    def make_optimizers(self, config):
        """[AdamW], or with Muon (kellerjordan.github.io/posts/muon) for the blocks' matrices, both."""
        named = list(self.named_parameters())
        inner = {name for name, p in named if name.startswith("blocks.") and p.dim() == 2}
        muon = inner if config.optimizer == "muon" else set()
        rest = [p for name, p in named if name not in muon]
        # Decay is for matrices: norms and biases have no reason to be small.
        groups = [{"params": [p for p in rest if p.dim() == 2], "weight_decay": config.weight_decay},
                  {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0}]
        optimizers = [torch.optim.AdamW(groups, config.learning_rate, (0.9, 0.95), fused=True)]
        if muon:
            optimizers.append(torch.optim.Muon([p for name, p in named if name in muon], momentum=0.9,
                              lr=config.muon_learning_rate, weight_decay=config.weight_decay))
        return optimizers

    # ---------------------------------------------------------------------------- 4. generation
    def context(self, idx, tokenizer=None):
        """Any ids, (B, T) or (T,), as a tensor (B, T); an empty context becomes a newline."""
        idx = torch.as_tensor(idx, dtype=torch.long, device=self.lm_head.weight.device)
        idx = idx[None] if idx.dim() == 1 else idx
        newline = tokenizer.stoi.get("\n", 0) if tokenizer else 0
        return idx if idx.size(1) else idx.new_full((len(idx), 1), newline)

    def next_logits(self, tokens, cache, tokenizer=None):
        """Scores (B, V) for what follows tokens (B, t), reading only what the cache lacks."""
        room = self.config.block_size
        count = 1 if cache.length else room
        if cache.length == room and self.config.positions == "learned":
            cache.length, count = 0, max(1, room // 2)  # no position is left: start on a half
        with evaluating(self):
            logits = self.lm_head(self.hidden(tokens[:, -count:], cache)[:, -1]).float()
        if tokenizer:  # a model may have spare ids that stand for nothing
            logits[:, tokenizer.vocab_size :] = float("-inf")
        return logits

    @torch.inference_mode()
    def stream(self, idx, how, tokenizer=None):
        """Yield the next token of each row, (B,), until done; how: a SampleConfig."""
        tokens = self.context(idx, tokenizer)  # (B, T)
        rng = torch.Generator(tokens.device)  # its own: a seed gives the same whatever ran before
        rng.manual_seed(how.seed) if how.seed >= 0 else rng.seed()
        cache, penalty = KVCache(self, len(tokens)), how.repetition_penalty
        seen = F.one_hot(tokens, self.config.vocab_size).any(dim=1)  # (B, V)
        reach = len(how.stop.encode())  # tokens to look for `stop` in: each is a byte or more
        stopped, keep = np.zeros(len(tokens), bool), max(self.config.block_size, reach)
        for step in range(1, how.max_new_tokens + 1):
            logits = self.next_logits(tokens, cache, tokenizer)  # (B, V)
            if penalty != 1:  # CTRL, arXiv 1909.05858: less likely, whatever the sign
                lower = torch.where(logits > 0, logits / penalty, logits * penalty)
                logits = torch.where(seen, lower, logits)
            new = torch.multinomial(probabilities(logits, how), 1, generator=rng)  # (B, 1)
            tokens = torch.cat((tokens, new), dim=1)[:, -keep:]
            seen.scatter_(1, new, True)
            yield new[:, 0]
            if how.stop:
                stopped |= [how.stop in tokenizer.decode(t) for t in tokens[:, -min(step, reach) :]]
                if stopped.all():
                    return

    def generate(self, idx, max_new_tokens=500, tokenizer=None, **how):
        """Continue idx, (B, T) or (T,), with SampleConfig's options -> (B, T + n).

        n is below max_new_tokens only if every row has written `stop`, which needs the tokenizer.
        """
        how = SampleConfig(max_new_tokens=max_new_tokens, **how)
        if how.stop and not tokenizer:
            raise ValueError("To find `stop` in the text, generate needs the tokenizer.")
        if how.beams > 1:
            return self.beam_search(idx, max_new_tokens, how.beams, tokenizer)
        new = [token[:, None] for token in self.stream(idx, how, tokenizer)]
        return torch.cat([self.context(idx, tokenizer), *new], dim=1)

    @torch.no_grad()
    def beam_search(self, idx, max_new_tokens, beams, tokenizer=None):
        """The likeliest continuation that keeping `beams` candidates at each step finds, (B, T + n)."""
        tokens = self.context(idx, tokenizer).repeat_interleave(beams, dim=0)  # (B * beams, T)
        cache, V = KVCache(self, len(tokens)), self.config.vocab_size
        first = torch.arange(0, len(tokens), beams, device=tokens.device)[:, None]  # (B, 1)
        scores = torch.full((len(first), beams), float("-inf"), device=tokens.device)
        scores[:, 0] = 0.0  # the beams are still alike: only the first may have successors
        for _ in range(max_new_tokens):
            log_probs = self.next_logits(tokens, cache, tokenizer).log_softmax(dim=-1)
            totals = scores[:, :, None] + log_probs.view(-1, beams, V)  # (B, beams, V)
            scores, best = totals.flatten(1).topk(beams)  # (B, beams)
            rows = (first + best // V).flatten()  # the beams that go on
            tokens = torch.cat((tokens[rows], best.view(-1, 1) % V), dim=1)
            cache.store = cache.store[:, :, rows]
        return tokens[::beams]

def probabilities(logits, how):
    """Logits (B, V) -> what to draw by (B, V), after how's temperature, top_k and top_p.

    top_p keeps the smallest set of tokens that reaches p (nucleus sampling, arXiv 1904.09751).
    """
    if how.temperature < 1e-5:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    logits = logits / how.temperature
    if 0 < how.top_k < logits.size(-1):
        values, kept = logits.topk(how.top_k)
        logits = torch.full_like(logits, float("-inf")).scatter(1, kept, values)
    probs = F.softmax(logits, dim=-1)
    if how.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        ordered[:, 1:] *= ordered.cumsum(dim=-1)[:, :-1] < how.top_p  # while those before fall short
        probs = probs.scatter(1, order, ordered)
    return probs / probs.sum(dim=-1, keepdim=True)

# ---------------------------------------------------------------------------------------- 5. data
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

def find_text(name):
    """Where the text is: as named, else beside gpt.py; 'shakespeare' is downloaded here, once."""
    path = Path(name) if Path(name).exists() else HERE / name
    if name == "shakespeare" and not path.exists():
        path = Path("tinyshakespeare.txt")
        if not path.exists():
            with explain(f"Not downloaded: get {SHAKESPEARE} some other way for --data", Exception):
                content = urllib.request.urlopen(SHAKESPEARE, timeout=30).read()
                if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
                    raise ValueError("what came is another file")
            write_atomically(path, lambda file: file.write(content))
    return path

def load_data(name, tokenizer):
    """Returns tokenizer, ids to train on, ids to validate with (the last tenth), and a line on them.

    tokenizer: one to go on with, whose alphabet may grow, or the name of a new one. nanoGPT's
    train.bin and val.bin (GPT-2's ids in 16 bits) stay on disk and are read as needed.
    """
    path = find_text(name)
    binary = (path / "train.bin").exists()
    if isinstance(tokenizer, str) and (binary or tokenizer != "char"):
        tokenizer = BPETokenizer.load("gpt2" if tokenizer == "char" else tokenizer)
    if binary:
        with explain(f"{path} must hold GPT-2's ids as train.bin and val.bin", OSError, ValueError):
            splits = [np.memmap(path / file, np.uint16, "r") for file in ("train.bin", "val.bin")]
            parts = [part for ids in splits for part in np.array_split(ids, 1 + len(ids) // 2**24)]
            if tokenizer.kind == "char" or max(map(np.max, parts)) >= tokenizer.vocab_size:
                raise ValueError("these ids are not of this tokenizer's vocabulary")
        return tokenizer, *splits, f"{path}: {sum(map(len, splits)):,} tokens"
    with explain(f"{name} can't be read as UTF-8 text", OSError, UnicodeError):
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        text = "\n".join([file.read_text(encoding="utf-8-sig") for file in files])
    about = f"{path.name}: {len(text):,} characters"
    if isinstance(tokenizer, str):
        tokenizer = CharTokenizer.from_text(text)
    elif tokenizer.kind == "char":
        known, tokenizer = tokenizer.stoi, CharTokenizer.from_text(text, tokenizer.stoi)
        if new := "".join(s for s in tokenizer.stoi if s not in known):
            about += f", {sum(map(text.count, new)) / len(text):.2%} of them new to the model: {new!r}"
    ids = tokenizer.encode(text)
    split = int(0.9 * len(ids))
    return tokenizer, ids[:split], ids[split:], f"{about}, {len(ids):,} tokens"

def get_batch(data, block_size, batch_size, rng=None, device="cpu", starts=None):
    """Passages x (B, T) and y (B, T), the same one token later: what to predict at each x.

    They start where rng, a torch.Generator, chooses, or at `starts`.
    """
    if starts is None:
        starts = torch.randint(len(data) - block_size, (batch_size,), generator=rng).numpy()
    passages = data[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)  # (B, T + 1)
    passages = torch.from_numpy(passages).to(device)
    return passages[:, :-1], passages[:, 1:]

@torch.no_grad()
def estimate_loss(model, data, max_tokens=None):
    """Mean loss over windows of the context that are spread evenly over the data: always the same."""
    T, device = model.config.block_size, model.lm_head.weight.device
    count = (len(data) - 1) // T  # windows there are; with max_tokens not all are read
    starts = np.linspace(0, count - 1, min(count, (max_tokens or len(data)) // T + 1)).astype(int) * T
    if dist.is_initialized():  # the processes share the work
        starts = starts[dist.get_rank() :: dist.get_world_size()]
    total, size = torch.zeros(2, device=device), max(1, 4096 // T)  # losses, windows; windows a pass
    with evaluating(model):
        for i in range(0, len(starts), size):
            part = starts[i : i + size]
            loss = model(*get_batch(data, T, len(part), device=device, starts=part))[1]
            total += torch.stack((loss, torch.ones_like(loss))) * len(part)
    average_over_processes(total)
    return (total[0] / total[1]).item()

# --------------------------------------------------------------------------------- 6. checkpoints
def write_atomically(path, write):
    """Write beside path, then rename: at any moment path holds all of the old or all of the new."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with explain(f"{path} can't be written (what was there is unharmed): make room, or choose "
                     "another --ckpt", OSError, RuntimeError), open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)

def save_checkpoint(path, model, tokenizer, **more):
    """All that is needed to go on writing, and more; only tensors and Python's own types."""
    content = {"format": 1, "model_state_dict": model.state_dict(), "tokenizer": tokenizer.kind,
               "hyperparameters": asdict(model.config), "stoi": tokenizer.stoi,
               "itos": tokenizer.itos, **more}
    write_atomically(Path(path), lambda file: torch.save(content, file))

def load_checkpoint(path, device="cpu"):
    """Returns model, tokenizer, and the rest of what was saved; the file can't run any code.

    UserError if it is missing, damaged, foreign, or of a newer format.
    """
    with explain(f"{path} can't be used as a checkpoint: name another --ckpt, or train one", Exception):
        with zipfile.ZipFile(path) as archive:  # torch.load doesn't compare the checksums
            if archive.testzip() or any(entry.compress_type for entry in archive.infolist()):
                raise ValueError("its checksums don't match")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.pop("format", 1) > 1:
            raise ValueError("a newer gpt.py wrote it")
        state = {name.removeprefix("module.").removeprefix("_orig_mod."): tensor
                 for name, tensor in content.pop("model_state_dict").items()}
        config = GPTConfig(**content.pop("hyperparameters"))
        kinds = {"char": CharTokenizer, "bpe": BPETokenizer}
        tokenizer = kinds[content.pop("tokenizer", "char")](content.pop("stoi"))
        if config.n_layer > len(state) or config.vocab_size < tokenizer.vocab_size or any(
                t.untyped_storage().nbytes() < t.nbytes for t in state.values()):
            raise ValueError("it has fewer weights than it should")
        return GPTLanguageModel.from_state(config, state).to(device), tokenizer, content

def open_model(name):
    """load_checkpoint(name), looked for in checkpoints/ too; or GPT-2 by its name or folder."""
    path = Path(name) if Path(name).exists() else HERE / "checkpoints" / name
    if path.is_dir() or not path.exists() and name.startswith("gpt2"):
        tokenizer = BPETokenizer.load(name if path.is_dir() else "gpt2")
        return GPTLanguageModel.from_pretrained(name), tokenizer, {}
    print(f"Opening {path}", file=sys.stderr)
    return load_checkpoint(path if path.exists() else name)

# ------------------------------------------------------------------------------------ 7. training
def average_over_processes(*tensors):
    """Replace each tensor by its mean over all processes, in one exchange (under torchrun only)."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))

def choose_device(name):
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else name
    with explain(f"--device {name} is not to be had here", RuntimeError, AssertionError):
        device = torch.zeros(1, device=name).device
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("only cpu, cuda and mps are known")
        return device

def choose_precision(name, device):
    """The type to multiply in: bf16 only where it is in hardware (a T4 emulates it, slowly)."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    elif name == "auto":
        native = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        name = "bf16" if native else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]

def learning_rate_factor(step, config):
    """The share of the highest learning rate that a step takes, never zero: up, level, then down."""
    if step < config.warmup_iters:
        return (step + 1) / config.warmup_iters
    start = max(config.warmup_iters, 0.3 * config.max_iters if config.schedule == "linear" else 0)
    done = max(0, step - start) / max(1, config.max_iters - start)
    cosine = 0.5 + 0.5 * math.cos(math.pi * done)
    return {"linear": 1 - done, "cosine": cosine, "constant": 1}[config.schedule]

def write_log(ckpt, history):
    """The losses as a table, NAME.csv, and as a picture, NAME.png."""
    from matplotlib.figure import Figure

    table = "".join(",".join(map(str, row)) + "\n" for row in (history[0], *map(dict.values, history)))
    write_atomically(ckpt.with_suffix(".csv"), lambda file: file.write(table.encode()))
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
    """Both configurations: each value from its flag, else the checkpoint, the preset, the default."""
    for name, value in flags.items():
        if name in saved and name not in MAY_CHANGE and saved[name] != value:
            raise UserError(f"--{name} {value} contradicts the checkpoint's {saved[name]}: only "
                            f"{', '.join(MAY_CHANGE)} may change.")
    preset = (flags | saved).get("preset", "auto")
    if preset == "auto":
        preset = "cpu" if choose_device(flags.get("device", "auto")).type == "cpu" else "gpu"
    if preset not in PRESETS:
        raise UserError(f"--preset {preset} must be auto or one of {', '.join(PRESETS)}.")
    values = PRESETS[preset] | saved | flags | {"preset": preset}
    if strange := flags.keys() - {f.name for kind in (GPTConfig, TrainConfig) for f in fields(kind)}:
        raise UserError(f"--{strange.pop()} is not an option of --train.")
    return [kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
            for kind in (GPTConfig, TrainConfig)]

def set_aside(ckpt, say):
    """Rename the files of an earlier run to NAME-1 and so on: nothing is ever overwritten."""
    earlier = [f for f in ckpt.parent.glob(f"{ckpt.stem}.*") if f.suffix in (".pt", ".csv", ".png")]
    n = 1
    while list(ckpt.parent.glob(f"{ckpt.stem}-{n}.*")):
        n += 1
    for f in earlier:
        f.rename(f.with_name(f.name.replace(ckpt.stem, f"{ckpt.stem}-{n}", 1)))
    if earlier:
        say(f"The files of the earlier run {ckpt.stem} are now called {ckpt.stem}-{n}.")

def train(**flags):
    """Train as the flags say, which are named as on the command line; returns model, tokenizer."""
    from tqdm import tqdm

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = tqdm.write if rank == 0 else lambda text: None
    ckpt = Path(flags.get("ckpt", TrainConfig.ckpt))
    if ckpt.suffixes[-1:] != [".pt"]:
        raise UserError(f"--ckpt {ckpt} must end in .pt.")
    resume_file = ckpt.with_suffix(".resume.pt")

    # What to start from: an interrupted run, another model, or nothing.
    model, tokenizer, run, saved = None, None, {}, {}
    if flags.get("resume"):
        model, tokenizer, run = load_checkpoint(resume_file)
        saved = run["train_config"] | asdict(model.config)
    elif flags.get("init_from"):
        model, tokenizer, _ = open_model(flags["init_from"])
        saved = asdict(model.config)
        if "tokenizer" in flags:
            raise UserError("--init_from brings its own tokenizer: leave --tokenizer out.")
    architecture, config = configure(flags, saved)
    T, B, passes = architecture.block_size, config.batch_size, config.gradient_accumulation_steps
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    tokenizer, train_data, val_data, about = load_data(config.data, tokenizer or config.tokenizer)
    if min(len(train_data), len(val_data)) <= T:
        raise UserError(f"{config.data} has {len(train_data)} tokens to train on and {len(val_data)} "
                        f"to validate, too few for --block_size {T}: take more text or a smaller one.")
    fingerprint = [hashlib.sha256(ids[: 2**24]).hexdigest() for ids in (train_data, val_data)]
    if run and run["fingerprint"] != fingerprint:
        raise UserError(f"{config.data} is not the text that this run began with.")

    # The model and its optimizers; every process starts from the same weights.
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(config.seed)
    architecture.vocab_size = tokenizer.vocab_size
    if model:
        weights, spare = model.state_dict(), tokenizer.vocab_size - model.config.vocab_size
        architecture.vocab_size -= min(0, spare)
        for name in ("token_embedding.weight", "lm_head.weight"):  # a new token starts as the mean
            mean = weights[name].mean(dim=0).expand(max(0, spare), -1)
            weights[name] = torch.cat((weights[name], mean))
        model = GPTLanguageModel.from_state(architecture, weights)
    else:
        with explain("There can be no model of this size", RuntimeError, TypeError, OverflowError):
            model = GPTLanguageModel(architecture)
    model.to(device).train()
    if config.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        say("Muon needs PyTorch 2.9 or newer: AdamW takes its place.")
        config.optimizer = "adamw"
    optimizers = model.make_optimizers(config)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    network = torch.compile(model) if config.compile else model

    def gradients(step):
        """Add up the gradients of this process's share of a step; returns its mean loss.

        Each step draws from a seed of its own: so a resumed run needs no generator's state, nothing
        else disturbs it, and 1 x 8 passages are the same as 4 x 2, in one process or in several.
        """
        rng = torch.Generator().manual_seed(config.seed + 1_000_003 * step)
        torch.manual_seed(config.seed + 1_000_003 * step + rank)  # for dropout
        x, y = get_batch(train_data, T, B * passes * world, rng, device)
        total = torch.zeros((), device=device)
        for i in range(rank * B, len(x), world * B):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                loss = network(x[i : i + B], y[i : i + B])[1] / passes  # they add up to a mean
            scaler.scale(loss).backward()
            total += loss.detach()
        return total

    # Where the run stands, and how that is kept.
    if run:
        with explain(f"{resume_file} does not hold the state of a run", Exception):
            for optimizer, state in zip(optimizers, run["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            scaler.load_state_dict(run["scaler"])
            if ckpt.exists() and load_checkpoint(ckpt)[2].get("run_id") != run["run_id"]:
                raise ValueError(f"{ckpt} is of another run")
            if run["world"] != world:
                raise ValueError(f"it was run by {run['world']} processes")

    # Two trial passes: what can't work, for want of memory above all, fails before the run begins.
    try:
        gradients(0)
    except Exception as error:
        if not config.compile:
            raise
        say(f"torch.compile failed, so the run goes on without it: {str(error)[:200]}")
        network = model
    clock = time.perf_counter()
    gradients(0).item()
    minutes = (time.perf_counter() - clock) * config.max_iters / 60
    model.zero_grad()
    per_step = T * B * passes * world  # tokens
    say(f"{about}\n{sum(p.numel() for p in model.parameters()):,} parameters on {world} x {device} in "
        f"{str(precision)[6:]}; {config.max_iters:,} steps of {per_step:,} tokens: "
        f"{config.max_iters * per_step / len(train_data):.1f} epochs in about {minutes:.1f} minutes")
    if config.wandb and rank == 0:
        import wandb

        wandb.init(project=config.wandb, config=asdict(config) | asdict(architecture))
    if not run:
        run = {"iteration": 0, "best": math.inf, "history": [], "run_id": f"{time.time_ns():x}",
               "data": Path(config.data).name, "fingerprint": fingerprint, "seconds": 0.0,
               "world": world}
        if rank == 0:
            set_aside(ckpt, say)
    history, stops = run["history"], []  # stops: signals that asked the run to stop
    written = resume_file.stat().st_mtime_ns if resume_file.exists() else None

    def save(improved=False):
        """Keep the model if it is the best so far, and then all that is needed to resume."""
        nonlocal written
        if resume_file.exists() and resume_file.stat().st_mtime_ns != written:
            raise UserError(f"Another run writes to {ckpt}, so this one stops and leaves it be.")
        if improved or not ckpt.exists():
            save_checkpoint(ckpt, model, tokenizer, **{key: run[key] for key in (
                "iteration", "best", "history", "run_id", "data")})
        run.update(train_config=asdict(config), scaler=scaler.state_dict(),
                   optimizers=[optimizer.state_dict() for optimizer in optimizers])
        save_checkpoint(resume_file, model, tokenizer, **run)
        written = resume_file.stat().st_mtime_ns

    def on_signal(number, frame):
        stops.append(number)
        if stops[1:]:  # the second one ends it at once
            raise KeyboardInterrupt(number)

    handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=config.max_iters * per_step, initial=run["iteration"] * per_step, unit="token",
               unit_scale=True, disable=True if rank else None)  # None: only on a terminal
    failures = torch.zeros((), device=device)  # how many losses in a row were not a number
    trouble = UserError(f"The loss is no longer a number; {ckpt} keeps the last good model. Take a "
                        "lower --learning_rate, or --precision fp32.")
    stopping = False
    try:
        for step in range(run["iteration"], config.max_iters + 1):
            last = step == config.max_iters
            if (last or step % config.eval_interval == 0) and step not in [
                    row["iteration"] for row in history]:
                train_loss = estimate_loss(model, train_data, max(1, config.eval_tokens // 4))
                val_loss = estimate_loss(model, val_data, config.eval_tokens)
                if not math.isfinite(val_loss) or failures >= 10:
                    raise trouble
                history.append({"iteration": step, "train_loss": train_loss, "val_loss": val_loss,
                                "tokens": step * per_step, "seconds": round(run["seconds"], 1)})
                improved, run["best"] = val_loss < run["best"], min(val_loss, run["best"])
                if rank == 0:
                    save(improved)
                guess = f" (guessing: {math.log(architecture.vocab_size):.4f})" if step == 0 else ""
                say(f"step {step:6,}: training loss {train_loss:.4f}, validation loss {val_loss:.4f}"
                    f"{guess}{' *' if improved else ''}")
                if rank == 0 and (last or len(history) % 4 == 1):
                    text = tokenizer.decode(model.generate([], 150, tokenizer, seed=1)[0])
                    say("    | " + text.strip().replace("\n", "\n    | "))
                if config.wandb and rank == 0:
                    wandb.log(history[-1], step=step)
            if last or stopping:
                break
            clock = time.perf_counter()
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * learning_rate_factor(step, config)
            status = torch.stack((gradients(step), torch.tensor(float(len(stops)), device=device)))
            average_over_processes(status, *(p.grad for p in model.parameters()))
            for optimizer in optimizers:
                scaler.unscale_(optimizer)  # clipping needs the true lengths
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                scaler.step(optimizer)  # does nothing where fp16 overflowed
            scaler.update()
            model.zero_grad()
            failures = (failures + 1) * ~status[0].isfinite()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{status[0]:.3f}", refresh=False)
                if failures >= 10:
                    raise trouble
            bar.update(per_step)
            run["iteration"] = step + 1
            run["seconds"] += time.perf_counter() - clock
            stopping = status[1] > 0 if world > 1 else stops  # all processes stop at the same step
        if rank == 0:
            save()
            write_log(ckpt, history)
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if not last:
        say(f"Stopped after {step:,} steps, with nothing lost: the same command with --resume goes on.")
        raise KeyboardInterrupt(stops[0] if stops else signal.SIGTERM)
    say(f"The best model (validation loss {run['best']:.4f}) is in {ckpt}, its losses are in "
        f"{ckpt.stem}.csv and .png. To write with it: python gpt.py --sample --ckpt {ckpt}")
    return model, tokenizer

# ---------------------------------------------------------------------------- 8. the command line
def write(model, tokenizer, prompt, how):
    """Print the prompt and what follows; the first of several texts streams as it is made."""
    def until(text):
        return text[: text.index(how.stop) + len(how.stop)] if how.stop and how.stop in text else text

    ids = torch.from_numpy(tokenizer.encode(prompt).astype(np.int64)).repeat(how.num_samples, 1)
    print(prompt, end="", flush=True)
    if how.beams > 1:
        new = model.generate(ids, how.max_new_tokens, tokenizer, beams=how.beams)[0, ids.size(1) :]
        return print(until(tokenizer.decode(new)))
    rows, pending, text = [], [], ""
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
    attention = flags.pop("attention", "fused")
    how = SampleConfig(**flags)
    drawing = {"temperature", "top_k", "top_p", "num_samples", "repetition_penalty", "seed"}
    if how.beams > 1 and (drawing := drawing & flags.keys()):
        raise UserError(f"--beams looks for the likeliest text, so --{drawing.pop()} has no place.")
    if len(flags.keys() & {"prompt", "prompt_file", "interactive"}) > 1:
        raise UserError("Of --prompt, --prompt_file and --interactive only one can be used.")
    model, tokenizer, about = open_model(how.ckpt)
    model.eval().to(choose_device(how.device)).config.attention = attention
    data, steps, loss = (about.get(key, "unknown") for key in ("data", "iteration", "best"))
    print(f"Text: {data}; steps: {steps}; validation loss: {loss}", file=sys.stderr)
    if how.prompt_file:
        with explain(f"{how.prompt_file} can't be read", OSError, UnicodeError):
            how.prompt = Path(how.prompt_file).read_text(encoding="utf-8-sig")
    if not how.interactive:
        return write(model, tokenizer, how.prompt, how)
    while True:
        try:
            print("prompt> ", end="", file=sys.stderr, flush=True)
            write(model, tokenizer, input(), how)
        except UserError as error:
            print(error, file=sys.stderr)
        except EOFError:
            return

def parse(argv):
    """The command line as {name: value} of what was given; every `option` above is a flag."""
    parser = argparse.ArgumentParser("gpt.py", "python gpt.py --train|--sample [options] (--help)",
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    mode = parser.add_mutually_exclusive_group(required=True)
    for run in (train, sample):
        mode.add_argument(f"--{run.__name__}", dest="run", action="store_const", const=run,
                          help=run.__doc__.split(":")[0])
    seen = set()
    for kind in (GPTConfig, TrainConfig, SampleConfig):
        group = parser.add_argument_group(kind.__name__, kind.__doc__)
        for f in fields(kind):
            if f.metadata and f.name not in seen:
                how = {"type": f.type, "metavar": "VALUE"}
                how = {"action": argparse.BooleanOptionalAction} if f.type is bool else how
                names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))
                group.add_argument(*names, help=f"{f.metadata['help']} [{f.default}]", **how)
                seen.add(f.name)
    flags = vars(parser.parse_args(argv))
    kinds = (GPTConfig, TrainConfig) if flags["run"] is train else (SampleConfig,)
    known = {"run", "attention", *(f.name for kind in kinds for f in fields(kind))}
    if strange := flags.keys() - known:
        parser.error(f"--{strange.pop()} is not an option of --{flags['run'].__name__}")
    return flags

def main(argv=None):
    """Run one command; returns the exit code: 0, 2 for a person's mistake, 130 after Ctrl-C."""
    for console in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(console, "reconfigure"):
            console.reconfigure(errors="replace")  # a letter that it can't show becomes "?"
    try:
        flags = parse(argv)
        flags.pop("run")(**flags)
        return 0
    except (UserError, ModuleNotFoundError) as error:
        message = f"{error}{'' if isinstance(error, UserError) else ': pip install it.'}"
    except KeyboardInterrupt as stop:
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except BrokenPipeError:  # whoever read the text has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        message = "Out of memory: take a smaller --batch_size, --block_size or --n_embd."
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"gpt.py: {message}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
