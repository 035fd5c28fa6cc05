"""Rows of a check of a GPU enter; its table, its verdict and its exit status leave, also where a part dies."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from run_scripts.benchmarks import kernels
from run_scripts.gpu import check, report, speed
from run_scripts.gpu.result import Part

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"date": "2026-01-01", "card": "a card, 80 GiB, driver 1"}


def rows(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def test_bounds_are_judged_and_nan_fails(tmp_path):
    part = Part("numbers", tmp_path / "numbers.json")
    part.at_most("small", 1.0, 2.0)
    part.at_most("large", 3.0, 2.0)
    part.at_least("share", float("nan"), 0.5)
    part.told("seconds", 0.25, "s", "of one | step")
    part.true("equal", True, "4 of 4", "all")
    assert [row["ok"] for row in part.rows] == [True, False, False, None, True]
    assert part.finish() == 1


def test_a_part_goes_on_after_what_breaks_and_says_where(tmp_path):
    part = Part("speed", tmp_path / "speed.json")
    with part.each("first"):
        raise ValueError("no such\ncard")
    with part.each("second"):
        part.told("second", 1)
    assert part.finish() == 1
    first, second = rows(tmp_path / "speed.json")
    assert first["ok"] is False and first["note"].startswith("no such card (test_gpu_check.py:")
    assert second["value"] == 1


def test_the_table_names_card_figures_bounds_and_failures(tmp_path):
    part = Part("speed", tmp_path / "speed.json")
    part.at_least("dpo 1B: share", 0.518, 0.45, note="of a | peak")
    part.at_most("plan and peak apart", 0.2, 0.1)
    part.finish()
    assert check.finish(tmp_path, MACHINE) == 1
    table = (tmp_path / "gpu.md").read_text()
    assert "- card: a card, 80 GiB, driver 1" in table
    assert "| dpo 1B: share | 0.518 | at least 0.45 | ok | of a \\| peak |" in table
    assert "| plan and peak apart | 0.2 | at most 0.1 | **failed** |  |" in table
    assert "- verdict: 1 failed (speed: plan and peak apart)" in table
    assert json.loads((tmp_path / "gpu.json").read_text())["machine"] == MACHINE


def test_parts_of_earlier_calls_stay_and_no_part_at_all_is_no_success(tmp_path):
    assert check.finish(tmp_path, MACHINE) == 1
    for name in ("speed", "numbers"):
        part = Part(name, tmp_path / f"{name}.json")
        part.at_most("x", 0.0, 1.0)
        part.finish()
    assert check.finish(tmp_path, MACHINE) == 0
    table = (tmp_path / "gpu.md").read_text()
    assert table.index("## numbers") < table.index("## speed") and "all 2 checks hold" in table


@pytest.mark.parametrize("left", [False, True])
def test_a_part_that_dies_is_a_failure_and_keeps_what_it_knew(tmp_path, monkeypatch, left):
    def dies(command, **_):
        if left:
            Part("whole", tmp_path / "whole.json").told("stages", "sft")
        return subprocess.CompletedProcess(command, -9)

    monkeypatch.setattr(check.subprocess, "run", dies)
    check.run_part("whole", tmp_path, "cpu")
    assert [row["name"] for row in rows(tmp_path / "whole.json")] == ["stages"] * left + ["the part itself"]
    assert check.finish(tmp_path, MACHINE) == 1
    assert "whole: did not come to its end" in report.verdict(
        {"whole": json.loads((tmp_path / "whole.json").read_text())}
    )


def test_the_script_refuses_a_part_that_is_not(tmp_path):
    command = [ROOT / "run_scripts" / "gpu_check.sh", tmp_path / "out", "--only=all", "--platform=cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    )
    assert done.returncode == 2 and "expected some of numbers, whole, speed" in done.stderr


def test_work_of_a_pair_by_hand():
    """One layer of width 2 with 1 head, feed-forward 3, vocabulary 32,000; a prompt of 2 and replies of 1."""
    case = speed.Timed("x", "dpo", "tiny", 1, 2, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(speed.SHAPES, "tiny", (2, 1, 1, 3))
        weights = 4 * 2 * 2 + 3 * 2 * 3
        seen = 3 + 2 * (2 + 1)  # of the prompt's two queries, then of one query in each reply
        forward = 2 * weights * 4 + 4 * 2 * seen + 2 * 2 * 32_000 * 2
        assert speed.flops(case) == 4 * forward
        # Two tokens each: weights once, then the caches of 2 and 3 columns, keys and values of 2 x 2 bytes.
        sample = speed.Timed("x", "sample", "tiny", 5, 2, 2)
        assert speed.decode_bytes(sample) == 2 * 2 * (weights + 2 * 32_000) + 5 * (2 + 3) * 8


def test_kernels_are_summed_by_name_and_gaps_between_them_are_idle():
    def plane(name, *streams):
        return SimpleNamespace(name=name, lines=[SimpleNamespace(name=n, events=events) for n, events in streams])

    def event(name, start, duration):
        return SimpleNamespace(name=name, start_ns=start * 1e9, duration_ns=duration * 1e9)

    gpu = plane(
        "/device:GPU:0",
        ("Stream #1", [event("gemm", 0, 2), event("copy", 3, 1), event("gemm", 5, 2)]),
        ("Stream #2", [event("copy", 1, 1.5)]),
        ("XLA Ops", [event("gemm", 0, 100)]),
    )
    found = kernels.summary(
        SimpleNamespace(planes=[gpu, plane("/host:CPU", ("Stream #1", [event("x", 0, 9)]))]), most=1
    )
    assert found == {"seconds": 6.5, "idle": 1.5, "kernels": [["gemm", 4.0, 2]]}
