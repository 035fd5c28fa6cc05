"""Takes a config and a topology; prints, before anything is paid for, what every stage would need there.

`python -m mpo_jax.plan --config=configs/tldr.py --topology=v5e:4x8 [--stages=dpo,mpo] [--json=plan.json]`. Each stage's
own programs are compiled by libtpu for the topology; no TPU and no weights are needed. `--topology=cpu` compiles for
this machine, `gpu:80GB` and `gpu:8x80GB` reckon by arithmetic. Exit code 0: every stage fits, 2: one does not, 1: an
error in what was given.
"""

import json
import sys

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from mpo_jax.errors import InputError
from mpo_jax.planning import chips, proposal, report, stages
from mpo_jax.planning.estimate import Assumptions


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if _TOPOLOGY.value is None:
        raise app.UsageError(f"--topology: {chips.known('')}")
    logging.set_verbosity(logging.ERROR)
    try:
        fits = plan(_CONFIG.value, _TOPOLOGY.value, Assumptions(_PAIRS.value, _EASY.value, _UTILISATION.value))
    except InputError as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if fits else 2)


def plan(config, name: str, assumptions: Assumptions) -> bool:
    """Prints the plan, writes the JSON; whether every stage fits."""
    chips.prepare()
    if name.startswith("gpu"):  # arrays are laid out on as many CPU devices
        jax.config.update("jax_num_cpu_devices", chips.gpu(name)[0])
    topology = chips.topology(name)
    jobs = stages.jobs(config, topology, _STAGES.value)
    mesh = next(iter(jobs.values())).mesh.shape
    print(report.heading(config, topology, mesh, assumptions), report.COLUMNS, sep="\n", flush=True)
    plans, proposals = {}, {}
    for stage, job in jobs.items():
        plans[stage] = stages.plan(job, topology, assumptions)
        print(report.lines(stage, plans[stage]), flush=True)
        if not plans[stage].fits and _PROPOSE.value:
            proposals[stage] = proposal.propose(config, stage, plans[stage].misfits, topology, assumptions)
            print(report.proposal_line(stage, proposals[stage]), flush=True)
    hours = sum(each.chip_hours for each in plans.values())
    fits = all(each.fits for each in plans.values())
    print(f"{'every stage fits' if fits else 'NOT every stage fits'}; about {hours:,.0f} chip-hours in all (estimate)")
    if _JSON.value:
        found = report.as_json(topology, mesh, plans, proposals, assumptions)
        epath.Path(_JSON.value).write_text(json.dumps(found, indent=1))
    return fits


def run() -> None:
    flags.mark_flag_as_required("config")
    app.run(main)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; its model may be a preset, as llama2-7b.")
    _TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:4x8, v4:2x2x4, ...; cpu; gpu:80GB or gpu:8x80GB.")
    _STAGES = flags.DEFINE_list("stages", [], "Plan these stages; empty: all.")
    _JSON = flags.DEFINE_string("json", None, "Where the figures go too.")
    _PAIRS = flags.DEFINE_integer("pairs", Assumptions.pairs, "Pairs of the data, for chip-hours.", lower_bound=1)
    _EASY = flags.DEFINE_float("easy", Assumptions.easy, "Share of pairs that are easy.", 0.0, 1.0)
    _UTILISATION = flags.DEFINE_float("utilisation", Assumptions.utilisation, "Of a chip's peak.", 0.01, 1.0)
    _PROPOSE = flags.DEFINE_bool("propose", True, "Where a stage does not fit, try what would make it.")
    run()
