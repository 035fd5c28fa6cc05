"""Declarations of settings enter; checked values leave, with their help, their JSON schema and what enters a hash.

A section is a frozen pydantic model. A field says its type, range, default, unit and one line of help, and whether it
is *operational*: whether it says how something is computed rather than what, so that it stays out of a stage's key.
"""

import contextlib
import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

import annotated_types
import pydantic
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, core_schema

from mpo_jax.errors import InputError

LARGEST = 2**31 - 1

Whole = Annotated[int, annotated_types.Interval(ge=0, le=LARGEST)]
"""A whole number, 0 or more."""
Count = Annotated[int, annotated_types.Interval(ge=1, le=LARGEST)]
"""A whole number, 1 or more."""
Seed = Annotated[int, annotated_types.Interval(ge=0, le=2**30 - 1)]
"""The seeds of a run and of a stage are added, and the sum still is an int32."""
Amount = Annotated[float, annotated_types.Interval(ge=0, le=1e6)]
"""A number, 0 or more."""
Positive = Annotated[float, annotated_types.Interval(gt=0, le=1e6)]
"""A number above 0."""
Share = Annotated[float, annotated_types.Interval(ge=0, le=1)]
"""A number from 0 to 1."""


def _one_or_many(value: Any) -> Any:
    value = _parted(value)
    if isinstance(value, str) or (isinstance(value, tuple) and all(isinstance(each, str) for each in value)):
        return value
    raise PydanticCustomError("names", "expected a name, or a list of names")


def _parted(value: Any) -> Any:
    """A list as a tuple; "a,b" within it, as a flag gives, as two."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(part for each in value for part in (each.split(",") if isinstance(each, str) else [each]))


def _as_numbers(value: Any) -> Any:
    """The numbers that texts spell; a text that spells none is left to be refused."""
    if not isinstance(value, tuple):
        return value
    with contextlib.suppress(ValueError):
        return tuple(float(each) if isinstance(each, str) else each for each in value)
    return value


LISTS = pydantic.BeforeValidator(_parted)
"""What a config, a JSON file or a flag holds for several values."""
Names = Annotated[tuple[str, ...], LISTS]
"""Several names."""
Numbers = Annotated[
    tuple[pydantic.FiniteFloat, ...], pydantic.BeforeValidator(lambda value: _as_numbers(_parted(value)))
]
"""Several numbers, which a flag gives as texts."""
OneOrMany = Annotated[
    str | tuple[str, ...], pydantic.PlainValidator(_one_or_many, json_schema_input_type=str | tuple[str, ...])
]
"""One name, or several."""


def one_or_weighted(value: Any, signed: bool = False) -> str | dict[str, float]:
    """A name, or names with their weights, also where a flag gives them as JSON. signed: weights may be below 0."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            raise PydanticCustomError("names", "expected a name, or names with weights as JSON") from None
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) and name for name in value):
        raise PydanticCustomError("names", "expected a name, or names with their weights")
    for name, weight in value.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and 0 < (abs(weight) if signed else weight) <= 1e6):
            least = "other than" if signed else "above"
            raise PydanticCustomError(
                "weights", "expected a weight {least} 0 for {name}", {"least": least, "name": repr(name)}
            )
    return {name: float(weight) for name, weight in value.items()}


OneOrWeighted = Annotated[
    str | dict[str, float], pydantic.PlainValidator(one_or_weighted, json_schema_input_type=str | dict[str, float])
]
"""One name, or several with their weights; as text, `{"a": 0.7, "b": 0.3}`."""


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Marks a text that must be a name of a table (`Annotated[str, OneOf(TABLE)]`). The table may grow: a plugin adds
    to it. more: names that are allowed beside the table's."""

    table: Mapping[str, Any]
    more: tuple[str, ...] = ()

    def names(self) -> list[str]:
        return [*self.more, *self.table]

    def taken(self, value: Any) -> dict[str, Any]:
        """The table's entries that a value names."""
        return {value: self.table[value]} if value in self.table else {}

    def __hash__(self) -> int:
        return hash((id(self.table), self.more))

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        def known(value: str) -> str:
            if value not in self.names():
                raise PydanticCustomError("one_of", "expected {names}", {"names": _either(self.names(), value)})
            return value

        return core_schema.no_info_after_validator_function(known, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Callable[[Any], Any]) -> Any:
        return handler(schema) | {"enum": self.names()}


class Section(pydantic.BaseModel):
    """Settings that belong together. Wrong types, numbers out of range or not finite, and unknown names are errors."""

    model_config = pydantic.ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=Section)


@dataclasses.dataclass(frozen=True)
class Role:
    """A setting that names an input. product: what must be named there. optional: whether it may be empty. data:
    whether it may be the run's data itself, by `artifacts.DATA`."""

    product: str
    help: str
    optional: bool
    data: bool = False


def setting(
    default: Any, help: str, *, unit: str = "", operational: bool = False, later: bool = False, **limits: Any
) -> Any:
    """A field of a section. later: it was added when there were runs, so that its default does not enter a hash: what
    was made before it keeps its key. limits: pydantic's (gt, ge, lt, le, min_length)."""
    extra: Any = {"unit": unit, "operational": operational, "later": later}
    return pydantic.Field(default, description=help, json_schema_extra=extra, **limits)


def role(product: str, default: Any, help: str, *, optional: bool = False, data: bool = False) -> Any:
    """A field that names the stage (or several stages) whose artifact is taken in this role. data: it may be "data"."""
    extra: Any = {"role": product, "optional": optional or default in ("", ()), "data": data}
    return pydantic.Field(default, description=help, json_schema_extra=extra)


def changed(section: type[Section], name: str, default: Any, help: str = "") -> Any:
    """The field of a section, to be declared again, with its type, for another default (and another line of help)."""
    field = section.model_fields[name]
    return pydantic.Field(default, description=help or field.description, json_schema_extra=field.json_schema_extra)


def wrong(name: str, told: str) -> PydanticCustomError:
    """To be raised by a section's validator: what is wrong with the setting `name`, in view of others."""
    return PydanticCustomError("combination", "{told}", {"told": told, "name": name})


# Reading --------------------------------------------------------------------------------------------------------------


def parse(section: type[S], values: Mapping[str, Any], where: str = "", from_json: bool = False) -> S:
    """The section from plain values. from_json: as a JSON file holds them, where tuples are lists.

    where: the section's own dotted name, with which each line of the InputError begins.
    """
    try:
        if from_json:
            return section.model_validate_json(json.dumps(values))
        return section.model_validate(dict(values))
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False)
        wrong_inside = {each["loc"][:-1] for each in found}  # pydantic counts a list's wrong values as missing
        told = [
            _tell(section, where, each)
            for each in found
            if each["type"] != "too_short" or each["loc"] not in wrong_inside
        ]
        raise InputError("\n".join(dict.fromkeys(told))) from None


def replaced(section: S, values: Mapping[str, Any], where: str = "") -> S:
    """A section with other values, checked again. values: by their dotted names beneath the section."""
    whole = dict(section)
    for name, value in values.items():
        head, _, rest = name.partition(".")
        key = f"{where}.{head}" if where else head
        if not rest:
            whole[head] = value
        elif isinstance(whole.get(head), Section):
            whole[head] = replaced(whole[head], {rest: value}, key)
        elif isinstance(whole.get(head), dict):
            inside, _, deeper = rest.partition(".")
            if inside not in whole[head]:
                raise InputError(f"{key}.{inside}: no such setting{nearest(inside, whole[head])}")
            whole[head] = whole[head] | {inside: replaced(whole[head][inside], {deeper: value}, f"{key}.{inside}")}
        else:
            raise InputError(f"{key}: no such setting{nearest(head, whole)}")
    return parse(type(section), whole, where)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the one that was probably meant, or all that there are."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; expected one of {', '.join(known)}" if len(known) <= 12 else "; `mpo run --help` lists all settings"


_EXPECTED = {
    "greater_than": "expected above {gt}",
    "greater_than_equal": "expected {ge} or more",
    "less_than": "expected below {lt}",
    "less_than_equal": "expected {le} or less",
    "finite_number": "expected a finite number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "string_type": "expected a text",
    "bool_type": "expected true or false",
    "tuple_type": "expected a list",
    "too_short": "expected a list that is not empty",
    "dict_type": "expected names with values",
    "model_type": "expected names with values",
}


def _tell(section: type[Section], where: str, error: Any) -> str:
    """One line for one of pydantic's errors."""
    kind, place, context = error["type"], list(error["loc"]), error.get("ctx", {})
    if kind == "combination":
        place.append(context["name"])
    key = ".".join([*([where] if where else []), *map(str, place)])
    owner = _owner(section, place[:-1])
    if kind == "extra_forbidden":
        return f"{key}: no such setting{nearest(str(place[-1]), owner.model_fields if owner else ())}"
    if kind == "combination":
        return f"{key}: {context['told']}"
    if kind == "string_too_short":
        field = owner.model_fields.get(str(place[-1])) if owner else None
        return f"{key}: empty; expected {field.description if field and field.description else 'a text'}"
    if kind == "literal_error":
        field = owner.model_fields.get(str(place[-1])) if owner else None
        names = [*map(str, typing.get_args(field.annotation))] if field else [context["expected"]]
        told = f"expected {_either(names, error['input'])}"
    elif kind in _EXPECTED:
        told = _EXPECTED[kind].format(**context)
    else:
        told = error["msg"].replace("Input should be", "expected")
    return f"{key}: {_short(error['input'])}; {told}"


def _owner(section: type[Section], place: list[Any]) -> type[Section] | None:
    """The section beneath another that the path leads to, through dicts of sections too."""
    rest = list(place)
    while rest:
        field = section.model_fields.get(str(rest.pop(0)))
        found = field.annotation if field else None
        if typing.get_origin(found) is dict and rest:
            found = typing.get_args(found)[1]
            rest.pop(0)
        if not (inspect.isclass(found) and issubclass(found, Section)):
            return None
        section = found
    return section


def _either(names: list[str], given: Any) -> str:
    shown = [name or "an empty text" for name in names]
    near = difflib.get_close_matches(given, names, n=1) if isinstance(given, str) else []
    return f"one of {', '.join(shown)}" + (f"; did you mean {near[0]!r}?" if near else "")


def _short(value: Any) -> str:
    """A value in few characters, without the password of an address."""
    text = without_secrets(" ".join(repr(value).split()))
    return text if len(text) <= 60 else f"{text[:57]}..."


def without_secrets(text: str, mark: str = "...") -> str:
    """A text with a mark in place of what may be secret in its addresses: a password, and what stands behind ? or #."""
    text = re.sub(r"(://[^\s?#]*)[?#][^\s'\"]*", rf"\1?{mark}", text)
    return re.sub(r"//\S*@", f"//{mark}@", text)


# What a section says of itself ----------------------------------------------------------------------------------------


def roles(section: type[Section]) -> dict[str, Role]:
    """The settings that name inputs, in the order of their declaration."""
    return {
        name: Role(extra["role"], field.description or "", extra["optional"], extra["data"])
        for name, field in section.model_fields.items()
        if "role" in (extra := _extra(field))
    }


def content(section: Section) -> dict[str, Any]:
    """The values that enter a hash: without roles, whose artifacts enter it, without what is operational, and without
    a later setting at its default."""
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra, value = _extra(field), getattr(section, name)
        if "role" in extra or extra.get("operational") or (extra.get("later") and value == field.default):
            continue
        if isinstance(value, Mapping):
            values[name] = {
                key: content(each) if isinstance(each, Section) else plain(each) for key, each in value.items()
            }
        else:
            values[name] = content(value) if isinstance(value, Section) else plain(value)
    return values


def chosen(section: Section) -> Iterator[tuple[str, Any]]:
    """(name, entry) of each setting that names an entry of a table: what a plugin may have put there."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        for mark in field.metadata:
            if isinstance(mark, OneOf):
                yield from ((name, entry) for entry in mark.taken(value).values())


def differing(section: Section) -> dict[str, Any]:
    """The settings that are not at their default, by dotted key, as JSON holds them."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            found |= {f"{name}.{key}": each for key, each in differing(value).items()}
        elif value != field.get_default(call_default_factory=True):
            found[name] = plain(value)
    return found


def plain(value: Any) -> Any:
    """The value as dicts, lists, numbers and texts alone."""
    if isinstance(value, Section):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


@dataclasses.dataclass(frozen=True)
class Line:
    """What is told of one setting."""

    name: str
    default: str
    allowed: str
    help: str


def lines(section: type[Section], prefix: str = "") -> list[Line]:
    """A line for every setting of a section and of those within it."""
    told = []
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if inspect.isclass(annotation) and issubclass(annotation, Section):
            told += lines(annotation, f"{prefix}{name}.")
        elif field.description:
            extra = _extra(field)
            notes = [extra["unit"]] if extra.get("unit") else []
            named = (
                [f"name of a stage (result: {extra['role']})" + (', or "data"' if extra["data"] else "")]
                if "role" in extra
                else []
            )
            notes += named or [allowed(field)]
            notes += ["operational"] if extra.get("operational") else []
            told.append(Line(prefix + name, _shown(field.default), ", ".join(filter(None, notes)), field.description))
    return told


def allowed(field: FieldInfo) -> str:
    """The type of a field's values, and their range or choices, in words."""
    for mark in field.metadata:
        if isinstance(mark, OneOf):
            return " | ".join(name or '""' for name in mark.names())
    annotation = field.annotation
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(str(name) or '""' for name in typing.get_args(annotation))
    several = typing.get_origin(annotation) in (tuple, types.UnionType)
    names: dict[Any, str] = {bool: "true | false", int: "whole number", float: "number", str: "text"}
    weighted = any(typing.get_origin(each) is dict for each in typing.get_args(annotation))
    told = names.get(
        annotation, "name, or names with weights" if weighted else "list" if several else "names with values"
    )
    for mark in field.metadata:
        for name, words in (("gt", "above"), ("ge", "from"), ("lt", "below"), ("le", "to")):
            limit = getattr(mark, name, None)
            if limit is not None and not (name == "le" and limit >= 1e6):
                told += f" {words} {limit:g}"
    return told


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "()"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else ('""' if default == "" else str(default))


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
