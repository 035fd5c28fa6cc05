"""Traced programs and chips enter; model FLOPs, and their share of the peak at most, are counted by hand."""

import dataclasses

import jax
import pytest

from mpo_jax.models import presets
from mpo_jax.planning import chips, estimate, report, stages, work
from mpo_jax.planning.compile import Report
from mpo_jax.planning.estimate import Assumptions
from tests.planning import case

ROWS, PROMPT, RESPONSE, LAYERS, WIDTH, HEADS, MLP, VOCABULARY = 8, 64, 32, 2, 64, 4, 192, 512
TOKENS = ROWS * (PROMPT + 2 * RESPONSE)
TRUNK = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * MLP)
"""Weights that every token meets: queries, keys, values and outputs, and three products of the feed-forward."""
LOGITS = ROWS * 2 * RESPONSE * WIDTH * VOCABULARY
"""Of a pass: of the replies' tokens alone."""
SEEN = 64 * (64 + 128)
"""Queries times keys of a row of 128: each block of 64 queries meets the keys up to its end."""
ATTENTION = 2 * LAYERS * ROWS * WIDTH * SEEN
"""Of a pass: queries with keys, weights with values."""


def traced(stage: str, name: str, **options):
    program, job = case.program(stage, name, case.model(LAYERS, WIDTH, HEADS, MLP, VOCABULARY), **options)
    with jax.set_mesh(job.mesh):
        return program.function.trace(*program.arguments).jaxpr


def chip(flops: float = 1e12, bandwidth: float = 1e12, links: float = 1e12) -> chips.Chip:
    return chips.Chip("made up", 1 << 40, flops, bandwidth, links)


def needs(work: float, needed: float, moved: float = 0.0, sent: float = 0.0) -> Report:
    return Report(0, 0, 0, 0, True, work, needed, moved, {"all-gather": int(sent)}, "", "compiler")


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_dpo_step_needs_six_times_tokens_times_weights_under_any_remat(remat):
    jaxpr = traced("dpo", "train", remat=remat)
    needed = 6 * (TOKENS * TRUNK + LOGITS + ATTENTION)
    assert work.needed(jaxpr) == needed
    again = 2 * (ATTENTION // 2)  # of attention's own backward pass: queries with keys; of the loss's, no logits
    # Under full all of a layer but its last product, whose result the backward pass does not read.
    again += {
        "none": 0,
        "dots": 2 * ATTENTION,  # its products have batch dimensions, and are not kept
        "full": 2 * (TOKENS * (TRUNK - LAYERS * WIDTH * MLP) + ATTENTION),
    }[remat]
    assert work.flops(jaxpr) == needed + again


@pytest.mark.parametrize(
    ("stage", "name", "options"),
    [
        ("sft", "train", {"microbatch": 4}),
        ("reward", "train", {}),
        ("dpo", "train", {"lora": 4}),
        ("mpo", "update", {}),
    ],
)
def test_what_a_step_needs_does_not_depend_on_remat(stage, name, options):
    none, full = (traced(stage, name, remat=remat, **options) for remat in ("none", "full"))
    assert work.needed(none) == work.needed(full) > 0
    assert work.flops(full) > work.flops(none) >= work.needed(none)


def test_frozen_weights_under_adapters_need_no_gradient():
    """Forward, and backward to activations: 4 where what is trained takes 6, as adapters of rank 1 on queries, keys,
    values and outputs do."""
    adapters = TOKENS * LAYERS * 4 * 2 * WIDTH
    needed = work.needed(traced("dpo", "train", lora=1))
    assert needed == 4 * (TOKENS * TRUNK + LOGITS) + 6 * (ATTENTION + adapters)


def test_a_forward_pass_needs_all_that_it_computes():
    jaxpr = traced("dpo", "reference")
    assert work.needed(jaxpr) == work.flops(jaxpr) == 2 * (TOKENS * TRUNK + LOGITS + ATTENTION)


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (needs(work=4e12, needed=3e12), 0.75),  # a forward pass more beside three
        (needs(work=3e12, needed=3e12), 1.0),
        (needs(work=4e12, needed=3e12, moved=12e12), 0.25),  # twelve seconds of memory
        (needs(work=4e12, needed=3e12, moved=2e12, sent=6e12), 0.5),
        (needs(work=0.0, needed=0.0, moved=1e12), 0.0),
        (needs(work=0.0, needed=0.0), 0.0),
    ],
    ids=["remat", "no remat", "memory", "links", "no products", "nothing"],
)
@pytest.mark.parametrize("utilisation", [0.4, 1.0])
def test_the_slowest_part_at_its_full_rate_bounds_the_share(report, expected, utilisation):
    assert estimate.mfu(report, chip(), Assumptions(utilisation=utilisation)) == pytest.approx(expected)


@pytest.fixture
def plan(monkeypatch):
    """stage, chip, chips -> the plan of a stage by arithmetic."""
    monkeypatch.setattr(presets, "find", lambda path: case.model(LAYERS, WIDTH, HEADS, MLP, VOCABULARY))

    def planned(stage: str, made: chips.Chip, count: int = 1, **options) -> stages.StagePlan:
        place = chips.Topology(f"gpu:{count}x80GB", made, tuple(jax.devices("cpu")[:count]), compiled=False)
        return stages.plan(stages.jobs(case.config(**options), place, [stage])[stage], place, Assumptions())

    return planned


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_that_waits_for_its_work_is_bounded_by_what_it_computes_again(plan, count):
    slow = chip(flops=1e6)
    none, full = (plan("sft", slow, count, remat=remat).programs["train"] for remat in ("none", "full"))
    assert {none.seconds.bound, full.seconds.bound} == {"work"}
    assert full.mfu == pytest.approx(full.report.needed / full.report.flops)
    assert full.mfu / none.mfu == pytest.approx(none.report.flops / full.report.flops)
    assert 0.7 < full.mfu < 0.9 < none.mfu < 1


def test_a_stage_takes_its_programs_by_the_seconds_of_their_calls(plan):
    made = chip(flops=1e9, bandwidth=1e9)
    found = plan("dpo", made)
    took = {name: each.seconds.total * 0.4 * each.calls for name, each in found.programs.items()}
    computed = sum(each.report.needed * each.calls for each in found.programs.values())
    assert found.mfu == pytest.approx(computed / (made.flops * sum(took.values())))
    assert min(each.mfu for each in found.programs.values()) < found.mfu < 1


def test_the_plan_shows_it(plan):
    found = plan("dpo", chip(flops=1e9))
    place = chips.Topology("gpu:80GB", chip(flops=1e9), tuple(jax.devices("cpu")[:1]), compiled=False)
    shown = report.lines("dpo", found).splitlines()
    at = report.COLUMNS.index("MFU <=")
    assert float(shown[0][at : at + 6].rstrip("%")) == pytest.approx(100 * found.programs["reference"].mfu, abs=0.06)
    assert f"    MFU of dpo: at most {found.mfu:.1%} in all, if every row had the largest length" in shown
    told = report.as_json(place, {"fsdp": 1}, {"dpo": found}, {}, Assumptions())["stages"]["dpo"]
    assert told["mfu_at_most"] == found.mfu
    train = told["programs"]["train"]
    assert train["mfu_at_most"] == found.programs["train"].mfu
    assert train["model_flops_per_chip"] == dataclasses.asdict(found.programs["train"].report)["needed"]


def test_the_plan_tells_what_is_sent_while_nothing_is_computed(plan):
    made = chip(flops=1e9)
    found = plan("dpo", made)
    train = found.programs["train"]
    assert train.alone == 0 and "computes nothing" not in report.lines("dpo", found)  # arithmetic can't tell
    sent = {"all-gather": 30_000_000, "all-reduce": 20_000_000}
    reported = dataclasses.replace(train.report, collectives=sent, alone={"all-reduce": 20_000_000})
    alone = estimate.alone(reported, made, Assumptions())
    assert alone == pytest.approx(2 * 20e6 / (1e12 * 0.4))  # a sum travels twice
    programs = {"train": dataclasses.replace(train, report=reported, alone=alone)}
    shown = report.lines("dpo", dataclasses.replace(found, programs=programs))
    assert "    0.02 GB of these are sent while the chip computes nothing, 0.000 s a call\n" in shown
