"""A config's stages enter; the graph leaves: every stage with its inputs, its key and its folder, in an order in which
they can run.

A stage's key is the hash of its settings, its inputs' keys, the base model and the data, by content. Its folder is
WORKDIR/NAME-KEY, so that a changed stage never meets the artifact of the old one.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from mpo_jax import checkpoint
from mpo_jax.data import sources as data_sources
from mpo_jax.errors import InputError
from mpo_jax.models import hf

BASE = "base"
"""The name by which stages call the model that the run begins with."""

PRODUCES = {
    BASE: "policy",
    "sft": "policy",
    "reward": "reward",
    "pairs": "samples",
    "split": "pairs",
    "dpo": "policy",
    "ppo": "policy",
    "evaluate": "report",
    "judge": "verdicts",
}
"""What each kind of stage leaves."""

ROLES: dict[str, dict[str, str]] = {
    "sft": {"init": "policy"},
    "reward": {"init": "policy", "pairs": "samples"},
    "pairs": {"policy": "policy"},
    "split": {"reward": "reward", "policy": "policy", "pairs": "samples"},
    "dpo": {"init": "policy", "reference": "policy", "pairs": "pairs"},
    "ppo": {"init": "policy", "reference": "policy", "reward": "reward", "prompts": "pairs", "sft": "policy"},
    "evaluate": {"policies": "policy", "reward": "reward", "prompts": "pairs"},
    "judge": {"evaluate": "report", "local": "policy"},
}
"""What each kind takes: role -> what must be named there. An empty name leaves a role out, where the stage can."""

PARTS = ("easy", "hard", "flipped", "all")
FORMAT = 1
"""Enters every key; raised when artifacts of an earlier version of this package can't be read any more."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One stage of the graph. inputs: role -> names of stages with their part, ("split", "easy"). shared: the hash of
    what every stage reads."""

    name: str
    kind: str
    settings: Any
    inputs: Mapping[str, tuple[tuple[str, str], ...]]
    key: str
    folder: epath.Path
    shared: str

    @property
    def sources(self) -> list[str]:
        """The stages it rests on, each once, the base model left out."""
        return list(dict.fromkeys(name for inputs in self.inputs.values() for name, _ in inputs if name != BASE))


def resolve(config, workdir: epath.Path) -> dict[str, Node]:
    """The graph in an order in which it can run. InputError for a cycle, an unknown kind or input, a wrong type."""
    stages = config.stages
    inputs = connections(config)
    shared = _shared_hash(config)
    nodes: dict[str, Node] = {}
    for name in inputs:
        settings = stages[name]
        kept = {
            key: _content(name, key, value)
            for key, value in settings.to_dict().items()
            if key not in config.operational and key not in ROLES[settings.kind]
        }
        above = {
            role: [[nodes[source].key if source != BASE else BASE, part] for source, part in sources]
            for role, sources in inputs[name].items()
        }
        key = checkpoint.hash_settings({"format": FORMAT, "settings": kept, "inputs": above, "shared": shared})[:12]
        nodes[name] = Node(name, settings.kind, settings, inputs[name], key, workdir / f"{name}-{key}", shared)
    return nodes


def _content(stage: str, key: str, value: Any) -> Any:
    """What a setting means to the stage's hash: a key that ends in "_file" names a file whose text counts, not its
    place."""
    if not key.endswith("_file") or not value:
        return value
    if not epath.Path(value).is_file():
        raise InputError(f"stages.{stage}.{key}: {value}: no such file")
    return epath.Path(value).read_text()


def connections(config) -> dict[str, dict[str, tuple[tuple[str, str], ...]]]:
    """The inputs of every stage, role -> (source, part), in an order in which they can run; reads no model, no data."""
    stages = config.stages
    if not len(stages):
        raise InputError("config.stages is empty; expected at least one stage")
    inputs = {name: _inputs(name, stages) for name in stages}
    return {name: inputs[name] for name in _order(inputs)}


def needed(nodes: Mapping[str, Node], only: Iterable[str]) -> set[str]:
    """The stages named, with all they rest on; all of them where none is named."""
    only = list(only)
    for name in only:
        if name not in nodes:
            raise InputError(f"--stages: no stage {name!r}{_suggest(name, nodes)}")
    waiting, found = only or list(nodes), set()
    while waiting:
        name = waiting.pop()
        if name not in found and name != BASE:
            found.add(name)
            waiting += nodes[name].sources
    return found


def _inputs(name: str, stages) -> dict[str, tuple[tuple[str, str], ...]]:
    settings = stages[name]
    kind = settings.get("kind")
    if kind not in ROLES:
        raise InputError(f"stages.{name}.kind: unknown kind {kind!r}{_suggest(str(kind), ROLES)}")
    if name == BASE:
        raise InputError(f"stages.{name}: the name is kept for the base model; choose another")
    found = {}
    for role, wanted in ROLES[kind].items():
        value = settings.get(role, "")
        sources = (value,) if isinstance(value, str) else tuple(value)
        found[role] = tuple(_source(name, role, source, wanted, stages) for source in sources if source)
    return found


def _source(name: str, role: str, value: str, wanted: str, stages) -> tuple[str, str]:
    source, _, part = value.partition("/")
    where = f"stages.{name}.{role}"
    if source != BASE and source not in stages:
        raise InputError(f"{where}: no stage {source!r}{_suggest(source, [*stages, BASE])}")
    kind = BASE if source == BASE else stages[source].get("kind")
    if kind in PRODUCES and PRODUCES[kind] != wanted:
        raise InputError(f"{where}: {source!r} is a {kind} stage and leaves a {PRODUCES[kind]}; expected a {wanted}")
    if wanted == "pairs" and part not in PARTS:
        raise InputError(f"{where}: {value!r}; expected {source}/PART with PART one of {', '.join(PARTS)}")
    if wanted != "pairs" and part:
        raise InputError(f"{where}: {value!r}; a {wanted} has no parts, expected {source!r}")
    return source, part


def _order(inputs: Mapping[str, Mapping[str, tuple[tuple[str, str], ...]]]) -> list[str]:
    """Names so that every stage follows its inputs, otherwise as declared."""
    order: list[str] = []
    open_: list[str] = []

    def visit(name: str) -> None:
        if name in order or name == BASE:
            return
        if name in open_:
            raise InputError(f"stages: a cycle: {' -> '.join([*open_[open_.index(name) :], name])}")
        open_.append(name)
        for sources in inputs[name].values():
            for source, _ in sources:
                visit(source)
        open_.pop()
        order.append(name)

    for name in inputs:
        visit(name)
    return order


def _shared_hash(config) -> str:
    """Of all that every stage reads: seed, model and data settings, and the contents of the model and the data."""
    model, data = config.model.to_dict(), config.data.to_dict()
    kept = {
        "seed": config.seed,
        "model": {key: value for key, value in model.items() if key not in config.operational},
        "data": {key: value for key, value in data.items() if key not in config.operational},
        "base": checkpoint.fingerprint_weights_folder(hf.resolve(config.model.path)),
        "content": data_sources.fingerprint(config.data.path),
    }
    return checkpoint.hash_settings(kept)


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"
