"""Training states, weights and manifests enter; folders leave that are whole or not there, and restore onto any mesh.

Arrays go through Orbax, written in the background under a temporary name and renamed when complete. JSON files are
written atomically. All paths go through epath, so that gs:// works.
"""

import hashlib
import json
import uuid
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from mpo_jax.errors import InputError
from mpo_jax.types import PyTree, TrainState

MANIFEST = "manifest.json"
_BEST = "best"
_BLOCK = 1 << 22


class Checkpoints:
    """The checkpoints of one training stage: the last `keep` states, and the best parameters.

    folder/STEP holds a state and a small JSON value beside it; folder/best/STEP the best parameters. Saves run in the
    background: an error of one is raised at the next call. Closing waits for the last.
    """

    def __init__(self, folder: epath.PathLike, keep: int = 2):
        self._folder = epath.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self._folder / "last", options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        )
        self._best = ocp.CheckpointManager(
            self._folder / _BEST, options=ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        )

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, extra: dict[str, Any]) -> None:
        """Begins to save; returns as soon as the arrays are copied, so that the next step may donate them."""
        self._manager.check_for_errors()
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.PyTreeSave(_without_keys(state)), extra=ocp.args.JsonSave(extra)),
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step with the shapes and shardings of `like` (arrays or ShapeDtypeStructs), and its JSON.

        The mesh may be another than that of the save, and so may the padding of the vocabulary: rows that are missing
        become 0, rows beyond are dropped.
        """
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(state=_restore_args(_without_keys(like)), extra=ocp.args.JsonRestore()),
        )
        return _with_keys(found.state, like), found.extra

    def save_best(self, step: int, params: PyTree) -> None:
        """Replaces the best parameters."""
        self._best.check_for_errors()
        # A stage killed after its best was saved, and before its state was, comes to this step again.
        self._best.save(
            step, args=ocp.args.PyTreeSave(params), force=True
        ) if step not in self._best.all_steps() else None

    def restore_best(self, step: int, like: PyTree) -> PyTree:
        """The best parameters, saved at `step`."""
        self._best.wait_until_finished()
        return self._best.restore(step, args=_restore_args(like))

    def wait(self) -> None:
        """Until all saves are on disk; raises what went wrong."""
        for manager in (self._manager, self._best):
            manager.wait_until_finished()
            manager.check_for_errors()

    def close(self) -> None:
        self.wait()
        self._manager.close()
        self._best.close()


def save_weights(folder: epath.PathLike, weights: PyTree) -> None:
    """Writes weights to a folder of their own, complete on return."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(epath.Path(folder), args=ocp.args.PyTreeSave(weights), force=True)


def restore_weights(folder: epath.PathLike, like: PyTree) -> PyTree:
    """Reads weights with the shapes, dtypes and shardings of `like`. InputError where the folder has none."""
    folder = epath.Path(folder)
    if not folder.exists():
        raise InputError(f"{folder}: not found; expected the weights of a finished stage")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder, args=_restore_args(like))


def _restore_args(like: PyTree) -> ocp.args.PyTreeRestore:
    """strict=False lets a leaf be cut or zero-padded to its shape: how a vocabulary padded for another mesh fits."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    arguments = jax.tree.map(
        lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype, strict=False),
        abstract,
    )
    return ocp.args.PyTreeRestore(item=abstract, restore_args=arguments)


def _is_key(leaf) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: PyTree) -> PyTree:
    """Typed PRNG keys as their data, which is what a file can hold."""

    def data(leaf):
        if not _is_key(leaf):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            shape = jax.eval_shape(jax.random.key_data, leaf)
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=leaf.sharding)
        return jax.random.key_data(leaf)

    return jax.tree.map(data, tree)


def _with_keys(found: PyTree, like: PyTree) -> PyTree:
    leaves = [
        jax.random.wrap_key_data(leaf) if _is_key(old) else leaf
        for leaf, old in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


# Manifests and hashes -------------------------------------------------------------------------------------------------


def write_manifest(folder: epath.PathLike, manifest: dict[str, Any]) -> None:
    """Marks a stage's folder as finished; written last."""
    write_json(epath.Path(folder) / MANIFEST, manifest)


def read_manifest(folder: epath.PathLike) -> dict[str, Any] | None:
    """The manifest of a finished stage; None for an unfinished one. InputError if it is not valid JSON."""
    path = epath.Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete the folder to run the stage again") from error


def write_json(path: epath.PathLike, value: Any) -> None:
    """A JSON file, whole or not there: written under another name, then renamed."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    temporary.write_text(json.dumps(value, indent=1, default=str))
    temporary.replace(path)


def hash_settings(value: Any) -> str:
    """A stable hash of a JSON-able value; the order of keys does not matter, tuples are lists."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def fingerprint_files(path: epath.PathLike) -> str:
    """A hash of a file's content, or of the names and contents of all files beneath a folder."""
    path = epath.Path(path)
    state = hashlib.blake2b(digest_size=16)
    for name, file in sorted(_files(path)):
        state.update(name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                state.update(block)
    return state.hexdigest()


def _files(path: epath.Path, prefix: str = ""):
    if not path.is_dir():
        yield prefix + path.name, path
        return
    for child in path.iterdir():
        yield from _files(child, f"{prefix}{path.name}/" if prefix else "/")
