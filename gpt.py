"""A GPT in one file: a Transformer that reads tokens and predicts, at every position, the next one.

    python gpt.py --train                              # train on input.txt (or: --data my.txt)
    python gpt.py --sample --ckpt gpt_checkpoint.pt    # generate text (all options: --help)

    token ids (B, T) -> embeddings (B, T, C) -> n_layer Blocks -> LayerNorm -> logits (B, T, V)
    Block:  x --+--> LayerNorm -> MultiHeadAttention --(+)--+--> LayerNorm -> FeedForward --(+)--> x
                +---------------------------------------+   +---------------------------------+
Shapes: B sequences in a batch, T positions, C channels (n_embd numbers) at each position, nh heads
of hs = C / nh channels, V tokens. Read first: sections 2, 3, training_step. GPT-2: notes/gpt2.py.
"""
# /// script
# requires-python = ">=3.10"  # `uv run gpt.py` reads these lines and installs the packages
# dependencies = ["torch>=2.6,<2.14", "numpy", "tqdm", "matplotlib", "tiktoken"]
# ///
import argparse
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm


# ------------------------------------------------------------------ 1. options of the architecture
class UserError(Exception):
    """A mistake that the user can fix: `main` prints the message, without a traceback."""

def check(condition, message):
    if not condition:
        raise UserError(message)

def option(default, help, *choices):
    """A field of an options class: `parse` makes a command-line flag --NAME of it."""
    return field(default=default, metadata={"help": help, "choices": choices or None})

@dataclass
class GPTConfig:
    """The architecture; section 3 explains the words. The defaults are the preset cpu."""
    n_layer: int = option(3, "number of blocks")
    n_head: int = option(4, "attention heads in each block")
    n_embd: int = option(128, "channels at each position")
    block_size: int = option(128, "context length: the most tokens that the model looks at")
    dropout: float = option(0.0, "fraction of activations set to zero during training")
    bias: bool = option(False, "biases in linear layers and LayerNorms, as in GPT-2")
    tie_weights: bool = option(False, "token embedding and output layer share one matrix")
    positions: str = option("rotary", "how the order of tokens is encoded", "rotary", "learned")
    qk_norm: bool = option(True, "normalise queries and keys")
    activation: str = option("relu2", "nonlinearity of FeedForward", "gelu", "relu", "relu2")
    attention: str = option("fused", "PyTorch's fused kernel, or Head", "fused", "explicit")
    vocab_size: int = 65  # no flag: the tokenizer sets it


# ------------------------------------------------------------------------------- 2. text to tokens
class CharTokenizer:
    """The simplest tokenizer: every distinct character of the text is a token."""
    def __init__(self, stoi):
        self.stoi = stoi  # string to integer: the id of each character
        self.itos = {i: character for character, i in stoi.items()}  # integer to string
        self.vocab_size = len(stoi)

    def encode(self, text):
        """Text to a list of ids. UserError if a character has none."""
        unknown = "".join(sorted(set(text) - self.stoi.keys()))
        check(not unknown, f"Unknown: {unknown[:40]!r}. Known: {''.join(self.stoi)[:99]!r}.")
        return [self.stoi[character] for character in text]

    def decode(self, ids):
        return "".join([self.itos[int(i)] for i in ids])

class BPETokenizer:
    """GPT-2's byte-pair encoding (BPE): frequent words and parts of words are tokens."""
    stoi = itos = {}  # tiktoken has the tables; an empty stoi marks a checkpoint of this tokenizer

    def __init__(self):
        import tiktoken
        self.encoding = tiktoken.get_encoding("gpt2")  # downloads its tables the first time
        self.vocab_size = self.encoding.n_vocab

    def encode(self, text):
        return self.encoding.encode(text, allowed_special="all")  # such as <|endoftext|>

    def decode(self, ids):
        return self.encoding.decode([int(i) for i in ids])

SHAKESPEARE = "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

def load_data(name, tokenizer, device="cpu"):
    """Read a text file and return (tokenizer, train_data, val_data). tokenizer is "char", "gpt2" or
    one that exists. The last tenth is for validation: is the model good on text it has not seen?"""
    path = Path(name).expanduser() if name else Path(__file__).with_name("input.txt")
    if name == "shakespeare":
        path = Path("tinyshakespeare.txt")
        if not path.exists():
            torch.hub.download_url_to_file(SHAKESPEARE, path, SHA256)
    text = path.read_text(encoding="utf-8-sig", errors="replace")  # errors become U+FFFD
    check("\ufffd" not in text and "\0" not in text, f"{path} is not UTF-8 text: convert it.")
    if tokenizer == "char":
        tokenizer = CharTokenizer({character: i for i, character in enumerate(sorted(set(text)))})
    elif tokenizer == "gpt2":
        tokenizer = BPETokenizer()
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.int32, device=device)  # (N,)
    split = int(0.9 * len(ids))
    return tokenizer, ids[:split], ids[split:]

def get_batch(data, starts, block_size):
    """Cut a sequence out of data (N,) at each of B starts. Return inputs x and targets y, (B, T):
    of "hello" x has "hell" and y "ello". One sequence gives T examples of a next token at once."""
    positions = starts[:, None] + torch.arange(block_size + 1, device=data.device)  # (B, T + 1)
    sequences = data[positions].long()  # (B, T + 1), from int32, which is small, to int64
    return sequences[:, :-1], sequences[:, 1:]


# ----------------------------------------------------------------------------------- 3. the model
class Head(nn.Module):
    """What a head does ("Attention Is All You Need", arXiv 1706.03762), for nh heads at once: each
    position collects information from earlier ones and itself. A query says what it looks for, a
    key what a position offers, a value what it hands over."""
    def forward(self, q, k, v):
        """q (B, nh, T, hs), k, v (B, nh, S, hs) -> output (B, nh, T, hs), weights (B, nh, T, S)."""
        T, hs = q.shape[-2:]
        S = k.size(-2)  # T, or more while generating, when earlier keys and values are in a cache
        # A score is a sum of hs products. If q and k have variance 1, its variance is hs, and 1
        # after the division. Scores far apart give one position all the weight: no gradient passes.
        scores = q @ k.transpose(-2, -1) / math.sqrt(hs)  # (T, hs) @ (hs, S) -> (T, S)
        # The mask hides later positions: they hold the answer. A model that sees them learns to
        # copy it, and has nothing to copy when it generates. (Row i is position S - T + i.)
        future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1 + S - T)  # (T, S)
        scores = scores.masked_fill(future, float("-inf"))
        weights = F.softmax(scores, dim=-1)  # exp(score) / sum of the row: exp(-inf) is 0
        return weights @ v, weights  # (T, S) @ (S, hs) -> (T, hs)

def rotate(x, cos, sin):
    """Rotary positions (RoFormer, arXiv 2104.09864). Attention alone knows no order. But a query
    turned by angle m and a key turned by n have a dot product that depends on m - n, how far apart
    they are. So turn each pair of channels of x (..., T, hs) by an angle for each position."""
    a, b = x.chunk(2, dim=-1)  # channels i and i + hs/2 are a pair: (..., T, hs/2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)  # (..., T, hs)

def rotary_angles(positions, hs, dtype):
    """Positions (T,) -> cosines and sines of the angles, (T, hs/2) each. Each pair of channels has
    its own speed, from 1 radian a position down to almost 1/10000."""
    speeds = 10000 ** (-torch.arange(0, hs, 2, device=positions.device) / hs)  # (hs/2,)
    angles = positions[:, None] * speeds  # (T, 1) * (hs/2,) -> (T, hs/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)

class MultiHeadAttention(nn.Module):
    """Communication: several heads look at the past at once, each looks for something else."""
    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.layer = layer  # the number of the block, for the cache
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.head = Head()
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotation=None, cache=None, maps=None):
        """x (B, T, C) -> (B, T, C). A list `maps` collects the attention weights, (B, nh, T, S)."""
        B, T, C = x.shape
        nh = self.config.n_head
        hs = C // nh
        qkv = self.qkv(x).chunk(3, dim=-1)  # (B, T, 3C) -> three tensors (B, T, C)
        # Heads go before positions: @ multiplies the last two dimensions, for each head on its own.
        q, k, v = [t.view(B, T, nh, hs).transpose(1, 2) for t in qkv]  # (B, nh, T, hs) each
        if self.config.qk_norm:  # mean 0, variance 1: long vectors cannot make the scores explode
            q = F.layer_norm(q, (hs,))
            k = F.layer_norm(k, (hs,))
        if rotation is not None:
            q = rotate(q, *rotation)
            k = rotate(k, *rotation)
        if cache is not None:  # section 4: the keys and values of earlier tokens as well
            k, v = cache.append(self.layer, k, v)  # (B, nh, S, hs) each
        fused = self.config.attention == "fused" and maps is None  # what Head computes, but faster
        if fused and T == k.size(2):  # a whole sequence
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        elif fused and T == 1:  # one new token may look at all in the cache: no mask
            out = F.scaled_dot_product_attention(q, k, v)
        else:  # asked for, or new tokens (a prompt) after some in the cache
            out, weights = self.head(q, k, v)  # (B, nh, T, hs), (B, nh, T, S)
            if maps is not None:
                maps.append(weights)
        out = out.transpose(1, 2).reshape(B, T, C)  # the outputs of the heads side by side
        return self.dropout(self.proj(out))  # (B, T, C)

class FeedForward(nn.Module):
    """Computation: every position works by itself on what it has collected."""
    activations = {"gelu": nn.GELU("tanh"), "relu": nn.ReLU(),  # GPT-2's; the first Transformer's
                   "relu2": lambda x: F.relu(x).square()}  # "Primer", arXiv 2109.08668

    def __init__(self, config):
        super().__init__()
        self.activation = self.activations[config.activation]
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.activation(self.up(x))  # (B, T, C) -> (B, T, 4C)
        return self.dropout(self.down(x))  # (B, T, 4C) -> (B, T, C)

class Block(nn.Module):
    """Communication, then computation, each added to x, the residual stream: a sum passes its
    gradient on unchanged, even to the first of many blocks. LayerNorm gives each position mean 0
    and variance 1 over its channels, however large the sum has grown."""
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = MultiHeadAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.feed_forward = FeedForward(config)

    def forward(self, x, rotation=None, cache=None, maps=None):
        x = x + self.attention(self.ln_1(x), rotation, cache, maps)  # (B, T, C)
        return x + self.feed_forward(self.ln_2(x))  # (B, T, C)

class GPTLanguageModel(nn.Module):
    """Token ids in; out come logits, at every position a score for each possible next token."""
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        check(C % (2 * config.n_head) == 0, f"--n_embd {C} must be a multiple of 2 x --n_head.")
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, C)  # a table: a vector for each id
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.block_size, C)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(C, bias=config.bias)
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.token_embedding.weight
        # Output layers start at zero (lm_head: small if tied): blocks add nothing, and the first
        # loss is ln(V). They still train: first lm_head, then proj, down, embeddings, then all.
        for name, parameter in self.named_parameters():
            if name.endswith("embedding.weight"):
                nn.init.normal_(parameter, std=1 / C if config.tie_weights else 0.02)
            elif name.endswith(("proj.weight", "down.weight", "lm_head.weight", "bias")):
                nn.init.zeros_(parameter)

    def forward(self, idx, targets=None, cache=None, maps=None):
        """idx, targets (B, T) -> logits (B, T, V), and the loss or None: the cross-entropy, that is
        the mean of -log(probability of the next token). With a cache, idx follows what is in it."""
        T = idx.size(1)
        start = 0 if cache is None else cache.length  # the position of the first token of idx
        positions = torch.arange(start, start + T, device=idx.device)  # (T,)
        x = self.token_embedding(idx)  # (B, T) -> (B, T, C)
        rotation = None
        if self.config.positions == "learned":
            x = x + self.position_embedding(positions)  # (B, T, C) + (T, C)
        else:
            rotation = rotary_angles(positions, x.size(2) // self.config.n_head, x.dtype)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation, cache, maps)  # (B, T, C)
        if cache is not None:
            cache.length = start + T
        logits = self.lm_head(self.ln_f(x))  # (B, T, C) -> (B, T, V)
        if targets is None:
            return logits, None
        flat = logits.float().flatten(0, 1)  # (B, T, V) -> (B * T, V)
        return logits, F.cross_entropy(flat, targets.flatten())  # the mean over B * T examples

    @torch.no_grad()
    def attention_maps(self, idx):
        """What each position looks at, to plot: idx (B, T) -> (B, n_layer, n_head, T, T)."""
        maps = []
        self(idx, maps=maps)
        return torch.stack(maps, dim=1)

    def generate(self, idx, max_new_tokens=500, **options):
        """Continue ids (T,) or (B, T) -> (B, T + max_new_tokens). options: as in SampleConfig."""
        idx = torch.atleast_2d(torch.as_tensor(idx, device=next(self.parameters()).device).long())
        config = SampleConfig(max_new_tokens=max_new_tokens, **options)
        was_training = self.training
        self.eval()  # no dropout
        idx = torch.cat([idx, *generate_tokens(self, idx, config)], dim=1)
        self.train(was_training)
        return idx


# ---------------------------------------------------------------------------------- 4. generation
@dataclass
class SampleConfig:
    ckpt: str = option("gpt_checkpoint.pt", "the checkpoint")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    attention: str = option("fused", "PyTorch's fused kernel, or Head", "fused", "explicit")
    prompt: str = option("\\n", "text to continue; \\n in it is a new line")
    prompt_file: str = option("", "file with the text to continue")
    max_new_tokens: int = option(500, "number of tokens to generate")
    temperature: float = option(0.8, "0: always the likeliest token; higher: more surprises")
    top_k: int = option(0, "draw from the k likeliest tokens only; 0: from all")
    top_p: float = option(0.95, "draw from the fewest tokens that together have probability p")
    repetition_penalty: float = option(1.0, "above 1: tokens in the context become less likely")
    seed: int = option(0, "the same seed gives the same text; 0: a new one each time")

class KVCache:
    """The rotated keys and the values of the tokens read so far. The mask keeps later tokens from
    changing them, so a new token is read alone, with the same result, until the cache is full."""
    def __init__(self, model, batch_size):
        c = model.config
        shape = (c.n_layer, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
        self.keys = next(model.parameters()).new_zeros(shape)
        self.values = torch.zeros_like(self.keys)
        self.length = 0  # tokens in the cache; GPTLanguageModel.forward counts them

    def append(self, layer, k, v):
        """The new keys and values of a layer, (B, nh, T, hs) -> all of them, (B, nh, S, hs)."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

def penalize_repetition(logits, tokens, penalty):
    """Make the tokens (B, N) of the context less likely in the logits (B, V)."""
    seen = logits.gather(1, tokens)  # (B, N)
    seen = torch.where(seen > 0, seen / penalty, seen * penalty)  # smaller, whatever the sign
    return logits.scatter(1, tokens, seen)

def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (B, V) -> the probabilities (B, V) from which the next token is drawn."""
    if temperature < 1e-5:  # the likeliest token has probability 1
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    logits, order = torch.sort(logits / temperature, descending=True)  # the likeliest first
    if top_k > 0:
        logits[:, top_k:] = float("-inf")
    probs = F.softmax(logits, dim=-1)  # (B, V)
    # Top-p (arXiv 1904.09751): drop a token if the likelier ones together have p already.
    probs = probs.masked_fill(probs.cumsum(dim=-1) - probs > top_p, 0.0)
    probs = torch.zeros_like(probs).scatter(1, order, probs)  # back to the order of the vocabulary
    return probs / probs.sum(dim=-1, keepdim=True)

@torch.inference_mode()  # no gradients: nothing is kept for a backward pass
def generate_tokens(model, tokens, config):
    """Continue tokens (B, T): yield a new token for each sequence, (B, 1). model.eval() first!"""
    rng = torch.Generator(tokens.device).manual_seed(config.seed or time.time_ns())
    cache = KVCache(model, len(tokens))
    block_size = model.config.block_size
    tokens = tokens[:, -block_size:]  # the prompt, or as much of its end as fits
    unread = tokens
    for _ in range(config.max_new_tokens):
        logits, _ = model(unread, cache=cache)  # (B, T), later (B, 1) -> (B, T, V)
        logits = logits[:, -1].float()  # (B, V): what follows the last token
        logits = penalize_repetition(logits, tokens, config.repetition_penalty)
        probs = probabilities(logits, config.temperature, config.top_k, config.top_p)
        unread = torch.multinomial(probs, num_samples=1, generator=rng)  # draw a token: (B, 1)
        tokens = torch.cat((tokens, unread), dim=1)[:, -block_size:]
        yield unread
        if cache.length == block_size:  # full: start again with the last half, at position 0
            cache.length = 0
            unread = tokens[:, -max(1, block_size // 2) :]


# ------------------------------------------------------------------------------------ 5. training
PRESETS = {  # what differs from the defaults; README.md says how long each takes, to which loss
    "cpu": dict(),
    "laptop": dict(n_layer=6, n_embd=256, block_size=1024, batch_size=4, max_iters=5200,
                   learning_rate=1e-3, weight_decay=6.0, dropout=0.1),  # less memorising
    "lecture": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2,
                    bias=True, positions="learned", activation="relu", qk_norm=False,
                    max_iters=5000, optimizer="adamw", learning_rate=3e-4, schedule="constant")}
PRESETS["gpu"] = PRESETS["laptop"] | dict(n_head=6, n_embd=384)
PRESETS["auto"] = PRESETS["gpu" if torch.cuda.is_available() else "cpu"]

@dataclass
class TrainConfig(GPTConfig):
    """The architecture and how to train it. The defaults are the preset cpu."""
    data: str = option("", "text file (UTF-8) or 'shakespeare'; if empty, input.txt next to gpt.py")
    ckpt: str = option("gpt_checkpoint.pt", "where to save the best model")
    preset: str = option("auto", "size and recipe; auto: gpu with CUDA, else cpu", *PRESETS)
    resume: bool = option(False, "continue the interrupted run of --ckpt")
    init_from: str = option("", "start from this checkpoint, to fine-tune it")
    tokenizer: str = option("char", "what a token is", "char", "gpt2")
    max_iters: int = option(1500, "number of optimizer steps")
    batch_size: int = option(8, "sequences in one forward pass of one process")
    gradient_accumulation_steps: int = option(1, "forward passes in one optimizer step")
    optimizer: str = option("muon", "Muon with AdamW, or AdamW alone", "muon", "adamw")
    learning_rate: float = option(4e-3, "the highest learning rate")
    weight_decay: float = option(0.0, "how strongly matrices are pulled towards zero")
    warmup_iters: int = option(0, "steps in which the learning rate rises")
    schedule: str = option("linear", "linear: level, then falling", "linear", "cosine", "constant")
    eval_interval: int = option(250, "steps between evaluations, each of which saves the run")
    seed: int = option(1337, "the same seed gives the same run")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = option("auto", "number format of products", "auto", "fp32", "bf16", "fp16")
    compile: bool = option(False, "torch.compile: starts slowly, then is faster on a GPU")

WORLD = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1  # processes
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0  # the number of this one: 0 prints and saves

def say(text):
    """Print above the progress bar. Of several processes (torchrun) only the first one prints."""
    if RANK == 0:
        with suppress(OSError):  # the terminal may be closed: the run goes on without it
            tqdm.write(text)

class Muon(torch.optim.Optimizer):
    """Turns gradients into steps, as AdamW does: you can skip it. Momentum, then a step of the same
    length in all directions; gradients favour a few (kellerjordan.github.io/posts/muon)."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.1)  # = 0.9 * momentum + 0.1 * gradient, a running mean
                update = orthogonalize(p.grad.lerp(momentum, 0.9))  # Nesterov momentum
                size = 0.2 * math.sqrt(max(p.shape))  # entries like AdamW's (arXiv 2502.16982)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * size)

def orthogonalize(x):
    """Bring the singular values S of a matrix x = U S V^T near 1, by Newton-Schulz iteration."""
    if x.size(0) > x.size(1):
        return orthogonalize(x.T).T  # x @ x.T is smaller for a wide matrix
    x = x / (x.norm() + 1e-7)  # now no singular value is above 1
    for _ in range(5):  # s becomes 3.4445 s - 4.775 s^3 + 2.0315 s^5, in the end 0.7 to 1.2
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x

def make_optimizers(model, config):
    """AdamW (step: running mean of the gradient / its running size); Muon for blocks' matrices."""
    muon = [p for p in model.blocks.parameters() if p.dim() == 2 and config.optimizer == "muon"]
    rest = [p for p in model.parameters() if p not in set(muon)]  # embeddings, lm_head, norms
    # Weight decay pulls matrices towards 0, against overfitting. Norms belong near 1.
    groups = [{"params": [p for p in rest if p.dim() == 2], "weight_decay": config.weight_decay},
              {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    return [adamw, Muon(muon, {"weight_decay": config.weight_decay})] if muon else [adamw]

def learning_rate_factor(step, config):
    """The learning rate of a step as a fraction of the highest: warm-up, then the schedule."""
    if step < config.warmup_iters:
        return (step + 1) / config.warmup_iters
    flat = 0.3 * config.max_iters if config.schedule == "linear" else 0  # steps at the highest
    start = max(flat, config.warmup_iters)
    done = max(0, step - start) / max(1, config.max_iters - start)  # from 0 to 1
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return {"linear": 1 - done, "cosine": cosine, "constant": 1.0}[config.schedule]

@torch.no_grad()
def estimate_loss(model, data, max_tokens=131_072):
    """The mean loss over sequences spread evenly over data (N,): the same ones at each call."""
    T = model.config.block_size
    starts = torch.arange(0, len(data) - T, T, device=data.device)  # one sequence after the other
    starts = starts[:: math.ceil(len(starts) * T / max_tokens)]  # if too many, only every n-th
    was_training = model.training
    model.eval()  # no dropout
    losses = [model(*get_batch(data, some, T))[1] * len(some) for some in starts.split(16)]
    model.train(was_training)
    return sum(losses).item() / len(starts)

def save_checkpoint(path, model, tokenizer, **more):
    """Save model, tokenizer and `more`, which holds tensors and plain Python types only."""
    check(all(p.isfinite().all() for p in model.parameters()), "The weights are not numbers any "
          "more, so they are not saved: lower --learning_rate, or use --precision fp32.")
    content = {"model_state_dict": model.state_dict(), "hyperparameters": asdict(model.config),
               "stoi": tokenizer.stoi, "itos": tokenizer.itos, **more}
    with open(f"{path}.tmp", "wb") as file:
        torch.save(content, file)
    os.replace(f"{path}.tmp", path)  # at any moment `path` is a whole file: the old or the new one

def load_checkpoint(path, device="cpu"):
    """Return (model, tokenizer, the rest of the file), ready to use. No code in it is run."""
    file = Path(path).expanduser()
    if not file.exists():
        file = Path(__file__).parent / "checkpoints" / path
    check(file.is_file(), f"No file {path}. (For GPT-2: python notes/gpt2.py import gpt2 gpt2.pt)")
    try:
        rest = torch.load(file, map_location="cpu", weights_only=True)  # only tensors and the like
        model = GPTLanguageModel(GPTConfig(**rest.pop("hyperparameters")))
        model.load_state_dict(rest.pop("model_state_dict"))
        tokenizer = CharTokenizer(rest["stoi"]) if rest["stoi"] else BPETokenizer()
    except Exception as error:
        raise UserError(f"{file} cannot be opened as a checkpoint: {error}") from error
    print(f"Opened {file}", file=sys.stderr)
    return model.to(device).eval(), tokenizer, rest

def choose_device(name, precision):
    """--device and --precision -> a device, and the number format of matrix products there."""
    if name == "auto":
        name = "cpu"
        if torch.accelerator.is_available():  # CUDA, with torchrun GPU number LOCAL_RANK, or MPS
            name = f"{torch.accelerator.current_accelerator()}:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(1, device=name).device
    except Exception as error:
        raise UserError(f"--device {name} is not available, --device cpu is: {error}") from error
    if precision == "auto" and device.type == "cuda":  # Colab's T4 has 7.5: no bf16
        precision = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)

def write_log(ckpt, history):
    """Write the losses so far as a table, NAME.csv, and draw them, NAME.png."""
    rows = [history[0].keys(), *[row.values() for row in history]]
    ckpt.with_suffix(".csv").write_text("".join([",".join(map(str, row)) + "\n" for row in rows]))
    with suppress(Exception):  # a picture that cannot be drawn never ends a run
        from matplotlib.figure import Figure
        axes = Figure(figsize=(7, 4), layout="constrained").subplots()
        axes.plot([row["iteration"] for row in history],
                  [(row["train_loss"], row["val_loss"]) for row in history])
        axes.set(xlabel="step", ylabel="loss")
        axes.legend(["training loss", "validation loss"])
        axes.figure.savefig(ckpt.with_suffix(".png"), dpi=100)

@contextmanager
def stop_signals():
    """A list of the signals so far that ask to stop: Ctrl-C, kill, and the end of the terminal."""
    received, previous = [], {}
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            with suppress(ValueError):  # Python allows handlers in the main thread only
                previous[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)

def configure(flags, known, resuming):
    """The options: a flag beats `known` (from a checkpoint), which beats preset and default."""
    fixed = {*asdict(GPTConfig()), "optimizer"} - {"dropout", "attention"}
    for name in fixed & known.keys() & flags.keys():
        shorter = name == "block_size" and not resuming and flags[name] < known[name]
        check(shorter or flags[name] == known[name],
              f"--{name} {flags[name]} contradicts the checkpoint: {known[name]}.")
    preset = PRESETS[(known | flags).get("preset", "auto")]
    options = preset | known | flags  # a Path becomes a string: a checkpoint holds plain types only
    return TrainConfig(**{k: str(v) if isinstance(v, Path) else v for k, v in options.items()})

def training_step(step, model, optimizers, scaler, data, config, precision):
    """One optimizer step. Returns the loss of the last forward pass. Without options: get_batch;
    loss = model(x, y)[1]; loss.backward(); optimizer.step(); optimizer.zero_grad()"""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config)
    # A seed for each step: a resumed run draws the same starts. Each process uses its row of them.
    torch.manual_seed(config.seed + 1_000_003 * step)
    T, passes = config.block_size, config.gradient_accumulation_steps
    starts = torch.randint(len(data) - T, (passes, WORLD, config.batch_size), device=data.device)
    for i in range(passes):
        x, y = get_batch(data, starts[i, RANK], T)  # batch: (B, T) each
        with torch.autocast(data.device.type, precision, enabled=precision != torch.float32):
            _, loss = model(x, y)  # forward, with products in the number format `precision`
        part = loss / passes  # backward adds up gradients: this makes the sum a mean
        scaler.scale(part).backward()  # backward; in fp16 scaled up, as small gradients would be 0
    if WORLD > 1:  # each process has the gradients of its part: take the mean
        for p in model.parameters():
            dist.all_reduce(p.grad)  # the sum over the processes
            p.grad /= WORLD
    for optimizer in optimizers:
        scaler.unscale_(optimizer)  # the gradients as they were before scaling
    length = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # a bad batch can do little harm
    for optimizer in optimizers:
        if precision != torch.float16 or length.isfinite():  # an overflow in fp16: no step at all
            scaler.step(optimizer)  # step: optimizer.step()
        optimizer.zero_grad()
    scaler.update()
    return loss.detach()

def train(**flags):
    """Train as the options say. Returns the best model and its tokenizer. Two files: --ckpt has
    the model with the lowest validation loss, NAME.resume.pt the latest one and its optimizers."""
    ckpt = Path(flags.get("ckpt", TrainConfig.ckpt)).expanduser()
    check(ckpt.suffix == ".pt", f"--ckpt {ckpt} must end in .pt.")  # .csv and .png are the logs
    latest = ckpt.with_suffix(".resume.pt")
    start = latest if flags.get("resume") else flags.get("init_from")
    old_model, tokenizer, saved = load_checkpoint(start) if start else (None, None, {})
    saved = saved if flags.get("resume") else {}  # --init_from takes only the model
    for file in (ckpt, latest, ckpt.with_suffix(".csv"), ckpt.with_suffix(".png")):
        check(saved or not file.exists(), f"{file} exists already. Continue its run with --resume, "
              "choose another --ckpt, or move the file away.")
    known = saved.get("train_config", asdict(old_model.config) if old_model else {})
    config = configure(flags, known, resuming=bool(saved))
    device, precision = choose_device(config.device, config.precision)
    tokenizer, train_data, val_data = load_data(config.data, tokenizer or config.tokenizer, device)
    check(len(val_data) > config.block_size, "The text is too short: lower --block_size.")
    ckpt.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)  # all processes begin with the same weights
    config.vocab_size = old_model.config.vocab_size if old_model else tokenizer.vocab_size
    model = GPTLanguageModel(GPTConfig(**{k: getattr(config, k) for k in asdict(GPTConfig())}))
    if old_model:
        for name, tensor in model.state_dict().items():  # a shorter context has fewer positions
            tensor.copy_(old_model.state_dict()[name][: len(tensor)])
    optimizers = make_optimizers(model.to(device), config)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    for part, state in zip([*optimizers, scaler], saved.get("states", []), strict=False):
        if state and part.state_dict():  # a scaler that is not in use has no state
            part.load_state_dict(state)
    if WORLD > 1:  # this comes after the optimizers: before them it can crash Python at its exit
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    network = torch.compile(model) if config.compile else model  # the same weights, for training
    tokens = config.block_size * config.batch_size * config.gradient_accumulation_steps * WORLD
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device} in {precision}; "
        f"{tokens:,} tokens in a step.")
    first = saved.get("iteration", 0)
    history = [row for row in saved.get("history", []) if row["iteration"] < first]
    clock = time.perf_counter() - (history[-1]["seconds"] if history else 0)
    steps = tqdm(range(first, max(first, config.max_iters) + 1), disable=True if RANK else None)
    with stop_signals() as received, steps:
        for step in steps:
            stop = torch.tensor(len(received))
            if WORLD > 1:
                dist.all_reduce(stop)  # if one process has to stop, all do
            finished = step >= config.max_iters
            due = finished or step % config.eval_interval == 0
            if due:
                train_loss = estimate_loss(model, train_data, max_tokens=32_768)
                val_loss = estimate_loss(model, val_data)
                history.append({"iteration": step, "train_loss": train_loss, "val_loss": val_loss,
                                "tokens": step * tokens, "seconds": time.perf_counter() - clock})
                say(f"step {step:6,}: training loss {train_loss:.4f}, validation {val_loss:.4f}")
            if RANK == 0 and (due or stop > 0):
                state = {"iteration": step, "history": history, "train_config": asdict(config)}
                states = [part.state_dict() for part in [*optimizers, scaler]]
                save_checkpoint(latest, model, tokenizer, states=states, **state)
                if due and val_loss == min(row["val_loss"] for row in history):
                    save_checkpoint(ckpt, model, tokenizer, **state)
                write_log(ckpt, history)
                if due:
                    say(tokenizer.decode(model.generate(train_data[:1], 100, seed=1)[0]) + "\n")
            if finished or stop > 0:
                break
            loss = training_step(step, network, optimizers, scaler, train_data, config, precision)
            if step % 10 == 0:
                steps.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    if WORLD > 1:
        dist.barrier()  # until the first process has saved
        dist.destroy_process_group()
    if not finished:
        say(f"Stopped after {step:,} steps. To continue, repeat the command with --resume.")
        raise KeyboardInterrupt(*received[:1])
    say(f"The best model is in {ckpt}. To generate text: python gpt.py --sample --ckpt {ckpt}")
    return load_checkpoint(ckpt, device)[:2]


# -------------------------------------------------------------------------------- 6. command line
def sample(**flags):
    """Generate text as the options say."""
    config = SampleConfig(**flags)
    device, _ = choose_device(config.device, "fp32")
    model, tokenizer, _ = load_checkpoint(config.ckpt, device)
    model.config.attention = config.attention
    prompt = config.prompt.replace("\\n", "\n").replace("\\t", "\t")
    if config.prompt_file:
        prompt = Path(config.prompt_file).expanduser().read_text(encoding="utf-8-sig")
    ids = torch.tensor([tokenizer.encode(prompt or "\n")], device=device)  # (1, T)
    print(prompt, end="", flush=True)
    unprinted = []
    for new in generate_tokens(model, ids, config):
        unprinted.append(new.item())
        text = tokenizer.decode(unprinted)
        if not text.endswith("\ufffd"):  # otherwise the last character is not complete yet
            print(text, end="", flush=True)
            unprinted = []
    print(tokenizer.decode(unprinted))

def parse(argv):
    """The command line -> (train or sample, its options as a dictionary)."""
    command, config = (sample, SampleConfig) if "--sample" in argv else (train, TrainConfig)
    parser = argparse.ArgumentParser("gpt.py", "python gpt.py --train|--sample [options] [--help]",
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument(f"--{command.__name__}", action="store_true", required=True)
    for f in [f for f in fields(config) if f.metadata]:
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} [{f.default}]", **kind)
    flags = vars(parser.parse_args(argv))
    del flags[command.__name__]
    return command, flags

def main(argv=None):
    """Run a command. Returns the exit code: 0, 2 after a mistake, 128 + the signal after a stop."""
    for stream in (sys.stdout, sys.stderr):  # "?" for what it cannot show; each line at once
        stream.reconfigure(errors="replace", line_buffering=True)
    try:
        command, flags = parse(sys.argv[1:] if argv is None else argv)
        command(**flags)
    except (UserError, OSError, UnicodeError, ImportError) as error:
        print(f"gpt.py: {error}", file=sys.stderr)
        return 2
    except (MemoryError, torch.OutOfMemoryError):
        print("gpt.py: out of memory: lower --batch_size or --block_size.", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    return 0

if __name__ == "__main__":
    sys.exit(main())
