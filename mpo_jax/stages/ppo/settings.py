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
        1.0, "temperature of the whole softmax, from which replies are sampled, and of all log-probs"
    )
    algorithm: Annotated[str, OneOf(ESTIMATORS)] = setting(
        "ppo",
        "how rewards become advantages: by generalised advantage estimation with a critic, or by RLOO without one",
    )
    gamma: Share = setting(1.0, "discount factor of later rewards")
    lam: Share = setting(0.95, "lambda of generalised advantage estimation; Schulman et al. 2016, eq. 16")
    whiten: Switch = setting(
        "auto",
        "whether advantages are shifted and scaled to mean 0 and variance 1; auto: as the algorithm is defined (ppo: "
        "true, rloo: false)",
    )
    kl_term: Literal["k1", "k2"] = setting("k1", "where the KL penalty is: k1 in the reward, k2 in the loss")
    missing_eos_penalty: Amount = setting(0.0, "subtracted from the score of a reply without a stop token")
    score_clip: Amount = setting(0.0, "largest size of a score, after normalising; 0: no limit")
    critic: Literal["separate", "shared"] = setting(
        "separate", "what the critic is: a model of its own, or a head on the policy's trunk"
    )

    @property
    def whitens(self) -> bool:
        return ESTIMATORS[self.algorithm].whitens if self.whiten == "auto" else self.whiten == "true"


class Settings(PolicyTraining, Rules, Replay):
    """Reinforcement learning of a policy on prompts, held by a KL term to a frozen reference."""

    init: str = role(POLICY, "dpo", "the policy that training starts from")
    reference: str = role(POLICY, "dpo", "the frozen policy that the KL is measured from; in the paper, the DPO policy")
    reward: str = role(REWARD, "reward", "the reward model; empty if `scorer` names another", optional=True)
    prompts: str = role(
        PAIRS, "split/hard", "pairs to whose prompts replies are sampled; data: the data's own prompts", data=True
    )
    sft: str = role(POLICY, "", "another policy, from which the KL is logged too; empty: none")
    scorer: Annotated[Scorer, Scorers(more=(OWN,))] = setting(
        OWN, "what scores the replies: the reward model, or another scorer"
    )
    gold: Annotated[Scorer, Scorers(more=("",))] = setting(
        "", "a scorer whose scores are logged at evaluations and never learned from; empty: none"
    )
    batch_size: Count = changed(Training, "batch_size", 16, "prompts of a step, over all devices together")
    microbatch: Whole = changed(
        Training,
        "microbatch",
        0,
        "prompts whose gradients are computed at a time, and then accumulated; 0: all of them at once. On one device "
        "they are prompts with replies of like length, and are computed only as wide as the longest of these",
    )
    samples: Count = setting(1, "replies that are sampled to each prompt", unit="replies")
    max_new_tokens: Count = setting(64, "longest reply, including its stop token", unit="tokens")
    inner_epochs: Count = setting(4, "number of passes over each rollout")
    minibatches: Count = setting(1, "number of updates in a pass")
    clip: Amount = setting(0.2, "the probability ratio is clipped at this distance from 1; Schulman et al. 2017, eq. 7")
    value_clip: Amount = setting(
        0.2, "in the critic's loss, values are clipped at this distance from the old ones; 0: no clipping"
    )
    value_learning_rate: Rate = setting(0.0, "peak of the critic's learning rate; 0: as learning_rate")
    critic_warmup: Whole = setting(0, "number of first steps in which only the critic learns", unit="steps")
    entropy: Amount = setting(0.0, "coefficient of the entropy bonus")
    kl_coefficient: Amount = setting(
        0.05, "coefficient of the KL penalty; the default is our choice", unit="reward units per nat"
    )
    kl_target: Amount = setting(
        0.0, "the KL to which kl_coefficient is adapted after each step; 0: it is fixed", unit="nats per reply"
    )
    kl_gain: Amount = setting(0.1, "how fast kl_coefficient is adapted to kl_target")
    target_kl: Amount = setting(
        0.0,
        "a step's remaining updates are skipped if the KL (k3) of the old policy to the new one exceeds this; 0: never",
        unit="nats per token",
    )
    normalise_scores: bool = setting(
        False,
        "whether scores are normalised, by the reward model's stored mean and standard deviation; for another scorer, "
        "by those of its scores of the first policy's replies",
    )
    eval_prompts: Count = setting(64, "number of held-out prompts in an evaluation while training")
    best_kl: Amount = setting(
        0.0, "largest KL to the reference that the best checkpoint may have; 0: any", unit="nats per reply"
    )
    table_rows: Whole = setting(4, "number of replies that an evaluation writes to samples.jsonl")
    learning_rate: Rate = changed(
        Training, "learning_rate", 1e-6, "peak of the policy's learning rate; the default is our choice"
    )

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
