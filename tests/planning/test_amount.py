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
    made.stages.evaluate = recipes.stage(
        "evaluate", policies=("sft",), baseline="sft", prompts="data", count=64, max_new_tokens=8
    )
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
                * work.flops(each.function.trace(*each.arguments).jaxpr, each.extent.loops)
                for each in programs
            )
        found = amount.of_stage(job, 1000)
        assert found is not None
        ratios[name] = 2 * found / traced
    print(ratios)
    assert all(0.6 < ratio < 1.5 for ratio in ratios.values())


def test_it_grows_by_the_same_for_each_row_and_each_step(config):
    reward = planned(config)["reward"]
    by_rows = [amount.of_stage(reward, pairs) for pairs in (1000, 2000, 3000)]
    by_steps = []
    for steps in (4, 8, 12):
        config.stages.sft.update({"steps": steps, "eval_every": steps, "eval_batches": 1})
        by_steps.append(amount.of_stage(planned(config)["sft"], 1))
    for one, two, three in (by_rows, by_steps):
        assert three - two == pytest.approx(two - one) and two - one > 0.2 * one


def test_a_stage_that_computes_nothing_on_the_devices_says_so(config):
    config.stages.judge = recipes.stage("judge", judge="reward")
    assert amount.of_stage(planned(config)["judge"], 1000) is None
