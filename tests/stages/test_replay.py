"""Pairs replayed while PPO learns: what the second loss adds to an update, and that a kill changes nothing."""

import functools

import jax
import numpy as np
import pytest

from mpo_jax.stages import buckets
from mpo_jax.stages.ppo import replay
from mpo_jax.stages.ppo import stage as ppo
from tests.stages import ppo_job
from tests.stages.ppo_job import part, refused
from tests.stages.test_ppo import copied, equal, run, state_of, steps_of

SMALL = {"steps": 3, "inner_epochs": 1, "minibatches": 2, "eval_batches": 1, "eval_every": 3}


def make_job(folder, stories, **settings):
    """A ppo stage that replays the easy pairs, whose rows are of one length."""
    job = ppo_job.make_job(folder, stories, **(SMALL | {"replay": "split/easy"} | settings))
    job = ppo_job.replaced(job, {"data.max_buckets": 1, "data.multiple": 16})
    return ppo_job.replaced(job, inputs=dict(job.inputs) | {"replay": part(job.inputs["prompts"], "easy")})


@pytest.fixture(scope="module")
def ran(tmp_path_factory, stories):
    job = make_job(tmp_path_factory.mktemp("replay"), stories, replay_loss="dpo", minibatches=1)
    run(job)
    return job


def test_dpo_on_easy_pairs_begins_at_the_reference(ran):
    first, *_, last = steps_of(ran)
    assert first["replay_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert last["replay_loss"] < first["replay_loss"]
    assert first["kl"] == pytest.approx(0, abs=1e-4) and first["ratio_deviation_first"] < 1e-3


def test_each_step_takes_its_own_pairs_and_goes_on_after_a_kill(ran, tmp_path):
    with jax.set_mesh(ran.mesh):
        loader = replay.loader(ran, functools.partial(replay.reference_logps, ran, ppo.programs(ran), {}))
    met = [loader.rows(step)[1].tolist() for step in range(3)]
    assert met[0] != met[1] and len(loader.buckets) == 1
    assert len(loader.encoded) == len(buckets.pairs(ran.inputs["replay"])) == 12
    resumed = copied(ran, tmp_path / "mpo", last_step=1)
    run(resumed)
    assert equal(state_of(resumed), state_of(ran))
    assert [line["replay_loss"] for line in steps_of(resumed)] == [line["replay_loss"] for line in steps_of(ran)]


def test_an_sft_term_on_chosen_replies_raises_their_log_probs(tmp_path, stories):
    settings = {"learning_rate": 1e-2, "value_learning_rate": 1e-3}
    losses = {}
    for coefficient in (0.0, 5.0):
        job = make_job(tmp_path / str(coefficient), stories, replay_coefficient=coefficient, **settings)
        run(job)
        losses[coefficient] = [line["replay_loss"] for line in steps_of(job)]
    assert losses[5.0][0] == pytest.approx(losses[0.0][0], rel=0.2)
    assert losses[5.0][-1] < losses[0.0][-1] - 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replay": "", "replay_loss": "dpo"}, r"stages\.mpo\.replay: empty, but replay_loss is dpo; name pairs"),
        (
            {"replay_loss": "sft", "replay_beta": 0.5},
            r"stages\.mpo\.replay_beta: 0\.5, but replay_loss=sft does not read it",
        ),
    ],
)
def test_settings_that_cannot_be_meant(ran, settings, message):
    refused(ran, {"replay_loss": "sft"} | settings, message)
