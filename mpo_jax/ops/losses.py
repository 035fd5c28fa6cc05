"""Takes log-probs or scores of a batch; gives the losses of SFT and the reward model, and what losses are made of.

A loss is (sum, weight, metrics): the caller adds sums and weights over microbatches and divides once, so that
accumulated equals full batch under masks. metrics: name -> (sum, weight), likewise. Letters: B rows, W response
columns. Rows of weight 0 contribute nothing, to loss or gradient, whatever they hold.
"""

import jax
import jax.numpy as jnp

from mpo_jax.ops import masks, shapes

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""name -> (sum, weight)."""

Loss = tuple[jax.Array, jax.Array, Metrics]
"""(sum f32 [], weight f32 [], metrics)."""


def sft(logps: jax.Array, mask: jax.Array) -> Loss:
    """Negative log-likelihood of response tokens, in nats; weight: tokens.

    logps f32 [B,W], mask bool [B,W] (False too in rows of weight 0). Metric: response_len, in tokens per row that has
    any.
    """
    shapes.check("f32[B,W] bool[B,W]", logps=logps, mask=mask)
    tokens = count(mask)
    return -masks.masked_sum(logps, mask), tokens, {"response_len": (tokens, count(jnp.any(mask, axis=1)))}


def reward(scores: jax.Array, weight: jax.Array, margin: jax.Array | None = None) -> Loss:
    """Bradley-Terry: -log sigmoid(chosen - rejected - margin); weight: pairs.

    scores f32 [B,2] (chosen, rejected), weight f32 [B], margin f32 [B] or None (0): how much better the annotator
    called the chosen reply. Touvron et al. 2023 (arXiv 2307.09288), eq. 1 without and eq. 2 with margin.
    Metrics: accuracy against the label (the margin plays no part; a tie counts half), gap, score_chosen,
    score_rejected, in reward units.
    """
    shapes.check("f32[B,2] f32[B] f32[B]", scores=scores, weight=weight, margin=margin)
    real = weight > 0
    chosen, rejected = kept(scores[:, 0], real), kept(scores[:, 1], real)
    gap = chosen - rejected
    asked = gap if margin is None else gap - kept(margin, real)
    metrics = {"accuracy": wins(gap), "gap": gap, "score_chosen": chosen, "score_rejected": rejected}
    return weighted(-jax.nn.log_sigmoid(asked), weight, metrics)


def chosen_nll(policy_chosen: jax.Array, chosen_len: jax.Array, weight: jax.Array) -> Loss:
    """Mean negative log-likelihood of the chosen response's tokens, in nats; weight: pairs, as of `preferences.dpo`.

    policy_chosen f32 [B] (summed log-probs), chosen_len i32 [B] tokens, weight f32 [B]. The term that keeps the chosen
    log-probs from falling: `add(preferences.dpo(...), (coefficient, chosen_nll(...)))`. Pang et al. 2024 (arXiv
    2404.19733), eq. 1, which puts the coefficient on the other term. Metric: chosen_nll.
    """
    shapes.check("f32[B] i32[B] f32[B]", policy_chosen=policy_chosen, chosen_len=chosen_len, weight=weight)
    nll = -per_token(kept(policy_chosen, weight > 0), chosen_len)
    return weighted(nll, weight, {"chosen_nll": nll})


def add(main: Loss, *terms: tuple[jax.Array | float, Loss]) -> Loss:
    """main + coefficient * term for each (coefficient, term), with everybody's metrics.

    All must count the same things (pairs, or the tokens of one mask): the weight is main's. ValueError if two losses
    report a metric of the same name.
    """
    total, weight, metrics = main
    for coefficient, (term, _, more) in terms:
        if metrics.keys() & more.keys():
            raise ValueError(f"two losses report the same metrics: {sorted(metrics.keys() & more.keys())}")
        total, metrics = total + jnp.asarray(coefficient, jnp.float32) * term, metrics | more
    return total, weight, metrics


def count(mask: jax.Array) -> jax.Array:
    """How many are True: bool [...] -> f32 []."""
    return jnp.sum(mask.astype(jnp.float32))


def kept(values: jax.Array, real: jax.Array) -> jax.Array:
    """Selecting before the arithmetic, not after: the gradient of a discarded NaN would be NaN."""
    return jnp.where(real, values, jnp.float32(0))


def per_token(sums: jax.Array, lens: jax.Array) -> jax.Array:
    """Mean over a reply's tokens: sums f32 [B], lens i32 [B]; 0 for a reply without any."""
    return sums / jnp.maximum(lens, 1).astype(jnp.float32)


def wins(gap: jax.Array) -> jax.Array:
    """1 where the gap is above 0, half at a tie: f32 [B]."""
    return (gap > 0).astype(jnp.float32) + 0.5 * (gap == 0).astype(jnp.float32)


def weighted(values: jax.Array, weight: jax.Array, metrics: dict[str, jax.Array]) -> Loss:
    """Sums of finite per-row values f32 [B]; metrics carry no gradient."""
    total = jnp.sum(weight)
    sums = {name: (jax.lax.stop_gradient(jnp.sum(weight * each)), total) for name, each in metrics.items()}
    return jnp.sum(weight * values), total, sums
