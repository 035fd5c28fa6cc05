"""The name of a Python function enters; its scores leave, computed in a process of its own.

So a function that hangs, ends the process or takes all memory is told in a line, and nothing else dies of it.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_jax.errors import InputError
from mpo_jax.scorers import names

_WORKER = Path(__file__).with_name("worker.py")


class Function:
    """A function `f(prompts, replies, records) -> scores` of a module, in a process that begins at once.

    seconds: that the import, and each call, may take. InputError, naming the function, where it is not there, raises,
    takes longer, or its process ends. As a context manager, it ends the process.
    """

    def __init__(self, name: str, seconds: float):
        self._name, self._seconds = name, seconds
        module, function = names.place(name)
        # -P: modules of this package's folder would stand in for the standard library's.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for whoever asks
        )
        self._rest = b""
        self._ask({"path": sys.path, "module": module, "function": function}, "its import")

    def __enter__(self) -> "Function":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # over what was not sent
                stream.close()

    def score(
        self, prompts: Sequence[str], replies: Sequence[str], records: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        """What the function gives, as numbers; `host.checked` says what is wrong with them."""
        asked = {"prompts": list(prompts), "replies": list(replies), "records": [dict(each) for each in records]}
        return self._ask(asked, f"{len(replies)} replies")["scores"]

    def _ask(self, value: Any, what: str) -> Any:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is told below
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()
        answer = json.loads(self._line(what))
        if "error" in answer:
            self.close()
            raise InputError(f"{self._name!r}: {answer['error']}")
        return answer

    def _line(self, what: str) -> bytes:
        """The next line of the process. InputError where none comes in time, or ever."""
        assert self._process.stdout is not None
        until = time.monotonic() + self._seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self.close()
                raise InputError(
                    f"{self._name!r}: no answer to {what} within scorers.seconds={self._seconds:g}; scores so far are "
                    "kept, run the same command again"
                )
            read = os.read(self._process.stdout.fileno(), 1 << 20)
            if not read:
                raise InputError(f"{self._name!r}: {self._end()} over {what}; scores so far are kept")
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _end(self) -> str:
        code = self._process.wait()
        self.close()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return f"its process ended {how}"
