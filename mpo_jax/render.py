"""Takes the folder of a run; writes its report again, with what was judged or finished since. For several runs it
writes one report over all of them: means with intervals over seeds, and the settings that differ.

`mpo report WORKDIR [WORKDIR ...]`, or `python -m mpo_jax.render --run=WORKDIR,WORKDIR`. With `--markdown` the results
are printed as a table for a README, and nothing is written.
"""

from typing import Any

from absl import flags
from etils import epath

from mpo_jax import artifacts, command, settings
from mpo_jax.artifacts import STAGES_FILE
from mpo_jax.errors import InputError
from mpo_jax.evaluation import over_runs, report, runs_page
from mpo_jax.evaluation.over_runs import Evaluated
from mpo_jax.run import Run, StageSettings, flat
from mpo_jax.stages import kinds

SEVERAL = "runs_report.html"
"""Where the report over several runs goes, unless --output says so."""


def define() -> None:
    flags.DEFINE_list(
        "run", [], "Folders of the runs; they may also be given without the flag's name, one after the other."
    )
    flags.DEFINE_string("output", None, f"The page of the report over several runs. [{SEVERAL}]")
    flags.DEFINE_bool("markdown", False, "Print the results as a table in Markdown; write nothing.")


def work() -> None:
    given = flags.FLAGS
    places = command.required(given.run, "run", "the --workdir of a run, or of several")
    for place in places:
        if not (epath.Path(place) / STAGES_FILE).exists():
            raise InputError(f"--run: {place} holds no {STAGES_FILE}; expected the --workdir of a run")
    if len({str(epath.Path(place).resolve()) for place in places}) < len(places):
        raise InputError("--run: the same folder is given twice; expected each run once")
    if len(places) == 1 and given.output is not None:
        raise InputError(
            f"--output: is only for several runs; the report of one run is its folder's {artifacts.REPORT_PAGE}"
        )
    if given.markdown:
        print(runs_page.markdown([read(place) for place in places]))
    elif len(places) == 1:
        print(f"report: {report.write(epath.Path(places[0]), kinds.shown())}")
    else:
        target = given.output or SEVERAL
        command.written(target, "output")
        runs = [read(place) for place in places]
        runs_page.write(epath.Path(target), runs)
        print(f"{runs_page.text(runs)}\nreport: {target}")


def read(place: str) -> Evaluated:
    """A run's evaluations, with the settings that they were made by."""
    workdir = epath.Path(place)
    done = artifacts.finished_stages(workdir)
    last = next((folder for folder, _ in reversed(done.values())), None)
    if last is None:
        raise InputError(f"--run: {place} has no finished stage; expected a run whose evaluate stage is done")
    try:
        config = kinds.read(artifacts.read_json(last / artifacts.CONFIG), from_json=True)
    except InputError as error:
        raise InputError(f"--run: {place}: its settings can't be read: {' '.join(str(error).split())}") from None
    return over_runs.read(place, kinds.shown(), meant(config), seeds(config))


def meant(config: Run) -> dict[str, Any]:
    """What tells a run from others, by dotted names: all settings that enter a key, the stages' inputs, and the names
    of model and data, but no seed."""
    found: dict[str, Any] = {}
    for name, value in flat(settings.content(config)).items():
        if name != "seed" and not (name.startswith("stages.") and name.count(".") == 2 and name.endswith(".seed")):
            found[name] = value
    for name, stage in config.stages.items():
        found |= {f"stages.{name}.{role}": settings.plain(getattr(stage, role)) for role in settings.roles(type(stage))}
        found[f"stages.{name}.kind"] = stage.kind
    named = {"model.path": config.model.path, "data.path": config.data.path}
    return found | {key: value.rstrip("/").rpartition("/")[2] for key, value in named.items()}


def seeds(config: Run) -> str:
    """The run's seed, and those of stages that have one of their own."""
    own = {name: stage.seed for name, stage in config.stages.items() if isinstance(stage, StageSettings) and stage.seed}
    return ", ".join([str(config.seed), *(f"{name} +{seed}" for name, seed in own.items())])


def run() -> None:
    command.start(define, work, folders="run")


if __name__ == "__main__":
    run()
