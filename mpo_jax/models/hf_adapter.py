"""Adapters enter and leave as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`.

The names are those of the base model's table. A projection that lies in a fused tensor (q, k and v of gpt_neox and
gpt2) has no adapter of its own in PEFT, so that those can't be exchanged.
"""

import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mpo_jax import sharding
from mpo_jax.errors import InputError
from mpo_jax.models import hf, hf_names
from mpo_jax.models.config import PROJECTIONS, LoraConfig, ModelConfig
from mpo_jax.models.config_json import ADAPTER, Keys
from mpo_jax.models.hf_files import Reader, read_json, write_json, write_tensors
from mpo_jax.models.lora import projection_shapes
from mpo_jax.types import PyTree

CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"
_UNEVEN = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules",
    "layer_replication", "target_parameters", "trainable_token_indices", "lora_bias", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "kasa_config", "velora_config",
)  # fmt: skip
_ROOT = "base_model.model."


def export_adapter(folder: epath.PathLike, config: ModelConfig, weights: PyTree, base: str) -> None:
    """Writes the "lora" collection of `weights` for `peft`, with the base model's tokenizer.

    base: the base model's folder or hub id; a folder is named by its absolute path, so that the adapter loads from any
    working directory. Raises InputError where a target lies in a fused tensor, or there are no adapters.
    """
    target = Path(os.fspath(folder)).expanduser()
    if config.lora is None or "lora" not in weights:
        raise InputError(f"{target}: the weights hold no adapters to export")
    stems = _stems(config, config.lora.targets, str(target))
    tensors: dict[str, np.ndarray] = {}
    for name, stem in stems.items():
        adapter = jax.device_get(weights["lora"]["layers"][_block(name)][name])
        rank = config.lora.rank
        for layer in range(config.layers):
            module = _ROOT + stem.format(layer)
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(adapter["a"][layer].reshape(-1, rank).T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(adapter["b"][layer].reshape(rank, -1).T)
    if jax.process_index() != 0:
        return
    target.mkdir(parents=True, exist_ok=True)
    write_tensors(target / WEIGHTS, tensors)
    hf.write_tokenizer(target, hf.resolve(base))
    local = Path(base).expanduser()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(local.resolve()) if local.is_dir() else base,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": config.family == "gpt2",
        "target_modules": sorted(stem.split("{}.")[1] for stem in stems.values()),
    }
    write_json(target / CONFIG, settings)


def read_adapter_config(folder: epath.PathLike, config: ModelConfig) -> LoraConfig:
    """The rank, alpha and targets of a PEFT adapter for this model. InputError for kinds that the decoder has not."""
    path = Path(os.fspath(folder)).expanduser() / CONFIG
    if not path.exists():
        raise InputError(f"{path}: not found; expected a PEFT adapter's folder")
    settings = read_json(path)
    for key, plain in (("peft_type", "LORA"), ("bias", "none"), ("use_dora", False), ("use_rslora", False)):
        if settings.get(key, plain) != plain:
            raise InputError(f"{path}: {key} is {settings[key]!r}; expected {plain!r}")
    for key in _UNEVEN:
        if settings.get(key):
            raise InputError(f"{path}: {key} is set; expected the same adapter in all layers and nothing else trained")
    modules, modules_of = settings.get("target_modules"), _stems(config, PROJECTIONS, str(path), lenient=True)
    if not isinstance(modules, list):
        raise InputError(f"{path}: target_modules is {modules!r}; expected a list of module names")
    targets = tuple(
        name for name, stem in modules_of.items() if any(f".{stem}".endswith(f".{module}") for module in modules)
    )
    try:
        keys = Keys(settings)
        return LoraConfig(keys.integer("r"), keys.number("lora_alpha"), targets)
    except KeyError as error:
        raise InputError(f"{path}: key {error} is missing") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def import_adapter(folder: epath.PathLike, config: ModelConfig, mesh: Mesh | None = None) -> PyTree:
    """{"lora": tree} of a PEFT adapter, f32, for a config whose `lora` is `read_adapter_config`'s.

    Raises InputError for missing, unknown or misshapen tensors.
    """
    path = Path(os.fspath(folder)).expanduser()
    if config.lora is None:
        raise InputError(f"{path}: the config's lora is None; set it from read_adapter_config")
    if not (path / WEIGHTS).exists():
        raise InputError(f"{path / WEIGHTS}: not found; expected a PEFT adapter's safetensors")
    reader, shapes, used = Reader(path, WEIGHTS), projection_shapes(config), set()
    rank = config.lora.rank
    tree: dict[str, dict] = {}

    def read(tensor: str, shape: tuple[int, int]) -> np.ndarray:
        if tensor not in reader:
            raise InputError(f"{path / WEIGHTS}: tensor {tensor!r} is missing; expected one of shape {shape}")
        found, _ = reader.describe(tensor)
        if found != shape:
            raise InputError(f"{path / WEIGHTS}: tensor {tensor!r} has shape {found}; expected {shape}")
        used.add(tensor)
        return reader.read(tensor, (slice(0, shape[0]), slice(0, shape[1]))).astype(np.float32).T

    for name, stem in _stems(config, config.lora.targets, str(path)).items():
        inputs, outputs = shapes[name]
        modules = [_ROOT + stem.format(layer) for layer in range(config.layers)]
        a = [read(f"{module}.lora_A.weight", (rank, math.prod(inputs))).reshape(*inputs, rank) for module in modules]
        b = [read(f"{module}.lora_B.weight", (math.prod(outputs), rank)).reshape(rank, *outputs) for module in modules]
        tree.setdefault(_block(name), {})[name] = {"a": np.stack(a), "b": np.stack(b)}
    for tensor in reader:
        if tensor not in used:
            raise InputError(f"{path / WEIGHTS}: tensor {tensor!r} is unknown to a {config.family} model's adapter")
    weights = {"lora": {"layers": tree}}
    if mesh is None:
        return jax.tree.map(jnp.asarray, weights)
    return jax.device_put(weights, sharding.tree_shardings(weights, mesh))


def _block(name: str) -> str:
    return "attn" if name in ("q", "k", "v", "o") else "mlp"


def _stems(config: ModelConfig, targets, source: str, lenient: bool = False) -> dict[str, str]:
    """projection -> its module's name with {} for the layer: "model.layers.{}.self_attn.q_proj"."""
    entries = {entry.weight: entry for entry in hf_names.table(config).entries}
    stems = {}
    for name in targets:
        entry = entries.get(f"params/layers/{_block(name)}/{name}/kernel")
        if entry is not None and not any(letter.isdigit() for letters in entry.axes for letter in letters):
            stems[name] = entry.tensor.removesuffix(".weight")
        elif not lenient:
            raise InputError(f"{source}: target {name!r} has no module of its own in a {config.family} model; "
                             "merge the adapters and export whole weights")  # fmt: skip
    return stems
