"""Files and JSON values enter; their checksums leave, and are held against those that were written down. The hash by
which settings are known is made here too.

CRC-32 finds every flipped bit and every cut of a file; it is no defence against somebody who changes a file on purpose.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from mpo_jax import progress
from mpo_jax.errors import InputError

SEAL = "checksum"
"""The key under which a sealed JSON object holds its own checksum."""
_BLOCK = 1 << 22


def of_file(path: epath.PathLike) -> str:
    """The CRC-32 of a file's content, as 8 hex digits."""
    state = 0
    with epath.Path(path).open("rb") as stream:
        while block := stream.read(_BLOCK):
            state = zlib.crc32(block, state)
    return f"{state:08x}"


def of_folder(folder: epath.PathLike, leave_out: Iterable[str] = ()) -> dict[str, str]:
    """Name beneath the folder -> checksum of every file. leave_out: names of files and folders at its top."""
    left_out = set(leave_out)
    tops = [path for path in epath.Path(folder).iterdir() if path.name not in left_out]
    return {name: of_file(path) for top in sorted(tops) for name, path in _files(top, top.name)}


def verify(
    folder: epath.PathLike,
    sums: Mapping[str, str],
    wanted: Callable[[str], bool] = lambda name: True,
    advice: str = "",
) -> None:
    """InputError that names the first file of a folder that is missing or has changed since its checksum was written.

    wanted: which of the names to hold against their checksums. advice: what helps; "" for `remedy`."""
    folder = epath.Path(folder)
    advice = advice or remedy(folder)
    names = [name for name in sums if wanted(name)]
    for name in progress.each(names, f"check {folder.name}", len(names)):
        path, known = folder / name, sums[name]
        if not path.exists():
            raise InputError(f"{path}: missing; {advice}")
        if (found := of_file(path)) != known:
            raise InputError(f"{path}: damaged (its checksum is {found}, {known} was written); {advice}")


def remedy(folder: epath.PathLike) -> str:
    """What helps against a damaged file of a stage or a cache."""
    return f"delete the folder {epath.Path(folder).name}, and the same command makes it again"


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own checksum. The values are as JSON holds them."""
    return dict(value) | {SEAL: _of_value(value)}


def read(path: epath.PathLike, advice: str) -> dict[str, Any]:
    """The object of a sealed JSON file. InputError, naming the file, where it is missing or damaged, with `advice`."""
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"{path}: missing; {advice}")
    try:
        value = json.loads(path.read_bytes())
    except ValueError:  # no JSON, or no text
        value = None
    return unseal(path, value, advice)


def unseal(path: epath.PathLike, value: Any, advice: str = "") -> dict[str, Any]:
    """The object that was sealed. InputError, naming the file, where it is none or has changed."""
    advice = advice or remedy(epath.Path(path).parent)
    if not isinstance(value, dict) or SEAL not in value:
        raise InputError(f"{path}: not a file that this package writes, or truncated; {advice}")
    inner = {name: each for name, each in value.items() if name != SEAL}
    if _of_value(inner) != value[SEAL]:
        raise InputError(f"{path}: damaged (its checksum does not fit its text); {advice}")
    return inner


def _of_value(value: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def _files(path: epath.Path, name: str) -> Iterable[tuple[str, epath.Path]]:
    if not path.is_dir():
        yield name, path
        return
    for child in sorted(path.iterdir()):
        yield from _files(child, f"{name}/{child.name}")


def hash_settings(value: Any) -> str:
    """A stable hash of a JSON-able value: 32 hex digits. The order of keys does not matter; tuples are lists."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
