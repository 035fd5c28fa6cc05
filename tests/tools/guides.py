"""A page of the documentation enters; the files that it tells its reader to write, and its commands, leave.

A file is a Python block whose docstring begins with its name. A command is a line of a bash block; its comment may say
that it needs what no test has, or that it ends with an error.
"""

import dataclasses
import re
import shlex

from tests.tools.processes import ROOT

_BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_NAME = re.compile(r'\A"""(\w+\.py): ')


@dataclasses.dataclass(frozen=True)
class Command:
    """words: of the line, without its comment. needs: what no test has; "" for nothing. fails: it is to end so."""

    words: tuple[str, ...]
    needs: str
    fails: bool

    def replaced(self, places: dict[str, str]) -> list[str]:
        """The words, with what stands for something of the reader's own in its place."""

        def put(word: str) -> str:
            head, equals, value = word.rpartition("=")
            return head + equals + places.get(value, value)

        return [put(word) for word in self.words]


def files(page: str) -> dict[str, str]:
    """Name -> text, of a page's blocks."""
    texts = (text for language, text in _blocks(page) if language == "python")
    return {found[1]: text for text in texts if (found := _NAME.match(text))}


def snippets(page: str) -> list[str]:
    """Python blocks that are no files: to be run as they stand, one after the other."""
    return [text for language, text in _blocks(page) if language == "python" and not _NAME.match(text)]


def commands(page: str) -> list[Command]:
    found = []
    for language, text in _blocks(page):
        for line in text.splitlines() if language == "bash" else ():
            words, _, comment = line.partition("  # ")
            needs = re.match(r"needs (.*?)(?:;|:|$)", comment)
            found.append(Command(tuple(shlex.split(words)), needs[1] if needs else "", "ends with an error" in comment))
    return [command for command in found if command.words]


def _blocks(page: str) -> list[tuple[str, str]]:
    return _BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
