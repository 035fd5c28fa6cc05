"""Takes a run's config and the folders of a stage's inputs; gives the stage its model, weights, records and rows.

A `Job` is all that a stage is handed. Weights travel as the collections that a stage trained: {"params"} or, under
LoRA, {"lora"} over the base model's frozen {"params"}, and {"head"} for reward and value models.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from mpo_jax import checkpoint, sharding
from mpo_jax.data import division, encode, sources, tokenizer
from mpo_jax.data.loader import Loader
from mpo_jax.data.schemas import TextRecord
from mpo_jax.errors import InputError
from mpo_jax.models import attention, decoder, hf, lora
from mpo_jax.models import config as model_config
from mpo_jax.models.config import LoraConfig, ModelConfig
from mpo_jax.models.presets import Preset
from mpo_jax.types import PyTree

WEIGHTS = "weights"
"""The folder, within an artifact, that holds a trained stage's final weights."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An input of a stage. kind: of the stage that made it, or "base". part: what is taken of it ("easy"), or ""."""

    name: str
    kind: str
    folder: epath.Path
    part: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """settings: the stage's own keys, all of them. config: the whole run's. folder: where its artifact goes.
    inputs: role ("init", "reference", "reward", "pairs", ...) → artifact. preset: the base model where it is known by
    its numbers alone, as a plan knows it."""

    name: str
    settings: ConfigDict
    config: ConfigDict
    folder: epath.Path
    workdir: epath.Path
    inputs: Mapping[str, Artifact]
    mesh: jax.sharding.Mesh
    preset: Preset | None = None

    @property
    def seed(self) -> int:
        """The run's seed and the stage's own: of data order and of sampling."""
        return self.config.seed + self.settings.seed

    @property
    def platform(self) -> str:
        """Of the devices that the stage runs on: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform


def key(job: Job) -> jax.Array:
    """The stage's PRNG key: from the run's seed and the stage's name, so that no two stages share one."""
    return jax.random.fold_in(jax.random.key(job.seed), zlib.crc32(job.name.encode()))


def model(job: Job) -> ModelConfig:
    """The decoder's config, for the job's mesh. InputError for what the model or a backend can't do."""
    settings = job.config.model
    if job.preset is None:
        architecture = model_config.from_folder(hf.resolve(settings.path))
    else:
        architecture = job.preset.architecture
    adapters = settings.lora
    found = dataclasses.replace(
        architecture.for_mesh(job.mesh),
        dtype=model_config.compute_dtype(settings.dtype, job.platform),
        remat=job.settings.get("remat") or settings.remat,
        lora=LoraConfig(adapters.rank, adapters.alpha, tuple(adapters.targets)) if adapters.rank else None,
    )
    device = job.mesh.devices.flat[0]
    backend = attention.choose(
        settings.attention, found, job.platform, job.mesh.size, attention.compute_capability(device)
    ).backend
    found = dataclasses.replace(found, attention=backend)
    for length in (job.config.data.multiple, job.config.data.max_length):  # what rows of the data can be long
        found.check_attention(job.platform, job.mesh.shape.get("tensor", 1), length)
    return found


def frozen_dtype(job: Job) -> str:
    """Of weights that nothing trains; there is no mixed storage. auto: as exact as what is computed with them, or a
    policy and its frozen copy would differ before the first step."""
    name, key = job.config.model.frozen_dtype, "model.frozen_dtype"
    if name == "mixed":
        raise InputError(f"{key}: 'mixed' is a way to compute; expected auto, float32 or bfloat16")
    if name == "auto" and model_config.compute_dtype(job.config.model.dtype, job.platform) == "float32":
        return "float32"
    return model_config.compute_dtype(name, job.platform, key)


def stop_ids(job: Job) -> tuple[int, ...]:
    """The base model's own stop ids."""
    return hf.read_stop_ids(hf.resolve(job.config.model.path)) if job.preset is None else job.preset.stop_ids


def base_weights(job: Job, model: ModelConfig) -> PyTree:
    """What lies beneath every policy: the base model's frozen {"params"} under LoRA, {} without."""
    if model.lora is None:
        return {}
    return hf.import_weights(job.config.model.path, model, job.mesh, frozen_dtype(job))


def load_weights(job: Job, artifact: Artifact, model: ModelConfig, dtype: str = "float32") -> PyTree:
    """The collections an artifact adds to `base_weights`, sharded over the job's mesh, in `dtype`."""
    if artifact.kind == "base":
        if model.lora is None:
            return hf.import_weights(job.config.model.path, model, job.mesh, dtype)
        return lora.init(model, jax.random.fold_in(key(job), 0), job.mesh)
    head = artifact.kind == "reward"
    abstract = abstract_weights(model, job.mesh, head=head, dtype=dtype)
    return checkpoint.restore_weights(artifact.folder / WEIGHTS, abstract)


def abstract_base(job: Job, model: ModelConfig) -> PyTree:
    """Shapes and shardings of `base_weights`."""
    if model.lora is None:
        return {}
    return abstract_weights(dataclasses.replace(model, lora=None), job.mesh, dtype=frozen_dtype(job))


def abstract_weights(model: ModelConfig, mesh, head: bool = False, dtype: str = "float32") -> PyTree:
    """Shapes and shardings of the collections that a stage trains: the trunk or the adapters, and the scalar head."""

    def shapes():
        whole = decoder.init(model, jax.random.key(0), head=head)
        if model.lora is not None:
            adapters = lora.init(model, jax.random.key(0))
            return adapters | {name: tree for name, tree in whole.items() if name != "params"}
        return without_output(whole) if head else whole

    abstract = jax.eval_shape(shapes)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=where),
        abstract,
        sharding.tree_shardings(abstract, mesh),
    )


def with_head(job: Job, model: ModelConfig, weights: PyTree) -> PyTree:
    """The weights with a scalar head in place of an output matrix: their own head, or a fresh one of small standard
    deviation."""
    weights = without_output(weights)
    if "head" in weights:
        return weights
    head = decoder.init_head(model, jax.random.fold_in(key(job), 1))
    return weights | jax.device_put(head, sharding.tree_shardings(head, job.mesh))


def without_output(weights: PyTree) -> PyTree:
    """The weights without an output matrix of their own, which a model with a scalar head never reads."""
    if "params" not in weights:
        return weights
    return weights | {"params": {name: tree for name, tree in weights["params"].items() if name != "lm_head"}}


def load_tokenizer(job: Job, model: ModelConfig):
    """The base model's tokenizer. InputError if it can name ids that the model has not."""
    folder = str(hf.resolve(job.config.model.path))
    loaded = tokenizer.load_tokenizer(folder)
    tokenizer.check_vocabulary(loaded, model.vocab_size, folder)
    return loaded


def records(job: Job, share: str, loaded_tokenizer=None) -> list[TextRecord]:
    """The text records of a share: "sft_reward", "policy" or "eval"."""
    data = job.config.data
    limit = data.limit or None
    if share == "eval" and data.eval_split:
        return sources.load(data.path, data.eval_split, loaded_tokenizer, limit)[0]
    fractions = {name: float(part) for name, part in data.shares.items()}
    if data.eval_split:
        fractions = {name: part for name, part in fractions.items() if name != "eval"}
        fractions = {name: part / sum(fractions.values()) for name, part in fractions.items()}
    read, report = sources.load(data.path, data.split, loaded_tokenizer, limit)
    if jax.process_index() == 0:
        print(report.line())
    return division.select(read, share, fractions)


def encode_rows(job: Job, model: ModelConfig, rows: list[TextRecord], replies: int, loaded_tokenizer) -> encode.Encoded:
    """Records as token rows within the config's limits, cached in the workdir."""
    data = job.config.data
    if data.max_length > model.max_positions:
        raise InputError(
            f"data.max_length: {data.max_length} is above the model's context of {model.max_positions} tokens"
        )
    limits = encode.Limits(
        data.max_length, data.max_response, max_prompt=data.max_prompt or None, too_long=data.too_long
    )
    return encode.encode(rows, loaded_tokenizer, replies, limits, _cache(job))


def share_pairs(job: Job, model: ModelConfig, loaded_tokenizer, share: str) -> encode.Encoded:
    """The pairs of a share: from the stage that made them, if the job's inputs name one, or from the data."""
    made = job.inputs.get("pairs")
    if made is not None:
        return read_rows(made.folder / share)
    return encode_rows(job, model, records(job, share, loaded_tokenizer), 2, loaded_tokenizer)


def read_rows(folder: epath.Path) -> encode.Encoded:
    """Encoded rows that a stage wrote."""
    return encode.read(local(folder))


def local(folder: epath.Path) -> Path:
    """Encoded rows are memory-mapped: InputError for a folder that no file system holds."""
    if "://" in str(folder):
        raise InputError(f"{folder}: pairs are memory-mapped; expected a workdir on a file system (mount the bucket)")
    return Path(folder)


def share_prompts(job: Job, model: ModelConfig, loaded_tokenizer, share: str) -> encode.Encoded:
    """The prompts of a share, each once, with room left for a reply within the row."""
    data = job.config.data
    rows = division.unique_prompts(records(job, share, loaded_tokenizer))
    limits = encode.Limits(data.max_length, data.max_response, max_prompt=prompt_limit(job), too_long=data.too_long)
    return encode.encode(rows, loaded_tokenizer, 0, limits, _cache(job))


def prompt_limit(job: Job) -> int:
    """Tokens of a prompt that replies are sampled to: max_prompt, or what one reply leaves of a row."""
    data = job.config.data
    return data.max_prompt or data.max_length - data.max_response


def _cache(job: Job) -> str | None:
    """Where encoded rows are kept; memory-mapped, so on a local disk only."""
    return str(job.workdir / "cache") if job.config.data.cache and "://" not in str(job.workdir) else None


def loader(job: Job, encoded: encode.Encoded, batch_size: int, **options) -> Loader:
    """Batches of encoded rows on the job's mesh, in the config's buckets."""
    data = job.config.data
    return Loader(
        encoded,
        batch_size,
        **(
            {
                "seed": job.seed,
                "max_buckets": data.max_buckets,
                "multiple": data.multiple,
                "max_length": data.max_length,
            }
            | options
        ),
        mesh=job.mesh,
    )


def write_json(path: epath.Path, value: Any) -> None:
    """A small JSON file, whole or not at all; process 0 alone writes it."""
    if jax.process_index() == 0:
        checkpoint.write_json(path, value)
