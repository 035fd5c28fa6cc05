"""Every page of the documentation enters: what it links to is there, and the commands that it shows have the flags and
settings that it gives them."""

import itertools
import re
import shlex
from pathlib import Path

import pydantic
import pytest

from mpo_jax import command, mpo
from mpo_jax.run import Run
from mpo_jax.stages import kinds

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN = ("mine.py", "mine.py:tiny", "mixed.py")
"""Configs that a page tells its reader to write; tests/test_guides.py runs them."""
CODE = re.compile(r"```(?:bash|sh)\n(.*?)```|`([^`\n]+)`", re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        led = (page.parent / name).resolve() if name else page
        assert led.exists(), f"{page.name}: {target} is not there"
        assert not anchor or anchor in anchors(led), f"{page.name}: {target}: no such heading"


def lines(page: Path) -> list[tuple[str, list[str]]]:
    """(command, its flags) of every line of code that calls one of ours."""
    found = []
    for block, inline in CODE.findall(page.read_text()):
        for line in (block or inline).replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:
                continue
            name = called(words)
            if name:
                found.append((name, [word for word in words if word.startswith("--")]))
    return found


def called(words: list[str]) -> str:
    """The command that a line calls; "" for none of ours."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[:1] == ["mpo"] and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
        return words[1]
    module = next((after for word, after in itertools.pairwise(words) if word == "-m"), "")
    if module.startswith("mpo_jax.") and words[0].startswith("python"):
        return module.removeprefix("mpo_jax.")
    return ""


def module_of(name: str) -> Path:
    """The file of a command, by its name in `mpo` or as a module."""
    module = mpo.COMMANDS[name][0] if name in mpo.COMMANDS else f"mpo_jax.{name}"
    return ROOT / f"{module.replace('.', '/')}.py"


CALLS = [(page, name, given) for page in PAGES for name, given in lines(page)]


def test_there_are_commands_to_look_at():
    assert len(CALLS) > 20 and {"run", "plan", "show", "export"} <= {name for _, name, _ in CALLS}


@pytest.mark.parametrize(("page", "name", "given"), CALLS, ids=lambda value: getattr(value, "name", str(value))[:60])
def test_commands_have_the_flags_and_settings_that_they_are_shown_with(page, name, given):
    defined = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', module_of(name).read_text()))
    for flag in given:
        head, _, value = flag.removeprefix("--").partition("=")
        if head.startswith("config."):
            assert known(head.removeprefix("config.").split(".")), f"{page.name}: no setting {head}"
        elif head == "config":
            assert value in ("...", *OWN) or command.config_file(value.split(":")[0])
        else:
            assert head in defined | {"help"} or head.removeprefix("no") in defined, (
                f"{page.name}: {name} has no --{head}"
            )


def known(path: list[str], section: type[pydantic.BaseModel] = Run) -> bool:
    """Whether a dotted key names a setting; a stage's is one of any kind's."""
    name, *rest = path
    if section is Run and name == "stages":
        fields = {field for kind in kinds.KINDS.values() for field in kind.settings.model_fields}
        return len(rest) < 2 or rest[1].split(".")[0] in fields or rest[0] in ("NAME", "X")
    if name not in section.model_fields:
        return False
    inner = section.model_fields[name].annotation
    return not rest or not (isinstance(inner, type) and issubclass(inner, pydantic.BaseModel)) or known(rest, inner)
