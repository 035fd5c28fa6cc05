"""A rollout's experience and the training's state enter; the updated state leaves: optimizer, steps and minibatches."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpo_jax import optim, sharding
from mpo_jax.data.loader import Loader
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import returns
from mpo_jax.stages import gradients, loop, nonfinite
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.job import Job
from mpo_jax.stages.ppo import experience as experiences
from mpo_jax.stages.ppo import narrow
from mpo_jax.stages.ppo.others import Ask
from mpo_jax.stages.ppo.replay import second_loss
from mpo_jax.stages.ppo.settings import Rules, Settings
from mpo_jax.stages.programs import Programs
from mpo_jax.stages.stopwatch import Stopwatch
from mpo_jax.types import Batch, Experience, PyTree, Rollout, TrainState


def make_optimizer(settings: Settings, steps: int):
    """One optimizer for the policy, one for the critic, whose learning rate is its own; and the policy's rate.

    Every rollout is used for inner_epochs x minibatches updates; the schedules run over all of them.
    """
    inner = settings.inner_epochs * settings.minibatches
    own: dict[str, optim.Optimizer] = {"policy": settings}
    if settings.has_critic:
        rate = settings.value_learning_rate or settings.learning_rate
        own["value"] = settings.model_copy(update={"learning_rate": rate})
    chains, rates = {}, {}
    for name, each in own.items():
        chains[name], rates[name] = optim.of_settings(each, steps * inner)
    return optim.by_label(chains), lambda step: rates["policy"](step * inner)


def first_extra(settings: Settings) -> dict[str, np.float32]:
    """The state's scalars before the first step."""
    return {"kl_coefficient": np.float32(settings.kl_coefficient)}


def scoring_step(model: ModelConfig, rules: Rules, statistics: tuple[float, float] | None, mesh):
    """Jitted `experience.make` with the reward model's scores: rows lie over the mesh as the rollout's, metrics are
    everywhere."""
    where = (sharding.batch_sharding(mesh), sharding.replicated(mesh))

    def experience(params, frozen, rollout, coefficient):
        return experiences.make(model, rules, statistics, params, frozen, rollout, None, coefficient)

    return jax.jit(experience, out_shardings=where)


def looking_step(model: ModelConfig, rules: Rules, mesh):
    """Jitted `experience.look`: what the device does while others score."""

    def look(params, frozen, rollout):
        return experiences.look(model, rules, params, frozen, rollout)

    return jax.jit(look, out_shardings=sharding.batch_sharding(mesh))


def weighing_step(rules: Rules, mesh):
    """Jitted `experience.weigh_asked`."""
    where = (sharding.batch_sharding(mesh), sharding.replicated(mesh))

    def experience(rollout, views, asked, statistics, coefficient):
        return experiences.weigh_asked(rules, rollout, views, asked, statistics, coefficient)

    return jax.jit(experience, out_shardings=where)


def update_step(settings: Settings, model: ModelConfig, optimizer, state: TrainState, mesh):
    """Jitted `make_update`. state: the training's `gradients.abstract_state`."""
    return gradients.jit_step(make_update(settings, model, optimizer, narrows=mesh.size == 1), state, mesh)


Prepare = Callable[[TrainState, PyTree, Rollout], tuple[Experience, dict[str, jax.Array]]]
"""`(state, frozen, rollout) -> (experience, metrics)`."""


def scored_on_device(compiled: Programs) -> Prepare:
    """The reward model scores, in one program with all else. compiled: the stage's programs."""
    prepare = compiled["experience"].function

    def experience(state: TrainState, frozen: PyTree, rollout: Rollout):
        return prepare(state.params, frozen, rollout, state.extra["kl_coefficient"])

    return experience


def scored_by_others(compiled: Programs, ask: Ask, statistics: np.ndarray | None) -> Prepare:
    """Others score too. They are asked while the device computes what the policy and its reference say of the rollout;
    nothing newer than the rollout is waited for (not even that, if they are models on the device that read the run's
    tokens), and nothing is sampled ahead of the update."""
    look, weigh = compiled["look"].function, compiled["experience"].function

    def experience(state: TrainState, frozen: PyTree, rollout: Rollout):
        views = look(state.params, frozen, rollout)
        asked = ask(frozen, rollout)
        return weigh(rollout, views, asked, statistics, state.extra["kl_coefficient"])

    return experience


def make_step(job: Job[Settings], compiled: Programs, prepare: Prepare, replayed: Loader | None = None) -> loop.Step:
    """Rollout, scoring and update, each jitted once for a bucket of prompts. compiled: the stage's programs. replayed:
    pairs of which each step takes a batch, by its number alone.

    The rollout sees the policy of the step before and nothing newer. Only a scorer on the host waits for the device.
    """
    draw, update = (compiled[name].function for name in ("rollout", "update"))
    watch, seed = Stopwatch(), shapes.number(job, job.seed)
    numbers: list[Iterator[int]] = []

    def pairs(state: TrainState) -> tuple[Batch, ...]:
        if replayed is None:
            return ()
        if not numbers:  # the state's own number is on the device: asked for once, then counted
            numbers.append(itertools.count(int(state.step)))
        return (replayed.batch(next(numbers[0])),)

    def step(state: TrainState, frozen: PyTree, prompts):
        watch.begin()
        rollout = draw(frozen["base"] | state.params["policy"], prompts, seed, state.step)
        seconds = {"seconds_rollout": watch.lap(rollout.logps)}
        experience, metrics = prepare(state, frozen, rollout)
        seconds["seconds_scoring"] = watch.lap(experience.advantages)
        state, more = update(state, frozen, experience, metrics["kl"], *pairs(state))
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
        jobs.say(
            f"warning: stages.{name}: at step {step} the mean KL to the reference is {values['kl']:.4f} nats, "
            f"below 0 by over 3 standard errors of {values['kl_error']:.4f}; compare sampler_scorer_difference"
        )

    return watch


def make_update(settings: Settings, model: ModelConfig, optimizer, narrows: bool):
    """`(state, frozen, experience, kl, pairs) -> (state, metrics)`: inner epochs of minibatches in one program.

    pairs: a batch that is replayed, where the settings name some; its rows are dealt to the minibatches as the
    rollout's are. narrows: whether microbatches hold replies of like length, each as narrow as its longest; not on
    several devices, where every width would be one more program with all its collectives."""
    rows = settings.update_rows
    part = settings.microbatch or rows
    loss = experiences.make_loss(model, settings, settings.clip, settings.value_clip or None, settings.entropy)
    gradient = gradients.gradient(loss)
    parts = rows // part
    narrows = narrows and parts > 1
    if narrows:
        gradient = narrow.in_widths(model, gradient)
    second = second_loss(model, settings)

    def update(state: TrainState, frozen: PyTree, experience: Experience, kl: jax.Array, pairs: Batch | None = None):
        warm = (state.step >= settings.critic_warmup).astype(jnp.float32)
        frozen = {"base": frozen["base"], "kl_coefficient": state.extra["kl_coefficient"]}
        order = _minibatch_rows(jax.random.fold_in(state.key, state.step), settings)
        if narrows:
            lengths = narrow.longest(experience.rollout)
            order = jax.vmap(lambda rows: narrow.alike(rows, lengths, parts))(order)

        def one(carry, index_and_rows):
            index, chosen = index_and_rows
            params, opt_state, stopped = carry
            minibatch = take_rows(experience, chosen)

            def go(params, opt_state):
                before = params, opt_state
                key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), index)
                grads, total, weight, sums = gradients.accumulate(gradient, params, frozen, minibatch, key, parts)
                found = weight > 0
                weight = jnp.maximum(weight, 1e-8)
                grads = jax.tree.map(lambda g: g / weight, grads)
                value = total / weight
                if second is not None:
                    more, replayed = second.gradient(params, frozen, take_rows(pairs, chosen), key, parts)
                    grads = grads | {"policy": jax.tree.map(jnp.add, grads["policy"], more)}
                    value += second.coefficient * replayed
                updates, opt_state = optimizer.update(grads, opt_state, params)
                # Not the gradients: a critic on the policy's trunk would move it, and the moments may warm up.
                updates |= {"policy": jax.tree.map(lambda u: warm * u, updates["policy"])}
                out = gradients.means(sums) | {"loss": value, "grad_norm": optax.tree.norm(grads)}
                if second is not None:
                    out["replay_loss"] = replayed
                updated = optax.apply_updates(params, updates), opt_state
                if settings.on_nonfinite == "skip":
                    ok = nonfinite.finite(out["loss"], out["grad_norm"])
                    updated = nonfinite.kept_where(ok, updated, before)
                if settings.asks:  # of a minibatch without a score nothing is learned, not even by moments and decay
                    updated = nonfinite.kept_where(found, updated, before)
                    out["learned"] = found.astype(jnp.float32)
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
            if settings.asks:
                extra = nonfinite.kept_where(jnp.any(experience.rollout.batch.weight > 0), extra, dict(state.extra))
        out["updates"] *= out.pop("learned", jnp.float32(1))
        done = jnp.sum(out["updates"])
        least = jnp.maximum(done, 1)
        metrics = {name: jnp.sum(values) / least for name, values in out.items() if name != "updates"}
        metrics |= {"updates": done, "ratio_deviation_first": out["ratio_deviation"][0]}
        state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, extra=extra)
        return state, metrics

    return update


def _minibatch_rows(key: jax.Array, settings: Settings) -> jax.Array:
    """i32 [inner_epochs * minibatches, rows]: each epoch deals every row out once, in an order of its own."""
    orders = [
        jax.random.permutation(jax.random.fold_in(key, epoch), settings.batch_size)
        for epoch in range(settings.inner_epochs)
    ]
    return jnp.stack(orders).reshape(settings.inner_epochs * settings.minibatches, -1)


def take_rows(held: PyTree, rows: jax.Array) -> PyTree:
    """Some rows of every array, spread over the mesh again."""
    return jax.tree.map(lambda x: sharding.constrain(x[rows], "batch", *(None,) * (x.ndim - 1)), held)
