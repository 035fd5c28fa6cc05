"""Takes a config's stage graph and a workdir; gives each stage its key and state, and runs what is not done.

A stage's key is the hash of its settings, its inputs' keys, the base model and the data, by content. Its folder is
WORKDIR/NAME-KEY: finished stages are skipped, an unfinished one resumes, a changed one runs again under a new key.
"""

import dataclasses
import difflib
import importlib
import importlib.metadata
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from mpo_jax import checkpoint
from mpo_jax.data import sources as data_sources
from mpo_jax.errors import InputError
from mpo_jax.models import hf
from mpo_jax.stages.job import Artifact, Job

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
}
"""What each kind takes: role -> what must be named there. An empty name leaves a role out, where the stage can."""

PARTS = ("easy", "hard", "flipped", "all")
PACKAGES = ("mpo_jax", "jax", "flax", "optax", "orbax-checkpoint")
FORMAT = 1
"""Enters every key; raised when artifacts of an earlier version of this package can't be read any more."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One stage of the graph. inputs: role -> names of stages with their part, ("split", "easy")."""

    name: str
    kind: str
    settings: Any
    inputs: Mapping[str, tuple[tuple[str, str], ...]]
    key: str
    folder: epath.Path

    @property
    def done(self) -> bool:
        return checkpoint.read_manifest(self.folder) is not None

    @property
    def begun(self) -> bool:
        return self.folder.exists()


def resolve(config, workdir: epath.Path) -> dict[str, Node]:
    """The graph in an order in which it can run. InputError for a cycle, an unknown kind or input, a wrong type."""
    stages = config.stages
    if not len(stages):
        raise InputError("config.stages is empty; expected at least one stage")
    inputs = {name: _inputs(name, stages) for name in stages}
    shared = _shared_hash(config)
    nodes: dict[str, Node] = {}
    for name in _order(inputs):
        settings = stages[name]
        kept = {
            key: value
            for key, value in settings.to_dict().items()
            if key not in config.operational and key not in ROLES[settings.kind]
        }
        above = {
            role: [[nodes[source].key if source != BASE else BASE, part] for source, part in sources]
            for role, sources in inputs[name].items()
        }
        key = checkpoint.hash_settings({"format": FORMAT, "settings": kept, "inputs": above, "shared": shared})[:12]
        nodes[name] = Node(name, settings.kind, settings, inputs[name], key, workdir / f"{name}-{key}")
    return nodes


def run(config, workdir: epath.Path, mesh, only: Iterable[str] = ()) -> dict[str, Node]:
    """Runs every stage that is not done (or those of `only`, with what they need), in order."""
    nodes = resolve(config, workdir)
    wanted = needed(nodes, only)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        current = {name: node.folder.name for name, node in nodes.items()}
        checkpoint.write_json(workdir / "stages.json", current)
    for name in nodes:
        node = nodes[name]
        if name not in wanted:
            continue
        if node.done:
            _say(f"{name}: done before ({node.folder.name})")
            continue
        _say(f"{name}: {'resumed' if node.begun else 'begun'} ({node.folder.name})")
        began = time.perf_counter()
        run_stage(config, workdir, mesh, nodes, node)
        _say(f"{name}: finished in {time.perf_counter() - began:.1f} s")
    return nodes


def run_stage(config, workdir: epath.Path, mesh, nodes: Mapping[str, Node], node: Node) -> None:
    """Runs one stage and, as the last thing, writes its manifest."""
    job = Job(node.name, node.settings, config, node.folder, workdir, _artifacts(nodes, node, config), mesh)
    if jax.process_index() == 0:
        node.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(node.folder / "config.json", config.to_dict())
    module = importlib.import_module(f"mpo_jax.stages.{node.kind}")
    with jax.set_mesh(mesh):
        summary = module.run(job)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{node.name} finished")
    if jax.process_index() == 0:
        manifest = {
            "name": node.name,
            "kind": node.kind,
            "key": node.key,
            "inputs": {
                role: [{"name": source, "part": part, "key": nodes[source].key if source in nodes else BASE}
                       for source, part in sources]
                for role, sources in node.inputs.items()
            },
            "shared": _shared_hash(config),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "summary": summary,
        }  # fmt: skip
        checkpoint.write_manifest(node.folder, manifest)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{node.name} written")


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
            waiting += [source for sources in nodes[name].inputs.values() for source, _ in sources]
    return found


def tree(nodes: Mapping[str, Node]) -> str:
    """The graph with the state of every stage, a line each, and why it is not done."""
    lines = []
    for name, node in nodes.items():
        above = [f"{role}={source}{'/' + part if part else ''}" for role, sources in node.inputs.items()
                 for source, part in sources]  # fmt: skip
        if node.done:
            state = "done"
        elif node.begun:
            state = "unfinished: resumes from its last checkpoint"
        else:
            others = (
                sorted(path.name for path in node.folder.parent.glob(f"{name}-*"))
                if node.folder.parent.exists()
                else []
            )
            state = f"stale: settings, inputs or data changed since {others[-1]}" if others else "missing: never run"
        lines.append(f"{name:12} {node.kind:9} {node.key}  {state}\n{'':12} {', '.join(above)}")
    return "\n".join(lines)


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


def _artifacts(nodes: Mapping[str, Node], node: Node, config) -> dict[str, Any]:
    def artifact(source: str, part: str) -> Artifact:
        if source == BASE:
            return Artifact(BASE, BASE, epath.Path(config.model.path))
        return Artifact(source, nodes[source].kind, nodes[source].folder, part)

    found: dict[str, Any] = {}
    for role, sources in node.inputs.items():
        many = [artifact(source, part) for source, part in sources]
        if isinstance(node.settings[role], str):
            found |= {role: many[0]} if many else {}
        else:
            found[role] = many
    return found


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
