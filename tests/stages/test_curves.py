"""Snapshots of policies in an evaluation: what it says of them is what it would say of policies with their weights."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, checkpoint
from mpo_jax.artifacts import POLICY
from mpo_jax.errors import InputError
from mpo_jax.evaluation import statistics
from mpo_jax.stages import curves, evaluate, kinds
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Artifact, Job
from tests.stages.ppo_job import beside, replaced
from tests.stages.test_evaluate import evaluation

STEPS = {3: 0.3, 6: 0.6}
"""Step of a snapshot -> how far it is on the way from sft to dpo."""


def between(job: Job, share: float):
    """Weights on the straight line from sft's to dpo's."""
    model = jobs.model(job)
    ends = [jobs.load_weights(job, artifact, model) for artifact in reversed(job.inputs["policies"])]
    return jax.tree.map(lambda left, right: left + share * (right - left), *ends)


def with_snapshots(folder, stories, **settings) -> Job:
    """An evaluation of dpo, whose stage has kept two snapshots, and of sft, which it began with."""
    job = evaluation(folder, stories, bootstrap=200, **settings)
    job = replaced(job, {"stages.dpo.snapshots": 2})
    place = job.workdir / "dpo"
    if not (place / artifacts.MANIFEST).exists():
        for step, share in STEPS.items():
            checkpoint.save_weights(place / artifacts.SNAPSHOTS / str(step), between(job, share))
        artifacts.write_manifest(place, {"name": "dpo", "summary": {"steps": 10, "snapshots": list(STEPS)}})
    return job


@pytest.fixture(scope="module")
def ran(tmp_path_factory, stories):
    job = with_snapshots(tmp_path_factory.mktemp("curves"), stories)
    with jax.set_mesh(job.mesh):
        evaluate.run(job)
    return job, json.loads((job.folder / artifacts.REPORT).read_text())


def test_a_curve_goes_from_where_training_began_to_the_table_s_policy(ran):
    _, report = ran
    made = report["curves"]
    assert made["by"] == "the gold labeller" and made["prompts"] == report["prompts"]
    points = made["points"]["dpo"]
    assert [(point["step"], point["final"]) for point in points] == [(0, False), (3, False), (6, False), (10, True)]
    assert [point["kl"] for point in points] == sorted(point["kl"] for point in points)
    for place, name in ((0, "sft"), (3, "dpo")):
        means, errors = report["policies"][name], report["errors"][name]
        assert points[place]["kl"] == pytest.approx(means["kl"]) and points[place]["score"] == pytest.approx(
            means["gold"]
        )
        assert points[place]["score_error"] == pytest.approx(errors["gold"])
    assert len(made["points"]["sft"]) == 1 and list(made["scores"]) == ["dpo"]
    (row,) = made["against"]
    assert row["name"] == "sft" and row["begins"] and row["difference"] is None
    assert list(report["policies"]) == ["dpo", "sft"], "snapshots have no row"


def test_a_snapshot_is_told_as_a_policy_with_its_weights_would_be(ran):
    job, report = ran
    middle = job.workdir / "middle"
    with jax.set_mesh(job.mesh):
        checkpoint.save_weights(middle / artifacts.WEIGHTS, between(job, STEPS[3]))
        named = {key: value for key, value in job.settings if key != "kind"} | {"policies": ("middle", "sft")}
        inputs = job.inputs | {"policies": [Artifact("middle", POLICY, middle), job.inputs["policies"][1]]}
        other = beside(beside(job, "middle", "dpo"), "evaluate", "evaluate", "again", inputs, **named)
        evaluate.run(other)
    found = json.loads((other.folder / artifacts.REPORT).read_text())
    means, point = found["policies"]["middle"], report["curves"]["points"]["dpo"][1]
    assert (point["kl"], point["score"]) == (pytest.approx(means["kl"], abs=1e-6), pytest.approx(means["gold"]))
    assert "curves" not in found, "no policy of it has a snapshot"


def test_a_part_of_the_prompts(ran, stories, tmp_path):
    whole, _ = ran
    job = replaced(whole, {"curve_prompts": 5}, folder=epath.Path(tmp_path))
    with jax.set_mesh(job.mesh):
        evaluate.run(job)
    report = json.loads((job.folder / artifacts.REPORT).read_text())
    lines = [json.loads(line) for line in (job.folder / artifacts.REPLIES_FILE).read_text().splitlines()]
    assert report["prompts"] == len(lines) == 12 and report["curves"]["prompts"] == 5
    gold = np.array([line["replies"]["dpo"]["gold"] for line in lines])[curves.prompts(job, 12)]
    last = report["curves"]["points"]["dpo"][-1]
    assert (last["score"], last["score_error"]) == (
        pytest.approx(gold.mean()),
        pytest.approx(statistics.standard_error(gold)),
    )


def test_killed_before_its_end_it_loads_no_snapshot_again(ran, monkeypatch):
    """As after kill -9: all shards are there, the report is not."""
    job, report = ran
    (job.folder / artifacts.REPORT).unlink()
    loaded = []
    monkeypatch.setattr(jobs, "load_weights", lambda *arguments: loaded.append(arguments))
    with jax.set_mesh(job.mesh):
        evaluate.run(job)
    assert loaded == [] and json.loads((job.folder / artifacts.REPORT).read_text()) == report


def test_what_the_plan_counts_and_what_is_refused(ran):
    job, _ = ran
    assert curves.planned(job) == 2
    rows = kinds.KINDS["evaluate"].rows
    assert rows(job, 0, 0) == 12 * (2 + 2)
    assert rows(replaced(job, {"curve_prompts": 5}), 0, 0) == 12 * 2 + 5 * 2
    none = [{"stages.dpo.snapshots": 0}, {"baseline": ""}, {"top_p": 0.9}, {"reward": "", "labeller": ""}]
    for settings in none:
        other = replaced(job, settings)
        assert curves.planned(other) == 0 and rows(other, 0, 0) == 24
        curves.check(other)
        with pytest.raises(InputError, match=r"^stages\.evaluate\.curve_prompts: 5, but there are no curves"):
            curves.check(replaced(other, {"curve_prompts": 5}))
    assert curves.snapshots(replaced(job, {"top_p": 0.9})) == {}


def test_best_checkpoints_stand_where_they_were_taken(ran):
    job, _ = ran
    place = job.workdir / "dpo" / artifacts.MANIFEST
    before = place.read_text()
    manifest = artifacts.read_manifest(job.workdir / "dpo")
    artifacts.write_manifest(job.workdir / "dpo", {"summary": manifest["summary"] | {"best_step": 4}})
    best = replaced(job, {"stages.dpo.select": "best"})
    columns = {name: {"kl": np.full(3, kl), "reward": np.full(3, kl)} for name, kl in
               {"sft": 0.0, "dpo": 0.4, "dpo after step 3": 0.3, "dpo after step 6": 0.6}.items()}  # fmt: skip
    made = curves.section(best, columns, curves.snapshots(best), np.arange(3), "dpo")
    points = made["points"]["dpo"]
    assert [(point["step"], point["final"]) for point in points] == [(0, False), (3, False), (4, True), (6, False)]
    assert [point["kl"] for point in points] == pytest.approx([0.0, 0.3, 0.4, 0.6]) and made["by"] == "the reward model"
    place.write_text(before)
