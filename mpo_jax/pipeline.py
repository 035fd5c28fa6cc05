"""A graph of stages enters; every stage that is not done is run, in order, and leaves its artifact and a manifest.

Finished stages are skipped, an unfinished one resumes, a changed one runs again under a new key. A stage is done when
its manifest is there and each of its inputs still is the one it was made from.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils import epath

from mpo_jax import checkpoint, processes
from mpo_jax.evaluation import report
from mpo_jax.graph import BASE, Node, needed, resolve
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Artifact, Job

PACKAGES = ("mpo_jax", "jax", "flax", "optax", "orbax-checkpoint")
MAPPED = ("pairs", "split", "judge")
"""Kinds whose artifacts are memory-mapped, or a database: told before the stages above them have run."""
INPUTS = "inputs.json"
"""The file that a stage writes first: which making of each input it works from."""

DONE, UNFINISHED, STALE, MISSING = "done", "unfinished", "stale", "missing"


@dataclasses.dataclass(frozen=True)
class Status:
    """state: DONE, UNFINISHED (it resumes), STALE (it runs again) or MISSING (it never ran). why: of all but DONE."""

    state: str
    why: str = ""


def run(config, workdir: epath.Path, mesh, only: Iterable[str] = ()) -> dict[str, Node]:
    """Runs every stage that is not done (or those of `only`, with what they need), in order."""
    nodes = resolve(config, workdir)
    wanted = needed(nodes, only)
    if any(nodes[name].kind in MAPPED for name in wanted):
        jobs.local(workdir)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(workdir / checkpoint.STAGES, {name: node.folder.name for name, node in nodes.items()})
    for name, node in nodes.items():
        if name not in wanted:
            continue
        status = statuses(config, nodes)[name]
        _together(f"{name} looked at")
        if status.state == DONE:
            _say(f"{name}: done before ({node.folder.name})")
            continue
        _say(f"{name}: {'resumed' if status.state == UNFINISHED else 'begun'} ({node.folder.name})")
        began = time.perf_counter()
        if status.state == STALE:
            _set_aside(node, workdir)
        run_stage(config, workdir, mesh, nodes, node)
        _say(f"{name}: finished in {time.perf_counter() - began:.1f} s")
    if jax.process_index() == 0:
        _report(workdir)
    return nodes


def _report(workdir: epath.Path) -> None:
    """All stages are done: a page that can't be written must not make the run a failed one."""
    try:
        print(f"report: {report.write(workdir)}", flush=True)
    except Exception as error:
        print(f"report: not written: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def run_stage(config, workdir: epath.Path, mesh, nodes: Mapping[str, Node], node: Node) -> None:
    """Runs one stage and, as the last thing, writes its manifest."""
    job = Job(node.name, node.settings, config, node.folder, workdir, _artifacts(nodes, node, config), mesh)
    inputs = _inputs(nodes, node)
    if jax.process_index() == 0:
        node.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(node.folder / "config.json", config.to_dict())
        checkpoint.write_json(node.folder / INPUTS, inputs)
    _together(f"{node.name} begun")
    module = importlib.import_module(f"mpo_jax.stages.{node.kind}")
    with jax.set_mesh(mesh):
        summary = module.run(job)
    _together(f"{node.name} finished")
    if jax.process_index() == 0:
        manifest = {
            "name": node.name,
            "kind": node.kind,
            "key": node.key,
            "made": uuid.uuid4().hex,
            "inputs": inputs,
            "shared": node.shared,
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "summary": summary,
        }
        checkpoint.write_manifest(node.folder, manifest)
    _together(f"{node.name} written")


def statuses(config, nodes: Mapping[str, Node]) -> dict[str, Status]:
    """The state of every stage, and why it is not done."""
    found: dict[str, Status] = {}
    for name, node in nodes.items():
        waiting = [source for source in node.sources if found[source].state != DONE]
        begun, current = _read(node.folder / INPUTS), _inputs(nodes, node)
        finished = checkpoint.read_manifest(node.folder) is not None
        if begun is None:
            found[name] = _never_begun(config, nodes, node)
        elif waiting and finished:
            found[name] = Status(STALE, f"{', '.join(waiting)} will be made again")
        elif not waiting and begun != current:
            found[name] = Status(STALE, f"{', '.join(_remade(begun, current))} was made again since")
        elif finished:
            found[name] = Status(DONE)
        else:
            found[name] = Status(UNFINISHED, "resumes from its last checkpoint")
    return found


def tree(config, nodes: Mapping[str, Node]) -> str:
    """The graph as a tree, a line for each stage with its state; it hangs from the last of its inputs to be made."""
    states, order = statuses(config, nodes), list(nodes)
    parents = {name: max(node.sources, key=order.index, default=BASE) for name, node in nodes.items()}
    rows: list[tuple[str, str, str]] = []

    def draw(parent: str, indent: str) -> None:
        children = [name for name in order if parents[name] == parent]
        for name in children:
            node, status, last = nodes[name], states[name], name == children[-1]
            others = [f"{role}={_label(source)}" for role, sources in node.inputs.items() for source in sources]
            state = status.state + (f" ({status.why})" if status.why else "")
            rows.append((f"{indent}{'└── ' if last else '├── '}{name} [{node.kind}]", state, " ".join(others)))
            draw(name, indent + ("    " if last else "│   "))

    draw(BASE, "")
    width = max(len(left) for left, _, _ in rows)
    lines = [f"{left:{width}}  {state}\n{'':{width}}    {inputs}" for left, state, inputs in rows]
    return "\n".join([BASE, *lines])


def _label(source: tuple[str, str]) -> str:
    return "/".join(part for part in source if part)


def _never_begun(config, nodes: Mapping[str, Node], node: Node) -> Status:
    """Missing, or stale where an artifact of other settings lies beside it; with what differs."""
    workdir = node.folder.parent
    others = [path for path in workdir.glob(f"{node.name}-*") if (path / INPUTS).exists()] if workdir.exists() else []
    if not others:
        return Status(MISSING, "never run")
    last = max(others, key=lambda path: path.stat().mtime)
    before, now = _read(last / "config.json") or {}, checkpoint.plain(config.to_dict())
    old, new = before.get("stages", {}).get(node.name, {}), now["stages"][node.name]
    kept = set(config.operational)
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in new if key not in kept and old.get(key) != new[key]
    ]
    for part in ("seed", "model", "data"):
        if _without(before.get(part), kept) != _without(now[part], kept):
            changed.append(f"config.{part}")
    above = _read(last / INPUTS) or {}
    keys = {entry["name"]: entry["key"] for entries in above.values() for entry in entries}
    changed += [f"input {name}" for name in node.sources if name in keys and keys[name] != nodes[name].key]
    reason = ", ".join(changed) or "the contents of the base model or the data"
    return Status(STALE, f"changed since {last.name}: {reason}")


def _without(part: Any, left_out: set[str]) -> Any:
    return {key: value for key, value in part.items() if key not in left_out} if isinstance(part, dict) else part


def _inputs(nodes: Mapping[str, Node], node: Node) -> dict[str, Any]:
    """Role -> the key of each input, and which making of it lies there now."""
    return {
        role: [
            {"name": source, "part": part}
            | (
                {"key": BASE, "made": BASE}
                if source == BASE
                else {"key": nodes[source].key, "made": _made(nodes[source])}
            )
            for source, part in sources
        ]
        for role, sources in node.inputs.items()
    }


def _made(node: Node) -> str | None:
    return (checkpoint.read_manifest(node.folder) or {}).get("made")


def _remade(begun: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    old = {entry["name"]: entry["made"] for entries in begun.values() for entry in entries}
    new = {entry["name"]: entry["made"] for entries in current.values() for entry in entries}
    return [name for name in new if old.get(name) != new[name]]


def _set_aside(node: Node, workdir: epath.Path) -> None:
    """Moves what an earlier making left under the same key, so that nothing is overwritten."""
    if node.folder.exists() and jax.process_index() == 0:
        aside = workdir / "set_aside"
        aside.mkdir(parents=True, exist_ok=True)
        target = aside / f"{node.folder.name}-{uuid.uuid4().hex[:8]}"
        node.folder.rename(target)
        _say(f"{node.name}: the earlier artifact now lies in {target}")
    _together(f"{node.name} set aside")


def _read(path: epath.Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _together(what: str) -> None:
    """Waits for all processes, but not without end."""
    processes.barrier(what)


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


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
