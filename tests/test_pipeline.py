"""Which stages run, are skipped, resume and run again; with stages that only write a file in place of training."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import types
from collections.abc import Callable

import pytest
from etils import epath

from mpo_jax import artifacts, graph, locks, pipeline, profiling, recipes, sharding, states, stopping
from mpo_jax.errors import INTERRUPTED, PREEMPTED, InputError, Stopped
from mpo_jax.stages import kinds


@dataclasses.dataclass
class Run:
    """A config, its workdir, a list of the stages that ran since it was last emptied, and of those not to cut off."""

    config: object
    workdir: epath.Path
    ran: list
    whole: list
    leaves: Callable[[epath.Path], None] = lambda folder: None
    summary: dict = dataclasses.field(default_factory=lambda: {"loss": 0.5})

    def __call__(self, *only, profile=None):
        self.ran.clear()
        pipeline.run(self.read(), self.workdir, sharding.make_mesh(data=8, fsdp=1), only, profile)
        return list(self.ran)

    def dpo_works(self):
        """A dpo stage that was cut off is not cut off again."""
        self.whole.append("dpo")

    def manifest(self, name):
        return json.loads((self.folder(name) / "manifest.json").read_text())

    def read(self):
        return kinds.read(self.config.to_dict())

    def nodes(self):
        return graph.resolve(self.read(), self.workdir)

    def states(self):
        return {name: status.state for name, status in states.statuses(self.read(), self.nodes()).items()}

    def tree(self):
        return states.tree(self.read(), self.nodes())

    def folder(self, name):
        return self.nodes()[name].folder


@pytest.fixture
def run(tmp_path, stories, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((stories / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((stories / name).read_bytes())
    (model / "model.safetensors").write_bytes(b"weights")
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    config = recipes.config()
    config.model.path, config.data.path = str(model), str(data)
    config.stages.sft = recipes.stage("sft")
    config.stages.reward = recipes.stage("reward")
    config.stages.split = recipes.stage("split")
    config.stages.dpo = recipes.stage("dpo")
    ran, whole = [], []
    # Stages that are made up leave nothing to report on; tests/evaluation/test_report.py has a page of its own.
    monkeypatch.setattr(pipeline.report, "write", lambda workdir, shown: workdir / "report.html")

    made = Run(config, epath.Path(tmp_path / "run"), ran, whole)

    def stage(job):
        ran.append(job.name)
        made.leaves(job.folder)
        if getattr(job.settings, "beta", 0) == 13 and job.name not in whole:
            raise KeyboardInterrupt
        if getattr(job.settings, "beta", 0) == 14:
            raise Stopped(PREEMPTED, "batch 3 of 9")
        (job.folder / "result.txt").write_text(job.name)
        artifacts.write_text(job.folder / artifacts.SHARDS / "sample-0" / "0-3.npz", "kept")
        return made.summary

    for name, kind in kinds.KINDS.items():
        monkeypatch.setitem(kinds.KINDS, name, dataclasses.replace(kind, run=stage, check=lambda job: None))
    return made


def saved_states(run, name):
    """Files of the states that a stage could resume from."""
    return sorted(path.name for path in (run.folder(name) / artifacts.CHECKPOINTS).glob("*/*/*"))


def leave_states(folder):
    for step in ("last/1", "last/2", "best/1"):
        artifacts.write_bytes(folder / artifacts.CHECKPOINTS / step / "array", b"moments")


def test_a_finished_stage_drops_its_states(run):
    run.leaves = leave_states
    assert run("sft") == ["sft"]
    assert not (run.folder("sft") / artifacts.CHECKPOINTS).exists()
    assert (run.folder("sft") / "result.txt").exists()
    run.leaves = lambda folder: None
    leave_states(run.folder("sft"))  # as a version left them that kept them
    assert run() == ["reward", "split", "dpo"]
    assert saved_states(run, "sft") == []


@pytest.mark.parametrize("at", ["write_manifest", "rmtree"])
def test_a_kill_about_the_end_of_a_stage_loses_nothing(run, monkeypatch, at):
    """Before the manifest the states are all there; between it and the last deleted file, the stage is done."""
    run.leaves = leave_states

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        where = artifacts if at == "write_manifest" else type(run.workdir)
        patched.setattr(where, at, killed)
        with pytest.raises(KeyboardInterrupt):
            run("sft")
    assert saved_states(run, "sft") == ["array"] * 3
    assert run("sft") == (["sft"] if at == "write_manifest" else [])
    assert run.states()["sft"] == "done"
    assert not (run.folder("sft") / artifacts.CHECKPOINTS).exists()


def test_data_that_was_found_right_is_not_opened_again(run, monkeypatch):
    opened = []
    check = pipeline.corpus.check_data
    monkeypatch.setattr(
        pipeline.corpus, "check_data", lambda data, names: opened.append(list(names)) or check(data, names)
    )

    def again():
        opened.clear()
        run()
        return [names for names in opened if names]

    run.config.stages.dpo.beta = 13.0
    with pytest.raises(KeyboardInterrupt):
        run()
    with pytest.raises(KeyboardInterrupt):
        again()  # dpo is still to be done
    assert [names for names in opened if names] == []
    run.config.stages.dpo.beta = 0.5
    assert again() == []
    run.config.data.max_length = 400  # other settings of the data
    assert again() == [[""]]
    epath.Path(run.config.data.path).write_text('{"prompt": "a", "chosen": "b", "worse": "c"}\n')
    with pytest.raises(InputError, match="worse"):
        again()
    assert run.folder("sft").name not in [path.name for path in run.workdir.iterdir()]
    with pytest.raises(InputError, match="worse"):
        again()


@pytest.fixture
def jobs_of(run, monkeypatch):
    """The jobs that are compiled ahead, None where none is, and those that stages are handed; in their order."""
    compiled, handed, run_stage = [], [], pipeline.run_stage

    @contextlib.contextmanager
    def compiling(job):
        compiled.append(job)
        yield

    monkeypatch.setattr(pipeline.ahead, "compiling", compiling)
    monkeypatch.setattr(pipeline.ahead, "possible", lambda job: True)
    monkeypatch.setattr(pipeline, "run_stage", lambda job, *rest: (handed.append(job), run_stage(job, *rest)))
    return compiled, handed


def test_the_stage_that_comes_next_is_compiled_ahead_once_all_but_its_weights_is_there(run, jobs_of, monkeypatch):
    """A policy's or a reward model's weights have known shapes; which pairs a split makes is not known before."""
    compiled, handed = jobs_of
    assert run() == ["sft", "reward", "split", "dpo"]
    assert [job and job.name for job in compiled] == ["reward", "split", None, None]
    assert handed[1] is compiled[0] and handed[2] is compiled[1], "the job holds what was compiled"
    compiled.clear()
    run.config.stages.reward.batch_size = 4  # the sft stage stays as it is, and passes at once
    assert run() == ["reward", "split", "dpo"]
    assert [job and job.name for job in compiled] == [None, "split", None, None]
    compiled.clear()
    monkeypatch.setattr(pipeline.ahead, "possible", lambda job: False)
    run.config.stages.sft.batch_size = 4
    assert len(run()) == 4 and compiled == [None] * 4


def test_what_was_compiled_ahead_is_its_own_stage_s_where_another_passes_in_between(run, jobs_of):
    compiled, handed = jobs_of
    run.config.stages.first, run.config.stages.second = recipes.stage("sft", seed=1), recipes.stage("sft", seed=2)
    run("first")
    compiled.clear(), handed.clear()
    assert run() == ["sft", "reward", "split", "dpo", "second"] and "first" not in [job.name for job in handed]
    assert compiled[3].name == "second" and handed[-1] is compiled[3]


def test_a_manifest_tells_where_it_comes_from(run, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mpo", "run", "--config=a b"])
    run.config.seed = 7
    run.config.stages.dpo.beta = 0.5
    run()
    made = run.manifest("dpo")
    assert made["changed"]["stage"] == {"beta": 0.5} and made["changed"]["run"]["seed"] == 7
    assert made["command"] == "mpo run '--config=a b'" and re.match("[0-9a-f]{40}", made["commit"] or "0" * 40)


def test_the_report_is_drawn_again_when_a_stage_was_made_since(run, monkeypatch):
    drawn = []

    def write(workdir, shown):
        drawn.append(workdir)
        artifacts.write_text(workdir / artifacts.REPORT_PAGE, "page")
        later = (workdir / artifacts.REPORT_PAGE).stat().mtime + 5
        os.utime(workdir / artifacts.REPORT_PAGE, (later, later))
        return workdir / artifacts.REPORT_PAGE

    monkeypatch.setattr(pipeline.report, "write", write)
    for _ in range(2):
        run()
    assert len(drawn) == 1
    later = (run.workdir / artifacts.REPORT_PAGE).stat().mtime + 5
    os.utime(run.folder("dpo") / artifacts.MANIFEST, (later, later))  # as after a kill before the page
    run()
    assert len(drawn) == 2


def test_a_known_failure_is_told_when_its_stage_ends(run, capsys):
    baselines = {"tfidf_bradley_terry": None, "shorter_wins": 0.5}
    run.summary = {"report": {"accuracy": 0.49, "accuracy_se": 0.05, "pairs": 104, "baselines": baselines}}
    run("reward")
    assert "warning: reward: The reward model is right on 0.490 ± 0.050 of 104" in capsys.readouterr().err


def test_finished_stages_are_skipped(run):
    assert run() == ["sft", "reward", "split", "dpo"]
    assert run() == []
    assert set(run.states().values()) == {"done"}
    names = json.loads((run.workdir / "stages.json").read_text())
    assert names == {name: run.folder(name).name for name in run.config.stages}


def test_a_run_can_be_limited_to_some_stages(run):
    assert run("reward") == ["sft", "reward"]
    assert run.states() == {"sft": "done", "reward": "done", "split": "missing", "dpo": "missing"}


def test_the_manifest_tells_what_a_stage_was_made_from(run):
    run()
    manifest = json.loads((run.folder("dpo") / "manifest.json").read_text())
    above = json.loads((run.folder("split") / "manifest.json").read_text())
    assert manifest["inputs"]["pairs"] == [
        {"name": "split", "part": "easy", "key": above["key"], "made": above["made"]},
    ]
    assert manifest["summary"] == {"loss": 0.5}
    assert set(manifest["packages"]) >= {"mpo_jax", "jax"}


def test_a_run_says_what_it_will_do_which_stage_it_is_at_and_how_long_that_may_take(run, capfd, monkeypatch):
    # The clock goes on by 2 s whenever it is looked at: 2 s for the manifest, 6 s for what is said.
    monkeypatch.setattr(pipeline, "time", types.SimpleNamespace(perf_counter=itertools.count(0, 2).__next__))
    run.config.stages.sft.steps = 10
    run()
    first = capfd.readouterr().out
    assert first.startswith(f"run mpo in {run.workdir}\n  devices  8 x cpu, mesh data 8, fsdp 1, tensor 1\n")
    assert "  to do    sft, reward, split, dpo\n  ETA      unknown\n" in first and "  done " not in first
    assert "\nstage 3 of 4: split (ETA of the run unknown)\n" in first
    assert f"\nsplit: finished in 6.0 s ({run.folder('split').name})\n" in first
    assert run.manifest("sft")["seconds"] == 2 and run.manifest("sft")["devices"] == "8 x cpu"
    run.config.stages.dpo.beta = 0.3
    run.config.stages.ipo = recipes.stage("dpo", objective="ipo")
    run()
    then = capfd.readouterr().out
    assert "  to do    dpo, ipo\n  done     sft, reward, split\n  ETA      2 s, without ipo\n" in then
    assert f"\nstage 1 of 5: sft: done before ({run.folder('sft').name})\n" in then
    assert "\nstage 4 of 5: dpo (ETA of the run 2 s, without ipo)\n" in then
    assert "\nstage 5 of 5: ipo (ETA of the run unknown)\n" in then


def test_how_long_a_resumed_stage_took_is_not_known(run, capfd):
    run.config.stages.dpo.beta = 13.0
    with pytest.raises(KeyboardInterrupt):
        run()
    run.dpo_works()
    assert run() == ["dpo"]
    assert "\nstage 4 of 4: dpo resumed (ETA of the run unknown)\n" in capfd.readouterr().out
    assert run.manifest("dpo")["seconds"] is None


def test_a_stage_that_will_not_run_is_not_profiled(run):
    for only, stage, expected in (
        (["reward"], "dpo", "'dpo' will not run; expected one of sft, reward"),
        ([], "sft", "'sft' will not run; nothing is left to run"),
    ):
        with pytest.raises(InputError, match=f"--profile: stage {expected}"):
            run(*only, profile=profiling.Wanted(stage, 1, 1))
        run()


def test_a_changed_setting_runs_its_stage_and_dependents_beside_the_old(run):
    run()
    old = run.folder("split")
    run.config.stages.split.threshold = 2.0
    assert run.states() == {"sft": "done", "reward": "done", "split": "stale", "dpo": "stale"}
    drawn = run.tree()
    assert "threshold: 1.0 -> 2.0" in drawn and "input split" in drawn
    assert run() == ["split", "dpo"]
    assert (old / "manifest.json").exists()


def test_a_deleted_artifact_runs_again_with_its_dependents_alone(run):
    run()
    run.folder("split").rmtree()
    assert run.states() == {"sft": "done", "reward": "done", "split": "missing", "dpo": "stale"}
    assert run() == ["split", "dpo"]
    assert [path.name.rpartition("-")[0] for path in (run.workdir / "set_aside").iterdir()] == [run.folder("dpo").name]
    assert run() == []


def test_a_stage_that_was_cut_off_runs_again_in_the_same_folder(run):
    run.config.stages.dpo.beta = 13.0
    with pytest.raises(KeyboardInterrupt):
        run()
    assert run.states()["dpo"] == "unfinished"
    (run.folder("dpo") / "checkpoint").write_text("kept")
    with pytest.raises(KeyboardInterrupt):
        run()
    assert run.ran == ["dpo"] and (run.folder("dpo") / "checkpoint").exists()


def test_a_stage_that_is_told_to_stop_says_how_to_go_on(run, capsys):
    run.config.stages.dpo.beta = 14.0
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == PREEMPTED
    told = "told to stop in stage dpo, at batch 3 of 9; the same command goes on from there"
    assert capsys.readouterr().out.splitlines()[-1] == told
    assert run.states()["dpo"] == "unfinished"
    with stopping.Notice() as notice:
        notice.tell(INTERRUPTED)
        with pytest.raises(SystemExit):  # between two stages too
            run()
    assert capsys.readouterr().out.splitlines()[-1] == "told to stop in stage sft; the same command goes on from there"


def test_what_a_finished_stage_kept_midway_is_gone_and_in_no_manifest(run):
    run()
    folder = run.folder("split")
    assert not (folder / artifacts.SHARDS).exists()
    assert set(artifacts.read_manifest(folder)["files"]) == {"config.json", "inputs.json", "result.txt"}
    artifacts.write_text(folder / artifacts.SHARDS / "left", "by a kill behind the manifest")
    run()
    assert not (folder / artifacts.SHARDS).exists()


def test_a_stage_that_another_run_works_on_is_refused_and_others_are_not(run):
    (run.workdir / artifacts.LOCKS).mkdir(parents=True)
    lock = run.workdir / artifacts.LOCKS / f"{run.folder('split').name}.json"
    with locks.held(lock, "another run's"):
        with pytest.raises(InputError, match=f"stage split is being worked on by process {os.getpid()} on"):
            run()
        assert run.ran == ["sft", "reward"]
    assert run() == ["split", "dpo"]
    assert not list((run.workdir / artifacts.LOCKS).iterdir())


def test_the_tree_shows_every_stage_beneath_its_last_input(run):
    drawn = run.tree()
    lines = drawn.splitlines()
    assert lines[0] == "base"
    assert [line.split("[")[0].strip("│├└─ ") for line in lines[1::2]] == ["sft", "reward", "split", "dpo"]
    depth = [line.index("──") for line in lines[1::2]]
    assert depth == sorted(set(depth))  # a chain: each hangs from the one before
    assert "missing (never run)" in lines[1] and "pairs=split/easy" in lines[-1]


def test_a_report_that_cannot_be_written_does_not_fail_a_finished_run(run, monkeypatch, capsys):
    def broken(workdir, shown):
        raise OSError("no space left")

    monkeypatch.setattr(pipeline.report, "write", broken)
    assert run() == ["sft", "reward", "split", "dpo"]
    assert "report: not written: OSError: no space left" in capsys.readouterr().err


def test_a_workdir_in_an_object_store(run, gcs):
    run.workdir = epath.Path("gs://bucket/pipeline")
    assert run() == ["sft", "reward", "split", "dpo"] and run() == []
    assert json.loads(gcs.content("pipeline/stages.json"))["sft"] == run.folder("sft").name
    run.folder("split").rmtree()
    assert run.states() == {"sft": "done", "reward": "done", "split": "missing", "dpo": "stale"}
    assert run() == ["split", "dpo"] and run() == []
    (aside,) = {name.split("/")[2] for name in gcs.names("pipeline/set_aside/")}
    assert aside.startswith(run.folder("dpo").name)
    assert f"pipeline/set_aside/{aside}/result.txt" in gcs.names()
    run.config.stages.split.threshold = 2.0
    assert "threshold: 1.0 -> 2.0" in run.tree()
