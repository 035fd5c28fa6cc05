"""The stages that a run's folder holds enter, with the seconds that each of them took; how long stages to come will
take leaves, of those of which that can be said.

It is said from measurements of this folder alone, on the same devices, model and data: a training's seconds a step, or
what the stage of that name took when it was made before. A stage that has no such measurement is estimated: what there
is to compute in it, at the rate of the run's finished stages.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from etils import epath

from mpo_jax import artifacts, progress, settings
from mpo_jax.errors import InputError
from mpo_jax.run import Run

_ALIKE = ("model", "data", "scorers")
"""Parts of a run's settings on which its seconds depend."""
_APART = ("steps", "seed")
"""Whole numbers of a stage on which the seconds of a step do not depend."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A finished stage. config: the settings of its whole run, as JSON holds them. seconds: of its run from beginning
    to end. devices: what it ran on. pairs: records of the data that it found; 0: it read none."""

    name: str
    config: Mapping[str, Any]
    seconds: float
    devices: str
    pairs: int = 0

    @property
    def own(self) -> Mapping[str, Any]:
        return self.config["stages"][self.name]


@dataclasses.dataclass(frozen=True)
class Eta:
    """seconds: of all stages of which they are known; None where that is none. unknown: the others, in order.
    estimated: those of which seconds are an estimate."""

    seconds: float | None
    unknown: tuple[str, ...]
    estimated: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.seconds is None:
            return "unknown" if self.unknown else progress.words(0)
        told = progress.words(self.seconds)
        told += f", estimated for {_named(self.estimated)}" if self.estimated else ""
        return told + (f", without {_named(self.unknown)}" if self.unknown else "")


def _named(stages: tuple[str, ...]) -> str:
    return ", ".join(stages) if len(stages) <= 3 else f"{len(stages)} stages"


def devices(mesh: jax.sharding.Mesh) -> str:
    """How many devices of which kind a run is on, as `8 x TPU v5 lite`."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"


def measured(workdir: epath.Path) -> list[Measured]:
    """The finished stages in a run's folder, of earlier settings too, those made last first. Not those that were
    resumed: how long they took is not known."""
    found = []
    for folder in (path.parent for path in workdir.glob(f"*/{artifacts.MANIFEST}")):
        try:
            manifest = artifacts.read_manifest(folder) or {}
            config = artifacts.read_json(folder / artifacts.CONFIG)
            pairs = max((int(account["kept"]) for account in manifest.get("data") or ()), default=0)
            each = Measured(manifest["name"], config, float(manifest["seconds"]), manifest["devices"], pairs)
            found.append(((folder / artifacts.MANIFEST).stat().mtime, each, each.own))
        except (InputError, LookupError, TypeError, ValueError):
            continue  # damaged, or of an earlier version: it says nothing, and whoever needs it will tell
    return [each for _, each, _ in sorted(found, key=lambda one: -one[0])]


def of_stages(
    names: Iterable[str],
    config: Run,
    known: Iterable[Measured],
    on: str,
    amount: Callable[[str, int], float | None] = lambda name, pairs: None,
) -> Eta:
    """Of stages to come, run one after the other on the devices `on`. amount: (stage of the run, records of the data)
    -> how much there is to compute in it, in any unit; None: nobody knows."""
    known, plain = list(known), settings.plain(config)
    found = {name: _of_stage(name, plain, known, on) for name in names}
    missing = [name for name, each in found.items() if each is None]
    estimated = _estimated(missing, plain, [each for each in known if _alike(each, plain, on)], amount)
    seconds = [each for each in (found | estimated).values() if each is not None]
    unknown = tuple(name for name in missing if name not in estimated)
    return Eta(sum(seconds) if seconds else None, unknown, tuple(estimated))


def _estimated(
    names: Iterable[str],
    config: Mapping[str, Any],
    known: Iterable[Measured],
    amount: Callable[[str, int], float | None],
) -> dict[str, float]:
    """The seconds of stages at the rate of those that are finished as the run has them, the latest making of each."""
    names = list(names)
    finished = {
        each.name: each
        for each in reversed(list(known))
        if each.name in config["stages"] and _sizes(each.own) == _sizes(config["stages"][each.name])
    }
    pairs = max((each.pairs for each in finished.values()), default=0)
    if not names or not pairs:
        return {}
    done = {name: amount(name, pairs) for name in finished}
    whole = sum(each for each in done.values() if each is not None)
    took = sum(finished[name].seconds for name, each in done.items() if each is not None)
    to_do = {name: amount(name, pairs) for name in names} if whole else {}
    return {name: each * took / whole for name, each in to_do.items() if each is not None}


def _alike(each: Measured, config: Mapping[str, Any], on: str) -> bool:
    """Whether a stage was measured on the devices, the model and the data of the run."""
    return each.devices == on and all(each.config.get(part) == config[part] for part in _ALIKE)


def _of_stage(name: str, config: Mapping[str, Any], known: Iterable[Measured], on: str) -> float | None:
    own = config["stages"][name]
    alike = [
        each
        for each in known
        if _alike(each, config, on)
        and _mesh(each.config, each.own) == _mesh(config, own)
        and _sizes(each.own) == _sizes(own)
    ]
    for each in sorted(alike, key=lambda each: each.name != name):
        steps, before = own.get("steps"), each.own.get("steps")
        if steps and before:
            return each.seconds * steps / before
        if each.name == name and (steps, own.get("epochs")) == (before, each.own.get("epochs")):
            return each.seconds
    return None


def _mesh(config: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, int]:
    """How the devices were divided for a stage."""
    own = stage.get("mesh") or {}
    return {axis: own.get(axis) or size for axis, size in (config.get("mesh") or {}).items()}


def _sizes(stage: Mapping[str, Any]) -> dict[str, Any]:
    """What a step's seconds depend on: the kind, and all that is counted in whole numbers."""
    counted = {key: value for key, value in stage.items() if isinstance(value, int) and key not in _APART}
    return counted | {"kind": stage["kind"]}
