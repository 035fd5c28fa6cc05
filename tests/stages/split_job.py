"""A folder and settings enter; a split or pairs stage's Job leaves, on real pairs of HH or of TL;DR's posts, with
stories260K under a little noise as policy, and with a scalar head as reward model.
"""

import gzip
import json
from pathlib import Path

import jax
import numpy as np
from etils import epath

from mpo_jax import artifacts, checkpoint, recipes, sharding
from mpo_jax.artifacts import PAIRS, REWARD
from mpo_jax.run import as_json
from mpo_jax.stages import job as jobs
from mpo_jax.stages import kinds, split
from mpo_jax.stages.job import Artifact, Job
from tests.stages.ppo_job import noisy, policy

SMALL = {"batch_size": 8, "max_new_tokens": 12, "samples": 3, "quantile": 0.5}
HH = "data/hh_rlhf/harmless-base/test.jsonl.gz"


def make_job(
    folder: Path, shared: Path, kind: str = "split", mesh=None, data=None, limit: int = 60, inputs=None, **settings
) -> Job:
    """The Job of a stage named as its kind. data: a file; None: HH harmless. inputs: of another job; None: made."""
    config = recipes.config()
    config.model.path = str(shared / "models/stories260K")
    config.data.path, config.data.split, config.data.limit = str(data or shared / HH), "all", limit
    config.data.shares = {"sft_reward": 0.3, "policy": 0.5, "eval": 0.2}
    config.data.max_length, config.data.max_response, config.data.max_buckets = 64, 16, 1
    config.data.max_prompt = 64 - 2 * 16
    config.data.multiple = 16  # few row lengths, so few programs to compile
    config.stages.reward = recipes.stage("reward")
    known = {key: value for key, value in SMALL.items() if key in kinds.KINDS[kind].settings.model_fields}
    config.stages[kind] = recipes.stage(kind, **(known | settings))
    run = kinds.read(config.to_dict())
    mesh = sharding.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    workdir = epath.Path(folder)
    target = workdir / kind
    artifacts.write_json(target / artifacts.CONFIG, as_json(run))
    job = Job(kind, run.stages[kind], run, target, workdir, inputs or {}, mesh)
    if inputs is not None:
        return job
    with jax.set_mesh(mesh):
        inputs = {"policy": policy(job, "sft", seed=2), "reward": reward_model(job, "reward", seed=3)}
    return Job(kind, run.stages[kind], run, target, workdir, inputs, mesh)


def run_split(job: Job) -> Artifact:
    """The split's artifact, whole: take a part of it with `ppo_job.part`."""
    with jax.set_mesh(job.mesh):
        split.run(job)
    return Artifact(job.name, PAIRS, job.folder, "all")


def reward_model(job: Job, name: str, seed: int) -> Artifact:
    """A model whose scores of HH replies have a standard deviation near 1."""
    folder = job.workdir / name
    if not folder.exists():
        model = jobs.model(job)
        start = jobs.load_weights(job, jobs.base_artifact(job), model)
        weights = noisy(jobs.with_head(job, model, start), seed)
        weights |= {"head": jax.tree.map(lambda x: 4 * x, weights["head"])}
        checkpoint.save_weights(folder / artifacts.WEIGHTS, weights)
    return Artifact(name, REWARD, folder)


def write_comparisons(path: Path, shared: Path, count: int = 100) -> Path:
    """Real posts with two of their real summaries, as TL;DR's comparison records; choice and confidence are made up."""
    random = np.random.default_rng(0)
    with gzip.open(shared / "data/tldr/posts_250x18.jsonl.gz", "rt") as posts, path.open("w") as file:
        for number, line in zip(range(count), posts, strict=False):
            post = json.loads(line)
            texts = list(post["summaries"].values())[:2]
            record = {
                "info": {"id": f"t3_{number}", "post": post["post"], "title": f"Title {number}", "subreddit": "tifu"},
                "summaries": [{"text": text, "policy": "sup", "note": ""} for text in texts],
                "choice": int(random.integers(2)),
                "worker": "w", "batch": "b", "split": "train",
                "extra": {"confidence": int(random.integers(1, 10))},
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
    return path
