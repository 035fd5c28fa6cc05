"""Every file that a run leaves: its name, its writer, its reader.

What is written is whole or not there (another name, fsync, a file's rename; an object of gs:// is so by itself); what
is read and can't be is an InputError that names the file. All paths go through epath. Weights are `checkpoint`'s.
"""

import dataclasses
import io
import json
import math
import os
import re
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

import jax
import numpy as np
from etils import epath

from mpo_jax import integrity
from mpo_jax.errors import InputError
from mpo_jax.lines import split_lines
from mpo_jax.store import is_remote
from mpo_jax.types import GapTable

POLICY, REWARD, SAMPLES, PAIRS, REPLIES, VERDICTS = "policy", "reward", "samples", "pairs", "report", "verdicts"
"""What stages leave, and what their roles ask for."""
PARTS = {PAIRS: ("easy", "hard", "flipped", "all")}
"""Products of which a role takes a part, as in "split/easy"."""
BASE = "base"
"""The name by which stages call the model that the run begins with; it is a policy."""
DATA = "data"
"""The name by which stages call the run's data where a role may be taken by it: pairs, or prompts, of no stage."""


# Names: of a run's folder ---------------------------------------------------------------------------------------------

STAGES_FILE = "stages.json"  # name -> folder of every stage
REPORT_PAGE = "report.html"
REPORT_TEXT, FIGURES = "report.md", "figures"  # beside it: the same as tables, and every figure with its numbers
COMPILED = "compiled"  # programs, for the next start
CACHE = "cache"  # encoded rows, reference log-probs
LOCKS = "locks"  # who is at work on which stage
CHECKED = "checked.json"  # there: which data has been checked
SET_ASIDE = "set_aside"  # what an earlier making left under the same key
JUDGE_CACHE = "judge.sqlite"  # answers paid for
SCORES = "scores.sqlite"  # what functions and servers have scored
ANNOTATIONS = "annotations.sqlite"  # people's judgements

# Names: of every stage's folder
CONFIG = "config.json"  # the whole run's settings
INPUTS = "inputs.json"  # written first: which making of each input the stage works from
MANIFEST = "manifest.json"  # written last: the stage is finished
SHARDS = "shards"  # what long loops have computed so far; gone when the stage is finished

# Names: of a training's folder
METRICS = "metrics.jsonl"
EVENTS = "events"  # TensorBoard's
PROFILE = "profile"  # a device trace, and a table of it
WANDB_ID = "wandb_id"  # of the stage's own run there
CHECKPOINTS = "checkpoints"
WEIGHTS = "weights"  # final weights
VALUE = "value"  # the critic's
SNAPSHOTS = "snapshots"  # a policy's weights on the way, by step
STATISTICS = "scores.json"  # mean and standard deviation of a reward model's scores
TRAINING_SAMPLES = "samples.jsonl"  # a line for each evaluation while a policy samples

# Names: of what other stages leave
GAPS, PAIR_ROWS, HELDOUT = "gaps.npz", "pairs", "heldout"
REPORT, SAMPLE_PAIRS = "report.json", "samples.json"
GAPS_PLOT, EASY_PLOT, AGREEMENT_PLOT, CONFIDENCE_PLOT = (
    "gaps.png", "easy_share.png", "agreement.png", "confidence.png",
)  # fmt: skip
REPLIES_FILE = "replies.jsonl"
JUDGE_TABLE, VERDICTS_FILE = "judge.json", "verdicts.jsonl"


_UNSEALED = (MANIFEST, CHECKPOINTS, EVENTS, PROFILE, SHARDS)
"""What no finished stage is read for: nothing depends on it."""


DAMAGED = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises at a file of arrays that is cut or changed."""
_TEMPORARY = re.compile(r"\..+[.-][0-9a-f]{32}|.+\.orbax-checkpoint-tmp.*")


# Writing --------------------------------------------------------------------------------------------------------------


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """A file, on disk when this returns, whole or not there: see `write_file`."""
    if is_remote(path):
        epath.Path(path).write_bytes(content)
    else:
        write_file(path, lambda stream: stream.write(content))


def write_file(path: epath.PathLike, write: Callable[[IO[bytes]], Any]) -> None:
    """A file of a file system, on disk when this returns, whole or not there: `write` fills it under another name, then
    it is renamed."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)  # a part of it would fill a full disk further
        raise
    temporary.replace(path)
    sync(path.parent)  # the new name itself


def is_temporary(name: str) -> bool:
    """Whether a file or folder has such another name, as encoded rows and Orbax's arrays have too while they are
    written."""
    return bool(_TEMPORARY.fullmatch(name))


def sync(path: epath.PathLike) -> None:
    """Waits until a local file, or the names in a folder, are on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_text(path: epath.PathLike, text: str) -> None:
    """See `write_bytes`. Half a surrogate pair, which a model may sample, is written as its escape."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: epath.PathLike, value: Any) -> None:
    """A JSON file, see `write_bytes`.

    Scalars of NumPy and JAX become numbers, paths text; a number that is not finite is written as text, for JSON has
    none. Raises TypeError for what JSON can't hold.
    """
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def write_lines(path: epath.PathLike, rows: Iterable[Any]) -> None:
    """A JSON Lines file, see `write_json`."""
    write_text(path, "".join(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def write_arrays(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz file of named arrays, see `write_bytes`."""
    held = io.BytesIO()
    np.savez(held, **arrays)  # type: ignore[arg-type]
    write_bytes(path, held.getvalue())


def write_gaps(folder: epath.PathLike, table: GapTable) -> None:
    """The scored pairs of a split."""
    arrays = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    write_arrays(epath.Path(folder) / GAPS, arrays)


def plain(value: Any) -> Any:
    """The value as JSON holds it: see `write_json`."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic) or (isinstance(value, jax.Array | np.ndarray) and value.ndim == 0):
        value = value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# Reading --------------------------------------------------------------------------------------------------------------


def read_json(path: epath.PathLike, default: Any = None) -> Any:
    """A JSON file's value; `default`, where one is given and there is no file. InputError for what is not JSON."""
    path = epath.Path(path)
    if not path.exists():
        if default is not None:
            return default
        raise InputError(f"{path}: not found")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); {_remedy(path)}") from error


def _remedy(path: epath.Path) -> str:
    """What helps against a damaged file: of a run's own folder or its cache that file alone is made again."""
    if path.name == STAGES_FILE or path.parent.name == CACHE:
        return "delete this file, and the same command writes it again"
    return integrity.remedy(path.parent)


def read_lines(path: epath.PathLike) -> list[Any]:
    """The values of a JSON Lines file. InputError, naming the line, for one that is missing or not JSON."""
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"{path}: not found")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; {_remedy(path)}") from error
    rows = []
    for number, line in enumerate(split_lines(text), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
    return rows


def read_arrays(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file. InputError for one that is missing or damaged."""
    return _numpy(path, lambda arrays: {name: arrays[name] for name in arrays.files})


def read_array(path: epath.PathLike) -> np.ndarray:
    """The array of an .npy file. InputError for one that is missing or damaged."""
    return _numpy(path, np.asarray)


def read_gaps(folder: epath.PathLike) -> GapTable:
    """The scored pairs of a split."""
    arrays = read_arrays(epath.Path(folder) / GAPS)
    wanted = [field.name for field in dataclasses.fields(GapTable)]
    if sorted(arrays) != sorted(wanted):
        raise InputError(f"{epath.Path(folder) / GAPS}: holds {', '.join(arrays)}; expected {', '.join(wanted)}")
    return GapTable(**arrays)


def _numpy(path: epath.PathLike, read: Callable[[Any], Any]) -> Any:
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"{path}: not found")
    try:
        return read(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))
    except DAMAGED as error:
        raise InputError(f"{path}: damaged ({error}); {_remedy(path)}") from error


# Stages ---------------------------------------------------------------------------------------------------------------


def write_manifest(folder: epath.PathLike, manifest: Mapping[str, Any]) -> None:
    """Marks a stage's folder as finished; written last, when all else is on disk. It holds the checksum of every file
    that is read again, and its own."""
    folder = epath.Path(folder)
    left = [path.name for path in folder.iterdir() if is_temporary(path.name)] if folder.exists() else []
    files = integrity.of_folder(folder, leave_out=(*_UNSEALED, *left)) if folder.exists() else {}
    for name in [] if is_remote(folder) else files:  # what arrays' library writes may still be on its way
        sync(folder / name)
    write_json(folder / MANIFEST, integrity.seal(plain(dict(manifest) | {"files": files})))


def read_manifest(folder: epath.PathLike) -> dict[str, Any] | None:
    """The manifest of a finished stage; None for an unfinished one. InputError where it is damaged."""
    path = epath.Path(folder) / MANIFEST
    return integrity.unseal(path, read_json(path)) if path.exists() else None


def beneath(folder: epath.PathLike) -> frozenset[str]:
    """The names of all stages that a begun stage rests on, as they wrote it down."""
    path = epath.Path(folder) / INPUTS
    found: set[str] = set()
    for entry in (each for given in read_json(path, default={}).values() for each in given):
        if entry["name"] != BASE and entry["name"] not in found:
            found |= {entry["name"], *beneath(path.parent.parent / f"{entry['name']}-{entry['key']}")}
    return frozenset(found)


def verify(folder: epath.PathLike, weights: bool = True) -> None:
    """InputError, naming the file, where a file of a finished stage is not as it was when the stage ended.

    weights: those too, which may be large."""
    manifest = read_manifest(folder) or {}
    large = (f"{WEIGHTS}/", f"{VALUE}/", f"{SNAPSHOTS}/")
    integrity.verify(folder, manifest.get("files", {}), lambda name: weights or not name.startswith(large))


def stage_folders(workdir: epath.PathLike) -> dict[str, epath.Path]:
    """Name -> folder of a run's stages, as its STAGES_FILE lists them; {} where the folder is no run's."""
    file = epath.Path(workdir) / STAGES_FILE
    folders = read_json(file, default={})
    if not isinstance(folders, dict) or not all(isinstance(each, str) for each in folders.values()):
        raise InputError(f"{file}: expected the names of stages with their folders; {_remedy(file)}")
    return {name: file.parent / folder for name, folder in folders.items()}


def finished_stages(workdir: epath.PathLike) -> dict[str, tuple[epath.Path, dict[str, Any]]]:
    """Name -> folder and manifest of a run's finished stages, in the order of its STAGES_FILE."""
    stages = ((name, folder, read_manifest(folder)) for name, folder in stage_folders(workdir).items())
    return {name: (folder, manifest) for name, folder, manifest in stages if manifest is not None}
