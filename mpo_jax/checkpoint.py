"""Training states and weights enter; folders leave that are whole or not there, and restore onto any mesh.

Arrays go through Orbax, written in the background and marked as complete at the end: no folder is renamed, which object
stores can't. All paths go through epath.
"""

import contextlib
import functools
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import options as ocp_options

from mpo_jax import disk, integrity, processes, sealed
from mpo_jax.errors import InputError
from mpo_jax.store import is_remote
from mpo_jax.types import PyTree, TrainState

_BESIDE = 1 << 20
"""Bytes that lie beside the arrays of a checkpoint: names, shapes, checksums, and a stage's metrics meanwhile."""
_ATOMIC = ocp_options.AtomicityOptions(ocp_options.AtomicityMode.COMMIT_FILE)
_MARK = "commit_success.txt"
"""Orbax's own: the folder is whole."""
_MARKED = "marked"
"""Beside the steps: they are whole by their marks. Earlier versions renamed folders instead. In an object store it also
keeps the folder there when Orbax removes the only step, incomplete, while it looks for others."""
_VOCAB_LEAVES = (("embed", "embedding"), ("lm_head", "kernel"))


class Checkpoints:
    """The checkpoints of one training stage: the last `keep` states, and the best parameters apart from them.

    folder/last/STEP holds a state and a small JSON value beside it; folder/best/STEP the best parameters. All files
    have checksums, which are checked before anything of a checkpoint is read. Saves run in
    the background: an error of one is raised at the next call of any method but `latest_step`. Closing waits for the
    last save. What a killed process left incomplete is not seen, and is removed. One process at a time writes a folder;
    opening it again, after a loop that failed without closing, finishes and closes what was open before.
    """

    def __init__(self, folder: epath.PathLike, keep: int = 2):
        if keep < 1:
            raise InputError(f"keep: {keep}; expected at least 1 checkpoint to resume from")
        folder = _absolute(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._name = str(folder)
        if (abandoned := _open.get(self._name)) is not None:
            # Its save may be on its way still: it completes rather than being removed beneath its writer.
            with contextlib.suppress(Exception):
                abandoned.close()
        _open[self._name] = self
        processes.first(functools.partial(_prepare, folder))
        self._arrays = sealed.Handler(), sealed.Handler()
        self._last = _manager(folder / "last", keep, "state", self._arrays[0])
        self._best = _manager(folder / "best", None, "params", self._arrays[1])
        # A best that no saved state knows of comes from steps that will be taken again.
        known = self.latest_step()
        for step in self._best.all_steps():
            if known is None or step > known:
                self._best.delete(step)

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint (None: there is none). A save on its way counts."""
        return self._last.latest_step()

    def save(self, step: int, state: TrainState, extra: dict[str, Any]) -> None:
        """Begins to save; returns as soon as the arrays are copied, so that the next step may donate them.

        extra: a JSON value: the best so far, the data's position. Raises ValueError for a step not after the latest;
        InputError where the file system has no room for the state. Those before are kept until it is complete.
        """
        self.wait()  # a state may name a best: that best must be on disk before it
        self._prune_best()
        _check_room(self._name, state, f"the checkpoint of step {step}")
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_without_keys(state)), extra=ocp.args.JsonSave(integrity.seal(extra))
        )
        if not self._last.save(step, args=args):
            raise ValueError(f"step {step} is not after the latest checkpoint, {self.latest_step()}; nothing was saved")

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step with the shapes, dtypes and shardings of `like` (arrays or ShapeDtypeStructs), its JSON.

        The mesh may be another than that of the save, and so may the padding of the vocabulary: rows that are missing
        become 0, rows beyond are dropped. InputError, naming the leaf, where anything else differs; naming the file,
        where one is damaged.
        """
        self.wait()
        plain = _without_keys(like)
        advice = self._advice(step)
        self._check(self._last, step, plain, "state", advice)
        extra = integrity.read(epath.Path(self._last.directory) / str(step) / "extra" / "metadata", advice)
        found = self._last.restore(step, args=ocp.args.Composite(state=_restore_args(plain)))
        return _with_keys(found.state, like), extra

    def save_best(self, step: int, params: PyTree) -> None:
        """Begins to save the best parameters; those before are kept as long as a state to resume from names them."""
        self._best.wait_until_finished()
        # A step taken again after a resume replaces its best.
        if step in self._best.all_steps():
            self._best.delete(step)
        _check_room(self._name, params, f"the best weights, of step {step},")
        self._best.save(step, args=ocp.args.Composite(params=ocp.args.PyTreeSave(params)), force=True)

    def restore_best(self, step: int, like: PyTree) -> PyTree:
        """The best parameters, saved at `step`; shapes, dtypes and shardings as in `restore`."""
        self._best.wait_until_finished()
        again = f"delete the folder {epath.Path(self._name).name}, and the same command trains again"
        self._check(self._best, step, like, "params", again)
        return self._best.restore(step, args=ocp.args.Composite(params=_restore_args(like))).params

    def check_room(self, state: PyTree) -> None:
        """InputError where the file system has no room for a state (arrays or their shapes) beside those there are."""
        _check_room(self._name, state, "a checkpoint")

    def check(self) -> None:
        """Raises what a save in the background met, without waiting: cheap enough for every step."""
        for manager in (self._best, self._last):
            if not manager.is_saving_in_progress():
                manager.wait_until_finished()  # at rest: waits for nothing, but hands over the error

    def wait(self) -> None:
        """Until all saves are on disk; raises what went wrong."""
        self._best.wait_until_finished()
        self._last.wait_until_finished()

    def close(self) -> None:
        """Waits for all saves, raises what went wrong, and ends the background threads."""
        try:
            self.wait()
            self._prune_best()
        finally:
            for arrays in self._arrays:
                arrays.settle()  # whoever opens the folder next may remove what is incomplete
            if _open.get(self._name) is self:
                del _open[self._name]
            self._best.close()
            self._last.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        # An error of the loop is not hidden by one of a save.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
            self.close()

    def _prune_best(self) -> None:
        """Keeps the newest best, and for every kept state the newest that it can name; both managers are at rest."""
        bests, states = sorted(self._best.all_steps()), self._last.all_steps()
        named = {max((best for best in bests if best <= state), default=None) for state in states}
        for step in bests[:-1]:
            if step not in named:
                self._best.delete(step)

    def _advice(self, step: int) -> str:
        """What to do about a damaged state of a step."""
        before = max((other for other in self._last.all_steps() if other < step), default=None)
        goes_on = "begins the stage again" if before is None else f"resumes from the one before, of step {before}"
        return f"delete the folder {epath.Path(self._name).name}/last/{step}, and the same command {goes_on}"

    def _check(self, manager: ocp.CheckpointManager, step: int, like: PyTree, item: str, advice: str) -> None:
        place = epath.Path(manager.directory) / str(step) / item
        if step not in manager.all_steps():
            raise InputError(f"{place}: not found; complete are the steps {sorted(manager.all_steps())}")
        sealed.verify(place, advice)
        _check_shapes(place, like)


_open: dict[str, Checkpoints] = {}


def _prepare(folder: epath.Path) -> None:
    """Removes what killed saves left, before the managers are made: Orbax's own removal goes on in a thread, beside
    which a step that is being deleted looks incomplete and would be removed twice."""
    for steps in (folder / "last", folder / "best"):
        if not (steps / _MARKED).exists():
            _mark_earlier(steps)
        for place in steps.iterdir():
            if place.is_dir():
                _drop_half(place)


def _mark_earlier(steps: epath.Path) -> None:
    """Gives steps that an earlier version left the marks that are looked for now: it wrote under another name, so that
    each was whole when it had its own."""
    whole = [step for step in steps.iterdir() if step.name.isdigit()] if steps.exists() else []
    for step in () if is_remote(steps) else whole:  # in object stores it left marks already
        for place in [*(item for item in step.iterdir() if item.is_dir()), step]:
            (place / _MARK).write_text("whole since its folder was renamed\n")
    steps.mkdir(parents=True, exist_ok=True)
    (steps / _MARKED).write_text("")


def _manager(folder: epath.Path, keep: int | None, arrays: str, handler: sealed.Handler) -> ocp.CheckpointManager:
    """arrays: the item that holds them, by the handler."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, atomicity_options=_ATOMIC)
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for arguments in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        handlers.add(arrays, arguments, handler)
    return ocp.CheckpointManager(folder, options=options, handler_registry=handlers)


def save_weights(folder: epath.PathLike, weights: PyTree) -> None:
    """Writes weights to a folder of their own, complete on return; weights that were there are replaced. InputError
    where they have no room."""
    processes.first(functools.partial(_drop_half, _absolute(folder)))  # it would take the room of the new ones
    _check_room(folder, weights, "its weights")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), atomicity_options=_ATOMIC) as checkpointer:
        checkpointer.save(_absolute(folder), args=ocp.args.PyTreeSave(weights), force=True)


def _drop_half(folder: epath.Path) -> None:
    """Deletes what a save that did not come to its end has left."""
    if folder.exists() and not (folder / _MARK).exists():
        folder.rmtree()


def restore_weights(folder: epath.PathLike, like: PyTree) -> PyTree:
    """Reads weights with the shapes, dtypes and shardings of `like`, by the rules of `Checkpoints.restore`.

    InputError where the folder has none, or others.
    """
    place = _absolute(folder)
    if not place.exists():
        raise InputError(f"{place}: not found; expected the weights of a finished stage")
    _check_shapes(place, like)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(place, args=_restore_args(like))


def _check_room(folder: epath.PathLike, tree: PyTree, what: str) -> None:
    """As process 0 sees it: all processes write to one file system, the arrays' parts together."""
    size = _BESIDE + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_without_keys(tree)))
    processes.first(functools.partial(disk.check_room, folder, size, what))


def _absolute(folder: epath.PathLike) -> epath.Path:
    path = epath.Path(folder)
    return path if is_remote(path) else path.absolute()  # Orbax refuses relative paths


def _restore_args(like: PyTree) -> ocp.args.PyTreeRestore:
    """strict=False cuts or zero-pads a leaf to its shape; `_check_shapes` allows that to vocabularies alone."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    arguments = jax.tree.map(
        lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype, strict=False),
        abstract,
    )
    return ocp.args.PyTreeRestore(item=abstract, restore_args=arguments)


def _check_shapes(place: epath.Path, like: PyTree) -> None:
    saved = _shapes(ocp.PyTreeCheckpointHandler().metadata(place).tree)
    wanted = _shapes(like)
    for name in sorted(saved.keys() ^ wanted.keys()):
        which = (
            "is in the checkpoint, but is not expected" if name in saved else "is expected, but not in the checkpoint"
        )
        raise InputError(f"{place}: {'/'.join(name)} {which}; was it saved with other settings?")
    for name, shape in wanted.items():
        skip = int(name[-2:] in _VOCAB_LEAVES and len(shape) == len(saved[name]))
        if shape[skip:] != saved[name][skip:]:
            raise InputError(f"{place}: {'/'.join(name)} has shape {saved[name]}; expected {shape}")


def _shapes(tree: PyTree) -> dict[tuple[str, ...], tuple[int, ...]]:
    return {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if hasattr(leaf, "shape")
    }


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


def _key_impl(key) -> str:
    names: list[Any] = []  # `key_impl` takes keys and tracers, but no ShapeDtypeStruct
    jax.eval_shape(lambda traced: names.append(jax.random.key_impl(traced)), key)
    return names[0]


def _with_keys(found: PyTree, like: PyTree) -> PyTree:
    leaves = [
        jax.random.wrap_key_data(leaf, impl=_key_impl(old)) if _is_key(old) else leaf
        for leaf, old in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
