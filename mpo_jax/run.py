"""A config enters, as plain values; the settings of a run leave, checked: its model, mesh, data and stages.

What a kind of stage can be set to stands in its own file (`mpo_jax/stages/`); here is what all stages share.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import annotated_types
import pydantic

from mpo_jax import settings
from mpo_jax.artifacts import DATA
from mpo_jax.data.reading import CONSTANTS, RANKED, ROLES, SYSTEMS
from mpo_jax.data.templates import BUILT_IN
from mpo_jax.errors import InputError
from mpo_jax.models.config import ATTENTION_SETTINGS, PROJECTIONS, REMAT_POLICIES
from mpo_jax.scorers.limits import Limits
from mpo_jax.settings import Amount, Count, Names, Positive, Section, Seed, Share, Whole, setting

Remat = Literal[REMAT_POLICIES]  # type: ignore[valid-type]
Attention = Literal[ATTENTION_SETTINGS]  # type: ignore[valid-type]
Projections = Annotated[
    tuple[Literal[PROJECTIONS], ...],  # type: ignore[valid-type]
    settings.LISTS,
]
AxisSize = Annotated[int, annotated_types.Interval(ge=-1, le=settings.LARGEST)]


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

    rank: Whole = setting(0, "rank of the adapters; 0: full fine-tuning")
    alpha: Positive = setting(16.0, "the adapters' product is scaled by alpha / rank")
    targets: Projections = setting(("q", "k", "v", "o"), "projections that get adapters", min_length=1)


class Model(Section):
    """The base model, and how it is computed."""

    path: str = setting(
        "", "the base model: a Hugging Face folder, here or at gs://, or a hub id", operational=True, min_length=1
    )
    dtype: Literal["auto", "float32", "bfloat16", "mixed"] = setting(
        "auto", "of computation; auto: bfloat16 on accelerators; on a CPU mixed where it has AVX512-BF16, else float32"
    )
    frozen_dtype: Literal["auto", "float32", "bfloat16", "int8"] = setting(
        "auto",
        "of frozen weights; auto: float32 on a CPU or where dtype is, else bfloat16; int8: projections in eight bits, "
        "on one device; the reference is then not quite the policy that it is a copy of",
    )
    remat: Remat = setting(
        "none", "what is computed again in the backward pass; full keeps a layer's input, dots matrix products too",
        operational=True,
    )  # fmt: skip
    attention: Attention = setting(
        "auto",
        "how attention is computed; auto: cudnn on a GPU that can, else xla; flash: Pallas splash on a TPU, rows in "
        "multiples of 128",
        operational=True,
    )
    lora: Lora = Lora()


class Mesh(Section):
    """How the devices are divided; -1: what the other axes leave of them."""

    data: AxisSize = setting(
        1, "copies of the model; batches are divided among them; over several TPU slices a multiple of their number",
        unit="devices",
    )  # fmt: skip
    fsdp: AxisSize = setting(-1, "shards of weights and batches", unit="devices")
    tensor: AxisSize = setting(1, "shards of heads, feed-forward and vocabulary", unit="devices")

    @pydantic.model_validator(mode="after")
    def _sizes(self):
        sizes = dict(self)
        for name, size in sizes.items():
            if size == 0:
                raise settings.wrong(name, "0; expected a number of devices, or -1 for what the other axes leave")
        if list(sizes.values()).count(-1) > 1:
            raise settings.wrong("fsdp", f"{sizes}; expected at most one -1")
        return self


class Shares(Section):
    """How prompts are divided, by the hash of each: no prompt stands in two shares. Ours: the paper publishes none."""

    # In this order the shares lie along the hash: another would give every prompt's share to others.
    eval: Share = setting(0.1, "held out: half of it selects checkpoints, half is reported on")
    policy: Share = setting(0.45, "for the split, DPO and PPO")
    sft_reward: Share = setting(0.45, "for SFT and the reward model")

    @pydantic.model_validator(mode="after")
    def _whole(self):
        total = sum(dict(self).values())
        if abs(total - 1) > 1e-6:
            raise settings.wrong("eval", f"shares {dict(self)}; expected parts that add up to 1, found {total:g}")
        return self


ShareName = Literal["sft_reward", "policy"]


Columns: Any = pydantic.create_model(
    "Columns",
    __base__=Section,
    __doc__="The file's own names for columns; empty: the role's own.",
    **{role: (str, setting("", help)) for role, help in ROLES.items()},
)  # type: ignore[call-overload]


Constants: Any = pydantic.create_model(
    "Constants",
    __base__=Section,
    __doc__="Texts that all rows have in common.",
    **{role: (str, setting("", f"{ROLES[role]}, the same for every row")) for role in CONSTANTS},
)  # type: ignore[call-overload]


class Source(Section):
    """Where records are read, and how."""

    path: str = setting("", "the data: a file or folder, here or at gs://, tfds:name or a hub name", operational=True)
    split: str = setting("train", "the split that is read; all: every one", min_length=1)
    eval_split: str = setting(
        "", "a split of its own that is held out, halved as eval is; empty: the eval share of `split`"
    )
    limit: Whole = setting(0, "records read; 0: all", unit="records")
    columns: Columns = Columns()
    constants: Constants = Constants()
    ignore: Names = setting((), "columns that look as if they meant something, and are to be left unread")
    keep: Names = setting(
        (), "columns, by the file's names, that python: scorers are told of: a reference answer, say", later=True
    )
    template: str = setting(
        "auto",
        "auto: conversations by the chat template, where the tokenizer has one; plain: all in HH's form; chat: plain "
        f"prompts are a user's turn too; or another template: {', '.join(BUILT_IN)}, a Jinja file, or its text",
        min_length=1,
    )
    end_of_turn: str = setting("", "the token that ends a reply in a chat; empty: what the template writes after one")
    template_kwargs: dict[str, Any] = setting({}, "the chat template's own settings")
    system: Literal[SYSTEMS] = setting(  # type: ignore[valid-type]
        "turn", "where a system text stands: a turn of its own, or the beginning of the first user's"
    )
    common_prompt: bool = setting(False, "pairs without a prompt column: what both replies begin with is the prompt")
    ranked: Literal[RANKED] = setting(  # type: ignore[valid-type]
        "best_worst", "which of a row's ranked replies are paired: best and worst, every two, or neighbours in rank"
    )


class Data(Source):
    """The preference data, and the lengths of rows."""

    sources: dict[str, Source] = setting(
        {},
        "further data by name, each with those of the settings above that it has otherwise; a stage names it in `data`",
    )
    shares: Shares = Shares()
    max_length: Count = setting(512, "length of a row: prompt and all replies", unit="tokens")
    max_response: Count = setting(128, "length of one reply, its end included", unit="tokens")
    max_prompt: Whole = setting(0, "length of a prompt, its latest part kept; 0: what the replies leave", unit="tokens")
    too_long: Literal["truncate", "drop"] = setting("truncate", "what becomes of a row that is too long")
    max_buckets: Count = setting(8, "row lengths that a step is compiled for")
    multiple: Count = setting(8, "what row lengths are a multiple of; flash attention needs 128", unit="tokens")
    cache: bool = setting(True, "keep encoded rows in WORKDIR/cache", operational=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _inherited(cls, values: Any) -> Any:
        """A named source has the data's own setting wherever it gives none (None is none: a config's placeholder)."""
        named = values.get("sources") if isinstance(values, Mapping) else None
        if not isinstance(named, Mapping):
            return values
        own = {name: values[name] for name in Source.model_fields if name in values}
        return {**values, "sources": {name: _over(own, given) for name, given in named.items()}}

    @pydantic.model_validator(mode="after")
    def _names(self):
        for name, source in self.sources.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise settings.wrong("sources", f"{name!r}; expected a name of letters, digits, '_' and '-'")
            if not source.path:
                raise settings.wrong("sources", f"{name!r} has no path; expected its data.sources.{name}.path")
        return self

    @pydantic.model_validator(mode="after")
    def _lengths(self):
        if self.max_response >= self.max_length:
            raise settings.wrong(
                "max_response", f"{self.max_response}; expected below max_length {self.max_length}: a prompt needs room"
            )
        if self.max_prompt >= self.max_length:
            raise settings.wrong("max_prompt", f"{self.max_prompt}; expected below max_length {self.max_length}")
        return self


def _over(own: Any, given: Any) -> Any:
    """What is given, over what is inherited, section by section."""
    if isinstance(own, Section):
        own = {name: getattr(own, name) for name in type(own).model_fields}
    if not isinstance(own, Mapping) or not isinstance(given, Mapping):
        return own if given is None else given
    changed = {name: _over(own.get(name), value) for name, value in given.items() if value is not None}
    return {**own, **changed}


class StageMesh(Section):
    """Another division of the run's devices, for one stage."""

    data: AxisSize = setting(0, "as mesh.data, for this stage; 0: the run's", unit="devices", operational=True)
    fsdp: AxisSize = setting(0, "as mesh.fsdp, for this stage; 0: the run's", unit="devices", operational=True)
    tensor: AxisSize = setting(0, "as mesh.tensor, for this stage; 0: the run's", unit="devices", operational=True)


class StageSettings(Section):
    """What every kind of stage has."""

    kind: str = ""
    seed: Seed = setting(0, "added to the run's, for a stage of another seed in the same run")
    mesh: StageMesh = setting(StageMesh(), "how the run's devices are divided for the stage", operational=True)


def sources_of(stage: StageSettings) -> dict[str, float]:
    """Source -> weight, of what a stage reads of the data; "" is the run's own. {} where it reads none: its kind does
    not, or all its rows come from other stages."""
    given: Any = getattr(stage, "data", None)
    roles = [name for name, role in settings.roles(type(stage)).items() if role.data]
    own = (
        not roles or any(getattr(stage, name) in ("", DATA) for name in roles) or getattr(stage, "samples_pairs", False)
    )
    if given is None or not own:
        return {}
    return {given: 1.0} if isinstance(given, str) else dict(sorted(given.items()))  # a config's order means nothing


class Run(Section):
    """All settings of a run. stages: name -> the settings of its kind, in the order of the config."""

    name: str = setting("mpo", "of the run, shown in its reports", min_length=1)
    seed: Seed = setting(0, "of data order, sampling and fresh weights")
    shard_seconds: Amount = setting(
        60.0, "how often stages write down what long loops have computed, which a kill then can't take; 0: every batch",
        unit="seconds", operational=True,
    )  # fmt: skip
    plugins: Names = setting((), "modules that register kinds, objectives, estimators or scorers of their own")
    model: Model = Model()
    mesh: Mesh = Mesh()
    data: Data = Data()
    scorers: Limits = Limits()
    stages: dict[str, Any] = {}  # noqa: RUF012, pydantic copies it


def mesh_of(run: Run, stage: StageSettings) -> dict[str, int]:
    """Axis -> its size in a stage's mesh: its own, and where it gives none the run's."""
    own = dict(stage.mesh)
    return {axis: own[axis] or size for axis, size in dict(run.mesh).items()}


def parse(values: Mapping[str, Any], kinds: Mapping[str, type[StageSettings]], from_json: bool = False) -> Run:
    """The run that a config's plain values describe. kinds: the settings of every kind of stage.

    InputError, each line with its whole key, for all that is wrong with any setting of any stage.
    """
    told: list[str] = []
    rest = dict(values)
    declared = rest.pop("stages", {})
    if not isinstance(declared, Mapping):
        raise InputError(f"stages: {declared!r}; expected stages by name")
    whole = None
    try:
        whole = settings.parse(Run, rest, from_json=from_json)
    except InputError as error:
        told.append(str(error))
    stages = {}
    for name, given in declared.items():
        where = f"stages.{name}"
        try:
            check_name(name)
            if not isinstance(given, Mapping):
                raise InputError(f"{where}: {given!r}; expected the settings of a stage")
            kind = given.get("kind", "")
            if not isinstance(kind, str) or kind not in kinds:
                raise InputError(f"{where}.kind: unknown kind {kind!r}{settings.nearest(str(kind), kinds)}")
            stages[name] = settings.parse(kinds[kind], given, where, from_json)
        except InputError as error:
            told.append(str(error))
    if whole is not None:
        told += [line for name, stage in stages.items() for line in _wrong_data(name, stage, whole.data)]
        told += [line for name, stage in stages.items() for line in _wrong_mesh(name, stage, whole)]
    if told or whole is None:
        raise InputError("\n".join(dict.fromkeys(told)))
    return whole.model_copy(update={"stages": stages})


def _wrong_data(name: str, stage: StageSettings, data: Data) -> list[str]:
    """What is wrong with the data that a stage names, a line for each."""
    given: Any = getattr(stage, "data", "")
    read = sources_of(stage)
    if given and not read:
        return [f"stages.{name}.data: {given!r} would not be read, since its rows come from other stages; expected ''"]
    told = []
    for source in read:
        if source and source not in data.sources:
            hint = settings.nearest(source, data.sources) if data.sources else "; data.sources is empty"
            told.append(f"stages.{name}.data: no source {source!r}{hint}")
        if not source and not data.path:
            told.append(f"data.path: empty; expected {Source.model_fields['path'].description}")
    return told


def _wrong_mesh(name: str, stage: StageSettings, run: Run) -> list[str]:
    """What is wrong with the sizes of a stage's mesh, whatever the devices."""
    sizes = mesh_of(run, stage)
    if list(sizes.values()).count(-1) <= 1:
        return []
    return [f"stages.{name}.mesh: {sizes}, with those of the run; expected at most one -1"]


def check_name(name: Any) -> None:
    """InputError for a stage's name that can't be a folder's."""
    wrong = not isinstance(name, str) or not name or name.startswith((".", "-")) or len(name) > 100
    if wrong or any(letter in name for letter in "/\\:, \0\n"):
        raise InputError(f"stages.{name}: expected a name of letters, digits, '_', '-' and '.', as a folder has")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts by dotted names; an empty one leaves nothing."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, each in value.items():
        found |= flat(each, f"{prefix}.{name}" if prefix else name)
    return found


def as_json(run: Run) -> dict[str, Any]:
    """A run as JSON holds it; `parse` with from_json reads it again."""
    return settings.plain(run)
