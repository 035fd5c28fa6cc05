"""Takes the replies of a run's evaluation; people judge them on a web page, without seeing which policy wrote which.
The judgements become part of the run's report.

`python -m mpo_jax.annotate --run=runs/tldr --policies=sft,mpo` serves the page to this machine. `--token=SECRET` serves
it to the network, to those who know the token. `--export=FILE.csv` (or .jsonl) writes the judgements to a file instead.
"""

import socket

from absl import flags
from etils import epath

from mpo_jax import artifacts, command
from mpo_jax.database import alone
from mpo_jax.errors import InputError
from mpo_jax.evaluation import annotation, judge

_SHORTEST_TOKEN = 16
"""Characters. Guessing one over a network must be hopeless."""


def replies_of(run: epath.Path, evaluation: str = "") -> epath.Path:
    """The replies.jsonl of a run's finished evaluate stage. InputError where there is none, or several unnamed."""
    if not (run / artifacts.STAGES_FILE).exists():
        raise InputError(f"--run: {run} holds no {artifacts.STAGES_FILE}; expected the --workdir of a run")
    finished = {name: folder / artifacts.REPLIES_FILE for name, (folder, _) in artifacts.finished_stages(run).items()}
    found = {name: file for name, file in finished.items() if file.exists()}
    if not found:
        raise InputError(f"--run: {run} has no finished evaluate stage; run it first")
    if evaluation not in found and (evaluation or len(found) > 1):
        raise InputError(f"--evaluation: {evaluation!r}; expected one of {', '.join(found)}")
    return found[evaluation or next(iter(found))]


def bind(host: str | None, port: int, token: str) -> tuple[str, socket.socket]:
    """The address to serve at, and a socket that listens there. InputError for the network without a good token."""
    host = host or ("0.0.0.0" if token else "127.0.0.1")
    if token and (len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isalnum()):
        raise InputError(f"--token: expected at least {_SHORTEST_TOKEN} letters and digits")
    if host not in annotation.LOOPBACK and not token:
        raise InputError(f"--host: {host} can be reached from other machines; give a --token too")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        raise InputError(f"--port: {host}:{port} can't be served ({error.strerror}); try --port=0") from error
    return host, listener


def export(file: epath.Path, run: epath.Path) -> None:
    """Writes all judgements of a run, as the file's name says: .jsonl or .csv."""
    writers = {".jsonl": annotation.as_jsonl, ".csv": annotation.as_csv}
    if file.suffix not in writers:
        raise InputError(f"--export: {file}; expected a name that ends in {' or '.join(writers)}")
    with annotation.Store(run / artifacts.ANNOTATIONS) as store:
        judgements = store.all()
    file.write_text(writers[file.suffix](judgements))
    print(f"{len(judgements)} judgements written to {file}")


def define() -> None:
    flags.DEFINE_string("run", None, "The run's folder.")
    flags.DEFINE_list("policies", [], "Policies to compare, such as sft,mpo; empty: all policies of the evaluation.")
    flags.DEFINE_string("evaluation", "", "The evaluate stage whose replies are judged, if the run has several.")
    flags.DEFINE_integer("count", 0, "Number of prompts; 0: all.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Seed that shuffles the order of the items and the sides of the replies.")
    flags.DEFINE_string("question", "Which reply is better?", "The question that annotators are asked.")
    flags.DEFINE_integer("port", 8008, "Port of the page; 0: any free port.", lower_bound=0, upper_bound=65535)
    flags.DEFINE_string("host", None, "Address to serve at. Default: 127.0.0.1, or with a token 0.0.0.0.")
    flags.DEFINE_string(
        "token", "", "Secret that every visitor must give; needed if other machines can reach the page."
    )
    flags.DEFINE_string("export", None, "Write the judgements to this .jsonl or .csv file, and serve no page.")


def work() -> None:
    given = flags.FLAGS
    if not given.run:
        raise InputError("--run is missing; give the run's folder")
    run = epath.Path(given.run)
    rows = judge.read_replies(replies_of(run, given.evaluation))
    if given.export is not None:
        command.written(given.export, "export")
        export(epath.Path(given.export), run)
        return
    try:
        from mpo_jax.evaluation import annotation_page, annotation_server
    except ImportError as error:
        raise InputError(f'{error.name} is not installed; pip install "mpo_jax[annotate]"') from error
    pairs = judge.pairs_of(rows, given.policies, "")
    items = annotation.items(rows, pairs, given.seed, given.count)
    file = run / artifacts.ANNOTATIONS
    host, listener = bind(given.host, given.port, given.token)
    with alone(file, "--run"), annotation.Store(file) as store:
        application = annotation_page.create(items, store, given.seed, given.question, given.token)
        shown = {"0.0.0.0": socket.gethostname(), "::1": "[::1]"}.get(host, host)
        address = f"http://{shown}:{listener.getsockname()[1]}/"
        query = f"?token={given.token}" if given.token else ""
        print(f"{len(items)} comparisons at {address}{query} (Ctrl-C ends)", flush=True)
        annotation_server.serve(application, listener)
        print(f"{len(store.all())} judgements kept; `mpo report {run}` puts them into the report")


def run() -> None:
    command.start(define, work)


if __name__ == "__main__":
    run()
