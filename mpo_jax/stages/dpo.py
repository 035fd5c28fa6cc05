"""A policy, a frozen reference and preference pairs enter; a policy that prefers the chosen replies leaves.

Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), or another objective of `ops/preferences.py`.
The reference's log-probs are computed once; a reference that moves is computed in every step.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import annotated_types
import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from mpo_jax import artifacts, scoring
from mpo_jax import settings as declared
from mpo_jax.artifacts import DATA, PAIRS, POLICY
from mpo_jax.data import encode
from mpo_jax.data.division import REPORT, SELECT
from mpo_jax.data.encode import Encoded
from mpo_jax.data.loader import Loader
from mpo_jax.evaluation import drift, sections
from mpo_jax.evaluation import pairs as pair_tables
from mpo_jax.evaluation.sections import Shown
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import losses, masks
from mpo_jax.ops.preferences import OBJECTIVES
from mpo_jax.optim import Rate
from mpo_jax.settings import Amount, OneOf, Positive, Share, Whole, changed, role, setting
from mpo_jax.stages import buckets, gradients, loop, reference, rows
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.base import PolicyTraining, Stage, Training
from mpo_jax.stages.curriculum import ORDERS, WEIGHTS
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Call, Programs
from mpo_jax.types import BUCKETS, Batch, PyTree


class Settings(PolicyTraining):
    """Direct preference optimization of a policy on pairs."""

    init: str = role(POLICY, "sft", "the policy that training starts from")
    reference: str = role(
        POLICY,
        "sft",
        "the frozen policy that the log-ratios are taken against; empty for objectives without a reference",
        optional=True,
    )
    pairs: str = role(PAIRS, "split/easy", "the pairs that are learned from; data: the data's own pairs", data=True)
    objective: Annotated[str, OneOf(OBJECTIVES)] = setting("dpo", "the loss; docs/objectives.md describes each")
    beta: Positive = setting(
        0.1, "how strongly the policy is held to the reference; Rafailov et al. 2023, eq. 7; the default is our choice"
    )
    label_smoothing: Annotated[float, annotated_types.Interval(ge=0, lt=0.5)] = setting(
        0.0, "share of the labels that is assumed to be wrong; for the objectives dpo (then called cDPO) and robust"
    )
    gamma: Amount = setting(
        0.5, "target margin of the rewards in the objective simpo; Meng et al. 2024, eq. 6; the default is our choice"
    )
    chosen_penalty: Amount = setting(
        50.0,
        "weight of the penalty on chosen replies that lose probability, in the objective dpop; Pal et al. 2024, eq. 3",
    )
    sft: Amount = setting(
        0.0, "weight of the chosen reply's mean negative log-likelihood, added to the loss; 0: no such term"
    )
    weight: Literal[tuple(WEIGHTS)] = setting(  # type: ignore[valid-type]
        "none", "weight of a pair in the loss: the same for all, its gap (0 if the gap is below 0), or sigmoid(gap)"
    )
    order: Literal[tuple(ORDERS)] = setting(  # type: ignore[valid-type]
        "random", "order of the pairs in an epoch: random, from the largest gap down, or from the smallest gap up"
    )
    reference_every: Whole = setting(
        0, "how often the reference is moved towards the policy (TR-DPO); 0: never", unit="steps"
    )
    reference_mix: Share = setting(
        1.0,
        "share of the policy in a reference that moves; 1: the policy replaces it; Gorbatovski et al. 2024, eqs. 3 "
        "and 4",
    )
    learning_rate: Rate = changed(
        Training, "learning_rate", 5e-7, "peak of the learning rate; the default is our choice"
    )

    @pydantic.model_validator(mode="after")
    def _meant(self):
        objective, fields = OBJECTIVES[self.objective], type(self).model_fields
        for name in sorted({name for each in OBJECTIVES.values() for name in each.settings}):
            if name not in objective.settings and getattr(self, name) != fields[name].default:
                raise declared.wrong(name, f"{self.objective} does not read it; expected {fields[name].default:g}")
        if objective.reference and not self.reference:
            raise declared.wrong("reference", f"empty; expected the frozen policy that {self.objective} compares with")
        if self.reference and not objective.reference:
            raise declared.wrong(
                "reference", f"{self.reference!r}; {self.objective} has no reference, expected an empty text"
            )
        if self.reference_every and not objective.reference:
            raise declared.wrong("reference_every", f"{self.reference_every}; {self.objective} has no reference")
        if self.pairs == DATA:  # which nobody has scored
            for name, usual in (("weight", "none"), ("order", "random")):
                if getattr(self, name) != usual:
                    raise declared.wrong(
                        name, f"{getattr(self, name)!r} needs the gaps of pairs; expected pairs of a split"
                    )
        if self.reference_mix != 1 and not self.reference_every:
            raise declared.wrong(
                "reference_mix",
                f"{self.reference_mix:g}, but the reference never moves (reference_every is 0); expected 1",
            )
        return self


def make_loss(model: ModelConfig, settings: Settings, moving: bool = False) -> gradients.Loss:
    """The loss on pairs. The reference's log-probs are the batch's ref_logps or, of one that is `moving`, computed here
    with frozen["reference"]; an objective without a reference reads neither."""

    def loss(params, frozen, batch, key):
        if moving:
            logps = scoring.response_logps(model, frozen["base"] | frozen["reference"], batch).seq_logps(2)
            batch = dataclasses.replace(batch, ref_logps=logps)

        def of_rows(out, rows):
            return _loss(settings, _compared(settings, out, rows), rows)

        return scoring.response_loss(model, frozen["base"] | params, batch, of_rows)

    return loss


def make_judge(model: ModelConfig, settings: Settings) -> gradients.Loss:
    """The loss, whose metrics tell accuracy and margin of easy, hard and flipped pairs apart too, with the share of
    each, where the batch has the pairs' buckets."""

    def of_rows(out, rows):
        given = _compared(settings, out, rows)
        total, weight, metrics = _loss(settings, given, rows)
        return total, weight, metrics | _by_bucket(settings, given, rows)

    def judge(params, frozen, batch, key):
        return scoring.response_loss(model, frozen["base"] | params, batch, of_rows)

    return judge


def told_apart(evaluation: Mapping[str, float]) -> dict[str, float]:
    """An evaluation without the metrics of buckets that none of its pairs is in."""
    empty = tuple(f"{name}_" for name in BUCKETS if not evaluation.get(f"{name}_share", 1))
    return {name: value for name, value in evaluation.items() if not name.startswith(empty)}


def _compared(settings: Settings, out: scoring.ResponseLogps, batch: Batch) -> dict[str, Any]:
    """What the objective is given of some rows, beside its own settings."""
    objective = OBJECTIVES[settings.objective]
    chosen, rejected = (out.seq_logps(2)[:, side] for side in (0, 1))
    given = {"policy_chosen": chosen, "policy_rejected": rejected, "weight": batch.weight, "beta": settings.beta}
    if objective.reference:
        known: Any = batch.ref_logps
        given |= {"reference_chosen": known[:, 0], "reference_rejected": known[:, 1]}
    if objective.lengths:
        given |= {"chosen_len": _tokens(batch, 0), "rejected_len": _tokens(batch, 1)}
    return given | {name: getattr(settings, name) for name in objective.settings}


def _loss(settings: Settings, given: Mapping[str, Any], batch) -> losses.Loss:
    objective_loss = OBJECTIVES[settings.objective].loss(**given)
    if settings.sft:
        nll = losses.chosen_nll(given["policy_chosen"], _tokens(batch, 0), batch.weight)
        objective_loss = losses.add(objective_loss, (settings.sft, nll))
    return objective_loss


def _by_bucket(settings: Settings, given: Mapping[str, Any], batch) -> losses.Metrics:
    if batch.bucket is None:
        return {}
    real = batch.weight > 0
    found: losses.Metrics = {}
    for index, name in enumerate(BUCKETS):
        here = real & (batch.bucket == index)
        weight = losses.kept(batch.weight, here)
        _, _, metrics = OBJECTIVES[settings.objective].loss(**dict(given) | {"weight": weight})
        found |= {f"{name}_{key}": metrics[key] for key in ("accuracy", "reward_margin") if key in metrics}
        found[f"{name}_share"] = losses.count(here), losses.count(real)
    return found


def _tokens(batch, side: int) -> jax.Array:
    """i32 [B]: tokens of the chosen (0) or rejected (1) reply."""
    return jnp.sum((batch.segments == masks.FIRST_RESPONSE_SEGMENT + side).astype(jnp.int32), axis=1)


def moved(settings: Settings, extra: PyTree, params: PyTree, step: jax.Array) -> PyTree:
    """The state's extra after `step` steps, the last of which left `params`: the reference replaced or mixed if it is
    time. Gorbatovski et al. 2024 (arXiv 2404.09656), eqs. 3 (soft) and 4 (hard), whose alpha is reference_mix."""
    now = step % settings.reference_every == 0
    share = jnp.where(now, jnp.float32(settings.reference_mix), jnp.float32(0))
    return {
        "reference": jax.tree.map(
            lambda old, new: jnp.where(share == 1, new, old + share * (new - old)), extra["reference"], params
        )
    }


@shapes.made_once
def programs(job: Job[Settings], steps: int = shapes.STEPS) -> Programs:
    """The reference's log-probs, where there is one, and the training's."""
    model = jobs.model(job)
    settings = job.settings
    made_by = shapes.made_by_stage(job, "pairs")
    weights = jobs.abstract_base(job, model) | shapes.frozen_weights(job, model)
    params = jobs.abstract_weights(model, job.mesh)
    unread = shapes.pairs(job, settings.batch_size, made_by)
    divided = "pairs" in job.inputs  # the held-out ones too
    if not OBJECTIVES[settings.objective].reference:
        judged = make_judge(model, settings), shapes.pairs(job, settings.batch_size, made_by, bucket=divided)
        return loop.programs(job, model, make_loss(model, settings), params, unread, steps, judged=judged)
    before = {"reference": rows.logps_program(job, model, weights, unread, 2)}
    read = shapes.pairs(job, settings.batch_size, made_by, ref_logps=True)
    # By the reference that stays, where it moves, so that stages can be compared.
    judged = (
        make_judge(model, settings),
        shapes.pairs(job, settings.batch_size, made_by, ref_logps=True, bucket=divided),
    )
    if not settings.reference_every:
        return before | loop.programs(job, model, make_loss(model, settings), params, read, steps, judged=judged)
    moving = loop.Extra({"reference": params}, functools.partial(moved, settings))
    return before | loop.programs(
        job, model, make_loss(model, settings, moving=True), params, unread, steps, moving, judged
    )


def loaders(job: Job[Settings], pairs: Sequence[Encoded], read: Sequence[np.ndarray | None]) -> list[Loader]:
    """Of the pairs that are learned from, and of both halves of those held out. read: the reference's log-probs of
    each, None without a reference."""
    settings = job.settings
    loader = functools.partial(jobs.loader, job, batch_size=settings.batch_size, max_length=None)
    train = loader(pairs[0], ref_logps=None if settings.reference_every else read[0], **by_gap(job))
    heldout = zip(pairs[1:], read[1:], (SELECT, REPORT), strict=True)
    return [
        train,
        *(
            loader(encoded, ref_logps=logps, shuffle=False, bucket=buckets_of(job, half))
            for encoded, logps, half in heldout
        ),
    ]


def calls(job: Job[Settings]) -> Iterator[Call]:
    """See `base.Stage.calls`."""
    pairs, size = buckets.pairs_for(job, jobs.model(job)), job.settings.batch_size
    compiled = programs(job, loop.steps_on(job, pairs[0]))
    read: list[Any] = [None] * len(pairs)
    if "reference" in compiled:
        read = [rows.unread(part) for part in pairs]
        for part in pairs:
            yield from rows.calls(job, compiled["reference"], part, size)
    train, heldout, _ = loaders(job, pairs, read)
    yield from loop.calls(job, compiled, train, heldout)


def run(job: Job[Settings]) -> dict[str, Any]:
    """Trains, writes the weights, returns the summary."""
    model = jobs.model(job)
    settings = job.settings
    pairs = train, heldout, reported = buckets.pairs_for(job, model)
    base = jobs.base_weights(job, model)
    steps = loop.steps_on(job, train)
    compiled = programs(job, steps)
    read: list[Any] = [None] * len(pairs)
    if "reference" in compiled:
        read = reference.logps(job, compiled["reference"], base, pairs)
    training_rows, heldout_rows, reported_rows = loaders(job, pairs, read)
    params = jobs.load_weights(job, job.inputs["init"], model)
    extra = {"reference": jobs.load_weights(job, job.inputs["reference"], model)} if settings.reference_every else {}
    training = loop.supervised(job, compiled, params, {"base": base}, training_rows, heldout_rows, steps, extra)
    watched = min(len(heldout), settings.eval_batches * settings.batch_size)
    params, summary = loop.train(_telling_apart(training, watched), steps, job.folder, job.mesh)
    jobs.save_weights(job, params)
    evaluate = compiled["evaluate"].function
    judged = loop.evaluate(evaluate, params, {"base": base}, reported_rows, settings.eval_batches)
    summary |= {
        "pairs": len(train),
        "judged": told_apart(judged),
        "heldout_pairs": min(len(reported), settings.eval_batches * settings.batch_size),
        "watched_pairs": watched,
        "heldout": encode.rows_fingerprint(reported),
    }
    jobs.say(table(finished(job, summary["heldout"]) | {job.name: summary}, job))
    return summary


def buckets_of(job: Job[Settings], half: str) -> np.ndarray | None:
    """The buckets of held-out pairs; None of the data's own, which nobody has divided."""
    return buckets.heldout_buckets(job.inputs["pairs"], half) if "pairs" in job.inputs else None


def _telling_apart(training: loop.Trainer, watched: int) -> loop.Trainer:
    """watched: pairs of each evaluation."""
    evaluate = training.evaluate
    assert evaluate is not None
    known = {"watched_pairs": watched}
    return dataclasses.replace(training, evaluate=lambda *given: told_apart(evaluate(*given)), known=known)


def by_gap(job: Job[Settings]) -> dict[str, Any]:
    """What the loader is told of the pairs' gaps: their weights and their order, where the settings ask for them."""
    wanted = {"weight": WEIGHTS[job.settings.weight], "order": ORDERS[job.settings.order]}
    made = {name: function for name, function in wanted.items() if function is not None}
    if not made:
        return {}
    gap = buckets.gaps(job.inputs["pairs"])
    return {name: function(gap) for name, function in made.items()}


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
                "log-ratio of chosen, rejected": ", ".join(
                    f"{judged[name]:.2f}" if name in judged else "–" for name in ("kl_chosen", "kl_rejected")
                ),
            }
        )
    heads = list(rows[0])
    lines = [heads, *([row[head] for head in heads] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    told = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    known = f" ({job.settings.reference}: reward accuracy 0.5 by definition)" if job.settings.reference else ""
    return "\n".join([f"on held-out pairs{known}", *told])


STAGE = Stage(
    kind="dpo",
    settings=Settings,
    produces=POLICY,
    run=run,
    programs=programs,
    check=loop.check,
    rows=buckets.rows_of("pairs"),
    calls=calls,
    shown=Shown(
        curves=(("loss", "loss"), ("reward_margin", "reward margin")),
        pictures=drift.pictures,
        figures=("steps", "pairs", "judged.accuracy"),
        learns="pairs",
        part="preferences",
        make=sections.preference,
    ),
)
