"""A frozen reference policy and rows of two replies enter; its summed log-probs leave, computed once for the whole run.

They are kept in the run's cache under the reference itself, the rows and how they were computed, so that a second stage
on the same rows, or a resumed one, does not even load the reference.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from mpo_jax import artifacts, fingerprints, integrity, processes, progress
from mpo_jax.artifacts import BASE
from mpo_jax.data import encode
from mpo_jax.data.encode import Encoded
from mpo_jax.errors import InputError
from mpo_jax.models import hf
from mpo_jax.stages import job as jobs
from mpo_jax.stages import rows, shards
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Program
from mpo_jax.types import PyTree


def logps(job: Job, program: Program, base: PyTree, encoded: Sequence[Encoded]) -> list[np.ndarray]:
    """Summed log-probs f32 [rows,2] of both replies under the policy in the role `reference`, for each set of rows;
    from the run's cache where they are there. program: `rows.logps_program` of the stage.

    The key: the reference itself, the rows themselves (data, template, lengths), and how they were computed.
    """
    how = [_identity(job), jobs.model(job).dtype, jobs.frozen_dtype(job), "kept as read"]
    paths = [_cached(job, [*how, encode.rows_fingerprint(part)]) for part in encoded]
    if not processes.told_by_first(lambda: b"yes" if all(_whole(path) for path in paths) else b""):
        model, reference = jobs.model(job), job.inputs["reference"]
        weights = shards.loaded(lambda: base | jobs.load_weights(job, reference, model, jobs.frozen_dtype(job)))
        for part, path in zip(encoded, paths, strict=True):
            found = rows.compute(job, program, weights, part, job.settings.batch_size, jobs.making(reference))
            if jobs.is_first():
                artifacts.write_arrays(path, {"logps": found})
        processes.barrier(f"{job.name} reference log-probs")
    return [artifacts.read_arrays(path)["logps"] for path in paths]


def _whole(path: epath.Path) -> bool:
    """Whether cached log-probs are there and undamaged; others are made again."""
    try:
        return path.exists() and "logps" in artifacts.read_arrays(path)
    except InputError as error:
        progress.say(f"cache: {error}", sys.stderr)
        return False


def _identity(job: Job) -> list[str]:
    """What the reference's weights are: the base model's content, or a stage's key and which making of it."""
    artifact = job.inputs["reference"]
    if artifact.name == BASE:
        return [processes.told(lambda: fingerprints.of_model(hf.resolve(job.config.model.path)), "base model hashed")]
    return jobs.making(artifact)


def _cached(job: Job, parts: list[Any]) -> epath.Path:
    return epath.Path(job.workdir) / artifacts.CACHE / f"reference-{integrity.hash_settings(parts)}.npz"
