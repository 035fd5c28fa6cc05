"""What a ppo stage can be set to."""

from typing import Annotated, Literal

import annotated_types
import pydantic

from mpo_jax import settings as declared
from mpo_jax.artifacts import PAIRS, POLICY, REWARD
from mpo_jax.ops.returns import ESTIMATORS
from mpo_jax.optim import Rate
from mpo_jax.scorers.names import OWN, Scorer, Scorers, own_alone, terms
from mpo_jax.settings import Amount, Count, OneOf, Section, Share, Whole, changed, role, setting
from mpo_jax.stages.base import PolicyTraining, Training
from mpo_jax.stages.ppo.replay import Replay

Switch = Annotated[
    Literal["auto", "true", "false"],
    pydantic.BeforeValidator(lambda value: str(value).lower() if isinstance(value, bool | str) else value),
]


class Rules(Section):
    """How rollouts become rewards and advantages."""

    temperature: Annotated[float, annotated_types.Interval(ge=1e-3, le=1e3)] = setting(
        1.0, "of the full softmax that replies are drawn from, and of all log-probs"
    )
    algorithm: Annotated[str, OneOf(ESTIMATORS)] = setting(
        "ppo", "how rewards become advantages: generalised advantage estimates with a critic, or RLOO without one"
    )
    gamma: Share = setting(1.0, "discount of later rewards")
    lam: Share = setting(0.95, "of the generalised advantage estimate; Schulman et al. 2016, eq. 16")
    whiten: Switch = setting(
        "auto",
        "bring advantages to mean 0, variance 1; auto: PPO's alone, since RLOO's authors don't",
    )
    kl_term: Literal["k1", "k2"] = setting("k1", "where the KL penalty stands: k1 inside the reward, k2 in the loss")
    missing_eos_penalty: Amount = setting(0.0, "taken off the score of a reply without a stop token")
    score_clip: Amount = setting(0.0, "bound of a score's size, after normalising; 0: none")
    critic: Literal["separate", "shared"] = setting("separate", "a model of its own, or a head on the policy's trunk")

    @property
    def whitens(self) -> bool:
        return ESTIMATORS[self.algorithm].whitens if self.whiten == "auto" else self.whiten == "true"


class Settings(PolicyTraining, Rules, Replay):
    """Reinforcement learning of a policy on prompts, held by a KL term to a frozen reference."""

    init: str = role(POLICY, "dpo", "the policy that training starts from")
    reference: str = role(POLICY, "dpo", "the frozen policy of the KL term; the paper's is the DPO policy")
    reward: str = role(REWARD, "reward", "the reward model; empty where another scores", optional=True)
    prompts: str = role(
        PAIRS, "split/hard", "the pairs whose prompts it samples replies to; data: the data's own prompts", data=True
    )
    sft: str = role(POLICY, "", "a policy whose KL is logged too")
    scorer: Annotated[Scorer, Scorers(more=(OWN,))] = setting(OWN, "who scores: the reward model, or another scorer")
    gold: Annotated[Scorer, Scorers(more=("",))] = setting(
        "", "a scorer whose scores are logged at evaluations, and learned from by nobody"
    )
    samples: Count = setting(1, "replies to a prompt", unit="replies")
    max_new_tokens: Count = setting(64, "longest reply, its stop token included", unit="tokens")
    inner_epochs: Count = setting(4, "passes over each rollout")
    minibatches: Count = setting(1, "updates in a pass")
    clip: Amount = setting(0.2, "bound of the ratio's distance from 1; Schulman et al. 2017, eq. 7")
    value_clip: Amount = setting(0.2, "bound of a value's change in an update; 0: none")
    value_learning_rate: Rate = setting(0.0, "peak of the critic's schedule; 0: learning_rate")
    critic_warmup: Whole = setting(0, "steps before the policy moves", unit="steps")
    entropy: Amount = setting(0.0, "coefficient of the entropy bonus")
    kl_coefficient: Amount = setting(0.05, "of the KL penalty; ours", unit="reward units a nat")
    kl_target: Amount = setting(0.0, "for an adaptive coefficient; 0: fixed", unit="nats a response")
    kl_gain: Amount = setting(0.1, "of the adaptive coefficient")
    target_kl: Amount = setting(0.0, "stops the inner epochs above this k3; 0: never", unit="nats a token")
    normalise_scores: bool = setting(
        False, "by the reward model's stored mean and standard deviation, or those of another scorer's first scores"
    )
    eval_prompts: Count = setting(64, "held-out prompts of the evaluations while training")
    best_kl: Amount = setting(
        0.0, "the best checkpoint may not be further from the reference; 0: any distance", unit="nats"
    )
    table_rows: Whole = setting(4, "replies kept as text at each evaluation")
    learning_rate: Rate = changed(Training, "learning_rate", 1e-6, "peak of the policy's schedule; ours")

    @property
    def update_rows(self) -> int:
        return self.batch_size // self.minibatches

    @property
    def asks(self) -> bool:
        """Whether another than the reward model scores, so that a reply may have no score."""
        return not own_alone(self.scorer)

    @property
    def has_critic(self) -> bool:
        return ESTIMATORS[self.algorithm].critic

    @pydantic.model_validator(mode="after")
    def _meant(self):
        fewest = ESTIMATORS[self.algorithm].samples
        if self.samples < fewest:
            raise declared.wrong(
                "samples",
                f"{self.samples} with {self.algorithm}, whose baseline is the other samples; expected {fewest} or more",
            )
        if self.batch_size % self.minibatches:
            raise declared.wrong("minibatches", f"{self.minibatches} do not divide batch_size {self.batch_size}")
        if not self.reward and OWN in terms(self.scorer):
            raise declared.wrong("reward", "empty, but scorer needs it; name a reward stage")
        return self
