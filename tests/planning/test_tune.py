"""What `mpo plan --tune` finds: by arithmetic, on a card with room and on one without."""

import dataclasses

import pytest

from mpo_jax import settings
from mpo_jax.models import presets
from mpo_jax.planning import report, stages, tune
from mpo_jax.planning.chips import Topology
from mpo_jax.planning.estimate import Assumptions
from tests.planning import case
from tests.planning.test_plan import gpu


@pytest.fixture
def small(monkeypatch):
    """The base model of `case.config`, small."""
    monkeypatch.setattr(presets, "find", lambda path: case.model())


def planned(config, place: Topology) -> stages.StagePlan:
    return stages.plan(stages.jobs(config, place, ["sft"])["sft"], place, Assumptions())


def test_weights_are_read_once_for_all_rows_where_memory_is_what_takes_time(small):
    config, place = case.config(microbatch=2), gpu(1 << 40)
    before = planned(config, place)
    found = tune.tune(config, "sft", before, place, Assumptions(), {})
    assert found.flags == ("--config.stages.sft.microbatch=0",)
    assert found.plan.seconds < before.seconds and found.tried == 5
    assert found.plan == planned(settings.replaced(config, {"stages.sft.microbatch": 0}), place)
    line = report.tuned_line("sft", before, found)
    assert "5 tried" in line and line.endswith("--config.stages.sft.microbatch=0")
    assert tune.tune(config, "sft", before, gpu(before.peak), Assumptions(), {}).flags == (), "faster does not fit"


@pytest.mark.slow
def test_nothing_is_computed_twice_where_work_is_what_takes_time(small):
    """Microbatches cost no work, so the smallest is taken for its memory."""
    config, place = case.config(microbatch=2), gpu(1 << 40)
    place = dataclasses.replace(place, chip=dataclasses.replace(place.chip, flops=1e9))
    found = tune.tune(config, "sft", planned(config, place), place, Assumptions(), {})
    assert found.flags == ("--config.stages.sft.microbatch=1", "--config.stages.sft.remat=none")


def test_only_what_leaves_results_and_keys_alone_is_tried(small):
    config = case.config(rows=8)
    place = gpu(1 << 40)
    for name, job in stages.jobs(config, place).items():
        fields = type(job.settings).model_fields
        tried = dict(tune.choices(config, name, job))
        assert all(fields[key].json_schema_extra["operational"] for key in tried)
        if name == "split":
            assert tried == {"score_batch": [16, 32, 64]}
        if name == "dpo":
            assert tried == {"microbatch": [4, 2, 1], "remat": ["none", "dots"]}
