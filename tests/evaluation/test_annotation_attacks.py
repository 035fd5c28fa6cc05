"""Callers that are slow, many, from elsewhere or malformed: the annotation page goes on, and says what is wrong."""

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import pytest

from mpo_jax import annotate, artifacts
from mpo_jax.database import alone
from mpo_jax.errors import InputError
from mpo_jax.evaluation import annotation, annotation_page, human
from mpo_jax.evaluation.annotation import Store
from tests.evaluation import made
from tests.evaluation.test_annotation import PAIRS, TOKEN, call, judgement
from tests.tools.pages import served

ROOT = Path(__file__).resolve().parent.parent.parent


@contextlib.contextmanager
def page(folder, token="", lines=None, host="127.0.0.1", **bounds):
    with Store(folder / artifacts.ANNOTATIONS) as store:
        items = annotation.items(lines or made.rows(), PAIRS, seed=0)
        with served(annotation_page.create(items, store, 0, "Which?", token), host, **bounds) as address:
            yield address, items, store


def raw(address, content: bytes) -> bytes:
    """The head of the answer to bytes that no client would send."""
    where = urllib.parse.urlsplit(address)
    with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
        connection.sendall(content)
        return connection.recv(4096)


HOSTS = [
    b"[::1", b"[::1]]:80", b"[evil]", b"127.0.0.1:80:80", b"a@127.0.0.1", b"127.0.0.1/x", b"127.0.0.1\\evil", b"",
    b"[", b"]", b"127.0.0.1:port", b"127.0.0.1:99999999", b"\xed\xa0\x80", b"\xff\xfe", b"a b", b"%31", b"*",
]  # fmt: skip


@pytest.mark.parametrize("token", ["", TOKEN], ids=["loopback", "token"])
def test_an_odd_host_is_a_bad_request(tmp_path, token):
    with page(tmp_path, token) as (address, _, _):
        for host in HOSTS:
            head = raw(address, b"GET /?token=" + TOKEN.encode() + b" HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 "), (host, head[:200])
        assert raw(address, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        for origin in ("http://[", "http://[::1", "null", "http://127.0.0.1:1", "é", "http://127.0.0.1@evil.example"):
            headers = {"Origin": origin.encode().decode("latin-1"), "Authorization": f"Bearer {TOKEN}"}
            assert call(address, "/api/judgement", "POST", judgement(), headers)[0] == 403, origin


def test_dns_rebinding_stays_refused(tmp_path):
    with page(tmp_path) as (address, _, store):
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "localhost."):
            assert call(address, "/", headers={"Host": host})[0] == 403
            headers = {"Host": host, "Origin": f"http://{host}"}
            assert call(address, "/api/judgement", "POST", judgement(), headers)[0] == 403
        assert store.all() == []


SURROGATES = [
    judgement(comment="half \ud800"),
    judgement(annotator="ada\udc00"),
    judgement(choice="\ud800"),
    {"annotator\ud800": "ada"},
]


def test_surrogates_are_bad_requests_in_and_whole_text_out(tmp_path):
    lines = made.rows(3, text=lambda name, number: f"half \ud83d {name == 'mpo'} {number}")
    for line in lines:
        line["prompt"] += " \udc41"
    with page(tmp_path, lines=lines) as (address, _, store):
        for body in SURROGATES:
            status, _, answer = call(address, "/api/judgement", "POST", body)
            assert status == 400 and json.loads(answer)["error"], body
        for query in ("annotator=%ED%A0%80", "annotator=%FF", "annotator=ada&number=%ED%A0%80"):
            assert call(address, f"/api/task?{query}")[0] == 400
        assert store.all() == []
        status, _, answer = call(address, "/api/task?annotator=ada")
        assert status == 200 and "half �" in json.loads(answer)["replies"][0]
        assert call(address, "/api/judgement", "POST", judgement())[0] == 200
        assert human.results(lines, store.all())["judgements"] == 1, "it counts for what was shown"
        assert call(address, "/api/judgement", "POST", judgement(comment="whole \ud83d\ude00"))[0] == 200
        assert store.all()[0].comment == "whole 😀"


HEADS = [
    b"",
    b"G",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX",
    b"POST /api/judgement HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 60000\r\n\r\n{",
    b"GET /page.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 40,
]


def test_slow_callers_are_hung_up_on_in_time_however_they_drip(tmp_path):
    with page(tmp_path, seconds=1.0) as (address, _, _):
        where = urllib.parse.urlsplit(address)
        slow = []
        for number in range(20):
            slow.append(socket.create_connection((where.hostname, where.port), timeout=20))
            slow[-1].sendall(HEADS[number % len(HEADS)])
        until = time.monotonic() + 30
        while not all(is_closed(connection) for connection in slow) and time.monotonic() < until:
            for connection in slow:
                with contextlib.suppress(OSError):
                    connection.sendall(b"x")
            time.sleep(0.1)
        assert all(is_closed(connection) for connection in slow)
        for connection in slow:
            connection.close()
        assert call(address, "/api/task?annotator=ada")[0] == 200


@pytest.mark.parametrize("until_all_are_gone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_300_slow_connections_hold_up_nobody(tmp_path, until_all_are_gone):
    """The real command, with the 256 files that some systems allow: 300 callers that send a byte now and then, while an
    annotator goes on; and each of them is hung up on in time."""
    run = made.run_folder(tmp_path / "run", made.rows(20))
    server = subprocess.Popen(
        ["bash", "-c", 'ulimit -n 256; exec "$@"', "", sys.executable, "-m", "mpo_jax.annotate", f"--run={run}",
         "--port=0"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    slow, end = [], threading.Event()
    try:
        address = server.stdout.readline().split()[3].rstrip("/")
        where = urllib.parse.urlsplit(address)

        def drip():
            while not end.wait(0.5):
                for connection in slow:
                    with contextlib.suppress(OSError):
                        connection.sendall(b"x")

        for number in range(300):
            connection = socket.create_connection((where.hostname, where.port), timeout=20)
            connection.sendall(HEADS[number % len(HEADS)])
            slow.append(connection)
        threading.Thread(target=drip, daemon=True).start()
        for number in range(20):
            assert call(address, "/api/task?annotator=ada")[0] == 200
            assert call(address, "/api/judgement", "POST", judgement(number))[0] == 200
        assert json.loads(call(address, "/api/task?annotator=ada")[2])["done"] == 20
        alive = sum(not is_closed(connection) for connection in slow)
        assert alive <= 128
        until = time.monotonic() + 60
        while until_all_are_gone and alive and time.monotonic() < until:
            time.sleep(0.5)
            alive = sum(not is_closed(connection) for connection in slow)
        assert not (until_all_are_gone and alive), "each has its time, however it drips"
    finally:
        end.set()
        for connection in slow:
            connection.close()
        server.terminate()
        _, said = server.communicate(timeout=60)
    assert "Traceback" not in said, said


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while connection.recv(1 << 20):
            pass  # an answer that came before
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(20)


def test_a_connection_that_is_kept_serves_many_requests_beyond_its_first_time(tmp_path):
    """The time is that of a request and its answer, not of a connection."""
    with page(tmp_path, seconds=1.0) as (address, _, _):
        where = urllib.parse.urlsplit(address)
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=20)
        connection.connect()
        first = connection.sock
        for _ in range(8):
            time.sleep(0.3)
            connection.request("GET", "/api/task?annotator=ada")
            assert connection.getresponse().read()
        assert connection.sock is first
        connection.close()


def test_one_page_at_a_time_keeps_a_run_s_judgements(tmp_path, monkeypatch, capsys):
    run = made.run_folder(tmp_path / "run", made.rows(3))
    holder = "import sys, time; from mpo_jax.database import alone\nwith alone(sys.argv[1], '--run'):\n" \
        "    print('held', flush=True); time.sleep(60)"  # fmt: skip
    file = str(run / artifacts.ANNOTATIONS)
    with subprocess.Popen([sys.executable, "-c", holder, file], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        monkeypatch.setattr(sys, "argv", ["mpo annotate", f"--run={run}", "--port=0"])
        with pytest.raises(SystemExit):
            annotate.run()
        said = capsys.readouterr().err
        assert re.search(rf"--run: {re.escape(file)} is in use by process {process.pid} on \S+; end that first", said)
        process.kill()
    with alone(file, "--run"):
        pass  # a killed one holds nothing


def test_a_judgement_is_taken_back_and_no_other_copy_brings_it_again(tmp_path):
    with page(tmp_path) as (address, items, store):
        for number in (0, 1, 2):
            assert call(address, "/api/judgement", "POST", judgement(number))[0] == 200
        assert json.loads(call(address, "/api/task?annotator=ada")[2])["before"] == [0, 1, 2]
        assert call(address, "/api/withdrawal", "POST", {"annotator": "ada", "number": 1})[0] == 200
        assert call(address, "/api/withdrawal", "POST", {"annotator": "ada", "number": 7})[0] == 200  # never judged
        task = json.loads(call(address, "/api/task?annotator=ada")[2])
        assert (task["number"], task["done"], task["before"]) == (1, 2, [0, 2])
        assert json.loads(call(address, "/api/task?annotator=ada&number=1")[2])["choice"] is None
        assert [each.item for each in store.all()] == [items[0].key, items[2].key]
        assert call(address, "/api/judgement", "POST", judgement(1, "tie"))[0] == 200
        assert json.loads(call(address, "/api/task?annotator=ada")[2])["before"] == [0, 2, 1]
        for bad in ({"annotator": "ada", "number": 99}, {"annotator": "", "number": 1}, {}, []):
            assert call(address, "/api/withdrawal", "POST", bad)[0] == 400
        assert call(address, "/api/withdrawal", "POST", {"annotator": "ada", "number": 1}, {"Origin": "null"})[0] == 403
    with pytest.raises(InputError, match="choice"):
        annotation.judge(items[0], "ada", 0, annotation.WITHDRAWN)


def test_an_error_of_the_server_is_told_as_one(tmp_path, monkeypatch):
    with page(tmp_path) as (address, _, store):
        monkeypatch.setattr(store, "judged", lambda annotator: 1 / 0)
        status, headers, answer = call(address, "/api/task?annotator=ada")
        assert status == 500 and "its log says why" in json.loads(answer)["error"]
        assert "default-src 'self'" in headers["Content-Security-Policy"]


def test_behind_a_proxy_with_tls_the_cookie_is_secure(tmp_path):
    """As nginx and Caddy tell it, from this machine."""
    with page(tmp_path, TOKEN) as (address, _, store):
        proxied = {"Host": "judge.example", "X-Forwarded-Proto": "https"}
        _, headers, _ = call(address, f"/?token={TOKEN}", headers=proxied)
        assert "Secure" in headers["Set-Cookie"] and headers["Location"] == "/"
        bring = proxied | {"Cookie": headers["Set-Cookie"].split(";")[0], "Origin": "https://judge.example"}
        assert call(address, "/api/judgement", "POST", judgement(), bring)[0] == 200
        assert "Secure" not in call(address, f"/?token={TOKEN}")[1]["Set-Cookie"] and len(store.all()) == 1
