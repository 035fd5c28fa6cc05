"""Per-token or per-pair values with their mask enter; a loss's sum, its weight and its metrics leave.

Every loss returns (sum, weight, metrics), metrics being name -> (sum, weight): sums add over microbatches, and one
division by the total weight at the end makes accumulated equal full batch. Rows of weight 0 give exactly nothing.
"""

import jax
import jax.numpy as jnp

Loss = tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]


def sft(logps: jax.Array, mask: jax.Array) -> Loss:
    """Negative log-likelihood of response tokens. logps f32 [B,W], mask bool [B,W]."""
    weight = jnp.sum(mask.astype(jnp.float32))
    total = -jnp.sum(jnp.where(mask, logps, jnp.float32(0)))
    return total, weight, {}


def reward(scores: jax.Array, weight: jax.Array, margin: jax.Array | None = None) -> Loss:
    """Bradley-Terry: -log sigmoid(chosen - rejected - margin). scores f32 [B,2], weight and margin f32 [B].

    Ouyang et al. 2022, eq. 1; the margin as in Touvron et al. 2023 (arXiv 2307.09288), eq. 2.
    """
    real = weight > 0
    scores = jnp.where(real[:, None], scores, jnp.float32(0))
    gap = scores[:, 0] - scores[:, 1]
    asked = gap if margin is None else gap - jnp.where(real, margin, jnp.float32(0))
    count = jnp.sum(weight)
    metrics = {
        "accuracy": weighted((gap > 0) + 0.5 * (gap == 0), weight),
        "gap": weighted(gap, weight),
        "score_chosen": weighted(scores[:, 0], weight),
        "score_rejected": weighted(scores[:, 1], weight),
    }
    return jnp.sum(weight * -jax.nn.log_sigmoid(asked)), count, metrics


def weighted(values: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A metric's (sum, weight); values beneath a weight of 0 may be NaN."""
    return jnp.sum(jnp.where(weight > 0, values * weight, jnp.float32(0))), jnp.sum(weight)
