"""Rows of a check of a GPU enter; its table, its verdict and its exit status leave, also where a part dies."""

import json
import subprocess
import sys
import time
import weakref
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
    class Dead:
        pid = 1 << 30

        def __init__(self, command, **_):
            if left:
                Part("whole", tmp_path / "whole.json").told("stages", "sft")

        def wait(self, timeout=None):
            return -9

    monkeypatch.setattr(check.subprocess, "Popen", Dead)
    check.run_part("whole", tmp_path, "cpu")
    assert [row["name"] for row in rows(tmp_path / "whole.json")] == ["stages"] * left + ["the part itself"]
    assert check.finish(tmp_path, MACHINE) == 1
    assert "whole: did not come to its end" in report.verdict(
        {"whole": json.loads((tmp_path / "whole.json").read_text())}
    )


def test_a_part_that_is_stopped_leaves_no_process(tmp_path, monkeypatch):
    """The stage that it had started would go on, and hold the card that the next part wants."""
    child = "import subprocess, sys, time\n"
    child += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=open(sys.argv[1], 'w'))\n"
    child += "time.sleep(60)\n"
    real = subprocess.Popen
    started = []

    def begin(command, **options):
        started.append(real([sys.executable, "-c", child, str(tmp_path / "held")], start_new_session=True))
        ends = time.monotonic() + 60
        while not (tmp_path / "held").exists() and time.monotonic() < ends:
            time.sleep(0.01)
        return started[-1]

    monkeypatch.setattr(check.subprocess, "Popen", begin)
    monkeypatch.setitem(check._SECONDS, "whole", 1)
    check.run_part("whole", tmp_path, "cpu")
    assert rows(tmp_path / "whole.json")[0]["value"] == "stopped after 1 seconds"
    group = started[0].pid
    left = [path for path in Path("/proc").glob("[0-9]*/stat") if _group(path) == group]
    assert (tmp_path / "held").exists() and not left


def _group(stat: Path) -> int:
    """Of a process, 0 of one that has ended meanwhile or waits for its parent to hear of it."""
    try:
        state, _, group = stat.read_text().rsplit(")", 1)[1].split()[:3]
    except OSError:
        return 0
    return 0 if state == "Z" else int(group)


def call_script(*arguments, **environment):
    given = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable} | environment
    command = [ROOT / "run_scripts" / "gpu_check.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=given)


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--only=all", "--platform=cpu"], {}, "expected some of numbers, whole, speed"),
        (["--only", "all", "--platform", "cpu"], {}, "expected some of numbers, whole, speed"),
        (["--only"], {}, "--only needs a value"),
        (["--wheels=nowhere"], {}, "--wheels: no wheels in nowhere"),
        (["--platform=cpu"], {"XLA_PYTHON_CLIENT_MEM_FRACTION": "much"}, "expected a number above 0 and up to 1"),
    ],
)
def test_the_script_refuses_in_one_line(tmp_path, arguments, environment, words):
    done = call_script(tmp_path / "out", *arguments, **environment)
    assert done.returncode in (1, 2) and words in done.stderr and "Traceback" not in done.stderr


def test_without_a_card_nothing_is_measured_on_the_cpu_instead(tmp_path):
    done = call_script(tmp_path / "out", "--only=speed")
    assert done.returncode == 1 and "JAX finds no NVIDIA GPU here" in done.stderr
    assert not (tmp_path / "out" / "gpu.json").exists()


def test_cases_that_are_not_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed", f"--out={tmp_path / 'speed.json'}", "--platform=cpu", "--cases=dpo 9B"])
    with pytest.raises(SystemExit):
        speed.main()
    assert "--cases: no dpo 9B; expected some of dpo XS" in capsys.readouterr().err


def test_a_case_beside_torch_can_be_named(tmp_path, monkeypatch):
    asked = []

    def run(command, path):
        asked.append(path.stem)
        return {"flops": 1.0, "bandwidth": 1.0, "side": 1, "bytes": 1, "best": 1.0, "compiled": True, "versions": "",
                "device_peak_MiB": None}  # fmt: skip

    monkeypatch.setattr(speed, "run", run)
    given = ["speed", f"--out={tmp_path / 'speed.json'}", "--platform=cpu", "--cases=dpo XS, torch,reward XS, torch"]
    monkeypatch.setattr(sys, "argv", given)
    assert speed.main() == 0
    assert asked == ["peaks", "dpo_XS,_torch", "reward_XS,_torch"]


@pytest.mark.parametrize(
    ("told", "card"),
    [
        ("echo 'NVIDIA H100, 81559 MiB, 580.1'", "NVIDIA H100, 81559 MiB, driver 580.1"),
        ("echo NVIDIA-SMI has failed; exit 9", "unknown (nvidia-smi fails)"),
        ("echo No devices were found", "unknown (nvidia-smi tells of no card)"),
    ],
)
def test_a_card_is_told_or_said_to_be_unknown(tmp_path, monkeypatch, told, card):
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{told}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert check.describe("gpu")["card"] == card


def test_a_share_of_the_card_is_given_under_one_name_and_shared_by_parts_side_by_side(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.85")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    for name, share in (("speed", "0.85"), ("whole", "0.3")):
        given = check.environment("gpu", name)
        assert given["XLA_PYTHON_CLIENT_MEM_FRACTION"] == share and "XLA_CLIENT_MEM_FRACTION" not in given


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


def test_what_the_card_has_no_room_for_and_a_torch_without_a_card_are_not_run(tmp_path, monkeypatch):
    peaks = {"flops": 1e12, "bandwidth": 1e11, "side": 8, "bytes": 8, "limit": 24 << 30}
    monkeypatch.setattr(speed, "run", lambda command, path: peaks)
    monkeypatch.setattr(speed, "torch_sees_card", lambda: False)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: name)
    given = ["speed", f"--out={tmp_path / 'speed.json'}", "--platform=gpu", "--cases=dpo 1B"]
    monkeypatch.setattr(sys, "argv", given)
    assert speed.main() == 0
    told = {row["name"]: (row["value"], row["note"]) for row in rows(tmp_path / "speed.json")}
    assert told["torch"] == ("not run", "the torch that is installed sees no card")
    assert told["dpo 1B"] == ("not run", "it needs 42 GiB")


def test_the_eager_loop_begins_when_the_models_of_the_compiled_one_are_gone(torch, tmp_path, monkeypatch):
    """An error holds them by its traceback, and a card has no room for both."""
    from run_scripts.gpu import torch_loop

    class Model:
        pass

    held = []

    def measured(given, device, compiled):
        if not compiled:
            assert held[0]() is None
            return {"compiled": False}
        model = Model()
        held.append(weakref.ref(model))
        raise RuntimeError("no triton")

    monkeypatch.setattr(torch_loop, "measured", measured)
    monkeypatch.setattr(sys, "argv", ["torch_loop", "--what=dpo", "--shape=XS", f"--json={tmp_path / 'a.json'}"])
    assert torch_loop.main() == 0
    assert json.loads((tmp_path / "a.json").read_text()) == {"compiled": False, "compile_error": "RuntimeError"}


def test_the_part_that_needs_pytest_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["check", str(tmp_path), "--only=numbers", "--platform=cpu"])
    with pytest.raises(SystemExit, match="the part numbers needs pytest"):
        check.main()
