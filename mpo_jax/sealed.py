"""Arrays on their way into a checkpoint enter; they leave with the checksums of all files that hold them, and are held
against these when they are read.

Every process sums up what it has written itself, in the background and before the checkpoint counts as complete: no
step waits for it, no byte travels to another host, and a complete checkpoint has all its checksums.
"""

import contextlib
import functools
import json

import jax
import orbax.checkpoint as ocp
from etils import epath

from mpo_jax import integrity, processes

_OWN = "ocdbt.process_"
"""How Orbax begins the name of the folder that one process writes; beside those lies what process 0 writes for all."""
_ALL = "checksums.json"


class Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's own, with checksums."""

    def __init__(self, **options):
        super().__init__(**options)
        self._written: list[ocp.future.Future] = []

    async def async_save(self, directory, *arguments, **options):
        """As Orbax does; complete when this process's checksums are written too."""
        self._written = await super().async_save(directory, *arguments, **options) or []
        place = epath.Path(getattr(directory, "path", directory))  # Orbax may not have made it yet
        return [ocp.future.ChainedFuture(self._written, functools.partial(_seal_own, place))]

    def settle(self) -> None:
        """Until nothing is written any more, as Orbax doesn't wait where another item of the save has failed."""
        for writing in self._written:
            with contextlib.suppress(Exception):
                writing.result()

    def finalize(self, directory: epath.Path) -> None:
        """As Orbax does, on process 0 once all have written; then come the checksums of what is left."""
        super().finalize(directory)
        sealed = [path.name.removeprefix(_file("")) for path in directory.glob(_file("*"))]
        _write(directory / _ALL, integrity.of_folder(directory, [f"{_OWN}{process}" for process in sealed]))


def verify(folder: epath.Path, advice: str) -> None:
    """InputError, naming the file, where one of the files of a checkpoint's arrays is not as it was written.

    advice: what helps. Each process reads a part of the files, and all raise where one does.
    """
    processes.together(functools.partial(_verify_part, folder, advice))


def _verify_part(folder: epath.Path, advice: str) -> None:
    files = _read(folder / _ALL, advice)
    own = [name for name in files if name.startswith(_file(""))]
    for name in own:
        files |= _read(folder / name, advice)
    mine = sorted(files)[jax.process_index() :: jax.process_count()]
    integrity.verify(folder, {name: files[name] for name in mine}, advice=advice)


def _seal_own(directory: epath.Path) -> None:
    name = f"{_OWN}{jax.process_index()}"
    if not (directory / name).exists():  # it holds no part of any array
        return
    files = {f"{name}/{file}": known for file, known in integrity.of_folder(directory / name).items()}
    _write(directory / _file(jax.process_index()), files)


def _file(process: int | str) -> str:
    return f"checksums_{process}"


def _write(path: epath.Path, files: dict[str, str]) -> None:
    # Like Orbax's own files it is not forced to disk: the folder has another name until all of it is there.
    path.write_text(json.dumps(integrity.seal({"files": files})))


def _read(path: epath.Path, advice: str) -> dict[str, str]:
    return integrity.read(path, advice)["files"]
