"""What a dpo stage may be told beside its defaults, on a real tiny LLaMA: other objectives, weights and orders by the
gap, a reference that moves; and that each goes on after a kill with the same numbers."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from mpo_jax import artifacts, checkpoint, metrics
from mpo_jax.stages import buckets, curriculum, dpo
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Job
from tests.stages.ppo_job import beside, make_job, part, refused, replaced

SMALL = {"batch_size": 8, "steps": 4, "learning_rate": 1e-3, "eval_every": 4, "save_every": 2, "eval_batches": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory, stories) -> Job:
    """A dpo stage's job on all 36 pairs of a small split, whose gaps differ."""
    job = make_job(tmp_path_factory.mktemp("dpo"), stories)
    job = replaced(job, {"data.max_buckets": 1, "data.multiple": 16})
    inputs = dict.fromkeys(("init", "reference"), job.inputs["sft"]) | {"pairs": part(job.inputs["prompts"], "all")}
    folder = job.inputs["prompts"].folder
    table = artifacts.read_gaps(folder)
    gap = np.random.default_rng(0).normal(size=len(table.gap)).astype(np.float32)
    artifacts.write_gaps(folder, dataclasses.replace(table, gap=gap))
    return beside(job, "dpo", "dpo", "dpo_stage", inputs, **(SMALL | {"pairs": "split/all"}))


def with_settings(job: Job, folder: str, **settings) -> Job:
    """The same stage with other settings, and without a reference where they name none."""
    inputs = {role: each for role, each in job.inputs.items() if settings.get(role) != ""}
    return beside(job, "dpo", "dpo", folder, inputs, **(SMALL | {"pairs": "split/all"} | settings))


def run(job: Job, name: str, **settings) -> list[dict]:
    """What each step of the stage logged, in another folder and with other settings."""
    job = with_settings(job, name, **settings)
    job.folder.mkdir(exist_ok=True)
    with jax.set_mesh(job.mesh):
        dpo.STAGE.check(job)
        dpo.run(job)
    return steps(job, name)


def steps(job: Job, name: str) -> list[dict]:
    found: dict[int, dict] = {}
    for row in metrics.read(job.workdir / name):
        found.setdefault(row["step"], {}).update(row)
    return list(found.values())


def weights(job: Job, name: str):
    like = jobs.abstract_weights(jobs.model(job), job.mesh)
    return checkpoint.restore_weights(job.workdir / name / artifacts.WEIGHTS, like)


def interrupted(job: Job, name: str, half: str) -> None:
    """A copy of a finished stage as a kill after its second step left it."""
    shutil.copytree(job.workdir / name, job.workdir / half)
    for late in (job.workdir / half / "checkpoints" / "last" / "4", job.workdir / half / artifacts.WEIGHTS):
        late.rmtree()


def equal(one, two) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True))


@pytest.fixture(scope="module")
def plain(made) -> list[dict]:
    return run(made, "plain")


@pytest.mark.parametrize(
    ("objective", "settings", "first"),
    [
        ("hinge", {}, 1.0),  # max(0, 1 - 0)
        ("robust", {"label_smoothing": 0.2}, np.log(2)),  # (0.8 - 0.2) / 0.6 of log 2
        ("dpo_norm", {"beta": 5.0}, np.log(2)),
        ("dpop", {"chosen_penalty": 5.0}, np.log(2)),
    ],
)
def test_an_objective_begins_where_its_formula_says_and_learns(made, objective, settings, first):
    rows = run(made, objective, objective=objective, **settings)
    assert rows[0]["loss"] == pytest.approx(first, abs=1e-4)
    assert rows[-1]["eval/accuracy"] > 0.5 and rows[-1]["eval/loss"] < first


@pytest.mark.parametrize(("objective", "settings"), [("simpo", {"beta": 2.0, "gamma": 1.0}), ("orpo", {})])
def test_an_objective_without_a_reference_neither_loads_nor_reads_one(made, monkeypatch, objective, settings):
    monkeypatch.setattr(dpo.reference, "logps", None)
    job = with_settings(made, objective, objective=objective, reference="", **settings)
    with jax.set_mesh(made.mesh):
        assert set(dpo.programs(job)) == {"train", "evaluate"}
    rows = run(made, objective, objective=objective, reference="", **settings)
    assert "kl_chosen" not in rows[0] and rows[-1]["eval/accuracy"] > 0.5 and rows[-1]["eval/loss"] < rows[0]["loss"]
    summary = {"judged": {"accuracy": 0.5, "reward_margin": 0.0}, "heldout_pairs": 12, "pairs": 36}
    head, _, line = dpo.table({"dpo": summary}, job).splitlines()
    assert head == "on held-out pairs" and line.endswith("–, –")


def test_gaps_weigh_pairs(made, plain):
    gap = buckets.gaps(made.inputs["pairs"])
    np.testing.assert_allclose(curriculum.by_size(np.asarray([2.0, -1.0], np.float32)), [2, 0])
    np.testing.assert_allclose(curriculum.by_chance(np.asarray([0.0, np.log(3)], np.float32)), [0.5, 0.75], rtol=1e-6)
    for name, function in (("gap", curriculum.by_size), ("sigmoid", curriculum.by_chance)):
        job = replaced(made, {"weight": name})
        told = dpo.by_gap(job)
        np.testing.assert_array_equal(told["weight"], function(gap))
        loader = jobs.loader(job, buckets.pairs(job.inputs["pairs"]), 8, max_length=None, **told)
        _, rows = loader.rows(3)
        np.testing.assert_array_equal(np.asarray(loader.batch(3).weight), function(gap)[rows])
        found = run(made, f"weight_{name}", weight=name)
        assert found[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)  # a mean by weights: at the reference the same
        assert found[-1]["loss"] != plain[-1]["loss"]
        # Of held-out pairs all count alike.
        assert found[-1]["eval/kl_chosen"] != plain[-1]["eval/kl_chosen"]


def test_easy_pairs_come_first_or_last_and_go_on_after_a_kill(made, plain):
    gap = buckets.gaps(made.inputs["pairs"])
    encoded = buckets.pairs(made.inputs["pairs"])
    for order, sign in (("easy_first", -1), ("hard_first", 1)):
        loader = jobs.loader(made, encoded, 8, max_length=None, **dpo.by_gap(replaced(made, {"order": order})))
        met = np.concatenate([loader.rows(step)[1] for step in range(4)])
        np.testing.assert_array_equal(met, np.argsort(sign * gap, kind="stable")[:32])
        assert loader.steps_per_epoch == 5
    rows = run(made, "easy_first", order="easy_first")
    assert rows[-1]["loss"] != plain[-1]["loss"]
    interrupted(made, "easy_first", "easy_first_half")
    assert [row["loss"] for row in run(made, "easy_first_half", order="easy_first")] == [row["loss"] for row in rows]
    assert equal(weights(made, "easy_first"), weights(made, "easy_first_half"))


def test_a_reference_that_moves_is_the_policy_of_some_steps_before(made, plain):
    """Replaced after the second step, so that the third is at its reference again."""
    rows = run(made, "moving", reference_every=2)
    for name in ("loss", "grad_norm"):  # up to its first move nothing differs from a reference that stays
        assert [row[name] for row in rows[:2]] == pytest.approx([row[name] for row in plain[:2]], rel=1e-5)
    assert rows[1]["loss"] < np.log(2) and rows[2]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert rows[2]["kl_chosen"] == pytest.approx(0, abs=1e-4)
    # Judged by the reference that stays, where the policy is far from it by now.
    assert rows[-1]["eval/reward_margin"] > 3 * abs(rows[3]["reward_margin"])
    interrupted(made, "moving", "moving_half")
    assert [row["loss"] for row in run(made, "moving_half", reference_every=2)] == [row["loss"] for row in rows]
    assert equal(weights(made, "moving"), weights(made, "moving_half"))


def test_a_reference_may_follow_by_a_moving_average(made):
    settings = replaced(made, {"reference_every": 1, "reference_mix": 0.25}).settings
    old, new = {"w": np.float32([0.0, 4.0])}, {"w": np.float32([8.0, 4.0])}
    found = dpo.moved(settings, {"reference": old}, new, np.int32(1))["reference"]["w"]
    np.testing.assert_array_equal(found, [2.0, 4.0])
    every = settings.model_copy(update={"reference_every": 3})
    np.testing.assert_array_equal(dpo.moved(every, {"reference": old}, new, np.int32(4))["reference"]["w"], old["w"])
    rows = run(made, "average", reference_every=1, reference_mix=0.25)
    hard = steps(made, "moving")
    assert rows[2]["loss"] < np.log(2) - 1e-4 and rows[2]["loss"] != hard[2]["loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "simpo"}, r"stages\.dpo\.reference: 'sft'; simpo has no reference, expected an empty text"),
        ({"reference": ""}, r"stages\.dpo\.reference: empty; expected the frozen policy that dpo compares with"),
        ({"gamma": 1.0}, r"stages\.dpo\.gamma: dpo does not read it; expected 0\.5"),
        (
            {"chosen_penalty": 5.0, "objective": "ipo"},
            r"stages\.dpo\.chosen_penalty: ipo does not read it; expected 50",
        ),
        ({"weight": "margin"}, r"stages\.dpo\.weight: 'margin'; expected one of none, gap, sigmoid"),
        ({"order": "easy"}, r"stages\.dpo\.order: 'easy'; expected one of random, easy_first, hard_first"),
        (
            {"reference_mix": 0.5},
            r"stages\.dpo\.reference_mix: 0\.5, but the reference never moves \(reference_every is 0\); expected 1",
        ),
        (
            {"objective": "orpo", "reference": "", "reference_every": 2},
            r"stages\.dpo\.reference_every: 2; orpo has no reference",
        ),
    ],
)
def test_settings_that_cannot_be_meant(made, settings, message):
    refused(made, settings, message)
