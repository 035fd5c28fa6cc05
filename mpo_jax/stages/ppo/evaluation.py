"""A policy in training and held-out prompts enter; what its replies are worth leaves, and a few of them as text."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax import artifacts
from mpo_jax import metrics as metrics_log
from mpo_jax.evaluation import labellers
from mpo_jax.evaluation.labellers import LABELLERS
from mpo_jax.models.config import ModelConfig
from mpo_jax.sampling import SamplingConfig
from mpo_jax.stages import candidates, loop
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Job
from mpo_jax.stages.ppo import experience as experiences
from mpo_jax.stages.ppo.settings import Rules, Settings
from mpo_jax.stages.programs import Programs
from mpo_jax.types import PyTree


def make_labeller(labeller: str, sampling: SamplingConfig, tokenizer):
    """`(rollout) -> f32 [B,N]` scores of a labeller on the host, or None where the name is none's."""
    if labeller not in LABELLERS:
        return None

    def gold(rollout) -> np.ndarray:
        replies = candidates.reply_tokens(loop.on_host(rollout), sampling)
        texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=True) for row in replies for ids in row]
        return labellers.score(labeller, texts).reshape(len(replies), sampling.n)

    return gold


def measuring_step(model: ModelConfig, rules: Rules):
    """Jitted `experience.measure`."""

    def measure(params, frozen, rollout, label_scores):
        return experiences.measure(model, rules, params, frozen, rollout, label_scores)

    return jax.jit(measure)


def make_evaluation(
    job: Job[Settings], compiled: Programs, sampling: SamplingConfig, tokenizer, prompts
) -> loop.Evaluate:
    """Samples replies to fixed held-out prompts, scores them, and adds a table of some to the stage's folder.

    score_within_kl is the mean score where the KL to the reference is within the stage's best_kl, else -inf.
    gold_score, where the stage names a gold labeller, is one that nothing learns from: it shows over-optimisation.
    """
    settings = job.settings
    one = dataclasses.replace(sampling, n=1)
    label, gold = (make_labeller(name, one, tokenizer) for name in (settings.labeller, settings.gold))
    loader = candidates.prompt_loader(job, prompts, settings.batch_size, shuffle=False)
    draw = compiled.get("evaluation_rollout", compiled["rollout"]).function
    scored = compiled["measure"].function

    def evaluate(params: PyTree, frozen: PyTree, step: int) -> dict[str, float]:
        sums: loop.Metrics = {}
        table: list[dict[str, Any]] = []
        with loader.sample(settings.eval_batches) as stream:
            for batch in stream:
                rollout = draw(frozen["base"] | params["policy"], batch, job.seed, 0)
                label_scores = None if label is None else label(rollout)
                new, scores = scored(params, frozen, rollout, label_scores)
                if gold is not None:
                    real = np.asarray(loop.on_host(rollout.batch.weight)) > 0
                    new = new | {"gold_score": (gold(rollout)[real].sum(), real.sum())}
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
    host = loop.on_host(rollout)
    one = dataclasses.replace(sampling, n=1)
    prompts = np.asarray(host.batch.tokens)[:, : -sampling.max_new_tokens]
    real = np.asarray(host.batch.segments)[:, : -sampling.max_new_tokens] > 0
    values = np.asarray(loop.on_host(scores))
    return [
        {
            "prompt": tokenizer.decode(prompts[row][real[row]].tolist(), skip_special_tokens=True),
            "reply": tokenizer.decode(reply[0].tolist(), skip_special_tokens=True),
            "score": float(values[row, 0]),
        }
        for row, reply in enumerate(candidates.reply_tokens(host, one))
        if host.batch.weight[row] > 0
    ]
