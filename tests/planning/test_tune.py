"""What `mpo plan --tune` finds: by arithmetic, on cards with room and without, and by the compiler of this machine."""

import dataclasses

import jax
import pytest

from mpo_jax import settings
from mpo_jax.models import presets
from mpo_jax.planning import chips, estimate, reckon, report, stages, tune
from mpo_jax.planning.chips import Topology
from mpo_jax.planning.estimate import Assumptions
from mpo_jax.planning.known import Known
from mpo_jax.planning.reckon import Place, Reckoned
from mpo_jax.run import Run
from mpo_jax.stages import kinds
from tests.planning import case
from tests.planning.test_plan import gpu


@pytest.fixture
def small(monkeypatch):
    """The base model of `case.config`, small."""
    monkeypatch.setattr(presets, "find", lambda path: case.model())


def several(memory: int = 1 << 40, **speeds) -> Topology:
    """Four cards, reckoned by arithmetic."""
    chip = dataclasses.replace(chips.GPUS[80], memory=memory, **speeds)
    return Topology("gpu:4x80GB", chip, tuple(jax.devices("cpu")[:4]), compiled=False)


def planned(config: Run, place: Topology, *names: str) -> dict[str, stages.StagePlan]:
    return {name: stages.plan(job, place, Assumptions()) for name, job in stages.jobs(config, place, names).items()}


def tuned(config: Run, place: Topology, *names: str, **options) -> tune.Tuned:
    return tune.tune(config, planned(config, place, *names), place, Assumptions(), Known(), **options)


def test_weights_are_read_once_for_all_rows_where_memory_is_what_takes_time(small):
    config, place = case.config(microbatch=2), gpu(1 << 40)
    found = tuned(config, place, "sft")
    flags = found.flags("sft", found.mesh)
    assert "--config.stages.sft.microbatch=0" in flags and found.mesh == found.now == (1, 1, 1)
    best, before = found.stages["sft"][found.mesh], found.before["sft"]
    assert best.plan.seconds < before.seconds
    assert best.plan == planned(settings.replaced(config, given(flags)), place, "sft")["sft"]
    lines = report.tuned_lines(found)
    assert " ".join(flags) in lines and f"{found.reckoned} settings reckoned, 0 programs compiled" in lines
    assert not tuned(config, gpu(before.peak), "sft").stages["sft"][found.mesh].changes, "faster does not fit"


def given(flags: tuple[str, ...]) -> dict[str, object]:
    """Settings by name, as the flags say them."""
    pairs = (flag.removeprefix("--config.").split("=") for flag in flags)
    return {name: int(value) if value.isdigit() else value for name, value in pairs}


def test_what_is_reckoned_is_what_the_arithmetic_of_those_settings_says(small):
    """Where work takes no time: that is counted on a trace, and reckoned by passes."""
    config, place = case.config(microbatch=4), several(flops=1e30)
    before = stages.plan(stages.jobs(config, place, ["sft"])["sft"], place, Assumptions(), ["train"])
    present = Place.of(stages.jobs(config, place, ["sft"])["sft"])
    for fsdp, changes in ((4, {"microbatch": 0}), (2, {"remat": "none"}), (2, {"microbatch": 2, "remat": "dots"})):
        there = settings.replaced(config, {"mesh.fsdp": fsdp, "mesh.tensor": 4 // fsdp})
        spot = Place.of(stages.jobs(there, place, ["sft"])["sft"])
        found = reckon.reckon(before, present, spot, changes, place, Assumptions())
        changed = settings.replaced(there, {f"stages.sft.{key}": value for key, value in changes.items()})
        exact = stages.plan(stages.jobs(changed, place, ["sft"])["sft"], place, Assumptions(), ["train"])
        assert found.seconds == pytest.approx(exact.seconds, rel=1e-6)
        assert found.peak == pytest.approx(exact.peak, rel=1e-3)


def test_work_is_reckoned_as_a_trace_counts_it(small):
    config, place = case.config(microbatch=4), gpu(1 << 40)
    place = dataclasses.replace(place, chip=dataclasses.replace(place.chip, flops=1.0))
    job = stages.jobs(config, place, ["sft"])["sft"]
    before = stages.plan(job, place, Assumptions(), ["train"])
    found = reckon.reckon(before, *[Place.of(job)] * 2, {"remat": "none", "microbatch": 0}, place, Assumptions())
    changed = settings.replaced(config, {"stages.sft.remat": "none", "stages.sft.microbatch": 0})
    exact = stages.plan(stages.jobs(changed, place, ["sft"])["sft"], place, Assumptions(), ["train"])
    assert found.seconds == pytest.approx(exact.seconds, rel=0.1)
    assert found.seconds < 0.9 * before.seconds


def test_what_did_not_fit_leaves_nothing_behind_in_what_is_tried_next(small):
    config, said = case.config(microbatch=2), []
    before = planned(config, gpu(1 << 40), "sft")["sft"]
    group = [Reckoned(changes, 0.0, 0, 0) for changes in ({"microbatch": 0, "remat": "none"}, {"remat": "dots"})]
    search = tune._Search("sft", (1, 1, 1), config, [group], 2)
    tune._try(search, None, gpu(before.peak), Assumptions(), tune._Budget(Known(), 0), said.append)
    assert "with microbatch=0 remat=none: does not fit" in said[0] and "with remat=dots: " in said[1]


@pytest.mark.slow
def test_the_mesh_for_all_stages_is_proposed_and_the_best_for_each_alone_told(monkeypatch):
    """Where links are slow and weights many, gathering those over fsdp costs more than summing activations."""
    monkeypatch.setattr(presets, "find", lambda path: case.model(vocabulary=32_768))
    config, place = case.config(rows=4, fsdp=4), several(links=1e6)
    found = tuned(config, place, "sft", "split")
    assert found.now == (1, 4, 1) and found.mesh != found.now
    assert found.mesh_flags and found.seconds(found.mesh) < found.seconds(found.now)
    flags = (*found.mesh_flags, *(flag for name in found.stages for flag in found.flags(name, found.mesh)))
    exact = planned(settings.replaced(config, given(flags)), place, "sft", "split")
    assert sum(plan.seconds for plan in exact.values()) == pytest.approx(found.seconds(found.mesh))
    for name in found.stages:
        alone = found.best_mesh(name)
        assert found.stages[name][alone].plan.seconds <= found.stages[name][found.mesh].plan.seconds
    assert " ".join(found.mesh_flags) in report.tuned_lines(found)


def test_no_more_programs_are_compiled_than_may_be_and_how_many_is_said_before(small):
    config, place = case.config(microbatch=4), case.one_cpu()
    known, said = Known(), []
    before = {"sft": stages.plan(stages.jobs(config, place, ["sft"])["sft"], place, Assumptions(), known=known)}
    compiles = known.compiles
    nothing = tune.tune(config, before, place, Assumptions(), known, 0, said.append)
    assert known.compiles == compiles and len(said) == 1 and "at most 0 programs are to be compiled" in said[0]
    assert not nothing.complete and "--compiles allows no more" in report.tuned_lines(nothing)
    found = tune.tune(config, before, place, Assumptions(), known, 1, said.append)
    assert known.compiles - compiles == found.compiled == 1
    assert "at most 1 programs are to be compiled" in said[1] and len(said) == 3


def test_only_what_leaves_results_alone_is_tried(small):
    """A stage's key changes with nothing but the batch of one that only samples, whose replies no batch changes."""
    config = case.config(rows=8)
    for name, job in stages.jobs(config, gpu(1 << 40)).items():
        fields = type(job.settings).model_fields
        groups = tune.choices(job, Assumptions())
        tried = {key for group in groups for changes in group for key in changes}
        keyed = {key for key in tried if not fields[key].json_schema_extra["operational"]}
        assert keyed == ({"batch_size"} if name in ("split", "evaluate") else set())
        if name == "split":
            assert groups == [
                [{"batch_size": rows} for rows in (16, 32, 64)],
                [{"score_batch": r} for r in (16, 32, 64)],
            ]
        if name == "dpo":
            assert {"microbatch": 4, "remat": "none"} in groups[0] and len(groups[0]) == 4 * 3 - 1


def test_rows_scored_at_a_time_are_scored_in_as_many_calls_as_they_need(small):
    def calls(score_batch: int) -> float:
        job = stages.jobs(settings.replaced(case.config(rows=8), {"stages.split.score_batch": score_batch}),
                          case.one_cpu(), ["split"])["split"]  # fmt: skip
        with jax.set_mesh(job.mesh):
            program = kinds.of(job.settings).programs(job)["score_samples"]
        return estimate.calls(job, program, Assumptions(pairs=8000))

    assert calls(0) == 4 * calls(32) == 450
