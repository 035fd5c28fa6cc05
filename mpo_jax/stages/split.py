"""Preference pairs, from the data or sampled by a policy, and a scorer enter; easy, hard and flipped pairs leave.

The gap of a pair is its chosen score minus its rejected one, in reward units: sigmoid(gap) is the reward model's
probability that chosen is better. Gou & Nguyen 2024 (arXiv 2403.19443): easy pairs have a large gap, hard ones a small.
No pair is scored by a reward model that was trained on it: pairs come from another share of the data, or each from the
part that one of k reward models has not seen (cross-fitting).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import annotated_types
import numpy as np
import pydantic

from mpo_jax import artifacts
from mpo_jax import settings as declared
from mpo_jax.artifacts import PAIRS, POLICY, REWARD, SAMPLES
from mpo_jax.data import division, encode
from mpo_jax.data.encode import Encoded
from mpo_jax.errors import InputError
from mpo_jax.evaluation import sections, split_report
from mpo_jax.evaluation.sections import Shown
from mpo_jax.models.config import ModelConfig
from mpo_jax.run import ShareName
from mpo_jax.scorers.names import OWN, Scorer, Scorers, own_alone
from mpo_jax.settings import Amount, Count, OneOrMany, Whole, changed, role, setting
from mpo_jax.stages import buckets, candidates, corpus, gaps, rows, scores, shards
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.base import Stage, rows_of_share
from mpo_jax.stages.candidates import Pairing, Scored
from mpo_jax.stages.gaps import Measures
from mpo_jax.stages.job import Artifact, Job
from mpo_jax.stages.programs import Call, Programs
from mpo_jax.types import Batch, GapTable


class Settings(Pairing, Measures):
    """Divides preference pairs into easy, hard and flipped ones by the gap of their scores."""

    reward: OneOrMany = role(
        REWARD,
        "reward",
        "the reward model that scores the pairs and has not learned from them, or the k models of cross-fitting; empty "
        "if none is read",
        optional=True,
    )
    scorer: Annotated[Scorer, Scorers(more=(OWN,))] = setting(
        OWN, "what scores the pairs: the reward model, or another scorer"
    )
    second: str = role(
        REWARD, "", "a second reward model; a pair is then flipped only if this one too prefers the rejected reply"
    )
    policy: str = role(
        POLICY, "sft", "the policy whose sampled replies are paired, unless pair_source=dataset", optional=True
    )
    pairs: str = role(
        SAMPLES, "", "a stage whose sampled pairs are divided; data, or empty: the data's own pairs", data=True
    )
    share: ShareName = setting("policy", "the share of the data whose pairs are divided")
    pair_source: Literal["dataset", "sampled", "both"] = setting(
        "dataset", "where the pairs come from: the data (or `pairs`), the policy's own replies, or both"
    )
    labeller: Annotated[Scorer, Scorers(more=("",))] = changed(
        Pairing,
        "labeller",
        "",
        "the scorer that decides which sampled reply is better; empty: the one that scores the pairs",
    )
    threshold: Amount = setting(1.0, "smallest gap of an easy pair; the paper tests 1 and 2", unit="reward units")
    quantile: Annotated[float, annotated_types.Interval(ge=0, lt=1)] = setting(
        0.0, "sets the threshold so that the gaps of this share of the pairs are smaller in size; 0: use `threshold`"
    )
    top_k: Whole = setting(
        0,
        "sets the threshold so that this many pairs, those with the largest gaps, are easy; 0: use `threshold`",
        unit="pairs",
    )
    band: Annotated[float, annotated_types.Interval(ge=0, lt=1)] = setting(
        0.0,
        "leaves out pairs that are nearly easy or nearly flipped: those whose gap's size is at least (1 - band) times "
        "the threshold, but below it; 0: none are left out",
    )
    flipped: Literal["hard", "drop", "swap"] = setting(
        "hard",
        "what happens to pairs whose gap is at most -threshold: they are hard, are dropped, or become easy with their "
        "replies swapped; the default is our choice",
    )
    batch_size: Count = setting(32, "prompts for which replies are sampled at a time", unit="rows")
    score_batch: Whole = setting(0, "rows scored at a time; 0: batch_size", unit="rows", operational=True)

    @property
    def samples_pairs(self) -> bool:
        return self.pair_source != "dataset"

    @property
    def scored_rows(self) -> int:
        """Rows scored at a time."""
        return self.score_batch or self.batch_size

    @property
    def reads_scores(self) -> bool:
        """Whether anybody scores: where the gap of scores is asked for, and for sampled replies."""
        return "reward" in self.measures or self.samples_pairs

    @property
    def reads_reward(self) -> bool:
        """Whether the reward model does."""
        return self.reads_scores and scores.uses_own(self.scorer)

    @property
    def scored_by(self) -> str:
        """Who it is that agrees with a label, or does not."""
        if self.measures != ("reward",):
            return f"the gap ({', '.join(self.measures)})"
        return "the reward model" if own_alone(self.scorer) else "the scorer"

    @property
    def gap_unit(self) -> str:
        return "the scorer's units" if self.scored_by == "the scorer" else super().gap_unit

    @pydantic.model_validator(mode="after")
    def _edge(self):
        if self.quantile == 0 and self.threshold == 0 and not self.top_k:
            raise declared.wrong("threshold", "0; expected above 0, in reward units, or a quantile")
        if self.top_k and self.quantile:
            raise declared.wrong("top_k", f"{self.top_k}, beside a quantile of {self.quantile:g}; expected one of them")
        own = {"reward": self.reward} if scores.uses_own(self.scorer) else {}
        self.check_measures(own | {"implicit": self.implicit, "reference": self.reference}, self.samples_pairs)
        if self.samples_pairs and not self.policy:
            raise declared.wrong("policy", "empty; expected the policy whose replies are paired")
        return self


def check(job: Job[Settings]) -> None:
    """InputError where pairs can't be sampled, and where a reward model has seen the pairs; nothing is loaded."""
    jobs.check_batch(job, job.settings.batch_size)
    if job.settings.score_batch:
        jobs.check_batch(job, job.settings.score_batch, "score_batch")
    if job.settings.samples_pairs:
        candidates.check_pairs(job)
    scores.check(job)
    models = reward_models(job) if job.settings.reads_reward else []
    if len(models) > 1:
        _check_folds(job, models)
        models = []
    for artifact in [*models, *([job.inputs["second"]] if "second" in job.inputs else [])]:
        # A pair would be scored by a model that was trained on it.
        if job.settings.pair_source == "sampled" or _learned_from(job, artifact.name) != job.settings.share:
            continue
        raise job.error(
            "share",
            f"{artifact.name!r} is trained on the share {job.settings.share!r} itself, so its gaps there would be "
            "inflated; take another share, or cross-fitting (see docs/split.md)",
        )


def reward_models(job: Job) -> list[Artifact]:
    """One, or the k of cross-fitting."""
    given: Any = job.inputs["reward"]
    return given if isinstance(given, list) else [given]


def _learned_from(job: Job, name: str) -> str:
    """The share that a reward model was trained on; "" where its kind, a plugin's, has none."""
    return getattr(job.config.stages[name], "share", "")


def _check_folds(job: Job[Settings], models: list[Artifact]) -> None:
    names = [artifact.name for artifact in models]
    folds = [job.config.stages[name] for name in names]
    if [(getattr(each, "folds", 0), getattr(each, "fold", 0)) for each in folds] != [
        (len(folds), index) for index in range(len(folds))
    ]:
        raise job.error(
            "reward",
            f"{', '.join(names)}; expected the {len(names)} models of cross-fitting, with folds={len(names)} and "
            f"fold=0 to {len(names) - 1} in this order",
        )
    if {_learned_from(job, name) for name in names} != {job.settings.share}:
        raise job.error("share", f"{job.settings.share!r}; the folds of {names[0]} are of another share")


@shapes.made_once
def programs(job: Job[Settings]) -> Programs:
    """The scorers of the data's pairs; the sampler, and the scorers of what it sampled."""
    model = jobs.model(job)
    settings = job.settings
    base = jobs.abstract_base(job, model)
    own = settings.reads_reward
    reward = base | shapes.frozen_weights(job, model, head=True) if own else base
    size = job.settings.scored_rows
    compiled: Programs = {}
    scored: dict[int, Batch] = {}
    made_by = settings if settings.pair_source == "sampled" else shapes.made_by_stage(job, "pairs")
    read = shapes.pairs(job, size, made_by)
    if settings.pair_source != "sampled" and settings.reads_scores:
        scored[2] = read
        if own:
            compiled["score"] = rows.scoring_program(job, model, reward, read, 2)
    if settings.samples_pairs:
        weights = base | shapes.frozen_weights(job, model)
        how = candidates.of_settings(job, settings.samples)
        held = [reward, *scores.held(job, "scorer", "labeller")]
        compiled["sample"] = candidates.program(job, model, weights, how, settings.batch_size, held)
        length, window = shapes.sampled_length(job, settings, settings.samples)
        drawn = shapes.batch(job, size, length, window)
        scored[settings.samples] = drawn
        if own:
            compiled["score_samples"] = rows.scoring_program(job, model, reward, drawn, settings.samples)
        compiled |= scores.programs(job, "labeller", {settings.samples: drawn})
    if "second" in job.inputs:
        head = base | shapes.frozen_weights(job, model, head=True)
        compiled["second"] = rows.scoring_program(job, model, head, read, 2)
    compiled |= gaps.programs(job, model, base | shapes.frozen_weights(job, model), read)
    return compiled | scores.programs(job, "scorer", scored)


def calls(job: Job[Settings]) -> Iterator[Call]:
    """See `base.Stage.calls`: the scorer's of pairs that are there, the sampler's of others."""
    settings, model, compiled = job.settings, jobs.model(job), programs(job)
    tokenizer = jobs.load_tokenizer(job, model)
    for share in (settings.share, division.SELECT, division.REPORT):
        if settings.samples_pairs:
            prompts = corpus.share_prompts(job, model, tokenizer, share)
            how = candidates.of_settings(job, settings.samples)
            yield from candidates.calls(job, compiled["sample"], prompts, how, settings.batch_size)
        if "score" in compiled:
            encoded = corpus.share_pairs(job, model, tokenizer, share)
            for _, which in rows_by_model(job, encoded, share):
                yield from rows.calls(job, compiled["score"], encode.take(encoded, which), job.settings.scored_rows)


def run(job: Job[Settings]) -> dict[str, Any]:
    """Scores, divides, reports; leaves the pairs, their GapTable, held-out pairs made the same way, and plots."""
    settings = job.settings
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    base = jobs.base_weights(job, model)
    compiled = programs(job)
    with contextlib.ExitStack() as stack:
        keys = ["scorer"] * settings.reads_scores + ["labeller"] * settings.samples_pairs
        asked = {
            key: stack.enter_context(scores.opened(job, key, tokenizer, compiled, job.settings.scored_rows))
            for key in keys
        }
        score = with_reward(job, model, compiled, base, asked["scorer"]) if "scorer" in asked else None
        make = functools.partial(_scored_pairs, job, model, tokenizer, compiled, base, score, asked.get("labeller"))
        scored, unscored = make(settings.share)
        heldout = {half: make(half)[0] for half in (division.SELECT, division.REPORT)}
    measured = gaps.scores(job, compiled, base, scored.encoded, scored.scores)
    threshold = edge(job, measured[:, 0] - measured[:, 1])
    table = divided(job, model, compiled, base, scored.encoded, measured, threshold)
    gap = table.gap
    if settings.top_k:
        table = dataclasses.replace(table, bucket=buckets.only_top(table.bucket, gap, settings.top_k))
    buckets.check_buckets(job.name, table, threshold, settings.flipped)
    report = split_report.build(
        table, scored.encoded, threshold, settings.measures, settings.gap_unit, settings.scored_by
    )
    for half, each in heldout.items():
        folder = job.folder / artifacts.HELDOUT / half
        corpus.write_rows(each.encoded, folder)
        if (beside := heldout_table(job, model, compiled, base, each, threshold)) is not None and jobs.is_first():
            artifacts.write_gaps(folder, beside)
    corpus.write_rows(scored.encoded, job.folder / artifacts.PAIR_ROWS)
    if jobs.is_first():
        artifacts.write_gaps(job.folder, table)
        split_report.draw(job.folder, gap, report)
        artifacts.write_json(
            job.folder / artifacts.SAMPLE_PAIRS, split_report.samples(scored.encoded, table, tokenizer)
        )
        artifacts.write_json(job.folder / artifacts.REPORT, report)
    counts = ", ".join(f"{count} {name}" for name, count in report["counts"].items())
    jobs.say(
        f"{job.name} at gap {threshold:.4g}: {counts}{f', {unscored} without a score' if unscored else ''}; "
        f"{settings.scored_by} agrees with {report['agreement']:.3f} of the labels"
    )
    return {
        "threshold": threshold,
        "counts": report["counts"],
        "agreement": report["agreement"],
        "unscored": unscored,
    }


def edge(job: Job[Settings], gap: np.ndarray) -> float:
    """The threshold that the settings ask for."""
    settings = job.settings
    if settings.top_k:
        return buckets.top_threshold(job.name, gap, settings.top_k)
    return buckets.gap_threshold(gap, settings.threshold, settings.quantile)


def divided(
    job: Job[Settings], model: ModelConfig, compiled: Programs, base, encoded: Encoded, measured: np.ndarray,
    threshold: float,
) -> GapTable:  # fmt: skip
    """Pairs in their buckets. measured: f32 [pairs,2], see `gaps.scores`."""
    gap = measured[:, 0] - measured[:, 1]
    bucket = buckets.buckets(gap, threshold, job.settings.band)
    if "second" in compiled:
        weights = base | jobs.load_weights(job, job.inputs["second"], model, jobs.frozen_dtype(job))
        of = ["second", *jobs.making(job.inputs["second"])]
        second = rows.compute(job, compiled["second"], weights, encoded, job.settings.scored_rows, of)
        bucket = buckets.agreed(bucket, second[:, 0] - second[:, 1])
    return GapTable(encoded.id, encoded.prompt_id, measured[:, 0], measured[:, 1], gap, bucket)


def heldout_table(
    job: Job[Settings], model: ModelConfig, compiled: Programs, base, scored: Scored, threshold: float
) -> GapTable | None:
    """Held-out pairs in buckets by the same rule, so that a training can be watched on the easy and on the hard ones;
    None where the gap is the data's margin, and they have none."""
    if "given" in job.settings.measures and not np.isfinite(scored.encoded.margin).all():
        return None
    measured = gaps.scores(job, compiled, base, scored.encoded, scored.scores)
    return divided(job, model, compiled, base, scored.encoded, measured, threshold)


def with_reward(job: Job[Settings], model: ModelConfig, compiled: Programs, base, score: scores.Score):
    """`(name of a program, encoded, share) -> f32 [rows,N]`: the scorer's scores, with the reward model's in them where
    it is named."""
    if not scores.uses_own(job.settings.scorer):
        return lambda name, encoded, share: score(encoded)
    own = reward_scorer(job, model, compiled, base)
    return lambda name, encoded, share: score(encoded, {OWN: functools.partial(own, name, encoded, share)})


def reward_scorer(job: Job[Settings], model: ModelConfig, compiled: Programs, base):
    """`(name of a program, encoded, share) -> f32 [rows,N]`, by the job's reward model; or by k of them, each row by
    the one that has not seen its prompt, and rows of other shares, which none has seen, by the mean of all."""
    models, size = reward_models(job), job.settings.scored_rows

    def scorer(artifact: Artifact):
        weights = shards.loaded(lambda: base | jobs.load_weights(job, artifact, model, jobs.frozen_dtype(job)))
        return lambda name, encoded: rows.compute(job, compiled[name], weights, encoded, size, jobs.making(artifact))

    if len(models) == 1:
        only = scorer(models[0])
        return lambda name, encoded, share: only(name, encoded)

    def crossfit(name: str, encoded: Encoded, share: str) -> np.ndarray:
        total = np.zeros((len(encoded), encoded.replies), np.float32)
        for artifact, which in rows_by_model(job, encoded, share):
            total[which] += scorer(artifact)(name, encode.take(encoded, which))
        return total if share == job.settings.share else total / len(models)

    return crossfit


def rows_by_model(job: Job[Settings], encoded: Encoded, share: str) -> list[tuple[Artifact, np.ndarray]]:
    """Which rows of a share each of the reward models scores, see `reward_scorer`; models of none are left out."""
    models = reward_models(job)
    every = np.arange(len(encoded))
    if len(models) == 1 or share != job.settings.share:
        return [(artifact, every) for artifact in models]
    parts = division.folds(encoded.prompt_id, len(models))
    found = ((artifact, np.flatnonzero(parts == fold)) for fold, artifact in enumerate(models))
    return [(artifact, which) for artifact, which in found if len(which)]


def _scored_pairs(
    job: Job[Settings],
    model: ModelConfig,
    tokenizer,
    compiled: Programs,
    base,
    score,
    label: scores.Score | None,
    share: str,
) -> tuple[Scored, int]:
    """The share's pairs by the settings' source, scored, where there is a `score`; and how many pairs or replies have
    none."""
    made, unscored = [], 0
    if job.settings.pair_source != "sampled":
        encoded = corpus.share_pairs(job, model, tokenizer, share)
        found = np.zeros((len(encoded), 2), np.float32) if score is None else score("score", encoded, share)
        known = ~np.isnan(found).any(axis=1)
        unscored += int(np.sum(~known))
        if not known.any():
            raise InputError(f"stages.{job.name}.scorer: none of {len(encoded)} pairs of share {share!r} has a score")
        if not known.all():
            encoded, found = encode.take(encoded, np.flatnonzero(known)), found[known]
        made.append(Scored(encoded, found))
    if label is not None:
        sampled, missing = sampled_pairs(job, model, tokenizer, compiled, base, score, label, share)
        made.append(sampled)
        unscored += missing
    if len(made) == 1:
        return made[0], unscored
    joined = encode.join(made[0].encoded, made[1].encoded)
    return Scored(joined, np.concatenate([each.scores for each in made])), unscored


def sampled_pairs(
    job: Job[Settings], model: ModelConfig, tokenizer, compiled: Programs, base, score, label: scores.Score, share: str
) -> tuple[Scored, int]:
    """Pairs of the policy's own replies to a share's prompts; the winner is the scorer's, or a labeller's. And how many
    replies have no score."""
    settings = job.settings
    prompts = corpus.share_prompts(job, model, tokenizer, share)
    policy = job.inputs["policy"]
    how = candidates.of_settings(job, settings.samples)
    replies = candidates.sample_all(
        job,
        compiled["sample"],
        lambda: base | jobs.load_weights(job, policy, model, jobs.frozen_dtype(job)),
        prompts,
        how,
        settings.batch_size,
        jobs.making(policy),
    )
    drawn = candidates.with_replies(prompts, replies.tokens)
    found = score("score_samples", drawn, share)
    # The scorer agrees with itself; noise is a labeller's.
    gold, temperature = (label(drawn), settings.label_temperature) if settings.labeller else (found, 0.0)
    pairs = candidates.pair_up(drawn, found, gold, settings.pairing, temperature, job.seed)
    return pairs, int(np.isnan(found + gold).sum())


STAGE = Stage(
    kind="split",
    settings=Settings,
    produces=PAIRS,
    run=run,
    programs=programs,
    check=check,
    rows=rows_of_share,
    calls=calls,
    shown=Shown(figures=("threshold", "counts.*", "agreement"), part="splits", make=sections.split),
)
