"""A policy, a frozen reference and single replies, good or bad, enter; a policy that prefers the good ones leaves.

Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306): no reply needs a counterpart. They are those
that the data labels; of pairs the chosen replies are the good ones, the rejected the bad ones.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pydantic

from mpo_jax import scoring
from mpo_jax import settings as declared
from mpo_jax.artifacts import PAIRS, POLICY
from mpo_jax.data import encode
from mpo_jax.data.division import SELECT
from mpo_jax.data.encode import Encoded
from mpo_jax.data.loader import Loader
from mpo_jax.errors import InputError
from mpo_jax.evaluation.sections import Shown
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import preferences
from mpo_jax.optim import Rate
from mpo_jax.settings import Amount, Positive, changed, role, setting
from mpo_jax.stages import buckets, corpus, gradients, loop, reference, rows
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.base import PolicyTraining, Stage, Training
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Call, Programs


class Settings(PolicyTraining):
    """Kahneman-Tversky optimization of a policy on single replies, good and bad."""

    init: str = role(POLICY, "sft", "the policy that training starts from")
    reference: str = role(POLICY, "sft", "the frozen policy that the log-ratios are taken against")
    pairs: str = role(
        PAIRS,
        "split/all",
        "pairs, whose chosen replies count as good and rejected ones as bad; data: the data's own labelled replies",
        data=True,
    )
    beta: Positive = setting(
        0.1,
        "how strongly the policy is held to the reference; Ethayarajh et al. 2024, eq. 8; the default is our choice",
    )
    desirable_weight: Amount = setting(1.0, "weight of good replies in the loss; the paper's lambda_D")
    undesirable_weight: Amount = setting(1.0, "weight of bad replies in the loss; the paper's lambda_U")
    learning_rate: Rate = changed(
        Training, "learning_rate", 5e-7, "peak of the learning rate; the default is our choice"
    )

    @pydantic.model_validator(mode="after")
    def _whole_batches(self):
        if self.microbatch not in (0, self.batch_size):
            raise declared.wrong(
                "microbatch", f"{self.microbatch}, but the KL estimate is computed over a whole batch; expected 0"
            )
        return self


def make_loss(model: ModelConfig, settings: Settings) -> gradients.Loss:
    """The loss on rows of a reply and one that belongs to another prompt, whose batch carries ref_logps and label."""

    def loss(params, frozen, batch, key):
        logps = scoring.response_logps(model, frozen["base"] | params, batch).seq_logps(2)
        known = batch.ref_logps
        zero = preferences.kto_zero(logps[:, 1], known[:, 1], batch.weight)
        return preferences.kto(
            logps[:, 0], known[:, 0], batch.label > 0, batch.weight, settings.beta, zero,
            settings.desirable_weight, settings.undesirable_weight,
        )  # fmt: skip

    return loss


def replies(job: Job[Settings], model: ModelConfig) -> list[Encoded]:
    """The labelled replies that the stage learns from, and those that it is watched by, rows of one reply."""
    if "pairs" in job.inputs:
        train, heldout, _ = buckets.pairs_for(job, model)
        return [labelled(train), labelled(heldout)]
    tokenizer = jobs.load_tokenizer(job, model)
    return [corpus.share_labelled(job, model, tokenizer, share) for share in ("policy", SELECT)]


def labelled(pairs: Encoded) -> Encoded:
    """Each pair as two rows of one reply, labelled 1 (the chosen) and 0 (the rejected)."""
    every = np.arange(len(pairs))
    good = encode.take(pairs, every, replies=1)
    bad = encode.take(pairs, every, np.ones(len(pairs), bool), replies=1)
    label = np.repeat(np.asarray([1, 0], np.float32), len(pairs))
    return dataclasses.replace(encode.join(good, bad), label=label)


def with_others(rows_: Encoded, longest: int) -> Encoded:
    """The rows, each with a second reply: that of a row with another prompt, cut where the two exceed `longest` tokens.

    Half the rows away, and on from there past rows of the same prompt. The mismatch is the paper's (section 4.1), which
    takes the next row of a batch. InputError where all rows have one prompt."""
    prompt, count = rows_.prompt_id, len(rows_)
    if len(np.unique(prompt)) < 2:
        raise InputError(
            "kto: all replies are to one prompt; expected a second prompt, whose replies the KL estimate needs"
        )
    other = (np.arange(count) + count // 2) % count
    while (same := prompt[other] == prompt).any():
        other = np.where(same, (other + 1) % count, other)
    pieces: list[np.ndarray] = []
    for row, second in enumerate(other):
        first, reply = rows_.row(row)
        pieces += [first, reply, rows_.row(int(second))[1][: max(1, longest - len(first))]]
    beside = encode.assemble(
        pieces, 2, rows_.conventions, f"{rows_.key}, mismatched", id=rows_.id, prompt_id=prompt, label=rows_.label
    )
    return dataclasses.replace(beside, mixture=rows_.mixture)


@shapes.made_once
def programs(job: Job[Settings], steps: int = shapes.STEPS) -> Programs:
    """The reference's log-probs, and the training's."""
    model = jobs.model(job)
    settings = job.settings
    made_by = shapes.made_by_stage(job, "pairs")
    weights = jobs.abstract_base(job, model) | shapes.frozen_weights(job, model)
    unread = shapes.pairs(job, settings.batch_size, made_by)
    read = shapes.pairs(job, settings.batch_size, made_by, ref_logps=True, label=True)
    params = jobs.abstract_weights(model, job.mesh)
    training = loop.programs(job, model, make_loss(model, settings), params, read, steps)
    return {"reference": rows.logps_program(job, model, weights, unread, 2)} | training


def rows_for(job: Job[Settings], model: ModelConfig) -> list[Encoded]:
    """`replies`, each beside one that belongs to another prompt."""
    return [with_others(each, job.config.data.max_length) for each in replies(job, model)]


def loaders(job: Job[Settings], encoded: Sequence[Encoded], read: Sequence[np.ndarray]) -> tuple[Loader, Loader]:
    """Of the rows that are learned from, and of those that watch it. read: the reference's log-probs of each."""
    train, heldout = (
        jobs.loader(
            job,
            each,
            job.settings.batch_size,
            max_length=None,
            ref_logps=logps,
            label=each.label,
            shuffle=each is encoded[0],
        )
        for each, logps in zip(encoded, read, strict=True)
    )
    return train, heldout


def calls(job: Job[Settings]) -> Iterator[Call]:
    """See `base.Stage.calls`."""
    encoded = rows_for(job, jobs.model(job))
    train, heldout = loaders(job, encoded, [rows.unread(part) for part in encoded])
    compiled = programs(job, loop.steps_on(job, encoded[0]))
    for part in encoded:
        yield from rows.calls(job, compiled["reference"], part, job.settings.batch_size)
    yield from loop.calls(job, compiled, train, heldout)


def run(job: Job[Settings]) -> dict[str, Any]:
    """Trains, writes the weights, returns the summary."""
    model = jobs.model(job)
    encoded = rows_for(job, model)
    base = jobs.base_weights(job, model)
    steps = loop.steps_on(job, encoded[0])
    compiled = programs(job, steps)
    train, heldout = loaders(job, encoded, reference.logps(job, compiled["reference"], base, encoded))
    params = jobs.load_weights(job, job.inputs["init"], model)
    training = loop.supervised(job, compiled, params, {"base": base}, train, heldout, steps)
    params, summary = loop.train(training, steps, job.folder, job.mesh)
    jobs.save_weights(job, params)
    return summary | {"replies": len(encoded[0])}


def rows_read(job: Job[Settings], pairs: int, easy: float) -> float:
    """See `base.Stage.rows`: two of each pair."""
    return 2 * buckets.rows_of("pairs")(job, pairs, easy)


STAGE = Stage(
    kind="kto",
    settings=Settings,
    produces=POLICY,
    run=run,
    programs=programs,
    check=loop.check,
    rows=rows_read,
    calls=calls,
    shown=Shown(
        curves=(("loss", "loss"), ("accuracy", "accuracy")),
        figures=("steps", "replies", "evaluation.accuracy"),
        learns="replies",
    ),
)
