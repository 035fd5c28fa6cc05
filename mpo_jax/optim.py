"""Settings enter; a learning-rate schedule, an optax optimizer and the shardings of its state leave."""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import annotated_types
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpo_jax import sharding
from mpo_jax.errors import InputError
from mpo_jax.settings import Amount, Section, Share, setting
from mpo_jax.types import PyTree

SCHEDULES = ("constant", "linear", "cosine")
MOMENTS = ("float32", "bfloat16", "factored")
_UNDECAYED = ("scale", "bias", "embedding")

Rate = Annotated[float, annotated_types.Interval(ge=0, le=100)]
Decay = Annotated[float, annotated_types.Interval(ge=0, lt=1)]


class Optimizer(Section):
    """AdamW, or Adafactor's second moment, and the schedule of its learning rate."""

    learning_rate: Rate = setting(1e-5, "peak of the learning rate")
    schedule: Literal[SCHEDULES] = setting("cosine", "course of the learning rate after its warm-up")  # type: ignore[valid-type]
    warmup: Share = setting(0.05, "share of the steps in which the learning rate rises to its peak")
    end_fraction: Share = setting(
        0.1, "learning rate at the last step, as a fraction of the peak; not used by constant"
    )
    weight_decay: Rate = setting(0.0, "weight decay, as in AdamW; it is multiplied by the learning rate")
    beta1: Decay = setting(0.9, "decay rate of Adam's first moment")
    beta2: Decay = setting(0.95, "decay rate of Adam's second moment")
    eps: Annotated[float, annotated_types.Interval(gt=0, le=1)] = setting(
        1e-8, "added to the square root of Adam's second moment"
    )
    clip_norm: Amount = setting(
        1.0, "largest norm of the whole gradient; a larger gradient is scaled down to it; 0: no clipping"
    )
    moments: Literal[MOMENTS] = setting(  # type: ignore[valid-type]
        "float32",
        "how Adam's moments are stored; bfloat16: only the first is, the second stays float32; factored: Adafactor's "
        "second moment, and no first",
    )


def of_settings(settings: Optimizer, steps: int) -> tuple[optax.GradientTransformation, Callable]:
    """The optimizer of a run of so many steps, and its learning rate as a function of the step."""
    warmup = round(settings.warmup * steps)
    rate = schedule(settings.schedule, settings.learning_rate, warmup, steps, settings.end_fraction)
    return make_optimizer(
        rate,
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm or None,
        moments=settings.moments,
    ), rate


def schedule(kind: str, peak: float, warmup_steps: int, total_steps: int, end_fraction: float = 0.0) -> Callable:
    """step -> learning rate: a linear warm-up to `peak`, then constant, or down to peak * end_fraction by a line or
    half a cosine.

    Step s of the warm-up has the rate peak * (s + 1) / (warmup_steps + 1), so that the first step is not wasted; step
    `warmup_steps` has the peak, step `total_steps` and all later the end. A Python int gives a float without asking a
    device, for logging; an array gives an f32 array. InputError for settings that make no schedule.
    """
    if kind not in SCHEDULES:
        raise InputError(f"schedule: {kind!r}; expected one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup_steps <= total_steps:
        raise InputError(f"warmup: {warmup_steps} steps; expected 0 to the {total_steps} steps of the run")
    if not 0 <= end_fraction <= 1:
        raise InputError(f"end_fraction: {end_fraction}; expected a share of the peak, 0 to 1")
    if not (math.isfinite(peak) and peak >= 0):
        raise InputError(f"learning_rate: {peak}; expected a finite number, at least 0")
    rest = max(1, total_steps - warmup_steps)

    def share(progress, cos):
        """Of the peak, at a share of the way down."""
        if kind == "constant":
            return 1.0
        falling = 1 - progress if kind == "linear" else 0.5 * (1 + cos(math.pi * progress))
        return end_fraction + (1 - end_fraction) * falling

    def rate(step):
        if isinstance(step, int | np.integer):
            if step < warmup_steps:
                return float(peak * (step + 1) / (warmup_steps + 1))
            return float(peak * share(min((step - warmup_steps) / rest, 1.0), math.cos))
        step = jnp.asarray(step, jnp.float32)
        warm = peak * (step + 1) / (warmup_steps + 1)
        down = peak * share(jnp.clip((step - warmup_steps) / rest, 0, 1), jnp.cos)
        return jnp.where(step < warmup_steps, warm, down)

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
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101; as in PyTorch, the decay is multiplied by the rate) after
    clipping by the global norm.

    weight_decay touches what `decayed` says. clip_norm: None does not clip. moments: "float32"; "bfloat16" stores the
    first moment so (the second, whose steps of 1 - beta2 are below bfloat16's resolution, stays f32: 6 bytes for each
    parameter instead of 8); "factored" replaces the second by its row and column means where both dimensions have at
    least 128 entries, bounds the root mean square of each weight's update to 1, and keeps no first, nor reads the betas
    and eps (Adafactor, Shazeer & Stern 2018, arXiv 1804.04235, sections 3 and 6; rate and decay are as for AdamW).
    """
    if moments not in MOMENTS:
        raise InputError(f"moments: {moments!r}; expected one of {', '.join(MOMENTS)}")
    if clip_norm is not None and not clip_norm > 0:
        raise InputError(f"clip_norm: {clip_norm}; expected above 0, or none")
    if moments == "factored":
        scale = optax.chain(optax.scale_by_factored_rms(decay_rate=0.8), optax.clip_by_block_rms(1.0))
    else:
        scale = optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps, mu_dtype=moments)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm is not None else optax.identity(),
        scale,
        optax.add_decayed_weights(weight_decay, mask=decayed) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(rate),
    )


def by_label(optimizers: dict[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """One optimizer for each key at the top of the parameters, as PPO's {"policy": ..., "value": ...}.

    Each clips by the norm of its own gradients. Raises ValueError for parameters with other keys.
    """

    return optax.partition(optimizers, lambda params: {name: name for name in params})


def decayed(params: PyTree) -> PyTree:
    """Which weights decay: True for the kernels, the scalar head and the adapters.

    Not the scales of norms, nor biases, nor embeddings: a row of an embedding meets a gradient only where its token
    occurs, and would shrink in all other steps. A separate output matrix decays.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: sharding.weight_name(path).rsplit("/", 1)[-1] not in _UNDECAYED, params
    )


def state_shardings(optimizer: optax.GradientTransformation, params: PyTree, mesh) -> PyTree:
    """Shardings of the optimizer's state for `params` (arrays or ShapeDtypeStructs, with shardings).

    A leaf whose path ends like a parameter's, and which has its shape, lies as that parameter does. Everything else,
    which is small, is on every device: counts, and the vectors of a factored moment.
    """
    everywhere = sharding.replicated(mesh)
    known = dict(jax.tree_util.tree_leaves_with_path(params))

    def place(path, leaf):
        # Paths in a state: (where in the chain, "mu" or the like, then the parameter's own path).
        for start in range(len(path)):
            param = known.get(path[start:])
            if param is not None and param.shape == leaf.shape:
                return param.sharding
        return everywhere

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
