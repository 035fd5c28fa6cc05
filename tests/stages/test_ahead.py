"""The job of a stage enters; what a thread compiles of it while another stage works is held against what it calls."""

import contextlib
import dataclasses
import threading

import jax
import numpy as np
import pytest

from mpo_jax import metrics
from mpo_jax.artifacts import POLICY
from mpo_jax.errors import InputError
from mpo_jax.stages import ahead, kinds, programs, sft, shards
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Artifact
from tests.stages import split_job


def make_job(folder, shared, **settings):
    """An sft stage. Its programs depend on its learning rate, so that each of these has its own."""
    base = {"init": Artifact("base", POLICY, shared / "models/stories260K")}
    small = {"batch_size": 8, "steps": 1, "eval_batches": 1}
    return split_job.make_job(folder, shared, "sft", inputs=base, **(small | settings))


def replaced(job, **changes):
    return dataclasses.replace(job, config=job.config.model_copy(update=changes))


def compiles_of(job):
    """How many programs a stage compiles, and its summary."""
    job.folder.mkdir(exist_ok=True, parents=True)
    before = metrics.compiles()
    with jax.set_mesh(job.mesh):
        summary = kinds.of(job.settings).run(job)
    return metrics.compiles() - before, summary


_count = jax.jit(lambda tokens: tokens.sum())


def _read(found):
    return {"tokens": np.asarray(found)[None]}


def rows_of(job):
    """The rows that the job learns from."""
    with jax.set_mesh(job.mesh):
        train, _ = sft.loaders(job, jobs.model(job))
    return train.encoded


def foreseeing(monkeypatch, calls):
    """The job's kind foresees other calls."""
    monkeypatch.setitem(kinds.KINDS, "sft", dataclasses.replace(kinds.KINDS["sft"], calls=calls))


class Function:
    """A jitted function, as far as it is compiled: `during` is called meanwhile."""

    def __init__(self, during=lambda: None):
        self.compiled, self._during = 0, during

    def lower(self):
        return self

    def compile(self):
        self._during()
        self.compiled += 1


def test_a_stage_compiles_nothing_that_was_compiled_while_the_one_before_it_worked(tmp_path, shared, capsys):
    alone, job = (make_job(tmp_path / name, shared, learning_rate=rate) for name, rate in (("a", 1e-4), ("b", 2e-4)))
    compiled, summary = compiles_of(alone)
    told, accounts = capsys.readouterr(), list(alone.accounts)
    before = metrics.compiles()
    with ahead.compiling(job):
        programs.AT_WORK.set()
        next(thread for thread in threading.enumerate() if thread.name == "compile sft").join(300)
    assert metrics.compiles() == before, "programs of the next stage are counted as this one's"
    assert capsys.readouterr() == ("", ""), "the next stage's account of its data is told during this one"
    fewer, summary_after = compiles_of(job)
    assert fewer <= compiled - 2  # the step, and the evaluation
    assert capsys.readouterr() == told and job.accounts == accounts
    assert summary_after.keys() == summary.keys()


@pytest.mark.parametrize(
    "where", ["one device", "several devices", "few processors", "a GPU", "several hosts", "not wanted", "a TPU"]
)
def test_where_a_stage_is_compiled_ahead(where, tmp_path, shared, monkeypatch):
    job = make_job(tmp_path, shared)
    monkeypatch.setattr(programs, "processors", lambda: 2 if where in ("few processors", "a TPU") else 8)
    if where == "several devices":
        job = dataclasses.replace(job, mesh=jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,)))
    elif where in ("a GPU", "a TPU"):
        monkeypatch.setattr(type(job), "platform", where.split()[1].lower())
    elif where == "several hosts":
        monkeypatch.setattr(jax, "process_count", lambda: 2)
    elif where == "not wanted":
        job = replaced(job, compile_next=False)
    assert ahead.possible(job) == (where in ("one device", "a TPU"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InputError("split is missing"), ""),
        (RuntimeError("out of memory"), "sft: not compiled ahead: RuntimeError: out of memory\n"),
    ],
)
def test_what_goes_wrong_ahead_does_not_concern_the_stage_at_work(error, told, tmp_path, shared, monkeypatch, capsys):
    asked = threading.Event()

    def calls(job):
        asked.set()
        raise error

    foreseeing(monkeypatch, calls)
    with ahead.compiling(make_job(tmp_path, shared)):
        programs.AT_WORK.set()
        assert asked.wait(60)
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, InputError])
def test_when_a_stage_ends_one_program_is_waited_for_at_most(error, tmp_path, shared, monkeypatch):
    """The next stage compiles the others side by side; and a run that is told to stop ends."""
    ended, begun = threading.Event(), threading.Event()
    first, second = Function(lambda: (begun.set(), ended.wait(60))), Function()
    foreseeing(monkeypatch, lambda job: [(first, ()), (second, ())])

    def work():
        programs.AT_WORK.set()
        assert begun.wait(60)
        threading.Timer(0.5, ended.set).start()
        if error is not None:
            raise error("the stage ends")

    with contextlib.suppress(error or ()), ahead.compiling(make_job(tmp_path, shared)):
        work()
    assert ended.is_set() and (first.compiled, second.compiled) == (1, 0)


def test_nothing_is_compiled_before_the_stage_at_work_has_compiled_its_own(tmp_path, shared, monkeypatch):
    """A training's steps are its own, the scoring that comes before them is not all of it."""
    compiled = threading.Event()
    foreseeing(monkeypatch, lambda job: [(Function(compiled.set), ())])
    with ahead.compiling(make_job(tmp_path, shared)):
        pass  # it compiles nothing, so that no time is left for others
    assert not compiled.is_set()
    training = make_job(tmp_path / "training", shared, steps=2)
    scored = jobs.loader(training, rows_of(training), 8)
    with ahead.compiling(make_job(tmp_path, shared)):
        with jax.set_mesh(training.mesh):
            list(shards.over(training, scored, "score", None, lambda batch: (_count, (batch.tokens,)), _read))
            assert not compiled.wait(0.5), "the steps of the training are still to be compiled"
            kinds.of(training.settings).run(training)
        assert compiled.wait(60)
