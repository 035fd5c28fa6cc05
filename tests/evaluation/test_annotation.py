"""Items, judgements and their table; then the page's server over real sockets: what it refuses, and what it keeps."""

import csv
import http.client
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mpo_jax import annotate, artifacts
from mpo_jax.errors import InputError
from mpo_jax.evaluation import annotation, annotation_page, human, judge
from mpo_jax.evaluation.annotation import Store
from tests.evaluation import made
from tests.tools.pages import served

ROOT = Path(__file__).resolve().parent.parent.parent
PAIRS = [("mpo", "sft")]
TOKEN = "f3b9c1d27a6e4580"


def call(address, path, method="GET", body=None, headers=None):
    """(status, headers, body) of one request, exactly as given: no client cleans the path."""
    where = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host="Host" in (headers or {}))
        payload = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        known = {} if payload is None else {"Content-Type": "application/json", "Content-Length": str(len(payload)),
                                            "Origin": address}  # fmt: skip
        for name, value in (known | (headers or {})).items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(payload)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def judgement(number=0, choice="first", annotator="ada", **rest):
    return {"annotator": annotator, "number": number, "choice": choice} | rest


@pytest.fixture
def page(tmp_path):
    with Store(tmp_path / artifacts.ANNOTATIONS) as store:
        items = annotation.items(made.rows(), PAIRS, seed=0)
        with served(annotation_page.create(items, store, 0, "Which?")) as address:
            yield address, items, store


@pytest.fixture
def guarded(tmp_path):
    """The page as it is served beyond loopback: on every address, with a token."""
    with Store(tmp_path / artifacts.ANNOTATIONS) as store:
        items = annotation.items(made.rows(), PAIRS, seed=0)
        with served(annotation_page.create(items, store, 0, "Which?", TOKEN), "0.0.0.0") as address:
            yield address, items, store


def test_order_and_sides_are_shuffled_by_the_seed():
    rows = made.rows(200)
    items = annotation.items(rows, PAIRS, seed=1)
    assert sorted(item.prompt_id for item in items) == list(range(200))
    assert [item.prompt_id for item in items] != list(range(200))
    assert items == annotation.items(rows, PAIRS, seed=1) != annotation.items(rows, PAIRS, seed=2)
    sides = np.array([[annotation.left_first(item, name, 1) for item in items] for name in ("ada", "bob")])
    assert np.all(np.abs(sides.mean(axis=1) - 0.5) < 0.1)
    assert abs(np.mean(sides[0] == sides[1]) - 0.5) < 0.15
    assert len({item.prompt_id for item in annotation.items(rows, PAIRS, seed=1, count=30)}) == 30


def test_replies_alike_are_not_shown():
    rows = made.rows(3, text=lambda name, number: "same" if number == 1 else name)
    assert sorted(item.prompt_id for item in annotation.items(rows, PAIRS, 0)) == [0, 2]
    with pytest.raises(InputError, match="reply alike"):
        annotation.items(rows[1:2], PAIRS, 0)


def test_choice_is_kept_as_the_policy_that_was_meant():
    for item in annotation.items(made.rows(), PAIRS, 0):
        first = item.left if annotation.left_first(item, "ada", 0) else item.right
        found = annotation.judge(item, "ada", 0, "first")
        assert found.choice == found.first == first
        assert found.outcome == (first == "mpo")
        assert annotation.judge(item, "ada", 0, "second").choice == ({"mpo", "sft"} - {first}).pop()
        assert annotation.judge(item, "ada", 0, "tie").outcome == 0.5


def test_results_by_hand():
    """Ten prompts: ada prefers mpo on 0-5, calls 6-7 ties, prefers sft on 8-9; bob agrees except on 0, 6."""
    rows = made.rows(10)
    said = {"ada": ["mpo"] * 6 + ["tie"] * 2 + ["sft"] * 2}
    said["bob"] = ["sft", *said["ada"][1:6], "mpo", *said["ada"][7:]]
    given = []
    for item in annotation.items(rows, PAIRS, 0):
        for name, choices in said.items():
            choice = choices[item.prompt_id]
            shown = annotation.left_first(item, name, 0)
            side = "tie" if choice == "tie" else "first" if (choice == item.left) == shown else "second"
            given.append(annotation.judge(item, name, 0, side, seconds=3.0))
    found = human.results(rows, given)
    pair = found["pairs"][0]
    assert (pair["left"], pair["right"], pair["prompts"], pair["judgements"], pair["ties"]) == ("mpo", "sft", 10, 20, 3)
    assert pair["win_rate"] == pytest.approx((0.5 + 5 + 0.75 + 0.5) / 10)
    assert [(a["name"], a["judgements"], a["ties"]) for a in found["annotators"]] == [("ada", 10, 2), ("bob", 10, 1)]
    assert 0.5 < found["agreement"]["alpha"] < 1 and found["agreement"]["units"] == 10
    assert pair["sentence"].startswith("mpo preferred to sft in 68 % ±")
    assert human.results(made.rows(10, seed=0, text=lambda name, number: f"{name} anew {number}"), given) is None
    assert human.results(rows, []) is None


def test_alpha_at_its_landmarks():
    items = annotation.items(made.rows(300), PAIRS, 0)
    random = np.random.default_rng(0)

    def given(name, choices):
        return [annotation.judge(item, name, 0, choice) for item, choice in zip(items, choices, strict=True)]

    def as_shown(name, better):
        """Choices that mean the same policies for every annotator."""
        return ["first" if annotation.left_first(item, name, 0) == won else "second"
                for item, won in zip(items, better, strict=True)]  # fmt: skip

    better = random.random(300) < 0.5
    alike = human.alpha(given("a", as_shown("a", better)) + given("b", as_shown("b", better)))
    assert alike.alpha == pytest.approx(1) and 0.95 < alike.low < alike.high == 1
    by_chance = given("a", random.choice(["first", "second", "tie"], 300)) + given(
        "b", random.choice(["first", "second", "tie"], 300)
    )
    assert abs(human.alpha(by_chance).alpha) < 0.12
    assert human.alpha(given("a", as_shown("a", better)) + given("b", as_shown("b", ~better))).alpha < -0.9
    assert human.alpha(given("a", as_shown("a", better))) is None


def test_export(tmp_path):
    item = annotation.items(made.rows(1), PAIRS, 0)[0]
    given = [
        annotation.judge(item, "=cmd|' /C calc'!A1", 0, "tie", 'a "quoted", é\nline'),
        annotation.judge(item, "bob", 0, "first"),
    ]
    lines = [json.loads(line) for line in annotation.as_jsonl(given).splitlines()]
    assert lines[0]["annotator"] == "=cmd|' /C calc'!A1" and lines[0]["outcome"] == 0.5
    table = list(csv.DictReader(io.StringIO(annotation.as_csv(given))))
    assert table[0]["annotator"] == "'=cmd|' /C calc'!A1" and table[0]["comment"] == given[0].comment
    assert table[1]["choice"] == given[1].choice and float(table[1]["outcome"]) == given[1].outcome


def test_page_never_names_a_policy(page):
    address, items, _ = page
    for path in ("/", "/page.js", "/page.css", "/api/task?annotator=ada"):
        status, _, body = call(address, path)
        assert status == 200
        assert not re.search(rb"\b(mpo|sft)\b", body)
    task = json.loads(call(address, "/api/task?annotator=ada")[2])
    assert task["prompt"] == items[0].prompt and sorted(task["replies"]) == sorted(items[0].texts)
    assert set(task) == {"question", "total", "done", "before", "number", "prompt", "replies", "choice", "comment"}


def test_judgement_is_kept_and_can_be_changed(page):
    address, items, store = page
    assert call(address, "/api/judgement", "POST", judgement(3, "first", comment="good"))[0] == 200
    task = json.loads(call(address, "/api/task?annotator=ada&number=3")[2])
    assert (task["choice"], task["comment"], task["done"]) == ("first", "good", 1)
    assert json.loads(call(address, "/api/task?annotator=bob&number=3")[2])["choice"] is None
    assert call(address, "/api/judgement", "POST", judgement(3, "tie"))[0] == 200
    assert [(j.item, j.choice) for j in store.all()] == [(items[3].key, "tie")]
    for number in (0, 1, 2):
        call(address, "/api/judgement", "POST", judgement(number))
    assert json.loads(call(address, "/api/task?annotator=ada")[2])["number"] == 4


BAD = [
    judgement(20), judgement(-1), judgement("0"), judgement(True), judgement(None), judgement(1.5),
    judgement(choice="mpo"), judgement(choice=None), judgement(choice=["first"]),
    judgement(annotator=""), judgement(annotator="x" * 61), judgement(annotator="a\nb"), judgement(annotator=5),
    judgement(comment="x" * 5001), judgement(comment=5), judgement(seconds=-1), judgement(seconds="1"),
    judgement(seconds=float("nan")), [], "text", b"{", b"\xff\xfe", b"[" * 60_000, b" " * 70_000,
]  # fmt: skip


def test_bad_judgements_are_refused_in_words(page):
    address, _, store = page
    for body in BAD:
        status, _, answer = call(address, "/api/judgement", "POST", body)
        assert status == 400 and json.loads(answer)["error"], repr(body)[:80]
    assert store.all() == []


ELSEWHERE = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": None},
    {"Origin": "http://127.0.0.1:1"},
    {"Content-Type": "text/plain"},
    {"Content-Type": "application/x-www-form-urlencoded"},
    {"Content-Type": None},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Host": "evil.example", "Origin": "http://evil.example"},
]


def test_posts_from_elsewhere_are_refused(page):
    address, _, store = page
    for headers in ELSEWHERE:
        status, _, _ = call(address, "/api/judgement", "POST", judgement(), headers)
        assert status in (403, 415), headers
    assert store.all() == []
    assert call(address, "/api/judgement", "POST", judgement())[0] == 200


def test_rebound_names_see_nothing(page):
    """DNS rebinding: a page elsewhere makes its own name point to loopback."""
    address, _, _ = page
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        status, _, body = call(address, "/api/task?annotator=ada", headers={"Host": host})
        assert status in (400, 403) and b"Question" not in body
    for host in ("localhost:8008", "127.0.0.1", "[::1]:8008"):
        assert call(address, "/api/task?annotator=ada", headers={"Host": host})[0] == 200


ASTRAY = [
    "/../../../../etc/passwd", "/..%2f..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/../../judge.py",
    "/page.js/../../annotation.py", "//etc/passwd", "/static/../annotations.sqlite", "/annotations.sqlite",
    "/page.js%00.html", "/index.html", "/api/../page.js", "/.git/config",
]  # fmt: skip


def test_path_traversal_finds_nothing(page):
    for path in ASTRAY:
        status, _, body = call(page[0], path)
        assert status == 404 and b"root:" not in body and b"import" not in body, path


@pytest.mark.parametrize(
    "text",
    [
        "'; drop table judgements; --",
        "' or '1'='1",
        '" or ""="',
        "x'); delete from judgements; --",
        "%' union select 1--",
    ],
)
def test_sql_injection_is_a_name_and_a_comment(page, tmp_path, text):
    address, _, store = page
    call(address, "/api/judgement", "POST", judgement(0, annotator="ada"))
    assert call(address, "/api/judgement", "POST", judgement(1, annotator=text, comment=text))[0] == 200
    query = urllib.parse.urlencode({"annotator": text})
    task = json.loads(call(address, f"/api/task?{query}")[2])
    assert task["done"] == 1 and task["number"] == 0  # their own one judgement, not everybody's
    status, _, _ = call(address, f"/api/task?{query}&" + urllib.parse.urlencode({"number": text}))
    assert status == 400
    assert [(j.annotator, j.comment) for j in store.all()] == [("ada", ""), (text, text)]
    with sqlite3.connect(tmp_path / artifacts.ANNOTATIONS) as connection:
        assert connection.execute("select count(*) from judgements").fetchone() == (2,)


def test_nothing_without_the_token(guarded):
    address, _, store = guarded
    wrong = [
        {}, {"Cookie": "annotate_token="}, {"Cookie": f"annotate_token={TOKEN[:-1]}"}, {"Cookie": f"other={TOKEN}"},
        {"Authorization": "Bearer "}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}é".encode().decode("latin-1")},
    ]  # fmt: skip
    for headers in wrong:
        for path in ("/", "/page.js", "/page.css", "/api/task?annotator=ada", "/nothing", "/?token=wrong"):
            status, _, body = call(address, path, headers=headers)
            assert status == 401 and b"Question" not in body and b"<html" not in body, (path, headers)
        assert call(address, "/api/judgement", "POST", judgement(), headers)[0] == 401
        assert call(address, f"/api/judgement?token={TOKEN}", "POST", judgement(), headers)[0] == 401
    assert store.all() == []


def test_token_s_address_opens_the_page(guarded):
    address, _, store = guarded
    status, headers, _ = call(address, f"/?token={TOKEN}")
    cookie = headers["Set-Cookie"]
    assert status == 303 and headers["Location"] == "/"  # the token leaves the address bar
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie
    bring = {"Cookie": cookie.split(";")[0]}
    assert call(address, "/", headers=bring)[0] == 200
    assert call(address, "/", headers=bring | {"Host": "our-host.example:8008"})[0] == 200
    assert call(address, "/api/judgement", "POST", judgement(), bring)[0] == 200
    assert call(address, "/api/judgement", "POST", judgement(1), bring | {"Origin": "http://evil.example"})[0] == 403
    assert call(address, "/api/task?annotator=a", headers={"Authorization": f"Bearer {TOKEN}"})[0] == 200
    assert len(store.all()) == 1


def test_every_answer_has_the_security_headers(page, guarded):
    for address, path in [(page[0], "/"), (page[0], "/nothing"), (page[0], "/api/task"), (guarded[0], "/")]:
        _, headers, _ = call(address, path)
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"


def test_beyond_loopback_only_with_a_token():
    host, listener = annotate.bind(None, 0, "")
    with listener:
        assert host == "127.0.0.1" and listener.getsockname()[0] == "127.0.0.1"
    host, listener = annotate.bind(None, 0, TOKEN)
    with listener:
        assert host == "0.0.0.0"
        taken = listener.getsockname()[1]
        with pytest.raises(InputError, match="--port"):
            annotate.bind(None, taken, TOKEN)
    for bad in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(InputError, match="give a --token"):
            annotate.bind(bad, 0, "")
    for weak in ("short", "with space in it all", "ü" * 20):
        with pytest.raises(InputError, match="at least 16"):
            annotate.bind(None, 0, weak)


def test_which_evaluation(tmp_path):
    run = epath.Path(made.run_folder(tmp_path / "run", made.rows(2)))
    assert judge.read_replies(annotate.replies_of(run))[1]["prompt_id"] == 1
    with pytest.raises(InputError, match="expected one of evaluate"):
        annotate.replies_of(run, "evaluation")
    with pytest.raises(InputError, match=r"no stages\.json"):
        annotate.replies_of(epath.Path(tmp_path))


def test_command_line(tmp_path):
    """The real command serves, keeps, is stopped; what was judged is exported."""
    run = made.run_folder(tmp_path / "run", made.rows(3))
    server = subprocess.Popen(
        [sys.executable, "-m", "mpo_jax.annotate", f"--run={run}", "--policies=sft,mpo", "--port=0"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = server.stdout.readline()
        assert line.startswith("3 comparisons at http://127.0.0.1:")
        address = line.split()[3].rstrip("/")
        assert call(address, "/api/judgement", "POST", judgement(0, "first", comment="ok"))[0] == 200
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    for name in ("out.csv", "out.jsonl"):
        annotate.export(epath.Path(tmp_path / name), epath.Path(run))
    assert next(csv.DictReader((tmp_path / "out.csv").open()))["comment"] == "ok"
    assert json.loads((tmp_path / "out.jsonl").read_text())["comment"] == "ok"
    with pytest.raises(InputError, match=r"ends in \.jsonl or \.csv"):
        annotate.export(epath.Path(tmp_path / "out.txt"), epath.Path(run))
