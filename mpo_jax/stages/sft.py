"""A policy and chosen replies (or summaries) enter, the data's or a split's; a policy that writes such replies leaves.

The loss is the negative log-likelihood of the reply's tokens alone.
"""

from collections.abc import Iterator
from typing import Any

from mpo_jax import scoring
from mpo_jax.artifacts import BASE, PAIRS, POLICY
from mpo_jax.data.division import SELECT
from mpo_jax.data.loader import Loader
from mpo_jax.evaluation.sections import Shown
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import losses
from mpo_jax.optim import Rate
from mpo_jax.run import ShareName
from mpo_jax.settings import changed, role, setting
from mpo_jax.stages import buckets, corpus, gradients, loop
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.base import PolicyTraining, Stage, Training, rows_of_share
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Call, Programs
from mpo_jax.types import Batch


class Settings(PolicyTraining):
    """Supervised fine-tuning on the data's chosen replies."""

    init: str = role(POLICY, BASE, "the policy that training starts from")
    pairs: str = role(
        PAIRS, "", "pairs whose chosen replies are learned from, such as split/hard; empty: the data's own replies"
    )
    share: ShareName = setting("sft_reward", "the share of the data that is learned from, if `pairs` is empty")
    learning_rate: Rate = changed(
        Training, "learning_rate", 2e-5, "peak of the learning rate; the default is our choice"
    )


def make_loss(model: ModelConfig) -> gradients.Loss:
    """Per-token negative log-likelihood, over the tokens of all rows of positive weight."""

    def loss(params, frozen, batch, key):
        return scoring.response_loss(model, frozen["base"] | params, batch, nll)

    return loss


def nll(out: scoring.ResponseLogps, batch: Batch) -> losses.Loss:
    """`losses.sft` of the rows' log-probs."""
    return losses.sft(out.logps, out.mask & (batch.weight > 0)[:, None])


@shapes.made_once
def programs(job: Job[Settings], steps: int = shapes.STEPS) -> Programs:
    """The training's, on rows of one reply."""
    model = jobs.model(job)
    rows = shapes.replies(job, job.settings.batch_size, shapes.made_by_stage(job, "pairs"))
    return loop.programs(job, model, make_loss(model), jobs.abstract_weights(model, job.mesh), rows, steps)


def loaders(job: Job[Settings], model: ModelConfig) -> tuple[Loader, Loader]:
    """Of the rows that are learned from, and of those that watch it."""
    settings = job.settings
    if "pairs" in job.inputs:
        source = job.inputs["pairs"]
        made = [buckets.chosen(pairs) for pairs in (buckets.pairs(source), buckets.heldout(source, SELECT))]
    else:
        tokenizer = jobs.load_tokenizer(job, model)
        made = [corpus.share_rows(job, model, tokenizer, share, 1) for share in (settings.share, SELECT)]
    # Replies that a stage sampled may make longer rows than those of the data.
    limit = {"max_length": None} if "pairs" in job.inputs else {}
    train, heldout = (
        jobs.loader(job, encoded, settings.batch_size, shuffle=encoded is made[0], **limit) for encoded in made
    )
    return train, heldout


def calls(job: Job[Settings]) -> Iterator[Call]:
    """See `base.Stage.calls`."""
    train, heldout = loaders(job, jobs.model(job))
    return loop.calls(job, programs(job, loop.total_steps(job, train)), train, heldout)


def run(job: Job[Settings]) -> dict[str, Any]:
    """Trains, writes the weights, returns the summary."""
    model = jobs.model(job)
    train, heldout = loaders(job, model)
    steps = loop.total_steps(job, train)
    params = jobs.load_weights(job, job.inputs["init"], model)
    frozen = {"base": jobs.base_weights(job, model)}
    training = loop.supervised(job, programs(job, steps), params, frozen, train, heldout, steps)
    params, summary = loop.train(training, steps, job.folder, job.mesh)
    jobs.save_weights(job, params)
    return summary


def rows_read(job: Job[Settings], pairs: int, easy: float) -> float:
    """See `base.Stage.rows`."""
    read = buckets.rows_of("pairs") if "pairs" in job.inputs else rows_of_share
    return read(job, pairs, easy)


STAGE = Stage(
    kind="sft",
    settings=Settings,
    produces=POLICY,
    run=run,
    programs=programs,
    check=loop.check,
    rows=rows_read,
    calls=calls,
    shown=Shown(curves=(("loss", "loss, nats per token"),), figures=("steps", "evaluation.loss"), learns="replies"),
)
