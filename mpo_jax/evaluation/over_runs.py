"""The finished evaluations of several runs enter; what they say together leaves: means over runs, with t intervals.

Runs that differ in their seed alone are one group. An interval over runs is about what another seed would have given,
on the same data; runs of other settings stand beside each other, with what differs.
"""

import dataclasses
import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mpo_jax import artifacts
from mpo_jax.errors import InputError
from mpo_jax.evaluation import curves, report, statistics, table, verdict
from mpo_jax.evaluation.sections import Finished, Shown

Meant = Mapping[str, Any]
"""The settings of a run that tell it from runs of another kind, by dotted names: neither seeds, nor how it computes."""


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A run with its finished evaluations by name: their reports, as their stages wrote them. place: its folder as it
    was given. seeds: of the run and of stages that have one of their own, as text."""

    place: str
    seeds: str
    meant: Meant
    evaluations: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Over:
    """A figure over runs: their mean and, of two or more, its 95 % t interval and the p-value of the t test against
    0."""

    runs: int
    mean: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None

    @classmethod
    def of(cls, values: Sequence[float], null: float = 0.0) -> "Over":
        """null: what the p-value is of."""
        if len(values) < 2:
            return cls(len(values), float(values[0]))
        found = statistics.difference(values, np.full(len(values), null))
        return cls(len(values), found.mean + null, found.low + null, found.high + null, found.p_value)

    def text(self, sign: str = "") -> str:
        """The mean ± half of its interval. sign: "+" for a difference."""
        half = (self.high - self.low) / 2 if self.low is not None and self.high is not None else 0.0
        half = half if half > 1e-9 * abs(self.mean) else 0.0  # what summation leaves of runs that are alike
        digits = verdict.decimals(half / 2)
        return f"{self.mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")


def read(place: str, shown: Mapping[str, Shown], meant: Meant, seeds: str) -> Evaluated:
    """A run's evaluations. InputError where it has none that is finished and whole."""
    stages, damaged = report.finished(epath.Path(place))
    evaluations = {
        stage.name: artifacts.read_json(stage.folder / artifacts.REPORT)
        for stage in stages
        if shown.get(stage.kind, Shown()).part == "evaluations"
    }
    if not evaluations:
        why = f" ({'; '.join(damaged)})" if damaged else ""
        raise InputError(f"--run: {place} has no finished evaluation{why}; expected a run whose evaluate stage is done")
    last = next(stage for stage in reversed(stages) if stage.name in evaluations)
    return Evaluated(place, seeds, meant, evaluations, _facts(last))


def _facts(stage: Finished) -> dict[str, str]:
    made = datetime.datetime.fromtimestamp((stage.folder / artifacts.MANIFEST).stat().mtime, datetime.UTC)
    told = {key: stage.manifest.get(key) or "" for key in ("devices", "commit")}
    return {"finished": f"{made:%Y-%m-%d %H:%M} UTC"} | told


def groups(runs: Sequence[Evaluated]) -> list[list[Evaluated]]:
    """The runs of equal settings together, in their order. InputError for two of them with the same seed: an interval
    over runs is about seeds."""
    found: list[list[Evaluated]] = []
    for run in runs:
        alike = next((group for group in found if group[0].meant == run.meant), None)
        if alike is None:
            found.append([run])
            continue
        if (same := next((each for each in alike if each.seeds == run.seeds), None)) is not None:
            raise InputError(
                f"--run: {same.place} and {run.place} have the same settings and the same seed, {run.seeds}; expected "
                "runs of different seeds"
            )
        alike.append(run)
    return found


def differing(parts: Sequence[Sequence[Evaluated]]) -> list[dict[str, Any]]:
    """The settings in which groups differ, each with its value in every group ("–": it has none)."""
    keys = dict.fromkeys(key for group in parts for key in group[0].meant)
    rows = [(key, [group[0].meant.get(key, "–") for group in parts]) for key in keys]
    return [{"key": key, "values": values} for key, values in rows if any(value != values[0] for value in values)]


def section(group: Sequence[Evaluated]) -> dict[str, Any]:
    """What runs of equal settings say together: {"runs", "seeds", "notes", "evaluations"}, each evaluation that all of
    them have with its policies' table, verdict and scores at common KL values."""
    names = [name for name in group[0].evaluations if all(name in run.evaluations for run in group)]
    alone = "This is one run, so there is no interval over runs; the run's own report has intervals over prompts."
    made = [_evaluation(name, [run.evaluations[name] for run in group]) for name in names]
    return {
        "runs": list(group),
        "seeds": [run.seeds for run in group],
        "notes": [alone] if len(group) < 2 else [],
        "evaluations": made,
    }


def _evaluation(name: str, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    policies = [each for each in reports[0]["policies"] if all(each in report["policies"] for report in reports)]
    columns: dict[str, dict[str, Over]] = {}
    for policy in policies:
        means = [report["policies"][policy] for report in reports]
        columns[policy] = {
            key: Over.of([each[key] for each in means]) for key in table.COLUMNS if all(key in each for each in means)
        }
    baseline = reports[0]["baseline"]
    wins = {key: _wins(reports, *key) for key in table.wins(reports[0]) if key[0] in policies}
    judges = [by for _, by in statistics.JUDGES if any(key[1] == by for key in wins)]
    found = {
        "name": name,
        "n": len(reports),
        "prompts": sorted({report["prompts"] for report in reports}),
        "baseline": baseline,
        "policies": columns,
        "main": [key for key in table.MAIN if any(key in means for means in columns.values())],
        "keys": [key for key in table.COLUMNS if any(key in means for means in columns.values())],
        "wins": {policy: over for (policy, by), over in wins.items() if over is not None and by == (judges or [""])[0]},
        "by": (judges or [""])[0],
        "verdict": _verdict(reports),
        "points": [
            {policy: report["policies"][policy] for policy in policies if "kl" in report["policies"][policy]}
            for report in reports
        ],
    }
    return found | {"equal": _equal([report.get("curves") for report in reports])}


def _wins(reports: Sequence[Mapping[str, Any]], policy: str, by: str) -> Over | None:
    rates = [table.wins(report).get((policy, by), {}).get("win_rate") for report in reports]
    return None if any(rate is None for rate in rates) else Over.of(rates, 0.5)


def _verdict(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The verdicts of the runs together: None where they are not of the same policy by the same scorer."""
    made = [report["verdict"] for report in reports if report.get("verdict")]
    if not made or len(made) < len(reports) or len({(each["name"], each["by"]) for each in made}) > 1:
        return None
    against = []
    for other in (each["name"] for each in made[0]["against"]):
        rows = [next((row for row in each["against"] if row["name"] == other), None) for each in made]
        known = [row for row in rows if row is not None]
        if len(known) == len(made):
            score = Over.of([row["difference"]["mean"] for row in known])
            won = Over.of([row["wins"]["rate"] for row in known], 0.5)
            kl = None if any(row["kl"] is None for row in known) else Over.of([row["kl"] for row in known])
            against.append({"name": other, "score": score, "wins": won, "kl": kl, "equal": _at_equal(reports, other)})
    _correct(against)
    own = None if any(each["kl"] is None for each in made) else Over.of([each["kl"] for each in made])
    found = {"name": made[0]["name"], "by": made[0]["by"], "baseline": made[0]["baseline"], "n": len(made), "kl": own}
    return found | {"against": against, "told": _told(found, against)}


def _at_equal(reports: Sequence[Mapping[str, Any]], other: str) -> Over | None:
    """The difference at equal KL, where every run has one."""
    rows = [row for report in reports for row in (report.get("curves") or {}).get("against", ())]
    known = [row["difference"]["mean"] for row in rows if row["name"] == other and row["difference"] is not None]
    return Over.of(known) if len(known) == len(reports) else None


def _correct(against: Sequence[dict[str, Any]]) -> None:
    """Holm's correction over the differences of score, and over those at equal KL apart; in place."""
    for key, name in (("score", "adjusted_p"), ("equal", "equal_adjusted_p")):
        rows = [row for row in against if row[key] is not None and row[key].p_value is not None]
        adjusted = statistics.holm_adjusted([row[key].p_value for row in rows])
        for row, p in zip(rows, adjusted, strict=True):
            row[name] = p


def outcome(over: Over | None, adjusted_p: float | None) -> str:
    """What a difference over runs says: "better", "worse", or that none was found."""
    if over is None or adjusted_p is None or adjusted_p >= verdict.LEVEL:
        return "no difference found"
    return "better" if over.mean > 0 else "worse"


def _told(made: Mapping[str, Any], against: Sequence[Mapping[str, Any]]) -> list[str]:
    n, name = made["n"], made["name"]
    if n < 2:
        return []
    found = verdict.summary((row["name"], outcome(row["score"], row.get("adjusted_p"))) for row in against)
    sentences = [f"Over {n} runs, {name} is {found}, by {made['by']}."]
    for row in against:
        line = f"{name} − {row['name']}: {row['score'].text('+')} of score ({verdict.told_p(row['adjusted_p'])})"
        if made["kl"] is not None and row["kl"] is not None:
            line += f", at {made['kl'].mean:.1f} against {row['kl'].mean:.1f} nats of KL to {made['baseline']}"
        if row["equal"] is not None:
            line += f"; at equal KL {row['equal'].text('+')} ({verdict.told_p(row['equal_adjusted_p'])})"
        sentences.append(f"{line}: {outcome(row['score'], row['adjusted_p'])}.")
    return sentences


def _equal(given: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Scores at KL values that all runs' curves of a policy pass, over runs; None without curves."""
    made = [each for each in given if each]
    if not made or len(made) < len(given) or len({each["by"] for each in made}) > 1:
        return None
    names = [name for name in made[0]["scores"] if all(name in each["scores"] for each in made)]
    points = {name: [_arrays(each["points"][name]) for each in made] for name in names}
    spans = {name: (max(kl.min() for kl, _ in each), min(kl.max() for kl, _ in each)) for name, each in points.items()}
    values = curves.common_values(spans.values())
    scores: dict[str, list[Over | None]] = {}
    for name, each in points.items():
        rows = [[float(curves.at(kl, score, value)) for kl, score in each] for value in values]
        scores[name] = [Over.of(row) if np.isfinite(row).all() else None for row in rows]
    return {"by": made[0]["by"], "values": values, "scores": {name: row for name, row in scores.items() if any(row)}}


def _arrays(points: Iterable[Mapping[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.array([(point["kl"], point["score"]) for point in points], np.float64)
    return rows[:, 0], rows[:, 1]
