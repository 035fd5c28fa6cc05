"""Stages enter; how much they compute is held against the products that their traced programs contain."""

import jax
import pytest
from etils import epath

from mpo_jax import graph, pipeline, recipes, sharding
from mpo_jax.planning import amount, estimate, work
from mpo_jax.planning.estimate import Assumptions
from mpo_jax.stages import kinds


@pytest.fixture
def config(stories):
    made = recipes.config()
    made.model.path, made.data.path = str(stories), "unread"
    made.data.max_length, made.data.max_response = 64, 16
    made.stages.sft = recipes.stage("sft", batch_size=8, steps=4)
    made.stages.reward = recipes.stage("reward", batch_size=8)
    made.stages.evaluate = recipes.stage("evaluate", policies=("sft",), baseline="sft", count=64, max_new_tokens=8)
    return made


def planned(config):
    run = kinds.read(config.to_dict())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return {job.name: job for job in pipeline.plan_jobs(run, epath.Path("unread"), mesh, graph.connections(run))}


def test_stages_compare_as_their_traced_products_do(config):
    """Within a third: the arithmetic leaves out attention's own products and takes the head for every token."""
    ratios = {}
    for name, job in planned(config).items():
        with jax.set_mesh(job.mesh):
            programs = kinds.of(job.settings).programs(job).values()
            traced = sum(
                estimate.calls(job, each, Assumptions(pairs=1000))
                * work.flops(each.function.trace(*each.arguments).jaxpr, each.loop)
                for each in programs
            )
        found = amount.of_stage(job, 1000)
        assert found is not None
        ratios[name] = 2 * found / traced
    print(ratios)
    assert all(0.6 < ratio < 1.5 for ratio in ratios.values())


def test_twice_the_rows_or_steps_are_twice_the_work(config):
    before = planned(config)
    config.stages.sft.update({"steps": 8, "eval_every": 2})
    config.stages.sft.eval_batches = 64
    after = planned(config)
    assert amount.of_stage(after["reward"], 2000) == pytest.approx(2 * amount.of_stage(before["reward"], 1000), rel=0.3)
    assert amount.of_stage(after["sft"], 1) > 1.5 * amount.of_stage(before["sft"], 1)


def test_a_stage_that_computes_nothing_on_the_devices_says_so(config):
    config.stages.judge = recipes.stage("judge", evaluate="evaluate", left="sft", right="sft")
    assert amount.of_stage(planned(config)["judge"], 1000) is None
