"""The quickstart's own config enters, as its script starts it; the table leaves, the same after ten kills. Slow: a run
takes minutes of two cores. The script itself, with its install, is run by hand."""

import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.tools import kills, processes

pytestmark = pytest.mark.slow
CONFIG = "--config=configs/quickstart.py"
POLICIES = ("sft", "dpo", "mpo", "dpo_all", "ppo_sft")


@pytest.fixture(scope="module", autouse=True)
def as_users_run_it():
    """Compiled with all optimisation: training takes longer here than compiling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        patch.delenv("PJRT_NPROC", raising=False)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, as_users_run_it) -> Path:
    workdir = tmp_path_factory.mktemp("quickstart") / "run"
    processes.run(1, [CONFIG, f"--workdir={workdir}"], workdir.parent / "log")
    return workdir


def evaluation(workdir: Path) -> dict:
    return json.loads((kills.folder(workdir, "evaluate") / "report.json").read_text())


def output(workdir: Path) -> list[str]:
    return (workdir.parent / "log.0").read_text().splitlines()


def test_table_and_report(whole):
    report = evaluation(whole)
    assert tuple(report["policies"]) == POLICIES
    print(json.dumps(report["policies"], indent=1))
    assert report["policies"]["mpo"]["gold"] > report["policies"]["sft"]["gold"]
    lines = output(whole)
    place = next(n for n, line in enumerate(lines) if line.startswith("policy") and "KL to sft" in line)
    assert [line.split()[0] for line in lines[place + 1 : place + 6]] == list(POLICIES)
    assert lines[-1] == f"report: {whole / 'report.html'}" and (whole / "report.html").exists()


def test_a_second_run_trains_nothing_and_a_deleted_artifact_runs_with_its_dependents_alone(whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)

    def stages_run() -> set[str]:
        processes.run(1, [CONFIG, f"--workdir={workdir}"], workdir.parent / "log")
        return {line.split(":")[0] for line in output(workdir) if ": finished in" in line}

    began = time.monotonic()
    assert stages_run() == set()
    print(f"second run: {time.monotonic() - began:.1f} s")
    shutil.rmtree(kills.folder(workdir, "dpo_all"))
    assert stages_run() == {"dpo_all", "evaluate"}
    assert evaluation(workdir) == evaluation(whole)


def test_killed_at_ten_random_instants_ends_with_the_same_table(whole, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    draw = random.Random(0)
    for _ in range(10):
        (process,) = processes.start(1, [CONFIG, f"--workdir={workdir}"], log)
        try:
            process.wait(draw.uniform(8, 60))
            raise AssertionError(f"ended with {process.returncode} before it could be killed")
        except subprocess.TimeoutExpired:
            said = log.with_suffix(".0").read_text().splitlines()
            print(f"killed after: {said[-1] if said else 'nothing was said'}")
        finally:
            process.kill()
            process.wait()
    processes.run(1, [CONFIG, f"--workdir={workdir}"], log)
    assert evaluation(workdir) == evaluation(whole)
