"""A llama's sizes enter; a Hugging Face folder of random sharded safetensors leaves, written a tensor at a time.

    python tests/tools/make_llama.py FOLDER [--layers 22 --width 2048 --mlp 5632 --heads 32 --kv-heads 4
                                             --vocab 32000 --dtype F32 --shard-bytes 1000000000]

The defaults are TinyLlama's shape: 1,100,048,384 parameters.
"""

import argparse
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


def shapes(args) -> dict[str, tuple[int, ...]]:
    kv_width = args.width // args.heads * args.kv_heads
    found = {"model.embed_tokens.weight": (args.vocab, args.width)}
    for layer in range(args.layers):
        prefix = f"model.layers.{layer}."
        for name, out in (("q", args.width), ("k", kv_width), ("v", kv_width), ("o", args.width)):
            found[f"{prefix}self_attn.{name}_proj.weight"] = (out, args.width)
        found[f"{prefix}mlp.gate_proj.weight"] = found[f"{prefix}mlp.up_proj.weight"] = (args.mlp, args.width)
        found[f"{prefix}mlp.down_proj.weight"] = (args.width, args.mlp)
        found[f"{prefix}input_layernorm.weight"] = (args.width,)
        found[f"{prefix}post_attention_layernorm.weight"] = (args.width,)
    return found | {"model.norm.weight": (args.width,), "lm_head.weight": (args.vocab, args.width)}


def write(folder: Path, args) -> int:
    """Writes the folder; returns the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": args.vocab,
        "hidden_size": args.width,
        "intermediate_size": args.mlp,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    dtype, tensors = np.dtype(DTYPES[args.dtype]), shapes(args)
    files: list[list[str]] = [[]]
    held = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if files[-1] and held + size > args.shard_bytes:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    random, weight_map = np.random.default_rng(0), {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header, offset = {}, 0
        for name in names:
            end = offset + math.prod(tensors[name]) * dtype.itemsize
            header[name] = {"dtype": args.dtype, "shape": tensors[name], "data_offsets": [offset, end]}
            offset, weight_map[name] = end, file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                values = random.standard_normal(tensors[name], np.float32)
                values *= 0.02
                out.write(values.astype(dtype).tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(map(math.prod, tensors.values()))


def parser() -> argparse.ArgumentParser:
    parsed = argparse.ArgumentParser()
    parsed.add_argument("folder", type=Path)
    for name, size in (("layers", 22), ("width", 2048), ("mlp", 5632), ("heads", 32), ("kv-heads", 4)):
        parsed.add_argument(f"--{name}", type=int, default=size)
    parsed.add_argument("--vocab", type=int, default=32000)
    parsed.add_argument("--shard-bytes", type=int, default=1_000_000_000)
    parsed.add_argument("--dtype", choices=sorted(DTYPES), default="F32")
    return parsed


if __name__ == "__main__":
    arguments = parser().parse_args()
    print(write(arguments.folder, arguments), "parameters")
