"""Made evaluations of several runs enter; means, intervals and p-values are scipy's, and what differs is told."""

import json
import math

import numpy as np
import pytest
from etils import epath
from scipy import stats

from mpo_jax import artifacts
from mpo_jax.errors import InputError
from mpo_jax.evaluation import over_runs, runs_page
from mpo_jax.evaluation.over_runs import Evaluated, Over
from tests.browser import PHONE, WIDE, browser, complaints, overflow, resize

__all__ = ["browser"]  # a fixture
GOLD = {"sft": (0.50, 0.52, 0.54), "dpo": (0.70, 0.66, 0.69), "mpo": (0.93, 0.88, 0.90)}
KL = {"sft": (0.0, 0.0, 0.0), "dpo": (1.4, 1.2, 1.5), "mpo": (7.5, 6.0, 8.0)}


def report(number: int) -> dict:
    """Of a run whose mpo passes dpo's KL at 0.8 of score."""
    policies = {
        name: {"gold": GOLD[name][number], "kl": KL[name][number], "tokens": 40.0 + number, "kl_error": 0.1}
        for name in GOLD
    }
    own = policies["mpo"]
    against = [
        {"name": name, "kl": policies[name]["kl"], "wins": {"rate": 0.9 - 0.1 * number},
         "difference": {"mean": own["gold"] - policies[name]["gold"]}} for name in ("sft", "dpo")
    ]  # fmt: skip
    points = {
        "dpo": [{"kl": 0.0, "score": 0.5}, {"kl": KL["dpo"][number], "score": GOLD["dpo"][number]}],
        "mpo": [{"kl": 0.0, "score": 0.5}, {"kl": KL["mpo"][number], "score": own["gold"]}],
        "sft": [{"kl": 0.0, "score": 0.5}],
    }
    equal = [{"name": "sft", "difference": None}, {"name": "dpo", "difference": {"mean": 0.1 + 0.02 * number}}]
    comparisons = [{"left": name, "right": "sft", "by": "the gold labeller", "win_rate": 0.8 + 0.05 * number}
                   for name in ("dpo", "mpo")]  # fmt: skip
    return {
        "prompts": 100, "baseline": "sft", "policies": policies, "comparisons": comparisons,
        "verdict": {"name": "mpo", "by": "the gold labeller", "baseline": "sft", "kl": own["kl"], "against": against},
        "curves": {"by": "the gold labeller", "points": points, "against": equal,
                   "scores": {"dpo": [], "mpo": []}, "values": []},
    }  # fmt: skip


def runs(count: int = 3, **meant) -> list[Evaluated]:
    facts = {"finished": "2026-11-27 10:00 UTC", "devices": "1 x cpu", "commit": "f00d"}
    return [
        Evaluated(f"runs/{number}", str(number), meant, {"evaluate": report(number)}, facts) for number in range(count)
    ]


def test_an_interval_over_runs_is_scipy_s():
    values = GOLD["mpo"]
    found = Over.of(values, 0.5)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (found.runs, found.mean) == (3, pytest.approx(np.mean(values)))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.p_value == pytest.approx(stats.ttest_1samp(values, 0.5).pvalue)
    assert found.text() == f"{np.mean(values):.3f} ± {(high - low) / 2:.3f}"
    assert Over.of([0.25]) == Over(1, 0.25) and Over.of([0.25]).text("+") == "+0.250"
    assert Over.of([0.0, 0.0]).text() == "0.000"
    assert Over.of([46.7464, 46.7464 + 1e-14, 46.7464]).text() == "46.746"


def test_the_verdict_is_over_runs_and_corrected():
    (made,) = over_runs.section(runs())["evaluations"]
    sft, dpo = made["verdict"]["against"]
    raw = [stats.ttest_rel(GOLD["mpo"], GOLD[name]).pvalue for name in ("sft", "dpo")]
    assert [sft["score"].p_value, dpo["score"].p_value] == pytest.approx(raw)
    assert [sft["adjusted_p"], dpo["adjusted_p"]] == pytest.approx(
        [max(2 * min(raw), raw[0]), max(2 * min(raw), raw[1])]
    )
    assert sft["wins"].p_value == pytest.approx(stats.ttest_1samp([0.9, 0.8, 0.7], 0.5).pvalue)
    assert sft["equal"] is None and dpo["equal"].mean == pytest.approx(0.12)
    assert dpo["equal_adjusted_p"] == pytest.approx(stats.ttest_1samp([0.1, 0.12, 0.14], 0).pvalue)
    told = made["verdict"]["told"]
    assert told[0] == "Over 3 runs, mpo is better than sft and dpo, by the gold labeller."
    assert "at 7.2 against 1.4 nats of KL to sft; at equal KL +0.12" in told[2] and told[2].endswith(": better.")
    (alone,) = over_runs.section(runs(1))["evaluations"]
    assert alone["verdict"]["told"] == [] and alone["policies"]["mpo"]["gold"].low is None


def test_where_runs_disagree_nothing_is_claimed():
    given = runs()
    for run, apart in zip(given, (0.2, -0.1, 0.05), strict=True):
        run.evaluations["evaluate"]["verdict"]["against"][1]["difference"]["mean"] = apart
    (made,) = over_runs.section(given)["evaluations"]
    assert made["verdict"]["told"][0].startswith(
        "Over 3 runs, mpo is better than sft, and not shown to differ from dpo"
    )
    given[1].evaluations["evaluate"]["verdict"]["name"] = "dpo"
    (made,) = over_runs.section(given)["evaluations"]
    assert made["verdict"] is None, "verdicts of different policies are none together"


def test_scores_at_the_same_kl_are_read_on_every_run_s_curve():
    (made,) = over_runs.section(runs())["evaluations"]
    equal = made["equal"]
    assert equal["values"][-1] == pytest.approx(1.2) and list(equal["scores"]) == ["dpo", "mpo"]
    at = [np.interp(1.2, [0, KL["mpo"][n]], [0.5, GOLD["mpo"][n]]) for n in range(3)]
    assert equal["scores"]["mpo"][-1].mean == pytest.approx(np.mean(at))
    assert equal["scores"]["dpo"][-1].low == pytest.approx(
        stats.t.interval(
            0.95, 2, *_mean_sem([np.interp(1.2, [0, KL["dpo"][n]], [0.5, GOLD["dpo"][n]]) for n in range(3)])
        )[0]
    )


def _mean_sem(values):
    return np.mean(values), stats.sem(values)


def test_runs_of_other_settings_are_told_apart():
    given = [*runs(2, beta=0.1, steps=20), *runs(2, beta=0.2, steps=20)]
    parts = over_runs.groups(given)
    assert [len(part) for part in parts] == [2, 2]
    assert over_runs.differing(parts) == [{"key": "beta", "values": [0.1, 0.2]}]
    told = runs_page.text(given)
    assert "A: 2 runs, seeds 0, 1" in told and "settings that differ, A | B:\n  beta: 0.1 | 0.2" in told
    with pytest.raises(InputError, match="--run: runs/0 and runs/0 have the same settings and the same seed, 0"):
        over_runs.groups([*runs(1), *runs(1)])


def test_a_terminal_and_a_readme_get_the_same_numbers():
    told, table = runs_page.text(runs()), runs_page.markdown(runs())
    mean, half = np.mean(GOLD["mpo"]), stats.t.ppf(0.975, 2) * stats.sem(GOLD["mpo"])
    for text in (told, table):
        assert f"{mean:.3f} ± {half:.3f}" in text and "Over 3 runs, mpo is better than" in " ".join(text.split())
    assert all(len(line) <= 80 for line in told.splitlines())
    lines = table.splitlines()
    assert lines[0] == "| policy | gold | KL to sft | tokens | wins by gold |"
    assert lines[1] == "| --- | --- | --- | --- | --- |" and all(line.count("|") == 6 for line in lines[:5])
    assert "Means over 3 runs (seeds 0, 1, 2) ± 95 % t intervals; 100 held-out prompts." in lines


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_the_page_shows_runs_and_groups(tmp_path, browser, size):
    folder = epath.Path(tmp_path)
    given = [*runs(3, beta=0.1), *runs(1, beta="<b>0.2</b>")]
    for number in range(3):
        (folder / "runs" / str(number)).mkdir(parents=True)
        (folder / "runs" / str(number) / artifacts.REPORT_PAGE).write_text("<title>its own</title>")
    placed = [Evaluated(str(folder / run.place), *list(vars(run).values())[1:]) for run in given]
    page = folder / "pages" / "all.html"
    runs_page.write(page, placed)
    complaints(browser)
    resize(browser, size)
    browser.get(f"file://{page}")
    assert complaints(browser) == [] and overflow(browser) <= 0
    body = browser.find_element("css selector", "body").text
    assert "Over 3 runs, mpo is better than sft and dpo" in body and "<b>0.2</b>" in body
    assert "This is one run, so there is no interval over runs" in body
    assert len(browser.find_elements("css selector", "svg.plot")) == 2
    links = browser.find_elements("css selector", "a")
    assert [link.get_attribute("href") for link in links[:3]] == [
        f"file://{folder}/runs/{n}/report.html" for n in range(3)
    ]
    links[1].click()
    assert browser.title == "its own"


def test_a_run_without_an_evaluation_is_refused(tmp_path):
    (tmp_path / "stages.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="has no finished evaluation; expected a run whose evaluate stage is done"):
        over_runs.read(str(tmp_path), {}, {}, "0")
    assert math.isclose(Over.of([1.0, 2.0]).mean, 1.5)
