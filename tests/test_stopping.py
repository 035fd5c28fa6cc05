"""Signals enter processes that listen; when they end, with which code and words, in one process and in two, leaves."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mpo_jax import stopping
from mpo_jax.errors import INTERRUPTED, PREEMPTED, Stopped
from tests.tools import processes

WORK = """
import sys, time
from mpo_jax import processes, stopping
if len(sys.argv) > 1:
    coordinator, count, index = (flag.split("=")[1] for flag in sys.argv[1:])
    processes.start(coordinator, int(count), int(index), False)
import jax
jax.devices()
slow = jax.process_index() + 1
with stopping.Notice():
    print("begun", flush=True)
    try:
        for batch in range(600):
            time.sleep(0.05 * slow)
            stopping.obey()
    finally:
        print("batch", batch, flush=True)
"""
"""Batches that one of two processes takes twice as long for: nothing but the stop makes them meet."""

LAST = """
import atexit, time
from mpo_jax import stopping
atexit.register(lambda: (print("leaving", flush=True), time.sleep(60 * WAIT), time.sleep(1), print("left")))
with stopping.Notice(last=True):
    print("begun", flush=True)
    for batch in range(600):
        time.sleep(0.05)
        stopping.obey()
"""
"""A process that takes a second, or a minute, to end after it has stopped."""

DEAF = """
import signal, time
import numpy as np
from mpo_jax import stopping
with stopping.Notice():
    big = np.random.default_rng(0).random((3000, 3000))
    print("begun", flush=True)
    np.linalg.svd(big)  # a minute in which the interpreter runs no handler
"""


def started(code: str, *arguments: str) -> subprocess.Popen:
    found = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=processes.ROOT, env=os.environ | processes.ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return found


def told(process: subprocess.Popen, *numbers: signal.Signals) -> tuple[int, str, str]:
    """Exit code, standard output and error of a process that is sent signals, a moment apart."""
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_ends_the_work_at_the_next_batch(number, code):
    process = started(WORK)
    assert process.stdout.readline() == "begun\n"
    found, out, error = told(process, number)
    assert found == code and out.startswith("batch ") and "Traceback" not in error


def test_the_fifth_signal_ends_what_does_not_listen_and_those_before_say_so():
    process = started(DEAF)
    assert process.stdout.readline() == "begun\n"
    found, _, error = told(process, *[signal.SIGINT] * 5)
    assert found == INTERRUPTED
    assert error.splitlines() == ["saving; a fifth signal ends it at once"] * 3 + ["ended at once"]


def test_signals_that_come_while_a_stopped_process_ends_change_nothing():
    process = started(LAST.replace("WAIT", "0"))
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "leaving\n"
    assert told(process, signal.SIGTERM, signal.SIGINT, signal.SIGTERM) == (PREEMPTED, "left\n", "")


def test_the_fifth_signal_ends_a_process_that_takes_long_to_end():
    process = started(LAST.replace("WAIT", "1"))
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "leaving\n"
    assert told(process, *[signal.SIGINT] * 4) == (INTERRUPTED, "", "ended at once\n")


def pair() -> list[subprocess.Popen]:
    port = processes.free_port()
    return [
        started(WORK, f"--coordinator=localhost:{port}", "--processes=2", f"--process={index}") for index in range(2)
    ]


@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_one_of_two_processes_is_told_and_both_end_behind_the_same_batch(number, to):
    both = pair()
    try:
        for process in both:
            while process.stdout.readline() != "begun\n":  # gloo speaks too
                assert process.poll() is None
        both[to].send_signal(number)
        ended = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [stopping.CODES[number]] * 2
    batches = [out.split("batch ")[1].split()[0] for out, _ in ended]
    assert batches[0] == batches[1], ended
    assert "Traceback" not in ended[0][1] + ended[1][1]


def test_loops_that_save_are_not_left_midway():
    with stopping.Notice() as notice:
        assert not stopping.told() and not stopping.reached()
        os.kill(os.getpid(), signal.SIGTERM)
        while not notice.told:
            time.sleep(0.01)
        with stopping.held():
            assert not stopping.told()
            stopping.obey()
            stopping.obey_here()
            assert stopping.reached()
        with pytest.raises(Stopped) as stopped:
            stopping.obey_alone("row 3")
        assert stopped.value.where == "row 3" and stopped.value.code == PREEMPTED
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not stopping.told(), "nothing listens any more"
