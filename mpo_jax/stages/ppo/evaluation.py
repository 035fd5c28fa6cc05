"""A policy in training and held-out prompts enter; what its replies are worth leaves, and a few of them as text."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax import artifacts, processes, progress
from mpo_jax import metrics as metrics_log
from mpo_jax.data.loader import Loader
from mpo_jax.models.config import ModelConfig
from mpo_jax.sampling import SamplingConfig
from mpo_jax.stages import candidates, gradients, loop
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Job
from mpo_jax.stages.ppo import experience as experiences
from mpo_jax.stages.ppo.others import Ask, on_host
from mpo_jax.stages.ppo.settings import Rules, Settings
from mpo_jax.stages.programs import Call, Program, Programs
from mpo_jax.types import Batch, PyTree, Rollout


def measuring_step(model: ModelConfig, rules: Rules):
    """Jitted `experience.measure`."""

    def measure(params, frozen, rollout, asked_scores):
        return experiences.measure(model, rules, params, frozen, rollout, asked_scores)

    return jax.jit(measure)


class Replied(NamedTuple):
    """A batch of held-out prompts, replied to and scored. scores: f32 [B,N]; sums: of `experience.measure`."""

    rollout: Rollout
    scores: jax.Array
    sums: gradients.Metrics


def reply(
    job: Job[Settings], compiled: Programs, loader: Loader, ask: Ask | None
) -> Callable[[PyTree, PyTree], Iterator[Replied]]:
    """`(params, frozen) ->` one reply to each of a fair sample of held-out prompts, a batch at a time. ask: None where
    the reward model alone scores; else the next batch is sampled while others score."""
    draw, measure = (program.function for program in _programs(compiled))
    batches, numbers = job.settings.eval_batches, candidates.seed_and_round(job)

    def replied(params: PyTree, frozen: PyTree) -> Iterator[Replied]:
        with loader.sample(batches) as stream:
            weights = frozen["base"] | params["policy"]
            drawn = _ahead(draw(weights, batch, *numbers) for batch in stream)
            for rollout in progress.each(drawn, "evaluate", loader.sampled(batches)):
                sums, scores = measure(params, frozen, rollout, None if ask is None else ask(frozen, rollout))
                yield Replied(rollout, scores, sums)

    return replied


def reply_calls(job: Job[Settings], compiled: Programs, one: SamplingConfig, prompts: Batch) -> Iterator[Call]:
    """What `reply` calls on prompts of a shape; where others score, without what is computed of what they say. one: how
    a single reply is sampled."""
    draw, measure = _programs(compiled)
    weights, _, *numbers = draw.arguments
    yield draw.function, (weights, prompts, *numbers)
    if not job.settings.asks:
        params, frozen, *_ = measure.arguments
        yield measure.function, (params, frozen, candidates.drawn_shapes(job, one, prompts), None)


def _programs(compiled: Programs) -> tuple[Program, Program]:
    """Those that draw one reply to each prompt and that measure it."""
    return compiled.get("evaluation_rollout", compiled["rollout"]), compiled["measure"]


def _ahead(drawn: Iterator[Rollout]) -> Iterator[Rollout]:
    """The same, each handed on when the device has been told to draw the one after it."""
    held = next(drawn, None)
    while held is not None:
        following = next(drawn, None)
        yield held
        held = following


def make_evaluation(
    job: Job[Settings], replied: Callable[[PyTree, PyTree], Iterator[Replied]], sampling: SamplingConfig, tokenizer,
    gold: Ask | None,
) -> loop.Evaluate:  # fmt: skip
    """Samples replies to fixed held-out prompts, scores them, and adds a table of some to the stage's folder.

    score_within_kl is the mean score where the KL to the reference is within the stage's best_kl, else -inf.
    gold_score, where the stage names a gold scorer, is one that nothing learns from: it shows over-optimisation.
    """
    settings = job.settings

    def evaluate(params: PyTree, frozen: PyTree, step: int) -> dict[str, float]:
        sums: gradients.Metrics = {}
        table: list[dict[str, Any]] = []
        for rollout, scores, new in replied(params, frozen):
            if gold is not None:
                found = on_host(gold(frozen, rollout))
                known = (np.asarray(processes.on_host(rollout.batch.weight)) > 0)[:, None] & ~np.isnan(found)
                new = new | {"gold_score": (found[known].sum(), known.sum())}
            sums = new if not sums else jax.tree.map(jnp.add, sums, new)
            if len(table) < settings.table_rows:
                table += _texts(rollout, scores, sampling, tokenizer)
        means = {name: float(total) / max(float(weight), 1e-8) for name, (total, weight) in sums.items()}
        within = not settings.best_kl or means["kl"] <= settings.best_kl
        if jobs.is_first():
            rows = table[: settings.table_rows]
            metrics_log.put(job.folder, artifacts.TRAINING_SAMPLES, step, {"evaluation": means, "replies": rows})
        return means | {"score_within_kl": means["score"] if within else -math.inf}

    return evaluate


def _texts(rollout, scores, sampling: SamplingConfig, tokenizer) -> list[dict[str, Any]]:
    host = processes.on_host(rollout)
    one = dataclasses.replace(sampling, n=1)
    prompts = np.asarray(host.batch.tokens)[:, : -sampling.max_new_tokens]
    real = np.asarray(host.batch.segments)[:, : -sampling.max_new_tokens] > 0
    values = np.asarray(processes.on_host(scores))
    return [
        {
            "prompt": tokenizer.decode(prompts[row][real[row]].tolist(), skip_special_tokens=True),
            "reply": tokenizer.decode(reply[0].tolist(), skip_special_tokens=True),
            "score": None if np.isnan(values[row, 0]) else float(values[row, 0]),
        }
        for row, reply in enumerate(candidates.reply_tokens(host, one))
        if host.batch.weight[row] > 0
    ]
