"""Long pieces of work enter, each with how far it has come; a line on the terminal, or one a minute in a log, leaves.

On a terminal (standard error) one line at the bottom is drawn again and again, of the innermost work alone. Whatever
else is printed meanwhile goes through `say`, which takes that line away first. A log gets whole lines alone.
"""

import atexit
import contextlib
import dataclasses
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

TERMINAL_SECONDS = 0.25
"""Between two drawings of the line on a terminal."""
LOG_SECONDS = 60.0
"""Between two lines in a log."""
SHORT = 5.0
"""Work and compiling that take less are not told in a log."""
_BAR = 10  # the least width that a bar is drawn in


class Work:
    """A piece of work while it goes on: `n` of `total` items are done. Who works counts `n` up, at no cost; a thread
    looks at it now and then. notes: name -> what stands behind it on a terminal, the most telling first."""

    def __init__(self, what: str, total: int | None, done: int, now: float):
        self.what, self.total, self.n = what, total, done
        self.notes: dict[str, str] = {}
        self.began, self.compiled, self.told = now, 0.0, False
        self.waits: float | None = None  # for a compile, since then
        self._first = done

    def add(self, count: int = 1) -> None:
        """So many items more are done."""
        self.n = self.n + count if self.total is None else min(self.n + count, self.total)

    def rate(self, now: float) -> float | None:
        """Items a second, compiling left out; None before the first is done."""
        seconds = (now if self.waits is None else self.waits) - self.began - self.compiled
        return (self.n - self._first) / seconds if self.n > self._first and seconds > 0 else None

    def left(self, now: float) -> float | None:
        """Seconds until the rest is done at that rate; None where it is not known."""
        rate = self.rate(now)
        return None if rate is None or self.total is None else (self.total - self.n) / rate


@dataclasses.dataclass
class _Program:
    """What is being compiled, since when, and whether that was told."""

    name: str
    since: float
    told: bool = False


class Screen:
    """Where progress is shown. stream: None: standard error, whatever that is when it is written to. clock: seconds."""

    def __init__(self, stream: TextIO | None = None, clock: Any = time.monotonic):
        self.shown = True
        self.clock = clock
        self._stream = stream
        self._lock = threading.RLock()  # of signal handlers too, which may print while the same thread does
        self._works: list[Work] = []
        self._programs: dict[int, _Program] = {}  # what is being compiled, by thread, in the order in which it began
        self._drawn = ""
        self._last = clock()
        self._busy = threading.Event()
        self._thread: threading.Thread | None = None

    # What goes on ----------------------------------------------------------------------------------------------------

    def begin(self, what: str, total: int | None, done: int) -> Work:
        work = Work(what, total, done, self.clock())
        with self._lock:
            self._works.append(work)
        self._wake()
        return work

    def end(self, work: Work) -> None:
        """Takes a work away; one that was told in a log, or long on a terminal, leaves a line if all of it is done."""
        with self._lock:
            if work not in self._works:
                return
            self._works.remove(work)
            took = self.clock() - work.began
            whole = work.total is None or work.n >= work.total
            if self.shown and whole and (work.told or (self._terminal and took >= LOG_SECONDS)):
                self.say(f"{work.what}: {work.n:,} done in {words(took)}", self._out)
            self._settle()

    def compiling(self, name: str) -> None:
        with self._lock:
            now = self.clock()
            for work in self._works:
                work.waits = now if work.waits is None else work.waits
            self._programs.pop(threading.get_ident(), None)  # of one that failed
            self._programs[threading.get_ident()] = _Program(name, now)
        self._wake()

    def compiled(self) -> None:
        with self._lock:
            program = self._programs.pop(threading.get_ident(), None)
            if program is None:
                return
            now = self.clock()
            for work in self._works if not self._programs else ():
                work.compiled += now - work.waits if work.waits is not None else 0.0
                work.waits = None
            if program.told:
                self.say(f"compiled {program.name} in {words(now - program.since)}", self._out)
            self._settle()

    def reset(self) -> None:
        """Nothing goes on any more, however it ended."""
        with self._lock:
            self._works.clear()
            self._programs.clear()
            self._settle()

    def _settle(self) -> None:
        if self._works or self._programs:
            return
        self._busy.clear()
        self._erase()

    # What is shown ---------------------------------------------------------------------------------------------------

    def say(self, text: str, stream: TextIO) -> None:
        """Prints lines above the one that is drawn."""
        with self._lock:
            before = self._erase()
            print(text, file=stream, flush=True)
            self._last = self.clock()
            if before:
                self._draw()

    def tick(self) -> None:
        """Shows what there is to show by now."""
        with self._lock:
            if not self.shown:
                return
            if self._terminal:
                self._draw()
            else:
                self._tell()

    @property
    def _out(self) -> TextIO:
        return self._stream or sys.stderr

    @property
    def _terminal(self) -> bool:
        return bool(getattr(self._out, "isatty", bool)())

    def _draw(self) -> None:
        now = self.clock()
        works = [work for work in self._works if now - work.began >= TERMINAL_SECONDS]
        program = self._compiling(now, 1)
        if not works and program is None:
            return
        self._drawn = line(works[-1] if works else None, program, now, _columns(self._out) - 1)
        self._out.write(f"\r{self._drawn}\x1b[K")
        self._out.flush()

    def _erase(self) -> str:
        """Takes the drawn line away, and says what it was."""
        before, self._drawn = self._drawn, ""
        if before:
            self._out.write("\r\x1b[K")
            self._out.flush()
        return before

    def _tell(self) -> None:
        now = self.clock()
        if now - self._last < LOG_SECONDS:
            return
        works = [work for work in self._works if now - work.began >= SHORT]
        parts = [sentence(work, now) for work in works]
        for work in works:
            work.told = True
        if (program := self._compiling(now, SHORT)) is not None:
            next(iter(self._programs.values())).told = True
            parts.append(f"compiling {program[0]}, {words(program[1])} so far")
        if parts:
            self.say("; ".join(parts), self._out)

    def _compiling(self, now: float, least: float) -> tuple[str, float] | None:
        """What has been compiled for longest, and how many beside it, with its seconds; None below so many."""
        if not self._programs:
            return None
        first, *others = self._programs.values()
        seconds = now - first.since
        return (first.name + (f" and {len(others)} more" if others else ""), seconds) if seconds >= least else None

    def _wake(self) -> None:
        with self._lock:
            self._busy.set()
            if self._thread is None or not self._thread.is_alive():  # a fork's child has none
                self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
                self._thread.start()

    def _watch(self) -> None:
        while True:
            self._busy.wait()
            time.sleep(TERMINAL_SECONDS)
            with contextlib.suppress(ValueError, OSError):  # the stream was closed, or nobody reads it
                self.tick()


SCREEN = Screen()
atexit.register(SCREEN.reset)
_thread = threading.local()


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What this thread does meanwhile is done for later: nothing of it is shown or said, nor counted as a compile."""
    before, _thread.aside = is_aside(), True
    try:
        yield
    finally:
        _thread.aside = before


def is_aside() -> bool:
    """Whether this thread works within `aside`."""
    return getattr(_thread, "aside", False)


@contextlib.contextmanager
def shown(first: bool) -> Iterator[None]:
    """Progress is shown, warnings among it, by the first of several processes alone; it ends with the context, however
    that ends."""
    before, told = SCREEN.shown, warnings.showwarning
    SCREEN.shown = first

    def warn(message, category, filename, lineno, file=None, line=None) -> None:
        told = warnings.formatwarning(message, category, filename, lineno, line).rstrip("\n")
        SCREEN.say(told, file or sys.stderr)  # of work aside too: it is given once for each place

    if SCREEN._terminal:
        warnings.showwarning = warn
    try:
        yield
    finally:
        SCREEN.reset()
        SCREEN.shown, warnings.showwarning = before, told


@contextlib.contextmanager
def work(what: str, total: int | None, done: int = 0) -> Iterator[Work]:
    """A piece of long work, which counts its own `n` up; see `each`."""
    if is_aside():
        yield Work(what, total, done, SCREEN.clock())
        return
    here = SCREEN.begin(what, total, done)
    try:
        yield here
    finally:
        SCREEN.end(here)


def each(items: Iterable[T], what: str, total: int | None, done: int = 0, size: int = 1) -> Iterator[T]:
    """The items as they come. what: the work, in a word or two, as "sample" or "score". total: how much the whole work
    is, what was done before (`done`) being part of it; None: nobody knows. size: how much of that an item is, the last
    one perhaps less."""
    with work(what, total, done) as here:
        for item in items:
            yield item
            here.add(size)


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints lines, on standard output unless another stream is given; the line of progress is not torn by them."""
    if not is_aside():
        SCREEN.say(text, stream or sys.stdout)


def compiling(name: str) -> None:
    """This thread compiles a program from now on."""
    SCREEN.compiling(name)


def compiled() -> None:
    """What this thread compiled is done: the time that it took is nobody's rate."""
    SCREEN.compiled()


# Words ----------------------------------------------------------------------------------------------------------------


def words(seconds: float) -> str:
    """A duration as one says it: 45 s, 1 min 40 s, 12 min, 2 h 10 min, 3 d 4 h."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours + (minutes >= 30), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def sentence(work: Work, now: float) -> str:
    """How far a work has come, for a log: `score: 120 of 3,000 (4 %), 1.9/s, 25 min left`."""
    part = _part(work)
    facts = [f"{work.what}: {work.n:,}" + (f" of {work.total:,} ({100 * part:.0f} %)" if part is not None else "")]
    rate, left = work.rate(now), work.left(now)
    facts += [] if rate is None else [_rate(rate)]
    facts += [] if left is None else [f"{words(left)} left"]
    return ", ".join(facts)


def line(work: Work | None, program: tuple[str, float] | None, now: float, width: int) -> str:
    """The same for a terminal, in `width` columns at most; what does not fit is left out, notes first, and a bar fills
    what is left. program: what is being compiled, and for how many seconds."""
    doing = f"compiling {program[0]} {_clock(program[1])}" if program else ""
    if work is None:
        return doing[:width]
    part, rate, left = _part(work), work.rate(now), work.left(now)
    head = work.what[: max(width // 3, 1)] + ("" if part is None else f" {100 * part:3.0f}%")
    passed = _clock(now - work.began)
    facts = [
        doing,
        f"{work.n:,}" if work.total is None else f"{work.n:,}/{work.total:,}",
        passed if part is None else f"{passed}<{'?' if left is None else _clock(left)}",
        "" if rate is None else _rate(rate),
        *(f"{name} {value}" for name, value in work.notes.items()),
    ]
    tail = ""
    for fact in filter(None, facts):
        if len(head) + len(tail) + 1 + len(fact) > width:
            break
        tail += f" {fact}"
    room = min(width - len(head) - len(tail) - 3, 40)
    if room >= _BAR and part is not None:
        full = round(room * part)
        head += f" [{'#' * full}{'.' * (room - full)}]"
    return (head + tail)[:width]


def _part(work: Work) -> float | None:
    """How much of a work is done, of 1; None where nobody knows."""
    return None if work.total is None else min(work.n / work.total, 1) if work.total else 1.0


def _rate(rate: float) -> str:
    return f"{rate:,.1f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60:02d}:{rest % 60:02d}"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80
