"""Settings enter; a learning-rate schedule, an optax optimizer and the shardings of its state leave."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mpo_jax import sharding
from mpo_jax.errors import InputError
from mpo_jax.types import PyTree

SCHEDULES = ("constant", "linear", "cosine")
MOMENTS = ("float32", "bfloat16", "factored")
_UNDECAYED = ("scale", "bias", "embedding")


def schedule(kind: str, peak: float, warmup_steps: int, total_steps: int, end_fraction: float = 0.0) -> Callable:
    """step -> learning rate: linear warm-up from 0 to `peak`, then constant, or down to peak * end_fraction at
    total_steps, by a line or half a cosine. The first step has a rate above 0."""
    if kind not in SCHEDULES:
        raise InputError(f"schedule: {kind!r}; expected one of {', '.join(SCHEDULES)}")
    rest = max(1, total_steps - warmup_steps)
    if kind == "constant":
        after: Callable = optax.constant_schedule(peak)
    elif kind == "linear":
        after = optax.linear_schedule(peak, peak * end_fraction, rest)
    else:
        after = optax.cosine_decay_schedule(peak, rest, alpha=end_fraction)

    def rate(step):
        warm = peak * (step + 1) / (warmup_steps + 1)
        return jnp.where(step < warmup_steps, warm, after(step - warmup_steps))

    return rate


def make_optimizer(
    rate: Callable | float,
    *,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    moments: str = "float32",
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping by the global norm.

    weight_decay touches matrices only: no norm scales, no biases, no embeddings. moments: "float32"; "bfloat16" stores
    the first moment in bfloat16 (the second needs its precision); "factored" replaces the second by its row and column
    means (Adafactor, Shazeer & Stern 2018) and keeps no first.
    """
    if moments not in MOMENTS:
        raise InputError(f"moments: {moments!r}; expected one of {', '.join(MOMENTS)}")
    if moments == "factored":
        scale = optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30)
    else:
        scale = optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps, mu_dtype=moments)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm is not None else optax.identity(),
        scale,
        optax.add_decayed_weights(weight_decay, mask=decayed) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(rate),
    )


def by_label(optimizers: dict[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """One optimizer for each key at the top of the parameters, as PPO's {"policy": ..., "value": ...}."""
    return optax.partition(optimizers, lambda params: {name: name for name in params})


def decayed(params: PyTree) -> PyTree:
    """Which weights decay: True for matrices."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: sharding.weight_name(path).rsplit("/", 1)[-1] not in _UNDECAYED, params
    )


def state_shardings(optimizer: optax.GradientTransformation, params: PyTree, mesh) -> PyTree:
    """Shardings of the optimizer's state for sharded `params`: moments lie as their parameters do; counts and the
    factored moments' vectors, which are small, on every device."""
    everywhere = sharding.replicated(mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, params)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree.map_params(
        optimizer,
        lambda leaf, place, shape: place if leaf.shape == shape.shape else everywhere,
        state,
        where,
        shapes,
        transform_non_params=lambda _: everywhere,
    )
