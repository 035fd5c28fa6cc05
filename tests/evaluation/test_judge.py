"""The judge against a real server on loopback that breaks in every way it can; judges of known bias are exposed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mpo_jax import settings as declared
from mpo_jax.errors import INTERRUPTED, InputError
from mpo_jax.evaluation import judge, judge_client, judge_prompts
from mpo_jax.evaluation.judge_cache import Cache
from mpo_jax.evaluation.judge_client import Endpoint
from mpo_jax.evaluation.judge_prompts import FIRST, SECOND, TIE
from tests.tools.judge_server import FAULTS, REPLIES, JudgeServer, some_faults
from tests.tools.processes import PATH

ROOT = Path(__file__).resolve().parent.parent.parent
PAIRS = [("mpo", "sft")]


def made_rows(count=40, seed=0, skew=0):
    """Replies whose quality (0 to 99) the test's judges can read; one prompt's replies are the same text. skew: tokens
    by which mpo's are longer."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        replies = {}
        for name, lift in (("sft", 0), ("mpo", 15)):
            quality = int(np.clip(rng.integers(0, 85) + lift, 0, 99))
            text = f"reply {name} {number} quality={quality} éà <b>"
            if number == 7:
                text = "the same quality=50"
            tokens = 20 + int(rng.integers(0, 20)) + (skew if name == "mpo" else 0)
            replies[name] = {"text": f"{text} length={tokens}" if number != 7 else text, "tokens": tokens,
                             "finished": True, "reward": quality / 10, "gold": None}  # fmt: skip
        rows.append({"prompt_id": number, "prompt": f"prompt {number}", "replies": replies})
    return rows


def number_in(text: str, word: str) -> int:
    return int(text.split(f"{word}=")[1].split()[0])


def by_quality(first: str, second: str) -> str:
    """An honest judge, which says so when it can't tell, leaves out its verdict at times, and at close calls takes
    whatever stands second."""
    a, b = number_in(first, "quality"), number_in(second, "quality")
    if (a + b) % 11 == 0:
        return "Both have their merits." if a > b else "Verdict: A\nOn reflection\nVerdict: B"
    if a == b:
        return "They are alike.\nVerdict: tie"
    if abs(a - b) < 8:
        return "The latter.\n**Verdict: B**"
    return f"Because.\nVerdict: {'A' if a > b else 'B'}"


def endpoint(server: JudgeServer, **settings) -> Endpoint:
    known = {"model": "m", "key_variable": "", "concurrency": 4, "seconds": 20, "backoff": 0.01, "attempts": 5}
    return declared.parse(Endpoint, {"base_url": server.url} | known | settings)


def judged(server, path, rows=None, **settings):
    rows = made_rows() if rows is None else rows
    questions = judge_prompts.questions(rows, PAIRS, judge_prompts.load("helpful"))
    with Cache(path) as cache:
        answers = judge_client.ask(endpoint(server, **settings), [q.text for q in questions], cache, "run")
        spent = cache.spent("run")
    return judge.by_answers(rows, PAIRS, "m", questions, answers, 200), spent, questions, answers


def test_table_under_faults_equals_the_faultless_one(tmp_path):
    with JudgeServer(by_quality) as calm:
        expected, (calls, _), _, _ = judged(calm, tmp_path / "calm.sqlite")
    with JudgeServer(by_quality, some_faults, delay=0.005) as rough:
        found, (rough_calls, tokens), questions, _ = judged(rough, tmp_path / "rough.sqlite", seconds=1.5)
    assert found == expected
    assert set(rough.given) - {None} == set(FAULTS), rough.given
    assert calls == len(questions) == 78
    assert rough_calls == sum(rough.attempts.values()) == calls + sum(rough.given.values())
    assert tokens == 110 * 78
    assert set(rough.answered.values()) == {1}
    assert rough.most_active <= 4


def test_counts_by_hand(tmp_path):
    """The judge's own rule, applied to every prompt here, gives the table's counts."""
    rows = made_rows()
    with JudgeServer(by_quality) as server:
        table, _, _, answers = judged(server, tmp_path / "c.sqlite")
    pair, habits = table["pairs"][0], table["habits"]
    texts = [[row["replies"][name]["text"] for name in PAIRS[0]] for row in rows if row["prompt_id"] != 7]
    qualities = [(number_in(mpo, "quality"), number_in(sft, "quality")) for mpo, sft in texts]
    readable = [(a, b) for a, b in qualities if (a + b) % 11]
    close = [(a, b) for a, b in readable if 0 < abs(a - b) < 8]
    wins = sum(a - b >= 8 for a, b in readable)
    ties = len(close) + sum(a == b for a, b in readable) + 1  # and the prompt whose replies are alike
    assert pair["invalid_prompts"] == 39 - len(readable) > 0
    assert pair["invalid_answers"] == habits["invalid_answers"] == 2 * (39 - len(readable))
    assert pair["identical"] == 1 and pair["prompts"] == len(readable) + 1
    assert pair["ties"] == ties and pair["second_twice"] == len(close) > 0 and pair["first_twice"] == 0
    assert pair["win_rate"] == pytest.approx((wins + ties / 2) / pair["prompts"])
    assert habits["agreement"] == pytest.approx(1 - len(close) / len(readable))
    assert all("quality" not in answer for answer in answers)


def test_nothing_is_paid_twice(tmp_path):
    with JudgeServer(by_quality) as server:
        first, _, _, _ = judged(server, tmp_path / "c.sqlite")
        again, (calls, _), _, _ = judged(server, tmp_path / "c.sqlite")
        assert again == first
        assert calls == sum(server.attempts.values()) == 78
        judged(server, tmp_path / "c.sqlite", model="another")
        assert sum(server.attempts.values()) == 2 * 78


KILLED = """
import sys
from tests.evaluation.test_judge import *
from types import SimpleNamespace
judged(SimpleNamespace(url=sys.argv[1]), Path(sys.argv[2]), concurrency=3)
"""


def test_killed_in_the_middle_it_repeats_no_finished_call(tmp_path):
    path = tmp_path / "c.sqlite"
    with JudgeServer(by_quality, delay=0.1) as server:
        command = [sys.executable, "-c", KILLED, server.url, str(path)]
        child = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": PATH})
        deadline = time.monotonic() + 120
        while sum(server.answered.values()) < 20 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        server.settle()
        questions = judge_prompts.questions(made_rows(), PAIRS, judge_prompts.load("helpful"))
        with Cache(path) as cache:
            kept = {q.text for q in questions if cache.get(endpoint(server).cache_key(q.text)) is not None}
            before = cache.spent("run")[0]
        assert 20 - 3 <= len(kept) < 78
        in_flight = sum(server.attempts.values()) - len(kept)
        assert 0 <= in_flight <= 3  # sent, and not yet kept when the process died
        table, (calls, _), _, _ = judged(server, path, concurrency=3)
        assert all(server.attempts[text] == 1 for text in kept)
        assert sum(server.attempts.values()) <= 78 + in_flight
        assert calls >= before + 78 - len(kept)
        assert server.most_active <= 3
    with JudgeServer(by_quality) as calm:
        assert judged(calm, tmp_path / "calm.sqlite")[0] == table


STOPPED = """
import sys
from mpo_jax import stopping
from tests.evaluation.test_judge import *
from types import SimpleNamespace
with stopping.Notice():
    judged(SimpleNamespace(url=sys.argv[1]), Path(sys.argv[2]), concurrency=3)
"""


def test_an_interrupt_ends_the_asking_behind_the_calls_in_flight(tmp_path):
    path = tmp_path / "c.sqlite"
    with JudgeServer(by_quality, delay=0.1) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", STOPPED, server.url, str(path)],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": PATH}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while sum(server.answered.values()) < 20 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
        assert child.returncode == INTERRUPTED and "Traceback" not in said, said
        questions = judge_prompts.questions(made_rows(), PAIRS, judge_prompts.load("helpful"))
        with Cache(path) as cache:
            kept = [q for q in questions if cache.get(endpoint(server).cache_key(q.text)) is not None]
        assert 20 <= sum(server.attempts.values()) < 78
        assert len({q.text for q in kept}) == sum(server.attempts.values()), "what was in flight is kept"


@pytest.mark.parametrize("bound", [1, 5])
def test_concurrency_is_bounded_and_used(tmp_path, bound):
    with JudgeServer(by_quality, delay=0.1) as server:
        judged(server, tmp_path / "c.sqlite", rows=made_rows(12), concurrency=bound)
    assert server.most_active == bound


@pytest.mark.parametrize("form", ["seconds", pytest.param("date", marks=pytest.mark.slow)])
def test_retry_after_holds_every_worker_back(tmp_path, form):
    """After the first 429, no call is sent for as long as the server asked."""
    wait = "1" if form == "seconds" else time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2.5))

    def once(question, attempt):
        return "429" if question.count("prompt 0\n") and attempt == 0 else None

    with JudgeServer(by_quality, once, delay=0.02, retry_after=wait) as server:
        judged(server, tmp_path / "c.sqlite", rows=made_rows(6), concurrency=2)
    refused = next(moment for moment, fault in server.times if fault == "429")
    later = [moment - refused for moment, fault in server.times if moment > refused and not fault]
    # The one call that was already on its way may come within the first moments.
    assert sum(moment < 0.9 for moment in later) <= 2 and len(later) >= 5


@pytest.mark.parametrize(
    ("name", "ceiling", "most"),
    [("max_calls", 30, 30), pytest.param("max_tokens", 30 * 110, 33, marks=pytest.mark.slow)],
)
def test_ceiling_stops_and_a_higher_one_goes_on(tmp_path, name, ceiling, most):
    with JudgeServer(by_quality) as server:
        with pytest.raises(InputError, match=f"{name}: the ceiling of .* is reached"):
            judged(server, tmp_path / "c.sqlite", **{name: ceiling})
        assert 30 <= sum(server.attempts.values()) <= most
        with pytest.raises(InputError, match=name):  # a restart is no way around it
            judged(server, tmp_path / "c.sqlite", **{name: ceiling})
        assert sum(server.attempts.values()) <= most
        judged(server, tmp_path / "c.sqlite")
        assert sum(server.attempts.values()) == 78


def test_endpoint_that_never_answers_stops_with_a_reason(tmp_path):
    with (
        JudgeServer(by_quality, lambda question, attempt: "500") as server,
        pytest.raises(InputError, match="no answer in 2 attempts, the last: status 500"),
    ):
        judged(server, tmp_path / "c.sqlite", attempts=2)
    with pytest.raises(InputError, match="no connection"):
        judged(server, tmp_path / "c.sqlite", attempts=1)


def test_refusals_are_final_and_keys_stay_secret(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    with JudgeServer(by_quality) as server:
        judged(server, tmp_path / "c.sqlite", key_variable="JUDGE_KEY")
        assert server.keys == {"Bearer sk-very-secret"}
        bad = declared.replaced(endpoint(server), {"base_url": server.url.replace("/v1", "/nowhere")})
        with (
            Cache(tmp_path / "c.sqlite") as cache,
            pytest.raises(InputError, match="refused with status 404; check base_url") as told,
        ):
            judge_client.ask(bad, ["a question"], cache, "run")
        with pytest.raises(InputError, match=r"refused with status 400: Say max_tokens\."):
            judged(server, tmp_path / "c.sqlite", limit_key="max_completion_tokens")
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(InputError, match="JUDGE_KEY is not set"):
        judged(server, tmp_path / "d.sqlite", key_variable="JUDGE_KEY")
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    shown = "".join(capfd.readouterr()) + str(told.value)
    assert b"very-secret" not in written and "very-secret" not in shown


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_url": "api.openai.com"}, "expected an address"),
        ({"base_url": "https://me:pass@host/v1"}, "credentials"),
        ({"model": ""}, "model: empty"),
        ({"concurrency": 0}, "concurrency: 0; expected 1 or more"),
    ],
)
def test_endpoint_is_checked(settings, words):
    with pytest.raises(InputError, match=words):
        declared.parse(Endpoint, {"base_url": "http://127.0.0.1:9/v1", "model": "m"} | settings).check()


def biased(judgement, skew=0, count=300):
    """The table of a judge who needs no server."""
    rows = made_rows(count, skew=skew)
    questions = judge_prompts.questions(rows, PAIRS, judge_prompts.load("helpful"))
    answers = [judgement(*REPLIES.search(question.text).groups()) for question in questions]
    return judge.by_answers(rows, PAIRS, "m", questions, answers, 500)


def test_judge_that_always_takes_the_first_is_exposed():
    table = biased(lambda first, second: "Verdict: A", count=60)
    pair, habits = table["pairs"][0], table["habits"]
    assert habits["position_bias"] == 1.0 and habits["position_bias_interval"][0] > 0.9
    assert habits["agreement"] == 0.0
    assert habits["flipped"] == 1.0 and 0.9 < habits["flipped_interval"][0] < habits["flipped_interval"][1] == 1
    assert pair["win_rate"] == 0.5 and pair["ties"] == 60 and pair["first_twice"] == 59


def test_verdicts_that_turn_with_the_order_are_counted_over_prompts():
    """By hand: of 299 prompts, every third is decided by where a reply stands, every fifth of the others is a tie."""
    rows = made_rows(300)

    def sways(first, second):
        number = int(first.split()[2])
        a, b = number_in(first, "quality"), number_in(second, "quality")
        return f"Verdict: {'A' if number % 3 == 0 else 'tie' if number % 5 == 0 or a == b else 'A' if a > b else 'B'}"

    table = biased(sways)
    habits = table["habits"]
    numbers = [row["prompt_id"] for row in rows if row["prompt_id"] != 7]
    swayed = sum(number % 3 == 0 for number in numbers)
    alike = {row["prompt_id"] for row in rows
             if len({number_in(reply["text"], "quality") for reply in row["replies"].values()}) == 1}  # fmt: skip
    ties = [number for number in numbers if number % 3 and (number % 5 == 0 or number in alike)]
    assert habits["flipped"] == pytest.approx(swayed / 299) and habits["agreement"] == pytest.approx(
        1 - habits["flipped"]
    )
    assert habits["ties"] == 2 * len(ties)
    low, high = habits["flipped_interval"]
    assert low < habits["flipped"] < high and high - low == pytest.approx(2 * 1.96 * (2 / 9 / 299) ** 0.5, rel=0.15)


def test_judge_that_always_takes_the_longer_is_exposed():
    def longer(first, second):
        a, b = (number_in(text, "length") if "length" in text else 0 for text in (first, second))
        return f"Verdict: {'A' if a > b else 'B' if b > a else 'tie'}"

    table = biased(longer, skew=8)
    pair, habits = table["pairs"][0], table["habits"]
    assert pair["win_rate"] > 0.75 and pair["low"] > 0.7
    assert pair["length_controlled"] == pytest.approx(0.5, abs=0.08)
    assert pair["length_preference"] == 1.0
    assert habits["agreement"] == 1.0 and habits["position_bias"] == 0.5


def test_honest_judge_is_not_accused():
    def honest(first, second):
        a, b = number_in(first, "quality"), number_in(second, "quality")
        return f"Verdict: {'A' if a > b else 'B' if b > a else 'tie'}"

    table = biased(honest, skew=8)
    pair, habits = table["pairs"][0], table["habits"]
    assert habits["position_bias"] == 0.5 and habits["agreement"] == 1.0
    assert pair["length_controlled"] == pytest.approx(pair["win_rate"], abs=0.06)
    assert abs(pair["length_preference"] - 0.5) < 0.35


def test_scores_go_through_the_same_table():
    rows = made_rows()
    table = judge.by_scores(rows, PAIRS, "the reward model", "reward", 200)
    scores = [[row["replies"][name]["reward"] for name in PAIRS[0]] for row in rows]
    wins = sum(a > b for a, b in scores) + sum(a == b for a, b in scores) / 2
    assert table["pairs"][0]["win_rate"] == pytest.approx(wins / 40)
    assert table["pairs"][0]["invalid_prompts"] == 0
    rows[3]["replies"]["sft"]["reward"] = None
    assert judge.by_scores(rows, PAIRS, "the reward model", "reward", 200)["pairs"][0]["invalid_prompts"] == 1
    with pytest.raises(InputError, match="hold no gold scores"):
        judge.by_scores(rows, PAIRS, "gold", "gold")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A is kind.\nVerdict: A", FIRST),
        ("verdict: b", SECOND),
        ("**Verdict:** Tie.", TIE),
        ("## Verdict: A ##", FIRST),
        ("Verdict: A\nVerdict: A", FIRST),
        ("Verdict: A\nno, wait\nVerdict: B", None),
        ("I prefer A.", None),
        ("Verdict: A or B", None),
        ("Verdict: neither", None),
        ("The verdict: A, since it is kind", None),
        ("", None),
        (None, None),
    ],
)
def test_verdicts_are_read_and_never_guessed(answer, expected):
    assert judge_prompts.verdict(answer) == expected


def test_prompt_files(tmp_path):
    for name in judge_prompts.PROMPTS:
        shown = judge_prompts.load(name).render(prompt="P <1>", first="{{ second }}", second="S & T")
        assert "P <1>" in shown and "{{ second }}" in shown and "S & T" in shown and "Verdict: tie" in shown
    own = tmp_path / "own.jinja"
    for text, words in [
        ("{{ prompt }} {{ first }}", "does not show {{ second }}"),
        ("{{ prompt }}{{ first }}{{ second }}{{ thrid }}", "thrid"),
        ("line\n{% if %}", "line 2"),
        ("{{ prompt }}{{ first }}{{ second }}{{ ''.__class__.__mro__ }}", "unsafe"),
    ]:
        own.write_text(text)
        with pytest.raises(InputError) as told:
            judge_prompts.load(str(own))
        assert words in str(told.value) and "own.jinja" in str(told.value)
    with pytest.raises(InputError, match="no such file"):
        judge_prompts.load("absent.jinja")


def test_pairs_of_policies():
    rows = [{"replies": {"sft": {}, "dpo": {}, "mpo": {}}}]
    assert judge.pairs_of(rows, (), "") == [("dpo", "sft"), ("mpo", "sft"), ("mpo", "dpo")]
    assert judge.pairs_of(rows, ("mpo",), "dpo") == [("mpo", "dpo")]
    with pytest.raises(InputError, match="no replies of 'ppo'"):
        judge.pairs_of(rows, ("ppo",), "")
    with pytest.raises(InputError, match="needs two"):
        judge.pairs_of(rows, ("mpo",), "")
    rows[0]["replies"] |= {"sft best of 4": {}, "sft@greedy": {}, "mpo@greedy": {}}
    assert judge.pairs_of(rows, (), "sft") == [
        ("dpo", "sft"), ("mpo", "sft"), ("sft best of 4", "sft"), ("mpo@greedy", "sft@greedy"),
    ]  # fmt: skip
    assert judge.pairs_of(rows, ("dpo", "sft@greedy", "mpo@greedy"), "") == [("mpo@greedy", "sft@greedy")]
    assert judge.pairs_of([{"replies": {"a@b": {}, "sft": {}}}], (), "sft") == [("a@b", "sft")], "a stage's own name"


def test_verdict_lines_hold_what_was_answered():
    questions = judge_prompts.questions(made_rows(2), PAIRS, judge_prompts.load("summary"))
    lines = judge.verdict_lines(questions, ["Verdict: A", "é", None, "x"])
    assert json.loads(json.dumps(lines)) == lines
    assert [line["verdict"] for line in lines] == [FIRST, None, None, None]
    assert lines[0]["first"] == "mpo" and lines[1]["first"] == "sft" and lines[1]["answer"] == "é"
