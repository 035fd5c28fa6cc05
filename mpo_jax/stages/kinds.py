"""The kinds of stage that there are: those of the package, each from its own file, and what plugins add."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from mpo_jax import run, settings
from mpo_jax.errors import InputError
from mpo_jax.evaluation.sections import Shown
from mpo_jax.run import Run, StageSettings
from mpo_jax.stages import blend, dpo, evaluate, judge, kto, pairs, reward, sft, split
from mpo_jax.stages.base import Stage
from mpo_jax.stages.ppo import stage as ppo

KINDS: dict[str, Stage] = {}


def register(stage: Stage) -> Stage:
    """Adds a kind. InputError for a name that is taken by another."""
    if KINDS.setdefault(stage.kind, stage) is not stage:
        raise InputError(f"plugins: the kind {stage.kind!r} is there already; choose another name")
    return stage


for _module in (sft, reward, pairs, split, dpo, kto, ppo, blend, evaluate, judge):
    register(_module.STAGE)


def load_plugins(names: Iterable[str]) -> None:
    """Imports a run's plugins, which add to `KINDS`, `OBJECTIVES`, `ESTIMATORS` or `SCORERS` when they are imported.
    InputError, naming the module, for one that can't be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a module of somebody else's raises
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"plugins: {name!r} can't be imported ({told}); expected a module on the path") from error


def of(stage: StageSettings) -> Stage:
    """The kind that a stage's settings are of."""
    return KINDS[stage.kind]


def read(values: Mapping[str, Any], from_json: bool = False) -> Run:
    """The run that a config's plain values describe, its plugins loaded. InputError, by key, for all that is wrong."""
    plugins = values.get("plugins", ())
    if isinstance(plugins, tuple | list) and all(isinstance(name, str) for name in plugins):
        load_plugins(plugins)
    return run.parse(values, {kind: stage.settings for kind, stage in KINDS.items()}, from_json)


def shown() -> dict[str, Shown]:
    """What the report makes of each kind."""
    return {kind: stage.shown for kind, stage in KINDS.items()}


def plugged(stage: StageSettings) -> dict[str, str]:
    """Setting -> hash of the plugin's source text, for what a stage takes from a plugin: its kind, or an entry of a
    table. It enters the stage's key, so that a changed plugin makes the stage again."""
    texts: dict[str, str] = {}
    for name, entry in [("kind", KINDS[stage.kind].run), *settings.chosen(stage)]:
        if text := _source(entry):
            texts[name] = texts.get(name, "") + text
    return texts


def _source(entry: Any) -> str:
    """The hash of the file that an entry of a table comes from; "" for the package's own."""
    functions = [entry, getattr(entry, "func", None), *(getattr(entry, "__dict__", {}) or {}).values()]
    functions += [getattr(each, "func", None) for each in functions]  # of a functools.partial
    names = [name for each in functions if (name := getattr(each, "__module__", None)) in sys.modules]
    outside = [name for name in names if name.split(".")[0] not in ("mpo_jax", "builtins")]
    if not outside:
        return ""
    return hashlib.blake2b(inspect.getsource(sys.modules[outside[0]]).encode(), digest_size=16).hexdigest()
