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

    rank: Whole = setting(0, "rank of the LoRA adapters; 0: full fine-tuning, without adapters")
    alpha: Positive = setting(16.0, "the product of an adapter's two matrices is multiplied by alpha / rank")
    targets: Projections = setting(
        ("q", "k", "v", "o"), f"projections that get adapters, out of {', '.join(PROJECTIONS)}", min_length=1
    )


class Model(Section):
    """The base model, and how it is computed."""

    path: str = setting(
        "", "the base model: a Hugging Face folder, here or at gs://, or a hub id", operational=True, min_length=1
    )
    dtype: Literal["auto", "float32", "bfloat16", "mixed"] = setting(
        "auto",
        "dtype of computation; auto: bfloat16 on accelerators; on a CPU mixed if it has AVX512-BF16, otherwise "
        "float32; mixed (for CPUs): products of bfloat16, sums in float32",
    )
    frozen_dtype: Literal["auto", "float32", "bfloat16", "int8"] = setting(
        "auto",
        "dtype of frozen weights (reference, reward model, base model under LoRA); auto: float32 on a CPU or if dtype "
        "is float32, otherwise bfloat16; int8: projections in eight bits, on one device only; without LoRA the "
        "reference then differs slightly from the policy that it is a copy of",
    )
    remat: Remat = setting(
        "none",
        "what the backward pass computes again, to save memory; none: nothing; full: all except each layer's input; "
        "dots: all except each layer's input and its matrix products",
        operational=True,
    )
    attention: Attention = setting(
        "auto",
        "implementation of attention; auto: cudnn on a GPU that supports it, otherwise xla; flash: Pallas splash "
        "attention, for TPUs, with row lengths in multiples of 128",
        operational=True,
    )
    lora: Lora = Lora()


_REST = "-1: all devices that the other axes leave"


class Mesh(Section):
    """How the devices are divided; -1: what the other axes leave of them."""

    data: AxisSize = setting(
        1,
        f"number of copies of the model; batches are divided among them; {_REST}; with several TPU slices, a multiple "
        "of their number",
        unit="devices",
    )
    fsdp: AxisSize = setting(-1, f"number of parts that weights and batches are divided into; {_REST}", unit="devices")
    tensor: AxisSize = setting(
        1,
        f"number of parts that attention heads, feed-forward layers and vocabulary are divided into; {_REST}",
        unit="devices",
    )

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
    eval: Share = setting(
        0.1, "share of the prompts that is held out: one half selects checkpoints, the other is reported on"
    )
    policy: Share = setting(0.45, "share of the prompts for the split, DPO and PPO")
    sft_reward: Share = setting(0.45, "share of the prompts for SFT and the reward model")

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
    __doc__="The file's own names for columns; empty: the column is recognised by its usual names.",
    **{
        role: (str, setting("", f"name of the column with {help}; empty: the usual names"))
        for role, help in ROLES.items()
    },
)  # type: ignore[call-overload]


Constants: Any = pydantic.create_model(
    "Constants",
    __base__=Section,
    __doc__="Texts that all rows have in common.",
    **{role: (str, setting("", f"{ROLES[role]}, the same for every row; empty: none")) for role in CONSTANTS},
)  # type: ignore[call-overload]


class Source(Section):
    """Where records are read, and how."""

    path: str = setting("", "the data: a file or folder, here or at gs://, tfds:name or a hub name", operational=True)
    split: str = setting("train", "the split that is read; all: all splits", min_length=1)
    eval_split: str = setting(
        "",
        "a split whose records are held out instead of the eval share, and halved in the same way; empty: the eval "
        "share of `split` is held out",
    )
    limit: Whole = setting(0, "number of records that are read; 0: all", unit="records")
    columns: Columns = Columns()
    constants: Constants = Constants()
    ignore: Names = setting(
        (), "columns that are left unread on purpose, although their names suggest replies, labels or the like"
    )
    keep: Names = setting(
        (),
        "further columns, by their names in the file, that python: scorers receive, such as a reference answer",
        later=True,
    )
    template: str = setting(
        "auto",
        "how conversations are written; auto: with the tokenizer's chat template if it has one, otherwise in HH's "
        "form; plain: always in HH's form; chat: as auto, and a plain prompt becomes a user's turn too; or another "
        "template: "
        f"{', '.join(BUILT_IN)}, a Jinja file, or the text of a template",
        min_length=1,
    )
    end_of_turn: str = setting(
        "", "the token that ends a reply in a conversation; empty: the one that the template writes after a reply"
    )
    template_kwargs: dict[str, Any] = setting({}, "values that are passed to the chat template")
    system: Literal[SYSTEMS] = setting(  # type: ignore[valid-type]
        "turn", "where a system text is put: into a turn of its own, or at the beginning of the first user's turn"
    )
    common_prompt: bool = setting(
        False, "for pairs without a prompt column: the text with which both replies begin becomes the prompt"
    )
    ranked: Literal[RANKED] = setting(  # type: ignore[valid-type]
        "best_worst",
        "which of a row's ranked replies are paired: the best with the worst, every two, or neighbours in rank",
    )


class Data(Source):
    """The preference data, and the lengths of rows."""

    sources: dict[str, Source] = setting(
        {},
        "further data sources by name, each with those of the settings above in which it differs; a stage names a "
        "source in its setting `data`",
    )
    shares: Shares = Shares()
    max_length: Count = setting(512, "largest length of a row: the prompt with all its replies", unit="tokens")
    max_response: Count = setting(128, "largest length of one reply, including the token that ends it", unit="tokens")
    max_prompt: Whole = setting(
        0,
        "largest length of a prompt, of which the latest part is kept; 0: the room that the replies leave",
        unit="tokens",
    )
    too_long: Literal["truncate", "drop"] = setting(
        "truncate", "what happens to a row that is too long: it is truncated, or dropped"
    )
    max_buckets: Count = setting(8, "largest number of different row lengths; a step is compiled for each of them")
    multiple: Count = setting(8, "row lengths are multiples of this; flash attention needs 128", unit="tokens")
    cache: bool = setting(True, "whether encoded rows are kept in WORKDIR/cache", operational=True)

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

    data: AxisSize = setting(0, "mesh.data for this stage; 0: the run's value", unit="devices", operational=True)
    fsdp: AxisSize = setting(0, "mesh.fsdp for this stage; 0: the run's value", unit="devices", operational=True)
    tensor: AxisSize = setting(0, "mesh.tensor for this stage; 0: the run's value", unit="devices", operational=True)


class StageSettings(Section):
    """What every kind of stage has."""

    kind: str = ""
    seed: Seed = setting(0, "added to the run's seed, so that stages of one run can have different seeds")
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
    """All settings of a run. `stages` holds each stage under its name, with the settings of its kind, in the config's
    order."""

    name: str = setting("mpo", "name of the run, shown in its reports", min_length=1)
    seed: Seed = setting(0, "seed of the data's order, of sampling, and of freshly initialised weights")
    shard_seconds: Amount = setting(
        60.0,
        "how often a stage saves the results of sampling and scoring, so that a kill loses no more than this; 0: after "
        "every batch",
        unit="seconds",
        operational=True,
    )
    compile_next: bool = setting(
        True,
        "whether a thread compiles what the next stage will call while a stage is at work; only on one host, with TPUs "
        "or with one CPU device and four or more processors",
        operational=True,
    )
    plugins: Names = setting((), "Python modules that add further kinds of stage, objectives, estimators or scorers")
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
