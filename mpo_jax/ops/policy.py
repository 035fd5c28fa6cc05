"""Takes log-probs, values and advantages of sampled responses; gives the losses of PPO and RLOO.

A loss is (sum, weight, metrics), as in `ops.losses`; all that one mask covers can be joined with `losses.add`.
Letters: B prompts, N responses to each, R response slots; [...] is any shape that all arrays share ([B,N,R], or the
[B,W] of the scorer). A mask is True at real tokens of rows of positive weight; what lies beneath a False is never read.
"""

import jax
import jax.numpy as jnp

from mpo_jax.ops import masks, shapes
from mpo_jax.ops.losses import Loss, Metrics, count


def ppo(logps: jax.Array, old_logps: jax.Array, advantages: jax.Array, mask: jax.Array, clip: float) -> Loss:
    """Clipped surrogate: -min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A); weight: tokens.

    logps, old_logps, advantages f32 [...], mask bool [...]. Schulman et al. 2017 (arXiv 1707.06347), eq. 7, negated.
    No gradient reaches old_logps or advantages. Metrics, per token: ratio; ratio_deviation (mean |ratio - 1|);
    clip_fraction (ratio outside the range); approx_kl and approx_kl_k3, k1 and k3 estimates of KL(old || new).
    """
    shapes.check(
        "f32[...] f32[...] f32[...] bool[...]", logps=logps, old_logps=old_logps, advantages=advantages, mask=mask
    )
    if not 0 < clip < 1:
        raise ValueError(f"ratio clip is {clip}; expected between 0 and 1")
    log_ratio = _difference(logps, jax.lax.stop_gradient(old_logps), mask)
    gain = jax.lax.stop_gradient(jnp.where(mask, advantages, jnp.float32(0)))
    ratio = jnp.exp(log_ratio)
    surrogate = jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - clip, 1 + clip) * gain)
    metrics = {
        "ratio": ratio,
        "ratio_deviation": jnp.abs(ratio - 1),
        "clip_fraction": (jnp.abs(ratio - 1) > clip).astype(jnp.float32),
        "approx_kl": -log_ratio,
        "approx_kl_k3": jnp.expm1(log_ratio) - log_ratio,
    }
    return -masks.masked_sum(surrogate, mask), count(mask), _token_metrics(metrics, mask)


def value(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, clip: float | None = None
) -> Loss:
    """Half the squared error of the critic; weight: tokens.

    values, old_values, returns f32 [...], mask bool [...]. With `clip`, the larger of the error and that of the value
    held within `clip` of the old one, as in OpenAI baselines' ppo2 (not in the paper). Metrics, per token: value_loss,
    value, return, value_clip_fraction (where the clipped error is the larger one, so that no gradient flows).
    """
    shapes.check(
        "f32[...] f32[...] f32[...] bool[...]", values=values, old_values=old_values, returns=returns, mask=mask
    )
    if clip is not None and not clip > 0:
        raise ValueError(f"value clip is {clip}; expected above 0, or None")
    target = jax.lax.stop_gradient(jnp.where(mask, returns, jnp.float32(0)))
    new = jnp.where(mask, values, jnp.float32(0))
    error = jnp.square(new - target)
    clipped = error
    if clip is not None:
        old = jax.lax.stop_gradient(jnp.where(mask, old_values, jnp.float32(0)))
        clipped = jnp.square(old + jnp.clip(new - old, -clip, clip) - target)
    loss = 0.5 * jnp.maximum(error, clipped)
    metrics = {
        "value_loss": loss,
        "value": new,
        "return": target,
        "value_clip_fraction": (clipped > error).astype(jnp.float32),
    }
    return masks.masked_sum(loss, mask), count(mask), _token_metrics(metrics, mask)


def entropy_bonus(entropy: jax.Array, mask: jax.Array) -> Loss:
    """Minus the entropy of the token distributions, in nats; weight: tokens. entropy f32 [...], mask bool [...].

    Schulman et al. 2017, eq. 9, whose c2 is the coefficient given to `losses.add`. Metric: entropy.
    """
    shapes.check("f32[...] bool[...]", entropy=entropy, mask=mask)
    return -masks.masked_sum(entropy, mask), count(mask), _token_metrics({"entropy": entropy}, mask)


def kl_k2(logps: jax.Array, reference_logps: jax.Array, mask: jax.Array) -> Loss:
    """Half the squared log-ratio of policy to reference; weight: tokens. logps, reference_logps f32 [...], mask bool.

    The KL term as a loss: on samples of the policy itself its gradient, log-ratio times the gradient of logps, is that
    of KL(policy || reference) in expectation. k1's is 0 there, and k3's is that of the reversed KL. Schulman 2020,
    "Approximating KL divergence", http://joschu.net/blog/kl-approx.html. Metric: kl_k2.
    """
    shapes.check("f32[...] f32[...] bool[...]", logps=logps, reference_logps=reference_logps, mask=mask)
    k2 = 0.5 * jnp.square(_difference(logps, jax.lax.stop_gradient(reference_logps), mask))
    return masks.masked_sum(k2, mask), count(mask), _token_metrics({"kl_k2": k2}, mask)


def kl_metrics(logps: jax.Array, reference_logps: jax.Array, mask: jax.Array) -> Metrics:
    """Estimates of KL(policy || reference) from the policy's own samples: arrays f32 [B,N,R], mask bool [B,N,R].

    With d = logps - reference_logps: k1 = d, k3 = exp(-d) - 1 + d (never negative; Schulman 2020).
    kl and kl_k3 are nats per response (summed over its tokens), kl_token and kl_token_k3 nats per token.
    """
    shapes.check("f32[B,N,R] f32[B,N,R] bool[B,N,R]", logps=logps, reference_logps=reference_logps, mask=mask)
    k1 = jax.lax.stop_gradient(_difference(logps, reference_logps, mask))
    first, third = jnp.sum(k1), jnp.sum(jnp.expm1(-k1) + k1)
    tokens, responses = count(mask), count(jnp.any(mask, axis=2))
    return {
        "kl": (first, responses),
        "kl_k3": (third, responses),
        "kl_token": (first, tokens),
        "kl_token_k3": (third, tokens),
    }


def leave_one_out(scores: jax.Array, weight: jax.Array) -> jax.Array:
    """RLOO's advantages: each response's score minus the mean score of the prompt's other responses.

    scores f32 [B,N] (the whole response's reward, KL penalty included), weight f32 [B] -> f32 [B,N], which add up to 0
    for each prompt and are 0 in rows of weight 0. ValueError if N < 2. Ahmadian et al. 2024 (arXiv 2402.14740), the
    estimator of section 3.1 (Kool et al. 2019).
    """
    responses = shapes.check("f32[B,N] f32[B]", scores=scores, weight=weight)["N"]
    if responses < 2:
        raise ValueError(f"RLOO needs 2 or more responses to each prompt to leave one out; found {responses}")
    kept = jnp.where((weight > 0)[:, None], scores, jnp.float32(0))
    # s - (sum - s) / (n - 1), by way of the mean: no large sum is subtracted from a large sum.
    return (kept - jnp.mean(kept, axis=1, keepdims=True)) * (responses / (responses - 1))


def reinforce(logps: jax.Array, advantages: jax.Array, mask: jax.Array) -> Loss:
    """RLOO's policy loss, -A * log policy(response), the whole response one action; weight: responses with a token.

    logps f32 [B,N,R], advantages f32 [B,N] (no gradient), mask bool [B,N,R]. Ahmadian et al. 2024, section 3.1: there
    is no ratio, the samples must be the present policy's. For more than one update per rollout, give the advantages,
    broadcast over tokens, to `ppo`.
    """
    summed, advantage, real = _responses(logps, advantages, mask)
    metrics = _token_metrics({"advantage": advantage, "seq_logps": summed}, real)
    return -jnp.sum(advantage * summed), count(real), metrics


def _responses(logps, advantages, mask):
    """Summed logps f32 [B,N], advantages f32 [B,N] and which responses have a token, bool [B,N]."""
    shapes.check("f32[B,N,R] f32[B,N] bool[B,N,R]", logps=logps, advantages=advantages, mask=mask)
    real = jnp.any(mask, axis=2)
    summed = jnp.sum(jnp.where(mask, logps, jnp.float32(0)), axis=2)
    return summed, jax.lax.stop_gradient(jnp.where(real, advantages, jnp.float32(0))), real


def _difference(logps: jax.Array, others: jax.Array, mask: jax.Array) -> jax.Array:
    """logps - others where the mask is True, else 0: selected before any exp, so that gradients stay finite."""
    return jnp.where(mask, logps, jnp.float32(0)) - jnp.where(mask, others, jnp.float32(0))


def _token_metrics(values: dict[str, jax.Array], mask: jax.Array) -> Metrics:
    """Masked sums, each with its count; metrics carry no gradient."""
    return {name: (jax.lax.stop_gradient(masks.masked_sum(each, mask)), count(mask)) for name, each in values.items()}
