"""Locks are taken, refused, waited for, lost and found stale; on file systems and on object stores."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from mpo_jax import artifacts, locks, stopping
from mpo_jax.errors import InputError
from tests.tools import processes

HOLD = """
import sys, time
from etils import epath
from mpo_jax import locks
with locks.held(epath.Path(sys.argv[1]), "stage sft"):
    print("held", flush=True)
    time.sleep(600)
"""

SHARED = """
import sys
from etils import epath
from mpo_jax import errors, locks, processes
coordinator, count, index, folders, seconds = (flag.split("=")[1] for flag in sys.argv[1:])
locks.SHARED_SECONDS = float(seconds)
processes.start(coordinator, int(count), int(index), False)
try:
    locks.check_shared(epath.Path(folders.split(",")[int(index)]))
except errors.InputError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "locks" / "sft-0.json"


@pytest.fixture
def quick(monkeypatch):
    """Locks whose counts move several times a second."""
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "STALE", 1.0)
    monkeypatch.setattr(locks, "_LOOK", 0.02)
    monkeypatch.setattr(locks, "_MOMENT", 0.2)


@contextlib.contextmanager
def holder(path):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=processes.ROOT, env=os.environ | processes.ENVIRONMENT,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_in_a_sentence_that_names_the_first_and_a_dead_one_is_taken_over(path, capsys):
    with holder(path) as first:
        with (
            pytest.raises(
                InputError, match=rf"stage sft is being worked on by process {first.pid} on {socket.gethostname()}"
            ),
            locks.held(path, "stage sft"),
        ):
            pass
        first.send_signal(signal.SIGKILL)
        while locks._started(first.pid):  # a zombie is no life
            time.sleep(0.01)
        with locks.held(path, "stage sft"):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert f"the lock of process {first.pid} on" in capsys.readouterr().err
    assert not path.exists()
    assert not list(path.parent.iterdir())


def test_what_ends_without_ado_gives_up_its_own_locks_alone(path):
    other = path.with_name("pairs-0.json")
    artifacts.write_json(other, {"nonce": "somebody's"})
    with locks.held(path, "stage sft"):
        locks.give_up()
        assert not path.exists() and other.exists()
        with locks.held(path, "stage sft"):
            assert path.exists(), "the next run is not refused"
    assert not path.exists()
    locks.give_up()  # nothing is held


def test_waiting_lasts_until_the_lock_is_free(path, quick, capsys):
    order = []
    with locks.held(path, "stage sft"):
        second = threading.Thread(target=lambda: [order.append("asked"), wait(path, order)])
        second.start()
        while "waiting for process" not in capsys.readouterr().err:
            time.sleep(0.01)
        order.append("released")
    second.join(60)
    assert order == ["asked", "released", "held"]


def wait(path, order):
    with locks.held(path, "stage sft", wait=True):
        order.append("held")


@pytest.mark.parametrize("moves", [True, False])
def test_of_another_machine_it_is_the_count_that_tells(path, quick, capsys, moves):
    content = {"host": "elsewhere", "machine": "another boot", "pid": 1, "started": "5", "since": "noon", "nonce": "n"}
    artifacts.write_json(path, content | {"count": 0})
    end = threading.Event()

    def beat() -> None:
        count = 0
        while not end.wait(0.3):
            count += 1
            artifacts.write_json(path, content | {"count": count})

    other = threading.Thread(target=beat)
    if moves:
        other.start()
    try:
        if moves:
            with pytest.raises(InputError, match="process 1 on elsewhere, since noon"), locks.held(path, "stage sft"):
                pass
        else:
            with locks.held(path, "stage sft"):
                pass
            assert "the lock of process 1 on elsewhere, since noon, is taken over" in capsys.readouterr().err
    finally:
        end.set()
        if moves:
            other.join()


def test_a_lock_that_was_cut_off_in_the_writing_is_taken_over(path, quick):
    path.parent.mkdir()
    path.write_text("")
    with locks.held(path, "stage sft"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_the_process_number_of_a_dead_holder_may_be_another_s(path):
    content = {"host": "here", "machine": locks._machine(), "pid": os.getpid(), "started": "1", "nonce": "n"}
    artifacts.write_json(path, content)
    with locks.held(path, "stage sft"):
        pass


@pytest.mark.parametrize("remote", [False, True])
def test_of_many_who_ask_at_once_one_gets_it(path, quick, monkeypatch, remote):
    monkeypatch.setattr(artifacts, "is_remote", lambda path: remote)
    found, ready, end = [], threading.Barrier(6), threading.Event()

    def ask() -> None:
        ready.wait()
        try:
            with locks.held(path, "stage sft"):
                found.append("held")
                end.wait(60)
        except InputError:
            found.append("refused")

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    while len(found) < 6:
        time.sleep(0.01)
    end.set()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["held"] + ["refused"] * 5


def test_a_run_whose_lock_was_taken_ends(path, quick, capsys):
    with stopping.Notice() as notice, locks.held(path, "stage sft"):
        artifacts.write_json(path, json.loads(path.read_text()) | {"nonce": "another"})
        until = time.monotonic() + 60
        while not notice.told and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(SystemExit) as stopped:
            stopping.obey()
        assert stopped.value.code == 1
    assert path.exists(), "the lock is the other's"
    assert "another run has taken this lock" in capsys.readouterr().err


@pytest.mark.parametrize("shared", [True, False])
def test_a_workdir_that_processes_do_not_share_is_told_by_all_in_seconds(tmp_path, shared):
    port = processes.free_port()
    folders = [tmp_path / "one", tmp_path / ("one" if shared else "two")]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, f"--coordinator=localhost:{port}", "--processes=2", f"--process={index}",
             f"--folders={folders[0]},{folders[1]}", f"--seconds={60 if shared else 0.5}"],
            cwd=processes.ROOT, env=os.environ | processes.ENVIRONMENT, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=100)[1] for process in started]
    lines = [[line for line in error.splitlines() if line.startswith("error: ")] for error in errors]
    if shared:
        assert lines == [[], []] and not list(folders[0].iterdir())
        return
    assert [process.returncode for process in started] == [1, 1], errors
    assert lines[0] == ["error: process 1 ended with an error; see its log"]
    assert len(lines[1]) == 1 and f"{folders[1]}: process 1 on" in lines[1][0] and "does not see" in lines[1][0]
