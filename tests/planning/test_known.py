"""Compilers' figures are kept in a folder: a later plan finds them, and nothing else."""

import dataclasses

from mpo_jax.models import presets
from mpo_jax.planning import known as kept
from mpo_jax.planning import stages
from mpo_jax.planning.estimate import Assumptions
from mpo_jax.planning.known import Compiled, Known
from tests.planning import case

FOUND = Compiled(arguments=3, temporaries=5, moved=7.5, collectives={"all-gather": 11}, largest="f32[2]", text="HLO")


def test_a_later_plan_finds_what_an_earlier_one_compiled(tmp_path):
    first = Known(tmp_path / "plan")
    first.put("a", FOUND)
    later = Known(tmp_path / "plan")
    assert later.get("a") == dataclasses.replace(FOUND, text="")
    assert later.get("b") is None
    assert (first.compiles, later.compiles, later.programs) == (1, 0, 1)
    assert Known().get("a") is None, "no folder, no figures"


def test_what_a_killed_plan_left_half_written_is_not_read(tmp_path):
    (tmp_path / "a.json.part").write_text('{"arguments"')
    assert Known(tmp_path).get("a") is None


def test_another_topology_loop_program_or_compiler_has_another_digest(monkeypatch):
    def digests():
        return [kept.digest(*each) for each in (("v5e:2x4", 1, "f"), ("v5e:4x8", 1, "f"), ("v5e:2x4", 2, "f"),
                                                ("v5e:2x4", 1, "g"))]  # fmt: skip

    before = digests()
    monkeypatch.setattr(kept, "_compiler", lambda: ("another",))
    assert len({*before, *digests()}) == 8


def test_a_stage_planned_again_compiles_nothing_and_says_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "find", lambda path: case.model())
    config, place = case.config(), case.one_cpu()

    def plan(known: Known) -> stages.StagePlan:
        return stages.plan(stages.jobs(config, place, ["dpo"])["dpo"], place, Assumptions(), ["reference"], known)

    first, later = Known(tmp_path), Known(tmp_path)
    assert plan(first) == plan(later)
    assert (first.compiles, later.compiles) == (1, 0)
