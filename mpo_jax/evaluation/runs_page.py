"""What several runs say together enters; one page, the text of a terminal, or a table in Markdown leaves."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mpo_jax import artifacts
from mpo_jax.evaluation import figures, over_runs, pages, verdict
from mpo_jax.evaluation.over_runs import Evaluated, Over
from mpo_jax.evaluation.sections import COLUMNS
from mpo_jax.store import is_remote

_WIDTH = 80  # of a terminal


def write(target: epath.Path, runs: Sequence[Evaluated]) -> None:
    """Writes the page, whole or not at all; its links lead to the runs' own reports from where it lies."""
    parts = over_runs.groups(runs)
    shown = {
        "title": f"{len(runs)} runs" if len(runs) > 1 else runs[0].place,
        "groups": [_group(each, letter, target) for each, letter in zip(parts, _letters(parts), strict=True)],
        "differing": over_runs.differing(parts),
        "columns": COLUMNS,
    }
    artifacts.write_text(target, pages.environment(escaped=True).get_template("runs.html").render(shown))


def _letters(parts: Sequence[Any]) -> list[str]:
    """A name for each group; "" for the only one."""
    if len(parts) == 1:
        return [""]
    return [chr(ord("A") + number) if number < 26 else str(number + 1) for number in range(len(parts))]


def _group(group: Sequence[Evaluated], letter: str, target: epath.Path) -> dict[str, Any]:
    made = over_runs.section(group)
    evaluations = []
    for each in made["evaluations"]:
        points: dict[str, list[dict[str, Any]]] = {}
        for run in each["points"]:
            for name, means in run.items():
                if (key := "gold" if "gold" in means else "reward") in means:
                    points.setdefault(name, []).append({"kl": means["kl"], "score": means[key], "final": False})
        for name, rows in points.items():
            known = [each["policies"][name][key] for key in ("kl", "gold" if "gold" in each["keys"] else "reward")]
            mean = {"kl": known[0].mean, "score": known[1].mean, "final": True}
            points[name] = [*rows, mean] if len(rows) > 1 else [mean]
        label = "gold score" if "gold" in each["keys"] else "reward model's score"
        drawn = figures.plane(points, f"KL to {each['baseline']}, nats", label, joined=False) if points else ""
        evaluations.append(each | {"drawn": drawn, "outcome": over_runs.outcome, "told_p": verdict.told_p})
    links = [{"run": run, "link": _link(run.place, target)} for run in group]
    return made | {"letter": letter, "links": links, "evaluations": evaluations}


def _link(place: str, target: epath.Path) -> str:
    """From the page to a run's own report."""
    page = epath.Path(place) / artifacts.REPORT_PAGE
    if is_remote(place) or is_remote(target):
        return os.fspath(page)
    return os.path.relpath(page, os.path.abspath(target.parent))


def text(runs: Sequence[Evaluated]) -> str:
    """Tables and verdicts in words, 80 columns wide where names allow."""
    parts = over_runs.groups(runs)
    lines = []
    for group, letter in zip(parts, _letters(parts), strict=True):
        made = over_runs.section(group)
        heading = f"{len(group)} runs" if len(group) > 1 else group[0].place
        lines.append(f"{f'{letter}: ' if letter else ''}{heading}, seeds {', '.join(made['seeds'])}")
        for each in made["evaluations"]:
            rows = _rows(each)
            widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
            lines.append(f"{each['name']}: means over runs ± 95 % t intervals" if each["n"] > 1 else each["name"])
            lines += [
                "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
            ]
            lines += _wrapped((each["verdict"] or {"told": []})["told"])
        lines += _wrapped(made["notes"])
    if differing := over_runs.differing(parts):
        lines.append(f"settings that differ, {' | '.join(_letters(parts))}:")
        lines += [f"  {row['key']}: {' | '.join(map(str, row['values']))}" for row in differing]
    return "\n".join(lines)


def _wrapped(sentences: Sequence[str]) -> list[str]:
    return [part for line in sentences for part in textwrap.wrap(line, _WIDTH, subsequent_indent="  ")]


def markdown(runs: Sequence[Evaluated]) -> str:
    """The tables alone, with what their numbers are, for a README or a paper."""
    parts = over_runs.groups(runs)
    lines: list[str] = []
    for group, letter in zip(parts, _letters(parts), strict=True):
        made = over_runs.section(group)
        for each in made["evaluations"]:
            lines += [f"**{letter}**", ""] if letter else []
            head, *rows = _rows(each)
            lines += [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
            lines += [f"| {' | '.join(row)} |" for row in rows]
            over = f"Means over {each['n']} runs (seeds {', '.join(made['seeds'])}) ± 95 % t intervals; "
            prompts = " to ".join(f"{count:,}" for count in dict.fromkeys((each["prompts"][0], each["prompts"][-1])))
            lines += ["", f"{over if each['n'] > 1 else 'One run; '}{prompts} held-out prompts.", ""]
            lines += [f"- {sentence}" for sentence in (each["verdict"] or {"told": []})["told"]]
    return "\n".join(lines).rstrip()


def _rows(each: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells, its head first."""
    keys = each["main"]
    named = {"kl": f"KL to {each['baseline']}", "log_ratio": f"log-ratio to {each['baseline']}"}
    heads = ["policy", *(named.get(key, key) for key in keys)]
    wins: Mapping[str, Over] = each["wins"]
    rows = [heads + ([f"wins by {each['by'].removeprefix('the ').split()[0]}"] if wins else [])]
    for name, means in each["policies"].items():
        cells = [means[key].text() if key in means else "" for key in keys]
        rows.append([name, *cells, *([wins[name].text() if name in wins else ""] if wins else [])])
    return rows
