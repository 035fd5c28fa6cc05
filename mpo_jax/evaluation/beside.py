"""What a page shows enters; the files beside it leave: every figure as SVG, its numbers as CSV, and the tables as
Markdown for a model card or a paper."""

import csv
import dataclasses
import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from mpo_jax import artifacts
from mpo_jax.evaluation import figures, pages
from mpo_jax.evaluation.figures import Drawn

_LONGEST = 80  # of a file's name
_FOLDERS = re.compile(r"(?<![\w./])/(?:[^\s/:\[\]]+/)+")
"""What stands before the last part of an absolute path, in any text."""


def write(workdir: epath.Path, page: Mapping[str, Any]) -> None:
    """Writes WORKDIR/figures and WORKDIR/report.md. page: what `report.page` gives. Figures that the page does not show
    any more are deleted."""
    folder = workdir / artifacts.FIGURES
    names = named(page)
    kept = {f"{name}{end}" for name in names for end in (".svg", ".csv")}
    for name, drawn in names.items():
        artifacts.write_text(folder / f"{name}.svg", figures.alone(drawn))
        artifacts.write_text(folder / f"{name}.csv", table(drawn))
    for path in folder.iterdir() if folder.exists() else ():
        if path.suffix in (".svg", ".csv") and path.name not in kept:
            path.unlink()
    artifacts.write_text(workdir / artifacts.REPORT_TEXT, markdown(page, list(names)))


def named(page: Mapping[str, Any]) -> dict[str, Drawn]:
    """The figures of a page, each under a name for its files: section, stage and what it shows."""
    found: dict[str, Drawn] = {}
    for places, drawn in _figures(page, ()):
        name = re.sub(r"[^a-z0-9_.]+", "-", "-".join([*places, drawn.caption]).lower()).strip("-.")[:_LONGEST]
        again = 2
        while (unique := name if again == 2 else f"{name}-{again - 1}") in found:
            again += 1
        found[unique] = drawn
    return found


def _figures(value: Any, places: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Drawn]]:
    """Every figure in a nest, with the section and the stage's name on the way to it."""
    if isinstance(value, Drawn):
        yield places[:2], value
    elif isinstance(value, Mapping):
        own = (*places, value["name"]) if isinstance(value.get("name"), str) else places
        for key, each in value.items():
            yield from _figures(each, own or (str(key),))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _figures(each, places)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _figures(vars(value), places)


def table(drawn: Drawn) -> str:
    """A figure's numbers as CSV, with a line of names."""
    held = io.StringIO()
    lines = csv.writer(held, lineterminator="\n")
    lines.writerow(drawn.columns)
    lines.writerows(drawn.rows)
    return held.getvalue()


def markdown(page: Mapping[str, Any], names: list[str]) -> str:
    """The page's tables and sentences as Markdown. names: of the figures beside it."""
    environment = pages.environment(escaped=False)
    environment.filters["cell"] = cell
    text = environment.get_template("report.md").render(page, figures=names)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def cell(value: Any) -> str:
    """A value as it can stand in a table's cell: on one line, its bars escaped, a dash for nothing, no folders."""
    text = "" if value is None else " ".join(public(value).split())
    return text.replace("|", "\\|") or "–"


def public(value: Any) -> str:
    """A value as text without the folders of the machine that it was made on: it is to be published."""
    return _FOLDERS.sub("", str(value))
