"""Small configs of every family, as `config.json` spells them, and random models of them with logits of unit scale."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.models import config as model_config
from mpo_jax.models import decoder
from mpo_jax.sharding import map_weights

_LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WINDOW = 5  # shorter than every row of the tests
JSON = {
    "llama": {"model_type": "llama", **_LLAMA},
    "llama3": {"model_type": "llama", **_LLAMA, "rope_scaling": _LLAMA3_ROPE, "rope_theta": 500000.0},
    "llama_linear": {"model_type": "llama", **_LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "mistral": {"model_type": "mistral", **_LLAMA, "sliding_window": WINDOW, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", **_LLAMA, "tie_word_embeddings": True},
    "qwen2_window": {"model_type": "qwen2", **_LLAMA, "sliding_window": WINDOW, "use_sliding_window": True}
    | {"max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 32},
    "gemma2": {"model_type": "gemma2", **_LLAMA, "head_dim": 32, "sliding_window": WINDOW}
    | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    | {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "gpt_neox": {"model_type": "gpt_neox", **_LLAMA, "rotary_pct": 0.25, "rotary_emb_base": 10000}
    | {"use_parallel_residual": True, "layer_norm_eps": 1e-5},
    "gpt_neox_serial": {"model_type": "gpt_neox", **_LLAMA, "rotary_pct": 0.5, "use_parallel_residual": False},
    "gpt2": {"model_type": "gpt2", "vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    | {"n_inner": 96, "bos_token_id": 1, "eos_token_id": 2},
}
for _unused in ("gpt_neox", "gpt_neox_serial"):
    JSON[_unused] = {k: v for k, v in JSON[_unused].items() if k not in ("rms_norm_eps", "num_key_value_heads")}


@pytest.fixture(scope="session")
def config_json():
    """name -> a fresh config.json of that family's small model."""
    return lambda name: copy.deepcopy(JSON[name])


@pytest.fixture(scope="session")
def random_model():
    """(name, **changes of ModelConfig) -> config and random weights, with biases and norms that are not trivial."""
    return _random_model


@functools.cache
def _random_model(name: str, **changes):
    config = dataclasses.replace(model_config.from_hf(JSON[name]), **changes)

    shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0), head=True))
    random = np.random.default_rng(0)  # compiling JAX's own generator for every leaf takes longer than the tests

    def draw(weight, leaf):
        noise = random.standard_normal(leaf.shape, np.float32)
        if weight.endswith(("scale", "bias")):
            return jnp.asarray((weight.endswith("scale") and config.norm != "rms_plus_one") + 0.1 * noise)
        if weight in ("params/embed/embedding", "params/lm_head/kernel"):
            noise[config.vocab_size :] = 0
        return jnp.asarray(noise / 8)  # 1 / sqrt(width)

    return config, map_weights(draw, shapes)
