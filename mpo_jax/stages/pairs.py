"""A policy and prompts enter; preference pairs of its own replies leave, labelled by a scorer as a simulated annotator.

For self-labelled studies and data without labels: the labeller's Bradley-Terry choices stand in for the human's. Every
share of the data gets its pairs, so that what follows can keep them apart.
"""

import itertools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import annotated_types
import numpy as np

from mpo_jax.artifacts import POLICY, SAMPLES
from mpo_jax.data import encode, shares
from mpo_jax.data.encode import Encoded
from mpo_jax.evaluation.sections import Shown
from mpo_jax.models.config import ModelConfig
from mpo_jax.run import sources_of
from mpo_jax.settings import Count, changed, role, setting
from mpo_jax.stages import candidates, corpus, scores
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.base import Stage
from mpo_jax.stages.candidates import Pairing
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Call, Programs


class Settings(Pairing):
    """Preference pairs of a policy's own replies, labelled by a simulated annotator."""

    policy: str = role(POLICY, "sft", "the policy whose replies are paired")
    samples: Annotated[int, annotated_types.Interval(ge=2, le=4096)] = changed(Pairing, "samples", 2)
    pairing: Literal["best_worst", "all"] = changed(Pairing, "pairing", "all")
    batch_size: Count = setting(32, "prompts for which replies are sampled at a time", unit="rows")


def check(job: Job[Settings]) -> None:
    """InputError where no pairs can be sampled, or where they can't be stored; nothing is loaded."""
    jobs.check_batch(job, job.settings.batch_size)
    candidates.check_pairs(job)
    scores.check(job)


@shapes.made_once
def programs(job: Job[Settings]) -> Programs:
    """The sampler, and the labeller where it is a model."""
    model, settings = jobs.model(job), job.settings
    weights = jobs.abstract_base(job, model) | shapes.frozen_weights(job, model)
    how = candidates.of_settings(job, settings.samples)
    drawn = shapes.batch(job, settings.batch_size, *shapes.sampled_length(job, settings, settings.samples))
    held = scores.held(job, "labeller")
    return {"sample": candidates.program(job, model, weights, how, settings.batch_size, held)} | scores.programs(
        job, "labeller", {settings.samples: drawn}
    )


def prompts_by_share(job: Job[Settings], model: ModelConfig, tokenizer) -> dict[str, Encoded]:
    """The prompts of every share that the data has."""
    divisions = [jobs.data_division(job.config.data, name) for name in sources_of(job.settings)]
    names = dict.fromkeys(name for each in divisions for name in shares.names(each))
    return {name: corpus.share_prompts(job, model, tokenizer, name) for name in names}


def calls(job: Job[Settings]) -> Iterator[Call]:
    """See `base.Stage.calls`: the sampler's. How long its replies will be, for a labeller's, nobody knows."""
    settings, model = job.settings, jobs.model(job)
    prompts = encode.join(*prompts_by_share(job, model, jobs.load_tokenizer(job, model)).values())
    how = candidates.of_settings(job, settings.samples)
    return candidates.calls(job, programs(job)["sample"], prompts, how, settings.batch_size)


def run(job: Job[Settings]) -> dict[str, Any]:
    """Samples, labels, writes a folder of encoded pairs for each share that holds prompts."""
    settings = job.settings
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    policy = job.inputs["policy"]
    weights = jobs.base_weights(job, model) | jobs.load_weights(job, policy, model, jobs.frozen_dtype(job))
    of = jobs.making(policy)
    how = candidates.of_settings(job, settings.samples)
    compiled = programs(job)
    counts: dict[str, int] = {}
    unscored: dict[str, int] = {}
    with scores.opened(job, "labeller", tokenizer, compiled, settings.batch_size) as score:
        prompts_of = prompts_by_share(job, model, tokenizer)
        # All shares at once: fewer rows stand empty at the end, and one program replies to all of them.
        together = encode.join(*prompts_of.values())
        replies = candidates.sample_all(job, compiled["sample"], weights, together, how, settings.batch_size, of)
        waiting = iter(replies.tokens)
        for share, prompts in prompts_of.items():
            rows = candidates.with_replies(prompts, list(itertools.islice(waiting, len(prompts))))
            gold = score(rows)
            pairs = candidates.pair_up(rows, gold, gold, settings.pairing, settings.label_temperature, job.seed)
            counts[share], unscored[share] = len(pairs.encoded), int(np.isnan(gold).sum())
            corpus.write_rows(pairs.encoded, job.folder / share)
            gap = pairs.scores[:, 0] - pairs.scores[:, 1]
            right = float(np.mean(gap > 0))
            jobs.say(
                f"{share}: {len(gap)} pairs of {len(prompts)} prompts; in {right:.3f} of the pairs, the label agrees "
                "with the score"
            )
    return {"pairs": counts, "unscored": unscored}


STAGE = Stage(
    kind="pairs",
    settings=Settings,
    produces=SAMPLES,
    run=run,
    programs=programs,
    check=check,
    rows=lambda job, pairs, easy: pairs,
    calls=calls,
    shown=Shown(figures=("pairs.*",)),
)
