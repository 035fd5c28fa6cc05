"""Command lines of `mpo` enter, as JSON on the standard input; each is run, and what came of it leaves.

The package is imported once and every run is a fork of that process, so that many wrong commands cost little more than
one. Input: a list of {"arguments": what follows `mpo`, "interrupt": seconds until Ctrl-C, or null}. Output: a list of
{"code": exit code, "output": all that was written, "compiles": programs compiled}, on the last line.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import tempfile
import threading
import traceback

from transformers import AutoTokenizer, LlamaConfig  # noqa: F401 - loaded before the forks, as the modules below

from mpo_jax import allocator, annotate, export, main, metrics, mpo, plan, render, runs, sample, show  # noqa: F401
from mpo_jax.data import sources  # noqa: F401
from mpo_jax.stages import reward, sft  # noqa: F401

LIMIT = 90
"""Seconds after which a run writes where it hangs, and ends."""


def run(arguments: list[str], interrupt: float | None = None) -> dict:
    with tempfile.TemporaryFile() as written:
        child = os.fork()
        if child == 0:
            _run(arguments, written.fileno())
        if interrupt is not None:
            threading.Timer(interrupt, _interrupt, [child]).start()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        written.seek(0)
        *lines, compiles = written.read().decode(errors="replace").split("\n")[:-1] or [""]
    if not compiles.isdigit():  # it hung, or a signal ended it
        return {"code": code, "output": "\n".join([*lines, compiles]), "compiles": -1}
    return {"code": code, "output": "\n".join(lines), "compiles": int(compiles)}


def _interrupt(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
        os.kill(child, signal.SIGINT)


def _run(arguments: list[str], output: int) -> None:
    """Becomes the command; writes how many programs it compiled as the last line."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    sys.argv = ["mpo", *arguments]
    allocator.restart = lambda: None  # it would begin another process, that imports everything again
    metrics.compiles()
    code: int | str | None = 0
    try:
        mpo.main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        code = traceback.format_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    print(f"\n{metrics.compiles()}", flush=True)
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    print(json.dumps([run(**line) for line in json.load(sys.stdin)]))
