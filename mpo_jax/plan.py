"""Takes a config and a topology; prints, before anything is paid for, what every stage would need there.

`python -m mpo_jax.plan --config=configs/tldr.py --topology=v5e:4x8 [--stages=dpo,mpo] [--json=plan.json]`. Each stage's
own programs are compiled by libtpu for the topology; no TPU and no weights are needed. `--topology=cpu` compiles for
this machine, `gpu:80GB` and `gpu:8x80GB` reckon by arithmetic. `--tune` looks for faster settings. Exit code
0: every stage fits, 2: one does not, 1: an error in what was given.
"""

import json
from collections.abc import Iterable

import jax
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from mpo_jax import command, main
from mpo_jax.errors import InputError
from mpo_jax.planning import chips, proposal, report, stages, tune
from mpo_jax.planning import compile as compiler
from mpo_jax.planning.estimate import Assumptions
from mpo_jax.run import Run


def define() -> None:
    config_flags.DEFINE_config_file("config", None, "A config file or a shipped one's name; its model may be a preset.")
    flags.DEFINE_string("topology", None, "v5e:4x8, v4:2x2x4, 2xv5e:4x8 (slices), ...; cpu; gpu:80GB or gpu:8x80GB.")
    flags.DEFINE_list("stages", [], "Plan these stages; empty: all.")
    flags.DEFINE_string("json", None, "Where the figures go too.")
    flags.DEFINE_integer("pairs", Assumptions.pairs, "Pairs of the data, for chip-hours.", lower_bound=1)
    flags.DEFINE_float("easy", Assumptions.easy, "Share of pairs that are easy.", 0.0, 1.0)
    flags.DEFINE_float("utilisation", Assumptions.utilisation, "Of a chip's peak.", 0.01, 1.0)
    flags.DEFINE_bool("propose", True, "Where a stage does not fit, try what would make it.")
    flags.DEFINE_bool("tune", False, "Try microbatch, remat and score_batch of every stage, and say what is fastest.")


def work() -> int:
    given = flags.FLAGS
    topology = command.required(given.topology, "topology", chips.known("").removeprefix("expected "))
    if given.json and not epath.Path(given.json).parent.is_dir():
        raise InputError(f"--json: {given.json}: no such folder; make it first")
    command.written(given.json or "", "json")
    logging.set_verbosity(logging.ERROR)
    assumptions = Assumptions(given.pairs, given.easy, given.utilisation)
    fits = plan(main.read(given.config), topology, assumptions, given.stages, given.propose, given.json, given.tune)
    return 0 if fits else 2


def plan(
    config: Run,
    name: str,
    assumptions: Assumptions = Assumptions(),  # noqa: B008, it is frozen
    only: Iterable[str] = (),
    propose: bool = True,
    file: str | None = None,
    tuning: bool = False,
) -> bool:
    """Prints the plan of a run on a topology, writes it as JSON where a file is named; whether every stage fits.

    only: the stages to plan; none: all. propose: whether to try what would make a stage fit.
    tuning: whether to look for the fastest settings of those that leave results alone.
    """
    chips.prepare()
    if name.startswith("gpu"):  # arrays are laid out on as many CPU devices
        jax.config.update("jax_num_cpu_devices", chips.gpu(name)[0])
    topology = chips.topology(name)
    jobs = stages.jobs(config, topology, only)
    mesh = stages.run_mesh(config, topology).shape
    print(report.heading(config, topology, mesh, assumptions), report.COLUMNS, sep="\n", flush=True)
    plans, proposals, tuned = {}, {}, {}
    known: compiler.Known = {}
    for stage, job in jobs.items():
        plans[stage] = stages.plan(job, topology, assumptions, known=known)
        print(report.lines(stage, plans[stage]), flush=True)
        if not plans[stage].fits and propose:
            proposals[stage] = proposal.propose(config, stage, plans[stage].misfits, topology, assumptions, known)
            print(report.proposal_line(stage, proposals[stage]), flush=True)
        elif tuning:
            tuned[stage] = tune.tune(config, stage, plans[stage], topology, assumptions, known)
            print(report.tuned_line(stage, plans[stage], tuned[stage]), flush=True)
    print(report.disk_line(plans), flush=True)
    hours = sum(each.chip_hours for each in plans.values())
    fits = all(each.fits for each in plans.values())
    programs = sum(len(each.programs) for each in plans.values())
    if topology.compiled:
        print(f"{programs} programs of the stages; {len(known)} compiles, since equal ones are compiled once")
    print(f"{'every stage fits' if fits else 'NOT every stage fits'}; about {hours:,.0f} chip-hours in all (estimate)")
    if file:
        found = report.as_json(topology, mesh, plans, proposals, assumptions, tuned)
        epath.Path(file).write_text(json.dumps(found, indent=1))
    return fits


def run() -> None:
    command.start(define, work, command.run_sections)


if __name__ == "__main__":
    run()
