"""Takes scores, log-probs and values of sampled responses; gives per-token rewards, advantages and the KL coefficient.

Letters: B prompts, N responses to each, R response slots. A mask is True at real tokens of rows of positive weight;
what lies beneath a False is never read, and comes out 0.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mpo_jax.ops import policy, shapes
from mpo_jax.ops.statistics import moments

_TINY = 1e-8


def normalise(scores: jax.Array, mean: float, std: float, clip: float | None = None) -> jax.Array:
    """Scores in the reward model's own units, f32 [B,N] -> (score - mean) / std, held within [-clip, clip].

    mean and std: those stored with the reward model. None: no clipping. A NaN stays one, for the stage to stop at.
    """
    shapes.check("f32[B,N]", scores=scores)
    scaled = (scores - mean) / jnp.maximum(jnp.float32(std), _TINY)
    return scaled if clip is None else jnp.clip(scaled, -clip, clip)


def kl_rewards(
    scores: jax.Array,
    logps: jax.Array,
    reference_logps: jax.Array,
    mask: jax.Array,
    finished: jax.Array,
    coefficient: jax.Array | float,
    missing_eos_penalty: float = 0.0,
) -> jax.Array:
    """Rewards of each token, f32 [B,N,R]: minus coefficient * (logps - reference_logps), and at a response's last real
    token also its score, less `missing_eos_penalty` if it didn't finish.

    scores f32 [B,N]; logps (of the policy that sampled, by the scorer) and reference_logps f32 [B,N,R]; mask bool
    [B,N,R]; finished bool [B,N]. Ziegler et al. 2019 (arXiv 1909.08593), eq. 2, spread over the tokens. Summed over R
    they are the score less the response's KL: what RLOO takes. The log-ratio (k1) alone has the right gradient in a
    reward; k2 and k3 do not.
    """
    shapes.check(
        "f32[B,N] f32[B,N,R] f32[B,N,R] bool[B,N,R] bool[B,N]",
        scores=scores,
        logps=logps,
        reference_logps=reference_logps,
        mask=mask,
        finished=finished,
    )
    zero = jnp.float32(0)
    penalised = scores - jnp.where(finished, zero, jnp.float32(missing_eos_penalty))
    rewards = -jnp.asarray(coefficient, jnp.float32) * (logps - reference_logps)
    rewards = rewards + jnp.where(_last(mask), penalised[:, :, None], zero)
    return jnp.where(mask, rewards, zero)


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates and the critic's targets: f32 [B,N,R] each.

    rewards, values f32 [B,N,R], mask bool [B,N,R]. Schulman et al. 2016 (arXiv 1506.02438), eq. 16, as the reverse
    recursion A_t = delta_t + gamma * lam * A_{t+1}, delta_t = r_t + gamma * V_{t+1} - V_t. After the last real token
    there is nothing: its V_{t+1} is 0, also in a response that was cut off. Slots under a False mask are stepped over.
    Targets are advantages + values, TD(lam) returns.
    """
    shapes.check("f32[B,N,R] f32[B,N,R] bool[B,N,R]", rewards=rewards, values=values, mask=mask)
    zero = jnp.float32(0)
    rewards, values = jnp.where(mask, rewards, zero), jnp.where(mask, values, zero)

    def back(later, slot):
        next_value, next_advantage = later
        reward, value, real = slot
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        later = jnp.where(real, value, next_value), jnp.where(real, advantage, next_advantage)
        return later, jnp.where(real, advantage, zero)

    nothing = jnp.zeros(rewards.shape[:2], jnp.float32)
    slots = tuple(jnp.moveaxis(each, 2, 0) for each in (rewards, values, mask))
    _, reversed_in_place = jax.lax.scan(back, (nothing, nothing), slots, reverse=True)
    advantages = jnp.moveaxis(reversed_in_place, 0, 2)
    return advantages, advantages + values


def rloo(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, weight: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """RLOO's advantages, one for all tokens of a response (`policy.leave_one_out`), and no targets: f32 [B,N,R] each.

    rewards f32 [B,N,R], mask bool [B,N,R], weight f32 [B]; values, gamma and lam play no part. Ahmadian et al. 2024
    (arXiv 2402.14740)."""
    whole = policy.leave_one_out(jnp.sum(rewards, axis=2), weight)
    return jnp.where(mask, whole[:, :, None], jnp.float32(0)), jnp.zeros_like(rewards)


@dataclasses.dataclass(frozen=True)
class Estimator:
    """Of advantages. advantages: `(rewards, values, mask, weight, gamma, lam) -> (advantages, targets)`, f32 [B,N,R].
    critic: whether it needs values. samples: the fewest responses to a prompt. whitens: whether its advantages are
    brought to mean 0 and variance 1, unless a run says otherwise."""

    advantages: Callable[..., tuple[jax.Array, jax.Array]]
    critic: bool
    samples: int = 1
    whitens: bool = True


ESTIMATORS = {
    "ppo": Estimator(
        lambda rewards, values, mask, weight, gamma, lam: gae(rewards, values, mask, gamma, lam), critic=True
    ),
    "rloo": Estimator(rloo, critic=False, samples=2, whitens=False),
}
"""How rewards become advantages, by the algorithm's name."""


def whiten(values: jax.Array, mask: jax.Array, shift: bool = True) -> jax.Array:
    """Scaled to variance 1 under the mask and, with `shift`, to mean 0; without, the mean stays what it was.

    values f32 [...], mask bool [...] -> f32 [...], 0 where masked. The variance is the population's (divided by n).
    A single value, or equal ones, become 0 (or stay).
    """
    shapes.check("f32[...] bool[...]", values=values, mask=mask)
    mean, variance = moments(values, mask)
    scaled = (values - mean) * jax.lax.rsqrt(variance + _TINY)
    return jnp.where(mask, scaled if shift else scaled + mean, jnp.float32(0))


def adapt_kl_coefficient(
    coefficient: jax.Array, kl: jax.Array, target: float, gain: float = 0.1, most: float = 0.2
) -> jax.Array:
    """The KL coefficient after a step whose mean KL was `kl`: coefficient * (1 + gain * e), f32 [].

    e = (kl - target) / target, held within [-most, most]; coefficient and kl f32 [], kl and target in nats per
    response. Ziegler et al. 2019, section 2.2, whose K_beta is gain (0.1). A gain of 0 is a fixed coefficient.
    """
    shapes.check("f32[] f32[]", coefficient=coefficient, kl=kl)
    if not target > 0:
        raise ValueError(f"KL target is {target}; expected above 0, in nats per response")
    error = jnp.clip((kl - target) / target, -most, most)
    return coefficient * (1 + gain * error)


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """1 - var(returns - values) / var(returns) under the mask, f32 []: 1 is a perfect critic, 0 one no better than a
    constant. 0 where returns don't vary. values, returns f32 [...], mask bool [...]."""
    shapes.check("f32[...] f32[...] bool[...]", values=values, returns=returns, mask=mask)
    _, residual = moments(returns - values, mask)
    _, total = moments(returns, mask)
    return jnp.where(total > 0, 1 - residual / jnp.where(total > 0, total, 1), jnp.float32(0))


def _last(mask: jax.Array) -> jax.Array:
    """True at the last True along the last axis, nowhere else: bool [...] -> bool [...]."""
    still_to_come = jnp.flip(jnp.cumsum(jnp.flip(mask, axis=-1), axis=-1), axis=-1)
    return mask & (still_to_come == 1)
