"""Stages on mixtures of named sources, run as a user runs them: accounts, compiles, kill and resume."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, recipes, sharding
from mpo_jax.stages import corpus, kinds
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Job
from tests.stages.ppo_job import STORIES
from tests.tools import kills, processes

SCRIPT, STEPS = "tests.tools.main", 16


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, stories) -> list[str]:
    """Of a run whose SFT learns from a mixture of two files with columns of different names, DPO from one of them."""
    folder = tmp_path_factory.mktemp("sources")
    for name, rows in (
        ("park", [{"ask": s, "good": " They were happy.", "bad": " It was dark."} for s in STORIES[:180]]),
        ("forest", [{"prompt": s, "chosen": " A dog came.", "rejected": " No."} for s in STORIES[160:]]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = folder / "config.py"
    config.write_text(
        "from mpo_jax import recipes\n"
        "def get_config():\n"
        "    config = recipes.config()\n"
        f"    config.model.path, folder = {str(stories)!r}, {str(folder)!r}\n"
        "    config.data.max_length, config.data.max_response, config.data.max_buckets = 64, 16, 2\n"
        "    columns = {'prompt': 'ask', 'chosen': 'good', 'rejected': 'bad'}\n"
        "    config.data.sources.park = recipes.source(path=folder + '/park.jsonl', columns=columns)\n"
        "    config.data.sources.forest = recipes.source(path=folder + '/forest.jsonl')\n"
        f"    every = dict(batch_size=8, steps={STEPS}, save_every=4, eval_every=8, eval_batches=2)\n"
        "    config.stages.sft = recipes.stage('sft', data={'park': 3.0, 'forest': 1.0}, **every)\n"
        "    config.stages.dpo = recipes.stage('dpo', pairs='data', data={'park': 1.0, 'forest': 1.0}, **every)\n"
        "    return config\n"
    )
    return [f"--config={config}"]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    processes.run(1, [*arguments, f"--workdir={workdir}"], workdir.parent / "log", SCRIPT)
    return workdir


def manifest(workdir, stage: str) -> dict:
    return artifacts.read_manifest(kills.folder(workdir, stage))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_every_source_of_a_mixture_has_its_account(whole, stage):
    accounts = manifest(whole, stage)["data"]
    share, halves = ("sft_reward", ["select"]) if stage == "sft" else ("policy", ["select", "report"])
    read = [share, *halves]
    assert [account["source"].rpartition("/")[2] for account in accounts] == ["forest.jsonl", "park.jsonl"] * len(read)
    assert [account["read"] for account in accounts] == [80, 180] * len(read)
    assert set(accounts[1]["columns"]) == {"ask (as prompt)", "good (as chosen)", "bad (as rejected)"}
    assert [account["share"] for account in accounts] == [name for name in read for _ in range(2)]
    output = (whole.parent / "log.0").read_text()
    assert all(f"{name}.jsonl [train] (pair): " in output for name in ("park", "forest"))


def test_no_program_is_compiled_late(whole):
    for stage in ("sft", "dpo"):
        assert manifest(whole, stage)["summary"]["compiles_after_warmup"] == 0


def test_labelled_rows_of_a_share_keep_their_labels_in_a_mixture(stories, tmp_path):
    """A file of labelled replies, mixed with one of pairs, whose replies are a good and a bad one."""
    single = [{"prompt": s, "completion": " Hi.", "label": n % 3 == 0} for n, s in enumerate(STORIES[:60])]
    pairs = [{"prompt": s, "chosen": " Yes.", "rejected": " No."} for s in STORIES[60:100]]
    config = recipes.config()
    config.model.path = str(stories)
    config.data.max_length, config.data.max_response = 64, 16
    config.data.shares = {"sft_reward": 1.0, "policy": 0.0, "eval": 0.0}
    for name, rows in (("single", single), ("pairs", pairs)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config.data.sources[name] = recipes.source(path=str(path))
    config.stages.sft = recipes.stage("sft", data={"single": 1.0, "pairs": 1.0})
    run = kinds.read(config.to_dict())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    workdir = epath.Path(tmp_path)
    job = Job("sft", run.stages["sft"], run, workdir / "sft", workdir, {}, mesh)
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    encoded = corpus.share_labelled(job, model, tokenizer, "sft_reward")
    assert encoded.label.tolist() == [1, 0] * 40 + [float(n % 3 == 0) for n in range(60)]
    assert np.bincount(encoded.mixture.source).tolist() == [80, 60]
    assert [account.notes for account in job.accounts] == [{}, {}]
    good = corpus.share_rows(job, model, tokenizer, "sft_reward", 1)
    assert np.bincount(good.mixture.source).tolist() == [40, 20], "fine-tuning takes the good ones"
    assert job.accounts[-1].dropped == {"labelled bad, and no good reply to pair it with": 40}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_killed_on_a_mixture_ends_with_the_same_weights(arguments, whole, tmp_path, stage):
    workdir = tmp_path / "run"
    flags = [*arguments, f"--stages={stage}"]
    found = kills.run_killed(flags, workdir, stage, STEPS, kills=2, seed=3, script=SCRIPT)
    assert any(0 < step < STEPS for step in found)
    one, two = (jax.tree.leaves(kills.weights(place, stage)) for place in (whole, workdir))
    for left, right in zip(one, two, strict=True):
        np.testing.assert_array_equal(left, right)
