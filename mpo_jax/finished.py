"""The path of a finished stage enters; its folder, its job, and itself as an artifact leave, as commands read them."""

from typing import Any

import jax
from etils import epath

from mpo_jax import artifacts, settings, sharding
from mpo_jax.artifacts import POLICY, REWARD
from mpo_jax.errors import InputError
from mpo_jax.stages import kinds
from mpo_jax.stages.job import Artifact, Job


def is_stage(path: epath.PathLike) -> bool:
    """Whether a path names a stage of a run, rather than a model's folder or a hub id."""
    path = epath.Path(path)
    known = artifacts.stage_folders(path.parent)
    return path.name in known or path in known.values()


def find(stage: epath.PathLike) -> epath.Path:
    """The folder of a finished stage, WORKDIR/NAME or WORKDIR/NAME-KEY. InputError where there is none, or it is not
    finished."""
    path = epath.Path(stage)
    known = artifacts.stage_folders(path.parent)
    folder = known.get(path.name, path)
    if not (folder / artifacts.CONFIG).exists():
        if path.name in known:
            raise InputError(f"{stage}: {folder.name} holds no {artifacts.CONFIG}; run the stage again")
        hint = f"; expected one of {', '.join(known)}" if known else f"; no {artifacts.STAGES_FILE} in {path.parent}"
        raise InputError(f"{stage}: no such stage{hint}")
    if artifacts.read_manifest(folder) is None:
        raise InputError(f"{stage}: {folder.name} is not finished; run it to its end first")
    artifacts.verify(folder)
    return folder


def load(folder: epath.Path) -> tuple[Job, Artifact, dict[str, Any]]:
    """A finished stage's job, as its own config tells it, itself as an artifact, and its manifest."""
    manifest = artifacts.read_manifest(folder) or {}
    name, kind = manifest["name"], manifest["kind"]
    config = kinds.read(artifacts.read_json(folder / artifacts.CONFIG), from_json=True)
    produces = kinds.of(config.stages[name]).produces
    if produces not in (POLICY, REWARD):
        raise InputError(
            f"{folder.name} is a {kind} stage and leaves a {produces}; expected a policy or a reward model"
        )
    # A few rows of any length, in float32: what no attention but xla's takes everywhere.
    plain = {"model.dtype": "float32", "model.frozen_dtype": "float32", "model.attention": "xla"}
    config = settings.replaced(config, plain)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    job = Job(name, config.stages[name], config, folder, folder.parent, {}, mesh)
    return job, Artifact(name, produces, folder), manifest
