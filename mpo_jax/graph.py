"""A run's stages enter; the graph leaves: every stage with its inputs, its key and its folder, in an order in which
they can run.

A stage's key is the hash of its settings, its inputs' keys, the base model and the data, by content. Its folder is
WORKDIR/NAME-KEY, so that a changed stage never meets the artifact of the old one.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from mpo_jax import fingerprints, integrity, processes, settings
from mpo_jax.artifacts import BASE, DATA, PARTS, POLICY
from mpo_jax.data import sources as data_sources
from mpo_jax.data import template
from mpo_jax.data.reading import of_source
from mpo_jax.errors import InputError
from mpo_jax.models import hf
from mpo_jax.run import Run, Source, StageSettings, sources_of
from mpo_jax.scorers import names
from mpo_jax.settings import nearest
from mpo_jax.stages import kinds
from mpo_jax.stages.job import Artifact

FORMAT = 3
"""Enters every key; raised when artifacts of an earlier version of this package can't be read any more."""

UNKNOWN = "unknown"
"""The key of a stage whose model or data is not at hand."""

Inputs = Mapping[str, tuple[tuple[str, str], ...]]
"""Role -> names of stages with their part, ("split", "easy")."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One stage of the graph. shared: the hash of what it reads beside its inputs."""

    name: str
    settings: StageSettings
    inputs: Inputs
    key: str
    folder: epath.Path
    shared: str

    @property
    def kind(self) -> str:
        return self.settings.kind

    @property
    def sources(self) -> list[str]:
        """The stages it rests on, each once, the base model left out."""
        return list(dict.fromkeys(name for inputs in self.inputs.values() for name, _ in inputs if name != BASE))


def resolve(run: Run, workdir: epath.Path, shared: str | None = None) -> dict[str, Node]:
    """The graph in an order in which it can run. shared: UNKNOWN where the model or the data is not at hand; None: they
    are fetched, for the keys.

    InputError for a cycle, an unknown input, a wrong type."""
    inputs = connections(run)
    keys = dict.fromkeys(inputs, (UNKNOWN, UNKNOWN))
    if shared != UNKNOWN:
        keys = processes.told(lambda: _keys(run, inputs), "model and data hashed")
    return {
        name: Node(name, run.stages[name], inputs[name], key, workdir / f"{name}-{key}", common)
        for name, (key, common) in keys.items()
    }


def _keys(run: Run, inputs: Mapping[str, Inputs]) -> dict[str, tuple[str, str]]:
    """The key of every stage, and the hash of what it reads beside its inputs."""
    base = fingerprints.of_model(hf.resolve(run.model.path))
    hashes: dict[tuple[str, ...], str] = {}
    found: dict[str, tuple[str, str]] = {}
    for name, above in inputs.items():
        stage = run.stages[name]
        read = tuple(sources_of(stage)) or ("",)
        if read not in hashes:
            hashes[read] = _shared(run, base, read)
        content = {key: _content(name, key, value) for key, value in settings.content(stage).items()}
        content |= _scorers(name, stage)
        keys = {
            role: [[found[source][0] if source != BASE else BASE, part] for source, part in sources]
            for role, sources in above.items()
        }
        parts = {"format": FORMAT, "settings": content, "inputs": keys, "shared": hashes[read]}
        if plugged := kinds.plugged(stage):
            parts["plugins"] = plugged
        if beside := kinds.of(stage).content(stage):
            parts["content"] = beside
        found[name] = integrity.hash_settings(parts)[:12], hashes[read]
    return found


def _shared(run: Run, base: str, read: Sequence[str]) -> str:
    """The hash of what a stage reads beside its inputs: seed, model and data settings, and the contents of the model,
    whose hash is `base`, and of the sources that it names ("" is the run's own data). Other sources don't enter it."""
    lengths = {name: value for name, value in _reading(run.data).items() if name != "sources"}
    own = lengths if "" in read else {name: lengths[name] for name in lengths if name not in Source.model_fields}
    kept = {
        "seed": run.seed,
        "model": settings.content(run.model),
        "data": own,
        "base": base,
    }
    if "" in read:
        kept["content"] = _fingerprint("", run.data) if run.data.path else ""
    named = {name: run.data.sources[name] for name in read if name}
    if named:
        kept["sources"] = {name: [_reading(source), _fingerprint(name, source)] for name, source in named.items()}
    return integrity.hash_settings(kept)


def _reading(source: Source) -> dict[str, Any]:
    """The settings of a source that enter a key: of a template in a file, its text."""
    return settings.content(source) | {"template": template.chosen(source.template) or source.template}


def _fingerprint(name: str, source: Source) -> str:
    with of_source(name):
        return data_sources.fingerprint(source.path)


def _content(stage: str, key: str, value: Any) -> Any:
    """What a setting means to the stage's hash: a key that ends in "_file" names a file whose text counts, not its
    place."""
    if not key.endswith("_file") or not value:
        return value
    if not epath.Path(value).is_file():
        raise InputError(f"stages.{stage}.{key}: {value}: no such file")
    try:
        return epath.Path(value).read_text()
    except UnicodeDecodeError as error:
        raise InputError(f"stages.{stage}.{key}: {value}: not UTF-8 at byte {error.start}") from error


def _scorers(name: str, stage: StageSettings) -> dict[str, Any]:
    """The settings that say who scores, each scorer by what it is rather than where."""
    try:
        return names.identities(stage)
    except InputError as error:
        raise InputError(f"stages.{name}.{error}") from None


def connections(run: Run) -> dict[str, Inputs]:
    """The inputs of every stage in an order in which they can run; reads no model, no data."""
    if not run.stages:
        raise InputError("stages: empty; expected at least one stage")
    inputs = {name: _inputs(name, run.stages) for name in run.stages}
    return {name: inputs[name] for name in _order(inputs)}


def artifacts(run: Run, inputs: Inputs, stage: StageSettings, folders: Mapping[str, epath.Path]) -> dict[str, Any]:
    """Role -> the artifact that a stage takes in it, or the list of them where it takes several. folders: of stages."""

    def artifact(source: str, part: str) -> Artifact:
        if source == BASE:
            return Artifact(BASE, POLICY, epath.Path(run.model.path))
        return Artifact(source, kinds.of(run.stages[source]).produces, folders[source], part)

    taken: dict[str, Any] = {}
    for role, sources in inputs.items():
        many = [artifact(source, part) for source, part in sources]
        if not isinstance(getattr(stage, role), str):
            taken[role] = many
        elif many:
            taken[role] = many[0]
    return taken


def needed(inputs: Mapping[str, Inputs], only: Iterable[str]) -> set[str]:
    """The stages named, with all they rest on; all of them where none is named."""
    only = list(only)
    for name in only:
        if name not in inputs:
            raise InputError(f"--stages: no stage {name!r}{nearest(name, inputs)}")
    waiting, needed_ = only or list(inputs), set()
    while waiting:
        name = waiting.pop()
        if name not in needed_ and name != BASE:
            needed_.add(name)
            waiting += [source for sources in inputs[name].values() for source, _ in sources]
    return needed_


def _inputs(name: str, stages: Mapping[str, StageSettings]) -> Inputs:
    stage = stages[name]
    if name == BASE:
        raise InputError(f"stages.{name}: the name is kept for the base model; choose another")
    if name == DATA:
        raise InputError(f"stages.{name}: the name is kept for the run's data; choose another")
    inputs: dict[str, tuple[tuple[str, str], ...]] = {}
    for role, wanted in kinds.of(stage).roles.items():
        value = getattr(stage, role)
        sources = [source for source in ((value,) if isinstance(value, str) else value) if source]
        if wanted.data and sources == [DATA]:
            inputs[role] = ()
            continue
        if not sources and not wanted.optional:
            raise InputError(f"stages.{name}.{role}: empty; expected {wanted.help}")
        inputs[role] = tuple(_source(name, role, source, wanted.product, stages) for source in sources)
    return inputs


def _source(name: str, role: str, value: str, wanted: str, stages: Mapping[str, StageSettings]) -> tuple[str, str]:
    source, _, part = value.partition("/")
    where = f"stages.{name}.{role}"
    if source != BASE and source not in stages:
        data = [DATA] if kinds.of(stages[name]).roles[role].data else []
        raise InputError(f"{where}: no stage {source!r}{nearest(source, [*stages, BASE, *data])}")
    kind, product = BASE, POLICY
    if source != BASE:
        kind, product = stages[source].kind, kinds.of(stages[source]).produces
    if product != wanted:
        raise InputError(f"{where}: {source!r} is a {kind} stage and leaves a {product}; expected a {wanted}")
    parts = PARTS.get(wanted, ())
    if parts and part not in parts:
        raise InputError(f"{where}: {value!r}; expected {source}/PART with PART one of {', '.join(parts)}")
    if not parts and part:
        raise InputError(f"{where}: {value!r}; a {wanted} has no parts, expected {source!r}")
    return source, part


def _order(inputs: Mapping[str, Inputs]) -> list[str]:
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
