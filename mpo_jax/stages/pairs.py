"""A policy and prompts enter; preference pairs of its own replies leave, labelled by a simulated annotator.

For self-labelled studies and data without labels: the labeller's Bradley-Terry choices stand in for the human's. Every
share of the data gets its pairs, so that what follows can keep them apart.
"""

from typing import Any

import jax
import numpy as np

from mpo_jax.evaluation import labellers
from mpo_jax.stages import job as jobs
from mpo_jax.stages import rollouts, split
from mpo_jax.stages.job import Job


def run(job: Job) -> dict[str, Any]:
    """Samples, labels, writes a folder of encoded pairs for each share that holds prompts."""
    settings = job.settings
    jobs.local(job.folder)
    split.check_sampled(job, labellers.LABELLERS)
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    weights = jobs.base_weights(job, model) | jobs.load_weights(
        job, job.inputs["policy"], model, jobs.frozen_dtype(job)
    )
    how = rollouts.sampling_config(job, settings, settings.samples)
    counts: dict[str, int] = {}
    for share, part in job.config.data.shares.items():
        if part == 0:
            continue
        prompts = jobs.share_prompts(job, model, tokenizer, share)
        replies = rollouts.sample_all(job, model, weights, prompts, how, settings.batch_size, job.seed)
        texts = [text for row in replies.texts(tokenizer) for text in row]
        gold = labellers.score(settings.labeller, texts).reshape(len(prompts), settings.samples)
        found = split.pair_up(split.with_replies(prompts, replies.tokens), gold, gold, settings, job.seed)
        counts[share] = len(found.encoded)
        if jax.process_index() == 0:
            split.replace(found.encoded, job.folder / share)
            gap = found.scores[:, 0] - found.scores[:, 1]
            right = float(np.mean(gap > 0))
            print(f"{share}: {len(gap)} pairs of {len(prompts)} prompts; the label follows the score in {right:.3f}")
    return {"pairs": counts}
