"""A loss, an optimizer and weights enter; a state and the steps that change it or measure it leave.

Gradients are sums over microbatches, divided once by the total weight: accumulated equals full batch under masks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpo_jax import optim, sharding
from mpo_jax.stages import nonfinite
from mpo_jax.stages.programs import named
from mpo_jax.types import Batch, PyTree, TrainState

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""name -> (sum, weight): sums add over microbatches and batches, so that their quotient is the exact mean."""

Loss = Callable[[PyTree, PyTree, Batch, jax.Array], tuple[jax.Array, jax.Array, Metrics]]
"""(params, frozen, batch, key) -> (sum, weight, metrics)."""


def init_state(optimizer, params: PyTree, key: jax.Array, mesh, extra: PyTree = None) -> TrainState:
    """A fresh state on the mesh; moments are sharded like their parameters.

    Nothing in it aliases what was given: the step donates its state, and the caller's arrays may serve others too (the
    parameters as a reference, say).
    """
    where = optim.state_shardings(optimizer, params, mesh)
    everywhere = sharding.replicated(mesh)
    return TrainState(
        step=jax.device_put(np.zeros((), np.int32), everywhere),
        params=jax.tree.map(jnp.copy, params),
        opt_state=jax.jit(optimizer.init, out_shardings=where)(params),
        key=jax.random.wrap_key_data(jax.device_put(np.asarray(jax.random.key_data(key)), everywhere)),
        extra=jax.tree.map(
            lambda x: jnp.copy(x) if isinstance(x, jax.Array) else jax.device_put(np.array(x), everywhere), extra or {}
        ),
    )


def abstract_state(optimizer, params: PyTree, mesh, extra: PyTree = None) -> TrainState:
    """Shapes and shardings of `init_state`. params: arrays or ShapeDtypeStructs, with shardings."""
    everywhere = sharding.replicated(mesh)

    def shape(leaf, where) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    moments = jax.eval_shape(optimizer.init, params)
    return TrainState(
        step=shape(np.zeros((), np.int32), everywhere),
        params=jax.tree.map(lambda leaf: shape(leaf, leaf.sharding), params),
        opt_state=jax.tree.map(shape, moments, optim.state_shardings(optimizer, params, mesh)),
        key=shape(jax.eval_shape(lambda: jax.random.key(0)), everywhere),
        extra=jax.tree.map(
            lambda x: shape(x, x.sharding) if hasattr(x, "sharding") else shape(np.asarray(x), everywhere), extra or {}
        ),
    )


def jit_step(step: Callable, state: TrainState, mesh):
    """A `(state, ...) -> (state, metrics)` jitted: the state donated, and laid out as it came; metrics everywhere."""
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, sharding.replicated(mesh)))


def train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
    skip: bool = False,
    follow: Callable[[PyTree, PyTree, jax.Array], PyTree] | None = None,
):
    """`(state, frozen, batch) -> (state, metrics)`, to be jitted with the state donated.

    Gradients of the loss's sum are added over microbatches and divided by the total weight once, so that accumulated
    equals full batch under masks. metrics: f32 scalars; "grad_norm" is the norm before clipping. skip: no update where
    the loss or that norm is not finite. follow: see `Extra.update`; the loss finds the state's extra in `frozen`.
    """

    def step(state: TrainState, frozen: PyTree, batch: Batch):
        key = jax.random.fold_in(state.key, state.step)
        grads, total, weight, sums = accumulate(
            gradient(loss), state.params, frozen | state.extra, batch, key, microbatches
        )
        grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1e-8), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        out = means(sums) | {"loss": total / jnp.maximum(weight, 1e-8), "grad_norm": optax.tree.norm(grads)}
        if skip:
            ok = nonfinite.finite(out["loss"], out["grad_norm"])
            params, opt_state = nonfinite.kept_where(ok, (params, opt_state), (state.params, state.opt_state))
        extra = state.extra if follow is None else follow(state.extra, params, state.step + 1)
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, extra=extra), out

    return step


Gradient = Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[PyTree, jax.Array, jax.Array, Metrics]]
"""(params, frozen, batch, key) -> (gradient, loss, weight, metrics), each a sum over the batch's rows."""


def gradient(loss: Loss) -> Gradient:
    def of_batch(params: PyTree, frozen: PyTree, batch: PyTree, key: jax.Array):
        def scalar(params):
            total, weight, sums = loss(params, frozen, batch, key)
            return total, (weight, sums)

        (total, (weight, sums)), grads = jax.value_and_grad(scalar, has_aux=True)(params)
        return grads, total, weight, sums

    return of_batch


def accumulate(gradient: Gradient, params, frozen, batch: PyTree, key, microbatches: int):
    """`gradient` of a whole batch, summed over its microbatches."""

    def one(part, index):
        return gradient(params, frozen, part, jax.random.fold_in(key, index))

    if microbatches == 1:
        return one(batch, 0)
    parts = split_batch(batch, microbatches)
    first = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts), 0)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)

    def add(sums, part_and_index):
        return jax.tree.map(jnp.add, sums, one(*part_and_index)), None

    return jax.lax.scan(add, zeros, (parts, jnp.arange(microbatches)))[0]


def split_batch(batch: PyTree, parts: int) -> PyTree:
    """Rows dealt out to `parts` microbatches, a leading axis; every shard keeps its rows and gives each its share."""

    def split(x):
        dealt = x.reshape((x.shape[0] // parts, parts, *x.shape[1:])).swapaxes(0, 1)
        return sharding.constrain(dealt, None, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(split, batch)


def means(sums: Metrics) -> dict[str, jax.Array]:
    return {name: total / jnp.maximum(weight, 1e-8) for name, (total, weight) in sums.items()}


def evaluation_step(loss: Loss):
    """Jitted `(params, frozen, batch) -> metrics`, without gradient; the key is fixed, losses here draw nothing."""

    def step(params, frozen, batch):
        total, weight, sums = loss(params, frozen, batch, jax.random.key(0))
        return sums | {"loss": (total, weight)}

    return jax.jit(named(step, "evaluate"))
