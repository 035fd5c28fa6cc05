"""A folder of safetensors enters; its tensors leave slice by slice, from whichever file holds them. Writes one too."""

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mpo_jax.errors import InputError

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_BLOCK = 1 << 24  # values of a matrix in memory at a time, where two are compared
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Reader:
    """The tensors of all safetensors files of a folder. Files are memory-mapped; `read` copies one slice."""

    def __init__(self, folder: Path, only: str | None = None):
        """only: the one file to read, where it has another name than a model's."""
        self.source, paths = _files(folder) if only is None else (folder / only, [folder / only])
        self._files = {}
        self._where: dict[str, tuple[Path, str]] = {}
        for path in paths:
            if not path.is_file():  # a pipe would be waited for
                raise InputError(f"{path}: is no regular file; expected safetensors")
            with _damage_of(path):
                self._files[path] = safe_open(str(path), framework="numpy")
            for tensor in self._files[path].keys():  # noqa: SIM118 (no mapping)
                if tensor in self._where:
                    raise InputError(f"{path}: tensor {tensor!r} is a duplicate; {self._where[tensor][0].name} holds "
                                     "it too")  # fmt: skip
                self._where[tensor] = (path, tensor)

    def add_prefix(self, prefix: str, outside: Collection[str]) -> None:
        """Puts the trunk's prefix before all names but those outside it, where no name has it: a checkpoint of the
        bare trunk (GPT-2's own)."""
        if not any(tensor.startswith(prefix) for tensor in self._where):
            self._where = {
                tensor if tensor in outside else prefix + tensor: place for tensor, place in self._where.items()
            }

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def file(self, tensor: str) -> Path:
        return self._where[tensor][0]

    def _slice(self, tensor: str):
        path, name = self._where[tensor]
        return self._files[path].get_slice(name)

    def describe(self, tensor: str) -> tuple[tuple[int, ...], str]:
        part = self._slice(tensor)
        return tuple(part.get_shape()), part.get_dtype()

    def read(self, tensor: str, slices: tuple[slice, ...]) -> np.ndarray:
        if any(part.start == part.stop for part in slices):
            dtype = DTYPES[self.describe(tensor)[1]]
            return np.zeros([part.stop - part.start for part in slices], dtype)
        with _damage_of(self.file(tensor)):
            return self._slice(tensor)[slices]

    def same_rows(self, one: str, other: str) -> bool:
        """Whether two matrices hold the same values; some rows of each are in memory at a time."""
        shape = self.describe(one)[0]
        if self.describe(other)[0] != shape:
            return False
        rows, columns = shape
        block = max(1, _BLOCK // columns)
        parts = ((slice(start, min(start + block, rows)), slice(0, columns)) for start in range(0, rows, block))
        return all(np.array_equal(self.read(one, part), self.read(other, part)) for part in parts)


@contextlib.contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """An error of the safetensors library as one that names the file."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: can't be read as safetensors ({reason}); fetch it again") from error


def _files(folder: Path) -> tuple[Path, list[Path]]:
    """What to name in errors about the whole, and the files to read."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists():
        return single, [single]
    if index.exists():
        names = _shards(index)
        for name in names:
            if not (folder / name).exists():
                raise InputError(f"{folder / name}: not found, but {INDEX} names it; fetch it again")
        return index, [folder / name for name in names]
    found = sorted(folder.glob("model*.safetensors"))
    if found:
        return folder, found
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InputError(f"{folder}: holds {pickles[0]} but no safetensors; pickles are never loaded, convert it first")
    raise InputError(f"{folder}: no model.safetensors or {INDEX} here")


def _shards(index: Path) -> list[str]:
    """The names of the files that an index puts tensors in; none of them can lead out of the index's own folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: its weight_map is {str(weight_map)[:60]}; expected tensor names with their files")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise InputError(
                f"{index}: {tensor!r} is said to be in {name!r}; expected a .safetensors file of this folder"
            )
    return sorted(set(weight_map.values()))


def read_json(path: Path | epath.Path) -> dict[str, Any]:
    """The object in a JSON file. InputError, naming the file, where there is none."""
    local = "://" not in str(path)
    if not (Path(path) if local else path).is_file():  # a pipe would be waited for; epath takes it for a file
        raise InputError(f"{path}: {'is no regular file' if path.exists() else 'not found'}")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}; expected an object")
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file, readable by whom the process's umask lets read (safetensors alone makes it the owner's)."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)
