"""Takes a run's settings and the folders of a stage's inputs; gives the stage its model, weights, records and rows.

A `Job` is all that a stage is handed. Weights travel as the collections that a stage trained: {"params"} or, under
LoRA, {"lora"} over the base model's frozen {"params"}, and {"head"} for reward and value models.
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import jax
from etils import epath

from mpo_jax import artifacts, progress, sharding
from mpo_jax.artifacts import BASE, POLICY, REWARD
from mpo_jax.data import encode, reading, shares, template, tokenizer
from mpo_jax.data.account import Account
from mpo_jax.data.loader import Loader
from mpo_jax.data.reading import Reading
from mpo_jax.errors import InputError
from mpo_jax.models import attention, decoder, hf, lora, parameters
from mpo_jax.models import config as model_config
from mpo_jax.models.config import LoraConfig, ModelConfig
from mpo_jax.models.presets import Preset
from mpo_jax.run import Data, Run, StageMesh, StageSettings, sources_of
from mpo_jax.settings import plain
from mpo_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An input of a stage. produces: what it is, see `artifacts`. part: what is taken of it ("easy"), or ""."""

    name: str
    produces: str
    folder: epath.Path
    part: str = ""


S = TypeVar("S", bound=StageSettings, covariant=True)


@dataclasses.dataclass(frozen=True)
class Job(Generic[S]):
    """settings: the stage's own. config: the whole run's. folder: where its artifact goes.
    inputs: role ("init", "reference", "reward", "pairs", ...) → artifact, or the list of them where it takes several.
    preset: the base model where it is known by its numbers alone, as a plan knows it. planned: its settings are looked
    at, but it does not run: then no tokenizer is loaded. accounts: of the data that the stage has read so far."""

    name: str
    settings: S
    config: Run
    folder: epath.Path
    workdir: epath.Path
    inputs: Mapping[str, Any]
    mesh: jax.sharding.Mesh
    preset: Preset | None = None
    planned: bool = False
    accounts: list[Account] = dataclasses.field(default_factory=list, compare=False)

    @property
    def seed(self) -> int:
        """The run's seed and the stage's own: of data order and of sampling."""
        return self.config.seed + self.settings.seed

    @property
    def platform(self) -> str:
        """Of the devices that the stage runs on: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform

    @functools.cached_property
    def made(self) -> dict[Any, Any]:
        """What is made once for this job, by its key; a job that is `dataclasses.replace`d has its own."""
        return {}

    def error(self, setting: str, told: str) -> InputError:
        """What is wrong with one of the stage's settings, by its whole key."""
        return InputError(f"stages.{self.name}.{setting}: {told}")


def base_artifact(job: Job) -> Artifact:
    """The run's base model, as an artifact."""
    return Artifact(BASE, POLICY, epath.Path(job.config.model.path))


def making(artifact: Artifact) -> list[str]:
    """What an input's weights are, within a stage's folder, which belongs to one base model: the artifact's folder, and
    which making of it lies there."""
    if artifact.name == BASE:
        return [BASE]
    manifest = artifacts.read_manifest(artifact.folder) or {}
    return [artifact.folder.name, manifest.get("made", "")]


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
    return computed(
        job, architecture, LoraConfig(adapters.rank, adapters.alpha, adapters.targets) if adapters.rank else None
    )


def computed(job: Job, architecture: ModelConfig, adapters: LoraConfig | None = None) -> ModelConfig:
    """A model's config as the job's mesh computes it, by the run's settings. InputError for what a backend can't do."""
    settings = job.config.model
    config = dataclasses.replace(
        architecture.for_mesh(job.mesh),
        dtype=model_config.compute_dtype(settings.dtype, job.platform),
        remat=getattr(job.settings, "remat", "") or settings.remat,
        lora=adapters,
    )
    capability = attention.compute_capability(job.mesh.devices.flat[0])
    backend = attention.choose(settings.attention, config, job.platform, job.mesh.size, capability).backend
    config = dataclasses.replace(config, attention=backend)
    for length in (job.config.data.multiple, job.config.data.max_length):  # what rows of the data can be long
        config.check_attention(job.platform, job.mesh.shape.get("tensor", 1), length, capability)
    return config


def frozen_dtype(job: Job) -> str:
    """Of weights that nothing trains; there is no mixed storage. auto: as exact as what is computed with them, or a
    policy and its frozen copy would differ before the first step; float32 on a CPU."""
    settings = job.config.model
    if settings.frozen_dtype == "int8":
        return "int8"
    if settings.frozen_dtype == "auto":
        exact = job.platform == "cpu" or model_config.compute_dtype(settings.dtype, job.platform) == "float32"
        return "float32" if exact else "bfloat16"
    return model_config.compute_dtype(settings.frozen_dtype, job.platform, "model.frozen_dtype")


def stop_ids(job: Job) -> tuple[int, ...]:
    """What ends a reply: the base model's own stop ids, and whatever ends a reply in training data. () of a job that is
    only planned, see `check_tokenizer`."""
    if job.preset is not None:
        return job.preset.stop_ids
    if job.planned:
        return ()
    folder = str(hf.resolve(job.config.model.path))
    loaded, own = tokenizer.load_tokenizer(folder), hf.read_stop_ids(folder)
    ends = [tokenizer.stop_ids(dressed(job, loaded, name), own) for name in ("", *sources_of(job.settings))]
    return tuple(sorted(set().union(*ends)))


def base_weights(job: Job, model: ModelConfig) -> PyTree:
    """What lies beneath every policy: the base model's frozen {"params"} under LoRA, {} without."""
    if model.lora is None:
        return {}
    return _narrowed(
        model, hf.import_weights(job.config.model.path, model, job.mesh, frozen_dtype(job)), frozen_dtype(job)
    )


def load_weights(
    job: Job, artifact: Artifact, model: ModelConfig, dtype: str = "float32", name: str = artifacts.WEIGHTS
) -> PyTree:
    """The collections an artifact adds to `base_weights`, sharded over the job's mesh, in `dtype`. name: which of the
    weights in its folder."""
    if artifact.name == BASE:
        if model.lora is None:
            return _narrowed(model, hf.import_weights(job.config.model.path, model, job.mesh, dtype), dtype)
        return lora.init(model, jax.random.fold_in(key(job), 0), job.mesh)
    from mpo_jax import checkpoint  # see `save_weights`

    stored = "bfloat16" if dtype == "int8" else dtype
    abstract = abstract_weights(model, job.mesh, head=artifact.produces == REWARD, dtype=stored)
    return _narrowed(model, checkpoint.restore_weights(artifact.folder / name, abstract), dtype)


def _narrowed(model: ModelConfig, weights: PyTree, dtype: str) -> PyTree:
    """Weights as read, in eight bits where they are to be."""
    return parameters.frozen_copy(model, weights, dtype) if dtype == "int8" else weights


def save_weights(job: Job, weights: PyTree, name: str = artifacts.WEIGHTS) -> None:
    """Leaves a stage's final weights in its folder."""
    from mpo_jax import checkpoint  # Orbax is a tenth of a command's start, and only stages that run need it

    checkpoint.save_weights(job.folder / name, weights)


def abstract_base(job: Job, model: ModelConfig) -> PyTree:
    """Shapes and shardings of `base_weights`."""
    if model.lora is None:
        return {}
    return abstract_weights(dataclasses.replace(model, lora=None), job.mesh, dtype=frozen_dtype(job))


def abstract_weights(model: ModelConfig, mesh, head: bool = False, dtype: str = "float32") -> PyTree:
    """Shapes and shardings of the collections that a stage trains: the trunk or the adapters, and the scalar head."""
    abstract = _weight_shapes(model, head)
    placed = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        sharding.tree_shardings(abstract, mesh),
    )
    return parameters.frozen_copy(model, placed, dtype)


@functools.cache
def _weight_shapes(model: ModelConfig, head: bool) -> PyTree:
    """Shapes of the collections of `abstract_weights`. To trace a model's beginning takes a third of a second, and a
    stage asks for its shapes several times."""

    def shapes():
        whole = decoder.init(model, jax.random.key(0), head=head)
        if model.lora is not None:
            adapters = lora.init(model, jax.random.key(0))
            return adapters | {name: tree for name, tree in whole.items() if name != "params"}
        return without_output(whole) if head else whole

    return jax.eval_shape(shapes)


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
    """The base model's tokenizer, with the run's chat template. InputError if it can name ids that the model has
    not."""
    folder = str(hf.resolve(job.config.model.path))
    loaded = tokenizer.load_tokenizer(folder)
    tokenizer.check_vocabulary(loaded, model.vocab_size, folder)
    return dressed(job, loaded)


def dressed(job: Job, loaded_tokenizer, source: str = ""):
    """The tokenizer with the chat template of the data, or of a named source."""
    data = job.config.data
    read = data.sources[source] if source else data
    with reading.of_source(source):
        return template.dressed(loaded_tokenizer, read.template, read.end_of_turn)


def data_division(data: Data, source: str = "") -> shares.Division:
    """How the data, or a named source, is read and divided. InputError for settings of it that can't be meant."""
    read = data.sources[source] if source else data
    with reading.of_source(source):
        how = Reading.of(plain(read))
    return shares.Division(read.path, read.split, read.eval_split, dict(data.shares), read.limit or None, how)


def prompt_limit(job: Job) -> int:
    """Tokens of a prompt that replies are sampled to: max_prompt, or what one reply leaves of a row."""
    data = job.config.data
    return data.max_prompt or data.max_length - data.max_response


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


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Prints a line, once for all processes."""
    if is_first():
        progress.say(line)


def check_batch(job: Job, rows: int, setting: str = "batch_size") -> None:
    """InputError where the mesh does not divide a batch."""
    try:
        sharding.check_batch(rows, job.mesh, setting)
    except InputError as error:
        raise InputError(f"stages.{job.name}.{error}") from None


def check(job: Job) -> None:
    """InputError for what no stage of the run can do on the job's mesh: rows beyond the model's context, attention that
    its backend can't compute, weights that the mesh does not divide. Nothing is loaded."""
    decoder_config, data = model(job), job.config.data
    _check_division(job, decoder_config)
    if frozen_dtype(job) == "int8" and job.mesh.size > 1:
        raise InputError(f"model.frozen_dtype: int8 is for one device; found {job.mesh.size}")
    for name in ("", *data.sources):
        data_division(data, name)
    if data.max_length > decoder_config.max_positions:
        raise InputError(
            f"data.max_length: {data.max_length} is above the model's context of {decoder_config.max_positions} tokens"
        )


def _check_division(job: Job, model: ModelConfig) -> None:
    """InputError, by the axis, where the mesh does not divide what `sharding.weight_spec` spreads over it."""
    key = "mesh" if job.settings.mesh == StageMesh() else f"stages.{job.name}.mesh"
    tensor, fsdp = (job.mesh.shape[axis] for axis in ("tensor", "fsdp"))
    spread = [
        ("fsdp", fsdp, "width", model.width),
        ("tensor", tensor, "heads", model.heads),
        ("tensor", tensor if model.kv_heads >= tensor else 1, "key-value heads", model.kv_heads),
        ("tensor", tensor, "feed-forward", model.mlp_width),
    ]
    for axis, shards, name, size in spread:
        if size % shards:
            raise InputError(f"{key}.{axis}: {shards} does not divide the model's {name} of {size}")


def check_tokenizer(job: Job) -> None:
    """InputError for a tokenizer that can't be used: it can't be loaded, it or the model's stop ids name tokens that
    the model has not, or it has no such end of turn as the data names. `check` leaves that out: to import
    `transformers` takes longer than all else that the start of a finished run does."""
    decoder_config = model(job)
    loaded = load_tokenizer(job, decoder_config)
    for name in job.config.data.sources:
        dressed(job, loaded, name)
    outside = [stop for stop in stop_ids(job) if not 0 <= stop < decoder_config.vocab_size]
    if outside:
        raise InputError(f"stop_ids: {outside} outside the vocabulary; expected ids below {decoder_config.vocab_size}")
