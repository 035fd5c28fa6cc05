"""What a setting says of who scores enters; the scorers that it names leave, checked, with what each is known by.

A scorer is a name, or several with their weights: `{"reward": 1.0, "python:my.length": -0.01}`, whose scores are added.
"""

import dataclasses
import difflib
import hashlib
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError, core_schema

from mpo_jax import fingerprints, posting
from mpo_jax.errors import InputError
from mpo_jax.models import hf
from mpo_jax.scorers import sentiment
from mpo_jax.settings import OneOf, Section, one_or_weighted

OWN = "reward"
"""The run's own reward model, of the stage's role `reward`."""
HF, PYTHON = "hf:", "python:"
FORMS = (f"{HF}FOLDER_OR_ID", f"{PYTHON}MODULE:FUNCTION", "http://ADDRESS", "https://ADDRESS")
"""The names of scorers that no table holds."""
_PLACE = re.compile(r"python:(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*)[:.](?P<function>[^\W\d]\w*)")

Asked = Callable[[Sequence[str], Sequence[str]], Sequence[float | None]]
"""`(prompts, replies) -> scores`, one for each reply: higher for the better, None where there is none."""
SCORERS: dict[str, Asked] = {"vader": sentiment.vader}
"""Functions of this process, by name; a plugin may add its own (docs/architecture.md)."""

Scorer = str | dict[str, float]
"""A setting's value: "" where none scores."""


@dataclasses.dataclass(frozen=True)
class Scorers(OneOf):
    """Marks a setting that says who scores (`Annotated[Scorer, Scorers(more=("reward",))]`)."""

    table: Mapping[str, Any] = dataclasses.field(default_factory=lambda: SCORERS)

    __hash__ = OneOf.__hash__

    def names(self) -> list[str]:
        return [*super().names(), *FORMS]

    def taken(self, value: Any) -> dict[str, Any]:
        return {name: self.table[name] for name in terms(value) if name in self.table}

    def known(self, value: Any) -> Any:
        """The setting's value: a name as it is, a weighted sum as a dict, also where it is given as JSON."""
        value = one_or_weighted(value, signed=True)
        for name in [value] if isinstance(value, str) else value:
            self._check(name)
        return value

    def _check(self, name: str) -> None:
        if name in self.table or name in self.more or (told := _form(name)) == "":
            return
        raise PydanticCustomError("scorers", "{told}", {"told": told or f"expected {_likely(name, self.names())}"})

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return core_schema.no_info_plain_validator_function(self.known)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Callable[[Any], Any]) -> Any:
        weights = {"type": "object", "additionalProperties": {"type": "number"}}
        return {"anyOf": [{"type": "string", "examples": self.names()}, weights]}


def _form(name: str) -> str | None:
    """ "" for a name that has one of `FORMS`, what is wrong with one that nearly has, None for any other."""
    if name.startswith(HF):
        return "" if name != HF else "expected a folder or a hub id behind hf:"
    if name.startswith(PYTHON):
        return "" if _PLACE.fullmatch(name) else f"expected {FORMS[1]}, as in python:my_package.my_module:my_function"
    if not name.startswith(("http://", "https://")):
        return None
    return posting.wrong_address(name)


def _likely(name: str, names: list[str]) -> str:
    """All the names there are, and the one that was probably meant: of a form, its beginning is compared."""
    heads = {each.partition(":")[0]: each for each in reversed(names)}
    near = difflib.get_close_matches(name.partition(":")[0], heads, n=1)
    shown = ", ".join(each or "an empty text" for each in names)
    return f"one of {shown}" + (f"; did you mean {heads[near[0]]!r}?" if near else "")


def terms(value: Any) -> dict[str, float]:
    """Each scorer that a setting names, with its weight; {} where none scores."""
    if isinstance(value, Mapping):
        return dict(value)
    return {value: 1.0} if value else {}


def own_alone(value: Any) -> bool:
    """Whether the run's own reward model scores, and nobody else."""
    return terms(value) == {OWN: 1.0}


def settings_of(section: Section) -> dict[str, Scorer]:
    """The settings of a section that say who scores, with their values."""
    marked = {
        name
        for name, field in type(section).model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Scorers)
    }
    return {name: getattr(section, name) for name in sorted(marked)}


def identities(section: Section) -> dict[str, Any]:
    """The settings that say who scores by what enters a stage's key: of a model on disk its files' hash, and of a
    function its module's source text, instead of their places. InputError, by the setting, where one is not there."""
    found: dict[str, Any] = {}
    for key, value in settings_of(section).items():
        try:
            named = {identity(name): weight for name, weight in terms(value).items()}
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
        found[key] = named if isinstance(value, Mapping) else next(iter(named), "")
    return found


def identity(name: str) -> str:
    """What a scorer is known by, in keys of stages and of kept scores. A server is known by its address alone."""
    if name.startswith(HF):
        return f"{HF}{fingerprints.of_model(hf.resolve(name.removeprefix(HF)))}"
    if name.startswith(PYTHON):
        return f"{name} {hashlib.blake2b(source(name).read_bytes(), digest_size=16).hexdigest()}"
    return name


def place(name: str) -> tuple[str, str]:
    """Module and function of a `python:` scorer."""
    found = _PLACE.fullmatch(name)
    assert found is not None, "names are checked where settings are read"
    return found["module"], found["function"]


def source(name: str) -> Path:
    """The file of a `python:` scorer's module, found without importing anything. InputError where there is none."""
    importlib.invalidate_caches()
    module, _ = place(name)
    search, file = None, None
    for end in range(1, len(parts := module.split(".")) + 1):
        whole = ".".join(parts[:end])
        spec = PathFinder.find_spec(whole, search)
        if spec is None:
            raise InputError(f"{name!r}: no module {whole!r} on the path; expected {FORMS[1]}")
        search, file = spec.submodule_search_locations, spec.origin
    if file is None or not Path(file).is_file():
        raise InputError(f"{name!r}: {module!r} has no file; expected a module")
    return Path(file)
