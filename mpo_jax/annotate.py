"""A run's replies enter; people judge them on a local web page, blind; their judgements leave, into the run's report.

`python -m mpo_jax.annotate --run=runs/tldr --policies=sft,mpo` serves the page to this machine. `--token=SECRET` serves
it to the network, to those who bring the token. `--export=FILE.csv` (or .jsonl) writes what was judged and ends.
"""

import socket
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from etils import epath

from mpo_jax import checkpoint
from mpo_jax.errors import InputError
from mpo_jax.evaluation import annotation, judge

_SHORTEST_TOKEN = 16
"""Characters. Guessing one over a network must be hopeless."""


def replies_of(run: epath.Path, evaluation: str = "") -> epath.Path:
    """The replies.jsonl of a run's finished evaluate stage. InputError where there is none, or several unnamed."""
    if not (run / checkpoint.STAGES).exists():
        raise InputError(f"--run: {run} holds no stages.json; expected the --workdir of a run")
    found = {
        name: folder / "replies.jsonl"
        for name, (folder, manifest) in checkpoint.finished_stages(run).items()
        if manifest["kind"] == "evaluate"
    }
    if not found:
        raise InputError(f"--run: {run} has no finished evaluate stage; run it first")
    if evaluation not in found and (evaluation or len(found) > 1):
        raise InputError(f"--evaluation: {evaluation!r}; expected one of {', '.join(found)}")
    return found[evaluation or next(iter(found))]


def bind(host: str | None, port: int, token: str) -> tuple[str, socket.socket]:
    """The address to serve at, and a socket that listens there. InputError for the network without a good token."""
    from mpo_jax.evaluation.annotation_page import LOOPBACK

    host = host or ("0.0.0.0" if token else "127.0.0.1")
    if token and (len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isalnum()):
        raise InputError(f"--token: expected at least {_SHORTEST_TOKEN} letters and digits")
    if host not in LOOPBACK and not token:
        raise InputError(f"--host: {host} is beyond this machine; give a --token too")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        raise InputError(f"--port: {host}:{port} can't be served ({error.strerror}); try --port=0") from error
    return host, listener


def serve(application: Any, listener: socket.socket) -> None:
    """Until it is told to stop (Ctrl-C, SIGTERM)."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(application, log_level="warning", ws="none", server_header=False))
    server.run(sockets=[listener])


def export(file: epath.Path, run: epath.Path) -> None:
    """Writes all judgements of a run, as the file's name says: .jsonl or .csv."""
    writers = {".jsonl": annotation.as_jsonl, ".csv": annotation.as_csv}
    if file.suffix not in writers:
        raise InputError(f"--export: {file}; expected a name that ends in {' or '.join(writers)}")
    with annotation.Store(run / annotation.FILE) as store:
        judgements = store.all()
    file.write_text(writers[file.suffix](judgements))
    print(f"{len(judgements)} judgements written to {file}")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        _run()
    except InputError as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f'error: {error.name} is not installed; pip install "mpo_jax[annotate]"')


def _run() -> None:
    if _RUN.value is None:
        raise InputError("--run is missing; give the run's folder")
    run = epath.Path(_RUN.value)
    if "://" in _RUN.value:
        raise InputError("--run: judgements lie in SQLite; expected a folder on a file system (mount it)")
    rows = judge.read_replies(replies_of(run, _EVALUATION.value))
    if _EXPORT.value is not None:
        export(epath.Path(_EXPORT.value), run)
        return
    from mpo_jax.evaluation import annotation_page

    pairs = judge.pairs_of(rows, _POLICIES.value, "")
    items = annotation.items(rows, pairs, _SEED.value, _COUNT.value)
    host, listener = bind(_HOST.value, _PORT.value, _TOKEN.value)
    with annotation.Store(run / annotation.FILE) as store:
        application = annotation_page.create(items, store, _SEED.value, _QUESTION.value, _TOKEN.value)
        shown = {"0.0.0.0": socket.gethostname(), "::1": "[::1]"}.get(host, host)
        address = f"http://{shown}:{listener.getsockname()[1]}/"
        query = f"?token={_TOKEN.value}" if _TOKEN.value else ""
        print(f"{len(items)} comparisons at {address}{query} (Ctrl-C ends)", flush=True)
        serve(application, listener)


if __name__ == "__main__":
    _RUN = flags.DEFINE_string("run", None, "The run's folder.")
    _POLICIES = flags.DEFINE_list(
        "policies", [], "Policies to compare, as sft,mpo; empty: all that the evaluation has."
    )
    _EVALUATION = flags.DEFINE_string("evaluation", "", "Whose replies, where the run has several evaluate stages.")
    _COUNT = flags.DEFINE_integer("count", 0, "Prompts; 0: all.", lower_bound=0)
    _SEED = flags.DEFINE_integer("seed", 0, "Shuffles the order of items and the sides of replies.")
    _QUESTION = flags.DEFINE_string("question", "Which reply is better?", "What annotators are asked.")
    _PORT = flags.DEFINE_integer("port", 8008, "Of the page; 0: any free one.", lower_bound=0, upper_bound=65535)
    _HOST = flags.DEFINE_string("host", None, "Address to serve at. Default: 127.0.0.1, or with a token 0.0.0.0.")
    _TOKEN = flags.DEFINE_string("token", "", "What every visitor must bring; needed beyond this machine.")
    _EXPORT = flags.DEFINE_string("export", None, "Write the judgements to this .jsonl or .csv file, serve nothing.")
    app.run(main)
