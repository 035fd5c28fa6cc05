"""Takes the folders of runs; prints their stages with state and main figures, and the settings in which runs differ.

`mpo runs WORKDIR [WORKDIR ...]`, or `python -m mpo_jax.runs --runs=WORKDIR,WORKDIR`. With `--prune` it lists
the files that no stage of a run's present graph needs, with sizes; `--prune --yes` deletes them.
"""

import datetime
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags
from etils import epath

from mpo_jax import artifacts, command, disk, locks
from mpo_jax.errors import InputError
from mpo_jax.evaluation.sections import Shown
from mpo_jax.run import flat
from mpo_jax.stages import kinds


def define() -> None:
    flags.DEFINE_list(
        "runs", [], "Folders of the runs; they may also be given without the flag's name, one after the other."
    )
    flags.DEFINE_bool(
        "prune", False, "List the files that the present graphs of the runs do not need, with their sizes."
    )
    flags.DEFINE_bool("yes", False, "With --prune: delete these files.")


def work() -> None:
    folders = [epath.Path(name) for name in command.required(flags.FLAGS.runs, "runs", "the --workdir of some runs")]
    for folder in folders:
        if not (folder / artifacts.STAGES_FILE).exists():
            raise InputError(f"--runs: {folder} holds no {artifacts.STAGES_FILE}; expected the --workdir of a run")
    if flags.FLAGS.yes and not flags.FLAGS.prune:
        raise InputError("--yes: is only for --prune")
    if flags.FLAGS.prune:
        for folder in folders:
            print(f"{folder}\n{prune(folder, flags.FLAGS.yes)}")
        return
    for folder in folders:
        print(f"{folder}\n{listing(folder)}")
    for first, second in itertools.combinations(folders, 2):
        print(f"settings that differ: {first} | {second}")
        print("\n".join(f"  {line}" for line in differences(settings_of(first), settings_of(second))) or "  none")


def prune(workdir: epath.Path, delete: bool = False) -> str:
    """A line for everything that no stage of a run's present graph needs, the largest first, and their sum. delete: it
    is gone when this returns; InputError where a run is at work there."""
    if delete:
        locks.check_free(workdir)
    found = sorted(disk.spare(workdir), key=lambda each: -each.size)
    if delete:
        for each in found:
            disk.free(each)
    lines = [f"  {disk.told(each.size):>11}  {each.path.relative_to(workdir)}  {each.why}" for each in found]
    end = "freed" if delete else "can be freed: the same command with --yes deletes these files"
    total = disk.told(sum(each.size for each in found))
    return "\n".join([*lines, f"  {total:>11}  {end}"]) if found else "  nothing to free"


def listing(workdir: epath.Path) -> str:
    """A line for each stage of a run: name, kind, state, day, main figures."""
    rows = []
    for name, folder in artifacts.stage_folders(workdir).items():
        manifest = artifacts.read_manifest(folder)
        if manifest is None:
            rows.append((name, "", "unfinished" if folder.exists() else "missing", "", ""))
            continue
        made = datetime.datetime.fromtimestamp((folder / artifacts.MANIFEST).stat().mtime, datetime.UTC)
        shown = kinds.shown().get(manifest["kind"], Shown())
        told = ", ".join(figures(manifest["summary"], shown.figures))
        rows.append((name, manifest["kind"], "done", f"{made:%Y-%m-%d %H:%M}", told))
    if not rows:
        return "  no stages"
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in rows
    )


def figures(summary: Any, wanted: tuple[str, ...]) -> Iterator[str]:
    """The figures of a stage's summary by their dotted names; "*" stands for every name."""
    for name in wanted:
        for place, value in _found(summary, name.split("."), ()):
            yield f"{'.'.join(place)} {value:.4g}" if isinstance(value, float) else f"{'.'.join(place)} {value}"


def _found(value: Any, names: list[str], place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not names:
        if value is not None:
            yield place, value
        return
    inside: Mapping[str, Any] = value if isinstance(value, dict) else {}
    for name in inside if names[0] == "*" else [names[0]]:
        if name in inside:
            yield from _found(inside[name], names[1:], (*place, name))


def settings_of(workdir: epath.Path) -> dict[str, Any]:
    """The settings of a run's stages, by dotted names, as the stages themselves were run with."""
    values: dict[str, Any] = {}
    for name, folder in artifacts.stage_folders(workdir).items():
        config = artifacts.read_json(folder / artifacts.CONFIG, default={})
        values |= flat({"stages": {name: config.get("stages", {}).get(name, {})}})
        values |= flat({key: value for key, value in config.items() if key != "stages"})
    return values


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """A line for each setting that two runs have not in common."""
    names = dict.fromkeys([*first, *second])
    return [
        f"{name}: {first.get(name, '-')} | {second.get(name, '-')}"
        for name in names
        if first.get(name, "-") != second.get(name, "-")
    ]


def run() -> None:
    command.start(define, work, folders="runs")


if __name__ == "__main__":
    run()
