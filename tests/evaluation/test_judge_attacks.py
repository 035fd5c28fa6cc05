"""Endpoints that drip, flood, lead elsewhere, repeat the key or lie about their usage: what a judge makes of each."""

import gzip
import json
import time
import traceback

import pytest

from mpo_jax import settings as declared
from mpo_jax.errors import InputError
from mpo_jax.evaluation import judge_client
from mpo_jax.evaluation.judge_cache import Cache
from mpo_jax.evaluation.judge_client import Endpoint
from tests.tools.raw_server import RawServer, whole

KEY = "sk-distinctive-4f1c9a7e"
QUESTION = "Which is better? é"


def reply(content="Verdict: A", usage=None, **more):
    """A whole answer of the protocol."""
    usage = {"prompt_tokens": 100, "completion_tokens": 10} if usage is None else usage
    return {"choices": [{"message": {"role": "assistant", "content": content}}], "usage": usage} | more


def ask(server, path, texts=(QUESTION,), **given):
    """(answers, calls, tokens) of a judge that asks once."""
    known = {"model": "m", "key_variable": "JUDGE_KEY", "seconds": 20.0, "backoff": 0.01, "attempts": 1}
    endpoint = declared.parse(Endpoint, {"base_url": f"{server.address}/v1"} | known | given)
    with Cache(path / "judge.sqlite") as cache:
        answers = judge_client.ask(endpoint, list(texts), cache, "run")
        return answers, *cache.spent("run")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)


def answering(body, **how):
    return RawServer(lambda connection, request: connection.sendall(whole(body, **how)))


@pytest.mark.parametrize("where", ["status", "headers", "body", "chunks"])
def test_a_server_that_drips_is_left_at_the_time_out(tmp_path, where):
    """Each byte comes well within the time-out, the whole answer never does."""
    heads = {
        "status": b"",
        "headers": b"HTTP/1.1 200 OK\r\nX-A: ",
        "body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{",
        "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    }
    drips = {"status": b"HTTP/1.1 200 OK" + b" " * 60, "chunks": b"1\r\n{\r\n" + b"1\r\n \r\n" * 100}

    def drip(connection, request):
        connection.sendall(heads[where])
        server.drip(connection, drips.get(where, b""))

    with RawServer(drip) as server:
        began = time.monotonic()
        with pytest.raises(InputError, match=r"no answer in 2 attempts, the last: no answer within 0\.5 s"):
            ask(server, tmp_path, seconds=0.5, attempts=2, concurrency=1)
        assert len(server.requests) == 2 and time.monotonic() - began < 15


@pytest.mark.parametrize("form", ["declared", "undeclared", "chunked", "gzip"])
def test_an_answer_has_a_largest_size(tmp_path, form):
    """Refused as it comes, or before: never held whole, and never unpacked."""
    sent = []

    def flood(connection, request):
        block = b" " * (1 << 16)
        if form == "gzip":
            packed = gzip.compress(b" " * (64 << 20))
            connection.sendall(whole(packed, more="Content-Encoding: gzip\r\n"))
            return
        kinds = {
            "declared": "Content-Length: 1000000000",
            "chunked": "Transfer-Encoding: chunked",
            "undeclared": "X: y",
        }
        connection.sendall(f"HTTP/1.1 200 OK\r\n{kinds[form]}\r\n\r\n".encode())
        for _ in range(2000):
            connection.sendall(b"10000\r\n" + block + b"\r\n" if form == "chunked" else block)
            sent.append(len(block))

    told = "compressed" if form == "gzip" else "above 4,194,304 bytes"
    with RawServer(flood) as server, pytest.raises(InputError, match=told):
        ask(server, tmp_path)
    assert sum(sent) < 32 << 20


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_nobody_else_sees_question_or_key(tmp_path, status):
    with answering(reply()) as other:
        more = f"Location: {other.address}/v1/chat/completions\r\n"
        with (
            answering({}, status=f"{status} Elsewhere", more=more) as server,
            pytest.raises(InputError, match=rf"refused with status {status}; redirects are not followed"),
        ):
            ask(server, tmp_path)
        assert other.requests == [] and len(server.requests) == 1


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": -1000, "completion_tokens": -5},
        {"prompt_tokens": 1e30, "completion_tokens": 10**400},
        {"prompt_tokens": "many", "completion_tokens": "10"},
        {"prompt_tokens": float("nan"), "completion_tokens": float("inf")},
        {"prompt_tokens": [1], "completion_tokens": {"a": 1}},
        {"prompt_tokens": True, "completion_tokens": None},
        {"prompt_tokens": 0, "completion_tokens": 0},
        {},
        "none",
        7,
    ],
    ids=str,
)
def test_odd_usage_is_charged_by_what_was_sent_and_limited(tmp_path, usage):
    """No figure to believe: a token for each byte of the question, and as many as the answer may have."""
    with answering(reply(usage=usage)) as server:
        answers, calls, tokens = ask(server, tmp_path, answer_tokens=50)
        assert answers == ["Verdict: A"] and calls == 1 and len(server.requests) == 1
        assert tokens == len(QUESTION.encode()) + 50
        with pytest.raises(InputError, match="max_tokens: the ceiling of 60 is reached"):
            ask(server, tmp_path, ["another"], answer_tokens=50, max_tokens=60)


def test_no_usage_figure_lowers_what_was_spent(tmp_path):
    """A server that claims to give back what it took: the ceiling holds all the same."""
    texts = [f"question {number}" for number in range(30)]
    usage = {"prompt_tokens": -(10**6), "completion_tokens": 0}
    with answering(reply(usage=usage)) as server:
        with pytest.raises(InputError, match="max_tokens: the ceiling"):
            ask(server, tmp_path, texts, max_tokens=200, answer_tokens=50, concurrency=1)
        assert len(server.requests) == 4  # of some 60 tokens each


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000, b'{"choices": ' * 50_000, b"\xff\xfe", b"", b"null", b"[]", b'{"choices": {}}',
        b'{"choices": [null]}', b'{"choices": [{"message": {"content": [1]}}]}', b'{"choices": [{"message": 5}]}',
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_what_is_no_answer_is_asked_again(tmp_path, body):
    with (
        answering(body) as server,
        pytest.raises(InputError, match="no answer in 2 attempts, the last: an answer that"),
    ):
        ask(server, tmp_path, attempts=2)


def test_surrogates_survive(tmp_path):
    """Half a character, as models may sample, in questions and in answers; whole ones in two halves are made whole."""
    body = json.dumps(reply("caf\ud800 \ud83d\ude00\nVerdict: B")).encode()
    assert b"\\ud800" in body
    with answering(body) as server:
        answers, _, _ = ask(server, tmp_path, ["lone \udc41", "whole \ud83d\ude00", "whole 😀"])
        assert answers == ["caf� 😀\nVerdict: B"] * 3
        sent = {json.loads(request.partition(b"\r\n\r\n")[2])["messages"][0]["content"] for request in server.requests}
        assert sent == {"lone �", "whole 😀"}
        assert ask(server, tmp_path, ["lone \udc41"])[0] == answers[:1] and len(server.requests) == 2


ECHOES = {
    "in a refusal": lambda key: whole({"error": {"message": f"no such key: {key}"}}, status="400 Bad"),
    "in a refusal for its key": lambda key: whole({"error": {"message": f"Incorrect key {key}"}}, status="401 No"),
    "in a header's form": lambda key: whole({"error": {"message": f"got 'Bearer {key}'"}}, status="422 Bad"),
    "in its quoted form": lambda key: whole({"error": {"message": f"got {key.replace('-', '%2D')}"}}, status="400 B"),
    "in pieces": lambda key: whole({"error": {"message": f"{key[:12]} and {key[12:]}"}}, status="400 Bad"),
    "in a wait": lambda key: whole({}, status="429 Wait", more=f"Retry-After: {key}\r\n"),
    "in a page": lambda key: whole(f"<html>{key}</html>".encode(), status="502 Bad"),
    "in an answer": lambda key: whole(reply(f"Your key is {key}.\nVerdict: A")),
    "in a wrong answer": lambda key: whole({"choices": key}),
    "in a status line": lambda key: f"HTTP/1.1 200 {key}\r\nContent-Length: 2\r\n\r\n[]".encode(),
    "as a broken header": lambda key: f"HTTP/1.1 200 OK\r\n{key} {key}\r\n\r\n".encode(),
    "as a redirect": lambda key: whole({}, status="302 Found", more=f"Location: http://a/{key}\r\n"),
}


@pytest.mark.parametrize("how", ECHOES)
def test_a_key_that_is_echoed_reaches_no_file_message_or_traceback(tmp_path, capfd, how):
    with RawServer(lambda connection, request: connection.sendall(ECHOES[how](key_of(request)))) as server:
        told = ""
        try:
            answers, _, _ = ask(server, tmp_path)
            told += repr(answers)
        except InputError as error:
            told += "".join(traceback.format_exception(error)) + repr(everything_behind(error))
        assert KEY in server.requests[0].decode(), "the server had it"
    shown = told + "".join(capfd.readouterr())
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for form in (KEY, KEY.replace("-", "%2D"), KEY[12:], "4f1c9a7e"):
        assert form not in shown and form.encode() not in written, how


def key_of(request: bytes) -> str:
    head = request.decode("latin-1")
    return next(line for line in head.split("\r\n") if line.lower().startswith("authorization")).rpartition(" ")[2]


def everything_behind(error: BaseException | None) -> list[str]:
    """An error, and all that a log of its causes could show."""
    found = []
    while error is not None:
        found.append(f"{error!r} {getattr(error, 'body', '')} {error.args}")
        error = error.__cause__ or error.__context__
    return found


@pytest.mark.parametrize("given", [f"{KEY}\n", f" {KEY}\r\n", f"{KEY}\nX-Evil: 1", f"{KEY}é", f"{KEY}\udc80"], ids=repr)
def test_a_key_that_no_header_may_hold_is_told_without_it(tmp_path, monkeypatch, given):
    """White space around it, as a file may have, is none of it; line feeds within and what is not ASCII are refused."""
    monkeypatch.setenv("JUDGE_KEY", given)
    with answering(reply()) as server:
        if given.strip() == KEY:
            assert ask(server, tmp_path)[0] == ["Verdict: A"]
            assert key_of(server.requests[0]) == KEY
            return
        with pytest.raises(InputError, match="JUDGE_KEY: expected printable ASCII") as told:
            ask(server, tmp_path)
        assert KEY not in repr(everything_behind(told.value)) and server.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "https://me:{}@host/v1", "ftp://me:{}@host/v1", "me:{}@host/v1", "https://{}@host/v1", "https://host/v1?key={}",
        "https://host/v1#{}", "https://me:{}@[host/v1", "https://me:{}@host:99999/v1", "https:///me:{}@host",
    ],
)  # fmt: skip
def test_a_password_in_an_address_is_refused_and_not_repeated(url):
    with pytest.raises(InputError, match="base_url: ") as told:
        declared.parse(Endpoint, {"base_url": url.format(KEY), "model": "m"}).check()
    assert KEY not in repr(everything_behind(told.value))
