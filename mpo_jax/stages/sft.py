"""The base model and chosen replies (or reference summaries) enter; a policy that writes such replies leaves.

The loss is the negative log-likelihood of the reply's tokens alone.
"""

from typing import Any

from mpo_jax import checkpoint, scoring
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import losses
from mpo_jax.stages import job as jobs
from mpo_jax.stages import loop
from mpo_jax.stages.job import Job


def make_loss(model: ModelConfig) -> loop.Loss:
    """Per-token negative log-likelihood, over the tokens of all rows of positive weight."""

    def loss(params, frozen, batch, key):
        out = scoring.response_logps(model, frozen["base"] | params, batch)
        return losses.sft(out.logps, out.mask & (batch.weight > 0)[:, None])

    return loss


def run(job: Job) -> dict[str, Any]:
    """Trains, writes the weights, returns the summary."""
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    settings = job.settings
    loop.check(settings, job.mesh)
    train, heldout = (
        jobs.loader(
            job,
            jobs.encode_rows(job, model, jobs.records(job, share, tokenizer), 1, tokenizer),
            settings.batch_size,
            shuffle=share != "eval",
        )
        for share in (settings.share, "eval")
    )
    params = jobs.load_weights(job, job.inputs["init"], model)
    training = loop.supervised(
        make_loss(model),
        params,
        {"base": jobs.base_weights(job, model)},
        train,
        heldout,
        settings,
        jobs.key(job),
        job.mesh,
    )
    params, summary = loop.train(training, job.folder, job.mesh)
    checkpoint.save_weights(job.folder / jobs.WEIGHTS, params)
    return summary
