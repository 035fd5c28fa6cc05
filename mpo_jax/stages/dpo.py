"""A policy, a frozen reference and preference pairs enter; a policy that prefers the chosen replies leaves.

Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), or IPO; the reference's log-probs are computed
once and kept for every stage that asks for the same.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mpo_jax import checkpoint, scoring, sharding
from mpo_jax.data import encode
from mpo_jax.data.encode import Encoded
from mpo_jax.errors import InputError
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import losses, masks
from mpo_jax.stages import job as jobs
from mpo_jax.stages import loop, split
from mpo_jax.stages.job import Job
from mpo_jax.stages.reward import collect

ALGORITHMS = ("dpo", "ipo")


def make_loss(
    model: ModelConfig, algorithm: str = "dpo", beta: float = 0.1, label_smoothing: float = 0.0, sft: float = 0.0
) -> loop.Loss:
    """The loss on pairs whose batch carries ref_logps; sft: weight of the mean log-likelihood of the chosen reply."""
    if algorithm not in ALGORITHMS:
        raise InputError(f"algorithm: {algorithm!r}; expected one of {', '.join(ALGORITHMS)}")
    objective = functools.partial(losses.dpo, label_smoothing=label_smoothing) if algorithm == "dpo" else losses.ipo

    def loss(params, frozen, batch, key):
        out = scoring.response_logps(model, frozen["base"] | params, batch)
        chosen, rejected = (out.seq_logps(2)[:, side] for side in (0, 1))
        reference = batch.ref_logps
        found = objective(chosen, rejected, reference[:, 0], reference[:, 1], batch.weight, beta)
        if sft:
            lens = jnp.sum((batch.segments == masks.FIRST_RESPONSE_SEGMENT).astype(jnp.int32), axis=1)
            found = losses.add(found, (sft, losses.chosen_nll(chosen, lens, batch.weight)))
        return found

    return loss


def run(job: Job) -> dict[str, Any]:
    """Trains, writes the weights, returns the summary."""
    model = jobs.model(job)
    settings = job.settings
    loop.check(settings, job.mesh)
    loss = make_loss(model, settings.algorithm, settings.beta, settings.label_smoothing, settings.sft)
    train = split.pairs(job.inputs["pairs"])
    heldout = split.heldout(job.inputs["pairs"])
    base = jobs.base_weights(job, model)
    reference = base | jobs.load_weights(job, job.inputs["reference"], model, jobs.frozen_dtype(job))
    loaders = [
        jobs.loader(
            job,
            encoded,
            settings.batch_size,
            ref_logps=reference_logps(job, model, reference, encoded),
            shuffle=encoded is train,
            max_length=None,
        )
        for encoded in (train, heldout)
    ]
    del reference
    params = jobs.load_weights(job, job.inputs["init"], model)
    training = loop.supervised(loss, params, {"base": base}, loaders[0], loaders[1], settings, jobs.key(job), job.mesh)
    params, summary = loop.train(training, job.folder, job.mesh)
    checkpoint.save_weights(job.folder / jobs.WEIGHTS, params)
    return summary | {"pairs": len(train)}


def reference_logps(job: Job, model: ModelConfig, weights, encoded: Encoded) -> np.ndarray:
    """Summed log-probs f32 [rows,2] of both replies under the reference, from the run's cache if they are there.

    The key: the reference artifact, the rows themselves (data, template, lengths), and how they were computed.
    """
    artifact = job.inputs["reference"]
    parts = [artifact.folder.name, encode.rows_fingerprint(encoded), model.dtype, jobs.frozen_dtype(job)]
    path = epath.Path(job.workdir) / "cache" / f"reference-{checkpoint.hash_settings(parts)}.npy"
    if path.exists():
        with path.open("rb") as file:
            return np.load(file)
    loader = jobs.loader(job, encoded, job.settings.batch_size, shuffle=False, max_length=None)
    found = collect(make_reference(model, job.mesh), weights, loader, 2)
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        with temporary.open("wb") as file:
            np.save(file, found)
        temporary.replace(path)
    return found


def make_reference(model: ModelConfig, mesh):
    """Jitted `(weights, batch) -> f32 [B,2]`, on every device: the summed log-probs of both replies."""
    return jax.jit(
        lambda weights, batch: scoring.response_logps(model, weights, batch).seq_logps(2),
        out_shardings=sharding.replicated(mesh),
    )
