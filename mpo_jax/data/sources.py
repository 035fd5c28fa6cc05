"""A file, a folder, a hub name or TFDS shards enter; text records of one split leave, with a report of the drops.

Nothing of a dataset is executed: files are read as JSON or Parquet, hub datasets through `datasets` without scripts.
"""

import collections
import dataclasses
import functools
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator

from etils import epath

from mpo_jax.checkpoint import fingerprint_files
from mpo_jax.data.encode import records_fingerprint
from mpo_jax.data.schemas import Drop, Row, Schema, TextRecord, read_row, recognise
from mpo_jax.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
ALL = "all"
"""The split name that means every split of a source."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What was read from a source: rows read, records kept, and rows dropped by each rule."""

    source: str
    split: str
    schema: str
    read: int
    kept: int
    dropped: dict[str, int]

    def line(self) -> str:
        drops = ", ".join(f"{count} {rule}" for rule, count in sorted(self.dropped.items())) or "none"
        return (
            f"{self.source} [{self.split}] ({self.schema}): {self.read} rows read, {self.kept} kept; dropped: {drops}"
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """One file or table of a source. split is None where only the rows can tell (their own `split`, else train)."""

    name: str
    split: str | None
    rows: Callable[[], Iterator[Row]]


def load(path: str, split: str = "train", tokenizer=None, limit: int | None = None) -> tuple[list[TextRecord], Report]:
    """The text records of one split of a source.

    path: a .jsonl, .jsonl.gz, .json or .parquet file; a folder of these, their splits named by the files
    (`harmless-base/test.jsonl.gz`, `train-00000-of-00004.parquet`); a folder written by `save_to_disk`; TFDS shards
    (`tfds:name`, or the folder of a prepared version); or a hub name, `owner/name` or `owner/name/data/folder`.
    split: a split's name, or "all". tokenizer: its chat template, where it has one, renders message lists.
    limit: stop after that many rows.

    Raises InputError (file, line, key) for anything malformed, an unknown split (listing those that exist), an empty
    dataset, and one whose every row was dropped.
    """
    found = parts(str(path))
    named = {part.split for part in found if part.split is not None}
    if split in named:
        found = [part for part in found if part.split in (split, None)]
    records: list[TextRecord] = []
    dropped: collections.Counter[str] = collections.Counter()
    schema: Schema | None = None
    first, read, seen = "", 0, set(named)
    for part in found:
        part_schema = None
        for row in part.rows():
            own = split_of(part, row)
            seen.add(own)
            if split not in (ALL, part.split, own):
                continue
            if part_schema is None:
                part_schema = recognise(row)
                if schema is not None and schema != part_schema:
                    raise InputError(
                        f"{path}: {first} holds {schema.name} rows, {part.name} holds {part_schema.name} rows; "
                        "name one of the files as the data path"
                    )
                schema, first = part_schema, first or part.name
            if limit is not None and read == limit:
                break
            try:
                reply = read_row(part_schema, row, tokenizer)
                fields = {f.name: getattr(reply, f.name) for f in dataclasses.fields(reply)}
                records.append(TextRecord(id=read, split=own, **fields))
            except Drop as rule:
                dropped[str(rule)] += 1
            read += 1
    if schema is None:
        if seen and split != ALL and split not in seen:
            raise InputError(f"{path}: unknown split {split!r}; it has {', '.join(sorted(seen))}, or 'all'")
        raise InputError(f"{path}: split {split!r} is empty; expected at least one record")
    report = Report(str(path), split, schema.name, read, len(records), dict(dropped))
    if not records:
        raise InputError(f"no record is left: {report.line()}")
    return records, report


def fingerprint(path: str) -> str:
    """A hash of a source's content: of its files, or of its records where they come from the hub or from TFDS."""
    place = epath.Path(path)
    if not path.startswith("tfds:") and place.exists():
        return fingerprint_files(place)
    records, _ = load(path, ALL)
    return records_fingerprint(records)


def at_hand(path: str) -> bool:
    """Whether a data path leads to files here; False for a name that is looked up on the hub or in TFDS. InputError
    for a path that leads nowhere."""
    if path.startswith(("tfds:", "hf:")):
        return False
    if epath.Path(path).exists():
        return True
    _check_name(path)
    return False


def split_of(part: Part, row: Row) -> str:
    """The split a row belongs to: its own word, else its file's, else train."""
    own = row.values.get("split")
    return own if isinstance(own, str) and own else part.split or "train"


def expect_schema(row: Row, name: str) -> None:
    """InputError unless a row is of the named schema."""
    found = recognise(row).name
    if found != name:
        raise InputError(f"{row.where}: a row of kind {found}, expected {name}")


# Where a path leads ---------------------------------------------------------------------------------------------------


def parts(path: str) -> list[Part]:
    """The files or tables a data path leads to; InputError where it leads nowhere."""
    if path.startswith("tfds:"):
        return _tfds_parts(path.removeprefix("tfds:"))
    if path.startswith("hf:"):
        return _hub_parts(path.removeprefix("hf:"))
    place = epath.Path(path)
    if place.is_file():
        if not path.endswith(SUFFIXES):
            raise InputError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
        return [_file_part(place, place.name)]
    if place.is_dir():
        return _folder_parts(place)
    _check_name(path)
    return _hub_parts(path)


def _check_name(path: str) -> None:
    """InputError for what can't be the name of a hub dataset."""
    if path.endswith(SUFFIXES) or not re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", path) or path.startswith("."):
        raise InputError(f"data.path: {path}: no such file or folder")


def _folder_parts(folder: epath.Path) -> list[Part]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _disk_parts(folder)
    if (folder / "features.json").exists():
        return _tfds_parts(str(folder))
    files = (file for depth in ("*", "*/*", "*/*/*") for file in folder.glob(depth))
    names = sorted(str(file.relative_to(folder)) for file in files if file.name.endswith(SUFFIXES) and file.is_file())
    if not names:
        raise InputError(f"{folder}: no data file in this folder; expected {', '.join(SUFFIXES)}")
    return [_file_part(folder / name, name) for name in names]


_KNOWN = r"(train|training|test|validation|valid|val|dev|eval)"


def _split_name(name: str) -> str | None:
    """The split a file's name tells: `train-00000-of-00002.parquet`, `test.jsonl.gz`, `test/part.jsonl`; or None."""
    *folders, file = name.split("/")
    stem = next(file.removesuffix(suffix) for suffix in SUFFIXES if file.endswith(suffix))
    sharded = re.fullmatch(r"(.+?)-\d{5}-of-\d{5}.*", stem)
    if sharded:
        return sharded[1]
    known = re.fullmatch(_KNOWN + r"([-_.]?\d+)?", stem)
    if known:
        return known[1]
    return next((folder for folder in reversed(folders) if re.fullmatch(_KNOWN, folder)), None)


def _file_part(file: epath.Path, name: str) -> Part:
    if name.endswith(".parquet"):
        reader = _read_parquet
    elif name.endswith((".json", ".json.gz")):
        reader = _read_json
    else:
        reader = _read_lines
    return Part(name, _split_name(name), lambda: reader(file, str(file)))


# Files ----------------------------------------------------------------------------------------------------------------


def _lines(file: epath.Path, name: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file, unzipped where its name says so; InputError where the gzip stream breaks."""
    number = 0
    try:
        with file.open("rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
            for number, line in enumerate(stream, 1):
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


def _row(value, where: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return Row(value, where)


def _read_lines(file: epath.Path, name: str) -> Iterator[Row]:
    for number, line in _lines(file, name):
        if line := line.rstrip():  # with its line break, an error at its end would be one of the next line
            yield _row(_parse(line, name, number), f"{name}, line {number}")


def _read_json(file: epath.Path, name: str) -> Iterator[Row]:
    """A JSON array of objects; or JSON lines, which several published `.json` files are."""
    for _, line in _lines(file, name):
        if line.strip():
            break
    else:
        return
    if not line.lstrip().startswith(b"["):
        yield from _read_lines(file, name)
        return
    rows = _parse(b"".join(line for _, line in _lines(file, name)), name, 1)
    for number, value in enumerate(rows, 1):
        yield _row(value, f"{name}, record {number}")


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
        raise InputError(f"{name}, after row {number}: not a readable Parquet file ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# datasets and TFDS ----------------------------------------------------------------------------------------------------


def _table_parts(name: str, tables) -> list[Part]:
    """Parts of a `datasets` Dataset or DatasetDict."""

    def rows(label, table):
        for number, value in enumerate(table):
            yield Row(value, f"{label}, row {number + 1}")

    if not hasattr(tables, "keys"):
        return [Part(name, str(tables.split) if tables.split else None, lambda: rows(name, tables))]
    return [
        Part(f"{name}[{split}]", split, functools.partial(rows, f"{name}[{split}]", tables[split])) for split in tables
    ]


def _disk_parts(folder: epath.Path) -> list[Part]:
    import datasets

    try:
        return _table_parts(str(folder), datasets.load_from_disk(str(folder)))
    except Exception as error:  # datasets raises many kinds, pyarrow's among them
        raise InputError(f"{folder}: `datasets` cannot load this folder: {_one_line(error)}") from error


def _hub_parts(name: str) -> list[Part]:
    """A hub dataset. One that is still a loading script is read from the Parquet branch the hub itself makes of it."""
    import datasets

    parts = name.split("/")
    repository, data_dir = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        try:
            tables = datasets.load_dataset(repository, data_dir=data_dir or None)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            tables = datasets.load_dataset(repository, data_dir=data_dir or None, revision="refs/convert/parquet")
    except Exception as error:  # connection, missing repository, malformed files
        raise InputError(
            f"{name}: neither a file or folder here nor a hub dataset that could be loaded: {_one_line(error)}"
        ) from error
    return _table_parts(name, tables)


def _tfds_parts(name: str) -> list[Part]:
    """TFDS ArrayRecord shards by random access, without TensorFlow: a prepared folder, or the name of a dataset."""
    try:
        import tensorflow_datasets as tfds

        place = epath.Path(name)
        builder = tfds.builder_from_directory(name) if place.is_dir() else tfds.builder(name)
        splits = list(builder.info.splits)
        tables = {split: builder.as_data_source(split=split) for split in splits}
    except Exception as error:  # a missing importlib_resources, an unknown name, shards in another format
        raise InputError(f"tfds:{name}: TFDS cannot open these shards: {_one_line(error)}") from error

    def rows(split):
        for number in range(len(tables[split])):
            yield Row(_python(tables[split][number]), f"tfds:{name}[{split}], row {number + 1}")

    return [Part(f"tfds:{name}[{split}]", split, functools.partial(rows, split)) for split in splits]


def _python(value):
    """TFDS's bytes and arrays as text, numbers and lists."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _python(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_python(inner) for inner in value]
    if hasattr(value, "tolist"):
        return _python(value.tolist())
    return value
