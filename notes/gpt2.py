"""OpenAI's GPT-2 for gpt.py, and our checkpoints for transformers: see notes/gpt2_guide.md.

    python notes/gpt2.py import gpt2 gpt2.pt     # or gpt2-medium, gpt2-large, gpt2-xl, or a folder
    python gpt.py --sample --ckpt gpt2.pt --prompt "Hello"
    python notes/gpt2.py export gpt_checkpoint.pt folder
"""
# /// script
# requires-python = ">=3.10"  # `uv run notes/gpt2.py ...` installs these packages
# dependencies = ["torch>=2.6,<2.14", "numpy", "tqdm", "tiktoken", "safetensors", "huggingface_hub"]
# ///
import argparse
import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpt

HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's models on huggingface.co
TABLES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"  # as in tiktoken
VOCABULARY_SHA256 = "855ec41a9d90094ebb1189ee8082e915505cf2dfe0691a4f39da9c020f9476b2"
GPT2 = dict(model_type="gpt2", vocab_size=50257, activation_function="gelu_new",  # config.json
            layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
TO_GPT2 = {"token_embedding": "wte", "position_embedding": "wpe", "blocks.": "h.",
           "attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj",
           "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"}
TO_PERSIMMON = {"token_embedding": "embed_tokens", "blocks.": "layers.", "ln_1": "input_layernorm",
                "ln_2": "post_attention_layernorm", "ln_f": "final_layernorm",
                "attention.qkv": "self_attn.query_key_value", "attention.proj": "self_attn.dense",
                "feed_forward.up": "mlp.dense_h_to_4h", "feed_forward.down": "mlp.dense_4h_to_h"}

def rename(weights, names, prefix="", transpose=False):
    """Rename the weights. GPT-2's matrices are (in, out), ours (out, in): transpose them."""
    renamed = {}
    for name, tensor in weights.items():
        if transpose and tensor.dim() == 2 and name.startswith(("blocks.", "h.")):
            tensor = tensor.T
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name if name.startswith("lm_head") else prefix + name] = tensor.contiguous()
    return renamed

def import_gpt2(name_or_folder):
    """Return the GPTLanguageModel of a name in HUB, or of a folder saved by transformers."""
    from safetensors.torch import load_file
    folder = Path(name_or_folder).expanduser()
    try:
        if name_or_folder in HUB and not folder.exists():
            from huggingface_hub import snapshot_download
            files = ["config.json", "model.safetensors"]
            folder = Path(snapshot_download(f"openai-community/{folder}", allow_patterns=files))
        for file in filter(Path.exists, [folder / "vocab.json", folder / "tokenizer.json"]):
            content = json.loads(file.read_text(encoding="utf-8"))
            vocabulary = content if file.stem == "vocab" else content["model"]["vocab"]
            sha256 = hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()
            gpt.check(sha256 == VOCABULARY_SHA256, f"the vocabulary in {file.name} is not GPT-2's.")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for key, value in GPT2.items():
            gpt.check(config.get(key, value) == value, f"{key} is {config.get(key)}, not {value}.")
        model = gpt.GPTLanguageModel(gpt.GPTConfig(
            config["n_layer"], config["n_head"], config["n_embd"], config["n_positions"],
            vocab_size=config["vocab_size"], tie_weights=config.get("tie_word_embeddings", True),
            bias=True, positions="learned", qk_norm=False, activation="gelu"))
        weights = {name.removeprefix("transformer."): tensor  # OpenAI's files have no prefix
                   for name, tensor in load_file(folder / "model.safetensors").items()
                   if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # masks
        weights = rename(weights, {new: old for old, new in TO_GPT2.items()}, transpose=True)
        weights.setdefault("lm_head.weight", weights["token_embedding.weight"])  # tied
        model.load_state_dict(weights)  # an error if a name or a shape does not fit
    except Exception as error:
        raise gpt.UserError(f"{folder} cannot be opened as a GPT-2: {error}\nIt should be "
            f"{', '.join(HUB)}, or a folder with config.json and model.safetensors. If the weights "
            "are in .bin files or in several files, open them with transformers and make one file: "
            "model.save_pretrained(NEW_FOLDER, max_shard_size='100GB').") from error
    return model.eval()

def export_to_transformers(checkpoint, folder):
    """Write a checkpoint as a folder for AutoModelForCausalLM and AutoTokenizer of transformers."""
    from safetensors.torch import save_file
    model, tokenizer, _ = gpt.load_checkpoint(checkpoint)
    c, hs = model.config, model.config.n_embd // model.config.n_head
    # Their layers always have biases: where our model has none, theirs are zero.
    biased = gpt.GPTLanguageModel(gpt.GPTConfig(**vars(c) | {"bias": True}))
    biased.load_state_dict(model.state_dict(), strict=False)
    config = dict(vars(c), tie_word_embeddings=c.tie_weights, bos_token_id=None, eos_token_id=None,
                  tokenizer_class="PreTrainedTokenizerFast", attn_pdrop=0.0)
    activation = "gelu_new" if c.activation == "gelu" else c.activation
    if c.positions == "learned":
        gpt.check(not c.qk_norm, "No model of transformers has learned positions and QK-norm.")
        weights = rename(biased.state_dict(), TO_GPT2, "transformer.", transpose=True)
        config.update(model_type="gpt2", architectures=["GPT2LMHeadModel"], embd_pdrop=c.dropout,
            resid_pdrop=c.dropout, activation_function=activation, n_positions=c.block_size)
    else:  # Persimmon has rotary positions, and can have QK-norm and relu2
        weights = rename(biased.state_dict(), TO_PERSIMMON, "model.")
        config.update(model_type="persimmon", architectures=["PersimmonForCausalLM"],
            num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, hidden_size=c.n_embd,
            intermediate_size=4 * c.n_embd, max_position_embeddings=c.block_size,
            hidden_act=activation, hidden_dropout=c.dropout, qk_layernorm=c.qk_norm,
            rope_theta=10000.0, partial_rotary_factor=1.0)
        for name in [name for name in weights if "query_key_value" in name]:
            heads = weights[name].unflatten(0, (3, c.n_head, hs))  # (3C, ...) -> (3, nh, hs, ...)
            weights[name] = heads.transpose(0, 1).flatten(0, 2).contiguous()  # (nh, 3, hs, ...)
            for norm in ("q_layernorm", "k_layernorm") if c.qk_norm else ():
                value = 1.0 if name.endswith("weight") else 0.0  # so they change nothing
                weights[name.replace("query_key_value", norm)] = heads.new_full((hs,), value)
    if c.tie_weights:
        del weights["lm_head.weight"]  # it is the token embedding
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    Path(folder, "config.json").write_text(json.dumps(config, indent=2))
    Path(folder, "tokenizer.json").write_text(json.dumps(describe_tokenizer(tokenizer)))

def describe_tokenizer(tokenizer):
    """Our tokenizer -> the contents of tokenizer.json."""
    if tokenizer.stoi:  # cut the text at every character: each is a "word" of the vocabulary
        cut = dict(type="Split", pattern={"Regex": r"[\s\S]"}, behavior="Isolated", invert=False)
        words = dict(type="WordLevel", vocab=tokenizer.stoi, unk_token="<unk>")
        return dict(added_tokens=[], pre_tokenizer=cut, decoder={"type": "Fuse"}, model=words)
    from tiktoken.load import read_file_cached
    vocabulary = json.loads(read_file_cached(f"{TABLES}/encoder.json"))
    merges = read_file_cached(f"{TABLES}/vocab.bpe").decode().split("\n")[1:-1]
    end = dict(id=50256, content="<|endoftext|>", special=True, normalized=False, lstrip=False,
               rstrip=False, single_word=False)
    step = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
    model = dict(type="BPE", vocab=vocabulary, merges=merges)
    return dict(added_tokens=[end], pre_tokenizer=step, decoder=step, model=model)

def main(argv=None):
    parser = argparse.ArgumentParser("gpt2.py", description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["import", "export"])
    parser.add_argument("source", help=f"import: {', '.join(HUB)}, or a folder; export: a file")
    parser.add_argument("target", help="import: the checkpoint to write; export: the folder")
    args = parser.parse_args(argv)
    try:
        gpt.check(not Path(args.target).exists(), f"{args.target} exists already.")
        if args.command == "import":
            gpt.save_checkpoint(args.target, import_gpt2(args.source), gpt.BPETokenizer)
        else:
            export_to_transformers(args.source, args.target)
    except (gpt.UserError, OSError, ImportError) as error:
        print(f"gpt2.py: {error}", file=sys.stderr)
        if "No module named" in str(error):
            print("To install it: pip install safetensors huggingface_hub", file=sys.stderr)
        return 2
    print(f"Saved {args.target}")
    return 0

if __name__ == "__main__":
    sys.exit(main())
