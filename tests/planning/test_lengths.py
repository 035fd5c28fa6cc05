"""Lengths of the data and of the settings, in chip-hours: counted by hand."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mpo_jax import recipes, sharding
from mpo_jax.models import presets
from mpo_jax.planning import chips, lengths, report, stages
from mpo_jax.planning.chips import Topology
from mpo_jax.planning.estimate import Assumptions, Lengths, Seconds
from mpo_jax.run import Run
from mpo_jax.stages import kinds
from mpo_jax.stages.job import Job
from tests.planning import case

WORK = Seconds(work=1.0, memory=0.0, collectives=0.0)
"""A call that takes as long as its tokens: 128 of them in the longest rows of `case.config`, 64 + 2 * 32."""


@pytest.fixture
def small(monkeypatch):
    """The base model of `case.config`, small."""
    monkeypatch.setattr(presets, "find", lambda path: case.model())


def job(stage: str, source: str = "dataset", **data) -> tuple[Job, Topology]:
    made = recipes.config()
    made.model.path = "llama2-7b"
    made.data.update({"path": "unread", "max_prompt": 64, "max_response": 32, "max_length": 128, "multiple": 32} | data)
    made.stages.update(recipes.mpo_stages(pair_source=source))
    for each in made.stages.values():
        each.update({key: value for key, value in (("batch_size", 8), ("microbatch", 0), ("max_new_tokens", 32))
                     if key in each})  # fmt: skip
    place = case.one_cpu()
    return stages.jobs(kinds.read(made.to_dict()), place, [stage])[stage], place


def share(planned: Job, place: Topology, program: str, pieces=None, seconds: Seconds = WORK) -> tuple[float, float]:
    found = None if pieces is None else Lengths(np.asarray(pieces), len(pieces))
    with jax.set_mesh(planned.mesh):
        programs = kinds.of(planned.settings).programs(planned)
    return lengths.shares(planned, programs[program], seconds, place, Assumptions(lengths=found))


def test_rows_of_the_data_take_the_time_of_their_buckets(small):
    """64 rows of 20 + 6 + 6 tokens fill eight batches of 32 columns; 64 of 50 + 20 + 20 as many of 96."""
    pieces = [(20, 6, 6)] * 64 + [(50, 20, 20)] * 64
    assert share(*job("dpo"), "train", pieces) == (0.5, 0.5)
    assert share(*job("sft"), "train", pieces) == pytest.approx((2 / 3, 2 / 3)), (
        "of 96: buckets of 32 and 96, one reply"
    )
    assert share(*job("dpo", max_buckets=1), "train", pieces) == (0.75, 0.75)


def test_of_unknown_lengths_the_settings_give_a_range(small):
    assert share(*job("dpo"), "train") == (0.25, 1.0), "from one bucket of 32 tokens to one of 128"


def test_sampled_replies_are_unknown_where_the_data_says_the_prompts(small):
    """Prompts of 30 tokens are slots of 32 beside 64; replies have one token or 32."""
    pieces = [(30, 6, 6)] * 16
    least, most = share(*job("evaluate"), "sample", pieces)
    assert (least, most) == pytest.approx(((32 + 1) / 96, (32 + 32) / 96))
    assert share(*job("dpo", "sampled"), "train", pieces) == (0.25, 0.75), "30 + 1 and 30 + 64 tokens"


def test_weights_that_are_gathered_do_not_shrink_with_rows(small):
    planned, place = job("sft")
    mesh = sharding.make_mesh(1, 4, 1, devices=jax.devices("cpu")[:4])
    planned = dataclasses.replace(planned, mesh=mesh)
    least, most = share(planned, place, "train", seconds=Seconds(0.0, 0.0, 1.0))
    assert least == most == 1.0


def tiny(**data) -> Run:
    made = recipes.small_run("lengths")
    made.data.update(data)
    return kinds.read(made.to_dict())


def test_data_that_is_here_is_read_and_counted(tmp_path):
    file = tmp_path / "stories.jsonl"
    rows = [{"prompt": "Once upon a time", "completion": " there was a cat." * (1 + index % 3)} for index in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = lengths.read(stages.jobs(tiny(path=str(file)), case.one_cpu()).values())
    assert found is not None and found.rows == 60 and found.pieces.shape == (60, 2)
    prompts, replies = found.pieces.T
    assert len(set(prompts)) == 1 and len(set(replies)) == 3
    one, two, three = sorted(set(replies))
    assert three - two == two - one > 0, "each sentence has as many tokens"


def test_data_that_is_not_here_is_not_asked_for(tmp_path):
    for path in ("owner/name", "gs://bucket/rows.jsonl", "tfds:name", str(tmp_path / "none.jsonl")):
        assert lengths.read(stages.jobs(tiny(path=path), case.one_cpu()).values()) is None


def test_the_plan_says_where_lengths_are_from(small):
    place = chips.topology("cpu")
    pieces = Lengths(np.array([(20, 6, 6)]), 1000)
    known = report.heading(case.config(), place, {"fsdp": 1}, Assumptions(pairs=1000, lengths=pieces))
    assert "1,000 pairs read from the data (chip-hours by the lengths of 1 of them" in known
    assert "of unknown lengths" in report.heading(case.config(), place, {"fsdp": 1}, Assumptions())
    assert (report.hours(1.04, 9.96), report.hours(9.99, 9.99), report.hours(2, 57)) == (
        "1.0 to 10.0",
        "10.0",
        "2 to 57",
    )
