"""Preference pairs, from the data or sampled by a policy, and a reward model enter; easy, hard and flipped pairs leave.

The gap of a pair is its chosen score minus its rejected one, in reward units: sigmoid(gap) is the reward model's
probability that chosen is better. Gou & Nguyen 2024 (arXiv 2403.19443): easy pairs have a large gap, hard ones a small.
No pair is scored by a reward model that was trained on it: pairs come from another share of the data, or each from the
part that one of k reward models has not seen (cross-fitting).
"""

import functools
from typing import Annotated, Any, Literal

import annotated_types
import numpy as np
import pydantic

from mpo_jax import artifacts
from mpo_jax import settings as declared
from mpo_jax.artifacts import PAIRS, POLICY, REWARD, SAMPLES
from mpo_jax.data import division, encode
from mpo_jax.data.encode import Encoded
from mpo_jax.evaluation import sections, split_report
from mpo_jax.evaluation.labellers import LABELLERS
from mpo_jax.evaluation.sections import Shown
from mpo_jax.models.config import ModelConfig
from mpo_jax.run import ShareName
from mpo_jax.settings import Amount, Count, OneOf, OneOrMany, Whole, changed, role, setting
from mpo_jax.stages import buckets, candidates, gaps, rows
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.base import Stage, rows_of_share
from mpo_jax.stages.candidates import Pairing, Scored
from mpo_jax.stages.gaps import Measures
from mpo_jax.stages.job import Artifact, Job
from mpo_jax.stages.programs import Programs
from mpo_jax.types import GapTable


class Settings(Pairing, Measures):
    """Divides preference pairs into easy, hard and flipped ones by the gap of their reward-model scores."""

    reward: OneOrMany = role(
        REWARD,
        "reward",
        "the reward model that scores, which never saw the share; or the k of cross-fitting; empty where none is read",
        optional=True,
    )
    second: str = role(REWARD, "", "another reward model: pairs are flipped only where it prefers rejected too")
    policy: str = role(POLICY, "sft", "the policy whose replies are paired, where pairs are sampled", optional=True)
    pairs: str = role(SAMPLES, "", "a stage whose pairs are read; data, or empty: the data's own pairs", data=True)
    share: ShareName = setting("policy", "of the data that is divided")
    pair_source: Literal["dataset", "sampled", "both"] = setting(
        "dataset", "where pairs come from: the data (or `pairs`), the policy's own replies, or both"
    )
    labeller: Annotated[str, OneOf(LABELLERS, more=("reward",))] = changed(
        Pairing, "labeller", "reward", "who says which sampled reply is better"
    )
    threshold: Amount = setting(1.0, "gap at which a pair is easy; the paper tests 1 and 2", unit="reward units")
    quantile: Annotated[float, annotated_types.Interval(ge=0, lt=1)] = setting(
        0.0, "share of pairs beneath the threshold, instead of it; 0: use threshold"
    )
    top_k: Whole = setting(
        0, "pairs that are easy, those of the largest gaps, instead of a threshold; 0: use threshold", unit="pairs"
    )
    band: Annotated[float, annotated_types.Interval(ge=0, lt=1)] = setting(
        0.0, "share of the threshold, beneath it: pairs with gaps of such sizes are in no part"
    )
    flipped: Literal["hard", "drop", "swap"] = setting(
        "hard", "where pairs go whose gap is at most -threshold: among the hard, nowhere, or turned around; ours"
    )
    batch_size: Count = setting(32, "prompts sampled at a time", unit="rows")
    score_batch: Whole = setting(0, "rows scored at a time; 0: batch_size", unit="rows", operational=True)

    @property
    def samples_pairs(self) -> bool:
        return self.pair_source != "dataset"

    @property
    def reads_reward(self) -> bool:
        """Whether the reward model scores: where its gap is asked for, and where it chooses among sampled replies."""
        return "reward" in self.measures or self.samples_pairs

    @pydantic.model_validator(mode="after")
    def _edge(self):
        if self.quantile == 0 and self.threshold == 0 and not self.top_k:
            raise declared.wrong("threshold", "0; expected above 0, in reward units, or a quantile")
        if self.top_k and self.quantile:
            raise declared.wrong("top_k", f"{self.top_k}, beside a quantile of {self.quantile:g}; expected one of them")
        given = {"reward": self.reward, "implicit": self.implicit, "reference": self.reference}
        self.check_measures(given, self.samples_pairs)
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
        raise job.error("share", f"{job.settings.share!r}; the folds of {names[0]} are of another")


def programs(job: Job[Settings]) -> Programs:
    """The scorer of the data's pairs; the sampler, and the scorer of what it sampled."""
    model = jobs.model(job)
    settings = job.settings
    base = jobs.abstract_base(job, model)
    scorer = base | shapes.frozen_weights(job, model, head=True)
    size = settings.score_batch or settings.batch_size
    compiled: Programs = {}
    made_by = settings if settings.pair_source == "sampled" else shapes.made_by_stage(job, "pairs")
    read = shapes.pairs(job, size, made_by)
    if settings.pair_source != "sampled" and settings.reads_reward:
        compiled["score"] = rows.scoring_program(job, model, scorer, read, 2)
    if settings.samples_pairs:
        weights = base | shapes.frozen_weights(job, model)
        how = candidates.of_settings(job, settings.samples)
        compiled["sample"] = candidates.program(job, model, weights, how, settings.batch_size, scorer)
        length, window = shapes.sampled_length(job, settings, settings.samples)
        drawn = shapes.batch(job, size, length, window)
        compiled["score_samples"] = rows.scoring_program(job, model, scorer, drawn, settings.samples)
    if "second" in job.inputs:
        compiled["second"] = rows.scoring_program(job, model, scorer, read, 2)
    return compiled | gaps.programs(job, model, base | shapes.frozen_weights(job, model), read)


def run(job: Job[Settings]) -> dict[str, Any]:
    """Scores, divides, reports; leaves the pairs, their GapTable, held-out pairs made the same way, and plots."""
    settings = job.settings
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    base = jobs.base_weights(job, model)
    compiled = programs(job)
    score = make_scorer(job, model, compiled, base) if settings.reads_reward else None
    make = functools.partial(_scored_pairs, job, model, tokenizer, compiled, base, score)
    scored = make(settings.share)
    scores = gaps.scores(job, compiled, base, scored.encoded, scored.scores)
    gap = scores[:, 0] - scores[:, 1]
    threshold, bucket = divided(job, model, compiled, base, scored.encoded, gap)
    table = GapTable(
        id=scored.encoded.id,
        prompt_id=scored.encoded.prompt_id,
        score_chosen=scores[:, 0],
        score_rejected=scores[:, 1],
        gap=gap,
        bucket=bucket,
    )
    buckets.check_buckets(job.name, table, threshold, settings.flipped)
    report = split_report.build(table, scored.encoded, threshold, settings.measures, settings.gap_unit)
    for half in (division.SELECT, division.REPORT):
        jobs.write_rows(make(half).encoded, job.folder / artifacts.HELDOUT / half)
    jobs.write_rows(scored.encoded, job.folder / artifacts.PAIR_ROWS)
    if jobs.is_first():
        artifacts.write_gaps(job.folder, table)
        split_report.draw(job.folder, gap, report)
        artifacts.write_json(
            job.folder / artifacts.SAMPLE_PAIRS, split_report.samples(scored.encoded, table, tokenizer)
        )
        artifacts.write_json(job.folder / artifacts.REPORT, report)
    counts = ", ".join(f"{count} {name}" for name, count in report["counts"].items())
    jobs.say(
        f"{job.name} at gap {threshold:.4g}: {counts}; "
        f"{'the reward model' if settings.measures == ('reward',) else 'the gap'} agrees with "
        f"{report['agreement']:.3f} of the labels"
    )
    return {"threshold": threshold, "counts": report["counts"], "agreement": report["agreement"]}


def divided(job: Job[Settings], model: ModelConfig, compiled: Programs, base, encoded: Encoded, gap: np.ndarray):
    """The threshold, and the bucket of each pair: i8 [pairs]."""
    settings = job.settings
    if settings.top_k:
        threshold = buckets.top_threshold(job.name, gap, settings.top_k)
    else:
        threshold = buckets.gap_threshold(gap, settings.threshold, settings.quantile)
    bucket = buckets.buckets(gap, threshold, settings.band)
    if settings.top_k:
        bucket = buckets.only_top(bucket, gap, settings.top_k)
    if "second" in compiled:
        weights = base | jobs.load_weights(job, job.inputs["second"], model, jobs.frozen_dtype(job))
        size = settings.score_batch or settings.batch_size
        scores = rows.compute(job, compiled["second"], weights, encoded, size)
        bucket = buckets.agreed(bucket, scores[:, 0] - scores[:, 1])
    return threshold, bucket


def make_scorer(job: Job[Settings], model: ModelConfig, compiled: Programs, base):
    """`(name of a program, encoded, share) -> f32 [rows,N]`, by the job's reward model; or by k of them, each row by
    the one that has not seen its prompt, and rows of other shares, which none has seen, by the mean of all."""
    models = reward_models(job)
    size = job.settings.score_batch or job.settings.batch_size

    def scorer(artifact: Artifact):
        weights = base | jobs.load_weights(job, artifact, model, jobs.frozen_dtype(job))
        return lambda name, encoded: rows.compute(job, compiled[name], weights, encoded, size)

    if len(models) == 1:
        score = scorer(models[0])
        return lambda name, encoded, share: score(name, encoded)

    def crossfit(name: str, encoded: Encoded, share: str) -> np.ndarray:
        scores = np.zeros((len(encoded), encoded.replies), np.float32)
        parts = division.folds(encoded.prompt_id, len(models))
        for fold, artifact in enumerate(models):
            part = np.flatnonzero(parts == fold) if share == job.settings.share else np.arange(len(encoded))
            if len(part):
                scores[part] += scorer(artifact)(name, encode.take(encoded, part))
        return scores if share == job.settings.share else scores / len(models)

    return crossfit


def _scored_pairs(
    job: Job[Settings], model: ModelConfig, tokenizer, compiled: Programs, base, score, share: str
) -> Scored:
    """The share's pairs by the settings' source, scored."""
    made = []
    if job.settings.pair_source != "sampled":
        encoded = jobs.share_pairs(job, model, tokenizer, share)
        unscored = np.zeros((len(encoded), 2), np.float32)
        made.append(Scored(encoded, unscored if score is None else score("score", encoded, share)))
    if "sample" in compiled:
        made.append(sampled_pairs(job, model, tokenizer, compiled, base, score, share))
    if len(made) == 1:
        return made[0]
    return Scored(encode.join(made[0].encoded, made[1].encoded), np.concatenate([each.scores for each in made]))


def sampled_pairs(
    job: Job[Settings], model: ModelConfig, tokenizer, compiled: Programs, base, score, share: str
) -> Scored:
    """Pairs of the policy's own replies to a share's prompts; the winner is the reward model's, or a labeller's."""
    settings = job.settings
    prompts = jobs.share_prompts(job, model, tokenizer, share)
    weights = base | jobs.load_weights(job, job.inputs["policy"], model, jobs.frozen_dtype(job))
    how = candidates.of_settings(job, settings.samples)
    replies = candidates.sample_all(job, compiled["sample"], weights, prompts, how, settings.batch_size)
    drawn = candidates.with_replies(prompts, replies.tokens)
    scores = score("score_samples", drawn, share)
    if settings.labeller == "reward":
        return candidates.pair_up(drawn, scores, scores, settings.pairing, 0.0, job.seed)
    gold = candidates.label(settings.labeller, replies, tokenizer)
    return candidates.pair_up(drawn, scores, gold, settings.pairing, settings.label_temperature, job.seed)


STAGE = Stage(
    kind="split",
    settings=Settings,
    produces=PAIRS,
    run=run,
    programs=programs,
    check=check,
    rows=rows_of_share,
    shown=Shown(figures=("threshold", "counts.*", "agreement"), part="splits", make=sections.split),
    mapped=True,
)
