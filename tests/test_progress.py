"""Long work enters, on a terminal of so many columns and in a log with a made-up clock; what is shown is looked at.

The terminal is a pty, whose bytes `pyte`, a terminal emulator that is not ours, makes a screen of.
"""

import contextlib
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import threading

import pyte
import pytest

from mpo_jax import progress
from mpo_jax.progress import Screen, Work, line, sentence, words
from tests.tools.processes import PATH, ROOT


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Quiet(Screen):
    """A screen that is looked at by the test alone, not by a thread."""

    def _wake(self) -> None:
        pass


@pytest.fixture
def log():
    clock, stream = Clock(), io.StringIO()
    return Quiet(stream, clock), clock, stream


def test_work_that_is_done_aside_is_not_shown(log, monkeypatch, capsys):
    screen, clock, stream = log
    monkeypatch.setattr(progress, "SCREEN", screen)
    with progress.aside():
        for _ in progress.each(range(3), "score", 3):
            clock.now += 100
            screen.tick()
        progress.say("an account of the data")
        assert progress.is_aside()
    assert (stream.getvalue(), capsys.readouterr().out) == ("", "")
    assert not progress.is_aside()
    threads = []
    with progress.aside():  # another thread's work is shown
        thread = threading.Thread(target=lambda: threads.append(progress.is_aside()))
        thread.start()
        thread.join()
    assert threads == [False]


# Words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (100, "1 min 40 s"),
        (599.4, "9 min 59 s"),
        (599.6, "10 min"),
        (3570, "1 h"),
        (7800, "2 h 10 min"),
        (86_400, "1 d"),
        (3 * 86_400 + 4 * 3600 + 60, "3 d 4 h"),
    ],
)
def test_durations_are_said_as_one_says_them(seconds, said):
    assert words(seconds) == said


def test_rate_and_time_left_leave_out_what_was_done_before_and_compiling():
    work = Work("score", 100, 40, now=1000.0)
    assert work.rate(1010.0) is None and work.left(1010.0) is None
    assert sentence(work, 1010.0) == "score: 40 of 100 (40 %)"
    work.add(20)
    assert work.rate(1010.0) == 2.0  # 20 of its own in 10 s
    assert work.left(1010.0) == 20.0  # 40 to go
    work.compiled = 5.0
    assert work.rate(1010.0) == 4.0 and work.left(1010.0) == 10.0
    assert sentence(work, 1010.0) == "score: 60 of 100 (60 %), 4.0/s, 10 s left"
    work.add(1000)
    assert work.n == 100, "the last of several items may be smaller"


def test_work_of_unknown_size_has_a_rate_and_no_end():
    work = Work("read", None, 0, now=0.0)
    work.add(3000)
    assert sentence(work, 2.0) == "read: 3,000, 1,500.0/s"
    assert line(work, None, 2.0, 79) == "read 3,000 00:02 1,500.0/s"


def test_a_line_leaves_out_what_does_not_fit():
    work = Work("train", 200, 0, now=0.0)
    work.notes = {"loss": "0.2500", "accuracy": "0.7500"}
    work.add(50)
    whole = line(work, None, 100.0, 120)
    assert whole == f"train  25% [{'#' * 10}{'.' * 30}] 50/200 01:40<05:00 2.0 s each loss 0.2500 accuracy 0.7500"
    # The second note goes first, then the bar, then the first note, then the rate.
    assert line(work, None, 100.0, 66) == "train  25% [###........] 50/200 01:40<05:00 2.0 s each loss 0.2500"
    assert line(work, None, 100.0, 60) == "train  25% 50/200 01:40<05:00 2.0 s each loss 0.2500"
    assert line(work, None, 100.0, 39) == "train  25% 50/200 01:40<05:00"
    for width in range(1, 130):
        shown = line(work, ("update", 12.0), 100.0, width)
        assert len(shown) <= width
        assert ("00:12" in shown) == (width >= len("train  25% compiling update 00:12"))


# A log ----------------------------------------------------------------------------------------------------------------


def test_a_log_gets_a_line_a_minute_of_long_work_alone(log):
    screen, clock, stream = log
    long = screen.begin("train", 100, 0)
    for second in range(1, 151):
        clock.now = float(second)
        long.n = second // 2
        short = screen.begin("evaluate", 4, 0)  # within the work, and over within the second
        short.n = 4
        screen.tick()
        screen.end(short)
    assert stream.getvalue() == (
        "train: 30 of 100 (30 %), 2.0 s each, 2 min 20 s left\ntrain: 60 of 100 (60 %), 2.0 s each, 1 min 20 s left\n"
    )
    long.n = 100
    screen.end(long)
    assert stream.getvalue().endswith("\ntrain: 100 done in 2 min 30 s\n")


def test_a_log_is_told_of_work_within_work_and_of_compiling(log):
    screen, clock, stream = log
    train = screen.begin("train", 10, 0)
    clock.now, train.n = 40.0, 4
    evaluate = screen.begin("evaluate", 8, 0)
    clock.now = 50.0
    screen.compiling("evaluate")
    clock.now = 60.0
    screen.tick()
    clock.now = 90.0
    screen.compiled()
    assert stream.getvalue().split("\n")[:-1] == [
        "train: 4 of 10 (40 %), 12.5 s each, 1 min 15 s left; evaluate: 0 of 8 (0 %); compiling evaluate, 10 s so far",
        "compiled evaluate in 40 s",
    ]
    clock.now, evaluate.n = 95.0, 1
    assert evaluate.rate(95.0) == 1 / 15  # 55 s, 40 of which compiled


def test_programs_that_compile_beside_each_other_are_told_together(log):
    screen, clock, stream = log
    work = screen.begin("train", 10, 0)
    clock.now = 10.0
    compiled = threading.Barrier(3), threading.Barrier(3)

    def compiling(name: str) -> None:
        screen.compiling(name)
        for each in compiled:
            each.wait()
        screen.compiled()

    screen.compiling("train")
    threads = [threading.Thread(target=compiling, args=(name,)) for name in ("evaluate", "score")]
    for thread in threads:
        thread.start()
    compiled[0].wait()
    clock.now = 70.0
    screen.tick()
    clock.now = 90.0
    screen.compiled()
    assert work.waits == 10.0, "the others still compile"
    clock.now = 110.0
    compiled[1].wait()
    for thread in threads:
        thread.join()
    assert stream.getvalue().split("\n")[:-1] == [
        "train: 0 of 10 (0 %); compiling train and 2 more, 1 min so far",
        "compiled train in 1 min 20 s",
    ]
    work.n = 1
    assert work.rate(120.0) == 1 / 20, "120 s, 100 of which compiled"


def test_a_log_of_short_work_stays_as_it_was(log):
    screen, clock, stream = log
    for _ in range(100):  # each of 4 s, and something is said between them
        work = screen.begin("score", 1, 0)
        screen.compiling("score")
        clock.now += 4
        screen.tick()
        screen.compiled()
        work.n = 1
        screen.end(work)
        screen.say("scored", stream)
    assert stream.getvalue() == "scored\n" * 100


def test_work_that_fails_leaves_no_line_and_no_work(log, monkeypatch):
    screen, clock, stream = log
    monkeypatch.setattr(progress, "SCREEN", screen)

    def fail():
        for item in progress.each(range(10), "score", 10):
            clock.now += 70
            screen.tick()
            if item == 1:
                raise KeyError(item)

    with pytest.raises(KeyError), progress.shown(first=True):
        fail()
    assert screen._works == [] and "done" not in stream.getvalue()
    assert stream.getvalue().count("score: ") == 2


def test_other_processes_show_nothing(log, monkeypatch):
    screen, clock, stream = log
    monkeypatch.setattr(progress, "SCREEN", screen)
    with progress.shown(first=False):
        assert list(progress.each([7, 8], "score", 2)) == [7, 8]
        with progress.work("sample", 5) as work:
            clock.now = 1000.0
            screen.tick()
            work.add(5)
    assert stream.getvalue() == "" and screen.shown


# A terminal -----------------------------------------------------------------------------------------------------------

SCRIPT = """
import signal, sys, warnings
from mpo_jax import progress
from tests.test_progress import Clock, Quiet

clock = Clock()
screen = progress.SCREEN = Quiet(clock=clock)
signal.signal(signal.SIGTERM, lambda *_: progress.say("stopped at step 3", sys.stderr))
with progress.shown(first=True):
    with progress.work("train", 10) as train:
        train.notes = {"loss": "0.1234"}
        for step in range(1, 6):
            clock.now = 10.0 * step
            train.n = step
            screen.tick()
            if step == 1:
                progress.say("rows: " + "r" * 100)
            if step == 2:
                with progress.work("evaluate", 4) as evaluate:
                    clock.now += 5
                    evaluate.n = 1
                    screen.tick()
            if step == 3:
                signal.raise_signal(signal.SIGTERM)
            if step == 4:
                warnings.warn("a warning of somebody")
        train.n = 10
progress.say("that is all")
"""


def on_terminal(script: str, columns: int) -> bytes:
    """All that a script writes to a terminal that wide."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = os.environ | {"PYTHONPATH": PATH, "PYTHONWARNINGS": "always"}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment
    ) as process:
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError), open(ours, "rb", buffering=0) as stream:  # it ends when nobody writes
            while block := stream.read(4096):
                written += block
    assert process.returncode == 0, written.decode()
    return written


def shown(written: bytes, columns: int) -> list[str]:
    """The lines of a terminal that wide after it was sent that."""
    screen = pyte.Screen(columns, 24)
    pyte.ByteStream(screen).feed(written)
    return [line.rstrip() for line in screen.display if line.strip()]


def wrapped(text: str, columns: int) -> list[str]:
    return [text[start : start + columns].rstrip() for start in range(0, len(text), columns)]


@pytest.mark.parametrize("columns", [80, 40])
def test_messages_do_not_tear_the_line_of_a_terminal(columns):
    written = on_terminal(SCRIPT, columns)
    rows = wrapped("rows: " + "r" * 100, columns)
    warning = [line for line in shown(written, columns) if "warning" in line or "Warning" in line]
    everything = shown(written, columns)
    # What was said stands whole, in order, and no line of progress is left.
    assert everything[: len(rows)] == rows
    assert everything[len(rows)] == "stopped at step 3"
    assert "".join(everything[len(rows) + 1 : -1]).endswith("a warning of somebody")
    assert warning and everything[-1] == "that is all"
    assert not any("/10" in line or "/4" in line for line in everything)
    # While the work went on: one line beneath all others, and never more than one, nor a wider one.
    drawn = written.split(b"\x1b[K")[:-1]
    lasts = []
    for count in range(1, len(drawn) + 1):
        display = shown(b"\x1b[K".join(drawn[:count]) + b"\x1b[K", columns)
        assert sum("%" in line for line in display) <= 1
        assert all("%" not in line for line in display[:-1])
        lasts += [display[-1]] if display and "%" in display[-1] else []
    bar = " [####............] " if columns == 80 else " "
    assert lasts[0].startswith("train  10%") and " 1/10 00:10<01:30" in lasts[0]
    assert any(last.startswith("evaluate  25%") and " 1/4 00:05<00:15" in last for last in lasts)
    assert lasts[-1].startswith("train  50%") and " 5/10 00:50<00:50" in lasts[-1]
    assert bar and ("[" in lasts[-1]) == ("loss 0.1234" in lasts[-1]) == (columns == 80)


def test_a_thread_draws_while_a_step_goes_on():
    """With the clock as it is: the script ends when the line has been drawn, by nobody but that thread."""
    script = (
        "import time\nfrom mpo_jax import progress\n"
        "with progress.work('score', 3) as work:\n"
        "    work.n = 1\n"
        "    while not progress.SCREEN._drawn:\n        time.sleep(0.01)\n"
    )
    written = on_terminal(script, 80)
    assert b"score  33%" in written and shown(written, 80) == []
