"""Counts of all that was read enter; an account leaves: as text for a log, as JSON for a manifest and a report."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of every row and column of a source.

    source, split: what was read. schema: the kind of its rows. read, kept: rows of the split, and records they gave.
    dropped: rule → rows. columns: column → what it was used as, or why not. shown: how prompts are written ("chat
    template", "HH's form", "text as it is") → records. notes: whatever else happened → how often. share: the share that
    was taken, and how many records it has; "" and 0 for all. overlap: records that left a training share since their
    prompt is held out too. encoded: counts of `encode.Encoded`.
    """

    source: str
    split: str
    schema: str
    read: int
    kept: int
    dropped: Mapping[str, int]
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shown: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    first_dropped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    share: str = ""
    share_records: int = 0
    overlap: int = 0
    encoded: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def line(self) -> str:
        """Rows in one line."""
        drops = ", ".join(f"{count} {rule}" for rule, count in sorted(self.dropped.items())) or "none"
        return (
            f"{self.source} [{self.split}] ({self.schema}): {self.read} rows read, {self.kept} kept; dropped: {drops}"
        )

    def text(self) -> str:
        """All of it, a line for each part that has something to say."""
        lines = [self.line()]
        used = [f"{name}: {what}" for name, what in self.columns.items()]
        lines += [f"  columns: {'; '.join(used)}"] if used else []
        lines += [f"  prompts written as: {_counts(self.shown)}"] if self.shown else []
        lines += [f"  {count} {what}" for what, count in self.notes.items()]
        if self.share:
            left = f"; {self.overlap} left out, since their prompts are held out too" if self.overlap else ""
            lines.append(f"  share {self.share}: {self.share_records} records{left}")
        lines += [f"  rows: {_rows(self.encoded)}"] if self.encoded else []
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`; `Account(**value)` is the account again."""
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        }

    def of_share(self, share: str, records: int, overlap: int = 0) -> "Account":
        """With what was taken of it."""
        return dataclasses.replace(self, share=share, share_records=records, overlap=overlap)

    def with_rows(self, counts: Mapping[str, int]) -> "Account":
        """With the counts of the rows that the records became (`encode.Encoded.counts`)."""
        return dataclasses.replace(self, encoded=dict(counts))


_WORDS = {
    "replies truncated": "replies cut at their end, without the token that ends a reply",
    "prompts truncated": "prompts cut at their beginning",
    "prompts cut at a turn": "of these at a turn",
    "prompts cut within a turn": "of these within their last turn",
}


def _rows(counts: Mapping[str, int]) -> str:
    rest = [
        f"{count} {_WORDS.get(name, name)}" for name, count in counts.items() if count and name not in ("rows", "kept")
    ]
    return ", ".join([f"{counts.get('rows', 0)} encoded", f"{counts.get('kept', 0)} kept", *rest])


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def epochs(steps: int, batch_size: int, rows: int) -> str:
    """How often a number of steps sees the data: "60 steps of 32 see 1,920 of 5,000 rows: 0.38 epochs"."""
    seen = steps * batch_size
    part = f"{min(seen, rows):,} of {rows:,} rows" if seen < rows else f"{rows:,} rows"
    return f"{steps:,} steps of {batch_size:,} see {part}: {seen / max(rows, 1):.2f} epochs"
