"""Loops over batches are cut off and begun again: what they give, what they compute again, and what they tell."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, stopping
from mpo_jax.errors import Stopped
from mpo_jax.stages import candidates, evaluate, rows
from mpo_jax.stages import job as jobs
from tests.stages.test_evaluate import evaluation

SIZE = 2
"""Rows of a batch."""


class Cut(Exception):
    """Stands for a kill between two batches."""


@pytest.fixture(scope="module")
def made(tmp_path_factory, stories):
    """An evaluation's job, its prompts, its programs and a policy's weights, with a shard for every batch."""
    job = evaluation(tmp_path_factory.mktemp("shards"), stories, count=40)
    object.__setattr__(job, "config", job.config.model_copy(update={"shard_seconds": 0.0}))
    model, tokenizer = jobs.model(job), jobs.load_tokenizer(job, jobs.model(job))
    prompts = evaluate.heldout_prompts(job, model, tokenizer)
    with jax.set_mesh(job.mesh):
        weights = jobs.load_weights(job, job.inputs["policies"][0], model)
    return SimpleNamespace(job=job, prompts=prompts, compiled=evaluate.programs(job), weights=weights)


@pytest.fixture
def sampled(made):
    """`(folder, of=..., cut=None, calls=None) -> Replies`: samples, a batch at a call; cut: the call before which it is
    cut off."""

    patch = pytest.MonkeyPatch()  # of its own: a test may undo what it has patched itself
    patch.setattr(candidates, "MOST_BATCHES", 1)

    def sample(folder, of=("dpo",), cut=None, calls=None, **how):
        job = evaluation_in(made.job, folder)
        program = cut_off(made.compiled["sample"], cut, calls)
        settings = candidates.sampling_config(job, 1, **({"temperature": 0.8, "max_new_tokens": 12} | how))
        with jax.set_mesh(job.mesh):
            return candidates.sample_all(job, program, made.weights, made.prompts, settings, SIZE, of)

    yield sample
    patch.undo()


def evaluation_in(job, folder):
    return dataclasses.replace(job, folder=epath.Path(folder))


def cut_off(program, cut, calls):
    """The program, counted, and cut off when it is called the `cut`-th time."""
    calls = [] if calls is None else calls

    @functools.wraps(program.function)
    def function(*arguments):
        if cut is not None and len(calls) == cut:
            raise Cut
        calls.append(1)
        return program.function(*arguments)

    function.lower = program.function.lower
    return dataclasses.replace(program, function=function)


def equal(one, two) -> None:
    np.testing.assert_array_equal(one.logps, two.logps)
    np.testing.assert_array_equal(one.finished, two.finished)
    assert [[ids.tolist() for ids in row] for row in one.tokens] == [
        [ids.tolist() for ids in row] for row in two.tokens
    ]


def batches(folder) -> list[str]:
    return sorted(path.name for path in (folder / artifacts.SHARDS).glob("*/*.npz"))


def test_a_cut_off_loop_goes_on_behind_its_last_shard_and_gives_the_same(sampled, tmp_path):
    whole_calls: list[int] = []
    whole = sampled(tmp_path / "whole", calls=whole_calls)
    total = len(whole_calls)
    assert total >= 5 and len(batches(tmp_path / "whole")) == total
    with pytest.raises(Cut):
        sampled(tmp_path / "cut", cut=3)
    assert len(batches(tmp_path / "cut")) == 3
    calls: list[int] = []
    equal(sampled(tmp_path / "cut", calls=calls), whole)
    assert len(calls) == total - 3
    calls.clear()
    equal(sampled(tmp_path / "cut", calls=calls), whole)
    assert not calls, "all is kept until the stage is finished"


def test_a_damaged_shard_is_told_and_made_again_alone(sampled, tmp_path, capsys):
    whole = sampled(tmp_path)
    shard = sorted((tmp_path / artifacts.SHARDS).glob("*/*.npz"))[2]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    calls: list[int] = []
    equal(sampled(tmp_path, calls=calls), whole)
    assert len(calls) == 1
    assert f"shards: {shard}: damaged" in capsys.readouterr().err
    shard.write_bytes(shard.read_bytes()[:100])  # cut short
    equal(sampled(tmp_path, calls=calls), whole)
    assert len(calls) == 2


def test_results_are_found_only_by_what_they_are_of(sampled, made, tmp_path):
    sampled(tmp_path)
    for other in ({"of": ("sft",)}, {"temperature": 0.7}):
        calls: list[int] = []
        sampled(tmp_path, calls=calls, **other)
        assert len(calls) >= 5, other
    before = batches(tmp_path)
    sampled(tmp_path, of=None)
    assert batches(tmp_path) == before, "what is of nothing is not kept"


def test_scores_go_on_too_and_their_weights_need_not_be_loaded(made, sampled, tmp_path):
    replies = candidates.with_replies(made.prompts, sampled(tmp_path / "drawn").tokens)
    job = evaluation_in(made.job, tmp_path)
    compute = functools.partial(rows.compute, job)
    with jax.set_mesh(job.mesh):
        whole = compute(made.compiled["logps"], made.weights, replies, SIZE)
        with pytest.raises(Cut):
            compute(cut_off(made.compiled["logps"], 2, None), made.weights, replies, SIZE, ["dpo"])
        calls: list[int] = []
        found = compute(cut_off(made.compiled["logps"], None, calls), lambda: made.weights, replies, SIZE, ["dpo"])
        np.testing.assert_array_equal(found, whole)
        kept = len(batches(tmp_path))
        assert len(calls) == kept - 2

        def never():
            raise AssertionError("nothing is left to compute")

        np.testing.assert_array_equal(compute(made.compiled["logps"], never, replies, SIZE, ["dpo"]), whole)
        # Other batches are other results: their rounding may differ.
        compute(made.compiled["logps"], made.weights, replies, 2 * SIZE, ["dpo"])
    assert len(batches(tmp_path)) > kept


def test_a_stop_comes_behind_a_batch_that_is_kept(sampled, tmp_path, monkeypatch):
    whole, asked = sampled(tmp_path / "whole"), []
    monkeypatch.setattr(stopping, "reached", lambda: bool(asked.append(1)) or len(asked) == 2)
    with pytest.raises(Stopped) as stopped:
        sampled(tmp_path / "stopped")
    assert stopped.value.where.startswith("sample: batch 2 of ")
    monkeypatch.undo()
    assert len(batches(tmp_path / "stopped")) == 2
    equal(sampled(tmp_path / "stopped"), whole)


def test_shards_are_written_by_time_and_what_is_left_in_the_end(sampled, made, tmp_path, monkeypatch):
    monkeypatch.setattr(made, "job", evaluation_in(made.job, tmp_path))
    object.__setattr__(made.job, "config", made.job.config.model_copy(update={"shard_seconds": 3600.0}))
    with pytest.raises(Cut):
        sampled(tmp_path, cut=3)
    assert batches(tmp_path) == ["00000000-00000002.npz"]
    sampled(tmp_path)
    assert len(batches(tmp_path)) == 2
