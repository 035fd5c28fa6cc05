"""Takes the log-probs of a batch's replies under a policy and its reference; gives the losses of preference training.

Each objective is one function with its source, and a line in `OBJECTIVES`. A loss is as in `losses`: (sum, weight,
metrics), and rows of weight 0 contribute nothing. It is asked for some of a batch's rows at a time and the sums are
added, so no row's loss may depend on another row. Letter: B rows.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mpo_jax.ops import shapes
from mpo_jax.ops.losses import Loss, kept, per_token, weighted, wins


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
    _check_smoothing(label_smoothing)
    chosen, rejected, metrics = _log_ratios(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, weight, beta
    )
    logit = jnp.float32(beta) * (chosen - rejected)
    flipped = jnp.float32(label_smoothing)
    nll = -(1 - flipped) * jax.nn.log_sigmoid(logit) - flipped * jax.nn.log_sigmoid(-logit)
    return weighted(nll, weight, metrics)


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
    return weighted(jnp.square(chosen - rejected - jnp.float32(1 / (2 * beta))), weight, metrics)


def robust(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    weight: jax.Array,
    beta: float,
    label_smoothing: float = 0.0,
) -> Loss:
    """Robust DPO: the loss whose mean over labels flipped at random is the loss of the true labels; weight: pairs.

    ((1 - s) * dpo - s * dpo of the flipped label) / (1 - 2 s), s = label_smoothing in [0, 0.5), the rate of flips.
    Chowdhury, Kini & Natarajan 2024 (arXiv 2403.00409), section 3. May be below 0. Inputs and metrics as in `dpo`.
    """
    _check_smoothing(label_smoothing)
    chosen, rejected, metrics = _log_ratios(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, weight, beta
    )
    logit, flips = jnp.float32(beta) * (chosen - rejected), jnp.float32(label_smoothing)
    nll = flips * jax.nn.log_sigmoid(-logit) - (1 - flips) * jax.nn.log_sigmoid(logit)
    return weighted(nll / (1 - 2 * flips), weight, metrics)


def hinge(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    weight: jax.Array,
    beta: float,
) -> Loss:
    """SLiC's hinge: max(0, 1 - beta * margin of log-ratios); weight: pairs. Inputs and metrics as in `dpo`.

    Zhao et al. 2023 (arXiv 2305.10425), whose likelihoods are here divided by the reference's, as in Liu et al. 2023
    (arXiv 2309.06657), "hinge-norm"; their gamma is beta.
    """
    chosen, rejected, metrics = _log_ratios(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, weight, beta
    )
    return weighted(jax.nn.relu(1 - jnp.float32(beta) * (chosen - rejected)), weight, metrics)


def dpo_norm(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    chosen_len: jax.Array,
    rejected_len: jax.Array,
    weight: jax.Array,
    beta: float,
) -> Loss:
    """DPO of log-ratios per token: -log sigmoid(beta * (mean over chosen's tokens - mean over rejected's)).

    As `dpo`, and chosen_len, rejected_len i32 [B]: tokens of the replies. Lambert et al. 2024 (arXiv 2411.15124), eq.
    6, who take beta = 5. The rewards among the metrics are beta * mean log-ratio, kl_chosen and kl_rejected sums.
    """
    chosen, rejected, metrics = _log_ratios(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, weight, beta
    )
    chosen, rejected = per_token(chosen, chosen_len), per_token(rejected, rejected_len)
    nll = -jax.nn.log_sigmoid(jnp.float32(beta) * (chosen - rejected))
    return weighted(nll, weight, metrics | _rewards(chosen, rejected, beta))


def dpop(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    weight: jax.Array,
    beta: float,
    chosen_penalty: float = 50.0,
) -> Loss:
    """DPO-positive: the margin of log-ratios is less by chosen_penalty * max(0, -chosen's log-ratio); weight: pairs.

    So that chosen replies do not lose probability while the margin grows. Pal et al. 2024 (arXiv 2402.13228), eq. 3,
    whose lambda is chosen_penalty. Inputs and metrics as in `dpo`; the rewards among them are without the penalty.
    """
    chosen, rejected, metrics = _log_ratios(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, weight, beta
    )
    asked = chosen - rejected - jnp.float32(chosen_penalty) * jax.nn.relu(-chosen)
    return weighted(-jax.nn.log_sigmoid(jnp.float32(beta) * asked), weight, metrics)


def simpo(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    chosen_len: jax.Array,
    rejected_len: jax.Array,
    weight: jax.Array,
    beta: float,
    gamma: float = 0.5,
) -> Loss:
    """SimPO, without a reference: -log sigmoid(beta * margin of mean log-probs - gamma); weight: pairs.

    policy_chosen, policy_rejected f32 [B] (sums), chosen_len, rejected_len i32 [B] tokens, weight f32 [B]. gamma: the
    margin that is asked of the rewards. Meng, Xia & Chen 2024 (arXiv 2405.14734), eq. 6, who take beta from 2 to 10.
    Metrics: see `_mean_logps`.
    """
    chosen, rejected, metrics = _mean_logps(policy_chosen, policy_rejected, chosen_len, rejected_len, weight, beta)
    nll = -jax.nn.log_sigmoid(jnp.float32(beta) * (chosen - rejected) - jnp.float32(gamma))
    return weighted(nll, weight, metrics)


def orpo(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    chosen_len: jax.Array,
    rejected_len: jax.Array,
    weight: jax.Array,
    beta: float,
) -> Loss:
    """ORPO, without a reference: the chosen reply's mean nll - beta * log sigmoid(log odds ratio); weight: pairs.

    The odds p / (1 - p) are of p = exp(mean log-prob). Hong, Lee & Thorne 2024 (arXiv 2403.07691), eqs. 3, 6 and 7,
    whose lambda is beta. Inputs and metrics as in `simpo`; and chosen_nll, log_odds_ratio.
    """
    chosen, rejected, metrics = _mean_logps(policy_chosen, policy_rejected, chosen_len, rejected_len, weight, beta)
    ratio = (chosen - rejected) - (_log_1_minus_exp(chosen) - _log_1_minus_exp(rejected))
    metrics |= {"chosen_nll": -chosen, "log_odds_ratio": ratio}
    return weighted(-chosen - jnp.float32(beta) * jax.nn.log_sigmoid(ratio), weight, metrics)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A preference loss. loss is called by keyword: policy_chosen, policy_rejected, weight, beta, as `dpo` takes them;
    where `reference`, reference_chosen and reference_rejected; where `lengths`, chosen_len and rejected_len; and what
    `settings` names of the stage's further settings, which no other objective may be given."""

    loss: Callable[..., Loss]
    reference: bool = True
    lengths: bool = False
    settings: tuple[str, ...] = ()


OBJECTIVES = {
    "dpo": Objective(dpo, settings=("label_smoothing",)),
    "ipo": Objective(ipo),
    "robust": Objective(robust, settings=("label_smoothing",)),
    "hinge": Objective(hinge),
    "dpo_norm": Objective(dpo_norm, lengths=True),
    "dpop": Objective(dpop, settings=("chosen_penalty",)),
    "simpo": Objective(simpo, reference=False, lengths=True, settings=("gamma",)),
    "orpo": Objective(orpo, reference=False, lengths=True),
}
"""What preference training can minimise, by name. A new one is a function here (or in a plugin) and a line."""


def kto(
    policy: jax.Array,
    reference: jax.Array,
    desirable: jax.Array,
    weight: jax.Array,
    beta: float,
    zero: jax.Array,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Loss:
    """Kahneman-Tversky optimization of single labelled replies: how far each is from its label's side; weight: rows.

    policy, reference f32 [B]: summed log-probs; desirable bool [B]; weight f32 [B]; zero f32 []: the reference point,
    see `kto_zero`. desirable_weight * (1 - sigmoid(beta * (log-ratio - zero))) for a desirable reply,
    undesirable_weight * (1 - sigmoid(beta * (zero - log-ratio))) for another. Ethayarajh et al. 2024 (arXiv
    2402.01306), eq. 8, without its constant lambda_y. Metrics: chosen_reward and rejected_reward (beta * log-ratio of
    desirable and of other replies), accuracy (of the reward's side of zero; a tie counts half), kl_zero in nats.
    """
    shapes.check("f32[B] f32[B] bool[B] f32[B]", policy=policy, reference=reference, desirable=desirable, weight=weight)
    _check_beta(beta)
    real = weight > 0
    ratio, zero = kept(policy, real) - kept(reference, real), jax.lax.stop_gradient(zero)
    side = jnp.where(desirable, jnp.float32(1), jnp.float32(-1))
    cost = jnp.where(desirable, jnp.float32(desirable_weight), jnp.float32(undesirable_weight))
    beyond = side * (ratio - zero)
    total, rows, sums = weighted(
        cost * jax.nn.sigmoid(-jnp.float32(beta) * beyond),
        weight,
        {"accuracy": wins(beyond), "kl_zero": jnp.broadcast_to(zero, ratio.shape)},
    )
    rewards = jax.lax.stop_gradient(jnp.float32(beta) * ratio)
    for name, members in (("chosen_reward", desirable), ("rejected_reward", ~desirable)):
        part = jnp.where(members, weight, jnp.float32(0))
        sums[name] = (jnp.sum(part * rewards), jnp.sum(part))
    return total, rows, sums


def kto_zero(policy: jax.Array, reference: jax.Array, weight: jax.Array) -> jax.Array:
    """f32 []: KTO's reference point, the mean log-ratio of replies to *other* prompts, at least 0.

    policy, reference f32 [B]: summed log-probs of a reply that belongs to another row's prompt; weight f32 [B].
    Ethayarajh et al. 2024 (arXiv 2402.01306), section 4.1: a biased, cheap estimate of the KL; no gradient passes.
    """
    real = weight > 0
    ratio = kept(policy, real) - kept(reference, real)
    mean = jnp.sum(weight * ratio) / jnp.maximum(jnp.sum(weight), 1e-8)
    return jax.lax.stop_gradient(jax.nn.relu(mean))


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
    _check_beta(beta)
    real = weight > 0
    chosen_logps, rejected_logps = kept(policy_chosen, real), kept(policy_rejected, real)
    chosen = chosen_logps - kept(reference_chosen, real)
    rejected = rejected_logps - kept(reference_rejected, real)
    metrics = _rewards(chosen, rejected, beta) | {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "kl_chosen": chosen,
        "kl_rejected": rejected,
    }
    return chosen, rejected, metrics


def _mean_logps(policy_chosen, policy_rejected, chosen_len, rejected_len, weight, beta):
    """The policy's mean log-prob per token, chosen and rejected, f32 [B], 0 in rows of weight 0; and the metrics by
    name: those of `_rewards` for beta * mean log-prob, chosen_logps and rejected_logps (sums)."""
    shapes.check(
        "f32[B] f32[B] i32[B] i32[B] f32[B]",
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        chosen_len=chosen_len,
        rejected_len=rejected_len,
        weight=weight,
    )
    _check_beta(beta)
    real = weight > 0
    sums = kept(policy_chosen, real), kept(policy_rejected, real)
    chosen, rejected = per_token(sums[0], chosen_len), per_token(sums[1], rejected_len)
    logps = {"chosen_logps": sums[0], "rejected_logps": sums[1]}
    return chosen, rejected, _rewards(chosen, rejected, beta) | logps


def _rewards(chosen, rejected, beta) -> dict[str, jax.Array]:
    """Of an objective's implicit rewards before beta, f32 [B]."""
    scale = jnp.float32(beta)
    return {
        "chosen_reward": scale * chosen,
        "rejected_reward": scale * rejected,
        "reward_margin": scale * (chosen - rejected),
        "accuracy": wins(chosen - rejected),
    }


def _log_1_minus_exp(values: jax.Array) -> jax.Array:
    """log(1 - exp(x)) of x <= 0, from whichever form is exact there (Maechler 2012). Above -1e-7, where float32 knows
    no other p than 1, as at -1e-7: a reply that is certain has odds that are large, not infinite."""
    x = jnp.minimum(values, jnp.float32(-1e-7))
    near = x > -0.6931472
    # Each branch sees only what it is exact for: the gradient of the other would be NaN or infinite there.
    close, far = jnp.where(near, x, jnp.float32(-0.5)), jnp.where(near, jnp.float32(-1), x)
    return jnp.where(near, jnp.log(-jnp.expm1(close)), jnp.log1p(-jnp.exp(far)))


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta is {beta}; expected above 0")


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 or more, below 0.5")
