"""The job of a stage enters; what a thread compiles of it while another stage works is held against what it calls."""

import dataclasses
import threading

import jax
import pytest

from mpo_jax import metrics
from mpo_jax.artifacts import POLICY
from mpo_jax.errors import InputError
from mpo_jax.stages import ahead, kinds, programs
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
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 2 if where in ("few processors", "a TPU") else 8)
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
    def calls(job):
        raise error

    foreseeing(monkeypatch, calls)
    with ahead.compiling(make_job(tmp_path, shared)):
        programs.AT_WORK.set()
    assert capsys.readouterr().err == told


def test_a_run_that_is_told_to_stop_waits_for_one_program_at_most(tmp_path, shared, monkeypatch):
    stopped, begun = threading.Event(), threading.Event()
    first, second = Function(lambda: (begun.set(), stopped.wait(60))), Function()
    foreseeing(monkeypatch, lambda job: [(first, ()), (second, ())])

    def work():
        programs.AT_WORK.set()
        assert begun.wait(60)
        threading.Timer(0.5, stopped.set).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ahead.compiling(make_job(tmp_path, shared)):
        work()
    assert (first.compiled, second.compiled) == (1, 0)


def test_nothing_is_compiled_before_the_stage_at_work_has_compiled_its_own(tmp_path, shared, monkeypatch):
    function = Function()
    foreseeing(monkeypatch, lambda job: [(function, ())])
    with ahead.compiling(make_job(tmp_path, shared)):
        pass  # it compiles nothing, so that no time is left for others
    assert function.compiled == 0
    with ahead.compiling(make_job(tmp_path, shared)):
        assert not programs.AT_WORK.wait(0.5) and function.compiled == 0
        programs.compile_ahead(make_job(tmp_path, shared).mesh, [])
    assert function.compiled == 1
