"""Programs' digests enter; what their compiler said of them leaves, also of programs that an earlier plan compiled.

A program that is compiled for a TPU takes minutes and always comes out the same, so its figures are kept in files. The
digest holds everything that they depend on: the program, the topology, the versions of JAX and of the compiler, and the
source of what reads them out of the compiled program's text.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import tempfile
from pathlib import Path

import jax

from mpo_jax.planning import hlo


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program, whatever lies in memory beside it: bytes on one chip.

    arguments: that the program reads, results: that reuse no argument. moved: in the chip's memory. collectives: by
    kind; alone: those of them during which nothing is computed. largest: the biggest temporary, and where it comes
    from. used: what it would have needed, where the compiler gave up for want of memory; 0: it did not. seconds: that
    the compiler took.
    """

    arguments: int = 0
    results: int = 0
    temporaries: int = 0
    moved: float = 0.0
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    alone: dict[str, int] = dataclasses.field(default_factory=dict)
    largest: str = ""
    seconds: float = 0.0
    used: int = 0
    text: str = dataclasses.field(default="", repr=False)


class Known:
    """What was compiled already, by digest. folder: where it is kept for later plans too; None: nowhere.

    programs: how many different ones were asked for. compiles: how many of them no earlier plan had compiled."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.compiles = 0
        self._found: dict[str, Compiled] = {}

    @property
    def programs(self) -> int:
        return len(self._found)

    def get(self, digest: str) -> Compiled | None:
        if digest not in self._found and self.folder is not None:
            file = self.folder / f"{digest}.json"
            if file.is_file():
                self._found[digest] = Compiled(**json.loads(file.read_text()))
        return self._found.get(digest)

    def put(self, digest: str, compiled: Compiled) -> None:
        """Keeps the figures of a program that was compiled just now, its text left out."""
        self.compiles += 1
        self._found[digest] = dataclasses.replace(compiled, text="")
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # Under another name until it is whole: plans may run beside each other, and be killed.
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
        with os.fdopen(handle, "w") as file:
            json.dump(dataclasses.asdict(self._found[digest]), file)
        os.replace(name, self.folder / f"{digest}.json")


def digest(topology: str, loops: tuple[int, int], text: str) -> str:
    """Of a lowered program's text: operations, shapes and shardings. loops: see `hlo.parse`."""
    return hashlib.sha256("\n".join((topology, str(loops), *_compiler(), text)).encode()).hexdigest()


@functools.cache
def _compiler() -> tuple[str, ...]:
    libtpu = next((each.version for each in importlib.metadata.distributions(name="libtpu")), "")
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return jax.__version__, libtpu, *flags, inspect.getsource(hlo)
