"""An evaluation's report enters; its table leaves, cell by cell for a page, whole as text for a terminal."""

from collections.abc import Mapping
from typing import Any

COLUMNS = ("gold", "reward", "kl", "log_ratio", "tokens", "finished", "repetition", "distinct")
"""In the order of the table; `kl` also where a policy has a bound of it alone."""


def columns(report: Mapping[str, Any]) -> list[str]:
    """Those in which some policy has a number."""
    return [key for key in COLUMNS if any(cell(means, key) for means in report["policies"].values())]


def cell(means: Mapping[str, float], key: str) -> str:
    """A policy's number in a column, "" where it has none."""
    if key == "kl" and "kl_bound" in means:
        return f"≤ {means['kl_bound']:.3f}"
    if key not in means:
        return ""
    return f"{means[key]:.3f}" + (f" ± {means['kl_error']:.3f}" if key == "kl" else "")


def notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader has to know of the KL's column, in sentences."""
    own = report.get("truncation", "")  # earlier versions leave it unsaid
    found = [("no KL", own)] if own else []
    found += [(f"no KL of @{name}", words) for name, words in report.get("decodings", {}).items() if words]
    told = [
        f"{what}: replies were drawn with {words}; the log-ratio's mean over them is none"
        for what, words in found
        if any("log_ratio" in means for means in report["policies"].values())
    ]
    if any("kl_bound" in means for means in report["policies"].values()):
        told.append("KL of the best of n: at most log n - (n - 1) / n nats from the policy that drew them")
    return told


def wins(report: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """(policy, judge) -> its comparison with the baseline, or the baseline by the same decoding."""
    return {(c["left"], c["by"]): c for c in report["comparisons"]} if report["baseline"] else {}


def text(report: Mapping[str, Any]) -> str:
    """The policies' means in columns, and the comparisons' sentences."""
    keys, compared = columns(report), wins(report)
    kinds = list(dict.fromkeys(by for _, by in compared))
    named = {"kl": f"KL to {report['baseline']}", "log_ratio": f"log-ratio to {report['baseline']}"}
    heads = [named.get(key, key) for key in keys]
    heads += [f"wins by {by.removeprefix('the ')}" for by in kinds]
    rows = [["policy", *heads]]
    for name, means in report["policies"].items():
        cells = [cell(means, key) for key in keys]
        for by in kinds:
            c = compared.get((name, by))
            cells.append("" if c is None else f"{c['win_rate']:.3f} [{c['low']:.3f}, {c['high']:.3f}]")
        rows.append([name, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join([*lines, *notes(report), *(c["sentence"] for c in report["comparisons"])])
