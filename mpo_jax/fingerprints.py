"""Files enter; the hashes by which models and data are known leave. What was hashed once is not read again.

Beside what was hashed, or in the user's cache folder where nothing may be written there, lies a small hidden file with
the size, the times and the hash of every file. A file whose size and times are still those is taken to hold what it
held; any other is read again. A change that leaves size and all times as they were is not seen.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from mpo_jax import artifacts, integrity, progress
from mpo_jax.artifacts import is_remote
from mpo_jax.errors import InputError

MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", "merges.txt", "vocab.txt")
"""What a Hugging Face model folder is made of: weights, settings, tokenizer. Not its README, not other frameworks'."""

KEPT = ".mpo_hashes.json"
"""The file in a folder that holds the hashes of its files; beside a single file, `.NAME` comes before it."""
WORTH = 8 << 20
"""Bytes. Of fewer no hash is kept: reading them takes no longer than looking it up."""
SETTLED = 2.0
"""Seconds that a file must have lain unchanged before it is hashed, for its hash to be kept: another change within the
tick of the file system's clock would leave size and times as they are."""

_BLOCK = 1 << 22


def of_files(path: epath.PathLike) -> str:
    """A hash of a file's content, or of the names and contents of all files beneath a folder: 32 hex digits."""
    place = epath.Path(path)
    return _fingerprint(place, list(_files(place)))


def of_model(path: epath.PathLike) -> str:
    """A hash of what a Hugging Face model folder says and computes: its `MODEL_FILES`, by name and content.

    A README, a download's cache or another framework's weights in the folder don't count. InputError where there is
    nothing to hash.
    """
    place = epath.Path(path)
    files = [(name, file) for name, file in _files(place) if name.endswith(MODEL_FILES) and "/." not in name]
    if not files:
        raise InputError(f"{path}: no model files ({', '.join(MODEL_FILES)}); expected a Hugging Face model folder")
    return _fingerprint(place, files)


def _fingerprint(place: epath.Path, files: list[tuple[str, epath.Path]]) -> str:
    state = hashlib.blake2b(digest_size=16)
    digests = _digests(place, files)
    for name in sorted(digests):
        # Name and digest, each ended: no two folders give the same stream of bytes.
        state.update(name.encode() + b"\0" + bytes.fromhex(digests[name]))
    return state.hexdigest()


def _digests(place: epath.Path, files: list[tuple[str, epath.Path]]) -> dict[str, str]:
    """Name -> hash of each file's content, read only where no kept hash is of the file as it is now."""
    stamps = {name: _stamp(file) for name, file in files}
    if sum(stamp[0] for stamp in stamps.values()) < WORTH:
        return {name: _digest(file) for name, file in files}
    kept = _kept(place)
    found: dict[str, str] = {}
    settled: dict[str, list[Any]] = {}
    for name, file in files:
        stamp = stamps[name]
        if (entry := kept.get(name)) is not None and entry[:-1] == stamp:
            found[name], settled[name] = entry[-1], entry
            continue
        began = time.time_ns()
        found[name] = _digest(file)
        if began - max(stamp[1:]) >= SETTLED * 1e9 and _stamp(file) == stamp:
            settled[name] = [*stamp, found[name]]
    if settled != kept:
        _keep(place, settled)
    return found


def _digest(file: epath.Path) -> str:
    content = hashlib.blake2b(digest_size=32)
    whole = int(file.stat().length) // _BLOCK + 1
    with file.open("rb") as stream, progress.work(f"hash {file.name}, blocks of 4 MiB", whole) as here:
        while block := stream.read(_BLOCK):
            content.update(block)
            here.add()
        here.n = whole
    return content.hexdigest()


def _stamp(file: epath.Path) -> list[int]:
    """Size in bytes, then when content and, on a file system, names and rights were changed last, in nanoseconds."""
    if is_remote(file):
        told = file.stat()
        return [told.length, int(told.mtime * 1e9)]
    local = os.stat(file)
    return [local.st_size, local.st_mtime_ns, local.st_ctime_ns]


def _files(path: epath.Path, prefix: str = "") -> Iterator[tuple[str, epath.Path]]:
    """(name, file) of a file ("" its name: renaming changes nothing), or of all beneath a folder ("/a/b")."""
    if not path.is_dir():
        yield prefix, path
        return
    for child in path.iterdir():
        if not (child.name.startswith(".") and child.name.endswith(KEPT)):
            yield from _files(child, f"{prefix}/{child.name}")


# What is kept --------------------------------------------------------------------------------------------------------


def _places(place: epath.Path) -> list[epath.Path]:
    """Where hashes of a file or folder may be kept, the best place first."""
    if is_remote(place):
        return [_beside(place)]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpo_jax" / "hashes"
    own = hashlib.blake2b(os.path.abspath(place).encode(), digest_size=16).hexdigest()
    beside = _beside(place)
    return [*([beside] if _writable(beside.parent) else []), epath.Path(cache / f"{own}.json")]


def _beside(place: epath.Path) -> epath.Path:
    return place / KEPT if place.is_dir() else place.parent / f".{place.name}{KEPT}"


def _writable(folder: epath.Path) -> bool:
    """By its own rights too: an administrator may write everywhere, and still should not into what is read-only."""
    return os.access(folder, os.W_OK) and bool(os.stat(folder).st_mode & 0o222)


def _kept(place: epath.Path) -> dict[str, list[Any]]:
    """Name -> stamp and hash; {} where none are kept, or what is there can't be read: then they are made again."""
    for file in _places(place):
        with contextlib.suppress(InputError, OSError, KeyError):
            return dict(integrity.read(file, "")["files"])
    return {}


def _keep(place: epath.Path, settled: dict[str, list[Any]]) -> None:
    """Where nothing can be written, nothing is kept, and the next start reads the files again."""
    for file in _places(place):
        with contextlib.suppress(OSError):
            artifacts.write_json(file, integrity.seal({"files": settled}))
            return
