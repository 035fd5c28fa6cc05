"""A policy, its frozen reference, a reward model and prompts enter; a policy that earns more reward leaves.

PPO (Schulman et al. 2017, arXiv 1707.06347; for language models Ziegler et al. 2019, arXiv 1909.08593), or RLOO
(Ahmadian et al. 2024, arXiv 2402.14740) without a critic. In MPO init and reference are the DPO policy.
"""

import dataclasses
import functools
import json
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpo_jax import checkpoint, optim, sharding
from mpo_jax import metrics as metrics_log
from mpo_jax.errors import InputError
from mpo_jax.evaluation import labellers
from mpo_jax.models import config as model_config
from mpo_jax.models import hf
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import returns
from mpo_jax.sampling import SamplingConfig
from mpo_jax.stages import experience as experiences
from mpo_jax.stages import job as jobs
from mpo_jax.stages import loop, nonfinite, reward, rollouts, split
from mpo_jax.stages.experience import Rules
from mpo_jax.stages.job import Job
from mpo_jax.stages.stopwatch import Stopwatch
from mpo_jax.types import Experience, PyTree, TrainState

ALGORITHMS, KL_TERMS, CRITICS = ("ppo", "rloo"), ("k1", "k2"), ("separate", "shared")
_FORBIDDEN = ("top_k", "top_p", "min_new_tokens")
VALUE = "value"
"""The folder, within the artifact, that holds the critic's final weights."""
SAMPLES = "samples.jsonl"
"""The file with a line for each evaluation: its step, its means, and a few replies to fixed held-out prompts."""


def check(settings) -> None:
    """InputError for settings that can't be meant."""
    for name in _FORBIDDEN:
        if name in settings:
            raise InputError(f"{name}: a ppo stage samples from the full softmax, or its KL is that of another policy")
    scorers = ("reward", *labellers.LABELLERS)
    choices = {"algorithm": ALGORITHMS, "kl_term": KL_TERMS, "critic": CRITICS, "labeller": scorers}
    choices |= {"select": loop.SELECTIONS, "on_nonfinite": nonfinite.CHOICES}
    for name, allowed in choices.items():
        if settings[name] not in allowed:
            raise InputError(f"{name}: {settings[name]!r}; expected one of {', '.join(allowed)}")
    if settings.algorithm == "rloo" and settings.samples < 2:
        raise InputError(
            f"samples: {settings.samples} with rloo, whose baseline is the other samples; expected 2 or more"
        )
    if not settings.temperature > 0:
        raise InputError(f"temperature: {settings.temperature}; a ppo stage samples, expected above 0")
    if settings.minibatches < 1 or settings.batch_size % settings.minibatches:
        raise InputError(f"minibatches: {settings.minibatches} do not divide batch_size {settings.batch_size}")
    if settings.inner_epochs < 1:
        raise InputError(f"inner_epochs: {settings.inner_epochs}; expected at least 1")


def run(job: Job) -> dict[str, Any]:
    """Trains, writes the policy's (and the critic's) weights, returns the summary."""
    settings = job.settings
    check(settings)
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    prompts = split.prompts(job.inputs["prompts"])
    loader = rollouts.prompt_loader(job, prompts, settings.batch_size)
    heldout = split.heldout_prompts(job.inputs["prompts"], settings.eval_prompts)
    frozen = load_frozen(job, model)
    params = {"policy": jobs.load_weights(job, job.inputs["init"], model)}
    if settings.algorithm == "ppo":
        params["value"] = critic(job, model, params["policy"])
    sampling = sampling_config(job)
    rules = make_rules(job, load_statistics(job))
    steps = loop.total_steps(settings, loader)
    optimizer, rate = make_optimizer(settings, steps)
    gold = make_labeller(settings.labeller, sampling, tokenizer)
    state = loop.abstract_state(optimizer, params, job.mesh, first_extra(settings))
    training = loop.Training(
        step=make_step(job, model, rules, sampling, optimizer, state, gold),
        optimizer=optimizer,
        rate=rate,
        params=params,
        frozen=frozen,
        loader=loader,
        evaluate=make_evaluation(job, model, rules, sampling, tokenizer, heldout),
        settings=settings,
        key=jobs.key(job),
        extra=first_extra(settings),
        best="-score_within_kl",
        watch=make_watch(job.name),
    )
    params, summary = loop.train(training, job.folder, job.mesh)
    checkpoint.save_weights(job.folder / jobs.WEIGHTS, params["policy"])
    if "value" in params:
        checkpoint.save_weights(job.folder / VALUE, params["value"])
    return summary | {"prompts": len(prompts)}


def load_frozen(job: Job, model: ModelConfig) -> PyTree:
    """{"base", "reference", "reward"?, "sft"?}: the weights of a ppo stage that nothing trains."""
    dtype = jobs.frozen_dtype(job)
    roles = [role for role in ("reference", "reward", "sft") if role in job.inputs]
    if "reward" not in roles and job.settings.labeller == "reward":
        raise InputError(f"stages.{job.name}.reward: empty; name a reward stage, or a labeller")
    for role in roles:
        check_vocabulary(job, role, model)
    return {"base": jobs.base_weights(job, model)} | {
        role: jobs.load_weights(job, job.inputs[role], model, dtype) for role in roles
    }


def check_vocabulary(job: Job, role: str, model: ModelConfig) -> None:
    """InputError for an artifact whose run began with a model of another vocabulary: its ids mean other tokens."""
    artifact = job.inputs[role]
    written = artifact.folder / "config.json"
    if artifact.kind == "base" or not written.exists():
        return
    path = json.loads(written.read_text())["model"]["path"]
    size = model_config.from_folder(hf.resolve(path)).vocab_size
    if size != model.vocab_size:
        raise InputError(
            f"stages.{job.name}.{role}: {artifact.name!r} has a vocabulary of {size} tokens, the policy one of "
            f"{model.vocab_size}; expected a stage of a run from the same base model"
        )


def critic(job: Job, model: ModelConfig, policy: PyTree) -> PyTree:
    """The critic's first weights: the reward model's, or the policy's with a fresh head; a shared one is a head."""
    if "reward" in job.inputs and job.settings.critic == "separate":
        return jobs.load_weights(job, job.inputs["reward"], model)
    weights = jobs.with_head(job, model, policy)
    return {"head": weights["head"]} if job.settings.critic == "shared" else weights


def sampling_config(job: Job) -> SamplingConfig:
    """PPO samples from the full softmax at its temperature."""
    full = dict.fromkeys(_FORBIDDEN, 0)
    return rollouts.sampling_config(job, SimpleNamespace(**(job.settings.to_dict() | full)), job.settings.samples)


def load_statistics(job: Job) -> dict[str, float]:
    """The reward model's {"mean", "std"} where scores are normalised by them, else {}."""
    if not job.settings.normalise_scores:
        return {}
    if "reward" not in job.inputs:
        raise InputError("normalise_scores: needs a reward stage, whose statistics it reads")
    return json.loads((job.inputs["reward"].folder / reward.STATISTICS).read_text())


def make_rules(job: Job, statistics: dict[str, float]) -> Rules:
    settings = job.settings
    return Rules(
        temperature=settings.temperature,
        algorithm=settings.algorithm,
        gamma=settings.gamma,
        lam=settings.lam,
        whiten=settings.whiten,
        kl_term=settings.kl_term,
        missing_eos_penalty=settings.missing_eos_penalty,
        mean=statistics.get("mean"),
        std=statistics.get("std"),
        score_clip=settings.score_clip or None,
        shared_critic=settings.critic == "shared",
    )


def make_optimizer(settings, steps: int):
    """One optimizer for the policy, one for the critic, whose learning rate is its own; and the policy's rate.

    Every rollout is used for inner_epochs x minibatches updates; the schedules run over all of them.
    """
    inner = settings.inner_epochs * settings.minibatches
    chains, rates = {}, {}
    names = ["policy"] + (["value"] if settings.algorithm == "ppo" else [])
    for name in names:
        own = dict(settings.to_dict())
        if name == "value":
            own["learning_rate"] = settings.value_learning_rate or settings.learning_rate
        chains[name], rates[name] = loop.make_optimizer(SimpleNamespace(**own), steps * inner)
    return optim.by_label(chains), lambda step: rates["policy"](step * inner)


def make_labeller(labeller: str, sampling: SamplingConfig, tokenizer):
    """`(rollout) -> f32 [B,N]` scores of a labeller on the host, or None where the reward model scores."""
    if labeller == "reward":
        return None

    def gold(rollout) -> np.ndarray:
        replies = rollouts.reply_tokens(loop.on_host(rollout), sampling)
        texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=True) for row in replies for ids in row]
        return labellers.score(labeller, texts).reshape(len(replies), sampling.n)

    return gold


def scoring_step(model: ModelConfig, rules: Rules, mesh):
    """Jitted `experience.make`: rows lie over the mesh as the rollout's, metrics are everywhere."""
    where = (sharding.batch_sharding(mesh), sharding.replicated(mesh))
    return jax.jit(functools.partial(experiences.make, model, rules), out_shardings=where)


def measuring_step(model: ModelConfig, rules: Rules):
    """Jitted `experience.measure`."""
    return jax.jit(functools.partial(experiences.measure, model, rules))


def update_step(settings, model: ModelConfig, rules: Rules, optimizer, state: TrainState, mesh):
    """Jitted `make_update`. state: the training's `loop.abstract_state`."""
    return loop.jit_step(make_update(settings, model, rules, optimizer, mesh), state, mesh)


def first_extra(settings) -> dict[str, np.float32]:
    """The state's scalars before the first step."""
    return {"kl_coefficient": np.float32(settings.kl_coefficient)}


def make_step(
    job: Job, model: ModelConfig, rules: Rules, sampling: SamplingConfig, optimizer, state: TrainState, gold
) -> loop.Step:
    """Rollout, scoring and update, each jitted once for a bucket of prompts. state: the training's abstract state.

    The rollout sees the policy of the step before and nothing newer. Only a labeller on the host waits for the device.
    """
    draw = rollouts.sampler(model, sampling, job.mesh)
    prepare = scoring_step(model, rules, job.mesh)
    update = update_step(job.settings, model, rules, optimizer, state, job.mesh)
    watch = Stopwatch()

    def step(state: TrainState, frozen: PyTree, prompts):
        watch.begin()
        rollout = draw(frozen["base"] | state.params["policy"], prompts, job.seed, state.step)
        seconds = {"seconds_rollout": watch.lap(rollout.logps)}
        given = None if gold is None else gold(rollout)
        experience, metrics = prepare(state.params, frozen, rollout, given, state.extra["kl_coefficient"])
        seconds["seconds_scoring"] = watch.lap(experience.advantages)
        state, more = update(state, frozen, experience, metrics["kl"])
        seconds["seconds_update"] = watch.lap(more["loss"])
        return state, more | metrics | seconds | {"tokens_per_second": watch.rate(metrics["response_tokens"])}

    return step


def make_watch(name: str):
    """`(step, values)`: warns, once, of a mean KL below 0 by more than its noise: k1 of a policy's own samples is not.

    Then the replies were not drawn from the distribution that the scorer sees.
    """
    warned = False

    def watch(step: int, values: dict[str, float]) -> None:
        nonlocal warned
        if warned or values["kl"] >= -3 * values["kl_error"] - 1e-3:
            return
        warned = True
        if jax.process_index() == 0:
            print(
                f"warning: stages.{name}: at step {step} the mean KL to the reference is {values['kl']:.4f} nats, "
                f"below 0 by over 3 standard errors of {values['kl_error']:.4f}; compare sampler_scorer_difference",
                flush=True,
            )

    return watch


def make_update(settings, model: ModelConfig, rules: Rules, optimizer, mesh):
    """`(state, frozen, experience, kl) -> (state, metrics)`: inner epochs of shuffled minibatches in one program."""
    rows = settings.batch_size // settings.minibatches
    sharding.check_batch(rows, mesh, "batch_size / minibatches")
    part = settings.microbatch or rows
    sharding.check_batch(part, mesh, "microbatch")
    if rows % part:
        raise InputError(f"microbatch: {part} rows do not divide the minibatch of {rows}")
    loss = experiences.make_loss(model, rules, settings.clip, settings.value_clip or None, settings.entropy)

    def update(state: TrainState, frozen: PyTree, experience: Experience, kl: jax.Array):
        warm = (state.step >= settings.critic_warmup).astype(jnp.float32)
        frozen = {"base": frozen["base"], "kl_coefficient": state.extra["kl_coefficient"]}
        order = _minibatch_rows(jax.random.fold_in(state.key, state.step), settings)

        def one(carry, index_and_rows):
            index, chosen = index_and_rows
            params, opt_state, stopped = carry
            minibatch = take_rows(experience, chosen)

            def go(params, opt_state):
                before = params, opt_state
                key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), index)
                grads, total, weight, sums = loop.accumulate(loss, params, frozen, minibatch, key, rows // part)
                weight = jnp.maximum(weight, 1e-8)
                grads = jax.tree.map(lambda g: g / weight, grads)
                updates, opt_state = optimizer.update(grads, opt_state, params)
                # Not the gradients: a critic on the policy's trunk would move it, and the moments may warm up.
                updates |= {"policy": jax.tree.map(lambda u: warm * u, updates["policy"])}
                out = loop.means(sums) | {"loss": total / weight, "grad_norm": optax.tree.norm(grads)}
                updated = optax.apply_updates(params, updates), opt_state
                if settings.on_nonfinite == "skip":
                    ok = nonfinite.finite(out["loss"], out["grad_norm"])
                    updated = nonfinite.kept_where(ok, updated, before)
                return *updated, out

            if not settings.target_kl:  # nothing stops: a branch would copy the state
                params, opt_state, out = go(params, opt_state)
                return (params, opt_state, stopped), out | {"updates": jnp.float32(1)}
            shapes = jax.eval_shape(go, params, opt_state)[2]
            skipped = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            params, opt_state, out = jax.lax.cond(
                stopped, lambda params, opt_state: (params, opt_state, skipped), go, params, opt_state
            )
            out["updates"] = 1 - stopped.astype(jnp.float32)
            stopped = stopped | (out["approx_kl_k3"] > settings.target_kl)
            return (params, opt_state, stopped), out

        begin = (state.params, state.opt_state, jnp.zeros((), bool))
        (params, opt_state, _), out = jax.lax.scan(one, begin, (jnp.arange(len(order)), order))
        extra = dict(state.extra)
        if settings.kl_target:
            extra["kl_coefficient"] = returns.adapt_kl_coefficient(
                extra["kl_coefficient"], kl, settings.kl_target, settings.kl_gain
            )
            if settings.on_nonfinite == "skip":
                extra = nonfinite.kept_where(jnp.isfinite(kl), extra, dict(state.extra))
        done = jnp.sum(out["updates"])
        metrics = {name: jnp.sum(values) / done for name, values in out.items() if name != "updates"}
        metrics |= {"updates": done, "ratio_deviation_first": out["ratio_deviation"][0]}
        state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, extra=extra)
        return state, metrics

    return update


def _minibatch_rows(key: jax.Array, settings) -> jax.Array:
    """i32 [inner_epochs * minibatches, rows]: each epoch deals every row out once, in an order of its own."""
    orders = [
        jax.random.permutation(jax.random.fold_in(key, epoch), settings.batch_size)
        for epoch in range(settings.inner_epochs)
    ]
    return jnp.stack(orders).reshape(settings.inner_epochs * settings.minibatches, -1)


def take_rows(experience: Experience, rows: jax.Array) -> Experience:
    """Some rows of every array, spread over the mesh again."""
    return jax.tree.map(lambda x: sharding.constrain(x[rows], "batch", *(None,) * (x.ndim - 1)), experience)


def make_evaluation(job: Job, model, rules: Rules, sampling: SamplingConfig, tokenizer, prompts) -> loop.Evaluate:
    """Samples replies to fixed held-out prompts, scores them, and adds a table of some to SAMPLES.

    score_within_kl is the mean score where the KL to the reference is within the stage's best_kl, else -inf.
    gold_score, where the stage names a gold labeller, is one that nothing learns from: it shows over-optimisation.
    """
    settings = job.settings
    one = dataclasses.replace(sampling, n=1)
    label, gold = (make_labeller(name, one, tokenizer) for name in (settings.labeller, settings.gold or "reward"))
    loader = rollouts.prompt_loader(job, prompts, settings.batch_size, shuffle=False)
    draw = rollouts.sampler(model, one, job.mesh)
    scored = measuring_step(model, rules)

    def evaluate(params: PyTree, frozen: PyTree, step: int) -> dict[str, float]:
        sums: loop.Metrics = {}
        table: list[dict[str, Any]] = []
        with loader.sample(settings.eval_batches) as stream:
            for batch in stream:
                rollout = draw(frozen["base"] | params["policy"], batch, job.seed, 0)
                given = None if label is None else label(rollout)
                new, scores = scored(params, frozen, rollout, given)
                if gold is not None:
                    real = np.asarray(loop.on_host(rollout.batch.weight)) > 0
                    new = new | {"gold_score": (gold(rollout)[real].sum(), real.sum())}
                sums = new if not sums else jax.tree.map(jnp.add, sums, new)
                if len(table) < settings.table_rows:
                    table += _texts(rollout, scores, sampling, tokenizer)
        found = {name: float(total) / max(float(weight), 1e-8) for name, (total, weight) in sums.items()}
        within = not settings.best_kl or found["kl"] <= settings.best_kl
        if jax.process_index() == 0:
            rows = table[: settings.table_rows]
            metrics_log.put(job.folder, SAMPLES, step, {"evaluation": found, "replies": rows})
        return found | {"score_within_kl": found["score"] if within else -math.inf}

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
        for row, reply in enumerate(rollouts.reply_tokens(host, one))
        if host.batch.weight[row] > 0
    ]
