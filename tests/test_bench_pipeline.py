"""A short run of the quickstart's graph enters, as bench.py --what=pipeline starts it; what is told of its stages is
held against what the run itself wrote, and sums against counts by hand."""

import json
import re

import pytest

from mpo_jax import artifacts, metrics
from run_scripts.benchmarks import paths, pipeline
from run_scripts.benchmarks.recorder import Instant, Recorder, covered

SHORT = ["--stages=pairs", "--config.data.limit=160", "--config.model.dtype=float32"]
SHORT += ["--config.stages.sft.steps=4", "--config.stages.sft.eval_batches=1", "--config.stages.sft.log_every=1"]
SHORT += ["--config.stages.pairs.max_new_tokens=4", "--config.stages.pairs.samples=2"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What was told, and the folder in which the second run is left."""
    folder = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # with the tests' flags all compile in less
        return pipeline.run(SHORT, folder), folder / "run"


def test_each_stage_is_told_beside_what_its_manifest_says(measured):
    found, workdir = measured
    made = artifacts.finished_stages(workdir)
    assert list(found["cold"]["stages"]) == list(found["warm"]["stages"]) == list(made) == ["sft", "pairs"]
    for name, (folder, manifest) in made.items():
        stage = found["warm"]["stages"][name]
        assert 0 <= stage["seconds"] - manifest["seconds"] < 0.05 * stage["seconds"] + 0.5
        assert stage["tokens_per_second"] == pipeline.tokens_per_second(metrics.read(folder))
        assert (stage["tokens_per_second"] is None) == (name == "pairs")


def test_parts_are_parts_of_a_whole(measured):
    found, _ = measured
    for cache in ("cold", "warm"):
        stages, rest, whole = (found[cache][name] for name in ("stages", "rest", "whole"))
        for name in ("seconds", "cpu_seconds", "compile_seconds", "trace_seconds", "programs", "found"):
            assert sum(stage[name] for stage in stages.values()) + rest[name] == pytest.approx(whole[name])
        for part in (*stages.values(), rest, whole):
            assert part["compile_seconds"] + part["trace_seconds"] <= part["seconds"]
            assert 0 <= part["found"] <= part["programs"]
            assert part["idle"] == pytest.approx(1 - part["cpu_seconds"] / part["seconds"] / found["processors"])
            assert -0.05 < part["idle"] < 1
        assert all(stage["trace_seconds"] > 0 and stage["programs"] > 0 for stage in stages.values())


def test_the_second_run_finds_the_programs_of_the_first(measured):
    found, _ = measured
    for name in ("sft", "pairs"):
        cold, warm = (found[cache]["stages"][name] for cache in ("cold", "warm"))
        assert cold["programs"] == warm["programs"]
        assert cold["found"] < warm["found"] == warm["programs"]


def test_its_table_has_a_row_for_each_stage_and_cache(measured):
    found, _ = measured
    rows = re.findall(r"^\| (\w+) \| +([\d.]+) ", pipeline.table(found), re.MULTILINE)
    expected = [*found["cold"]["stages"].items(), ("rest", found["cold"]["rest"]), ("whole", found["cold"]["whole"])]
    assert rows[: len(expected)] == [(name, f"{row['seconds']:.1f}") for name, row in expected]
    assert len(rows) == 2 * len(expected)
    print(json.dumps(found))


def test_a_run_that_fails_ends_the_measurement_with_its_words(tmp_path):
    with pytest.raises(SystemExit, match=r"exit code 1; its last words: (.|\n)*stages.sft.steps"):
        pipeline.run(["--config.stages.sft.steps=-1"], tmp_path)


def test_spans_that_overlap_count_once():
    spans = [(4.0, 6.0), (1.0, 3.0), (2.0, 2.5), (2.5, 3.5), (9.0, 12.0), (-1.0, 0.5)]
    assert covered(spans, (0.0, 10.0)) == pytest.approx(0.5 + 2.5 + 2.0 + 1.0)
    assert covered(spans, (2.75, 5.0)) == pytest.approx(0.75 + 1.0)
    assert covered([], (0.0, 10.0)) == 0.0


def test_what_is_compiled_while_another_program_is_traced_is_compiling():
    recorder = Recorder()
    recorder.compiling, recorder.preparing, recorder.found = [(2.0, 3.0), (5.0, 6.0)], [(1.0, 4.0)], [2.5, 7.0]
    found = recorder.between(Instant(0.0, 10.0), Instant(5.5, 16.0))
    assert found == {
        "seconds": 5.5, "cpu_seconds": 6.0, "compile_seconds": 1.5, "trace_seconds": 2.0, "programs": 1, "found": 1,
    }  # fmt: skip


def test_tokens_a_second_are_those_of_steps_that_did_not_compile():
    compiled, step = {"step": 1, "tokens": 50.0}, {"step": 2, "tokens": 300.0, "seconds": 0.5}
    evaluation = {"step": 2, "eval/loss": 1.0}
    longer = {"step": 3, "tokens": 100.0, "seconds": 1.5}
    assert pipeline.tokens_per_second([compiled, step, evaluation, longer]) == 200.0
    replies = {"tokens": 999.0, "seconds": 1.0, "response_tokens": 40.0, "tokens_per_second": 20.0}
    more = {"tokens": 999.0, "seconds": 1.0, "response_tokens": 20.0, "tokens_per_second": 5.0}
    assert pipeline.tokens_per_second([replies, more]) == 10.0
    assert pipeline.tokens_per_second([compiled, evaluation]) is None


def test_all_but_one_folder_is_deleted(tmp_path):
    for name in ("compiled", "sft-1"):
        (tmp_path / "run" / name / "inside").mkdir(parents=True)
    (tmp_path / "run" / "stages.json").write_text("{}")
    paths.empty(tmp_path / "run", kept="compiled")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["compiled"]
    assert (tmp_path / "run" / "compiled" / "inside").is_dir()
    paths.empty(tmp_path / "new", kept="compiled")
    assert list((tmp_path / "new").iterdir()) == []
