"""A policy, a frozen reference and preference pairs enter; a policy that prefers the chosen replies leaves.

Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), or IPO; the reference's log-probs are computed
once and kept for every stage that asks for the same.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mpo_jax import checkpoint, processes, scoring, sharding
from mpo_jax.data import encode
from mpo_jax.data.encode import Encoded
from mpo_jax.errors import InputError
from mpo_jax.evaluation import pairs as pair_tables
from mpo_jax.models import hf
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


def check(job: Job) -> None:
    """InputError for settings that can't be meant; nothing is loaded."""
    settings, where = job.settings, f"stages.{job.name}"
    loop.check(settings, job.mesh)
    if settings.algorithm not in ALGORITHMS:
        raise InputError(f"{where}.algorithm: {settings.algorithm!r}; expected one of {', '.join(ALGORITHMS)}")
    if not settings.beta > 0:
        raise InputError(f"{where}.beta: {settings.beta}; expected above 0")
    if not 0 <= settings.label_smoothing < 0.5:
        raise InputError(f"{where}.label_smoothing: {settings.label_smoothing}; expected 0 or more, below 0.5")
    if settings.label_smoothing and settings.algorithm != "dpo":
        raise InputError(f"{where}.label_smoothing: {settings.algorithm} has none; expected 0")
    if settings.sft < 0:
        raise InputError(f"{where}.sft: {settings.sft}; expected 0 (no such term) or more")


def run(job: Job) -> dict[str, Any]:
    """Trains, writes the weights, returns the summary."""
    check(job)
    model = jobs.model(job)
    settings = job.settings
    loss = make_loss(model, settings.algorithm, settings.beta, settings.label_smoothing, settings.sft)
    train = split.pairs(job.inputs["pairs"])
    heldout = split.heldout(job.inputs["pairs"])
    base = jobs.base_weights(job, model)
    logps = reference_logps(job, model, base, [train, heldout])
    loaders = [
        jobs.loader(job, encoded, settings.batch_size, ref_logps=reference, shuffle=encoded is train, max_length=None)
        for encoded, reference in zip((train, heldout), logps, strict=True)
    ]
    params = jobs.load_weights(job, job.inputs["init"], model)
    training = loop.supervised(loss, params, {"base": base}, loaders[0], loaders[1], settings, jobs.key(job), job.mesh)
    params, summary = loop.train(training, job.folder, job.mesh)
    checkpoint.save_weights(job.folder / jobs.WEIGHTS, params)
    judged = min(len(heldout), settings.eval_batches * settings.batch_size)
    summary |= {
        "pairs": len(train),
        "judged": summary["best" if settings.select == "best" else "evaluation"],  # of the parameters it leaves
        "heldout_pairs": judged,
        "heldout": encode.rows_fingerprint(heldout),
    }
    if jax.process_index() == 0:
        print(table(finished(job, summary["heldout"]) | {job.name: summary}, job), flush=True)
    return summary


def finished(job: Job, heldout: str) -> dict[str, Any]:
    """The summaries of the run's other dpo stages that are done and were judged on the same held-out pairs, by name."""
    return {
        name: manifest["summary"]
        for name, (_, manifest) in checkpoint.finished_stages(job.workdir).items()
        if name != job.name and manifest["kind"] == "dpo" and manifest["summary"].get("heldout") == heldout
    }


def table(summaries: Mapping[str, Mapping[str, Any]], job: Job) -> str:
    """What dpo stages are worth on held-out pairs, beside each other: a line for each.

    Reward accuracy is the share of pairs whose chosen reply has the higher implicit reward, beta log(policy/reference).
    The reference's own is 0.5: its rewards are all 0.
    """
    rows = []
    for name, summary in summaries.items():
        found = summary["judged"]
        error = pair_tables.standard_error(found["accuracy"], summary["heldout_pairs"])
        rows.append(
            {
                "policy": name,
                "pairs": f"{summary['pairs']} of {job.config.stages[name].pairs}",
                "reward accuracy": f"{found['accuracy']:.3f} ± {error:.3f}",
                "margin": f"{found['reward_margin']:.3f}",
                "log-ratio of chosen, rejected": f"{found['kl_chosen']:.2f}, {found['kl_rejected']:.2f}",
            }
        )
    heads = list(rows[0])
    lines = [heads, *([row[head] for head in heads] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    told = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"on held-out pairs ({job.settings.reference}: reward accuracy 0.5 by definition)", *told])


def reference_logps(job: Job, model: ModelConfig, base, rows: Sequence[Encoded]) -> list[np.ndarray]:
    """Summed log-probs f32 [rows,2] of both replies under the reference, for each set of rows; from the run's cache
    where they are there, so that the reference is loaded only if it is needed.

    The key: the reference itself, the rows themselves (data, template, lengths), and how they were computed.
    """
    how = [_identity(job), model.dtype, jobs.frozen_dtype(job), "kept as read"]
    paths = [_cached(job, [*how, encode.rows_fingerprint(encoded)]) for encoded in rows]
    if not all(path.exists() for path in paths):
        weights = base | jobs.load_weights(job, job.inputs["reference"], model, jobs.frozen_dtype(job))
        step = make_reference(model, job.mesh)
        for encoded, path in zip(rows, paths, strict=True):
            loader = jobs.loader(job, encoded, job.settings.batch_size, shuffle=False, max_length=None)
            _keep(path, collect(step, weights, loader, 2))
        processes.barrier(f"{job.name} reference log-probs")
    return [_read(path) for path in paths]


def _identity(job: Job) -> list[str]:
    """What the reference's weights are: the base model's content, or a stage's key and which making of it."""
    artifact = job.inputs["reference"]
    if artifact.kind == "base":
        return [checkpoint.fingerprint_weights_folder(hf.resolve(job.config.model.path))]
    manifest = checkpoint.read_manifest(artifact.folder) or {}
    return [artifact.folder.name, manifest.get("made", "")]


def _cached(job: Job, parts: list[Any]) -> epath.Path:
    return epath.Path(job.workdir) / "cache" / f"reference-{checkpoint.hash_settings(parts)}.npy"


def _keep(path: epath.Path, logps: np.ndarray) -> None:
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        with temporary.open("wb") as file:
            np.save(file, logps)
        temporary.replace(path)


def _read(path: epath.Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.load(file)


def make_reference(model: ModelConfig, mesh):
    """Jitted `(weights, batch) -> f32 [B,2]`, on every device: the summed log-probs of both replies."""
    return jax.jit(
        lambda weights, batch: scoring.response_logps(model, weights, batch).seq_logps(2),
        out_shardings=sharding.replicated(mesh),
    )
