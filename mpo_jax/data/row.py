"""A raw row of a file or table, with checked access: what is asked of it is there and of its kind, or it says where."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_jax.errors import InputError

_NAMED = r"""['"](role|content|from|value)['"]\s*:"""
_SPELT, _KEYS = re.compile(r"\s*\[?\s*\{\s*" + _NAMED), re.compile(r"[{,]\s*" + _NAMED)
"""How messages begin that a table holds as text, in JSON or as Python prints them, and the names of their keys."""

_MESSAGES = ({"role", "content"}, {"from", "value"})


class Drop(Exception):
    """Raised for a row that a rule leaves out; the message is the rule's name in the account."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A raw row: its values, and where it stands for error messages (`train.jsonl, line 7`)."""

    values: Mapping[str, Any]
    where: str

    def get(self, key: str, kind=str, optional: bool = False):
        """The value of a dotted key, checked for its kind; bytes (TFDS) become text. None only if `optional`."""
        value: Any = self.values
        for part in key.split("."):
            if value is None and optional:
                return None
            if not isinstance(value, Mapping):
                raise InputError(
                    f"{self.where}: key {key!r}: expected an object around {part!r}, found {kind_of(value)}"
                )
            if part not in value:
                if optional:
                    return None
                raise InputError(f"{self.where}: missing column {key!r}; columns here: {', '.join(value)}")
            value = value[part]
        if isinstance(value, bytes):
            value = value.decode("utf-8")
        if value is None and optional:
            return None
        if kind is float:
            good = isinstance(value, int | float) and not isinstance(value, bool)
        elif kind is list:
            good = isinstance(value, Sequence) and not isinstance(value, str)
        else:
            good = isinstance(value, kind) and not isinstance(value, bool)
        if not good:
            name = NAMES.get(kind, kind.__name__)
            raise InputError(f"{self.where}: key {key!r} is {kind_of(value)}, expected {name}")
        return value

    def text(self, key: str) -> str:
        """A text that this kind of row needs. Drop where it is missing or null; InputError for another kind."""
        if is_null(self.values.get(key)):
            raise Drop(f"no {key!r} (missing or null, expected text)")
        text = self.get(key)
        if _SPELT.match(text) and any(keys <= set(_KEYS.findall(text)) for keys in _MESSAGES):
            raise InputError(
                f"{self.where}: key {key!r} is text that spells out messages ({text.strip()[:30]}...); expected the "
                "list itself (pandas: to_json(orient='records', lines=True) or to_parquet in the place of to_csv)"
            )
        return text

    def number(self, key: str) -> float | None:
        """A number, which may be written as text; None where it is missing, null or NaN. InputError otherwise."""
        value = self.values.get(key)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise InputError(f"{self.where}: key {key!r} is the text {value!r}, expected a number") from None
        else:
            value = self.get(key, float, optional=True)
        try:
            number = None if value is None or math.isnan(value) else float(value)
        except OverflowError:  # a whole number of hundreds of digits
            number = math.inf
        if number is not None and math.isinf(number):
            raise InputError(f"{self.where}: key {key!r} is infinite, expected a finite number")
        return number


NAMES = {
    str: "text",
    list: "a list",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    bool: "true or false (or 1 or 0)",
}


def kind_of(value) -> str:
    """The kind of a JSON value in words; a number is shown."""
    if value is None:
        return "null"
    if isinstance(value, str | bytes):
        return "text"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, Mapping) else type(value).__name__


def is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def is_null(value) -> bool:
    """Whether a value is missing: null, or NaN, as pandas writes it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value) -> bool:
    """Whether a column says nothing in a row: null, an empty text, an empty list or object."""
    return is_null(value) or (isinstance(value, str | bytes | list | tuple | dict) and not value)
