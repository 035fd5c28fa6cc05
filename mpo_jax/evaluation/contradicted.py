"""An evaluation, or a judge's table, enters; where gold or a judge says the opposite of the reward model leaves, in
words: the policy has learned to please the reward model, and nobody else (Gao et al. 2023, arXiv 2210.10760)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpo_jax import artifacts
from mpo_jax.evaluation.sections import Finished

_LEVEL = 0.05
_REWARD, _GOLD = "the reward model", "the gold labeller"
_ATTEMPT = "Try a larger kl_coefficient, fewer steps, select=best, or a reward model trained on such replies."

Found = tuple[str, str] | None
Comparisons = Iterable[Mapping[str, Any]]


def by_gold(stage: Finished, rows: Sequence[Any]) -> Found:
    """Of an evaluation with both."""
    report = _report(stage.folder)
    return _found(report, [each for each in report if each["by"] == _GOLD])


def by_judge(stage: Finished, rows: Sequence[Any]) -> Found:
    """Of a judge's table, beside the evaluation whose replies it judged."""
    folder = stage.read_as("evaluate")
    if folder is None:
        return None
    judged = (stage.manifest["summary"] or {}).get("pairs", [])
    return _found(_report(folder), judged)


def _report(folder) -> list[Mapping[str, Any]]:
    found = artifacts.read_json(folder / artifacts.REPORT, default={}).get("comparisons", [])
    return [each for each in found if {"by", "left", "right"} <= set(each)]


def _found(report: Comparisons, judged: Comparisons) -> Found:
    """The first comparison whose winner by the reward model loses by another, both beyond chance."""
    own = {(each["left"], each["right"]): each for each in report if each["by"] == _REWARD}
    for other in judged:
        mine = own.get((other["left"], other["right"]))
        if mine is None or other["by"] == _REWARD or max(_p(mine), _p(other)) >= _LEVEL:
            continue
        if (mine["win_rate"] - 0.5) * (other["win_rate"] - 0.5) < 0:
            told = f"{other['left']} wins against {other['right']} in {100 * mine['win_rate']:.0f} % of the prompts by "
            return f"{told}the reward model, but in {100 * other['win_rate']:.0f} % by {other['by']}.", _ATTEMPT
    return None


def _p(each: Mapping[str, Any]) -> float:
    return 1.0 if each.get("adjusted_p") is None else each["adjusted_p"]
