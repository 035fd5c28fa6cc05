"""A file, a folder, a hub name or TFDS shards enter; text records of one split leave, with an account of what was read.

Where a path leads is said by `parts.py`, what rows are written like by `schemas.py`.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from mpo_jax import fingerprints, progress
from mpo_jax.data import suggest, template
from mpo_jax.data.account import Account
from mpo_jax.data.chat import messages
from mpo_jax.data.columns import check_kept, check_unread, kept, rename, survey
from mpo_jax.data.files import check_file, unreadable
from mpo_jax.data.forms.base import Form, Plan, Said
from mpo_jax.data.forms.prompts import ends_with_question
from mpo_jax.data.parts import Part, canonical, parts
from mpo_jax.data.reading import Reading
from mpo_jax.data.records import TextRecord, Turn
from mpo_jax.data.row import Drop, Row, is_null
from mpo_jax.data.schemas import form_of, recognise, show
from mpo_jax.errors import InputError

ALL = "all"
"""The split name that means every split of a source."""


def load(
    path: str, split: str = "train", tokenizer=None, limit: int | None = None, reading: Reading | None = None
) -> tuple[list[TextRecord], Account]:
    """The text records of one split of a source, and the account of what became of its rows and columns.

    path: a .jsonl, .jsonl.gz, .json or .parquet file; a folder of these, their splits named by the files as `datasets`
    reads them (`harmless-base/test.jsonl.gz`, `prefs_train.jsonl`, `data/train-00000-of-00004.parquet`); a folder
    written by `save_to_disk`; TFDS shards (`tfds:name`, or the folder of a prepared version); or a hub name,
    `owner/name` or `owner/name/data/folder`.
    split: a split's name, or "all". tokenizer: its chat template, where it has one, shows conversations.
    limit: stop after that many rows. reading: how columns and conversations are to be taken.

    Raises InputError (file, line, key) for anything malformed, columns that would vanish though they look as if they
    meant something, an unknown split (listing those that exist), an empty dataset, and one whose every row was dropped.
    """
    reading = reading or Reading()
    tally = _Tally(str(path), split)
    for name, rows in _files(tally, limit, reading):
        tally.add(name, rows, tokenizer, reading)
    account = tally.account()
    if not tally.records:
        firsts = "; ".join(f"{where}: {rule}" for rule, where in account.first_dropped.items())
        raise InputError(f"no record is left: {account.line()}; the first of each: {firsts}")
    return tally.records, account


def check(path: str, split: str = "train", limit: int | None = None, reading: Reading | None = None) -> None:
    """InputError for what `load` would find wrong with a split, its rows' form and its columns; what single rows say is
    not looked at."""
    reading = reading or Reading()
    tally = _Tally(str(path), split)
    for name, rows in _files(tally, limit, reading):
        tally.look(name, rows, reading)


def _files(tally: "_Tally", limit: int | None, reading: Reading) -> Iterator[tuple[str, list[tuple[str, Row]]]]:
    """The files that hold rows of the tally's split, by name: each row with its split. InputError where none does."""
    path = tally.path
    found, left_out = _with_splits(parts(path))
    named = {part.split for part in found if part.split is not None}
    tally.split = split = canonical(tally.split, named)
    if split in named:
        found = [part for part in found if part.split in (split, None)]
    if left_out:
        tally.notes[f"files left out, since their names tell no split: {', '.join(left_out)}"] = len(left_out)
    seen, count = set(named), 0
    for part in found:
        rows: list[tuple[str, Row]] = []
        for row in progress.each(part.rows(), "read", None):
            own = split_of(part, row, reading)
            seen.add(own)
            if split not in (ALL, part.split, own):
                continue
            if count == limit:
                break
            count += 1
            rows.append((own, row))
        if rows:
            yield part.name, rows
    if not count:
        if seen and split != ALL and split not in seen:
            raise InputError(f"{path}: unknown split {split!r}; it has {', '.join(sorted(seen))}, or 'all'")
        raise InputError(f"{path}: split {split!r} is empty; expected at least one record")


class _Tally:
    """What has been read so far: files are added one by one, and all must be of one form."""

    def __init__(self, path: str, split: str):
        self.path, self.split = path, split
        self.schema = self.first = self.coding = ""
        self.read = self.number = 0
        self.records: list[TextRecord] = []
        self.dropped: collections.Counter[str] = collections.Counter()
        self.first_dropped: dict[str, str] = {}
        self.columns: dict[str, str] = {}
        self.shown: collections.Counter[str] = collections.Counter()
        self.notes: collections.Counter[str] = collections.Counter()

    def add(self, name: str, rows: Sequence[tuple[str, Row]], tokenizer, reading: Reading) -> None:
        """Reads the rows of one file, each with its split."""
        renamed, form, plan = self.look(name, rows, reading)
        columns = f"{form.name}: {form.columns}"

        control = collections.defaultdict(list)
        for token in () if tokenizer is None else template.facts(tokenizer).control:
            control[token[:2]].append(token)
        raw = {id(mine): row for mine, (_, row) in zip(renamed, rows, strict=True)}

        def keep(number: int, row: Row, own: str, said: Said) -> None:
            try:
                fields, how = show(said, tokenizer, reading, row.where)
            except Drop as rule:
                self._drop(str(rule), row)
                return
            self.shown[how] += 1
            self._note_losses(fields, said, control)
            label = said.good if reading.labelled else None
            told = kept(raw[id(row)], reading.keep)
            self.records.append(TextRecord(id=number, split=own, label=label, kept=told, form=columns, **fields))

        labelled = []
        for (own, _), row in progress.each(zip(rows, renamed, strict=True), "understand", len(rows)):
            try:
                said = plan.read(row)
            except Drop as rule:
                self._drop(str(rule), row)
                self.number += 1
                continue
            for each in (said, *said.more):
                if each.good is None or reading.labelled:
                    keep(self.number, row, own, each)
                else:
                    labelled.append((self.number, row, own, each))
                self.number += 1
        for single in self._pair_up(labelled):
            keep(*single)
        self.read += len(rows)
        self.notes.update(plan.notes)
        if self.shown["chat template"] and template.facts(tokenizer).clock:
            self.notes[f"prompts dated {template.TODAY}, since the chat template asks for the date"] = self.shown[
                "chat template"
            ]

    def look(self, name: str, rows: Sequence[tuple[str, Row]], reading: Reading) -> tuple[Sequence[Row], Form, Plan]:
        """The rows of a file by our names for columns, their form, and how they are read."""
        check_kept([row for _, row in rows], reading.keep, name)
        renamed, said = rename([row for _, row in rows], reading, name)
        return renamed, *self._plan(name, renamed, said, reading)

    def _plan(self, name: str, rows: list[Row], said: dict[str, str], reading: Reading) -> tuple[Form, Plan]:
        """The form of a file's rows and how they are read; InputError where it is not the other files' form."""
        found = survey(rows)
        form, seen = recognise(found, rows)
        if self.schema and self.schema != form.name:
            raise InputError(
                f"{self.path}: {self.first} holds {self.schema} rows, {name} holds {form.name} rows; "
                "name one of the files as the data path"
            )
        self.schema, self.first = form.name, self.first or name
        plan = form.plan(seen, rows, reading)
        if self.coding not in ("", plan.coding):
            raise InputError(
                f"{self.path}: data.columns.choice: its values are of another kind in {name} than in {self.first}; "
                "expected one coding in all files"
            )
        self.coding = plan.coding
        uses = plan.uses | {column: "split" for column in found.kinds if column == "split"}
        scored = "kept for scorers"
        for column in reading.keep:
            mine = next((role for role, theirs in reading.columns.items() if theirs == column), column)
            if mine in found.kinds:
                uses[mine] = f"{uses[mine]}; {scored}" if mine in uses else scored
        try:
            unread = check_unread(rows, found, uses, plan.known, name, not form.replies)
        except InputError as error:
            raise InputError(f"{error}{suggest.hint(found)}") from None
        given = {role: f"{column} (as {role})" for role, column in reading.columns.items() if role != column}
        given |= {role: f"{role} (constant)" for role in reading.constants}
        for column in found.kinds:
            self.columns.setdefault(given.get(column, column), uses.get(column) or unread[column])
        for column, what in said.items():
            self.columns.setdefault(column, what)
        return form, plan

    def _note_losses(self, fields: dict[str, Any], said: Said, control: Mapping[str, Sequence[str]]) -> None:
        """Notes what a person would not expect: control tokens that are read as plain text, thoughts that nobody sees.
        control: the tokenizer's control tokens, by how they begin: they may be hundreds, and few texts hold one."""
        texts = [text for text in (fields["prompt"], fields["chosen"], fields["rejected"]) if text]
        begun = [] if fields.get("templated") else [each for each in control if any(each in text for text in texts)]
        for token in (token for each in begun for token in control[each]):
            if any(token in text for text in texts):
                self.notes[f"records spell {token}, which is read as text and not as a token; see docs/data.md"] += 1
        for side, text in ((said.chosen, fields["chosen"]), (said.rejected, fields["rejected"])):
            rest = json.loads(side.rest) if isinstance(side, Turn) and side.rest else {}
            for name in ("reasoning_content", "thinking"):
                if rest.get(name) and str(rest[name]).strip() not in (text or ""):
                    self.notes[f"replies lose their {name!r}, which the template does not write"] += 1

    def _drop(self, rule: str, row: Row) -> None:
        self.dropped[rule] += 1
        self.first_dropped.setdefault(rule, row.where)

    def _pair_up(self, told: list[tuple[int, Row, str, Said]]) -> list[tuple[int, Row, str, Said]]:
        """Single replies with labels: good ones are kept, each with a bad one of the same prompt where there is one."""
        bad: dict[Any, list[Said]] = collections.defaultdict(list)
        for *_, said in told:
            if not said.good:
                bad[said.prompt].append(said)
        result = []
        for number, row, own, said in told:
            if not said.good:
                continue
            others = bad[said.prompt]
            if others:
                other = others.pop(0)
                plain = (*said.plain, *other.plain[1:]) if said.plain else ()
                said = dataclasses.replace(said, rejected=other.chosen, plain=plain)
                self.notes["replies labelled bad, each the rejected reply of a pair"] += 1
            else:
                self.notes["good replies without a bad one to the same prompt: only demonstrations"] += 1
            result.append((number, row, own, said))
        left = sum(map(len, bad.values()))
        if left:
            self.dropped["labelled bad, and no good reply to pair it with"] += left
        return result

    def account(self) -> Account:
        return Account(
            self.path,
            self.split,
            self.schema,
            self.read,
            len(self.records),
            dict(self.dropped),
            self.columns,
            {how: count for how, count in self.shown.items() if count},
            dict(self.notes),
            self.first_dropped,
        )


def conversation(turns: Sequence[dict[str, Any]], tokenizer, reading: Reading | None = None, id: int = 0) -> TextRecord:
    """A chat of one's own as a prompt, shown as a data set's would be: for sampling. turns: messages with role and
    content, the last the user's."""
    reading = reading or Reading()
    try:
        said = Said(ends_with_question(messages(Row({"messages": list(turns)}, "the conversation"), "messages")))
        fields, _ = show(said, tokenizer, reading, "the conversation")
    except Drop as rule:
        raise InputError(f"the conversation: {rule}") from None
    return TextRecord(id=id, split="sample", **fields)


def fingerprint(path: str) -> str:
    """A hash of a source's content: of its files, or of its rows where they come from the hub or from TFDS."""
    place = epath.Path(path)
    if not path.startswith("tfds:"):
        try:
            if place.exists():
                _check_beneath(place)
                return fingerprints.of_files(place)
        except (OSError, ValueError) as error:
            raise error if isinstance(error, InputError) else unreadable(path, error) from error
    state = hashlib.blake2b(digest_size=16)
    for part in parts(path):
        for row in part.rows():
            state.update(repr((part.split, sorted(row.values.items(), key=lambda item: item[0]))).encode() + b"\n")
    return state.hexdigest()


def _check_beneath(place: epath.Path) -> None:
    """InputError for a pipe or device at or beneath a place, which reading would never end with."""
    check_file(place, str(place))
    for child in place.iterdir() if place.is_dir() else ():
        _check_beneath(child)


def split_of(part: Part, row: Row, reading: Reading | None = None) -> str:
    """The split a row belongs to: its own word, else its file's, else train."""
    name = reading.columns.get("split", "split") if reading else "split"
    own = row.values.get(name)
    if isinstance(own, int | float) and not is_null(own):  # the number of a fold, which a table may hold as 1.0
        own = str(int(own) if float(own).is_integer() else own)
    return own if isinstance(own, str) and own else part.split or "train"


def expect_schema(row: Row, name: str) -> None:
    """InputError unless a row is of the named form."""
    found = form_of(row)
    if found != name:
        raise InputError(f"{row.where}: a row of kind {found}, expected {name}")


def _with_splits(found: list[Part]) -> tuple[list[Part], list[str]]:
    """Where some files of a folder tell their split, those that tell none are left out, as `datasets` does."""
    if not any(part.split for part in found):
        return found, []
    return [part for part in found if part.split], [part.name for part in found if not part.split]
