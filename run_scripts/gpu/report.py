"""The parts of a check and the machine they ran on enter; gpu.md leaves, as a reader wants it."""

from collections.abc import Mapping
from typing import Any

from run_scripts.gpu.result import short

_VERDICTS = {True: "ok", False: "**failed**", None: ""}


def markdown(machine: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> str:
    """machine: name -> words. parts: name -> what `result.Part` keeps."""
    lines = ["# One GPU, checked", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += [f"- verdict: {verdict(parts)}", ""]
    for name, part in parts.items():
        lines += [f"## {name}", ""]
        if not part["done"]:
            lines += ["This part did not come to its end; what it knew until then:", ""]
        lines += [f"{part['seconds']:.0f} seconds.", "", "| what | found | asked | verdict | note |"]
        lines += ["| --- | ---: | --- | --- | --- |"]
        lines += [_row(row) for row in part["rows"]]
        lines.append("")
    return "\n".join(lines)


def failures(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of failed rows, and of parts that did not end."""
    found = [f"{name}: {row['name']}" for name, part in parts.items() for row in part["rows"] if row["ok"] is False]
    return found + [f"{name}: did not come to its end" for name, part in parts.items() if not part["done"]]


def verdict(parts: Mapping[str, Mapping[str, Any]]) -> str:
    failed = failures(parts)
    if failed:
        return f"{len(failed)} failed ({'; '.join(failed)})"
    count = sum(row["ok"] is True for part in parts.values() for row in part["rows"])
    return f"all {count} checks hold"


def _row(row: Mapping[str, Any]) -> str:
    value = short(row["value"]) + (f" {row['unit']}" if row["unit"] else "")
    cells = [row["name"], value, row["bound"], _VERDICTS[row["ok"]], row["note"]]
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
