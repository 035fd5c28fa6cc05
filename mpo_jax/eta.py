"""The stages that a run's folder holds enter, with the seconds that each of them took; how long stages to come will
take leaves, of those of which that can be said.

It is said from measurements of this folder alone, on the same devices, model and data: a training's seconds a step, or
what the stage of that name took when it was made before.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils import epath

from mpo_jax import artifacts, progress, settings
from mpo_jax.errors import InputError
from mpo_jax.run import Run

_ALIKE = ("model", "mesh", "data", "scorers")
"""Parts of a run's settings on which its seconds depend."""
_APART = ("steps", "seed")
"""Whole numbers of a stage on which the seconds of a step do not depend."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A finished stage. config: the settings of its whole run, as JSON holds them. seconds: of its run from beginning
    to end. devices: what it ran on."""

    name: str
    config: Mapping[str, Any]
    seconds: float
    devices: str

    @property
    def own(self) -> Mapping[str, Any]:
        return self.config["stages"][self.name]


@dataclasses.dataclass(frozen=True)
class Eta:
    """seconds: of all stages of which they are known; None where that is none. unknown: the others, in order."""

    seconds: float | None
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        if self.seconds is None:
            return "unknown" if self.unknown else progress.words(0)
        without = ", ".join(self.unknown) if len(self.unknown) <= 3 else f"{len(self.unknown)} stages"
        return progress.words(self.seconds) + (f", without {without}" if self.unknown else "")


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
            each = Measured(manifest["name"], config, float(manifest["seconds"]), manifest["devices"])
            found.append(((folder / artifacts.MANIFEST).stat().mtime, each, each.own))
        except (InputError, LookupError, TypeError, ValueError):
            continue  # damaged, or of an earlier version: it says nothing, and whoever needs it will tell
    return [each for _, each, _ in sorted(found, key=lambda one: -one[0])]


def of_stages(names: Iterable[str], config: Run, known: Iterable[Measured], on: str) -> Eta:
    """Of stages to come, run one after the other on the devices `on`."""
    known, plain = list(known), settings.plain(config)
    found = {name: _of_stage(name, plain, known, on) for name in names}
    seconds = [each for each in found.values() if each is not None]
    return Eta(sum(seconds) if seconds else None, tuple(name for name, each in found.items() if each is None))


def _of_stage(name: str, config: Mapping[str, Any], known: Iterable[Measured], on: str) -> float | None:
    own = config["stages"][name]
    alike = [
        each
        for each in known
        if each.devices == on
        and all(each.config.get(part) == config[part] for part in _ALIKE)
        and _sizes(each.own) == _sizes(own)
    ]
    for each in sorted(alike, key=lambda each: each.name != name):
        steps, before = own.get("steps"), each.own.get("steps")
        if steps and before:
            return each.seconds * steps / before
        if each.name == name and (steps, own.get("epochs")) == (before, each.own.get("epochs")):
            return each.seconds
    return None


def _sizes(stage: Mapping[str, Any]) -> dict[str, Any]:
    """What a step's seconds depend on: the kind, and all that is counted in whole numbers."""
    counted = {key: value for key, value in stage.items() if isinstance(value, int) and key not in _APART}
    return counted | {"kind": stage["kind"]}
