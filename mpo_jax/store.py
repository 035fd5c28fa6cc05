"""A path in a file system or an object store (gs://) enters; its copy on this host's disk leaves, where one is needed.

Memory-mapped rows, databases and models' folders are used as copies beneath a scratch folder, never the only ones:
MPO_SCRATCH, or mpo_jax in the user's cache. Nothing here renames a folder; what is sent last makes a folder whole.
"""

import concurrent.futures
import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
from etils import epath

from mpo_jax.errors import InputError
from mpo_jax.lines import split_lines

SCRATCH = "MPO_SCRATCH"
"""The environment variable that names the scratch folder."""
_AT_ONCE = 8  # files on their way: one stream alone is far slower than a host's network
_BLOCK = 1 << 24

# Other processes write the same folders: a listing that is kept would hide what they have written since.
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path lies in an object store (gs://), where nothing can be memory-mapped or appended to."""
    return "://" in os.fspath(path)


def holds_databases(path: epath.PathLike) -> bool:
    """Whether SQLite can lock and map a file of this path: in no object store, nor in one that is mounted (FUSE)."""
    return not is_remote(path) and not _file_system(os.path.abspath(os.fspath(path))).startswith("fuse")


def scratch() -> Path:
    """The folder of this host's copies. All in it is also elsewhere, but for answers that are not sent yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(SCRATCH) or f"{cache}/mpo_jax").expanduser().absolute()


def copy_of(path: epath.PathLike) -> Path:
    """Where a path's copy on this host's disk lies, be it there or not: SCRATCH/gs/BUCKET/..."""
    scheme, found, rest = os.fspath(path).partition("://")
    if not found:
        scheme, rest = "file", os.path.abspath(scheme).lstrip("/")
    parts = [part for part in rest.split("/") if part]
    if ".." in parts:
        raise InputError(f"{os.fspath(path)}: expected a path without '..'")
    return scratch().joinpath(scheme, *parts)


def local(path: epath.PathLike) -> Path:
    """The path itself in a file system; in an object store the place of its copy."""
    return copy_of(path) if is_remote(path) else Path(path)


def fetch(path: epath.PathLike, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """`local` of a file or folder, its copy brought up to date. wanted: of a folder, by names beneath it.

    A file that is here, by size and time, is not fetched again, so that a fetch that was killed goes on behind the last
    whole file; files that the store no longer has are removed. One process of a host fetches at a time, the others find
    what it fetched. InputError where the store has nothing there, or a file ends early.
    """
    target = local(path)
    if not is_remote(path):
        return target
    source = epath.Path(path)
    with locked(target):
        found = _found(source, wanted)
        if not found:
            raise InputError(f"{source}: not found")
        if "" not in found and target.is_dir():
            for stale in [file for file in _beneath(target) if file.relative_to(target).as_posix() not in found]:
                stale.unlink()
        waiting = [(file, target / name if name else target) for name, file in found.items()]
        _in_threads(_fetch_file, waiting)
    return target


def is_fetched(path: epath.PathLike, wanted: Callable[[str], bool] = lambda name: True) -> bool:
    """Whether `fetch` would have nothing to do; nothing is fetched."""
    if not is_remote(path):
        return Path(path).exists()
    found = _found(epath.Path(path), wanted)
    target = local(path)
    return bool(found) and all(_is_here(file, target / name if name else target) for name, file in found.items())


def send(path: epath.PathLike, last: str = "") -> None:
    """Sends a folder's or file's copy to its object store; nothing is to be done for a path of a file system.

    last: the name of the file that is sent when all others are there: it makes the folder whole.
    """
    if not is_remote(path):
        return
    copy, target = local(path), epath.Path(path)
    if copy.is_file():
        _send_file(copy, target)
        return
    files = {file.relative_to(copy).as_posix(): file for file in _beneath(copy)}
    ends = files.pop(last, None)
    _in_threads(_send_file, [(file, target / name) for name, file in files.items()])
    if ends is not None:
        _send_file(ends, target / last)


def remove(path: epath.PathLike) -> None:
    """Removes a folder, with its copy; there need be none."""
    for place in (epath.Path(path), epath.Path(local(path))):
        if place.exists():
            place.rmtree()


def move(folder: epath.Path, target: epath.Path, last: str) -> None:
    """Moves a folder's files one by one, `last` when all others are gone: as long as it is there, a move that was
    killed is to be done again."""
    names = sorted(_found(folder, lambda name: True), key=lambda name: name == last)
    for name in names:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(folder):
            (folder / name).copy(place, overwrite=True)
            (folder / name).unlink()
        else:
            (folder / name).replace(place)
    if folder.exists():  # a file system's empty folders
        folder.rmtree()


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """One process of this host at a time; the lock of a process that was killed is gone with it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.with_name(f".{place.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _found(source: epath.Path, wanted: Callable[[str], bool]) -> dict[str, epath.Path]:
    """Name beneath a folder -> file; of a file itself, the name "". {} where nothing is."""
    if not source.exists():
        return {}
    if not source.is_dir():
        return {"": source}
    found = {}
    for child in sorted(source.iterdir()):
        for name, file in _found(child, lambda name: True).items():
            whole = f"{child.name}/{name}" if name else child.name
            if wanted(whole):
                found[whole] = file
    return found


def _beneath(folder: Path) -> list[Path]:
    """The files of a copy; those that are hidden are on their way, or locks."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]


def _is_here(source: epath.Path, target: Path) -> bool:
    if not target.is_file():
        return False
    there, here = source.stat(), target.stat()
    return here.st_size == there.length and int(here.st_mtime) == there.mtime


def _fetch_file(source: epath.Path, target: Path) -> None:
    if _is_here(source, target):
        return
    there = source.stat()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    with source.open("rb") as stream, open(temporary, "wb") as file:
        shutil.copyfileobj(stream, file, _BLOCK)
    if temporary.stat().st_size != there.length:
        raise InputError(
            f"{source}: {temporary.stat().st_size} of {there.length} bytes arrived; run the same command again"
        )
    os.utime(temporary, (there.mtime, there.mtime))
    temporary.replace(target)


def _send_file(source: Path, target: epath.Path) -> None:
    """An object is whole or not there: it appears when all of it has come."""
    with open(source, "rb") as file, target.open("wb") as stream:
        shutil.copyfileobj(file, stream, _BLOCK)
    there = target.stat()
    os.utime(source, (there.mtime, there.mtime))  # the copy is up to date


def _in_threads(work: Callable[[Path, Path], None], pairs: list) -> None:
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(work, *pair) for pair in pairs]:
            done.result()


def _file_system(path: str) -> str:
    """The type of the file system that a path lies in, "" where the system does not tell."""
    try:
        lines = split_lines(Path("/proc/self/mounts").read_text())
    except OSError:
        return ""
    best = ("", "")
    for line in lines:
        _, mount, kind, *_ = line.split(" ")
        mount = mount.encode().decode("unicode_escape")  # a space is \040
        if (path == mount or path.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]
