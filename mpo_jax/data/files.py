"""A file of JSON lines, a JSON array or Parquet enters; its raw rows leave, with their places.

What a file is decides its content, not its name alone: a byte order mark, gzip without its suffix and an array or a
wrapper object around the rows are read; a Git LFS pointer, UTF-16, a pipe and the like are errors that name the cause.
"""

import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from mpo_jax.data.row import Row, is_list, kind_of
from mpo_jax.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
METADATA = (
    "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "features.json",
    "metadata.jsonl", "package.json",
)  # fmt: skip
"""Files that tell about a data set; none holds its rows (`datasets` leaves the first four out too)."""
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_HEADS = (
    (
        b"version https://git-lfs.github.com/spec",
        "a Git LFS pointer, not the data; fetch that with `git lfs pull`",
    ),
    (b"\xff\xfe", "UTF-16; expected UTF-8 (`iconv -f UTF-16 -t UTF-8`)"),
    (b"\xfe\xff", "UTF-16; expected UTF-8 (`iconv -f UTF-16 -t UTF-8`)"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; expected plain text or gzip"),
    (b"BZh", "compressed with bzip2; expected plain text or gzip"),
    (b"\xfd7zXZ", "compressed with xz; expected plain text or gzip"),
    (b"<!DOCTYPE", "an HTML page, not data; fetch the file itself"),
    (b"<html", "an HTML page, not data; fetch the file itself"),
)


def check_file(place: epath.Path, name: str) -> None:
    """InputError for what is there but can't be read twice or ends never: a pipe, a device, a socket."""
    try:
        mode = place.stat().mode if "://" in str(place) else os.stat(str(place)).st_mode
    except FileNotFoundError:
        raise InputError(f"{name}: no such file or folder") from None
    except (OSError, ValueError) as error:
        raise unreadable(name, error) from error
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{name}: a pipe or device; expected a file or folder (write what it gives to a file first)")


def unreadable(name: str, error: Exception) -> InputError:
    """What the system says of a file that it does not give, in one line."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return InputError(f"{name}: cannot be read: {reason}")


def read_file(file: epath.Path, name: str) -> Iterator[Row]:
    """The rows of a file; `name` is what messages call it. Raises InputError (name, line) for what is malformed."""
    check_file(file, name)
    try:
        head = _head(file, name)
        yield from _read_parquet(file, name) if name.endswith(".parquet") else _read_json(file, name, head)
    except OSError as error:
        raise unreadable(name, error) from error


def _head(file: epath.Path, name: str) -> bytes:
    """The first bytes; InputError where they tell of something that is no data."""
    with file.open("rb") as raw:
        head = raw.read(512)
    _sniff(head, name)
    return head


def _sniff(head: bytes, name: str) -> None:
    for start, what in _HEADS:
        if head.lstrip().lower().startswith(start.lower()) or head.startswith(start):
            raise InputError(f"{name}: {what}")
    if name.endswith(".parquet"):
        if not head.startswith(b"PAR1"):
            raise InputError(f"{name}: not a Parquet file (it begins with {head[:8]!r})")
    elif head[:4].count(0) in (1, 2, 3) and not head.startswith(_GZIP):
        raise InputError(f"{name}: UTF-16 or UTF-32; expected UTF-8 (`iconv -f UTF-16 -t UTF-8`)")
    elif head.startswith(b"PAR1"):
        raise InputError(f"{name}: a Parquet file; name it .parquet")


# JSON -----------------------------------------------------------------------------------------------------------------


def _lines(file: epath.Path, name: str, zipped: bool) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file, unzipped where it is zipped; InputError where the gzip stream breaks."""
    number = 0
    try:
        with file.open("rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if zipped else raw
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(_BOM)
                    _sniff(line[:512], name)
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{name}, after line {number}: damaged or truncated gzip ({error}); fetch the file again"
        ) from error


def _parse(text: bytes, name: str, line: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        raise InputError(f"{name}, line {at}: invalid JSON at column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name}, line {line}: not UTF-8 at byte {error.start}") from error
    except RecursionError:
        raise InputError(f"{name}, line {line}: JSON nested too deeply") from None


def _row(value, where: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return Row(value, where)


def _read_json(file: epath.Path, name: str, head: bytes) -> Iterator[Row]:
    """JSON lines; or one array of objects, or one object around it, in a file of either name."""
    zipped = name.endswith(".gz") or head.startswith(_GZIP)
    lines = _lines(file, name, zipped)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    number, line = first
    start = line.lstrip()[:1]
    second = next((other for _, other in lines if other.strip()), None)
    if start == b"[" and not (second is not None and _is_json(line)):
        yield from _array(_whole(file, name, zipped), name)
        return
    if start == b"{" and (second is None or not _is_json(line)):
        if second is not None and _is_object(second):  # lines, of which the first is broken: its error names it
            _parse(line.rstrip(), name, number)
        value = _whole(file, name, zipped)
        rows = _wrapped(value, name)
        if rows is not None:
            yield from _array(rows, name)
            return
        yield _row(value, f"{name}, line {number}")
        return
    for number, line in _lines(file, name, zipped):
        if line := line.strip():  # with its line break, an error at its end would be one of the next line
            yield _row(_parse(line, name, number), f"{name}, line {number}")


def _whole(file: epath.Path, name: str, zipped: bool):
    return _parse(b"".join(line for _, line in _lines(file, name, zipped)), name, 1)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_object(line: bytes) -> bool:
    return line.lstrip().startswith(b"{") and _is_json(line)


def _array(rows: list[Any], name: str) -> Iterator[Row]:
    for number, value in enumerate(rows, 1):
        yield _row(value, f"{name}, record {number}")


def _wrapped(value: dict[str, Any], name: str) -> list[Any] | None:
    """The rows within an object that only holds them beside a few words about them; None where it is a row itself."""
    lists = {
        key: inner
        for key, inner in value.items()
        if is_list(inner) and inner and all(isinstance(v, dict) for v in inner)
    }
    if "data" in lists or (len(lists) == 1 and set(lists) <= {"rows", "examples", "records", "instances", "train"}):
        key = "data" if "data" in lists else next(iter(lists))
        return _alone(lists, key, name)
    if len(lists) > 1 and set(lists) <= _SETS:
        _alone(lists, next(iter(lists)), name)
    columns = [inner for inner in value.values() if is_list(inner) or isinstance(inner, dict)]
    if len(value) > 1 and len(columns) == len(value) and not lists and all(_is_column(inner) for inner in columns):
        raise InputError(
            f"{name}: one object that holds columns ({', '.join(value)}: {kind_of(columns[0])} each); expected a row "
            "for each object (pandas: to_json(orient='records', lines=True))"
        )
    return None


_SETS = {"train", "training", "validation", "valid", "dev", "val", "test", "eval", "rows", "data"}


def _alone(lists: dict[str, list[Any]], key: str, name: str) -> list[Any]:
    """The rows under a key; InputError where there are others beside them."""
    others = ", ".join(repr(other) for other in lists if other != key)
    if others:
        raise InputError(
            f"{name}: an object with rows under {key!r} and more under {others}; expected one file for each set"
        )
    return lists[key]


def _is_column(inner) -> bool:
    values = list(inner.values()) if isinstance(inner, dict) else list(inner)
    return (
        len(values) > 1
        and not any(isinstance(value, dict) for value in values)
        and (not isinstance(inner, dict) or list(inner) == [str(number) for number in range(len(inner))])
    )


# Parquet --------------------------------------------------------------------------------------------------------------


def _read_parquet(file: epath.Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with file.open("rb") as raw:
            for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, f"{name}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{name}, after row {number}: not a readable Parquet file ({one_line(error)})") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
