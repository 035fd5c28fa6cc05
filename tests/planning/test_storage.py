"""What the plan says of disk, against what a run writes."""

import jax
import pytest
from etils import epath

from mpo_jax import artifacts, checkpoint, disk, pipeline, recipes, settings, sharding
from mpo_jax.planning import chips, report, stages, storage
from mpo_jax.planning.estimate import Assumptions
from mpo_jax.planning.storage import Storage
from mpo_jax.stages import kinds
from tests.planning import case


def test_a_graph_peaks_where_a_stage_stands_on_what_those_before_left():
    first, second = Storage(weights=10, states=60, rows=1), Storage(weights=10, states=90, rows=2)
    assert (first.rest, first.peak) == (11, 61)
    assert storage.peak([first, second]) == 11 + 92
    assert storage.peak([second, first]) == 92
    assert storage.peak([]) == 0


def test_the_plan_s_disk_is_a_real_run_s_to_ten_percent(tmp_path, shared, monkeypatch):
    """SFT of a real model on real pairs, whose held-out loss falls at every step, so that each state names weights of
    its own."""
    config = recipes.config()
    config.model.path = str(shared / "models/stories260K")
    config.data.path = str(shared / "data/hh_rlhf/harmless-base/test.jsonl.gz")
    config.data.split, config.data.limit = "all", 120
    config.data.max_length, config.data.max_response, config.data.max_buckets = 64, 24, 1
    few = {"batch_size": 8, "steps": 5, "save_every": 1, "eval_every": 1, "eval_batches": 1, "learning_rate": 3e-4}
    config.stages.sft = recipes.stage("sft", **few)
    config = kinds.read(config.to_dict())
    workdir, largest, save = epath.Path(tmp_path / "run"), [0], checkpoint.Checkpoints.save

    def sizes(checkpoints) -> dict[str, int]:
        found = epath.Path(checkpoints._name).glob("*/*")
        return {f"{path.parent.name}/{path.name}": disk.size(path) for path in found if path.name.isdigit()}

    def saved(self, *arguments):
        before = {name: size for name, size in sizes(self).items() if name.startswith("last/")}
        save(self, *arguments)
        self.wait()
        # The oldest goes as soon as the new one is whole: for a moment both are there.
        largest[0] = max(largest[0], sum((before | sizes(self)).values()))

    monkeypatch.setattr(checkpoint.Checkpoints, "save", saved)
    pipeline.run(config, workdir, sharding.make_mesh(devices=jax.devices()[:1]))

    place = chips.topology("cpu")
    place = chips.Topology(place.name, place.chip, place.devices[:1], compiled=True)
    job = stages.jobs(config, place)["sft"]
    with jax.set_mesh(job.mesh):
        planned = storage.of_stage(job, kinds.of(job.settings).programs(job), Assumptions(pairs=120))
    folder = artifacts.stage_folders(workdir)["sft"]
    weights, rows = disk.size(folder / artifacts.WEIGHTS), disk.size(workdir / artifacts.CACHE)
    print(f"weights {weights:,}, planned {planned.weights:,}; checkpoints {largest[0]:,}, planned {planned.states:,}")
    assert weights == pytest.approx(planned.weights, rel=0.1)
    assert largest[0] == pytest.approx(planned.states, rel=0.1)
    assert not (folder / artifacts.CHECKPOINTS).exists()
    assert 0 < rows < planned.rows + (64 << 10)


def test_snapshots_are_counted_of_the_policy_alone(monkeypatch):
    monkeypatch.setattr(stages.presets, "find", lambda path: case.model())
    config = settings.replaced(case.config(), {"stages.sft.snapshots": 2, "stages.mpo.snapshots": 3})
    jobs = stages.jobs(config, case.one_cpu(), ["sft", "mpo"])
    plans = {name: stages.plan(job, case.one_cpu(), Assumptions(), ["none"]) for name, job in jobs.items()}
    sft, mpo = plans["sft"].storage, plans["mpo"].storage
    assert sft.snapshots == 2 * sft.weights and sft.rest == 3 * sft.weights + sft.rows
    assert mpo.snapshots == 3 * sft.weights < 3 * mpo.weights, "the critic is not kept"
    assert mpo.peak == mpo.states + mpo.rows + mpo.snapshots
    assert "snapshots" in report.lines("sft", plans["sft"])


def test_the_report_says_it_for_each_stage_and_for_all(monkeypatch):
    monkeypatch.setattr(stages.presets, "find", lambda path: case.model())
    place = case.one_cpu()
    jobs = stages.jobs(case.config(), place, ["sft", "split"])
    plans = {name: stages.plan(job, place, Assumptions(), ["none"]) for name, job in jobs.items()}
    sft, split = plans["sft"].storage, plans["split"].storage
    assert split.weights == split.states == 0 and split.rows > 0
    # AdamW: parameters and two moments in float32; 3 states with the weights they name as the best.
    assert sft.states == pytest.approx(3 * 4 * sft.weights, rel=0.01)
    assert report.lines("sft", plans["sft"]).startswith("    disk of sft: ")
    told = report.as_json(place, jobs["sft"].mesh.shape, plans, {}, Assumptions())
    assert told["disk_bytes_at_rest"] == sft.rest + split.rest
    assert told["disk_bytes_at_peak"] == max(sft.peak, sft.rest + split.peak)
    assert told["stages"]["sft"]["disk"]["weights"] == sft.weights
