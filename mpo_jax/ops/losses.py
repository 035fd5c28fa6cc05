"""Takes log-probs or scores of a batch; gives the losses of SFT, reward model and preference training.

A loss is (sum, weight, metrics): the caller adds sums and weights over microbatches and divides once, so that
accumulated equals full batch under masks. metrics: name -> (sum, weight), likewise. Letters: B rows, W response
columns. Rows of weight 0 contribute nothing, to loss or gradient, whatever they hold.
"""

import dataclasses
from collections.abc import Callable

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
    chosen, rejected = _kept(scores[:, 0], real), _kept(scores[:, 1], real)
    gap = chosen - rejected
    asked = gap if margin is None else gap - _kept(margin, real)
    metrics = {"accuracy": _wins(gap), "gap": gap, "score_chosen": chosen, "score_rejected": rejected}
    return _weighted(-jax.nn.log_sigmoid(asked), weight, metrics)


def dpo(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    weight: jax.Array,
    beta: float,
    label_smoothing: float = 0.0,
) -> Loss:
    """Direct preference optimization: -log sigmoid(beta * margin of log-ratios); weight: pairs.

    The four log-probs f32 [B] are summed over a response's tokens, weight f32 [B]. Rafailov et al. 2023
    (arXiv 2305.18290), eq. 7. label_smoothing in [0, 0.5) is the assumed share of flipped labels: conservative DPO
    (Mitchell 2023, "A note on DPO with noisy preferences"). Metrics: see `_log_ratios`.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 or more, below 0.5")
    chosen, rejected, metrics = _log_ratios(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, weight, beta
    )
    logit = jnp.float32(beta) * (chosen - rejected)
    flipped = jnp.float32(label_smoothing)
    nll = -(1 - flipped) * jax.nn.log_sigmoid(logit) - flipped * jax.nn.log_sigmoid(-logit)
    return _weighted(nll, weight, metrics)


def ipo(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    weight: jax.Array,
    beta: float,
) -> Loss:
    """Identity preference optimization: (margin of log-ratios - 1 / (2 beta))^2; weight: pairs.

    Inputs and metrics as in `dpo`. Azar et al. 2023 (arXiv 2310.12036), eq. 17, whose tau is beta here. As in the
    paper, log-probs are sums over tokens, whatever the length; implementations that average them ask a margin of
    1 / (2 beta) *per token*, and need another beta.
    """
    chosen, rejected, metrics = _log_ratios(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, weight, beta
    )
    return _weighted(jnp.square(chosen - rejected - jnp.float32(1 / (2 * beta))), weight, metrics)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A preference loss. loss: `(policy_chosen, policy_rejected, reference_chosen, reference_rejected, weight, beta)`,
    as `dpo` takes them. smooths: whether it takes `label_smoothing` too."""

    loss: Callable[..., Loss]
    smooths: bool = False


OBJECTIVES = {"dpo": Objective(dpo, smooths=True), "ipo": Objective(ipo)}
"""What preference training can minimise, by name. A new one is a function here (or in a plugin) and a line."""


def chosen_nll(policy_chosen: jax.Array, chosen_len: jax.Array, weight: jax.Array) -> Loss:
    """Mean negative log-likelihood of the chosen response's tokens, in nats; weight: pairs, so that it joins `dpo`.

    policy_chosen f32 [B] (summed log-probs), chosen_len i32 [B] tokens, weight f32 [B]. The term that keeps the chosen
    log-probs from falling: `add(dpo(...), (coefficient, chosen_nll(...)))`. Pang et al. 2024 (arXiv 2404.19733), eq. 1,
    which puts the coefficient on the other term. Metric: chosen_nll.
    """
    shapes.check("f32[B] i32[B] f32[B]", policy_chosen=policy_chosen, chosen_len=chosen_len, weight=weight)
    nll = -_kept(policy_chosen, weight > 0) / jnp.maximum(chosen_len, 1).astype(jnp.float32)
    return _weighted(nll, weight, {"chosen_nll": nll})


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


def _log_ratios(policy_chosen, policy_rejected, reference_chosen, reference_rejected, weight, beta):
    """Policy over reference, chosen and rejected, f32 [B], 0 in rows of weight 0; and the metrics by name:

    chosen_reward, rejected_reward (beta * log-ratio, the implicit reward up to a term of the prompt's own),
    reward_margin, accuracy (share of positive margins; a tie counts half), chosen_logps, rejected_logps (of the
    policy: chosen log-probs may fall while the loss does too), and kl_chosen, kl_rejected: the log-ratios in nats.
    Those are k1 estimates of the policy's KL to the reference, biased in that the responses are the data's.
    """
    shapes.check(
        "f32[B] f32[B] f32[B] f32[B] f32[B]",
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        weight=weight,
    )
    if not beta > 0:
        raise ValueError(f"beta is {beta}; expected above 0")
    real = weight > 0
    chosen_logps, rejected_logps = _kept(policy_chosen, real), _kept(policy_rejected, real)
    chosen = chosen_logps - _kept(reference_chosen, real)
    rejected = rejected_logps - _kept(reference_rejected, real)
    scale = jnp.float32(beta)
    metrics = {
        "chosen_reward": scale * chosen,
        "rejected_reward": scale * rejected,
        "reward_margin": scale * (chosen - rejected),
        "accuracy": _wins(chosen - rejected),
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "kl_chosen": chosen,
        "kl_rejected": rejected,
    }
    return chosen, rejected, metrics


def _kept(values: jax.Array, real: jax.Array) -> jax.Array:
    """Selecting before the arithmetic, not after: the gradient of a discarded NaN would be NaN."""
    return jnp.where(real, values, jnp.float32(0))


def _wins(gap: jax.Array) -> jax.Array:
    return (gap > 0).astype(jnp.float32) + 0.5 * (gap == 0).astype(jnp.float32)


def _weighted(values: jax.Array, weight: jax.Array, metrics: dict[str, jax.Array]) -> Loss:
    """Sums of finite per-row values f32 [B]; metrics carry no gradient."""
    total = jnp.sum(weight)
    sums = {name: (jax.lax.stop_gradient(jnp.sum(weight * each)), total) for name, each in metrics.items()}
    return jnp.sum(weight * values), total, sums
