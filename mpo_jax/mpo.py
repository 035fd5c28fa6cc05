"""The console command `mpo`: a command's name and its flags enter; that command runs.

    mpo run --config=quickstart --workdir=runs/quickstart

`mpo COMMAND --help` lists the flags and settings of a command. `python -m mpo_jax.main` is `mpo run`.
"""

import atexit
import difflib
import importlib
import os
import signal
import sys

from mpo_jax import __version__, allocator
from mpo_jax.errors import INTERRUPTED

COMMANDS = {
    "run": ("mpo_jax.main", "run the stages of a config that are not finished"),
    "plan": ("mpo_jax.plan", "estimate what every stage needs on a TPU slice or a GPU, before you pay for it"),
    "show": ("mpo_jax.show", "print one record of a data set with all its tokens, or the reference of all settings"),
    "sample": ("mpo_jax.sample", "sample replies from a model or from a finished stage"),
    "export": ("mpo_jax.export", "write a finished stage as a Hugging Face folder, with a model card"),
    "annotate": ("mpo_jax.annotate", "serve a page on which people judge replies"),
    "report": ("mpo_jax.render", "write a run's report again, or a report over several runs"),
    "runs": ("mpo_jax.runs", "list runs, their stages and main figures, and what differs between two; free disk space"),
}
"""Name -> module, whose `run` is called, and a line of help."""


def main() -> None:
    atexit.register(_deaf)  # before all others, so that it is called behind them
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "help", "--help", "-h"):
        print(_help())
        sys.exit(0 if name else 1)
    if name == "--version":
        print(f"mpo_jax {__version__}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COMMANDS)}"
        sys.exit(f"error: mpo: no command {name!r}; {hint}")
    if os.getcwd() not in sys.path and "" not in sys.path:  # as for `python -m`: scorers and plugins may lie here
        sys.path.append(os.getcwd())
    if name == "run":
        allocator.restart()
    sys.argv = [f"mpo {name}", *sys.argv[2:]]
    before = signal.signal(signal.SIGINT, _stop)
    command = importlib.import_module(COMMANDS[name][0])
    signal.signal(signal.SIGINT, before)
    command.run()


def _stop(*_) -> None:
    """Ctrl-C during the imports: an exception in the midst of them can crash the interpreter."""
    print("stopped", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


def _deaf() -> None:
    """The interpreter's last moments, in which a signal would change the exit code of a command that is done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _help() -> str:
    lines = ["usage: mpo COMMAND [--flag=value ...]", ""]
    lines += [f"  {name:9} {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join([*lines, "", "`mpo COMMAND --help` lists a command's flags and settings."])


if __name__ == "__main__":
    main()
