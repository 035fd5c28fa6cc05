"""Servers that drip, flood, lead elsewhere, repeat the token or give what is no score: what a scorer makes of each."""

import json
import time
import traceback

import numpy as np
import pytest

from mpo_jax import settings as declared
from mpo_jax.errors import InputError
from mpo_jax.scorers import host
from mpo_jax.scorers.limits import Limits
from mpo_jax.stages.evaluate import Settings
from tests.tools.raw_server import RawServer, whole

TOKEN = "tok-distinctive-4f1c9a7e"


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("MPO_SCORER_TOKEN", TOKEN)


def asked(server, folder, replies=("a reply",), **given):
    known = {"seconds": 20.0, "backoff": 0.01, "attempts": 1, "concurrency": 1}
    limits = declared.parse(Limits, known | given)
    with host.opened(f"{server.address}/score", limits, folder / "scores.sqlite") as score:
        return score(["a prompt"] * len(replies), list(replies), [{}] * len(replies))


def answering(body, **how):
    return RawServer(lambda connection, request: connection.sendall(whole(body, **how)))


@pytest.mark.parametrize("where", ["status", "body"])
def test_a_server_that_drips_is_left_at_the_time_out(tmp_path, where):
    def drip(connection, request):
        connection.sendall(b"" if where == "status" else b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{")
        server.drip(connection, b"HTTP/1.1 200 OK" + b" " * 60 if where == "status" else b"")

    with RawServer(drip) as server:
        began = time.monotonic()
        with pytest.raises(InputError, match=r"no answer in 2 attempts, the last: no answer within 0\.5 s"):
            asked(server, tmp_path, seconds=0.5, attempts=2)
        assert len(server.requests) == 2 and time.monotonic() - began < 15


@pytest.mark.parametrize(
    "score",
    [TOKEN, {"score": TOKEN}, [1.0], True, 10**400, 1e300, float("nan"), float("inf"), {}],
    ids=lambda score: repr(score)[:20],
)
def test_what_is_no_score_is_told_in_a_line_without_the_token(tmp_path, score):
    with answering({"scores": [score]}) as server, pytest.raises(InputError, match=r"gave .* to reply 0 of 1") as told:
        asked(server, tmp_path)
    shown = "".join(traceback.format_exception(told.value))
    assert TOKEN not in shown and "\n" not in str(told.value) and len(str(told.value)) < 250


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"scores":' * 50_000, b'{"scores": [' + b"9" * 5000 + b"]}"], ids=len
)
def test_what_is_no_answer_is_asked_again(tmp_path, body):
    with answering(body) as server, pytest.raises(InputError, match="no answer in 2 attempts, the last: an answer"):
        asked(server, tmp_path, attempts=2)


@pytest.mark.parametrize(
    "answer",
    [
        whole({"error": TOKEN}, status="400 Bad"),
        whole({}, status="401 No", more=f"WWW-Authenticate: {TOKEN}\r\n"),
        whole({}, status="302 Found", more=f"Location: http://a/{TOKEN}\r\n"),
        whole({}, status="429 Wait", more=f"Retry-After: {TOKEN}\r\n"),
        whole({}, status="429 Wait", more="Retry-After: nan\r\n"),
        whole({}, status="429 Wait", more="Retry-After: Mon, 01 Jan 0001 00:00:00 +2359\r\n"),
        f"HTTP/1.1 {TOKEN} OK\r\n\r\n".encode(),
        f"{TOKEN}\r\n\r\n".encode(),
    ],
    ids=lambda answer: answer[:60].decode(),
)
def test_a_token_that_is_echoed_reaches_no_file_or_message(tmp_path, capfd, answer):
    with (
        RawServer(lambda connection, request: connection.sendall(answer)) as server,
        pytest.raises(InputError) as told,
    ):
        asked(server, tmp_path)
    assert TOKEN in server.requests[0].decode()
    shown = "".join([*traceback.format_exception(told.value), *capfd.readouterr()])
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN not in shown and TOKEN.encode() not in written


@pytest.mark.parametrize("given", [f"{TOKEN}\nX-Evil: 1", f"{TOKEN}é"])
def test_a_token_that_no_header_may_hold_is_told_without_it(tmp_path, monkeypatch, given):
    monkeypatch.setenv("MPO_SCORER_TOKEN", given)
    with answering({"scores": [1]}) as server:
        with pytest.raises(InputError, match="MPO_SCORER_TOKEN: expected printable ASCII") as told:
            asked(server, tmp_path)
        assert TOKEN not in "".join(traceback.format_exception(told.value)) and server.requests == []
        monkeypatch.setenv("MPO_SCORER_TOKEN", f"{TOKEN}\n")
        assert asked(server, tmp_path).tolist() == [1.0]
        assert f"Bearer {TOKEN}\r\n" in server.requests[0].decode()


def test_surrogates_survive(tmp_path):
    """Half a character, as models may sample: sent as JSON's escape, scored, kept, known again."""
    with answering({"scores": [2.0]}) as server:
        for _ in range(2):
            np.testing.assert_array_equal(asked(server, tmp_path, ["half \ud83d"]), [2.0])
        assert len(server.requests) == 1
        assert json.loads(server.requests[0].partition(b"\r\n\r\n")[2])["replies"] == ["half \ud83d"]


@pytest.mark.parametrize(
    "address",
    [
        "https://me:{}@host/score", "https://host/score?token={}", "http://{}@host", "http://me:{}/x@host:1/",
        "https://host/score#{}", "https://me:{}@[host/", "https://me:{}@host:99999/",
    ],
)  # fmt: skip
def test_a_password_in_an_address_is_refused_and_not_repeated(address):
    with pytest.raises(InputError, match="labeller: ") as told:
        declared.parse(Settings, {"labeller": address.format(TOKEN)})
    assert TOKEN not in "".join(traceback.format_exception(told.value))


def test_the_proxy_of_the_environment_is_asked_and_its_password_stays_secret(tmp_path, monkeypatch):
    from mpo_jax import posting

    with answering({"scores": [1]}) as proxy:
        port = proxy.address.rpartition(":")[2]
        monkeypatch.setenv("http_proxy", f"http://me:{TOKEN}@127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "inside.example")
        limits = declared.parse(Limits, {"attempts": 1})
        with host.opened("http://scorer.example/score", limits, None) as score:
            assert score(["p"], ["r"], [{}]).tolist() == [1.0]
        head = proxy.requests[0].decode()
        assert head.startswith("POST http://scorer.example/score HTTP/1.1\r\nHost: scorer.example\r\n")
        assert "Proxy-Authorization: Basic " in head
        assert posting._proxy("http", "inside.example") is None and posting._proxy("http", "127.0.0.1") is None
    monkeypatch.setenv("http_proxy", f"socks5://me:{TOKEN}@host:1")
    with (
        host.opened("http://scorer.example/score", limits, None) as score,
        pytest.raises(InputError, match="http_proxy: ") as told,
    ):
        score(["p"], ["r"], [{}])
    assert TOKEN not in "".join(traceback.format_exception(told.value))
