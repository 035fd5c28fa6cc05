"""A command's flags and its work enter; the command runs, and whatever is wrong with what was given is told in a line.

What the command lines (`main`, `plan`, ...) have in common: shipped configs by name, `--help` with the settings, exit
codes. Flags are defined when a command begins, not when its module is imported, so that any of them can be.
"""

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import flags, logging

from mpo_jax import settings
from mpo_jax.errors import InputError
from mpo_jax.run import Run
from mpo_jax.settings import Line, Section

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

_PACKAGE = Path(__file__).resolve().parent
_CONFIGS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
"""Where the shipped configs lie: in an installed package, in a clone."""


def start(
    define: Callable[[], None],
    work: Callable[[], int | None],
    sections: Callable[[], Mapping[str, type[Section]]] = dict,
    resumable: bool = False,
    folders: str = "",
) -> None:
    """Runs a command with `sys.argv` and ends the process with its exit code: 0, or what `work` returns; 1 with one
    line where something given can't be used; 130 after Ctrl-C.

    define: defines the flags. sections: heading -> settings that `--help` lists. resumable: whether what was
    interrupted goes on with the same command. folders: the flag that arguments without a name are the values of.
    """
    module = inspect.getmodule(work)
    known = set(flags.FLAGS)
    define()
    own = [name for name in flags.FLAGS if name not in known]
    try:
        if any(argument.split("=")[0] in ("--help", "-h", "--helpfull", "-help") for argument in sys.argv[1:]):
            print(_help(inspect.getdoc(module) or "", own, sections()))
            sys.exit(0)
        _parse(sys.argv, folders)
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every rename
        sys.exit(work())
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except KeyboardInterrupt:
        print(f"stopped{'; the same command goes on from what was saved' if resumable else ''}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def required(value: Any, flag: str, expected: str) -> Any:
    """The value of a flag that must be given. InputError where it is missing or empty."""
    if not value:
        raise InputError(f"--{flag}: expected {expected}")
    return value


def config_file(name: str) -> str:
    """The path of a config, `configs/tldr.py` or the name of one that comes with the package, `tldr`; what follows a
    colon stays. InputError where there is none."""
    place, colon, variant = name.partition(":")
    if Path(place).is_file():
        return name
    shipped = {file.stem: file for folder in _CONFIGS if folder.is_dir() for file in sorted(folder.glob("[!_]*.py"))}
    if place not in shipped:
        raise InputError(
            f"--config: {place}: no such file, nor a config of the package{settings.nearest(place, shipped)}"
        )
    return f"{shipped[place]}{colon}{variant}"


def _parse(argv: list[str], folders: str) -> None:
    """Reads the flags. InputError for one that is unknown, mistyped, or names no setting of the config."""
    given = [argv[0]]
    rest = iter(argv[1:])
    for argument in rest:
        if argument == "--config":
            argument = f"--config={next(rest, '')}"
        head, _, value = argument.partition("=")
        given.append(f"--config={config_file(value)}" if head == "--config" else argument)
    if folders and (named := [argument for argument in given[1:] if not argument.startswith("-")]):
        given = [argument for argument in given if argument not in named] + [f"--{folders}={','.join(named)}"]
    try:
        left = flags.FLAGS(given)
    except flags.Error as error:
        raise InputError(" ".join(str(error).split()).removeprefix("flag ")) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        cause: BaseException = error
        while cause.args and isinstance(cause.args[0], BaseException):  # ml_collections wraps a mistyped key's KeyError
            cause = cause.args[0]
        told = " ".join(str(cause.args[0] if cause.args else cause).split())
        raise InputError(told if isinstance(cause, InputError) else f"--config: no such key: {told}") from error
    if len(left) > 1:
        raise InputError(f"unexpected arguments {left[1:]}; every argument is a flag, as in --name=value")


def _fail(told: str) -> None:
    for line in told.split("\n"):
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1)


def _help(doc: str, own: Iterable[str], sections: Mapping[str, type[Section]]) -> str:
    parts = [doc, "", "Flags:"]
    for name in sorted(own):
        flag = flags.FLAGS[name]
        default = "" if flag.default in (None, "", []) else f" [{flag.default}]"
        parts.append(f"  --{name}{default}\n      {flag.help}")
    for heading, section in sections.items():
        parts += ["", f"{heading}: {inspect.getdoc(section) or ''}"]
        parts += _columns(settings.lines(section))
    return "\n".join(parts)


def _columns(told: list[Line]) -> list[str]:
    name = max((len(line.name) for line in told), default=0)
    default = max((len(line.default) for line in told if len(line.default) < 24), default=0)
    return [f"  {line.name:{name}}  {line.default:{default}}  {line.help} ({line.allowed})" for line in told]


def run_sections() -> dict[str, type[Section]]:
    """The settings of a run and of every kind of stage, as `--config.NAME=VALUE` takes them."""
    from mpo_jax.stages import kinds

    sections: dict[str, type[Section]] = {"--config.": Run}
    return sections | {f"--config.stages.NAME. of kind {kind}": each.settings for kind, each in kinds.KINDS.items()}


def settings_page() -> str:
    """The reference of all settings, in Markdown."""
    parts = [
        "# Settings",
        "",
        "Made from the package by `mpo show --settings`. Any of them is a flag: `--config.stages.dpo.beta=0.2`. "
        "*Operational* settings say how something is computed, not what: they don't enter a stage's key.",
    ]
    for heading, section in run_sections().items():
        parts += ["", f"## `{heading}`", "", inspect.getdoc(section) or "", ""]
        parts += ["| setting | default | values | |", "| --- | --- | --- | --- |"]
        for line in settings.lines(section):
            cells = [f"`{line.name}`", f"`{line.default}`", line.allowed.replace("|", "\\|"), line.help]
            parts.append(f"| {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def schemas() -> str:
    """The JSON schemas of a run's settings and of every kind of stage's."""
    return json.dumps({heading: each.model_json_schema() for heading, each in run_sections().items()}, indent=1)
