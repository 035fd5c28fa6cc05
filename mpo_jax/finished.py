"""The path of a finished stage enters; its folder, its job, and itself as an artifact leave, as commands read them."""

import json
from typing import Any

import jax
import ml_collections
from etils import epath

from mpo_jax import checkpoint, graph, sharding
from mpo_jax.errors import InputError
from mpo_jax.stages.job import Artifact, Job


def is_stage(path: epath.PathLike) -> bool:
    """Whether a path names a stage of a run, rather than a model's folder or a hub id."""
    path = epath.Path(path)
    known = checkpoint.stage_folders(path.parent)
    return path.name in known or path in known.values()


def find(stage: epath.PathLike) -> epath.Path:
    """The folder of a finished stage, WORKDIR/NAME or WORKDIR/NAME-KEY. InputError where there is none, or it is not
    finished."""
    path = epath.Path(stage)
    known = checkpoint.stage_folders(path.parent)
    folder = known.get(path.name, path)
    if not (folder / "config.json").exists():
        hint = f"; expected one of {', '.join(known)}" if known else f"; no stages.json in {path.parent}"
        raise InputError(f"{stage}: no such stage{hint}")
    if checkpoint.read_manifest(folder) is None:
        raise InputError(f"{stage}: {folder.name} is not finished; run it to its end first")
    return folder


def load(folder: epath.Path) -> tuple[Job, Artifact, dict[str, Any]]:
    """A finished stage's job, as its own config tells it, itself as an artifact, and its manifest."""
    manifest = checkpoint.read_manifest(folder) or {}
    name, kind = manifest["name"], manifest["kind"]
    if graph.PRODUCES[kind] not in ("policy", "reward"):
        raise InputError(f"{folder.name} is a {kind} stage and leaves a {graph.PRODUCES[kind]}; "
                         "expected a policy or a reward model")  # fmt: skip
    config = ml_collections.ConfigDict(json.loads((folder / "config.json").read_text()))
    config.model.dtype = config.model.frozen_dtype = "float32"
    config.model.attention = "xla"  # a few rows of any length, in float32: what no other backend takes everywhere
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    job = Job(name, config.stages[name], config, folder, folder.parent, {}, mesh)
    return job, Artifact(name, kind, folder), manifest
