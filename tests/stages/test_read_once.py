"""Sources that stages read once, by weight, and held-out data that an evaluation reads whole."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from mpo_jax import recipes, sharding
from mpo_jax.data import division
from mpo_jax.errors import InputError
from mpo_jax.stages import corpus, evaluate, kinds
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Job
from tests.stages.ppo_job import STORIES, refused


@pytest.fixture
def config(tmp_path, stories):
    """The run's data, on which a policy learns; prompts of somebody's own, of which the first 20 are among those."""
    made = recipes.config()
    made.model.path = str(stories)
    made.data.max_length, made.data.max_response = 64, 16
    for name, rows in (
        ("own", [{"prompt": s, "chosen": " They ran.", "rejected": " No."} for s in STORIES[:160]]),
        ("mine", [{"prompt": s} for s in STORIES[140:200]]),
        ("more", [{"prompt": s, "chosen": " They slept.", "rejected": " It hurt."} for s in STORIES[160:240]]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.data.path = str(tmp_path / "own.jsonl")
    made.data.sources.mine = recipes.source(path=str(tmp_path / "mine.jsonl"), split="all", eval_split="all")
    made.data.sources.own = recipes.source(path=made.data.path)
    made.data.sources.more = recipes.source(path=str(tmp_path / "more.jsonl"))
    made.stages.sft = recipes.stage("sft", init="base")
    given = {"policies": ("sft",), "baseline": "sft", "reward": "", "prompts": "data", "count": 1000}
    made.stages.evaluate = recipes.stage("evaluate", data="mine", heldout="whole", **given)
    made.stages.split = recipes.stage("split", policy="", reward="", scorer="vader", data={"own": 1.0, "more": 0.5})
    return made


def make_job(config, name: str) -> Job:
    run = kinds.read(config.to_dict())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Job(name, run.stages[name], run, epath.Path("unread"), epath.Path("unread"), {}, mesh)


def texts(job: Job, encoded) -> set[str]:
    tokenizer = jobs.load_tokenizer(job, jobs.model(job))
    return {tokenizer.decode(encoded.row(row)[0].tolist(), skip_special_tokens=True) for row in range(len(encoded))}


def heldout(config, tmp_path) -> set[str]:
    config.data.cache = False
    job = make_job(config, "evaluate")
    evaluate.check(job)
    model = jobs.model(job)
    return texts(job, evaluate.heldout_prompts(job, model, jobs.load_tokenizer(job, model)))


def test_an_evaluation_reads_data_of_its_own_whole_but_for_what_others_read(config, tmp_path):
    del config.stages["split"]
    assert heldout(config, tmp_path) == set(STORIES[160:200]), "20 of its prompts are in the training data"
    config.stages.evaluate.heldout = "report"
    half = heldout(config, tmp_path)
    assert half == {s for s in STORIES[140:200] if division.share_or_half(s, {"eval": 1.0}) == division.REPORT}


def test_data_that_others_read_is_not_held_out_whole(config, tmp_path):
    del config.stages["split"]
    config.stages.sft.data = "more"
    config.stages.evaluate.data = "more"
    with pytest.raises(InputError, match=r"^stages\.evaluate\.heldout: 'whole', but other stages read 'more' too"):
        evaluate.check(make_job(config, "evaluate"))
    config.stages.evaluate.data = ""
    evaluate.check(make_job(config, "evaluate"))
    job = make_job(config, "evaluate")
    refused(job, {"prompts": "split/all"}, r"stages\.evaluate\.heldout: 'whole', beside prompts of 'split/all'")


def test_a_split_reads_each_pair_of_a_mixture_once(config):
    config.data.cache = False
    found = {}
    for weight in (0.5, 1.0):
        config.stages.split.data = {"own": 1.0, "more": weight} if weight < 1 else {"own": 2.0, "more": 2.0}
        job = make_job(config, "split")
        model = jobs.model(job)
        encoded = corpus.share_pairs(job, model, jobs.load_tokenizer(job, model), "policy")
        assert encoded.mixture is None and len(np.unique(encoded.id)) == len(encoded)
        found[weight] = texts(job, encoded)
        assert len(found[weight]) == len(encoded)
    own, more = ({s for s in part if division.share(s, dict(job.config.data.shares)) == "policy"}
                 for part in (STORIES[:160], STORIES[160:]))  # fmt: skip
    assert found[1.0] == own | more, "equal weights read everything"
    assert own < found[0.5] < found[1.0] and len(found[0.5] - own) == round(len(more) / 2)


def test_a_scorer_is_told_of_the_columns_that_a_source_keeps(config):
    config.data.cache = False
    config.data.sources.more.keep = ("rejected",)
    job = make_job(config, "split")
    said = corpus.said(job, jobs.load_tokenizer(job, jobs.model(job)))
    told = {record.prompt: json.loads(record.kept) for record in said.values() if record.kept}
    assert told == {story: {"rejected": " It hurt."} for story in STORIES[160:240]}
