"""Made scores enter: what is better is called so, what is equal is not, and every p-value is corrected."""

import numpy as np
import pytest

from mpo_jax.evaluation import statistics, verdict

RNG = np.random.default_rng(0)


def rows(**scores):
    """Lines of an evaluation. scores: policy -> gold scores, one for each prompt."""
    prompts = len(next(iter(scores.values())))
    return [
        {"replies": {name: {"gold": float(given[place]), "reward": 0.0} for name, given in scores.items()}}
        for place in range(prompts)
    ]


def means(*names, **kl):
    return {name: {"kl": kl[name]} if name in kl else {} for name in names}


def test_the_subject_rests_on_most_of_the_others():
    beneath = {"sft": {"data"}, "dpo": {"sft", "split"}, "dpo_all": {"sft"}, "mpo": {"dpo", "sft", "split"}}
    known = {name: frozenset(given) for name, given in beneath.items()}
    assert verdict.subject(["sft", "dpo", "mpo", "dpo_all"], known) == "mpo"
    assert verdict.subject(["sft", "dpo_all", "dpo"], known) == "dpo_all"  # as many as dpo: the first
    assert verdict.subject(["sft"], known) == "sft"


def test_better_worse_and_not_shown():
    base = RNG.normal(size=200)
    noise = RNG.normal(size=(3, 200)) * 0.2
    lines = rows(mpo=base + 0.5 + noise[0], sft=base, best=base + 1.5 + noise[1], same=base + 0.5 + noise[2])
    found = verdict.given(lines, "mpo", means("mpo", "sft", "best", "same", mpo=3.0, sft=0.0, best=4.0), "sft")
    told = {each["name"]: verdict.outcome(each) for each in found["against"]}
    assert told == {"sft": "better", "best": "worse", "same": "no difference found"}
    assert found["sentences"][0] == (
        "mpo is better than sft, worse than best, and not shown to differ from same, by the gold labeller, on 200 "
        "held-out prompts, at 3.0 nats of KL to sft (the others: 0.0 to 4.0)."
    )
    assert found["sentences"][3].endswith(": no difference found.") and " nats" not in found["sentences"][3]
    raw = [p for other in ("sft", "best", "same") for p in _p_values(lines, "mpo", other)]
    adjusted = statistics.holm_adjusted(raw)  # held against R's in test_statistics.py
    held = [each[part]["adjusted_p"] for each in found["against"] for part in ("difference", "wins")]
    np.testing.assert_allclose(held, adjusted, rtol=1e-12)


def comparison(mean, p, rate, wins_p):
    return {"difference": {"mean": mean, "adjusted_p": p}, "wins": {"rate": rate, "adjusted_p": wins_p}}


@pytest.mark.parametrize(
    ("given", "told"),
    [((0.1, 0.01, 0.6, 0.2), "better"), ((0.1, 0.01, 0.6, 0.01), "better"), ((-0.1, 0.01, 0.4, 0.01), "worse"),
     ((-0.1, 0.6, 0.23, 0.001), "no difference of score, fewer wins"),
     ((-0.1, 0.6, 0.77, 0.001), "no difference of score, more wins"),
     ((0.1, 0.01, 0.3, 0.01), "higher score, fewer wins"), ((-0.1, 0.01, 0.7, 0.01), "lower score, more wins"),
     ((0.1, 0.05, 0.9, 0.05), "no difference found")],
)  # fmt: skip
def test_score_and_wins_that_disagree_are_both_told(given, told):
    assert verdict.outcome(comparison(*given)) == told


def test_a_few_large_differences_make_no_difference_of_score_but_fewer_wins_are_told():
    base = RNG.normal(size=64)
    other = base + np.where(np.arange(64) < 6, -4.0, 0.1 + 0.01 * RNG.random(64))
    found = verdict.given(rows(mpo=base, other=other, same=base), "mpo", means("mpo", "other", "same"), "")
    assert found["sentences"][0] == (
        "mpo is without a shown difference of score but with fewer wins than other, and not shown to differ from same, "
        "by the gold labeller, on 64 held-out prompts."
    )


def _p_values(lines, left, right):
    mine, theirs = ([line["replies"][name]["gold"] for line in lines] for name in (left, right))
    yield statistics.difference(mine, theirs).p_value
    yield statistics.compare(left, right, "", statistics.outcomes(mine, theirs)).p_value


def test_two_equal_policies_are_not_told_apart():
    same = RNG.normal(size=50)
    found = verdict.given(rows(mpo=same, dpo=same), "mpo", means("mpo", "dpo"), "")
    assert verdict.outcome(found["against"][0]) == "no difference found"
    assert found["sentences"][0] == (
        "mpo is not shown to differ from dpo, by the gold labeller, on 50 held-out prompts."
    )


def test_equal_policies_of_other_replies_are_rarely_told_apart():
    """At most 5 % of tables, over 400 simulated ones, may call one of three equal policies better or worse."""
    wrong = 0
    for _ in range(400):
        drawn = RNG.normal(size=(3, 60))
        found = verdict.given(rows(a=drawn[0], b=drawn[1], c=drawn[2]), "a", means("a", "b", "c"), "")
        wrong += any(verdict.outcome(each) != "no difference found" for each in found["against"])
    assert wrong / 400 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_by_the_reward_model_where_gold_is_missing_and_not_at_all_where_nothing_is():
    lines = [{"replies": {name: {"gold": None, "reward": 1.0 * place} for name in "ab"}} for place in range(4)]
    assert verdict.given(lines, "a", means("a", "b"), "b")["by"] == "the reward model"
    bare = [{"replies": {name: {"gold": None, "reward": None} for name in "ab"}} for _ in range(4)]
    assert verdict.given(bare, "a", means("a", "b"), "b") is None
    assert verdict.given(lines[:1], "a", means("a", "b"), "b") is None
    assert verdict.given(rows(a=[1.0, 2.0]), "a", means("a"), "a") is None


@pytest.mark.parametrize(
    ("value", "error", "told"),
    [(0.91532, 0.0123, "0.915 ± 0.012"), (7.6458, 0.354, "7.65 ± 0.35"), (812.3, 24.0, "812 ± 24"),
     (0, 0, "0.000 ± 0.000"), (1.0, 0.00001, "1.0000 ± 0.0000")],
)  # fmt: skip
def test_numbers_have_the_digits_that_their_error_allows(value, error, told):
    assert verdict.with_error(value, error) == told
