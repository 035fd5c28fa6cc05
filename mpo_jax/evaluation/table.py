"""An evaluation's report enters; its table leaves, cell by cell for a page, whole as text for a terminal."""

import textwrap
from collections.abc import Mapping
from typing import Any

from mpo_jax.evaluation import verdict

COLUMNS = ("gold", "reward", "kl", "log_ratio", "tokens", "finished", "repetition", "distinct")
"""In the order of the table; `kl` also where a policy has a bound of it alone."""
MAIN = COLUMNS[:5]
"""Those that a terminal shows, and a page at once."""
_WIDTH = 80  # of a terminal


def columns(report: Mapping[str, Any]) -> list[str]:
    """Those in which some policy has a number."""
    return [key for key in COLUMNS if any(cell(report, name, key) for name in report["policies"])]


def cell(report: Mapping[str, Any], name: str, key: str) -> str:
    """A policy's number in a column, with its standard error and the digits that it allows; "" where it has none."""
    means = report["policies"][name]
    if key == "kl" and "kl_bound" in means:
        return f"≤ {means['kl_bound']:.2f}"
    if key not in means:
        return ""
    errors = report.get("errors", {}).get(name, {})  # what reports of earlier versions leave unsaid
    error = means.get("kl_error", 0.0) if key == "kl" else errors.get(key, 0.0)
    return verdict.with_error(means[key], error) if error else f"{means[key]:.3f}"


def notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader has to know of the KL's column, in sentences."""
    own = report.get("truncation", "")  # earlier versions leave it unsaid
    found = [("no KL", own)] if own else []
    found += [(f"no KL of @{name}", words) for name, words in report.get("decodings", {}).items() if words]
    told = [
        f"{what}: replies were sampled with {words}, so the mean log-ratio over them is no KL"
        for what, words in found
        if any("log_ratio" in means for means in report["policies"].values())
    ]
    if any("kl_bound" in means for means in report["policies"].values()):
        told.append(
            "KL of the best of n: an upper bound, log n - (n - 1) / n nats from the policy that sampled the replies"
        )
    return told


def wins(report: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """(policy, judge) -> its comparison with the baseline, or the baseline by the same decoding."""
    return {(c["left"], c["by"]): c for c in report["comparisons"]} if report["baseline"] else {}


def text(report: Mapping[str, Any]) -> str:
    """The policies' main figures in columns, and the verdict in words, 80 columns wide where names allow."""
    keys, compared = [key for key in columns(report) if key in MAIN], wins(report)
    kinds = list(dict.fromkeys(by for _, by in compared))[:1]
    named = {"kl": f"KL to {report['baseline']}", "log_ratio": f"log-ratio to {report['baseline']}"}
    heads = [named.get(key, key) for key in keys] + [f"wins by {by.removeprefix('the ').split()[0]}" for by in kinds]
    rows = [["policy", *heads]]
    for name, means in report["policies"].items():
        cells = [f"{means[key]:.0f}" if key == "tokens" else cell(report, name, key) for key in keys]
        for by in kinds:
            c = compared.get((name, by))
            cells.append("" if c is None else f"{c['win_rate']:.2f} [{c['low']:.2f}, {c['high']:.2f}]")
        rows.append([name, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    words = [*notes(report), *(report.get("verdict") or {"sentences": []})["sentences"]]
    return "\n".join(
        [*lines, *(part for line in words for part in textwrap.wrap(line, _WIDTH, subsequent_indent="  "))]
    )
