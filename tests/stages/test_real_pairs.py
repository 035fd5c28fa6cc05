"""Real pairs and stories260K enter the losses of SFT and reward model; values that we didn't write, and a trained model
that knows its pairs, say that the losses are right."""

import jax
import numpy as np
import pytest
from etils import epath

from mpo_jax import recipes, sharding
from mpo_jax.artifacts import POLICY
from mpo_jax.stages import corpus, kinds, loop, reward, rows, sft
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Artifact, Job
from tests.configs import stories_hh


def make_job(folder, shared, kind: str, **settings) -> Job:
    """A stage on the base model, on one device, of the real pairs' config with short rows."""
    config = stories_hh.get_config()
    config.model.path = str(shared / "models/stories260K")
    config.data.path = str(shared / "data/hh_rlhf/harmless-base/test.jsonl.gz")
    config.data.limit, config.data.max_length, config.data.max_response, config.data.max_buckets = 200, 160, 64, 1
    config.stages[kind] = recipes.stage(kind, **settings)
    run = kinds.read(config.to_dict())
    workdir = epath.Path(folder)
    inputs = {"init": Artifact("base", POLICY, epath.Path(config.model.path))}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Job(kind, run.stages[kind], run, workdir / kind, workdir, inputs, mesh)


def loaded(job: Job, replies: int, count: int):
    """The model, its weights, and a loader over the first `count` rows of the training share."""
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    records = corpus.records(job, "sft_reward", tokenizer)
    encoded = corpus.encode_rows(job, model, records[:count], replies, tokenizer)
    assert len(encoded) == count
    return model, jobs.load_weights(job, job.inputs["init"], model), encoded


def test_loss_of_the_base_model_is_transformers(torch, shared, tmp_path):
    """Of the first step of SFT: the mean over the replies' tokens alone."""
    import transformers

    job = make_job(tmp_path, shared, "sft")
    with jax.set_mesh(job.mesh):
        model, weights, encoded = loaded(job, replies=1, count=8)
        batch = jobs.loader(job, encoded, 8).batch(0)
        total, count, _ = jax.jit(sft.make_loss(model))(weights, {"base": {}}, batch, jax.random.key(0))
    theirs = transformers.LlamaForCausalLM.from_pretrained(job.config.model.path, dtype=torch.float32)
    sums, tokens = 0.0, 0
    for index in range(len(encoded)):
        prompt, reply = encoded.row(index)
        ids = torch.tensor(np.concatenate([prompt, reply]), dtype=torch.long)[None]
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            sums += float(theirs(input_ids=ids, labels=labels).loss) * len(reply)
        tokens += len(reply)
    assert int(count) == tokens
    assert float(total) / tokens == pytest.approx(sums / tokens, abs=1e-5)


@pytest.mark.slow
def test_reward_model_memorises_64_pairs(shared, tmp_path):
    """What a broken loss cannot, in 40 steps of 16 pairs."""
    settings = {"epochs": 10.0, "learning_rate": 3e-3, "log_every": 10, "save_every": 1000, "weight_decay": 0.0}
    job = make_job(tmp_path, shared, "reward", **settings)
    with jax.set_mesh(job.mesh):
        model, weights, encoded = loaded(job, replies=2, count=64)
        params = jobs.with_head(job, model, weights)
        loader, heldout = (jobs.loader(job, encoded, 16, shuffle=shuffle) for shuffle in (True, False))
        steps = loop.total_steps(job, loader)
        found = reward.programs(job, steps)
        training = loop.supervised(job, found, params, {"base": {}}, loader, heldout, steps)
        params, _ = loop.train(training, steps, job.folder, job.mesh)
        scores = rows.compute(job, found["score"], params, encoded, 16)
    right = np.mean(scores[:, 0] > scores[:, 1])
    print(f"training accuracy on 64 pairs: {right:.3f}")
    assert right >= 0.99
