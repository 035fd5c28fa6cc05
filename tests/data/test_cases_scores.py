"""A reply as a file tells it and the same reply as the sampler leaves it enter; they are the same tokens to a reward
model, whose scores of them are the same. `transformers` says which tokens the reply is."""

import gzip
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mpo_jax import decoding, recipes, sampling, sharding
from mpo_jax.data import encode, sources
from mpo_jax.stages import candidates, kinds, rows
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.job import Job

SLOTS = 96
"""For a reply, longer than any here."""


def chats(shared, count: int) -> list[dict]:
    """Real posts and real summaries of them, each a question and its answer."""
    with gzip.open(shared / "data/tldr/posts_250x18.jsonl.gz", "rt") as lines:
        posts = [json.loads(line) for line in itertools.islice(lines, count)]
    return [
        {
            "prompt": [{"role": "user", "content": post["post"][:100].strip()}],
            "chosen": [{"role": "assistant", "content": next(iter(post["summaries"].values()))[:80].strip()}],
        }
        for post in posts
    ]


def reward_job(model, data, folder) -> Job:
    config = recipes.config()
    config.model.path, config.data.path, config.data.max_buckets = str(model), str(data), 1
    config.data.max_length, config.data.max_response = 320, SLOTS
    config.stages.reward = recipes.stage("reward")
    run = kinds.read(config.to_dict())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Job("reward", run.stages["reward"], run, epath.Path(folder) / "reward", epath.Path(folder), {}, mesh)


def by_transformers(tokenizer, row: dict) -> list[int]:
    """The tokens that follow the prompt in the whole chat."""
    how = {"tokenize": True, "return_dict": False}
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **how)
    return tokenizer.apply_chat_template(row["prompt"] + row["chosen"], **how)[len(prompt) :]


def sampled(job: Job, model, weights, prompts, spoken: list[list[int]], patch) -> tuple:
    """What the sampler leaves where the model says `spoken`, and goes on as long as it is let."""
    forced = np.zeros((len(spoken), 1, SLOTS), np.float32)
    for row, ids in enumerate(spoken):
        forced[row, 0] = np.resize(ids, SLOTS)
    patch.setattr(decoding, "uniforms", lambda keys, positions: jnp.asarray(forced))
    patch.setattr(decoding.choose, "draw", lambda chances, said: (said.astype(jnp.int32), jnp.ones_like(said)))
    how = candidates.sampling_config(job, 1, temperature=1.0, max_new_tokens=SLOTS)
    with candidates.prompt_loader(job, prompts, len(spoken), shuffle=False).batches(0, 1) as stream:
        (batch,) = stream
    rollout = jax.jit(lambda weights, batch: sampling.sample(model, how, weights, batch, 0, 0))(weights, batch)
    return rollout, candidates.reply_tokens(jax.device_get(rollout), how)


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["gemma", "qwen_base"])
def test_a_reply_scores_the_same_as_data_and_as_a_sample(models, shared, jsonl, tmp_path, monkeypatch, name, count):
    written = chats(shared, count)
    job = reward_job(models / name, jsonl(written), tmp_path)
    with jax.set_mesh(job.mesh):
        model = jobs.model(job)
        tokenizer = jobs.load_tokenizer(job, model)
        records, _ = sources.load(job.config.data.path, "train", tokenizer)
        data = encode.encode(records, tokenizer, 1, encode.Limits(320, SLOTS))
        weights = jobs.with_head(job, model, jobs.load_weights(job, jobs.base_artifact(job), model))
        weights |= {"head": jax.tree.map(lambda x: 100 * x, weights["head"])}  # scores about 1 apart
        prompts = encode.take(data, np.arange(count), replies=0)
        spoken = [by_transformers(tokenizer, row) for row in written]
        rollout, drawn = sampled(job, model, weights, prompts, spoken, monkeypatch)
        samples = candidates.with_replies(prompts, drawn)

        assert np.asarray(rollout.finished).all()
        for row in range(count):
            kept = data.row(row)[1].tolist()
            assert kept == samples.row(row)[1].tolist() == spoken[row][: len(kept)]
            assert kept[-1] in jobs.stop_ids(job) and not set(kept[:-1]) & set(jobs.stop_ids(job))
        batch = shapes.batch(job, 20, 320, SLOTS)
        program = rows.scoring_program(job, model, jax.eval_shape(lambda: weights), batch, 1)
        of_data, of_samples = (rows.compute(job, program, weights, each, 20)[:, 0] for each in (data, samples))
        in_slots = np.asarray(rows.scoring_step(model, 1, job.mesh)(weights, rollout.batch))[:, 0]  # as PPO scores
    assert np.std(of_data) > 0.1
    print(name, count, *(np.corrcoef(of_data, each)[0, 1] for each in (of_samples, in_slots)))
    np.testing.assert_array_equal(of_data, of_samples)
    np.testing.assert_allclose(of_data, in_slots, atol=1e-4)
    assert np.corrcoef(of_data, in_slots)[0, 1] > 1 - 1e-6
