"""A policy, its frozen reference, a scorer and prompts enter; a policy that earns higher scores leaves.

PPO (Schulman et al. 2017, arXiv 1707.06347; for language models Ziegler et al. 2019, arXiv 1909.08593), or RLOO
(Ahmadian et al. 2024, arXiv 2402.14740) without a critic. In MPO init and reference are the DPO policy.
"""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax import artifacts, processes, sharding, stopping
from mpo_jax.artifacts import POLICY
from mpo_jax.data.loader import Loader
from mpo_jax.errors import InputError
from mpo_jax.evaluation import ppo_curves
from mpo_jax.evaluation.sections import Shown
from mpo_jax.models.config import ModelConfig
from mpo_jax.sampling import SamplingConfig
from mpo_jax.stages import buckets, candidates, gradients, loop, rows, scores
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.base import Stage
from mpo_jax.stages.job import Job
from mpo_jax.stages.ppo import experience as experiences
from mpo_jax.stages.ppo import others, replay
from mpo_jax.stages.ppo.evaluation import make_evaluation, measuring_step, reply, reply_calls
from mpo_jax.stages.ppo.others import Ask
from mpo_jax.stages.ppo.settings import Settings
from mpo_jax.stages.ppo.update import (
    first_extra,
    looking_step,
    make_optimizer,
    make_step,
    make_watch,
    scored_by_others,
    scored_on_device,
    scoring_step,
    update_step,
    weighing_step,
)
from mpo_jax.stages.programs import Call, Program, Programs
from mpo_jax.types import Batch, PyTree


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
    scores.check(job)
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


@shapes.made_once
def programs(job: Job[Settings], steps: int = shapes.STEPS) -> Programs:
    """Rollout, scoring, update, and what the evaluation compiles beside them."""
    model = jobs.model(job)
    settings = job.settings
    sampling = sampling_config(job)
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
    state = gradients.abstract_state(optimizer, params, job.mesh, first_extra(settings))
    weights = frozen["base"] | params["policy"]
    prompts = shapes.batch(job, settings.batch_size, shapes.prompt_length(job), 0)
    held = (state, frozen, scores.held(job, "scorer", "gold"))
    trunks = len(params) + len(frozen) - 1

    def rollout(how: SamplingConfig, per: str) -> tuple[Program, Any]:
        """The sampler, and the shapes of what it draws."""
        draw = candidates.sampler(model, how, job.mesh)
        arguments = (weights, prompts, shapes.scalar(job), state.step)
        drawn = candidates.drawn_shapes(job, how, prompts)
        return Program(draw, arguments, shapes.decode(model, how, prompts), held, per), drawn

    sample, drawn = rollout(sampling, "step")
    asked = shapes.rows_of(job, (settings.batch_size, sampling.n), jnp.float32)
    compiled = {"rollout": sample}
    if settings.asks:
        look = looking_step(model, settings, job.mesh)
        compiled["look"] = Program(look, (params, frozen, drawn), shapes.forward(model, drawn.batch, trunks), held)
        views = shapes.on_rows(job, experiences.view_shapes(params, frozen, drawn))
        statistics = _everywhere(job, (2,)) if settings.normalise_scores else None
        prepare = weighing_step(settings, job.mesh)
        whole: tuple = (drawn, views, asked, statistics, state.extra["kl_coefficient"])
    else:
        prepare = scoring_step(model, settings, load_statistics(job), job.mesh)
        whole = (params, frozen, drawn, state.extra["kl_coefficient"])
    made = shapes.on_rows(job, experiences.shapes_of(drawn))
    update = update_step(settings, model, optimizer, state, job.mesh)
    extent = shapes.train(
        job, model, state, drawn.batch, settings.update_rows, settings.inner_epochs * settings.minibatches, adds=True
    )
    compiled |= replay.programs(job, model) | {
        "experience": Program(prepare, whole, shapes.forward(model, drawn.batch, trunks), held),
        "update": Program(
            update,
            (state, frozen, made, shapes.scalar(job, jnp.float32), *replay.batch_shapes(job)),
            extent,
        ),
    }
    single, one = rollout(dataclasses.replace(sampling, n=1), "evaluation")
    if sampling.n > 1:  # else the same program, planned once
        compiled["evaluation_rollout"] = single
    asked = shapes.rows_of(job, (settings.batch_size, 1), jnp.float32) if settings.asks else None
    forward = shapes.forward(model, one.batch, trunks)
    measured = (params, frozen, one, asked)
    compiled["measure"] = Program(measuring_step(model, settings), measured, forward, held, "evaluation")
    return compiled | others.programs(job, model, frozen, {sampling.n: drawn, 1: one})


def _everywhere(job: Job, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.replicated(job.mesh))


def step_calls(
    job: Job[Settings], compiled: Programs, how: SamplingConfig, prompts: Batch, pairs: Sequence[Batch]
) -> Iterator[Call]:
    """What a step calls of the stage's programs on prompts of a shape. how: its replies are sampled. pairs: the shape
    of what is replayed, or (). Where others score, what they say is the host's, and is left to the first step."""
    sample, update = compiled["rollout"], compiled["update"]
    weights, _, *numbers = sample.arguments
    state, frozen, _, rate, *_ = update.arguments
    yield sample.function, (weights, prompts, *numbers)
    drawn = candidates.drawn_shapes(job, how, prompts)
    if job.settings.asks:
        yield compiled["look"].function, (state.params, frozen, drawn)
        return
    yield compiled["experience"].function, (state.params, frozen, drawn, state.extra["kl_coefficient"])
    made = shapes.on_rows(job, experiences.shapes_of(drawn))
    yield update.function, (state, frozen, made, rate, *pairs)


def calls_from(
    job: Job[Settings], compiled: Programs, prompts: Loader, heldout: Loader, replayed: Loader | None, first: int = 0
) -> Iterator[Call]:
    """What the steps from one on call, and their evaluations. prompts: those that are learned from. replayed: pairs, or
    None."""
    how = sampling_config(job)
    pairs = () if replayed is None else replayed.shapes()
    for batch in prompts.shapes(loop.to_compile(job, prompts, first)):
        yield from step_calls(job, compiled, how, batch, pairs)
    for batch in heldout.sampled_shapes(job.settings.eval_batches):
        yield from reply_calls(job, compiled, dataclasses.replace(how, n=1), batch)


def calls(job: Job[Settings]) -> Iterator[Call]:
    """See `base.Stage.calls`. InputError where the reward model's statistics, which are part of a program, are not
    there yet."""
    load_statistics(job)
    model = jobs.model(job)
    prompts, heldout = loaders(job, model, jobs.load_tokenizer(job, model))
    compiled = programs(job, loop.total_steps(job, prompts))
    replayed = replay.loader(job, rows.unread)
    if replayed is not None and "replay_reference" in compiled:
        yield from rows.calls(job, compiled["replay_reference"], replayed.encoded, job.settings.batch_size)
    yield from calls_from(job, compiled, prompts, heldout, replayed)


def loaders(job: Job[Settings], model: ModelConfig, tokenizer) -> tuple[Loader, Loader]:
    """Of the prompts that are learned from, and of held-out ones."""
    settings = job.settings
    prompts, heldout = buckets.prompts_for(job, model, tokenizer, settings.eval_prompts)
    return (
        candidates.prompt_loader(job, prompts, settings.batch_size),
        candidates.prompt_loader(job, heldout, settings.batch_size, shuffle=False),
    )


def run(job: Job[Settings]) -> dict[str, Any]:
    """Trains, writes the policy's (and the critic's) weights, returns the summary."""
    with contextlib.ExitStack() as stack:
        return _run(job, stack)


def _run(job: Job[Settings], stack: contextlib.ExitStack) -> dict[str, Any]:
    settings = job.settings
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    frozen = load_frozen(job, model)
    params = {"policy": jobs.load_weights(job, job.inputs["init"], model)}
    if settings.has_critic:
        params["value"] = critic(job, model, params["policy"])
    sampling = sampling_config(job)
    one = dataclasses.replace(sampling, n=1)
    prompts, heldout = loaders(job, model, tokenizer)
    steps = loop.total_steps(job, prompts)
    compiled = programs(job, steps)

    def asker(key: str) -> Callable[[SamplingConfig], Ask]:
        return stack.enter_context(others.opened(job, key, tokenizer, compiled))

    asked = asker("scorer") if settings.asks else None
    gold = asker("gold")(one) if settings.gold else None
    replied = reply(job, compiled, heldout, None if asked is None else asked(one))
    if asked is None:
        prepare = scored_on_device(compiled)
    else:
        statistics = estimated_statistics(job, replied, params, frozen) if settings.normalise_scores else None
        prepare = scored_by_others(compiled, asked(sampling), statistics)
    optimizer, rate = make_optimizer(settings, steps)
    replayed = replay.loader(job, functools.partial(replay.reference_logps, job, compiled, frozen["base"]))
    training = loop.Trainer(
        step=make_step(job, compiled, prepare, replayed),
        optimizer=optimizer,
        rate=rate,
        params=params,
        frozen=frozen,
        loader=prompts,
        evaluate=make_evaluation(job, replied, sampling, tokenizer, gold),
        settings=settings,
        key=jobs.key(job),
        extra=first_extra(settings),
        best="-score_within_kl",
        name=job.name,
        watch=make_watch(job.name),
        policy=operator.itemgetter("policy"),
        calls=functools.partial(calls_from, job, compiled, prompts, heldout, replayed),
    )
    params, summary = loop.train(training, steps, job.folder, job.mesh)
    jobs.save_weights(job, params["policy"])
    if "value" in params:
        jobs.save_weights(job, params["value"], artifacts.VALUE)
    return summary | {"prompts": len(prompts.encoded)}


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
    if job.preset is not None or job.planned:
        return 0.0, 1.0
    statistics = artifacts.read_json(job.inputs["reward"].folder / artifacts.STATISTICS)
    return statistics["mean"], statistics["std"]


def estimated_statistics(job: Job[Settings], replied, params: PyTree, frozen: PyTree) -> np.ndarray:
    """f32 [2], mean and standard deviation of the scores that the first policy's replies to held-out prompts get, in
    the scorer's own units; kept in the stage's folder, so that a resumed stage goes on with the same."""
    file = job.folder / artifacts.STATISTICS
    if not file.exists():
        found = []
        for rollout, given, _ in replied(params, frozen):
            stopping.obey("statistics of scores")
            rows, weight = (np.asarray(processes.on_host(each)) for each in (given, rollout.batch.weight))
            found.append(rows[weight > 0].ravel())
        values = np.concatenate(found)
        values = values[~np.isnan(values)].astype(np.float64)
        if not len(values) or not values.std() > 0:
            told = "none has a score" if not len(values) else f"all have the score {values[0]:g}"
            raise job.error("normalise_scores", f"of the first policy's replies to held-out prompts, {told}")
        processes.barrier(f"{job.name} statistics")
        if jobs.is_first():
            artifacts.write_json(file, {"mean": float(values.mean()), "std": float(values.std()), "of": len(values)})
        processes.barrier(f"{job.name} statistics written")
    statistics = artifacts.read_json(file)
    jobs.say(f"{job.name}: scores have mean {statistics['mean']:.4g} and standard deviation {statistics['std']:.4g}")
    return np.array([statistics["mean"], statistics["std"]], np.float32)


STAGE = Stage(
    kind="ppo",
    settings=Settings,
    produces=POLICY,
    run=run,
    programs=programs,
    check=check,
    rows=buckets.rows_of("prompts"),
    calls=calls,
    shown=Shown(
        pictures=ppo_curves.pictures,
        curves=(
            ("response_len", "length of replies, tokens"),
            ("finished", "share of replies that end with a stop token"),
            ("repetition", "repeated 4-grams"),
            ("entropy", "entropy, nats per token"),
            ("clip_fraction", "share of clipped ratios"),
            ("approx_kl", "KL of an update, nats per token"),
            ("value_loss", "loss of the critic"),
            ("explained_variance", "share of the returns' variance that the critic explains"),
            ("grad_norm", "norm of the gradient"),
        ),
        figures=("steps", "prompts", "evaluation.score", "evaluation.kl"),
        learns="prompts",
    ),
)
