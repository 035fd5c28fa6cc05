"""What runs on a rented host: host.sh keeps and follows a run, install.sh brings a Python where there is none."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.deploy.scene import ROOT
from tests.tools.processes import PLAIN_SIGNALS

COMMIT = "c" * 40
RUN = """#!/usr/bin/env bash
echo "started $*"
trap 'echo saved; exit 75' TERM
while [[ ! -f "$HOME/end" ]]; do sleep 0.1; done
exit "$(cat "$HOME/end")"
"""


@pytest.fixture
def host(tmp_path):
    """A host's home, with a checkout whose Python is a script that runs until it is told."""
    code = tmp_path / "code"
    (code / "run_scripts").mkdir(parents=True)
    shutil.copy(ROOT / "run_scripts/host.sh", code / "run_scripts")
    (code / "COMMIT").write_text(COMMIT + "\n")
    program(code / ".venv/bin/python", RUN)
    return tmp_path


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def begin(host: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*PLAIN_SIGNALS, "bash", str(host / "code/run_scripts/host.sh"), *words],
        env={**os.environ, "HOME": str(host)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def call(host: Path, *words: str) -> tuple[int, str]:
    begun = begin(host, *words)
    said = begun.communicate(timeout=60)[0]
    return begun.returncode, said


def wait_for(found) -> None:
    for _ in range(600):
        if found():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")


def started(host: Path) -> int:
    log = host / ".mpo/run.log"
    return log.read_text().count("started") if log.exists() else 0


def test_a_run_is_kept_followed_and_its_code_told(host):
    first = begin(host, "run", "one", COMMIT, "--flag=a b")
    wait_for(lambda: started(host))
    os.killpg(first.pid, signal.SIGHUP)  # the connection ends
    first.wait(30)
    second = begin(host, "run", "two", COMMIT, "--flag=a b")
    assert second.stdout is not None and "commit" in second.stdout.readline()  # it follows
    (host / "end").write_text("3")
    assert second.stdout.read().count("started -m mpo_jax.main --flag=a b") == 1
    assert second.wait(30) == 3 and started(host) == 1
    assert call(host, "run", "one", COMMIT)[0] == 3, "the same start only tells its code"
    (host / "end").write_text("0")
    assert call(host, "run", "three", COMMIT)[0] == 0 and started(host) == 2


def test_stop_saves_and_waits(host):
    run = begin(host, "run", "one", COMMIT)
    wait_for(lambda: started(host))
    code, said = call(host, "stop")
    assert code == 0 and "ended with code 75" in said
    assert run.wait(30) == 75 and "saved" in call(host, "logs")[1]
    assert "no run on" in call(host, "stop")[1]


def test_a_run_that_is_killed_is_told(host):
    run = begin(host, "run", "one", COMMIT)
    wait_for(lambda: started(host))
    keeper = int((host / ".mpo/pid").read_text())
    os.killpg(keeper, signal.SIGKILL)
    assert "was killed" in run.communicate(timeout=60)[0] and run.returncode == 137


def test_another_commit_is_refused(host):
    code, said = call(host, "start", "d" * 40)
    assert code == 1 and f"has commit {COMMIT}; expected dddd" in said
    run = begin(host, "run", "one", COMMIT)
    wait_for(lambda: started(host))
    code, said = call(host, "run", "two", "d" * 40)
    assert code == 1 and "stop that run first" in said
    call(host, "stop")
    run.communicate(timeout=30)


def install(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    (folder / "run_scripts").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "run_scripts/install.sh", folder / "run_scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        if not (folder / name).exists():
            (folder / name).touch()
    path = f"{folder / 'bin'}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", str(folder / "run_scripts/install.sh"), ".[gcs]"],
        env={"HOME": str(folder / "home"), "PATH": path, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


UV = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/called"
[ "$1" = venv ] || exit 0
mkdir -p .venv/bin
printf '#!/bin/sh\\necho Python 3.12.9\\n' > .venv/bin/python
chmod +x .venv/bin/python
"""
OLD = '#!/bin/sh\n[ "$1" = -V ] && echo Python 3.10.12\nexit 1\n'
CURL = '#!/bin/sh\necho "$*" >> "$(dirname "$0")/fetched"\ncat "$(dirname "$0")/installer"\n'


def test_an_old_python_is_passed_over_for_uvs_own(tmp_path):
    program(tmp_path / "bin/python3", OLD)
    program(tmp_path / "uv", UV)
    done = install(tmp_path, UV=str(tmp_path / "uv"))
    assert done.returncode == 0 and "installed: Python 3.12.9" in done.stdout, done.stderr
    venv, pip = (tmp_path / "called").read_text().splitlines()
    assert venv == "venv --quiet --managed-python --python 3.12 .venv"
    assert pip == "pip install --quiet --python .venv/bin/python -c constraints.txt -e .[gcs]"
    assert install(tmp_path, UV=str(tmp_path / "uv")).returncode == 0
    assert len((tmp_path / "called").read_text().splitlines()) == 2, "a second call does nothing"


def test_a_python_without_venv_is_passed_over_too(tmp_path):
    program(tmp_path / "bin/python3", '#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\n')
    program(tmp_path / "bin/uv", UV)
    assert install(tmp_path).returncode == 0 and (tmp_path / "bin/called").exists()


def test_uv_is_fetched_where_it_is_nowhere(tmp_path):
    program(tmp_path / "bin/python3", OLD)
    program(tmp_path / "bin/curl", CURL)
    program(tmp_path / "uv.template", UV)
    (tmp_path / "bin/installer").write_text(
        f'mkdir -p "$UV_INSTALL_DIR"; cp {tmp_path}/uv.template "$UV_INSTALL_DIR/uv"\n'
    )
    done = install(tmp_path)
    assert done.returncode == 0 and (tmp_path / "home/.local/bin/called").exists(), done.stderr
    assert "https://astral.sh/uv/" in (tmp_path / "bin/fetched").read_text()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"UV": "/nowhere/uv"}, "error: UV: /nowhere/uv: no such program; expected uv's own file"),
        ({"PYTHON": "python3"}, "error: python3 is Python 3.10.12; expected Python 3.11 or newer"),
        ({}, "error: uv can't be fetched; give a Python of 3.11 or newer with PYTHON=..., or uv's file with UV=..."),
    ],
)
def test_what_can_not_be_installed_is_told(tmp_path, given, words):
    program(tmp_path / "bin/python3", OLD)
    program(tmp_path / "bin/curl", "#!/bin/sh\nexit 6\n")
    done = install(tmp_path, **given)
    assert done.returncode != 0 and words in done.stderr
