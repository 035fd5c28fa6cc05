"""What configs are composed of: stages of a kind, the runs of the paper, sweeps, cross-fitting, rounds, small settings.

`stage(kind, **settings)` gives a stage of the graph with every key its kind has, so that any of them can be overridden
on the command line: `--config.stages.dpo.beta=0.2`. What each key means, `mpo show --settings` tells.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from mpo_jax import settings
from mpo_jax.errors import InputError
from mpo_jax.run import Run, Source
from mpo_jax.scorers import names as scorers
from mpo_jax.stages import kinds

MODELS = {
    "tiny": str(Path(__file__).resolve().parent / "assets" / "tiny_stories"),  # comes with the package
    "pythia-1b": "EleutherAI/pythia-1b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
}
"""Names that a config takes after its colon: the base model, as a folder or hub id."""
STORIES = str(Path(MODELS["tiny"]) / "stories.jsonl.gz")
"""Beginnings of stories with an ending each, which come with the package: prompts, or demonstrations."""


def config() -> ml_collections.ConfigDict:
    """The settings that stand outside the stages, all with their defaults; a config adds stages and changes others."""
    return ml_collections.ConfigDict(_values(Run()))


def stage(kind: str, **given: Any) -> ml_collections.ConfigDict:
    """A stage of `kind` with every key it has; InputError, suggesting the nearest, for a key or kind it has not."""
    if kind not in kinds.KINDS:
        raise InputError(f"config: unknown kind of stage {kind!r}{settings.nearest(kind, kinds.KINDS)}")
    section = kinds.KINDS[kind].settings
    for key in given:
        if key not in section.model_fields:
            raise InputError(
                f"config: a stage of kind {kind!r} has no key {key!r}{settings.nearest(key, section.model_fields)}"
            )
    values = _values(section()) | {"kind": kind}
    for key, value in given.items():
        within = isinstance(values[key], dict) and isinstance(value, Mapping)  # some settings of a section
        values[key] = values[key] | dict(value) if within else value
    # Names in a ConfigDict hold no dots, and those of scorers may: a weighted sum of them stands there as its JSON.
    sums = [key for key in scorers.settings_of(section()) if isinstance(given.get(key), Mapping)]
    values |= {key: json.dumps(dict(given[key])) for key in sums}
    return ml_collections.ConfigDict(values)


def source(**given: Any) -> ml_collections.ConfigDict:
    """A named source of data, for `config.data.sources.NAME`: what is not given is as in `config.data`, and any key can
    be overridden on the command line. InputError, suggesting the nearest, for a key that it has not."""

    def placed(section: type[settings.Section], values: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, field in section.model_fields.items():
            inside = field.annotation
            if isinstance(inside, type) and issubclass(inside, settings.Section):
                found[name] = placed(inside, values.get(name, {}))
            else:
                kind = tuple if isinstance(field.default, tuple) else type(field.default)
                found[name] = values[name] if name in values else config_dict.placeholder(kind)
        return found

    for key in given:
        if key not in Source.model_fields:
            raise InputError(f"config: a source has no key {key!r}{settings.nearest(key, Source.model_fields)}")
    return ml_collections.ConfigDict(placed(Source, given))


def _values(section: settings.Section) -> dict[str, Any]:
    """A section's values, nested, with tuples as they are."""
    found = {name: getattr(section, name) for name in type(section).model_fields}
    return {name: _values(value) if isinstance(value, settings.Section) else value for name, value in found.items()}


def variants(text: str, *known: str, models: bool = True) -> tuple[set[str], str]:
    """The words after a config's colon (`debug,pythia-1b`): those of `known`, and the base model's name or "".

    models: whether a model may be named. InputError for any other word."""
    words = [word for word in text.split(",") if word]
    allowed = [*known, *(MODELS if models else ())]
    some = f"some of {', '.join(allowed)}" if allowed else "none: this config has no variants"
    for word in words:
        if word not in allowed:
            near = difflib.get_close_matches(word, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected {some}"
            raise InputError(f"config: no variant {word!r}{hint}")
    named = [word for word in words if word in MODELS]
    if len(named) > 1:
        raise InputError(f"config: two models, {' and '.join(named)}; expected one")
    return {word for word in words if word in known}, "".join(named)


def crossfit(stages, reward: str, split: str, folds: int) -> None:
    """Scores the pairs that a reward model learns from, where data is short: `folds` further reward stages, each blind
    to its part of the prompts, score that part for `split`. In place; `reward` stays, trained on all, for PPO."""
    names = tuple(f"{reward}_fold_{fold}" for fold in range(folds))
    for fold, name in enumerate(names):
        stages[name] = ml_collections.ConfigDict(stages[reward].to_dict() | {"folds": folds, "fold": fold})
    share = stages[reward].share
    stages[split] = ml_collections.ConfigDict(stages[split].to_dict() | {"reward": names, "share": share})


def sweep(stages, name: str, key: str, values: Iterable[Any]) -> None:
    """Expands stage `name` over `values` of `key`, in place: `split` becomes `split_threshold_1`, `split_threshold_2`.

    Stages that rest on it are expanded with it; all others are shared. A stage that takes several inputs in one role
    (an evaluation's policies) stays one and takes them all. InputError for an unknown stage or key.
    """
    values = list(values)
    if name not in stages:
        raise InputError(f"sweep: no stage {name!r}; expected one of {', '.join(stages)}")
    if key not in stages[name]:
        raise InputError(f"sweep: stage {name!r} has no key {key!r}")

    # Where the buckets' edge moves, all pairs together stay the same, unless pairs beyond the edge are changed.
    edge_alone = key in ("threshold", "quantile") and stages[name].flipped == "hard"

    def roles(stage) -> Iterable[str]:
        return kinds.KINDS[stage.kind].roles

    def sources(stage) -> list[str]:
        given = [stage[role] for role in roles(stage) if isinstance(stage.get(role), str)]
        return [source for source in given if not (edge_alone and source == f"{name}/all")]

    expanded, grown = {name}, True
    while grown:
        found = {
            other
            for other, stage in stages.items()
            if any(source.partition("/")[0] in expanded for source in sources(stage))
            and not any(isinstance(stage.get(role), tuple | list) for role in roles(stage))
        }
        grown = not found <= expanded
        expanded |= found
    tags = [
        f"{key}_{value:g}".replace(".", "_") if isinstance(value, int | float) else f"{key}_{value}" for value in values
    ]

    def renamed(source: str, tag: str) -> str:
        stem, slash, part = source.partition("/")
        return f"{stem}_{tag}{slash}{part}" if stem in expanded else source

    for other in list(stages):
        stage = stages[other]
        if other in expanded:
            for tag, value in zip(tags, values, strict=True):
                copy = stage.copy_and_resolve_references()
                for role in roles(stage):
                    if isinstance(copy.get(role), str):
                        copy[role] = renamed(copy[role], tag)
                if other == name:
                    copy[key] = value
                stages[f"{other}_{tag}"] = copy
            del stages[other]
            continue
        for role in roles(stage):
            given = stage.get(role)
            if isinstance(given, tuple | list):
                stage[role] = tuple(dict.fromkeys(renamed(source, tag) for source in given for tag in tags))
            elif isinstance(given, str):
                stage[role] = renamed(given, tags[0])


def alone(name: str, variant: str, *known: str, **shares: float) -> tuple[ml_collections.ConfigDict, set[str]]:
    """A run of few stages from the base model, on data of the user's own; and which of the variants `known` was asked
    for. The model is the variant's, or the one that comes with the package. shares: of the prompts; others: 0."""
    chosen, model = variants(variant, *known)
    made = config()
    made.name, made.model.path = name, MODELS[model or "tiny"]
    made.data.shares = {"sft_reward": 0.0, "policy": 0.0, "eval": 0.0} | shares
    return made, chosen


def rounds(count: int, split, dpo, ppo=None, policy: str = "sft") -> dict[str, ml_collections.ConfigDict]:
    """Stages of `count` rounds: the policy of the round before samples and scores pairs, which are split; DPO learns
    from the easy ones and PPO, where given, from the hard prompts. split_1, dpo_1, mpo_1, split_2, ...

    split, dpo, ppo: stages of a round, each with what it shall be set to; what their roles name of a round's own
    stages, and the policy that it begins with, is put in here. policy: what the first round begins with.
    """
    made: dict[str, ml_collections.ConfigDict] = {}
    for number in range(1, count + 1):
        names = {kind: f"{kind}_{number}" for kind in ("split", "dpo", "mpo")}
        parts = {
            "split": (split, {"policy": policy, "seed": split.seed + number - 1}),
            "dpo": (dpo, {"init": policy, "reference": policy, "pairs": _of(names["split"], dpo.pairs)}),
        }
        if ppo is not None:
            of_ppo = {"init": names["dpo"], "reference": names["dpo"], "prompts": _of(names["split"], ppo.prompts)}
            parts["mpo"] = ppo, of_ppo
        for kind, (given, roles) in parts.items():
            made[names[kind]] = ml_collections.ConfigDict(given.to_dict() | roles)
        policy = names["dpo" if ppo is None else "mpo"]
    return made


def _of(split: str, source: str) -> str:
    """The same part of another split: ("split_2", "split/easy") is "split_2/easy"."""
    return f"{split}/{source.partition('/')[2]}"


SMALL_SAMPLING = {"max_new_tokens": 56, "batch_size": 64}
SMALL_DPO = {
    "batch_size": 32,
    "learning_rate": 2e-4,
    "beta": 0.1,
    "log_every": 5,
    "eval_every": 50,
    "eval_batches": 12,
    "save_every": 25,
}
SMALL_PPO = {
    "sft": "sft",
    "batch_size": 32,
    "steps": 20,
    "max_new_tokens": 56,
    "learning_rate": 2e-4,
    "value_learning_rate": 1e-3,
    "inner_epochs": 2,
    "kl_coefficient": 0.05,
    "eval_every": 10,
    "save_every": 10,
    "gold": "vader",
}
"""Hyperparameters of runs on `small_run`."""


def small_run(name: str) -> ml_collections.ConfigDict:
    """The quickstart's task, up to the reward model: the embedded model writes stories, its replies are paired, and
    VADER's sentiment, with Bradley-Terry noise, says which of two is better. Runs on two cores."""
    made = config()
    made.name = name
    made.model.path = MODELS["tiny"]
    made.data.path = STORIES
    made.data.shares = {"sft_reward": 0.4, "policy": 0.4, "eval": 0.2}
    made.data.max_length = 144
    made.data.max_response = 56
    made.data.max_prompt = 32
    made.data.max_buckets = 1  # at this size a step takes less than compiling it for another length
    made.stages.update(
        {
            "sft": stage("sft", batch_size=32, learning_rate=2e-4, eval_every=20, save_every=20),
            "pairs": stage("pairs", samples=3, label_temperature=0.2, **SMALL_SAMPLING),
            "reward": stage(
                "reward",
                pairs="pairs",
                batch_size=16,
                learning_rate=3e-3,
                eval_every=60,
                eval_batches=24,
                save_every=30,
            ),
        }
    )
    return made


def small_evaluation(*policies: str) -> ml_collections.ConfigDict:
    """Policies of a `small_run` beside each other, the first the baseline, by the reward model and by VADER."""
    return stage("evaluate", policies=policies, labeller="vader", count=256, **SMALL_SAMPLING)


LARGE_DPO = {"batch_size": 64, "microbatch": 32, "learning_rate": 5e-7, "beta": 0.1}  # Rafailov et al. 2023
LARGE_PPO = {
    "sft": "sft",
    "batch_size": 64,
    "microbatch": 32,
    "max_new_tokens": 128,
    "learning_rate": 1e-6,  # ours
    "value_learning_rate": 5e-6,  # ours
    "kl_coefficient": 0.05,  # Stiennon et al. 2020, for summaries
    "normalise_scores": True,
    "missing_eos_penalty": 1.0,  # ours
}
"""Hyperparameters of runs at 7B; the paper publishes none but its thresholds."""


def large_run(name: str, model: str) -> ml_collections.ConfigDict:
    """The settings that runs on pods share: prompts of 512 tokens, replies of 128, batches of 64."""
    made = config()
    made.name = name
    made.model.path = MODELS[model]
    made.model.remat = "full"
    made.mesh.tensor = 4
    made.data.max_prompt = 512
    made.data.max_response = 128
    made.data.max_length = 512 + 2 * 128
    # Nine tenths of what is computed are tokens of the data then (docs/data.md). Many lengths take hardly longer than
    # few, since a stage's programs are compiled side by side. Flash attention needs multiples of 128.
    made.data.multiple = 32
    made.data.max_buckets = 16
    return made


ADAPTER_RATES = 10
"""How much larger the learning rates of adapters are than those of whole weights: see docs/models.md."""


def adapters(made: ml_collections.ConfigDict, rank: int = 16) -> None:
    """Trains LoRA adapters in place of whole weights, by rates that move them; in place. To be called when the stages
    have the rates of full fine-tuning."""
    made.model.lora.rank = rank
    for each in made.stages.values():
        for name in ("learning_rate", "value_learning_rate"):
            if name in each:
                each[name] = ADAPTER_RATES * each[name]


def mpo_stages(pair_source: str) -> dict[str, ml_collections.ConfigDict]:
    """MPO as in the paper, beside its baselines: DPO on all pairs, and PPO from SFT held by the SFT policy."""
    return {
        "sft": stage("sft", batch_size=64, microbatch=32),
        "reward": stage("reward", batch_size=64, microbatch=32),
        "split": stage("split", pair_source=pair_source, threshold=1.0, max_new_tokens=128, batch_size=64),
        "dpo": stage("dpo", **LARGE_DPO),
        "mpo": stage("ppo", **LARGE_PPO),
        "dpo_full": stage("dpo", **(LARGE_DPO | {"pairs": "split/all"})),
        "ppo_sft": stage("ppo", **(LARGE_PPO | {"init": "sft", "reference": "sft", "prompts": "split/all"})),
        "evaluate": stage(
            "evaluate",
            policies=("sft", "dpo", "mpo", "dpo_full", "ppo_sft"),
            max_new_tokens=128,
            count=512,
            batch_size=64,
        ),
    }


_WIDE = {"batch_size": 256}  # prompts sampled at a time: weights are read once for all of them
_KEPT = {"microbatch": 0, "remat": "dots"}  # products are kept for the backward pass, since there is room
_EVERYWHERE = dict.fromkeys(("sft", "reward", "dpo"), _KEPT) | dict.fromkeys(("split", "evaluate"), _WIDE)
SLICES: dict[str, dict[str, dict[str, Any]]] = {
    "v5e-32": _EVERYWHERE | {"ppo": {"microbatch": 0}},
    "v5p-16": _EVERYWHERE | {"ppo": {"remat": "dots"}},
    "v6e-16": _EVERYWHERE | {"ppo": {"microbatch": 0}},
}
"""Slice -> kind of stage -> what is fastest there at 7B, as docs/pods.md tells; the mesh is that of `large_run`. In the
plan they are v5e:4x8, v5p:2x2x2 (16 cores are 8 chips) and v6e:4x4."""


def on_slice(made: ml_collections.ConfigDict, chosen: Iterable[str]) -> None:
    """Sets the stages of a `large_run` as they are fastest on the slice that is among the variants chosen, if one is;
    in place. What a stage learns or replies stays the same. InputError for two slices."""
    named = [name for name in SLICES if name in chosen]
    if len(named) > 1:
        raise InputError(f"config: two slices, {' and '.join(named)}; expected one")
    for name in named:
        for each in made.stages.values():
            each.update(SLICES[name].get(each.kind, {}))


def shrink(made: ml_collections.ConfigDict) -> None:
    """Minutes on one device: some thousand rows of whatever splits the data has, divided by prompt, short rows, small
    batches, few steps, and a split in two halves."""
    made.model.remat = "none"
    made.mesh.tensor = 1
    made.data.update({"split": "all", "eval_split": "", "limit": 3000})
    made.data.update({"max_prompt": 160, "max_response": 64, "max_length": 288, "multiple": 8, "max_buckets": 2})
    for each in made.stages.values():
        small: dict[str, Any] = {"batch_size": 16, "microbatch": 0, "max_new_tokens": 48, "count": 64}
        small |= {"eval_every": 40, "eval_batches": 8, "save_every": 20}
        if each.kind in ("sft", "reward", "dpo"):
            small |= {"learning_rate": 2e-4}
        if each.kind == "ppo":
            small |= {"steps": 20, "learning_rate": 5e-5, "value_learning_rate": 5e-4, "eval_every": 10}
            small |= {"eval_prompts": 32, "save_every": 10}
        if each.kind == "split":
            small |= {"quantile": 0.5}
        each.update({key: value for key, value in small.items() if key in each})
