"""A command's flags and its work enter; the command runs, and whatever is wrong with what was given is told in a line.

What the command lines (`main`, `plan`, ...) have in common: shipped configs by name, `--help` with the settings, exit
codes. Flags are defined when a command begins, not when its module is imported, so that any of them can be.
"""

import inspect
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags, logging

from mpo_jax import progress, settings
from mpo_jax.errors import INTERRUPTED, InputError
from mpo_jax.run import Run
from mpo_jax.settings import Line, Section

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
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is as it should be
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal can't show, as half an emoji, is told by its escape
        sys.stdout.reconfigure(errors="backslashreplace")
    module = inspect.getmodule(work)
    known = set(flags.FLAGS)
    try:
        define()  # a config's flag reads the flags of files that the command line names
        own = [name for name in flags.FLAGS if name not in known]
        if any(argument.split("=")[0] in ("--help", "-h", "--helpfull", "-help") for argument in sys.argv[1:]):
            print(_help(inspect.getdoc(module) or "", own, sections()))
            sys.exit(0)
        _parse(sys.argv, folders)
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every rename
        sys.exit(work())
    except InputError as error:
        _fail(str(error))
    except flags.Error as error:
        _fail(_reworded(error))
    except ImportError as error:
        if "gcsfs" not in str(error):
            raise
        _fail('gs:// needs gcsfs, which is not installed: pip install "mpo_jax[gcs]"')
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except Exception as error:
        if not type(error).__module__.startswith(("gcsfs.", "google.")):
            raise
        _fail(f"gs://: {' '.join(str(error).split())[:300] or type(error).__name__}")
    except KeyboardInterrupt:
        told = "; the same command goes on from what was saved" if resumable else ""
        progress.say(f"stopped{told}", sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        for name in set(flags.FLAGS) - known:  # another command in this process may define the same name
            delattr(flags.FLAGS, name)


def required(value: Any, flag: str, expected: str) -> Any:
    """The value of a flag that must be given. InputError where it is missing or empty."""
    if not value:
        raise InputError(f"--{flag}: expected {expected}")
    return value


def written(path: str, flag: str) -> None:
    """InputError for a flag's file to write where it is a pipe, which would wait for its reader for ever."""
    if Path(path).is_fifo():
        raise InputError(f"--{flag}: {path} is a pipe; expected a file, or a name that is not taken")


def config_file(name: str) -> str:
    """The path of a config, `configs/tldr.py` or the name of one that comes with the package, `tldr`; what follows a
    colon stays. InputError where there is none."""
    place, colon, variant = required(name, "config", "a config file, or the name of a shipped one").partition(":")
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
    given, config = [argv[0]], ""
    rest = iter(argv[1:])
    for argument in rest:
        head, equals, value = argument.partition("=")
        if value.startswith("~/"):  # a shell leaves it as it is behind `=`
            value = os.path.expanduser(value)
            argument = f"{head}={value}"
        if head in ("--config", "-config"):
            value = value if equals else next(rest, "")
            if config:
                raise InputError(f"--config: given twice, {config} and {value}; expected one")
            config = value
            given.insert(1, f"--config={config_file(value)}")  # absl wants it before its overrides
            continue
        given.append(argument)
    if not config and "config" in flags.FLAGS and any(argument.startswith("--config.") for argument in given):
        required(config, "config", "a config file, or the name of a shipped one, for its settings")
    named = [argument for argument in given[1:] if not argument.startswith("-")] if folders else []
    if named:
        if (
            len(named) > 1
            and not isinstance(flags.FLAGS[folders], flags.MultiFlag)
            and flags.FLAGS[folders].value is None
        ):
            raise InputError(f"--{folders}: expected one folder; found {len(named)}")
        given = [argument for argument in given if argument not in named] + [f"--{folders}={','.join(named)}"]
    if config:
        _check_overrides(_load(given, config), given)
    try:
        sys.argv = given  # where overrides of the config are looked for
        left = flags.FLAGS(given)
    except flags.UnrecognizedFlagError as error:
        raise InputError(f"--{error.flagname}: no such flag; --help lists them") from None
    except flags.Error as error:
        raise InputError(_reworded(error)) from None
    if len(left) > 1:
        raise InputError(f"unexpected arguments {left[1:]}; every argument is a flag, as in --name=value")


def _load(given: list[str], typed: str) -> Any:
    """The config by itself, before anything is overridden. InputError for whatever is wrong with its file."""
    alone = [given[0], next(argument for argument in given if argument.startswith("--config="))]
    sys.argv = alone
    try:
        flags.FLAGS(alone)
    except Exception as error:  # a config is code of somebody else's
        raise InputError(f"--config={typed}: {_cause(error)}") from error
    config = flags.FLAGS["config"].value
    flags.FLAGS.unparse_flags()
    if not isinstance(config, ml_collections.ConfigDict):
        kind = type(config).__name__
        raise InputError(f"--config={typed}: get_config() returned {kind}; expected an ml_collections.ConfigDict")
    return config


def _cause(error: BaseException) -> str:
    """What went wrong at the bottom of an error, and where in the config."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, InputError):
        return str(error)
    if "no attribute 'get_config'" in str(error):
        return "defines no get_config(); expected a Python file with one, such as configs/tldr.py"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}" if error.lineno else f"no Python file: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "mpo_jax" not in frame.filename]
    place = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def _check_overrides(config: Any, given: list[str]) -> None:
    """InputError, by the whole key, for an override of what the config has not."""
    for argument in given[1:]:
        name = argument.partition("=")[0].removeprefix("--config.")
        if not argument.startswith("--config."):
            continue
        part: Any = config
        for depth, key in enumerate(parts := name.split("."), 1):
            if not isinstance(part, ml_collections.ConfigDict):
                raise InputError(f"{name}: no such setting; {'.'.join(parts[: depth - 1])} has none within it")
            if key not in part:
                raise InputError(f"{'.'.join(parts[:depth])}: no such setting{settings.nearest(key, part)}")
            part = part[key]
        if isinstance(part, ml_collections.ConfigDict):
            raise InputError(
                f"{name}: expected one of its settings, as --config.{name}.{next(iter(part), 'NAME')}=VALUE"
            )


def _reworded(error: Exception) -> str:
    """A flag's own error in our words; a setting's by its key."""
    told = re.sub(r"^(flag |ERROR:: )", "", " ".join(str(error).split()))
    found = re.match(r"--([\w.]+)=(.*?): ", told)
    if found is None:
        return told
    name, given = found[1], found[2]
    if not name.startswith("config."):
        flag = flags.FLAGS[name]
        expected = "true or false" if flag.boolean else flag.parser.syntactic_help or "another value"
        return f"--{name}: {given!r}; expected {expected}"
    name = name.removeprefix("config.")
    value: Any = flags.FLAGS["config"].value
    for key in name.split("."):
        value = value[key] if isinstance(value, ml_collections.ConfigDict) and key in value else None
    words = {bool: "true or false", int: "a whole number", float: "a number", tuple: "a list, such as a,b"}
    return f"{name}: {given!r}; expected {words.get(type(value), 'another value')}"


def _fail(told: str) -> None:
    for line in told.split("\n"):
        progress.say(f"error: {line}", sys.stderr)
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
        "All settings of a run and of each kind of stage, as `mpo show --settings` prints them. Every setting is also "
        "a flag, for example `--config.stages.dpo.beta=0.2`. *Operational* settings change how something is computed "
        "and not what is computed: they are no part of a stage's key, so a finished stage is not repeated for them.",
    ]
    for heading, section in run_sections().items():
        parts += ["", f"## `{heading}`", "", inspect.getdoc(section) or "", ""]
        parts += ["| setting | default | values | meaning |", "| --- | --- | --- | --- |"]
        for line in settings.lines(section):
            cells = [f"`{line.name}`", f"`{line.default}`", line.allowed.replace("|", "\\|"), line.help]
            parts.append(f"| {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def schemas() -> str:
    """The JSON schemas of a run's settings and of every kind of stage's."""
    return json.dumps({heading: each.model_json_schema() for heading, each in run_sections().items()}, indent=1)
