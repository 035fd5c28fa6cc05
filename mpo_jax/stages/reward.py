"""A policy and preference pairs enter; a reward model leaves: the policy's trunk with a scalar head.

Trained with the Bradley-Terry loss; its mean and standard deviation over the training pairs are stored with it, and its
report says what its scores are worth on held-out pairs.
"""

import functools
from typing import Any

import jax
import numpy as np

from mpo_jax import checkpoint, scoring, sharding
from mpo_jax.data import division, encode
from mpo_jax.data.encode import Encoded
from mpo_jax.data.loader import Loader
from mpo_jax.data.plan import FILLER
from mpo_jax.errors import InputError
from mpo_jax.evaluation import pairs as pair_tables
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import losses
from mpo_jax.stages import job as jobs
from mpo_jax.stages import loop
from mpo_jax.stages.job import Job

STATISTICS = "scores.json"
"""The file, beside the weights, with the training scores' mean and standard deviation, in reward units."""


def make_loss(model: ModelConfig, margin: bool = False) -> loop.Loss:
    """Bradley-Terry on (chosen, rejected) rows; with `margin`, the annotator's margin is asked of the gap."""

    def loss(params, frozen, batch, key):
        scores = scoring.response_scores(model, frozen["base"] | params, batch, 2)
        return losses.reward(scores, batch.weight, batch.margin if margin else None)

    return loss


def run(job: Job) -> dict[str, Any]:
    """Trains, writes weights and statistics, returns the summary with the held-out report."""
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    settings = job.settings
    loop.check(settings, job.mesh)
    check_fold(job)
    encoded = {share: jobs.share_pairs(job, model, tokenizer, share) for share in (settings.share, "eval")}
    if settings.margin:
        encode.check_margins(encoded[settings.share], f"stages.{job.name}.margin")
    if settings.folds:
        encoded[settings.share] = without_fold(encoded[settings.share], settings.folds, settings.fold)
    train, heldout = (
        jobs.loader(job, rows, settings.batch_size, shuffle=share != "eval") for share, rows in encoded.items()
    )
    params = jobs.with_head(job, model, jobs.load_weights(job, job.inputs["init"], model))
    base = jobs.base_weights(job, model)
    training = loop.supervised(
        make_loss(model, settings.margin), params, {"base": base}, train, heldout, settings, jobs.key(job), job.mesh
    )
    params, summary = loop.train(training, job.folder, job.mesh)
    checkpoint.save_weights(job.folder / jobs.WEIGHTS, params)
    score = functools.partial(score_rows, job, model, base | params)
    trained, held = score(encoded[settings.share]), score(encoded["eval"])
    statistics = {"mean": float(trained.mean()), "std": float(trained.std())}
    jobs.write_json(job.folder / STATISTICS, statistics)
    report = pair_tables.pair_report(held, encoded["eval"].piece_lens[:, 1:], encoded["eval"].confidence)
    report["baselines"] = {
        "shorter_wins": pair_tables.shorter_wins(encoded["eval"].piece_lens[:, 1:]),
        "tfidf_bradley_terry": pair_tables.tfidf_bradley_terry(
            _texts(encoded[settings.share], tokenizer), _texts(encoded["eval"], tokenizer)
        ),
    }
    report["training_accuracy"] = pair_tables.accuracy(trained[:, 0] - trained[:, 1])
    if jax.process_index() == 0:
        print(_sentence(report), flush=True)
    return summary | {"statistics": statistics, "report": report}


def check_fold(job: Job) -> None:
    """InputError for a fold that is none."""
    folds, fold = job.settings.folds, job.settings.fold
    if folds and not (folds >= 2 and 0 <= fold < folds):
        raise InputError(f"stages.{job.name}.fold: {fold} of {folds}; expected 2 or more folds, counted from 0")


def without_fold(encoded: Encoded, folds: int, fold: int) -> Encoded:
    """The rows whose prompts lie in the other folds."""
    return encode.take(encoded, np.flatnonzero(division.folds(encoded.prompt_id, folds) != fold))


def score_rows(job: Job, model: ModelConfig, weights, encoded: Encoded) -> np.ndarray:
    """Scores of every row's responses, f32 [rows,N], in the rows' own order; equal on every process."""
    # Rows of many samples may be longer than those of the data; no position in them is.
    batch_size = job.settings.score_batch or job.settings.batch_size
    loader = jobs.loader(job, encoded, batch_size, shuffle=False, max_length=None)
    step = scoring_step(model, encoded.replies, job.mesh)
    return collect(step, weights, loader, encoded.replies)


@functools.lru_cache(maxsize=4)
def scoring_step(model: ModelConfig, replies: int, mesh):
    """Jitted `(weights, batch) -> f32 [B,replies]`, on every device: the scores of a batch's replies.

    The same function for the same arguments, so that several models score with one compiled program."""
    return jax.jit(
        lambda weights, batch: scoring.response_scores(model, weights, batch, replies),
        out_shardings=sharding.replicated(mesh),
    )


def collect(step, weights, loader: Loader, columns: int) -> np.ndarray:
    """`step(weights, batch)` f32 [B,columns], replicated, over one epoch: f32 [rows,columns] in the rows' own order."""
    found = np.full((len(loader.encoded), columns), np.nan, np.float32)
    with loader.batches(0, loader.steps_per_epoch) as stream:
        for number, batch in enumerate(stream):
            _, rows = loader.rows(number)
            real = rows != FILLER
            found[rows[real]] = np.asarray(step(weights, batch))[real]
    return found


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
