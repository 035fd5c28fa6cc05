"""A config enters, as plain values; the settings of a run leave, checked: its model, mesh, data and stages.

What a kind of stage can be set to stands in its own file (`mpo_jax/stages/`); here is what all stages share.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import annotated_types
import pydantic

from mpo_jax import settings
from mpo_jax.data.reading import ROLES, SYSTEMS, TEMPLATES
from mpo_jax.errors import InputError
from mpo_jax.models.config import ATTENTION_SETTINGS, PROJECTIONS, REMAT_POLICIES
from mpo_jax.scorers.limits import Limits
from mpo_jax.settings import Count, Names, Positive, Section, Seed, Share, Whole, setting

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

    path: str = setting("", "the base model: a Hugging Face folder or a hub id", operational=True, min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "mixed"] = setting(
        "auto", "of computation; auto: bfloat16 on accelerators, float32 on a CPU"
    )
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of frozen weights; auto: float32 on a CPU or where dtype is, else bfloat16"
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

    data: AxisSize = setting(1, "copies of the model; batches are divided among them", unit="devices")
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
    eval: Share = setting(0.1, "held out")
    policy: Share = setting(0.45, "for the split, DPO and PPO")
    sft_reward: Share = setting(0.45, "for SFT and the reward model")

    @pydantic.model_validator(mode="after")
    def _whole(self):
        total = sum(dict(self).values())
        if abs(total - 1) > 1e-6:
            raise settings.wrong("eval", f"shares {dict(self)}; expected parts that add up to 1, found {total:g}")
        return self


ShareName = Literal["sft_reward", "policy", "eval"]


Columns: Any = pydantic.create_model(
    "Columns",
    __base__=Section,
    __doc__="The file's own names for columns; empty: the role's own.",
    **{role: (str, setting("", help)) for role, help in ROLES.items()},
)  # type: ignore[call-overload]


class Data(Section):
    """The preference data, and the lengths of rows."""

    path: str = setting("", "the data: a file, a folder, tfds:name or a hub name", operational=True, min_length=1)
    split: str = setting("train", "the split that is read; all: every one", min_length=1)
    eval_split: str = setting("", "a split of its own for evaluation; empty: the eval share of `split`")
    shares: Shares = Shares()
    limit: Whole = setting(0, "records read; 0: all", unit="records")
    columns: Columns = Columns()
    ignore: Names = setting((), "columns that look as if they meant something, and are to be left unread")
    template: Literal[TEMPLATES] = setting(  # type: ignore[valid-type]
        "auto",
        "auto: conversations by the chat template, where the tokenizer has one; plain: all in HH's form; chat: plain "
        "prompts are a user's turn too",
    )
    template_kwargs: dict[str, Any] = setting({}, "the chat template's own settings")
    system: Literal[SYSTEMS] = setting(  # type: ignore[valid-type]
        "turn", "where a system text stands: a turn of its own, or the beginning of the first user's"
    )
    common_prompt: bool = setting(False, "pairs without a prompt column: what both replies begin with is the prompt")
    max_length: Count = setting(512, "length of a row: prompt and all replies", unit="tokens")
    max_response: Count = setting(128, "length of one reply, its end included", unit="tokens")
    max_prompt: Whole = setting(0, "length of a prompt, its latest part kept; 0: what the replies leave", unit="tokens")
    too_long: Literal["truncate", "drop"] = setting("truncate", "what becomes of a row that is too long")
    max_buckets: Count = setting(8, "row lengths that a step is compiled for")
    multiple: Count = setting(8, "what row lengths are a multiple of; flash attention needs 128", unit="tokens")
    cache: bool = setting(True, "keep encoded rows in WORKDIR/cache", operational=True)

    @pydantic.model_validator(mode="after")
    def _lengths(self):
        if self.max_response >= self.max_length:
            raise settings.wrong(
                "max_response", f"{self.max_response}; expected below max_length {self.max_length}: a prompt needs room"
            )
        if self.max_prompt >= self.max_length:
            raise settings.wrong("max_prompt", f"{self.max_prompt}; expected below max_length {self.max_length}")
        return self


class StageSettings(Section):
    """What every kind of stage has."""

    kind: str = ""
    seed: Seed = setting(0, "added to the run's, for a stage of another seed in the same run")


class Run(Section):
    """All settings of a run. stages: name -> the settings of its kind, in the order of the config."""

    name: str = setting("mpo", "of the run, shown in its reports", min_length=1)
    seed: Seed = setting(0, "of data order, sampling and fresh weights")
    plugins: Names = setting((), "modules that register kinds, objectives, estimators or scorers of their own")
    model: Model = Model()
    mesh: Mesh = Mesh()
    data: Data = Data()
    scorers: Limits = Limits()
    stages: dict[str, Any] = {}  # noqa: RUF012, pydantic copies it


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
    if told or whole is None:
        raise InputError("\n".join(told))
    return whole.model_copy(update={"stages": stages})


def check_name(name: Any) -> None:
    """InputError for a stage's name that can't be a folder's."""
    wrong = not isinstance(name, str) or not name or name.startswith((".", "-")) or len(name) > 100
    if wrong or any(letter in name for letter in "/\\:, \0\n"):
        raise InputError(f"stages.{name}: expected a name of letters, digits, '_', '-' and '.', as a folder has")


def as_json(run: Run) -> dict[str, Any]:
    """A run as JSON holds it; `parse` with from_json reads it again."""
    return settings.plain(run)
