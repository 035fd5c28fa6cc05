"""Functions and servers that break in every way they can enter; one line leaves, and every score given before it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from mpo_jax import settings as declared
from mpo_jax import stopping
from mpo_jax.errors import INTERRUPTED, InputError, Stopped
from mpo_jax.scorers import host
from mpo_jax.scorers.limits import Limits
from tests.tools import processes
from tests.tools.scorer_server import ScorerServer

FUNCTIONS = """
import os, signal, sys, time

def length(prompts, replies, records):
    print("a function may print")
    return [len(reply) + record.get("extra", 0) for reply, record in zip(replies, records)]

def some(prompts, replies, records):
    return [None if "none" in reply else float(len(reply)) for reply in replies]

def raises(prompts, replies, records):
    raise ValueError("no good")

def nan(prompts, replies, records):
    return [float("nan")] * len(replies)

def short(prompts, replies, records):
    return [1.0] * (len(replies) - 1)

def text(prompts, replies, records):
    return ["1.0"] * len(replies)

def hangs(prompts, replies, records):
    time.sleep(60)

def dies(prompts, replies, records):
    os.kill(os.getpid(), signal.SIGSEGV)

def ends(prompts, replies, records):
    sys.exit(3)

def third(prompts, replies, records):
    if any("reply 5" in reply for reply in replies):
        raise RuntimeError("the third batch")
    open(os.environ["ASKED"], "a").write("".join(reply + "\\n" for reply in replies))
    return [float(len(reply)) for reply in replies]

def interrupts(prompts, replies, records):
    open(os.environ["ASKED"], "a").write("".join(reply + "\\n" for reply in replies))
    if any("reply 2" in reply for reply in replies):
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.5)
    return [float(len(reply)) for reply in replies]


def right(prompts, replies, records):
    open(os.environ["ASKED"], "a").write("".join(reply + "\\n" for reply in replies))
    return [float(reply == record["columns"]["answer"]) for reply, record in zip(replies, records)]

not_a_function = 3
"""
HANGS = """
import sys
sys.path[:0] = sys.argv[1:3]
from mpo_jax.scorers.python import Function
function = Function(sys.argv[3], 60)
print(function._process.pid, flush=True)
function.score(["a"], ["b"], [{}])
"""
ROOT = Path(__file__).resolve().parent.parent.parent
REPLIES = [f"reply {number}" + "!" * number for number in range(7)]


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "some_scorers.py").write_text(FUNCTIONS)
    (tmp_path / "broken_scorers.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "python:some_scorers"


def limits(**given) -> Limits:
    return declared.parse(Limits, {"batch": 2, "seconds": 20.0, "backoff": 0.01, "attempts": 3} | given)


def asked(name, kept=None, replies=REPLIES, records=None, **given) -> np.ndarray:
    records = [{}] * len(replies) if records is None else records
    with host.opened(name, limits(**given), kept) as score:
        return score(["a prompt"] * len(replies), replies, records)


def workers() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "worker.py" in " ".join(each.cmdline())]


def test_a_function_scores_by_text_and_record_and_may_have_no_score(module):
    extra = [{"extra": 100 * number} for number in range(7)]
    np.testing.assert_array_equal(
        asked(f"{module}:length", records=extra), [len(reply) + 100 * n for n, reply in enumerate(REPLIES)]
    )
    found = asked(f"{module}:some", replies=["none", "a", "none at all", "abc"])
    np.testing.assert_array_equal(found, np.array([np.nan, 1, np.nan, 3], np.float32))
    assert asked(f"{module}:length", replies=[]).shape == (0,)
    assert not workers(), "the process ends with its use"


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("raises", r"raised ValueError: no good \(line 12 of some_scorers\.py\)"),
        ("nan", "gave nan to reply 0 of 2, 'reply 0'; expected a finite number, or None for no score"),
        ("short", "gave 1 scores to 2 replies; expected one each"),
        ("text", "raised TypeError: a score is '1.0'; expected a number or None"),
        ("hangs", "no answer to 2 replies within scorers.seconds=0.5; scores so far are kept"),
        ("dies", "its process ended by SIGSEGV over 2 replies"),
        ("ends", "its process ended with code 3 over 2 replies"),
        ("nothing", "nothing is not there in some_scorers"),
        ("not_a_function", "not_a_function is int, no function in some_scorers"),
    ],
)
def test_a_function_that_breaks_is_told_in_a_line(module, function, told):
    seconds = 0.5 if function == "hangs" else 20.0
    with pytest.raises(InputError, match=rf"^'{module}:{function}': {told}") as caught:
        asked(f"{module}:{function}", seconds=seconds)
    assert "\n" not in str(caught.value) and not workers()


def test_a_module_that_breaks_is_told_in_a_line(module):
    with pytest.raises(InputError, match=r"^'python:broken_scorers:f': raised ModuleNotFoundError: No module named "):
        asked("python:broken_scorers:f")


def test_what_was_scored_before_an_error_is_kept_and_never_asked_again(module, tmp_path, monkeypatch):
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    kept = tmp_path / "scores.sqlite"
    name = f"{module}:third"
    with pytest.raises(InputError, match="the third batch"):
        asked(name, kept)
    assert (tmp_path / "asked").read_text().split() == " ".join(REPLIES[:4]).split()
    patient = [reply.replace("reply 5", "reply five") for reply in REPLIES]
    np.testing.assert_array_equal(asked(name, kept, replies=patient * 2), [len(reply) for reply in patient * 2])
    lines = (tmp_path / "asked").read_text().splitlines()
    assert sorted(lines) == sorted(patient), "each once: those of before are known, and so is what stands there twice"
    source = tmp_path / "some_scorers.py"
    source.write_text(FUNCTIONS.replace("[float(len(reply)) for reply", "[7.0 for reply"))
    np.testing.assert_array_equal(asked(name, kept, replies=patient), [7.0] * 7)


def test_a_signal_ends_the_asking_behind_a_batch_that_is_kept(module, tmp_path, monkeypatch):
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    kept, name = tmp_path / "scores.sqlite", f"{module}:interrupts"
    with stopping.Notice(), pytest.raises(Stopped) as stopped:
        asked(name, kept)
    assert stopped.value.code == INTERRUPTED and not workers()
    first = (tmp_path / "asked").read_text().splitlines()
    assert first == REPLIES[:4]
    np.testing.assert_array_equal(asked(name, kept), [len(reply) for reply in REPLIES])
    assert (tmp_path / "asked").read_text().splitlines() == REPLIES, "each once"


def test_the_worker_ends_with_whoever_asks(module):
    """Though that one is killed, and the function still runs."""
    command = [sys.executable, "-c", HANGS, str(ROOT), sys.path[0], f"{module}:hangs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asker:
        worker = psutil.Process(int(asker.stdout.readline()))
        assert worker.is_running()
        asker.kill()
    worker.wait(timeout=10)


TWO = """
import sys
from pathlib import Path
coordinator, count, index = (argument.split("=")[1] for argument in sys.argv[1:4])
from mpo_jax import processes, settings
from mpo_jax.errors import InputError
from mpo_jax.scorers import host
from mpo_jax.scorers.limits import Limits
if index == "0":
    sys.path.insert(0, sys.argv[4])
processes.start(coordinator, int(count), int(index), False)
with host.opened("python:some_scorers:some", Limits(batch=2), Path(sys.argv[4]) / f"kept_{index}") as score:
    print("scores", score(["p"] * 3, ["a", "none", "abc"], [{}] * 3).tolist())
try:
    with host.opened("python:some_scorers:raises", Limits(), None) as score:
        score(["p"], ["a"], [{}])
except InputError as error:
    print("told", error)
"""


def test_process_0_alone_asks_and_tells_the_others(module, tmp_path):
    """The other has neither the module nor the scores that are kept; what goes wrong ends both."""
    port = processes.free_port()
    joined = [[f"--coordinator=localhost:{port}", "--processes=2", f"--process={index}"] for index in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, *given, str(tmp_path)], cwd=ROOT, env={**os.environ, **processes.ENVIRONMENT},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for given in joined
    ]  # fmt: skip
    said = [each.communicate(timeout=240)[0] for each in started]
    assert all("scores [1.0, nan, 3.0]" in each for each in said), said
    assert "told 'python:some_scorers:raises': raised ValueError: no good" in said[0]
    assert "told process 0 ended with an error; see its log" in said[1]
    assert (tmp_path / "kept_0").exists() and not (tmp_path / "kept_1").exists()


# Servers --------------------------------------------------------------------------------------------------------------


def by_length(prompt, reply):
    return None if reply == "none" else float(len(reply))


def test_a_server_is_asked_in_batches_several_at_a_time_with_the_token(monkeypatch):
    replies = [f"{'x' * n}" for n in range(1, 21)] + ["none"]
    monkeypatch.setenv("MPO_SCORER_TOKEN", "a-very-secret-token")
    with ScorerServer(by_length, delay=0.05) as server:
        found = asked(server.url, replies=replies, concurrency=3)
    np.testing.assert_array_equal(found, np.array([*range(1, 21), np.nan], np.float32))
    assert sorted(server.sizes) == [1] + [2] * 10 and server.most_active == 3
    assert server.tokens == {"Bearer a-very-secret-token"}
    monkeypatch.delenv("MPO_SCORER_TOKEN")
    with ScorerServer(by_length) as server:
        asked(server.url)
    assert server.tokens == {None}


def test_faults_that_pass_cost_nothing_but_time(tmp_path):
    faults = ("429", "500", "html", "cut", None, "silence")
    with ScorerServer(by_length, lambda number: faults[number] if number < len(faults) else None) as server:
        found = asked(server.url, tmp_path / "kept.sqlite", concurrency=1, attempts=6, seconds=1.0)
        np.testing.assert_array_equal(found, [len(reply) for reply in REPLIES])
        calls = server.calls
        asked(server.url, tmp_path / "kept.sqlite")
        assert server.calls == calls, "all is known"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("500", "no answer in 3 attempts, the last: status 500; answers so far are kept, run the same command again"),
        ("html", r'no answer in 3 attempts, the last: an answer that is not \{"scores": \[\.\.\.\]\}, or is cut off'),
        ("401", "refused with status 401; check the token in MPO_SCORER_TOKEN"),
        ("302", "refused with status 302"),
        ("short", "gave 1 scores to 2 replies; expected one each"),
        ("huge", "its answer is above 16,777,216 bytes"),
        ("silence", "no answer in 3 attempts, the last: no answer within 0.2 s"),
    ],
)
def test_a_server_that_breaks_is_told_in_a_line(fault, told):
    seconds = 0.2 if fault == "silence" else 20.0
    with (
        ScorerServer(by_length, lambda number: fault) as server,
        pytest.raises(InputError, match=rf"^'{server.url}': {told}") as caught,
    ):
        asked(server.url, concurrency=1, seconds=seconds)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_told_in_a_line():
    with ScorerServer(by_length) as server:
        url = server.url
    with pytest.raises(
        InputError, match=rf"^'{url}': no answer in 3 attempts, the last: no connection \(Conn.*Error\); "
    ):
        asked(url)


def test_a_function_scores_by_a_column_and_is_asked_anew_where_it_changed(module, tmp_path, monkeypatch):
    seen = tmp_path / "seen"
    monkeypatch.setenv("ASKED", str(seen))
    with host.opened(f"{module}:right", limits(), tmp_path / "kept.sqlite") as score:
        for answers, found in ((("4", "5"), [1, 0]), (("4", "6"), [1, 1]), (("4", "5"), [1, 0])):
            records = [{"columns": {"answer": each}} for each in answers]
            assert score(["2 + 2", "3 + 3"], ["4", "6"], records).tolist() == found
    assert seen.read_text().split() == ["4", "6", "6"], "what was asked before is known"
