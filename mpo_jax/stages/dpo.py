"""A policy, a frozen reference and preference pairs enter; a policy that prefers the chosen replies leaves.

Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), or IPO; the reference's log-probs are computed
once and kept for every stage that asks for the same.
"""

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import annotated_types
import jax.numpy as jnp
import numpy as np
import pydantic
from etils import epath

from mpo_jax import artifacts, checkpoint, processes, scoring
from mpo_jax import settings as declared
from mpo_jax.artifacts import BASE, PAIRS, POLICY
from mpo_jax.data import encode
from mpo_jax.data.encode import Encoded
from mpo_jax.errors import InputError
from mpo_jax.evaluation import pairs as pair_tables
from mpo_jax.evaluation import sections
from mpo_jax.evaluation.sections import Shown
from mpo_jax.models import hf
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import losses, masks
from mpo_jax.ops.losses import OBJECTIVES
from mpo_jax.optim import Rate
from mpo_jax.settings import Amount, OneOf, Positive, changed, role, setting
from mpo_jax.stages import buckets, loop, rows
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.base import Stage, Training
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Programs


class Settings(Training):
    """Direct preference optimization of a policy on pairs."""

    init: str = role(POLICY, "sft", "the policy that training starts from")
    reference: str = role(POLICY, "sft", "the frozen policy of the log-ratios")
    pairs: str = role(PAIRS, "split/easy", "what it learns from; data: the data's own pairs", data=True)
    objective: Annotated[str, OneOf(OBJECTIVES)] = setting("dpo", "the loss")
    beta: Positive = setting(0.1, "strength of the KL leash; Rafailov et al. 2023, eq. 7; ours")
    label_smoothing: Annotated[float, annotated_types.Interval(ge=0, lt=0.5)] = setting(
        0.0, "assumed share of flipped labels (cDPO)"
    )
    sft: Amount = setting(0.0, "weight of the chosen reply's mean negative log-likelihood; 0: no such term")
    learning_rate: Rate = changed(Training, "learning_rate", 5e-7, "peak of the schedule; ours")

    @pydantic.model_validator(mode="after")
    def _smoothing(self):
        if self.label_smoothing and not OBJECTIVES[self.objective].smooths:
            raise declared.wrong("label_smoothing", f"{self.objective} has none; expected 0")
        return self


def make_loss(
    model: ModelConfig, objective: str = "dpo", beta: float = 0.1, label_smoothing: float = 0.0, sft: float = 0.0
) -> loop.Loss:
    """The loss on pairs whose batch carries ref_logps; sft: weight of the mean log-likelihood of the chosen reply."""
    preference = OBJECTIVES[objective].loss
    if OBJECTIVES[objective].smooths:
        preference = functools.partial(preference, label_smoothing=label_smoothing)

    def loss(params, frozen, batch, key):
        out = scoring.response_logps(model, frozen["base"] | params, batch)
        chosen, rejected = (out.seq_logps(2)[:, side] for side in (0, 1))
        reference = batch.ref_logps
        objective_loss = preference(chosen, rejected, reference[:, 0], reference[:, 1], batch.weight, beta)
        if sft:
            lens = jnp.sum((batch.segments == masks.FIRST_RESPONSE_SEGMENT).astype(jnp.int32), axis=1)
            objective_loss = losses.add(objective_loss, (sft, losses.chosen_nll(chosen, lens, batch.weight)))
        return objective_loss

    return loss


def programs(job: Job[Settings], steps: int = shapes.STEPS) -> Programs:
    """The reference's log-probs, and the training's."""
    model = jobs.model(job)
    settings = job.settings
    made_by = shapes.made_by_stage(job, "pairs")
    weights = jobs.abstract_base(job, model) | shapes.frozen_weights(job, model)
    unread = shapes.pairs(job, settings.batch_size, made_by)
    read = shapes.pairs(job, settings.batch_size, made_by, ref_logps=True)
    loss = make_loss(model, settings.objective, settings.beta, settings.label_smoothing, settings.sft)
    training = loop.programs(job, model, loss, jobs.abstract_weights(model, job.mesh), read, steps)
    return {"reference": rows.logps_program(job, model, weights, unread, 2)} | training


def run(job: Job[Settings]) -> dict[str, Any]:
    """Trains, writes the weights, returns the summary."""
    model = jobs.model(job)
    settings = job.settings
    train, heldout = buckets.pairs_for(job, model)
    base = jobs.base_weights(job, model)
    loader = functools.partial(jobs.loader, job, batch_size=settings.batch_size, max_length=None)
    steps = loop.total_steps(job, loader(train))
    compiled = programs(job, steps)
    logps = reference_logps(job, compiled, base, [train, heldout])
    training_rows, heldout_rows = (
        loader(encoded, ref_logps=reference, shuffle=encoded is train)
        for encoded, reference in zip((train, heldout), logps, strict=True)
    )
    params = jobs.load_weights(job, job.inputs["init"], model)
    training = loop.supervised(job, compiled, params, {"base": base}, training_rows, heldout_rows, steps)
    params, summary = loop.train(training, steps, job.folder, job.mesh)
    jobs.save_weights(job, params)
    judged = min(len(heldout), settings.eval_batches * settings.batch_size)
    summary |= {
        "pairs": len(train),
        "judged": summary["best" if settings.select == "best" else "evaluation"],  # of the parameters it leaves
        "heldout_pairs": judged,
        "heldout": encode.rows_fingerprint(heldout),
    }
    jobs.say(table(finished(job, summary["heldout"]) | {job.name: summary}, job))
    return summary


def finished(job: Job[Settings], heldout: str) -> dict[str, Any]:
    """The summaries of the run's other dpo stages that are done and were judged on the same held-out pairs, by name."""
    return {
        name: manifest["summary"]
        for name, (_, manifest) in artifacts.finished_stages(job.workdir).items()
        if name != job.name and manifest["kind"] == job.settings.kind and manifest["summary"].get("heldout") == heldout
    }


def table(summaries: Mapping[str, Mapping[str, Any]], job: Job[Settings]) -> str:
    """What dpo stages are worth on held-out pairs, beside each other: a line for each.

    Reward accuracy is the share of pairs whose chosen reply has the higher implicit reward, beta log(policy/reference).
    The reference's own is 0.5: its rewards are all 0.
    """
    rows = []
    for name, summary in summaries.items():
        judged = summary["judged"]
        error = pair_tables.standard_error(judged["accuracy"], summary["heldout_pairs"])
        rows.append(
            {
                "policy": name,
                "pairs": f"{summary['pairs']} of {job.config.stages[name].pairs}",
                "reward accuracy": f"{judged['accuracy']:.3f} ± {error:.3f}",
                "margin": f"{judged['reward_margin']:.3f}",
                "log-ratio of chosen, rejected": f"{judged['kl_chosen']:.2f}, {judged['kl_rejected']:.2f}",
            }
        )
    heads = list(rows[0])
    lines = [heads, *([row[head] for head in heads] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    told = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"on held-out pairs ({job.settings.reference}: reward accuracy 0.5 by definition)", *told])


def reference_logps(job: Job[Settings], compiled: Programs, base, encoded: Sequence[Encoded]) -> list[np.ndarray]:
    """Summed log-probs f32 [rows,2] of both replies under the reference, for each set of rows; from the run's cache
    where they are there, so that the reference is loaded only if it is needed. compiled: the stage's programs.

    The key: the reference itself, the rows themselves (data, template, lengths), and how they were computed.
    """
    how = [_identity(job), jobs.model(job).dtype, jobs.frozen_dtype(job), "kept as read"]
    paths = [_cached(job, [*how, encode.rows_fingerprint(part)]) for part in encoded]
    if not all(_whole(path) for path in paths):
        model = jobs.model(job)
        weights = base | jobs.load_weights(job, job.inputs["reference"], model, jobs.frozen_dtype(job))
        for part, path in zip(encoded, paths, strict=True):
            logps = rows.compute(job, compiled["reference"], weights, part, job.settings.batch_size)
            if jobs.is_first():
                artifacts.write_arrays(path, {"logps": logps})
        processes.barrier(f"{job.name} reference log-probs")
    return [artifacts.read_arrays(path)["logps"] for path in paths]


def _whole(path: epath.Path) -> bool:
    """Whether cached log-probs are there and undamaged; others are made again."""
    try:
        return path.exists() and "logps" in artifacts.read_arrays(path)
    except InputError as error:
        print(f"cache: {error}", file=sys.stderr, flush=True)
        return False


def _identity(job: Job) -> list[str]:
    """What the reference's weights are: the base model's content, or a stage's key and which making of it."""
    artifact = job.inputs["reference"]
    if artifact.name == BASE:
        return [checkpoint.fingerprint_weights_folder(hf.resolve(job.config.model.path))]
    manifest = artifacts.read_manifest(artifact.folder) or {}
    return [artifact.folder.name, manifest.get("made", "")]


def _cached(job: Job, parts: list[Any]) -> epath.Path:
    return epath.Path(job.workdir) / artifacts.CACHE / f"reference-{checkpoint.hash_settings(parts)}.npz"


STAGE = Stage(
    kind="dpo",
    settings=Settings,
    produces=POLICY,
    run=run,
    programs=programs,
    check=loop.check,
    rows=buckets.rows_of("pairs"),
    shown=Shown(
        curves=(("loss", "loss"), ("reward_margin", "reward margin")),
        figures=("steps", "pairs", "judged.accuracy"),
        part="preferences",
        make=sections.preference,
    ),
)
