"""A data path enters; the files or tables that it leads to leave, each with the split that its name tells.

Nothing of a dataset is executed: files are read as JSON or Parquet, hub datasets through `datasets` without scripts.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator

from etils import epath

from mpo_jax.data.files import METADATA, SUFFIXES, check_file, one_line, read_file, unreadable
from mpo_jax.data.row import Row
from mpo_jax.errors import InputError

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Splits, and the words of file and folder names that mean them: those of `datasets`."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One file or table of a source. split is None where only the rows can tell (their own `split`, else train)."""

    name: str
    split: str | None
    rows: Callable[[], Iterator[Row]]


def parts(path: str) -> list[Part]:
    """The files or tables a data path leads to; InputError where it leads nowhere."""
    if path.startswith("tfds:"):
        return _tfds_parts(path.removeprefix("tfds:"))
    if path.startswith("hf:"):
        return _hub_parts(path.removeprefix("hf:"))
    place = epath.Path(path)
    try:
        is_file, is_folder, exists = place.is_file(), place.is_dir(), place.exists()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if exists:
        check_file(place, path)
    if is_file:
        if not path.endswith(SUFFIXES):
            raise InputError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
        return [_file_part(place, place.name, _own_split(place.name))]
    if is_folder:
        return _folder_parts(place)
    check_name(path)
    return _hub_parts(path)


def at_hand(path: str) -> bool:
    """Whether a data path leads to files here; False for a name that is looked up on the hub or in TFDS. InputError
    for a path that leads nowhere."""
    if path.startswith(("tfds:", "hf:")):
        return False
    if epath.Path(path).exists():
        return True
    check_name(path)
    return False


def check_name(path: str) -> None:
    """InputError for what can't be the name of a hub dataset."""
    if path.endswith(SUFFIXES) or not re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", path) or path.startswith("."):
        raise InputError(f"data.path: {path}: no such file or folder")


def canonical(split: str, known: set[str]) -> str:
    """A split's name as files have it: `valid` is `validation` where there is no `valid`."""
    if split in known:
        return split
    return next((name for name, words in SPLITS.items() if split in words and name in known), split)


# Folders --------------------------------------------------------------------------------------------------------------


def _folder_parts(folder: epath.Path) -> list[Part]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _disk_parts(folder)
    if (folder / "features.json").exists():
        return _tfds_parts(str(folder))
    try:
        files = [file for depth in ("*", "*/*", "*/*/*") for file in folder.glob(depth)]
        found = {str(file.relative_to(folder)): file for file in files if file.name.endswith(SUFFIXES)}
        names = sorted(name for name, file in found.items() if not _is_hidden(name) and not file.is_dir())
    except OSError as error:
        raise unreadable(str(folder), error) from error
    if not names:
        raise InputError(f"{folder}: no data file in this folder; expected {', '.join(SUFFIXES)}")
    for name in names:
        check_file(folder / name, name)
    splits = _split_names(names)
    return [_file_part(folder / name, name, splits[name]) for name in names]


def _is_hidden(name: str) -> bool:
    """Files about the data, and what hidden folders hold, are no data."""
    *folders, file = name.split("/")
    return file in METADATA or any(part.startswith((".", "__")) for part in (*folders, file))


_SEP = r"[-._ 0-9]"


def _split_names(names: list[str]) -> dict[str, str | None]:
    """The split that each name tells, as `datasets` reads the names of a folder's files: by shards
    (`data/train-00000-of-00002.parquet`), else by folder names, else by file names; the first of these that any file
    has decides for all, and a word counts if it stands between separators (`prefs_train.jsonl`)."""
    for rule in (_by_shard, _by_folder, _by_file):
        found = {name: rule(name) for name in names}
        if any(found.values()):
            return found
    return dict.fromkeys(names)


def _own_split(name: str) -> str | None:
    """Of a single file, which is named on purpose: the split that its whole name is (`test.jsonl.gz`)."""
    stem = next(name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix))
    words = "|".join(word for known in SPLITS.values() for word in known)
    found = re.fullmatch(rf"({words})([-_.]?\d+)?", stem)
    return _by_shard(name) or (_by_word(found[1]) if found else None)


def _by_shard(name: str) -> str | None:
    found = re.fullmatch(r"(?:.*/)?([^/]+?)-\d{5}-of-\d{5}[^/]*", name)
    return found[1] if found else None


def _by_folder(name: str) -> str | None:
    *folders, _ = name.split("/")
    return next((split for folder in reversed(folders) if (split := _by_word(folder))), None)


def _by_file(name: str) -> str | None:
    return _by_word(name.rsplit("/", 1)[-1], rf"{_SEP}")


def _by_word(text: str, end: str = rf"(?:{_SEP}|$)") -> str | None:
    for split, known in SPLITS.items():
        for word in known:
            if re.search(rf"(?:^|{_SEP}){word}{end}", text):
                return split
    return None


def _file_part(file: epath.Path, name: str, split: str | None) -> Part:
    return Part(name, split, lambda: read_file(file, name))


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
        raise InputError(f"{folder}: `datasets` cannot load this folder: {one_line(error)}") from error


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
            f"{name}: neither a file or folder here nor a hub dataset that could be loaded: {one_line(error)}"
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
        raise InputError(f"tfds:{name}: TFDS cannot open these shards: {one_line(error)}") from error

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
