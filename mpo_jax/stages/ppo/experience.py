"""A rollout, the policy's weights and the frozen models enter; an Experience leaves, with the metrics of the rollout.

Old and reference log-probs both come from the scorer, the same forward as the update, so that before the first update
the ratio is 1 and the KL to a reference equal to the policy 0. Letters as in `types`.
"""

import dataclasses
from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp

from mpo_jax import scoring
from mpo_jax.models import decoder
from mpo_jax.models.config import ModelConfig
from mpo_jax.models.flash import Slots
from mpo_jax.ops import losses, masks, policy, returns
from mpo_jax.ops import statistics as moments
from mpo_jax.ops.returns import ESTIMATORS
from mpo_jax.stages.ppo.settings import Rules
from mpo_jax.types import Experience, PyTree, Rollout, record


@record
class PolicyView:
    """The policy's view of a rollout: logps, entropy, values f32 [B,N,R], mask bool [B,N,R]."""

    logps: jax.Array
    entropy: jax.Array | None
    values: jax.Array | None
    mask: jax.Array


@record
class Views:
    """All that models say of a rollout but for its scores: the policy's view, log-probs f32 [B,N,R] of the reference
    and, where there is one, of the `sft` policy."""

    policy: PolicyView
    reference: jax.Array
    sft: jax.Array | None


def view_shapes(params: Container[str], frozen: Container[str], rollout: Rollout) -> Views:
    """Shapes of what `look` gives of a rollout, or of its shapes; no model is traced for them."""
    each: Any = jax.ShapeDtypeStruct(rollout.logps.shape, jnp.float32)
    mask: Any = jax.ShapeDtypeStruct(rollout.logps.shape, bool)
    view = PolicyView(each, each, each if "value" in params else None, mask)
    return Views(view, each, each if "sft" in frozen else None)


def shapes_of(rollout: Rollout) -> Experience:
    """Shapes of the experience that `make` or `weigh` gives of a rollout, or of its shapes; no model is traced for
    them."""
    each: Any = jax.ShapeDtypeStruct(rollout.logps.shape, jnp.float32)
    score: Any = jax.ShapeDtypeStruct(rollout.finished.shape, jnp.float32)
    return Experience(rollout, each, each, each, each, each, score)


def slots_of(rollout: Rollout) -> Slots:
    _, responses, length = rollout.logps.shape
    return Slots(rollout.batch.tokens.shape[1] - responses * length, responses, length)


def response_slots(x: jax.Array, rollout: Rollout) -> jax.Array:
    """The responses' columns of a rollout's rows: [B,P+N*R] -> [B,N,R]."""
    return x[:, slots_of(rollout).prompt :].reshape(rollout.logps.shape)


def response_segments(rollout: Rollout) -> jax.Array:
    """i32 [B,N,R]: 0 behind a response's end."""
    return response_slots(rollout.batch.segments, rollout)


def response_mask(rollout: Rollout) -> jax.Array:
    """bool [B,N,R]: real response tokens of rows of positive weight."""
    return (response_segments(rollout) > 0) & (rollout.batch.weight > 0)[:, None, None]


def policy_view(
    model: ModelConfig, params: PyTree, base: PyTree, rollout: Rollout, rules: Rules, entropy: bool = False
) -> PolicyView:
    """Log-probs of a rollout's tokens under params["policy"] and, where there is a critic, its values."""
    weights, shape = base | params["policy"], rollout.logps.shape
    hidden = _hidden(model, weights, rollout)
    out = scoring.logps_of_hidden(model, weights, hidden, rollout.batch, rules.temperature, entropy)
    return PolicyView(
        out.logps.reshape(shape),
        None if out.entropy is None else out.entropy.reshape(shape),
        _values(model, params, base, rollout, rules, hidden) if "value" in params else None,
        response_mask(rollout),
    )


def _hidden(model: ModelConfig, weights: PyTree, rollout: Rollout) -> jax.Array:
    """[B,T,D]"""
    batch = rollout.batch
    return decoder.forward(model, weights, batch.tokens, batch.positions, batch.segments, slots_of(rollout))


def _values(
    model: ModelConfig, params: PyTree, base: PyTree, rollout: Rollout, rules: Rules, hidden: jax.Array
) -> jax.Array:
    """The critic's values f32 [B,N,R]. hidden: the policy's, which a shared critic reads."""
    if rules.critic == "shared":
        values = scoring.values_of_hidden(params["value"], hidden, rollout.batch)
    else:
        values = scoring.response_values(model, base | params["value"], rollout.batch, slots_of(rollout))
    return values.reshape(rollout.logps.shape)


def reference_logps(model: ModelConfig, weights: PyTree, rollout: Rollout, temperature: float) -> jax.Array:
    """f32 [B,N,R], at the sampling temperature."""
    out = scoring.response_logps(model, weights, rollout.batch, temperature, slots=slots_of(rollout))
    return out.logps.reshape(rollout.logps.shape)


def score(model: ModelConfig, frozen: PyTree, rollout: Rollout) -> jax.Array:
    """The reward model's scores f32 [B,N], raw, at the last real token."""
    responses = rollout.logps.shape[1]
    return scoring.response_scores(
        model, frozen["base"] | frozen["reward"], rollout.batch, responses, slots_of(rollout)
    )


def without_end(rollout: Rollout, token: int) -> Rollout:
    """Replies without the tokens of this id that they end with, so that `score` reads each at the token before them."""
    segments = response_segments(rollout)
    rows, window = len(segments), segments[0].size
    said = (segments > 0) & (_response_tokens(rollout) != token)
    kept = jax.lax.cummax(said.astype(jnp.int32), axis=2, reverse=True) > 0
    trimmed = jnp.where(kept, segments, 0).reshape(rows, window)
    segments = jnp.concatenate([rollout.batch.segments[:, :-window], trimmed], axis=1)
    return dataclasses.replace(rollout, batch=dataclasses.replace(rollout.batch, segments=segments))


def make(
    model: ModelConfig,
    rules: Rules,
    statistics: tuple[float, float] | None,
    params: PyTree,
    frozen: PyTree,
    rollout: Rollout,
    asked_scores: jax.Array | None,
    coefficient: jax.Array,
) -> tuple[Experience, dict[str, jax.Array]]:
    """The experience of a rollout and its metrics, f32 scalars: `look` and `weigh` in one.

    asked_scores: f32 [B,N], another scorer's instead of the reward model's, or None.
    """
    views = look(model, rules, params, frozen, rollout)
    raw = score(model, frozen, rollout) if asked_scores is None else asked_scores
    return weigh(rules, statistics, rollout, views, raw, coefficient)


def look(model: ModelConfig, rules: Rules, params: PyTree, frozen: PyTree, rollout: Rollout) -> Views:
    """What the models say of a rollout. frozen: {"base", "reference", "reward"?, "sft"?}."""
    view = policy_view(model, params, frozen["base"], rollout, rules, entropy=True)
    reference, sft = (
        reference_logps(model, frozen["base"] | frozen[role], rollout, rules.temperature) if role in frozen else None
        for role in ("reference", "sft")
    )
    assert reference is not None
    return Views(view, reference, sft)


def weigh(
    rules: Rules,
    statistics: tuple[float, float] | jax.Array | None,
    rollout: Rollout,
    views: Views,
    raw: jax.Array,
    coefficient: jax.Array,
) -> tuple[Experience, dict[str, jax.Array]]:
    """The experience of a rollout with scores `raw` f32 [B,N], and its metrics, f32 scalars.

    statistics: mean and standard deviation by which scores are normalised; None: they stay raw. coefficient: f32 [], of
    the KL penalty inside the reward (k1).
    """
    view, reference = views.policy, views.reference
    mask = view.mask
    scores = raw
    if statistics is not None:
        mean, std = statistics
        scores = returns.normalise(raw, mean, std, rules.score_clip or None)
    elif rules.score_clip:
        scores = jnp.clip(raw, -rules.score_clip, rules.score_clip)
    inside = coefficient if rules.kl_term == "k1" else jnp.float32(0)
    rewards = returns.kl_rewards(
        scores, view.logps, reference, mask, rollout.finished, inside, rules.missing_eos_penalty
    )
    values = jnp.zeros_like(rewards) if view.values is None else view.values
    advantages, targets = ESTIMATORS[rules.algorithm].advantages(
        rewards, values, mask, rollout.batch.weight, rules.gamma, rules.lam
    )
    metrics = _metrics(rollout, view, reference, raw, advantages, targets) | {"kl_coefficient": coefficient}
    if views.sft is not None:
        metrics["kl_sft"] = _mean(policy.kl_metrics(view.logps, views.sft, mask)["kl"])
    if rules.whitens:
        advantages = returns.whiten(advantages, mask)
    experience = Experience(rollout, view.logps, reference, values, advantages, targets, raw)
    return experience, metrics


def weigh_asked(
    rules: Rules, rollout: Rollout, views: Views, asked: jax.Array, statistics: jax.Array | None, coefficient: jax.Array
) -> tuple[Experience, dict[str, jax.Array]]:
    """As `weigh`, of scores f32 [B,N] that may be missing (NaN): prompts with a reply that has none get the weight 0,
    and nothing is learned from them. The metric `unscored` is their share. statistics: f32 [2], or None."""
    before = rollout.batch.weight
    scored = jnp.all(jnp.isfinite(asked), axis=1)
    batch = dataclasses.replace(rollout.batch, weight=jnp.where(scored, before, jnp.float32(0)))
    rollout = dataclasses.replace(rollout, batch=batch)
    views = dataclasses.replace(views, policy=dataclasses.replace(views.policy, mask=response_mask(rollout)))
    raw = jnp.where(scored[:, None], asked, jnp.float32(0))
    experience, metrics = weigh(rules, statistics, rollout, views, raw, coefficient)
    return experience, metrics | {"unscored": masks.masked_mean((~scored).astype(jnp.float32), before > 0)}


def measure(
    model: ModelConfig, rules: Rules, params: PyTree, frozen: PyTree, rollout: Rollout, asked_scores: jax.Array | None
) -> tuple[losses.Metrics, jax.Array]:
    """What an evaluation keeps of a rollout, as sums with their weights, and its scores f32 [B,N]. asked_scores:
    another scorer's instead of the reward model's, NaN where a reply has none; `unscored` is the share of those."""
    own = {"policy": params["policy"]}
    view = policy_view(model, own, frozen["base"], rollout, rules)
    reference = reference_logps(model, frozen["base"] | frozen["reference"], rollout, rules.temperature)
    raw = score(model, frozen, rollout) if asked_scores is None else asked_scores
    real = jnp.any(view.mask, axis=2)
    count = losses.count(real)
    lens = jnp.sum(view.mask.astype(jnp.float32), axis=2)
    repeated = moments.repeated_ngram_share(_response_tokens(rollout), view.mask)
    kept = {
        "score": raw,
        "response_len": lens,
        "finished": rollout.finished.astype(jnp.float32),
        "repetition": repeated,
    }
    sums = {name: (masks.masked_sum(values, real), count) for name, values in kept.items()}
    kl = policy.kl_metrics(view.logps, reference, view.mask)
    sums |= {"kl": kl["kl"], "kl_k3": kl["kl_k3"]}
    if "sft" in frozen:
        sft = reference_logps(model, frozen["base"] | frozen["sft"], rollout, rules.temperature)
        sums["kl_sft"] = policy.kl_metrics(view.logps, sft, view.mask)["kl"]
    if asked_scores is not None:
        scored = real & jnp.isfinite(raw)
        sums["score"] = masks.masked_sum(raw, scored), losses.count(scored)
        sums["unscored"] = losses.count(real & ~scored), count
        if "reward" in frozen:
            sums["reward_score"] = (masks.masked_sum(score(model, frozen, rollout), real), count)
    return sums, raw


def _metrics(rollout: Rollout, view: PolicyView, reference, raw, advantages, targets) -> dict[str, jax.Array]:
    mask = view.mask
    real = jnp.any(mask, axis=2)
    lens = jnp.sum(mask.astype(jnp.float32), axis=2)
    _, kl_variance = moments.moments(jnp.sum(jnp.where(mask, view.logps - reference, jnp.float32(0)), axis=2), real)
    score_mean, score_variance = moments.moments(raw, real)
    advantage_mean, advantage_variance = moments.moments(advantages, mask)
    tokens = _response_tokens(rollout)
    metrics = {name: _mean(pair) for name, pair in policy.kl_metrics(view.logps, reference, mask).items()}
    metrics |= {
        "kl_error": jnp.sqrt(kl_variance / jnp.maximum(losses.count(real), 1)),
        "score": score_mean,
        "score_std": jnp.sqrt(score_variance),
        "advantage": advantage_mean,
        "advantage_std": jnp.sqrt(advantage_variance),
        "response_len": masks.masked_mean(lens, real),
        "finished": masks.masked_mean(rollout.finished.astype(jnp.float32), real),
        "score_length_correlation": moments.correlation(raw, lens, real),
        "repetition": masks.masked_mean(moments.repeated_ngram_share(tokens, mask), real),
        "sampler_scorer_difference": jnp.max(jnp.where(mask, jnp.abs(rollout.logps - view.logps), jnp.float32(0))),
        "response_tokens": jnp.sum(lens),
    }
    if view.entropy is not None:
        metrics["entropy"] = masks.masked_mean(view.entropy, mask)
    if view.values is not None:
        metrics["explained_variance"] = returns.explained_variance(view.values, targets, mask)
    return metrics


def _response_tokens(rollout: Rollout) -> jax.Array:
    return response_slots(rollout.batch.tokens, rollout)


def _mean(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    return pair[0] / jnp.maximum(pair[1], 1e-8)


def make_loss(model: ModelConfig, rules: Rules, clip: float, value_clip: float | None, entropy: float):
    """The loss of one minibatch of experience, for `gradients.accumulate`: policy, critic, entropy bonus, k2 term.

    entropy: the bonus's coefficient; 0 leaves it out. frozen: {"base", "kl_coefficient": f32 [], for k2}.
    """

    def loss(params: PyTree, frozen: PyTree, experience: Experience, key: jax.Array) -> losses.Loss:
        def of_rows(out: scoring.ResponseLogps, rows: Experience) -> losses.Loss:
            mask = response_mask(rows.rollout)
            logps = out.logps.reshape(mask.shape)
            terms: list = []
            if out.entropy is not None:
                terms.append((entropy, policy.entropy_bonus(out.entropy.reshape(mask.shape), mask)))
            if rules.kl_term == "k2":
                terms.append((frozen["kl_coefficient"], policy.kl_k2(logps, rows.ref_logps, mask)))
            return losses.add(policy.ppo(logps, rows.old_logps, rows.advantages, mask, clip), *terms)

        rollout, base = experience.rollout, frozen["base"]
        weights = base | params["policy"]
        hidden = _hidden(model, weights, rollout)
        total = scoring.loss_of_hidden(
            model, weights, hidden, rollout.batch, of_rows, experience, rules.temperature, entropy != 0
        )
        if "value" not in params:
            return total
        values, mask = _values(model, params, base, rollout, rules, hidden), response_mask(rollout)
        critic = policy.value(values, experience.values, experience.returns, mask, value_clip)
        return losses.add(total, (1.0, critic))

    return loss
