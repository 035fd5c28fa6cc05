"""A folder and the bytes that are to be written there enter; an error that names what could be deleted leaves where the
file system has no room for them. What could be deleted is found here too, for `mpo runs --prune`.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from etils import epath

from mpo_jax import artifacts
from mpo_jax.artifacts import is_remote
from mpo_jax.errors import InputError

ABANDONED = 3600
"""Seconds after which what lies under a temporary name belongs to no process any more that is still writing it."""

_STAGE = re.compile(r".+-[0-9a-f]{12}")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "database or disk is full")
"""As libraries tell it that raise no OSError: TensorStore's, SQLite's."""
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Spare:
    """A file or folder that no stage of the present graph needs. size: bytes. why: what it is."""

    path: epath.Path
    size: int
    why: str


def check_room(folder: epath.PathLike, size: int, what: str) -> None:
    """InputError, naming what to delete, where fewer than `size` bytes are free on the file system of a folder, which
    need not be there yet. Object stores have no such end, and are not asked."""
    if is_remote(folder):
        return
    free = shutil.disk_usage(_existing(Path(folder))).free
    if free < size:
        raise InputError(f"{folder}: {what} needs {told(size)}, and {told(free)} are free; {advice(folder)}")


def is_full(error: BaseException) -> bool:
    """Whether a full disk is the cause of an error, or of the error that it followed from."""
    at: BaseException | None = error
    while at is not None:
        if (isinstance(at, OSError) and at.errno in _FULL) or any(text in str(at) for text in _FULL_TEXTS):
            return True
        at = at.__cause__ or at.__context__
    return False


@contextlib.contextmanager
def full_disk_told(folder: epath.PathLike) -> Iterator[None]:
    """An error that a full disk is the cause of leaves as an InputError that names what may be deleted."""
    try:
        with _told_once():
            yield
    except InputError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise InputError(f"{folder}: the disk is full; {advice(folder)}") from error


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Keeps the tracebacks of a save that a full disk ends off the terminal: Orbax logs the error that it raises too,
    and Python prints one for each write that ends after Orbax has closed the event loop."""
    log, printed = logging.getLogger("absl"), sys.unraisablehook

    def news(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or not is_full(error)

    def unraisable(found) -> None:
        if str(found.exc_value) != "Event loop is closed":
            printed(found)

    log.addFilter(news)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        log.removeFilter(news)
        sys.unraisablehook = printed


def advice(folder: epath.PathLike) -> str:
    """What may be deleted to make room in a folder of a run, the largest first."""
    run = next((place for place in (epath.Path(folder), *epath.Path(folder).parents) if _is_run(place)), None)
    found = sorted(spare(run), key=lambda each: -each.size) if run is not None else []
    found = [each for each in found if each.size]
    if not found:
        return "make room there and run the same command again"
    shown = ", ".join(f"{each.path} ({told(each.size)}, {each.why})" for each in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"`mpo runs --prune {run}` would free {shown}{more}; make room and run the same command again"


def spare(workdir: epath.Path) -> list[Spare]:
    """What a run's folder holds that its present graph, as its STAGES_FILE lists it, does not need."""
    stages = artifacts.stage_folders(workdir)
    done = {folder for folder in stages.values() if (folder / artifacts.MANIFEST).exists()}
    present = set(stages.values())
    found = []
    for path in sorted(workdir.iterdir()):
        if path.name == artifacts.SET_ASIDE:
            found += [_spare(each, "an earlier result of a stage, set aside") for each in sorted(path.iterdir())]
        elif path in present:
            states = path / artifacts.CHECKPOINTS
            if path in done and states.exists():
                found.append(_spare(states, "training states of a finished stage"))
            listed = (artifacts.read_manifest(path) or {}).get("files", {})
            found += [each for each in _abandoned(path, 2) if not _holds(path, each, listed)]
        elif _STAGE.fullmatch(path.name) and (path / artifacts.INPUTS).exists():
            found.append(_spare(path, "a stage that is not in the present graph"))
        elif path.name == artifacts.CACHE:
            if done == present:
                found.append(_spare(path, "rows and log-probs; made again if a new stage needs them"))
            else:
                found += _abandoned(path, 1)
    return found + [_spare(path, _LEFT) for path in sorted(workdir.iterdir()) if _is_abandoned(path)]


_LEFT = "left by a process that was killed while writing"


def _abandoned(folder: epath.Path, depth: int) -> Iterator[Spare]:
    """What killed processes left under temporary names in a folder and, to a depth, in those beneath it."""
    for path in sorted(folder.iterdir()):
        if _is_abandoned(path):
            yield _spare(path, _LEFT)
        elif depth > 1 and path.is_dir() and path.name != artifacts.CHECKPOINTS:
            yield from _abandoned(path, depth - 1)


def _holds(folder: epath.Path, each: Spare, listed: Iterable[str]) -> bool:
    """Whether a file that a manifest lists is, or lies in, what was found in its folder."""
    name = each.path.relative_to(folder).as_posix()
    return any(file == name or file.startswith(f"{name}/") for file in listed)


def _is_abandoned(path: epath.Path) -> bool:
    return artifacts.is_temporary(path.name) and time.time() - path.stat().mtime > ABANDONED


def _spare(path: epath.Path, why: str) -> Spare:
    return Spare(path, size(path), why)


def size(path: epath.PathLike) -> int:
    """Bytes of a file, or of all files beneath a folder."""
    place = epath.Path(path)
    if place.is_dir():
        return sum(size(child) for child in place.iterdir())
    return place.stat().length if place.exists() else 0  # another process may have renamed it


def free(found: Spare) -> None:
    """Deletes what is spare."""
    if found.path.is_dir():
        found.path.rmtree()
    else:
        found.path.unlink(missing_ok=True)


def told(size: int) -> str:
    """Bytes as people read them."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def _is_run(place: epath.Path) -> bool:
    return (place / artifacts.STAGES_FILE).exists()


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = Path(os.path.abspath(folder))
    return next(place for place in (folder, *folder.parents) if place.exists())
