"""A policy and preference pairs enter; a reward model leaves: the policy's trunk with a scalar head.

Trained with the Bradley-Terry loss; its mean and standard deviation over the training pairs are stored with it, and its
report says what its scores are worth on held-out pairs.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pydantic

from mpo_jax import artifacts, scoring
from mpo_jax import settings as declared
from mpo_jax.artifacts import POLICY, REWARD, SAMPLES
from mpo_jax.data import division, encode
from mpo_jax.data.division import REPORT, SELECT
from mpo_jax.data.encode import Encoded
from mpo_jax.data.loader import Loader
from mpo_jax.evaluation import pairs as pair_tables
from mpo_jax.evaluation import reward_model
from mpo_jax.evaluation.sections import Shown
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import losses
from mpo_jax.run import ShareName
from mpo_jax.settings import Share, Whole, role, setting
from mpo_jax.stages import corpus, gradients, loop, rows
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.base import Stage, Training, rows_of_share
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Call, Programs

_RANGE = (1, 99)
"""Percentiles of the training replies' scores between which scores are those of replies like them."""


class Settings(Training):
    """A reward model, trained on preference pairs."""

    init: str = role(POLICY, "sft", "the policy whose trunk the reward model begins with")
    pairs: str = role(
        SAMPLES, "", "a stage whose sampled pairs are learned from; data, or empty: the data's own pairs", data=True
    )
    share: ShareName = setting("sft_reward", "the share of the data that is learned from")
    margin: bool = setting(False, "whether the annotator's margin, if the data has one, is subtracted in the loss")
    folds: Whole = setting(
        0, "number of parts into which the share's prompts are divided for cross-fitting; 0: learn from all of them"
    )
    fold: Whole = setting(0, "the part that is not learned from, counted from 0")
    minimum_accuracy: Share = setting(
        0.0,
        "smallest accuracy on held-out pairs: the run stops if it is lower, since gaps of such a model mean nothing; "
        "0: it never stops",
        operational=True,
    )
    score_batch: Whole = setting(
        0, "rows scored at a time for the statistics of scores; 0: batch_size", unit="rows", operational=True
    )

    @property
    def scored_rows(self) -> int:
        """Rows scored at a time."""
        return self.score_batch or self.batch_size

    @pydantic.model_validator(mode="after")
    def _fold(self):
        if self.folds and not (self.folds >= 2 and self.fold < self.folds):
            raise declared.wrong("fold", f"{self.fold} of {self.folds}; expected 2 or more folds, counted from 0")
        return self


def make_loss(model: ModelConfig, margin: bool = False) -> gradients.Loss:
    """Bradley-Terry on (chosen, rejected) rows; with `margin`, the annotator's margin is asked of the gap."""

    def loss(params, frozen, batch, key):
        scores = scoring.response_scores(model, frozen["base"] | params, batch, 2)
        return losses.reward(scores, batch.weight, batch.margin if margin else None)

    return loss


@shapes.made_once
def programs(job: Job[Settings], steps: int = shapes.STEPS) -> Programs:
    """The training's, and scoring for the statistics and the report."""
    model = jobs.model(job)
    settings = job.settings
    params = jobs.abstract_weights(model, job.mesh, head=True)
    made_by = shapes.made_by_stage(job, "pairs")
    batch = shapes.pairs(job, settings.batch_size, made_by, margin=settings.margin)
    scored = shapes.pairs(job, settings.scored_rows, made_by, margin=settings.margin)
    weights = jobs.abstract_base(job, model) | params
    training = loop.programs(job, model, make_loss(model, settings.margin), params, batch, steps)
    return training | {"score": rows.scoring_program(job, model, weights, scored, 2)}


def pairs_of(job: Job[Settings], model: ModelConfig, tokenizer) -> dict[str, Encoded]:
    """The pairs that are learned from, and both halves of those held out, by their shares."""
    settings = job.settings
    encoded = {share: corpus.share_pairs(job, model, tokenizer, share) for share in (settings.share, SELECT, REPORT)}
    if settings.margin:
        encode.check_margins(encoded[settings.share], f"stages.{job.name}.margin")
    if settings.folds:
        encoded[settings.share] = without_fold(encoded[settings.share], settings.folds, settings.fold)
    return encoded


def loaders(job: Job[Settings], encoded: Mapping[str, Encoded]) -> tuple[Loader, Loader]:
    """Of the pairs that are learned from, and of those that watch it."""
    settings = job.settings
    train, heldout = (
        jobs.loader(job, encoded[share], settings.batch_size, shuffle=share != SELECT)
        for share in (settings.share, SELECT)
    )
    return train, heldout


def calls(job: Job[Settings]) -> Iterator[Call]:
    """See `base.Stage.calls`."""
    settings, model = job.settings, jobs.model(job)
    encoded = pairs_of(job, model, jobs.load_tokenizer(job, model))
    train, heldout = loaders(job, encoded)
    compiled = programs(job, loop.total_steps(job, train))
    yield from loop.calls(job, compiled, train, heldout)
    for share in (settings.share, REPORT):
        yield from rows.calls(job, compiled["score"], encoded[share], settings.scored_rows)


def run(job: Job[Settings]) -> dict[str, Any]:
    """Trains, writes weights and statistics, returns the summary with the held-out report."""
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    settings = job.settings
    encoded = pairs_of(job, model, tokenizer)
    train, heldout = loaders(job, encoded)
    steps = loop.total_steps(job, train)
    compiled = programs(job, steps)
    params = jobs.with_head(job, model, jobs.load_weights(job, job.inputs["init"], model))
    base = jobs.base_weights(job, model)
    training = loop.supervised(job, compiled, params, {"base": base}, train, heldout, steps)
    params, summary = loop.train(training, steps, job.folder, job.mesh)
    jobs.save_weights(job, params)
    trained, held = (
        rows.compute(job, compiled["score"], base | params, encoded[share], settings.scored_rows, of=["itself"])
        for share in (settings.share, REPORT)
    )
    low, high = np.percentile(trained, _RANGE)
    statistics = {"mean": float(trained.mean()), "std": float(trained.std()), "low": float(low), "high": float(high)}
    report = pair_tables.pair_report(held, encoded[REPORT].piece_lens[:, 1:], encoded[REPORT].confidence)
    report["by_gap_decile"] = pair_tables.by_gap_decile(held[:, 0] - held[:, 1])
    report["baselines"] = {
        "shorter_wins": pair_tables.shorter_wins(encoded[REPORT].piece_lens[:, 1:]),
        "tfidf_bradley_terry": pair_tables.tfidf_bradley_terry(
            _texts(encoded[settings.share], tokenizer), _texts(encoded[REPORT], tokenizer)
        ),
    }
    report["training_accuracy"] = pair_tables.accuracy(trained[:, 0] - trained[:, 1])
    if jobs.is_first():
        artifacts.write_json(job.folder / artifacts.STATISTICS, statistics)
    jobs.say(_sentence(report))
    if report["accuracy"] < settings.minimum_accuracy:
        raise job.error(
            "minimum_accuracy",
            f"{settings.minimum_accuracy:g}, and the reward model is right on {report['accuracy']:.3f} ± "
            f"{report['accuracy_se']:.3f} of {report['pairs']} held-out pairs; its weights are kept, and with a lower "
            "minimum the same command goes on",
        )
    return summary | {"statistics": statistics, "report": report}


def without_fold(encoded: Encoded, folds: int, fold: int) -> Encoded:
    """The rows whose prompts lie in the other folds."""
    return encode.take(encoded, np.flatnonzero(division.folds(encoded.prompt_id, folds) != fold))


def _texts(encoded: Encoded, tokenizer) -> list[tuple[str, str]]:
    rows = (encoded.row(index)[1:] for index in range(len(encoded)))
    return [
        (tokenizer.decode(a.tolist(), skip_special_tokens=True), tokenizer.decode(b.tolist(), skip_special_tokens=True))
        for a, b in rows
    ]


def _sentence(report: dict[str, Any]) -> str:
    baselines = report["baselines"]
    words = baselines["tfidf_bradley_terry"]
    return (
        f"reward model: {report['accuracy']:.3f} ± {report['accuracy_se']:.3f} right of {report['pairs']} held-out "
        f"pairs; "
        f"'the shorter reply wins' {baselines['shorter_wins']:.3f}, "
        f"TF-IDF Bradley-Terry {'not computed (no scikit-learn)' if words is None else f'{words:.3f}'}"
    )


STAGE = Stage(
    kind="reward",
    settings=Settings,
    produces=REWARD,
    run=run,
    programs=programs,
    check=loop.check,
    rows=rows_of_share,
    calls=calls,
    shown=Shown(
        curves=(("loss", "loss"), ("accuracy", "accuracy")),
        figures=("steps", "report.accuracy"),
        part="rewards",
        make=reward_model.section,
    ),
)
