"""Lists of arguments enter, as JSON on the standard input; `mpo_jax.main` is run with each, and what came of it leaves.

The package is imported once and every run is a fork of that process, so that many wrong commands cost little more than
one. Output: a JSON list of {"code": exit code, "output": all that was written, "compiles": programs compiled}.
"""

import faulthandler
import json
import os
import sys
import tempfile

from transformers import AutoTokenizer, LlamaConfig  # noqa: F401 - loaded before the forks, as the next two lines

from mpo_jax import main, metrics
from mpo_jax.data import sources  # noqa: F401
from mpo_jax.stages import reward, sft  # noqa: F401

LIMIT = 60
"""Seconds after which a run writes where it hangs, and ends."""


def run(arguments: list[str]) -> dict:
    with tempfile.TemporaryFile() as written:
        child = os.fork()
        if child == 0:
            _run(arguments, written.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        written.seek(0)
        *lines, compiles = written.read().decode().splitlines() or [""]
    if not compiles.isdigit():  # it hung, or a signal ended it
        return {"code": code, "output": "\n".join([*lines, compiles]), "compiles": -1}
    return {"code": code, "output": "\n".join(lines), "compiles": int(compiles)}


def _run(arguments: list[str], output: int) -> None:
    """Becomes the command; writes how many programs it compiled as the last line."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    sys.argv = ["mpo_jax.main", *arguments]
    metrics.compiles()
    code: int | str | None = 0
    try:
        main.run()
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    print(f"\n{metrics.compiles()}", flush=True)
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    print(json.dumps([run(arguments) for arguments in json.load(sys.stdin)]))
