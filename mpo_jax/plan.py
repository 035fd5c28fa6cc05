"""Takes a config and a topology; prints what every stage would need there, before you pay for it.

`python -m mpo_jax.plan --config=configs/tldr.py --topology=v5e:4x8 [--stages=dpo,mpo] [--json=plan.json]`. Each stage's
own programs are compiled by libtpu for the topology; no TPU and no weights are needed. `--topology=cpu` compiles for
this machine; for `gpu:80GB` and `gpu:8x80GB` the figures are estimated by arithmetic. `--tune` looks for faster
settings. Exit codes: 0: every stage fits; 2: some stage does not; 1: an error in config or flags.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path

import jax
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from mpo_jax import command, graph, main, store
from mpo_jax.errors import InputError
from mpo_jax.planning import chips, lengths, proposal, report, stages, tune
from mpo_jax.planning.estimate import Assumptions
from mpo_jax.planning.known import Known
from mpo_jax.run import Run
from mpo_jax.stages.job import Job


def define() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "A config file or the name of a shipped one; its model may be a preset."
    )
    flags.DEFINE_string(
        "topology",
        None,
        "The hardware: a TPU slice (v5e:4x8, v4:2x2x4, ...), several (2xv5e:4x8), cpu, gpu:80GB or gpu:8x80GB.",
    )
    flags.DEFINE_list("stages", [], "Plan these stages; empty: all.")
    flags.DEFINE_bool("needed", False, "Plan also the stages that those of --stages need, as a run would make them.")
    flags.DEFINE_string("json", None, "File to which the figures are written too.")
    flags.DEFINE_integer(
        "pairs", Assumptions.pairs, "Number of pairs in the data, for the estimate of chip-hours.", lower_bound=1
    )
    flags.DEFINE_float(
        "easy", Assumptions.easy, "Share of the pairs that are easy, for the estimate of chip-hours.", 0.0, 1.0
    )
    flags.DEFINE_float(
        "utilisation",
        Assumptions.utilisation,
        "Share of a chip's peak that is reached, for the estimate of chip-hours.",
        0.01,
        1.0,
    )
    flags.DEFINE_bool("propose", True, "If a stage does not fit, try which settings would make it fit.")
    flags.DEFINE_string(
        "compiled",
        str(store.scratch() / "plan"),
        "Folder that keeps the compilers' figures for later plans; empty: none.",
    )
    flags.DEFINE_bool(
        "lengths", True, "Read the lengths of the rows from the data, if data and tokenizer are files on this machine."
    )
    flags.DEFINE_bool("tune", False, "Search for the fastest mesh and settings among those that change no result.")
    flags.DEFINE_integer(
        "compiles", tune.COMPILES, "Largest number of programs that --tune may compile.", lower_bound=1
    )


def work() -> int:
    given = flags.FLAGS
    topology = command.required(given.topology, "topology", chips.known("").removeprefix("expected "))
    if given.json and not epath.Path(given.json).parent.is_dir():
        raise InputError(f"--json: {given.json}: no such folder; make it first")
    command.written(given.json or "", "json")
    logging.set_verbosity(logging.ERROR)
    assumptions = Assumptions(given.pairs, given.easy, given.utilisation)
    compiles = given.compiles if given.tune else 0
    config = main.read(given.config)
    only = graph.needed(graph.connections(config), given.stages) if given.needed else given.stages
    known = Known(Path(given.compiled).expanduser() if given.compiled and topology != "cpu" else None)
    fits = plan(config, topology, assumptions, only, given.propose, given.json, compiles, known, given.lengths)
    return 0 if fits else 2


def plan(
    config: Run,
    name: str,
    assumptions: Assumptions = Assumptions(),  # noqa: B008, it is frozen
    only: Iterable[str] = (),
    propose: bool = True,
    file: str | None = None,
    compiles: int = 0,
    known: Known | None = None,
    read_lengths: bool = True,
) -> bool:
    """Prints the plan of a run on a topology, writes it as JSON where a file is named; whether every stage fits.

    only: the stages to plan; none: all. propose: whether to try what would make a stage fit.
    compiles: that may be made to look for faster settings, of those that leave results alone; 0: none is looked for.
    known: what earlier plans have compiled; None: nothing is. read_lengths: of the data, where it is here.
    """
    known = Known() if known is None else known
    chips.prepare()
    if name.lower().startswith("gpu"):  # arrays are laid out on as many CPU devices
        jax.config.update("jax_num_cpu_devices", chips.gpu(name)[0])
    topology = chips.topology(name)
    jobs = stages.jobs(config, topology, only)
    mesh = stages.run_mesh(config, topology).shape
    assumptions = with_lengths(assumptions, jobs.values()) if read_lengths else assumptions
    print(report.heading(config, topology, mesh, assumptions), report.COLUMNS, sep="\n", flush=True)
    plans, proposals, tuned = {}, {}, None
    for stage, job in jobs.items():
        plans[stage] = stages.plan(job, topology, assumptions, known=known)
        print(report.lines(stage, plans[stage]), flush=True)
        if not plans[stage].fits and propose:
            proposals[stage] = proposal.propose(config, stage, plans[stage].misfits, topology, assumptions, known)
            print(report.proposal_line(stage, proposals[stage]), flush=True)
    print(report.disk_line(plans), flush=True)
    if compiles and all(each.fits for each in plans.values()):
        tuned = tune.tune(config, plans, topology, assumptions, known, compiles, functools.partial(print, flush=True))
        print(report.tuned_lines(tuned), flush=True)
    elif compiles:
        print("no settings are tuned until every stage fits")
    least, most = (sum(getattr(each, name) for each in plans.values()) for name in ("least_chip_hours", "chip_hours"))
    fits = all(each.fits for each in plans.values())
    programs = sum(len(each.programs) for each in plans.values())
    if topology.compiled:
        print(
            f"{programs} programs of the stages, {known.programs} different ones with what was tried; {known.compiles} "
            "compiled now"
        )
    told = "every stage fits" if fits else "NOT every stage fits"
    print(f"{told}; {report.hours(least, most)} chip-hours in all (estimate)")
    if file:
        found = report.as_json(topology, mesh, plans, proposals, assumptions, tuned)
        epath.Path(file).write_text(json.dumps(found, indent=1))
    return fits


def with_lengths(assumptions: Assumptions, jobs: Iterable[Job]) -> Assumptions:
    """The assumptions with what the data itself says, where it is here: lengths of rows, and how many there are."""
    found = lengths.read(jobs)
    return assumptions if found is None else dataclasses.replace(assumptions, lengths=found, pairs=found.rows)


def run() -> None:
    command.start(define, work, command.run_sections)


if __name__ == "__main__":
    run()
