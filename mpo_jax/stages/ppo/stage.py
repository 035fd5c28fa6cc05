"""A policy, its frozen reference, a reward model and prompts enter; a policy that earns more reward leaves.

PPO (Schulman et al. 2017, arXiv 1707.06347; for language models Ziegler et al. 2019, arXiv 1909.08593), or RLOO
(Ahmadian et al. 2024, arXiv 2402.14740) without a critic. In MPO init and reference are the DPO policy.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from mpo_jax import artifacts, sharding
from mpo_jax.artifacts import POLICY
from mpo_jax.errors import InputError
from mpo_jax.evaluation.sections import Shown
from mpo_jax.models.config import ModelConfig
from mpo_jax.sampling import SamplingConfig
from mpo_jax.stages import buckets, candidates, loop
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.base import Stage
from mpo_jax.stages.job import Job
from mpo_jax.stages.ppo import replay
from mpo_jax.stages.ppo.evaluation import make_evaluation, make_labeller, measuring_step
from mpo_jax.stages.ppo.settings import Settings
from mpo_jax.stages.ppo.update import first_extra, make_optimizer, make_step, make_watch, scoring_step, update_step
from mpo_jax.stages.programs import Program, Programs
from mpo_jax.types import PyTree


def check(job: Job[Settings]) -> None:
    """InputError for what the model or the mesh can't do, and for a reward model of another vocabulary; nothing is
    loaded."""
    loop.check(job)
    if job.settings.minibatches > 1:
        try:
            sharding.check_batch(job.settings.update_rows, job.mesh, "minibatches: batch_size / minibatches")
        except InputError as error:
            raise InputError(f"stages.{job.name}.{error}") from None
    sampling_config(job)
    for role_ in ("init", "reference", "reward", "sft"):
        if role_ in job.inputs:
            check_vocabulary(job, role_)


def check_vocabulary(job: Job[Settings], role: str) -> None:
    """InputError for an artifact whose run began with a model of another vocabulary: its ids mean other tokens."""
    artifact = job.inputs[role]
    manifest = artifacts.read_manifest(artifact.folder) if artifact.name != artifacts.BASE else None
    size, own = (manifest or {}).get("vocabulary"), jobs.model(job).vocab_size
    if size is not None and size != own:
        raise job.error(
            role,
            f"{artifact.name!r} has a vocabulary of {size} tokens, the policy one of {own}; expected a stage of a run "
            "from the same base model",
        )


def programs(job: Job[Settings], steps: int = shapes.STEPS) -> Programs:
    """Rollout, scoring, update, and what the evaluation compiles beside them."""
    model = jobs.model(job)
    settings = job.settings
    sampling = sampling_config(job)
    statistics = load_statistics(job)
    params: dict[str, PyTree] = {"policy": jobs.abstract_weights(model, job.mesh)}
    if settings.has_critic:
        value = jobs.abstract_weights(model, job.mesh, head=True)
        params["value"] = {"head": value["head"]} if settings.critic == "shared" else value
    frozen = {"base": jobs.abstract_base(job, model)} | {
        role: shapes.frozen_weights(job, model, head=role == "reward")
        for role in ("reference", "reward", "sft")
        if role in job.inputs
    }
    optimizer, _ = make_optimizer(settings, steps)
    state = loop.abstract_state(optimizer, params, job.mesh, first_extra(settings))
    weights = frozen["base"] | params["policy"]
    prompts = shapes.batch(job, settings.batch_size, shapes.prompt_length(job), 0)
    held = (state, frozen)

    def rollout(how: SamplingConfig, per: str) -> tuple[Program, Any, Any]:
        """The sampler, the shapes of what it draws, and of the scores that a labeller gives that."""
        draw = candidates.sampler(model, how, job.mesh)
        arguments = (weights, prompts, shapes.scalar(job), state.step)
        drawn = shapes.on_rows(job, draw.eval_shape(*arguments))
        scores = shapes.rows_of(job, (settings.batch_size, how.n), jnp.float32)
        label_scores = None if settings.labeller == "reward" else scores
        return Program(draw, arguments, shapes.decode(model, how, prompts), held, per), drawn, label_scores

    trunks = len(params) + len(frozen) - 1
    sample, drawn, label_scores = rollout(sampling, "step")
    prepare = scoring_step(model, settings, statistics, job.mesh)
    whole = (params, frozen, drawn, label_scores, state.extra["kl_coefficient"])
    made, _ = prepare.eval_shape(*whole)
    update = update_step(settings, model, optimizer, state, job.mesh)
    extent = shapes.train(
        job, model, state, drawn.batch, settings.update_rows, settings.inner_epochs * settings.minibatches, adds=True
    )
    compiled = replay.programs(job, model) | {
        "rollout": sample,
        "experience": Program(prepare, whole, shapes.forward(model, drawn.batch, trunks), held),
        "update": Program(
            update,
            (state, frozen, shapes.on_rows(job, made), shapes.scalar(job, jnp.float32), *replay.batch_shapes(job)),
            extent,
        ),
    }
    single, drawn, label_scores = rollout(dataclasses.replace(sampling, n=1), "evaluation")
    forward = shapes.forward(model, drawn.batch, trunks)
    measured = (params, frozen, drawn, label_scores)
    measure = Program(measuring_step(model, settings), measured, forward, held, "evaluation")
    if sampling.n == 1:  # the same program, planned once
        return compiled | {"measure": measure}
    return compiled | {"evaluation_rollout": single, "measure": measure}


def run(job: Job[Settings]) -> dict[str, Any]:
    """Trains, writes the policy's (and the critic's) weights, returns the summary."""
    settings = job.settings
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    prompts, heldout = buckets.prompts_for(job, model, tokenizer, settings.eval_prompts)
    loader = candidates.prompt_loader(job, prompts, settings.batch_size)
    frozen = load_frozen(job, model)
    params = {"policy": jobs.load_weights(job, job.inputs["init"], model)}
    if settings.has_critic:
        params["value"] = critic(job, model, params["policy"])
    sampling = sampling_config(job)
    steps = loop.total_steps(job, loader)
    compiled = programs(job, steps)
    optimizer, rate = make_optimizer(settings, steps)
    replayed = replay.loader(job, compiled, frozen["base"])
    training = loop.Trainer(
        step=make_step(job, compiled, make_labeller(settings.labeller, sampling, tokenizer), replayed),
        optimizer=optimizer,
        rate=rate,
        params=params,
        frozen=frozen,
        loader=loader,
        evaluate=make_evaluation(job, compiled, sampling, tokenizer, heldout),
        settings=settings,
        key=jobs.key(job),
        extra=first_extra(settings),
        best="-score_within_kl",
        watch=make_watch(job.name),
    )
    params, summary = loop.train(training, steps, job.folder, job.mesh)
    jobs.save_weights(job, params["policy"])
    if "value" in params:
        jobs.save_weights(job, params["value"], artifacts.VALUE)
    return summary | {"prompts": len(prompts)}


def load_frozen(job: Job[Settings], model: ModelConfig) -> PyTree:
    """{"base", "reference", "reward"?, "sft"?}: the weights of a ppo stage that nothing trains."""
    dtype = jobs.frozen_dtype(job)
    roles = [role for role in ("reference", "reward", "sft") if role in job.inputs]
    return {"base": jobs.base_weights(job, model)} | {
        role: jobs.load_weights(job, job.inputs[role], model, dtype) for role in roles
    }


def critic(job: Job[Settings], model: ModelConfig, policy: PyTree) -> PyTree:
    """The critic's first weights: the reward model's, or the policy's with a fresh head; a shared one is a head."""
    if "reward" in job.inputs and job.settings.critic == "separate":
        return jobs.load_weights(job, job.inputs["reward"], model)
    weights = jobs.with_head(job, model, policy)
    return {"head": weights["head"]} if job.settings.critic == "shared" else weights


def sampling_config(job: Job[Settings]) -> SamplingConfig:
    """PPO samples from the full softmax at its temperature: of a truncated one, its KL would be that of another
    policy."""
    settings = job.settings
    return candidates.sampling_config(
        job, settings.samples, temperature=settings.temperature, max_new_tokens=settings.max_new_tokens
    )


def load_statistics(job: Job[Settings]) -> tuple[float, float] | None:
    """The reward model's mean and standard deviation where scores are normalised by them; of a reward model that is not
    there yet, as in a plan, those that change nothing."""
    if not job.settings.normalise_scores:
        return None
    if job.preset is not None:
        return 0.0, 1.0
    statistics = artifacts.read_json(job.inputs["reward"].folder / artifacts.STATISTICS)
    return statistics["mean"], statistics["std"]


STAGE = Stage(
    kind="ppo",
    settings=Settings,
    produces=POLICY,
    run=run,
    programs=programs,
    check=check,
    rows=buckets.rows_of("prompts"),
    shown=Shown(
        curves=(("score", "score"), ("kl", "KL to the reference, nats")),
        figures=("steps", "prompts", "evaluation.score", "evaluation.kl"),
    ),
)
