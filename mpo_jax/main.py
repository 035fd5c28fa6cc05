"""Takes a config and a workdir; runs the stages of its graph that are not finished.

`python -m mpo_jax.main --config=configs/tldr.py --workdir=runs/tldr`, or `mpo run --config=tldr --workdir=runs/tldr`;
any setting can be changed, as in `--config.stages.dpo.beta=0.2`. Exit codes: 0: done; 1: an error in config, flags or
data; 75 (SIGTERM) or 130 (Ctrl-C): the run was told to stop, and has saved; 75 too if another process of the run has
died. After 75 and 130, run the same command again.
"""

import sys

from mpo_jax import allocator

if __name__ == "__main__":  # `mpo run` itself, which tells of Ctrl-C in the imports below too
    from mpo_jax import mpo

    sys.argv.insert(1, "run")
    mpo.main()

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from mpo_jax import command, graph, locks, peers, pipeline, processes, profiling, sharding, states, stopping
from mpo_jax.artifacts import COMPILED
from mpo_jax.data import parts
from mpo_jax.data.reading import of_source
from mpo_jax.errors import InputError
from mpo_jax.models import hub, presets
from mpo_jax.run import Run, StageMesh, mesh_of
from mpo_jax.stages import kinds
from mpo_jax.stages.job import Job

_WORTH_KEEPING = 0.5
"""Seconds of compiling from which a program is kept."""


def define() -> None:
    config_flags.DEFINE_config_file("config", None, "A config file or the name of a shipped one: tldr, tldr:debug.")
    flags.DEFINE_string("workdir", None, "The run's folder, or a gs:// address.")
    flags.DEFINE_list("stages", [], "Run these stages, and the stages that they need; empty: all.")
    flags.DEFINE_bool("dry_run", False, "Print the graph with the state of every stage, and run nothing.")
    flags.DEFINE_bool(
        "wait", False, "If another run is working on a stage, wait for it instead of ending with an error."
    )
    flags.DEFINE_string(
        "profile", None, "STAGE:STEP+N: write a device trace of N steps of a stage, from STEP on, to its folder."
    )
    flags.DEFINE_string("coordinator", None, "host:port of process 0, if the platform does not provide it.")
    flags.DEFINE_integer("processes", None, "Number of processes, with --coordinator.")
    flags.DEFINE_integer("process", None, "This process's index, with --coordinator.")
    flags.DEFINE_bool("distributed", False, "Run on several hosts, which the platform names (Cloud TPU, GKE, SLURM).")


def work() -> int | None:
    given = flags.FLAGS
    config = read(given.config)
    workdir = epath.Path(command.required(given.workdir, "workdir", "the run's folder"))
    profile = None if given.profile is None else profiling.parse(given.profile, list(config.stages))
    if given.dry_run:
        print(dry_run(config, workdir, given.stages))
        return None
    allocator.check_card()
    processes.start(given.coordinator, given.processes, given.process, given.distributed)
    keep_programs(workdir)
    mesh = sharding.make_mesh(**dict(config.mesh))
    with stopping.Notice(last=True), peers.watched(locks.give_up):
        pipeline.run(config, workdir, mesh, given.stages, profile, given.wait, _amount)
    return None


def keep_programs(workdir: epath.Path) -> None:
    """Compiled programs outlive the process, in the workdir or where JAX_COMPILATION_CACHE_DIR says: a resumed or
    repeated run starts with its first step at once."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(workdir / COMPILED))
    # XLA's own caches would bring the folder's name into every program's key, and a run that was moved or copied, or
    # lies elsewhere on the next machine, would compile all again.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    shortest = "jax_persistent_cache_min_compile_time_secs"
    jax.config.update(shortest, min(getattr(jax.config, shortest, _WORTH_KEEPING), _WORTH_KEEPING))


def _amount(job: Job, pairs: int) -> float | None:
    """Of a stage, see `planning.amount`, which is imported where it is asked."""
    from mpo_jax.planning import amount

    return amount.of_stage(job, pairs)


def read(config) -> Run:
    """The run of a --config flag's value. InputError, by key, for all that is wrong with it."""
    return kinds.read(command.required(config, "config", "a config file, or the name of a shipped one").to_dict())


def dry_run(config: Run, workdir: epath.Path, only: list[str]) -> str:
    """Checks everything; the graph with the state of every stage. Neither weights nor data need be at hand: then keys
    are unknown. Nothing is downloaded, and nothing is written."""
    try:
        here = hub.at_hand(config.model.path)
    except InputError as error:
        raise InputError(f"model.path: {error}") from None
    known = here
    for name, source in {"": config.data, **config.data.sources}.items():
        with of_source(name):
            known = known and (not source.path or parts.at_hand(source.path))
    checked, mesh, notes = _here(config)
    pipeline.check(checked, workdir, mesh, only, None if here else presets.find(config.model.path))
    if here:
        pipeline.check_tokenizer(checked, workdir, mesh, config.stages)
    nodes = graph.resolve(config, workdir, None if known else graph.UNKNOWN)
    return "\n".join([states.tree(config, nodes), *notes])


def _here(config: Run) -> tuple[Run, jax.sharding.Mesh, list[str]]:
    """The run as it can be checked on this machine's devices, their mesh, and notes. Where the meshes need more devices
    than there are: on one device, without the stages' own meshes. InputError for what no machine can do."""
    try:
        mesh = sharding.make_mesh(**dict(config.mesh))
        pipeline.meshes(config, mesh)
        return config, mesh, []
    except InputError as error:
        sizes = [dict(config.mesh), *(mesh_of(config, stage) for stage in config.stages.values())]
        if all(len(jax.devices()) >= each["data"] * each["tensor"] and each["fsdp"] != -1 for each in sizes):
            raise
        one = {name: stage.model_copy(update={"mesh": StageMesh()}) for name, stage in config.stages.items()}
        told = str(error).replace("\n", "; ")
        note = f"not checked here: {told} (`mpo plan --topology=...` can check it for any slice)"
        return config.model_copy(update={"stages": one}), sharding.make_mesh(devices=jax.devices()[:1]), [note]


def run() -> None:
    command.start(define, work, command.run_sections, resumable=True)
