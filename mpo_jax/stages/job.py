"""Takes a run's settings and the folders of a stage's inputs; gives the stage its model, weights, records and rows.

A `Job` is all that a stage is handed. Weights travel as the collections that a stage trained: {"params"} or, under
LoRA, {"lora"} over the base model's frozen {"params"}, and {"head"} for reward and value models.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
from etils import epath

from mpo_jax import artifacts, checkpoint, sharding
from mpo_jax.artifacts import BASE, POLICY, REWARD
from mpo_jax.data import division, encode, mixture, reading, shares, sources, template, tokenizer
from mpo_jax.data import records as text_records
from mpo_jax.data.account import Account
from mpo_jax.data.loader import Loader
from mpo_jax.data.reading import Reading
from mpo_jax.data.records import TextRecord
from mpo_jax.errors import InputError
from mpo_jax.models import attention, decoder, hf, lora, parameters
from mpo_jax.models import config as model_config
from mpo_jax.models.config import LoraConfig, ModelConfig
from mpo_jax.models.presets import Preset
from mpo_jax.run import Data, Run, StageSettings, sources_of
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
    preset: the base model where it is known by its numbers alone, as a plan knows it. accounts: of the data that the
    stage has read so far."""

    name: str
    settings: S
    config: Run
    folder: epath.Path
    workdir: epath.Path
    inputs: Mapping[str, Any]
    mesh: jax.sharding.Mesh
    preset: Preset | None = None
    accounts: list[Account] = dataclasses.field(default_factory=list, compare=False)

    @property
    def seed(self) -> int:
        """The run's seed and the stage's own: of data order and of sampling."""
        return self.config.seed + self.settings.seed

    @property
    def platform(self) -> str:
        """Of the devices that the stage runs on: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform

    def error(self, setting: str, told: str) -> InputError:
        """What is wrong with one of the stage's settings, by its whole key."""
        return InputError(f"stages.{self.name}.{setting}: {told}")


def base_artifact(job: Job) -> Artifact:
    """The run's base model, as an artifact."""
    return Artifact(BASE, POLICY, epath.Path(job.config.model.path))


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
    device = job.mesh.devices.flat[0]
    backend = attention.choose(
        settings.attention, config, job.platform, job.mesh.size, attention.compute_capability(device)
    ).backend
    config = dataclasses.replace(config, attention=backend)
    for length in (job.config.data.multiple, job.config.data.max_length):  # what rows of the data can be long
        config.check_attention(job.platform, job.mesh.shape.get("tensor", 1), length)
    return config


def frozen_dtype(job: Job) -> str:
    """Of weights that nothing trains; there is no mixed storage. auto: as exact as what is computed with them, or a
    policy and its frozen copy would differ before the first step."""
    settings = job.config.model
    if settings.frozen_dtype == "int8":
        return "int8"
    if settings.frozen_dtype == "auto" and model_config.compute_dtype(settings.dtype, job.platform) == "float32":
        return "float32"
    return model_config.compute_dtype(job.config.model.frozen_dtype, job.platform, "model.frozen_dtype")


def stop_ids(job: Job) -> tuple[int, ...]:
    """What ends a reply: the base model's own stop ids, and whatever ends a reply in training data."""
    if job.preset is not None:
        return job.preset.stop_ids
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


def load_weights(job: Job, artifact: Artifact, model: ModelConfig, dtype: str = "float32") -> PyTree:
    """The collections an artifact adds to `base_weights`, sharded over the job's mesh, in `dtype`."""
    if artifact.name == BASE:
        if model.lora is None:
            return _narrowed(model, hf.import_weights(job.config.model.path, model, job.mesh, dtype), dtype)
        return lora.init(model, jax.random.fold_in(key(job), 0), job.mesh)
    stored = "bfloat16" if dtype == "int8" else dtype
    abstract = abstract_weights(model, job.mesh, head=artifact.produces == REWARD, dtype=stored)
    return _narrowed(model, checkpoint.restore_weights(artifact.folder / artifacts.WEIGHTS, abstract), dtype)


def _narrowed(model: ModelConfig, weights: PyTree, dtype: str) -> PyTree:
    """Weights as read, in eight bits where they are to be."""
    return parameters.frozen_copy(model, weights, dtype) if dtype == "int8" else weights


def save_weights(job: Job, weights: PyTree, name: str = artifacts.WEIGHTS) -> None:
    """Leaves a stage's final weights in its folder."""
    checkpoint.save_weights(job.folder / name, weights)


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
    placed = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        sharding.tree_shardings(abstract, mesh),
    )
    return parameters.frozen_copy(model, placed, dtype)


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


def records(job: Job, share: str, loaded_tokenizer=None, source: str = "", labelled: bool = False) -> list[TextRecord]:
    """The text records of a source's share: "sft_reward", "policy", "select" or "report"; process 0 prints the account
    of what was read. A prompt that another source of the stage holds out is left out too. labelled: see `Reading`."""
    data = job.config.data
    whole = data_division(data, source)
    assert whole.reading is not None
    whole = dataclasses.replace(whole, reading=dataclasses.replace(whole.reading, labelled=labelled))
    with reading.of_source(source):
        read, account = shares.read_share(whole, share, loaded_tokenizer)
        others = (
            [name for name in sources_of(job.settings) if name != source]
            if share not in (division.SELECT, division.REPORT)
            else []
        )
        kept = division.without(read, [each for name in others for each in _heldout(data, name, loaded_tokenizer)])
        if not kept:
            raise InputError(f"{account.source}: every prompt is held out by another source of stages.{job.name}.data")
        account = account.of_share(share, len(kept), account.overlap + len(read) - len(kept))
    say(account.text())
    job.accounts.append(account)
    return kept


def _heldout(data: Data, source: str, loaded_tokenizer) -> list[TextRecord]:
    """The records that a source holds out by a split of their own; those of the eval share are everywhere the same."""
    whole = data_division(data, source)
    if not whole.eval_split:
        return []
    with reading.of_source(source):
        return sources.load(whole.path, whole.eval_split, loaded_tokenizer, whole.limit, whole.reading)[0]


def check_data(data: Data, names: Iterable[str]) -> None:
    """InputError for what is wrong with the files of the sources named: their splits, their forms, their columns."""
    for name in names:
        whole = data_division(data, name)
        with reading.of_source(name):
            for split in filter(None, (whole.split, whole.eval_split)):
                sources.check(whole.path, split, whole.limit, whole.reading)


def data_division(data: Data, source: str = "") -> shares.Division:
    """How the data, or a named source, is read and divided. InputError for settings of it that can't be meant."""
    read = data.sources[source] if source else data
    with reading.of_source(source):
        how = Reading.of(plain(read))
    return shares.Division(read.path, read.split, read.eval_split, dict(data.shares), read.limit or None, how)


def share_rows(job: Job, model: ModelConfig, loaded_tokenizer, share: str, replies: int) -> encode.Encoded:
    """The rows of a share, of the data that the stage names; training draws those of several sources by weight."""
    return _of_sources(job, share, loaded_tokenizer, lambda rows, shown: encode_rows(job, model, rows, replies, shown))


def share_labelled(job: Job, model: ModelConfig, loaded_tokenizer, share: str) -> encode.Encoded:
    """Rows of one reply each with its label (1: good, 0: bad), as unpaired objectives take them: replies that the data
    labels, and of pairs the chosen as a good one, the rejected as a bad one. InputError for replies without either."""

    def make(read: list[TextRecord], shown) -> encode.Encoded:
        return encode_rows(job, model, text_records.labelled(read), 1, shown)

    return _of_sources(job, share, loaded_tokenizer, make, labelled=True)


def _of_sources(
    job: Job,
    share: str,
    loaded_tokenizer,
    make: Callable[[list[TextRecord], Any], encode.Encoded],
    labelled: bool = False,
) -> encode.Encoded:
    """`make` of the records of each source that the stage names, and of the tokenizer with its template; all mixed.
    labelled: see `Reading`."""
    weights = sources_of(job.settings) or {"": 1.0}
    parts = []
    for name in weights:
        shown = dressed(job, loaded_tokenizer, name)
        parts.append(make(records(job, share, shown, name, labelled), shown))
    try:
        return parts[0] if len(parts) == 1 else mixture.mix(parts, list(weights.values()))
    except InputError as error:
        raise job.error("data", str(error)) from None


def said(job: Job, loaded_tokenizer) -> dict[int, TextRecord]:
    """What the data says of every prompt, by the prompt's id: its first record, of the sources that the stage reads, or
    else of all that the run does. Ids are given within a share; one that two prompts have is left out."""
    named = sources_of(job.settings) or {name: 1.0 for each in job.config.stages.values() for name in sources_of(each)}
    found: dict[int, TextRecord] = {}
    twice: set[int] = set()
    for part in (part for name in named for part in _parts(job, loaded_tokenizer, name)):
        numbers = division.prompt_ids([record.prompt_key for record in part]).tolist()
        for number, record in zip(numbers, part, strict=True):
            if found.setdefault(number, record).prompt_key != record.prompt_key:
                twice.add(number)
    return {number: record for number, record in found.items() if number not in twice}


def _parts(job: Job, loaded_tokenizer, source: str) -> list[list[TextRecord]]:
    """The first record of every prompt of a source, share by share."""
    data = data_division(job.config.data, source)
    shown = dressed(job, loaded_tokenizer, source)
    with reading.of_source(source):
        heldout, kept = [], sources.load(data.path, data.split, shown, data.limit, data.reading)[0]
        if data.eval_split:
            heldout = sources.load(data.path, data.eval_split, shown, data.limit, data.reading)[0]
    taken = {record.first_turn for record in heldout}
    parts: dict[str, list[TextRecord]] = {}
    for record in division.unique_prompts([*heldout, *kept]):
        parts.setdefault(shares.share_of(record, data, taken), []).append(record)
    return list(parts.values())


def encode_rows(job: Job, model: ModelConfig, rows: list[TextRecord], replies: int, loaded_tokenizer) -> encode.Encoded:
    """Records as token rows within the config's limits, cached in the workdir."""
    data = job.config.data
    limits = encode.Limits(
        data.max_length, data.max_response, max_prompt=data.max_prompt or None, too_long=data.too_long
    )
    return _encode(job, rows, loaded_tokenizer, replies, limits)


def _encode(job: Job, rows: list[TextRecord], loaded_tokenizer, replies: int, limits: encode.Limits) -> encode.Encoded:
    """The rows of records that were read last, whose account says what became of them."""
    encoded = encode.encode(rows, loaded_tokenizer, replies, limits, _cache(job))
    if job.accounts:
        job.accounts[-1] = job.accounts[-1].with_rows(encoded.counts)
        say(job.accounts[-1].text().split("\n")[-1])
    return encoded


def share_pairs(job: Job, model: ModelConfig, loaded_tokenizer, share: str) -> encode.Encoded:
    """The pairs of a share: from the stage that made them, if the job's inputs name one, or from the data."""
    if "pairs" in job.inputs:
        return read_rows(job.inputs["pairs"].folder / share)
    return share_rows(job, model, loaded_tokenizer, share, 2)


def read_rows(folder: epath.Path) -> encode.Encoded:
    """Encoded rows that a stage wrote."""
    return encode.read(local(folder))


def write_rows(encoded: encode.Encoded, folder: epath.Path) -> None:
    """Encoded rows, over what a killed run may have left; process 0 alone writes them."""
    if not is_first():
        return
    if folder.exists():
        folder.rmtree()
    encode.write(encoded, local(folder))


def local(folder: epath.Path) -> Path:
    """Encoded rows are memory-mapped: InputError for a folder that no file system holds."""
    if artifacts.is_remote(folder):
        raise InputError(f"{folder}: pairs are memory-mapped; expected a workdir on a file system (mount the bucket)")
    return Path(folder)


def share_prompts(job: Job, model: ModelConfig, loaded_tokenizer, share: str) -> encode.Encoded:
    """The prompts of a share, each once, with room left for a reply within the row."""
    data = job.config.data
    limits = encode.Limits(data.max_length, data.max_response, max_prompt=prompt_limit(job), too_long=data.too_long)
    return _of_sources(
        job,
        share,
        loaded_tokenizer,
        lambda rows, shown: _encode(job, division.unique_prompts(rows), shown, 0, limits),
    )


def prompt_limit(job: Job) -> int:
    """Tokens of a prompt that replies are sampled to: max_prompt, or what one reply leaves of a row."""
    data = job.config.data
    return data.max_prompt or data.max_length - data.max_response


def _cache(job: Job) -> str | None:
    """Where encoded rows are kept; memory-mapped, so on a local disk only."""
    return (
        str(job.workdir / artifacts.CACHE) if job.config.data.cache and not artifacts.is_remote(job.workdir) else None
    )


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
        print(line, flush=True)


def check_batch(job: Job, rows: int, setting: str = "batch_size") -> None:
    """InputError where the mesh does not divide a batch."""
    try:
        sharding.check_batch(rows, job.mesh, setting)
    except InputError as error:
        raise InputError(f"stages.{job.name}.{error}") from None


def check(job: Job) -> None:
    """InputError for what no stage of the run can do: rows beyond the model's context, attention that its backend can't
    compute. Nothing is loaded."""
    decoder_config, data = model(job), job.config.data
    if frozen_dtype(job) == "int8" and job.mesh.size > 1:
        raise InputError(f"model.frozen_dtype: int8 is for one device; found {job.mesh.size}")
    for name, read in {"": data, **data.sources}.items():
        data_division(data, name)
        if read.end_of_turn and job.preset is None:
            dressed(job, tokenizer.load_tokenizer(str(hf.resolve(job.config.model.path))), name)
    if data.max_length > decoder_config.max_positions:
        raise InputError(
            f"data.max_length: {data.max_length} is above the model's context of {decoder_config.max_positions} tokens"
        )
