"""Processes of a run die, fail, end or abort; how the others end, with which words, leaves."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import jax
import pytest

from mpo_jax import peers
from mpo_jax.errors import PREEMPTED
from tests.tools import processes

WORK = """
import os, sys, time
import numpy as np
from mpo_jax import peers, processes
from mpo_jax.errors import InputError
coordinator, count, index, work = (flag.split("=")[1] for flag in sys.argv[1:])
processes.start(coordinator, int(count), int(index), False)
import jax
from jax.experimental import multihost_utils
peers.BEAT, peers.SILENT = 0.2, 3.0
last = int(index) == int(count) - 1
with peers.watched(lambda: print("let go", flush=True)):
    multihost_utils.process_allgather(np.zeros(1))
    print("begun", flush=True)
    if work == "meet":
        while True:
            multihost_utils.process_allgather(np.zeros(1))
            time.sleep(0.05)
    if work == f"fail{index}":
        raise KeyError("a fault")
    if work in (f"full{index}", "full"):
        raise InputError("the disk is full")
    if last and work == "abort":
        os.abort()
    time.sleep(0 if last and work == "end" else 6 if work == "end" else 120)
time.sleep(8 if last else 0)
"""
"""What the last process does, while the others sleep."""


@contextlib.contextmanager
def begun(work: str, count: int = 2) -> Iterator[list[subprocess.Popen]]:
    """Processes that have met once."""
    port = processes.free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, f"--coordinator=localhost:{port}", f"--processes={count}",
             f"--process={index}", f"--work={work}"],
            cwd=processes.ROOT, env=os.environ | processes.ENVIRONMENT, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for index in range(count)
    ]  # fmt: skip
    try:
        for each in started:
            while (line := each.stdout.readline()) != "begun\n":  # gloo speaks too
                assert line, each.stderr.read()
        yield started
    finally:
        for each in started:
            each.kill()


def told(process: subprocess.Popen) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=100)
    return process.returncode, out, error


def test_all_others_end_where_one_falls_silent_and_are_told_which():
    with begun("sleep", 3) as started:
        started[2].send_signal(signal.SIGKILL)
        for each in started[:2]:
            code, out, error = told(each)
            assert code == PREEMPTED and out == "let go\n"
            expected = f"process 2 on {socket.gethostname()} has not been heard from for 3 s; {peers.ADVICE}"
            assert error.strip().splitlines()[-1] == expected and "Traceback" not in error


def test_a_broken_connection_ends_the_other_at_once_without_a_traceback():
    with begun("meet") as (first, second):
        second.send_signal(signal.SIGKILL)
        code, out, error = told(first)
        assert code == PREEMPTED and "let go" in out
        assert error.strip().splitlines()[-1] == peers.ADVICE and "Traceback" not in error


def test_process_0_with_the_service_is_killed_and_the_abort_of_jax_becomes_a_stop():
    with begun("sleep") as (first, second):
        first.send_signal(signal.SIGKILL)
        code, out, error = told(second)
        assert code == PREEMPTED and out == "let go\n"
        assert error.strip().splitlines()[-1] == peers.ADVICE


@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_error_of_one_alone_ends_all_and_is_its_own(who):
    with begun(f"fail{who}") as started:
        code, _, error = told(started[1 - who])
        assert code == 1 and "Traceback" not in error
        told_last = f"process {who} on {socket.gethostname()} has ended with an error: see its log"
        assert error.strip().splitlines()[-1] == told_last
        code, _, error = told(started[who])
        assert code == 1 and "KeyError: 'a fault'" in error


@pytest.mark.parametrize("who", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_one_alone_can_not_use_is_told_by_all(who):
    """As a disk that is full while process 0 writes there."""
    with begun(f"full{who}") as started:
        code, out, error = told(started[1 - who])
        assert code == 1 and "Traceback" not in error and "let go" in out
        told_last = f"process {who} on {socket.gethostname()} has ended with an error: the disk is full"
        assert error.strip().splitlines()[-1] == told_last
        code, _, error = told(started[who])
        assert code == 1 and "InputError: the disk is full" in error


def test_what_none_can_use_is_told_by_each_as_its_own():
    with begun("full") as started:
        for each in started:
            code, _, error = told(each)
            assert code == 1 and error.strip().splitlines()[-1].endswith("InputError: the disk is full")


@pytest.mark.slow
def test_a_fault_of_a_process_itself_stays_an_abort():
    with begun("abort") as (first, second):
        assert told(second)[0] == -signal.SIGABRT
        assert told(first)[0] == PREEMPTED


def test_a_process_that_has_come_to_its_end_is_not_waited_for():
    with begun("end") as started:
        assert [told(each)[0] for each in started] == [0, 0]


@pytest.mark.parametrize(
    ("words", "dead"),
    [
        ("UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:384: "
         "Connection reset by peer", True),
        ("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [10.0.0.2]:51200", True),
        ("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited or there was a network error", True),
        ("UNKNOWN: Gloo AllGather failed: Timed out waiting 30000ms for recv operation to complete", False),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.", False),
    ],
)  # fmt: skip
def test_errors_of_a_broken_connection_are_told_from_others(words, dead):
    error = jax.errors.JaxRuntimeError(words)
    outer = RuntimeError("a save failed")
    outer.__cause__ = error
    assert peers.is_of_the_dead(outer) is dead
    assert peers.is_of_the_dead(error) is dead
    assert peers.is_of_the_dead(ValueError(words)) is dead
    assert not peers.is_of_the_dead(OSError(words))
