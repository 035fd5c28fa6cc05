"""A file of JSON lines, a JSON array, CSV or Parquet enters; its raw rows leave, with their places.

What a file is decides its content, not its name alone: a byte order mark, gzip or zstd without its suffix and an array
or a wrapper object around the rows are read; a Git LFS pointer, UTF-16, a pipe and the like are errors that name the
cause.
"""

import contextlib
import csv
import gzip
import io
import json
import os
import stat
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from mpo_jax.data.row import Row, is_list, kind_of
from mpo_jax.errors import InputError

_TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (
    *(f"{kind}{zipped}" for kind in (".jsonl", ".json", *_TABLES) for zipped in ("", ".gz", ".zst")),
    ".parquet",
)
METADATA = (
    "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "features.json",
    "metadata.jsonl", "package.json",
)  # fmt: skip
"""Files that tell about a data set; none holds its rows (`datasets` leaves the first four out too)."""
_BOM = b"\xef\xbb\xbf"
_ZIPPED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
"""How the bytes of a compressed file begin, that is read as what it holds."""
_HEADS = (
    (
        b"version https://git-lfs.github.com/spec",
        "a Git LFS pointer, not the data; fetch that with `git lfs pull`",
    ),
    (b"\xff\xfe", "UTF-16; expected UTF-8 (`iconv -f UTF-16 -t UTF-8`)"),
    (b"\xfe\xff", "UTF-16; expected UTF-8 (`iconv -f UTF-16 -t UTF-8`)"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"BZh", "compressed with bzip2; expected plain text, gzip or zstd"),
    (b"\xfd7zXZ", "compressed with xz; expected plain text, gzip or zstd"),
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
        if name.endswith(".parquet"):
            yield from _read_parquet(file, name)
            return
        zipped = next((kind for start, kind in _ZIPPED.items() if head.startswith(start)), "")
        for suffix, kind in ((".gz", "gzip"), (".zst", "zstd")):
            if name.endswith(suffix) and head and zipped != kind:
                raise InputError(f"{name}: no {kind} file (it begins with {head[:8]!r})")
        plain = name.removesuffix(".gz").removesuffix(".zst")
        split = next((mark for suffix, mark in _TABLES.items() if plain.endswith(suffix)), None)
        yield from _read_json(file, name, zipped) if split is None else _read_table(file, name, zipped, split)
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
    elif head[:4].count(0) in (1, 2, 3) and not head.startswith(tuple(_ZIPPED)):
        raise InputError(f"{name}: UTF-16 or UTF-32; expected UTF-8 (`iconv -f UTF-16 -t UTF-8`)")
    elif head.startswith(b"PAR1"):
        raise InputError(f"{name}: a Parquet file; name it .parquet")


# Lines ----------------------------------------------------------------------------------------------------------------


def _lines(file: epath.Path, name: str, zipped: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file, unzipped where it is zipped; InputError where the compressed stream breaks."""
    number = 0
    try:
        with file.open("rb") as raw, _unzipped(raw, zipped) as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(_BOM)
                    _sniff(line[:512], name)
                yield number, line
    except (EOFError, OSError, zlib.error) as error:
        if not zipped:
            raise
        raise InputError(
            f"{name}, after line {number}: damaged or truncated {zipped} ({one_line(error)}); fetch the file again"
        ) from error


def _unzipped(raw: Any, zipped: str) -> Any:
    """The stream that a file holds. zstd is Arrow's: `datasets` brings it, so that nothing more has to be installed."""
    if zipped == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if zipped == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd"))
    return contextlib.nullcontext(raw)


# JSON -----------------------------------------------------------------------------------------------------------------


def _parse(text: bytes, name: str, line: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        raise InputError(f"{name}, line {at}: invalid JSON at column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name}, line {line}: not UTF-8 at byte {error.start}") from error
    except ValueError as error:  # a whole number of more digits than Python reads
        raise InputError(f"{name}, line {line}: a number that can't be read: {error}") from error
    except RecursionError:
        raise InputError(f"{name}, line {line}: JSON nested too deeply") from None


def _row(value, where: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return Row(value, where)


def _read_json(file: epath.Path, name: str, zipped: str) -> Iterator[Row]:
    """JSON lines; or one array of objects, or one object around it, in a file of either name."""
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


def _whole(file: epath.Path, name: str, zipped: str):
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


# CSV ------------------------------------------------------------------------------------------------------------------


def _read_table(file: epath.Path, name: str, zipped: str, split: str) -> Iterator[Row]:
    """CSV with a header (RFC 4180), or the same with tabs: every cell is a text, or null where it is empty. A row's
    place is its first line, as a quoted text may have several."""

    def lines() -> Iterator[str]:
        for number, line in _lines(file, name, zipped):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{name}, line {number}: not UTF-8 at byte {error.start}") from error

    csv.field_size_limit(2**31 - 1)  # its own limit is 128 KiB, less than some replies
    reader = csv.reader(lines(), delimiter=split, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{name}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{where}: no {'CSV' if split == ',' else 'TSV'} row: {error}") from error
        if cells is None:
            return
        if not cells:  # an empty line
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if "" in header or len(set(header)) < len(header):
                raise InputError(
                    f"{where}: columns {', '.join(map(repr, header))}; expected a name for each, none twice"
                )
            continue
        if len(cells) != len(header):
            raise InputError(f"{where}: {len(cells)} fields; expected {len(header)}: {', '.join(header)}")
        yield Row({column: cell or None for column, cell in zip(header, cells, strict=True)}, where)


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
