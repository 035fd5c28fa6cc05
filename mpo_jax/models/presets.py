"""Takes the name of a published model; gives its architecture, so that a run can be planned without its weights.

Each entry holds the numbers of the model's own `config.json` on the Hugging Face hub.
"""

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Any

from mpo_jax.errors import InputError
from mpo_jax.models import config as model_config
from mpo_jax.models.config import ModelConfig
from mpo_jax.models.config_json import read_config_json


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model known by its numbers alone: enough to compile for, not to run."""

    architecture: ModelConfig
    stop_ids: tuple[int, ...]


def _llama(width: int, layers: int, heads: int, mlp: int, **changes) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    } | changes


CONFIGS: dict[str, dict[str, Any]] = {
    "llama2-7b": _llama(4096, 32, 32, 11_008),
    "llama2-13b": _llama(5120, 40, 40, 13_824),
    "llama-30b": _llama(6656, 60, 52, 17_920, max_position_embeddings=2048, rms_norm_eps=1e-6),
    "llama2-70b": _llama(8192, 80, 64, 28_672, num_key_value_heads=8),
    "llama3-8b": _llama(
        4096,
        32,
        32,
        14_336,
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        eos_token_id=128_001,
    ),
    "pythia-1b": {
        "model_type": "gpt_neox",
        "vocab_size": 50_304,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "intermediate_size": 8192,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10_000,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "eos_token_id": 151_643,
    },
}

HUB = {
    "meta-llama/Llama-2-7b-hf": "llama2-7b",
    "meta-llama/Llama-2-13b-hf": "llama2-13b",
    "huggyllama/llama-30b": "llama-30b",
    "meta-llama/Llama-2-70b-hf": "llama2-70b",
    "meta-llama/Meta-Llama-3-8B": "llama3-8b",
    "EleutherAI/pythia-1b": "pythia-1b",
    "Qwen/Qwen2.5-0.5B": "qwen2.5-0.5b",
}
"""Hub ids of the models above."""


def find(path: str) -> Preset:
    """The model at `path`: a local folder with a config.json, a preset's name, or the hub id of one."""
    name = os.fspath(path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _preset(read_config_json(folder), str(folder / "config.json"))
    known = HUB.get(name, name)
    if known not in CONFIGS:
        near = difflib.get_close_matches(name, [*CONFIGS, *HUB], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f", or one of {', '.join(CONFIGS)}"
        raise InputError(f"model.path: {name!r} is neither a model folder nor a preset; expected a folder{hint}")
    return _preset(CONFIGS[known], known)


def _preset(config: dict[str, Any], source: str) -> Preset:
    stops = config.get("eos_token_id")
    stop_ids = tuple(stops) if isinstance(stops, list) else (0 if stops is None else stops,)
    return Preset(model_config.from_hf(config, source), stop_ids)


def parameters(model: ModelConfig) -> int:
    """Weights of the trunk, padding of the vocabulary left out: what a model's name counts."""
    attention = model.width * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    mlp = model.width * model.mlp_width * (3 if model.gated_mlp else 2)
    tables = model.vocab_size * model.width * (1 if model.tied_embeddings else 2)
    if model.learned_positions:
        tables += model.max_positions * model.width
    return model.layers * (attention + mlp) + tables
