"""Takes a Hugging Face `config.json`; gives the frozen `ModelConfig` that drives the decoder.

Everything that tells one model family from another is a field here, so that the decoder reads fields, never names.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from etils import epath

from mpo_jax.errors import InputError
from mpo_jax.models.config_json import Keys, check_whole, read_config_json
from mpo_jax.ops import product

MOST_UNROLLED = 16  # layers; each costs the compiler some tenths of a second
VOCAB_MULTIPLE = 128  # lane width of a TPU; the vocabulary is padded to a multiple of it for each tensor shard
FLASH_MULTIPLE = 128  # what the flash backend's row lengths are a multiple of
NO_WINDOW = 1 << 30  # a sliding window that every pair of positions lies within


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later ("rope_type": "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685). targets: names of projections (q k v o gate up down)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self):
        unknown = sorted(set(self.targets) - set(PROJECTIONS))
        if unknown or not self.targets:
            raise InputError(f"model.lora.targets: {unknown or 'empty'}; expected names among {list(PROJECTIONS)}")
        if self.rank < 1:
            raise InputError(f"model.lora.rank: {self.rank}; expected at least 1")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
REMAT_POLICIES = ("none", "full", "dots")
ATTENTION_BACKENDS = ("xla", "flash", "cudnn")
ATTENTION_SETTINGS = ("auto", *ATTENTION_BACKENDS)
DTYPES = ("float32", "bfloat16", "mixed")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder, and how it is computed.

    Letters of the design: V vocab_size, L layers, D width, H heads, K kv_heads, F mlp_width.
    """

    family: str
    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    norm: str = "rms"  # rms | rms_plus_one (gemma: the stored scale is an offset from 1) | layer
    norm_eps: float = 1e-6
    activation: str = "silu"  # silu | gelu | gelu_tanh
    gated_mlp: bool = True
    parallel_residual: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False  # gemma2: a norm after attention and after the MLP, inside the residual branch
    learned_positions: bool = False
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0  # share of head_dim that is rotated
    rope_linear_factor: float = 1.0
    rope_llama3: Llama3Rope | None = None
    windows: tuple[int, ...] | None = None  # per layer: a key is visible if its position is less than this behind
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embed_scale: float | None = None
    tied_embeddings: bool = False
    # How it is computed; none of it changes the function beyond rounding.
    padded_vocab: int = 0  # 0: the next multiple of VOCAB_MULTIPLE; `for_mesh` sets the multiple of the tensor axis
    dtype: str = "float32"  # float32 | bfloat16 | mixed (matrix products of bfloat16, all else float32; for CPUs)
    remat: str = "none"  # none | full: save only a layer's input | dots: save matrix products too
    attention: str = "xla"  # xla | flash | cudnn; `models.attention.choose` gives it
    unroll: bool = False  # layers one after the other, not a loop; with a remat policy always a loop. See `for_mesh`
    lora: LoraConfig | None = None

    def __post_init__(self):
        _require("remat", self.remat, REMAT_POLICIES)
        _require("attention", self.attention, ATTENTION_BACKENDS)
        _require("dtype", self.dtype, DTYPES)
        if self.heads % self.kv_heads:
            raise InputError(f"num_attention_heads: {self.heads} is no multiple of num_key_value_heads {self.kv_heads}")
        if self.windows is not None and len(self.windows) != self.layers:
            raise InputError(f"layer_types: {len(self.windows)} entries; expected one for each of {self.layers} layers")
        if self.padded_vocab == 0:
            object.__setattr__(self, "padded_vocab", _round_up(self.vocab_size, VOCAB_MULTIPLE))
        if self.padded_vocab < self.vocab_size:
            raise InputError(f"padded_vocab: {self.padded_vocab} is less than the vocabulary of {self.vocab_size}")

    def for_mesh(self, mesh) -> "ModelConfig":
        """The same model with its vocabulary padded so that the mesh's tensor axis divides it in whole lanes.

        On one CPU, a few layers are unrolled: XLA copies there what each turn of a loop leaves for the backward pass.
        """
        multiple = VOCAB_MULTIPLE * mesh.shape.get("tensor", 1)
        unroll = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu" and self.layers <= MOST_UNROLLED
        return dataclasses.replace(self, padded_vocab=_round_up(self.vocab_size, multiple), unroll=unroll)

    def check_attention(
        self,
        platform: str,
        tensor: int = 1,
        row_len: int | None = None,
        capability: tuple[int, int] | None = None,
    ) -> None:
        """InputError where the attention backend can't compute this model there.

        platform: cpu, gpu or tpu; tensor: size of that mesh axis; row_len: columns of a row, where they are known;
        capability: of the card, see `cudnn_obstacle`.
        """
        if self.attention == "xla":
            return
        name = self.attention
        if self.heads % tensor:
            raise InputError(
                f"model.attention: {name} needs heads that mesh.tensor={tensor} divides; found {self.heads}"
            )
        if name == "flash" and platform in ("cpu", "tpu"):
            if row_len is not None and row_len % FLASH_MULTIPLE:
                raise InputError(
                    f"model.attention: flash needs rows of a multiple of {FLASH_MULTIPLE} columns; found {row_len} "
                    f"(set data.multiple={FLASH_MULTIPLE}; in rollouts the prompt and n x max_new_tokens count; or xla)"
                )
            return
        if platform in ("cpu", "tpu"):
            raise InputError(f"model.attention: cudnn runs on NVIDIA GPUs alone; found {platform}; set attention=auto")
        obstacle = self.cudnn_obstacle(capability)
        if obstacle is not None:
            raise InputError(f"model.attention: {name} on {platform} is cuDNN, which {obstacle}; set attention=xla")

    def cudnn_obstacle(self, capability: tuple[int, int] | None = None) -> str | None:
        """Why cuDNN's fused attention can't compute this model, as the end of "cuDNN, which ..."; None where it can.

        capability: the card's compute capability, where it is known; unknown, it counts as the newest, so that what no
        card can do is all that is told.
        """
        widest = 256 if capability is None or capability >= (9, 0) else 128
        if self.attention_softcap is not None:
            return "has no soft cap"
        if self.dtype != "bfloat16":
            return f"needs dtype=bfloat16; found {self.dtype}"
        if capability is not None and capability < (8, 0):
            return f"needs compute capability 8.0 (Ampere) or later; found {capability[0]}.{capability[1]}"
        if self.head_dim % 8 or self.head_dim > widest:
            return f"needs a head_dim that is a multiple of 8 up to {widest}; found {self.head_dim}"
        return None

    @property
    def activation_dtype(self) -> str:
        """Of what layers hand on."""
        return "float32" if self.dtype == "mixed" else self.dtype

    @property
    def operand_dtype(self) -> str:
        """Of what goes into a product with a weight."""
        return "bfloat16" if self.dtype == "mixed" else self.dtype

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass computes norms and activations again, which costs an accelerator less than to keep
        and to read their steps, most of them in float32."""
        return self.dtype == "bfloat16"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def rope_dim(self) -> int:
        """How many of a head's dimensions are rotated; 0 under learned positions."""
        return 0 if self.learned_positions else int(self.head_dim * self.rope_fraction)


def compute_dtype(name: str, platform: str, key: str = "model.dtype") -> str:
    """A setting (auto, or one of `DTYPES`) as the dtype to compute in on a platform (cpu, gpu or tpu).

    auto: on a CPU what is faster there, mixed where it has bfloat16 products and else float32; bfloat16 on
    accelerators, whose matrix units accumulate in float32 by themselves, so that there "mixed" is bfloat16 too.
    """
    if name == "auto":
        return ("mixed" if product.fast_on_this_cpu() else "float32") if platform == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise InputError(f"{key}: {name!r}; expected auto or one of {list(DTYPES)}")
    return "bfloat16" if name == "mixed" and platform != "cpu" else name


def from_folder(folder: epath.PathLike) -> ModelConfig:
    """Reads `folder/config.json`. InputError, naming the file, where it is missing, broken or unsupported."""
    return from_hf(read_config_json(folder), source=str(epath.Path(folder) / "config.json"))


def from_hf(config: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """A `config.json` as ModelConfig, with the defaults of `transformers` for the keys that it leaves out.

    Raises InputError for families or settings that the decoder can't compute. Keys that a family's model in
    `transformers` does not read are not read here either.
    """
    family = "these"
    try:
        family = check_whole(config, sorted(FAMILIES))
        return FAMILIES[family](Keys(config))
    except KeyError as error:
        raise InputError(f"{source}: key {error} is missing; {family} models need it") from error
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _trunk(keys: Keys, family: str, kv_heads: int | None = None) -> dict[str, Any]:
    """What `transformers` reads alike for llama, mistral, qwen2, qwen3 and gemma2. kv_heads: where the key is absent;
    None (and a null in the file): as many as heads."""
    heads, width = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    given = keys.integer("num_key_value_heads", None) if "num_key_value_heads" in keys else None
    absent = heads if kv_heads is None or keys.is_null("num_key_value_heads") else kv_heads
    return {
        "family": family,
        "vocab_size": keys.integer("vocab_size"),
        "layers": keys.integer("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": _default(given, absent),
        "head_dim": _default(keys.integer("head_dim", None), width // heads),
        "mlp_width": keys.integer("intermediate_size"),
        "max_positions": keys.integer("max_position_embeddings"),
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "activation": _activation(keys, "hidden_act", "silu"),
        "tied_embeddings": keys.flag("tie_word_embeddings", False),
        **_rope(keys),
    }


def _llama(keys: Keys) -> ModelConfig:
    bias = keys.flag("attention_bias", False)
    fields = _trunk(keys, "llama") | {"qkv_bias": bias, "o_bias": bias, "mlp_bias": keys.flag("mlp_bias", False)}
    return ModelConfig(**fields)


def _mistral(keys: Keys) -> ModelConfig:
    fields = _trunk(keys, "mistral", kv_heads=8)
    window = keys.integer("sliding_window", None if keys.is_null("sliding_window") else 4096)
    return ModelConfig(**fields, windows=None if window is None else (window,) * fields["layers"])


def _qwen2(keys: Keys) -> ModelConfig:
    fields = _trunk(keys, "qwen2", kv_heads=32)
    return ModelConfig(**fields, qkv_bias=True, windows=_qwen_windows(keys, fields["layers"]))


def _qwen3(keys: Keys) -> ModelConfig:
    bias = keys.flag("attention_bias", False)
    fields = _trunk(keys, "qwen3", kv_heads=32) | {"head_dim": keys.integer("head_dim", 128)}
    windows = _qwen_windows(keys, fields["layers"])
    return ModelConfig(**fields, qk_norm=True, qkv_bias=bias, o_bias=bias, windows=windows)


def _gemma2(keys: Keys) -> ModelConfig:
    fields = _trunk(keys, "gemma2", kv_heads=4)
    every_other = ["full_attention" if i % 2 else "sliding_attention" for i in range(fields["layers"])]
    window = keys.integer("sliding_window", None if keys.is_null("sliding_window") else 4096)
    bias = keys.flag("attention_bias", False)
    fields |= {
        "head_dim": keys.integer("head_dim", 256),
        "norm": "rms_plus_one",
        "activation": _activation(keys, "hidden_activation", "gelu_pytorch_tanh"),
        "qkv_bias": bias,
        "o_bias": bias,
        "post_norms": True,
        "windows": _windows(_default(keys.texts("layer_types"), every_other), window, "sliding_window"),
        "attention_scale": keys.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "attention_softcap": _softcap(keys, "attn_logit_softcapping", 50.0),
        "final_softcap": _softcap(keys, "final_logit_softcapping", 30.0),
        "embed_scale": math.sqrt(fields["width"]),
        "tied_embeddings": keys.flag("tie_word_embeddings", True),
    }
    return ModelConfig(**fields)


def _gpt_neox(keys: Keys) -> ModelConfig:
    heads, width = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    bias = keys.flag("attention_bias", True)
    if keys.integer("head_dim", width // heads) != width // heads:
        raise InputError(f"head_dim: expected {width // heads}, hidden_size / num_attention_heads")
    return ModelConfig(
        family="gpt_neox",
        vocab_size=keys.integer("vocab_size"),
        layers=keys.integer("num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=keys.integer("intermediate_size"),
        max_positions=keys.integer("max_position_embeddings"),
        norm="layer",
        norm_eps=keys.number("layer_norm_eps", 1e-5),
        activation=_activation(keys, "hidden_act", "gelu"),
        gated_mlp=False,
        parallel_residual=keys.flag("use_parallel_residual", True),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        **_rope(keys, theta="rotary_emb_base", fraction=keys.number("rotary_pct", 0.25)),
    )


def _gpt2(keys: Keys) -> ModelConfig:
    for key, only in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        if keys.flag(key, only) != only:
            raise InputError(f"{key}: {not only} is not supported; expected {only}")

    def size(name: str, alias: str) -> int:
        """`transformers` takes either name, and the alias where both are there."""
        return keys.integer(alias) if alias in keys else keys.integer(name)

    width, heads = size("n_embd", "hidden_size"), size("n_head", "num_attention_heads")
    return ModelConfig(
        family="gpt2",
        vocab_size=keys.integer("vocab_size"),
        layers=size("n_layer", "num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_width=_default(keys.integer("n_inner", None), 4 * width),
        max_positions=size("n_positions", "max_position_embeddings"),
        norm="layer",
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        activation=_activation(keys, "activation_function", "gelu_new"),
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        learned_positions=True,
        tied_embeddings=keys.flag("tie_word_embeddings", True),
    )


FAMILIES: dict[str, Callable[[Keys], ModelConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
}


def _rope(keys: Keys, theta: str = "rope_theta", fraction: float | None = None) -> dict[str, Any]:
    """Rotary settings: from `rope_scaling` (before transformers 5), which wins where it says something, or from
    `rope_parameters`. theta: the key outside both. fraction: of a head that is rotated, where they don't say; None:
    the family rotates whole heads alone."""
    rope = keys.object("rope_scaling") or keys.object("rope_parameters") or Keys({})
    fields: dict[str, Any] = {"rope_theta": rope.number("rope_theta", None) or keys.number(theta, 10_000.0)}
    given = [each.number("partial_rotary_factor", None) for each in (rope, keys)]
    if fraction is not None:
        fields["rope_fraction"] = _default(given[0], fraction)
    elif any(part not in (None, 1.0) for part in given):
        raise InputError(f"partial_rotary_factor: {given} is not supported; expected 1, whole heads")
    kind = rope.text("rope_type", None) or rope.text("type", "default")
    if kind == "linear":
        return fields | {"rope_linear_factor": rope.number("factor")}
    if kind == "llama3":
        scaling = Llama3Rope(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_positions=rope.integer("original_max_position_embeddings", None)
            or keys.integer("max_position_embeddings"),
        )
        return fields | {"rope_llama3": scaling}
    if kind != "default":
        raise InputError(f"rope_type: {kind!r} is not supported; expected default, linear or llama3")
    if nested := rope.objects():
        raise InputError(f"rope_parameters: {nested[0]!r} holds an object; expected one rotation for all layers")
    return fields


def _qwen_windows(keys: Keys, layers: int) -> tuple[int, ...] | None:
    used = keys.flag("use_sliding_window", False) and not keys.is_null("sliding_window")
    window = keys.integer("sliding_window", 4096) if used else None
    first = keys.integer("max_window_layers", 28, least=0)
    by_depth = ["sliding_attention" if used and layer >= first else "full_attention" for layer in range(layers)]
    windows = _windows(_default(keys.texts("layer_types"), by_depth), window, "use_sliding_window")
    return windows if used else None


def _windows(layer_types: list[str], window: int | None, key: str) -> tuple[int, ...]:
    kinds = {"sliding_attention": window, "full_attention": NO_WINDOW, "attention": NO_WINDOW}
    for kind in layer_types:
        _require("layer_types", kind, tuple(kinds))
        if kinds[kind] is None:
            raise InputError(f"layer_types: holds 'sliding_attention', but {key} says that there is no window")
    return tuple(kinds[kind] or NO_WINDOW for kind in layer_types)


def _softcap(keys: Keys, name: str, default: float) -> float | None:
    return None if keys.is_null(name) else keys.number(name, default)


def _activation(keys: Keys, key: str, default: str) -> str:
    name = keys.text(key, None) or default
    names = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    _require(key, name, tuple(names))
    return names[name]


def _require(key: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise InputError(f"{key}: {value!r} is not supported; expected one of {list(allowed)}")


def _default(value, default):
    return default if value is None else value


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
