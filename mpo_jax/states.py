"""A run's graph and its folder enter; the state of every stage leaves: what is done, what goes on, what runs again, and
why.

A stage is done when its manifest is there and each of its inputs still is the one it was made from.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from mpo_jax import artifacts, graph, settings
from mpo_jax.artifacts import BASE
from mpo_jax.graph import Node
from mpo_jax.run import Run

DONE, UNFINISHED, STALE, MISSING, UNKNOWN = "done", "unfinished", "stale", "missing", "unknown"


@dataclasses.dataclass(frozen=True)
class Status:
    """state: DONE, UNFINISHED (it resumes), STALE (it runs again), MISSING (it never ran) or UNKNOWN. why: of all but
    DONE."""

    state: str
    why: str = ""


def statuses(config: Run, nodes: Mapping[str, Node]) -> dict[str, Status]:
    """The state of every stage, and why it is not done."""
    states: dict[str, Status] = {}
    for name, node in nodes.items():
        if node.key == graph.UNKNOWN:
            states[name] = Status(UNKNOWN, "the model or the data is not on this machine")
            continue
        waiting = [source for source in node.sources if states[source].state != DONE]
        begun, current = _begun(node.folder), inputs(nodes, node)
        finished = artifacts.read_manifest(node.folder) is not None
        if begun is None:
            states[name] = _never_begun(config, nodes, node)
        elif waiting and finished:
            states[name] = Status(STALE, f"{', '.join(waiting)} will be made again")
        elif not waiting and begun != current:
            states[name] = Status(STALE, f"{', '.join(_remade(begun, current))} was made again since then")
        elif finished:
            states[name] = Status(DONE)
        else:
            states[name] = Status(UNFINISHED, "resumes from what it has saved")
    return states


def tree(config: Run, nodes: Mapping[str, Node]) -> str:
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


def _never_begun(config: Run, nodes: Mapping[str, Node], node: Node) -> Status:
    """Missing, or stale where an artifact of other settings lies beside it; with what differs."""
    workdir = node.folder.parent
    beside = workdir.glob(f"{node.name}-*") if workdir.exists() else []
    others = [path for path in beside if (path / artifacts.INPUTS).exists()]
    if not others:
        return Status(MISSING, "never run")
    last = max(others, key=lambda path: (path / artifacts.INPUTS).stat().mtime)  # a folder of gs:// has no time
    before = artifacts.read_json(last / artifacts.CONFIG, default={})
    changed = differences(before.get("stages", {}).get(node.name, {}), config.stages[node.name])
    for part in ("model", "data"):
        if differences(before.get(part, {}), getattr(config, part)):
            changed.append(f"config.{part}")
    if before.get("seed") != config.seed:
        changed.append("config.seed")
    above = _begun(last) or {}
    keys = {entry["name"]: entry["key"] for entries in above.values() for entry in entries}
    changed += [f"input {name}" for name in node.sources if name in keys and keys[name] != nodes[name].key]
    reason = ", ".join(changed) or "the contents of the base model, the data, a scorer or a plugin"
    return Status(STALE, f"changed since {last.name}: {reason}")


def differences(before: Mapping[str, Any], now: settings.Section) -> list[str]:
    """What differs, of what enters a key, between settings as a file holds them and those of now."""
    current = settings.content(now)
    return [f"{key}: {before.get(key)!r} -> {value!r}" for key, value in current.items() if before.get(key) != value]


def inputs(nodes: Mapping[str, Node], node: Node) -> dict[str, Any]:
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
    return (artifacts.read_manifest(node.folder) or {}).get("made")


def _remade(begun: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    old = {entry["name"]: entry["made"] for entries in begun.values() for entry in entries}
    new = {entry["name"]: entry["made"] for entries in current.values() for entry in entries}
    return [name for name in new if old.get(name) != new[name]]


def _begun(folder: epath.Path) -> Any:
    """What a stage that was begun there took; None where none was."""
    path = folder / artifacts.INPUTS
    return artifacts.read_json(path) if path.exists() else None
