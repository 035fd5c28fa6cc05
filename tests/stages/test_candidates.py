"""A stage's prompts enter; replies in turn must be those of the prompts' own batches, and the calls must cost least."""

import dataclasses

import jax
import numpy as np
import pytest

from mpo_jax import sharding
from mpo_jax.data.plan import FILLER
from mpo_jax.stages import buckets, candidates
from mpo_jax.stages import job as jobs
from tests.stages.ppo_job import make_job

STOPS = (2, 426, 430)
WAYS = {
    "as the stage samples": {"n": 1, "temperature": 0.9},
    "greedy": {"n": 1, "temperature": 0.0},
    "best of 3": {"n": 3, "temperature": 0.8, "top_k": 50},
}


@pytest.fixture(scope="module", params=[1, 8], ids=["1 device", "8 devices"])
def made(tmp_path_factory, stories, request):
    """A job on so many devices, its prompts, and a policy's weights."""
    mesh = sharding.make_mesh(request.param, 1, 1, devices=jax.devices()[: request.param])
    job = make_job(tmp_path_factory.mktemp("candidates"), stories, mesh=mesh, prompts=80)
    model, tokenizer = jobs.model(job), jobs.load_tokenizer(job, jobs.model(job))
    prompts, _ = buckets.prompts_for(job, model, tokenizer, 8)
    with jax.set_mesh(mesh):
        yield job, prompts, jobs.load_weights(job, job.inputs["init"], model)


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow) if way == "greedy" else way for way in WAYS])
def test_replies_in_turn_are_those_of_each_batch(made, way):
    job, prompts, weights = made
    model, size = jobs.model(job), 8
    how = dataclasses.replace(candidates.sampling_config(job, max_new_tokens=24, **WAYS[way]), stop_ids=STOPS)
    found = candidates.sample_all(job, candidates.program(job, model, weights, how, size), weights, prompts, how, size)
    assert len(candidates.waiting_prompts(job, prompts, size, how).rows(0)[1]) > size, "prompts wait"
    draw = candidates.sampler(model, how, job.mesh, everywhere=True)
    loader = candidates.prompt_loader(job, prompts, size, shuffle=False)
    for step in range(loader.steps_per_epoch):
        rollout = jax.device_get(draw(weights, loader.batch(step), job.seed, 0))
        replies = candidates.reply_tokens(rollout, how)
        for place, row in enumerate(loader.rows(step)[1]):
            if row == FILLER:
                continue
            assert [ids.tolist() for ids in found.tokens[row]] == [ids.tolist() for ids in replies[place]]
            np.testing.assert_array_equal(found.finished[row], rollout.finished[place])
            np.testing.assert_allclose(found.logps[row], rollout.logps[place].sum(axis=-1), atol=1e-4)
    lens = [len(ids) for row in found.tokens for ids in row]
    assert max(lens) - min(lens) > 8, "replies are of unlike length"


def test_prompts_of_one_length_wait_together_and_few_of_unlike_length_do_not(made):
    job, prompts, _ = made
    how = candidates.sampling_config(job, 1, temperature=1.0, max_new_tokens=24)
    rows = len(prompts)

    def waiting(lengths: np.ndarray) -> int:
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.ones(offsets[-1], np.int32)
        some = dataclasses.replace(prompts, tokens=tokens, offsets=offsets)
        return len(candidates.waiting_prompts(job, some, 8, how).rows(0)[1]) // 8

    assert waiting(np.full(rows, 8)) == candidates.MOST_BATCHES
    # 80 by hand, in calls of 64, 32, 16 and 8 prompts: 3392, 2464, 2656 and 2880 tokens' worth.
    assert rows == 80 and waiting(np.where(np.arange(rows) < rows // 2, 40, 8)) == 4
