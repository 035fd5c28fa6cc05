"""Rows of a check enter, one after the other; they leave as JSON, with what failed and why.

A row is a dict: name; value (a number, or words); unit; bound (what the value is held to, as words); ok (True, False,
or None for a figure that is told and not judged); note.
"""

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Part:
    """The rows of one part of the check, kept on disk after each, so that a part that dies leaves what it knew."""

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path
        self.rows: list[Row] = []
        self._began = time.perf_counter()
        self._keep(done=False)

    def told(self, name: str, value: Any, unit: str = "", note: str = "") -> None:
        """A figure that nothing is asked of."""
        self._add(name, value, unit, "", None, note)

    def at_most(self, name: str, value: float, bound: float, unit: str = "", note: str = "") -> None:
        """NaN fails."""
        self._add(name, value, unit, f"at most {bound:g}", bool(value <= bound), note)

    def at_least(self, name: str, value: float, bound: float, unit: str = "", note: str = "") -> None:
        self._add(name, value, unit, f"at least {bound:g}", bool(value >= bound), note)

    def true(self, name: str, found: bool, value: Any, bound: str, note: str = "") -> None:
        self._add(name, value, "", bound, bool(found), note)

    @contextlib.contextmanager
    def each(self, name: str) -> Iterator[None]:
        """What breaks inside is a failed row, and the part goes on."""
        try:
            yield
        except (Exception, SystemExit) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            words = " ".join(str(error).split())
            place = f"{os.path.basename(last.filename)}:{last.lineno}"
            self._add(name, type(error).__name__, "", "no error", False, f"{words[:400]} ({place})")

    def finish(self) -> int:
        """The exit status: 1 where a row failed or there is none."""
        self._keep(done=True)
        return 0 if self.rows and all(row["ok"] is not False for row in self.rows) else 1

    def _add(self, name: str, value: Any, unit: str, bound: str, ok: bool | None, note: str) -> None:
        row = {"name": name, "value": value, "unit": unit, "bound": bound, "ok": ok, "note": note}
        self.rows.append(row)
        self._keep(done=False)
        print(f"{self.name}: {line(row)}", flush=True)

    def _keep(self, done: bool) -> None:
        seconds = time.perf_counter() - self._began
        kept = {"part": self.name, "done": done, "seconds": seconds, "rows": self.rows}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(kept, indent=1))
        temporary.replace(self.path)


def line(row: Row) -> str:
    verdict = {True: "ok", False: "FAILED", None: "-"}[row["ok"]]
    bound = f" ({row['bound']})" if row["bound"] else ""
    note = f": {row['note']}" if row["note"] else ""
    return f"{verdict} {row['name']} = {short(row['value'])}{' ' + row['unit'] if row['unit'] else ''}{bound}{note}"


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
