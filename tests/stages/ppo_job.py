"""A folder and settings enter; a ppo stage's Job leaves, its inputs built by hand: a real tiny LLaMA (stories260K) as
base, policies and a reward model that differ from it by noise, and the beginnings of stories as prompts.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, checkpoint, recipes, sharding
from mpo_jax import settings as declared
from mpo_jax.artifacts import PAIRS, POLICY, REWARD
from mpo_jax.data import encode
from mpo_jax.data.schemas import TextRecord
from mpo_jax.errors import InputError
from mpo_jax.run import Run, as_json
from mpo_jax.stages import corpus, kinds
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Artifact, Job
from mpo_jax.types import BUCKETS, GapTable

NAMES = ("Tom", "Lily", "Sara", "Ben", "Mia", "Tim", "Anna", "Max", "Sue", "Sam")
PLACES = ("park", "big house", "forest", "garden", "old school", "sunny little town by the sea")
STORIES = [
    f"Once upon a time, there was a {mood} {kind} named {name}. {name} went to the {place}."
    for mood in ("little", "happy", "sad", "kind")
    for kind, names in (("girl", NAMES[1::2]), ("boy", NAMES[::2]))
    for name in names
    for place in PLACES
]
SMALL = {
    "batch_size": 8, "steps": 3, "samples": 1, "max_new_tokens": 8, "inner_epochs": 2, "minibatches": 2,
    "learning_rate": 1e-3, "eval_prompts": 8, "table_rows": 2, "eval_every": 2, "save_every": 1,
}  # fmt: skip


def make_config(stories: Path, rank: int = 0, **settings) -> Run:
    """A run with one ppo stage, "mpo", whose settings are small but for those given, and a split."""
    config = recipes.config()
    config.model.path, config.data.path = str(stories), "unread"
    config.model.lora.rank = rank
    config.data.max_length, config.data.max_response, config.data.max_buckets = 64, 16, 2
    config.stages.mpo = recipes.stage("ppo", **(SMALL | settings))
    config.stages.split = recipes.stage("split")
    return kinds.read(config.to_dict())


def make_job(folder: Path, stories: Path, mesh=None, rank: int = 0, prompts: int = 24, inputs=None, **settings) -> Job:
    """The Job, with its inputs' artifacts written beneath `folder` where they are not there yet.

    inputs: roles to leave out (None) or to take from elsewhere. rank: of LoRA adapters; 0: full weights.
    """
    config = make_config(stories, rank, **settings)
    mesh = sharding.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    workdir = epath.Path(folder)
    job = Job("mpo", config.stages["mpo"], config, workdir / "mpo", workdir, {}, mesh)
    with jax.set_mesh(mesh):
        made = {
            "init": policy(job, "dpo", seed=1),
            "reference": policy(job, "dpo", seed=1),
            "sft": policy(job, "sft", seed=2),
            "reward": reward_model(job),
            "prompts": hard_prompts(job, prompts),
        }
    made |= inputs or {}
    inputs = {role: artifact for role, artifact in made.items() if artifact is not None}
    return Job("mpo", config.stages["mpo"], config, workdir / "mpo", workdir, inputs, mesh)


def replaced(job: Job, settings=None, **fields) -> Job:
    """A copy of a job with other fields and other settings, checked: its stage's, or the run's by dotted names."""
    if settings:
        config = declared.replaced(
            job.config, {key if "." in key else f"stages.{job.name}.{key}": value for key, value in settings.items()}
        )
        fields |= {"config": config, "settings": config.stages[job.name]}
    return dataclasses.replace(job, **fields)


def beside(job: Job, name: str, kind: str, folder: str = "", inputs=None, **settings) -> Job:
    """The job of a further stage of the same run. folder: its name beneath the workdir; "": the stage's."""
    stage = declared.parse(kinds.KINDS[kind].settings, {"kind": kind} | settings, f"stages.{name}")
    config = job.config.model_copy(update={"stages": job.config.stages | {name: stage}})
    return Job(name, stage, config, job.workdir / (folder or name), job.workdir, inputs or {}, job.mesh)


def refused(job: Job, settings, message: str) -> None:
    """A run whose stage has other settings is refused in one line, as its config is read."""
    plain = as_json(job.config)
    plain["stages"][job.name] |= settings
    with pytest.raises(InputError, match=message) as caught:
        kinds.read(plain, from_json=True)
    assert "\n" not in str(caught.value)


def part(artifact: Artifact, name: str) -> Artifact:
    """The same artifact, another part of it."""
    return dataclasses.replace(artifact, part=name)


def noisy(weights, seed: int, size: float = 0.02):
    """Every leaf with noise: adapters too, whose b would be 0 and whose product nothing."""
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree,
        [x + size * jax.random.normal(key, x.shape, jnp.float32) for x, key in zip(leaves, keys, strict=True)],
    )


def policy(job: Job, name: str, seed: int) -> Artifact:
    """A policy near the base model."""
    folder = job.workdir / name
    if not folder.exists():
        model = jobs.model(job)
        start = jobs.load_weights(job, jobs.base_artifact(job), model)
        checkpoint.save_weights(folder / artifacts.WEIGHTS, noisy(start, seed))
    return Artifact(name, POLICY, folder)


def reward_model(job: Job, name: str = "reward", seed: int = 3) -> Artifact:
    """The base with a scalar head large enough that scores differ."""
    folder = job.workdir / name
    if not folder.exists():
        model = jobs.model(job)
        start = jobs.load_weights(job, jobs.base_artifact(job), model)
        weights = jobs.with_head(job, model, noisy(start, seed))
        weights |= {"head": jax.tree.map(lambda x: 10 * x, weights["head"])}
        checkpoint.save_weights(folder / artifacts.WEIGHTS, weights)
        artifacts.write_json(folder / artifacts.STATISTICS, {"mean": 0.25, "std": 0.5})
    return Artifact(name, REWARD, folder)


def hard_prompts(job: Job, count: int) -> Artifact:
    """A split whose hard part has `count` pairs, and 12 easy; of the last 24 stories 12 select, 12 are reported on."""
    folder = job.workdir / "split"
    artifact = Artifact("split", PAIRS, folder, "hard")
    if folder.exists():
        return artifact
    tokenizer = jobs.load_tokenizer(job, jobs.model(job))
    data = job.config.data
    limits = encode.Limits(data.max_length, data.max_response, max_prompt=data.max_length - 2 * data.max_response)

    def pairs(stories):
        return encode.encode(
            [TextRecord(story, " He was happy.", " He was sad.", i, "train") for i, story in enumerate(stories)],
            tokenizer,
            2,
            limits,
        )

    train = pairs(STORIES[: count + 12])
    gap = np.where(np.arange(count + 12) < count, 0.1, 2.0).astype(np.float32)
    table = table_of(train, gap)
    corpus.write_rows(train, folder / artifacts.PAIR_ROWS)
    for half, stories in (("select", STORIES[-24:-12]), ("report", STORIES[-12:])):
        held = pairs(stories)
        corpus.write_rows(held, folder / artifacts.HELDOUT / half)
        artifacts.write_gaps(folder / artifacts.HELDOUT / half, table_of(held, np.resize([0.1, 2.0, 0.1], len(held))))
    artifacts.write_gaps(folder, table)
    artifacts.write_json(folder / artifacts.CONFIG, as_json(job.config))
    return artifact


def table_of(encoded: encode.Encoded, gap: np.ndarray) -> GapTable:
    """Pairs with gaps of 0 and more, easy from 1 up."""
    bucket = np.where(gap < 1, BUCKETS.index("hard"), BUCKETS.index("easy")).astype(np.int8)
    gap = gap.astype(np.float32)
    return GapTable(encoded.id, encoded.prompt_id, gap, np.zeros_like(gap), gap, bucket)
