"""Takes a config and a workdir; runs the stages of its graph that are not done.

`python -m mpo_jax.main --config=configs/tldr.py --workdir=runs/tldr`; any key can be overridden, as in
`--config.stages.dpo.beta=0.2`. Exit codes: 0 done, 1 an error in what was given, 75 told to stop and saved (run the
same command again).
"""

import sys

from mpo_jax import allocator

if __name__ == "__main__":
    allocator.restart()

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from mpo_jax import graph, pipeline, processes, sharding
from mpo_jax.errors import InputError
from mpo_jax.stages.loop import NonFinite

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, as configs/tldr.py or configs/tldr.py:debug.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_STAGES = flags.DEFINE_list("stages", [], "Run these stages and what they rest on; empty: all.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the graph with the state of every stage, and run nothing.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where the platform does not tell.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", None, "This process's index, with --coordinator.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Several hosts, as the platform tells (Cloud TPU, GKE, SLURM).")


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if _WORKDIR.value is None:
        raise app.UsageError("--workdir: expected the run's folder")
    config, workdir = _CONFIG.value, epath.Path(_WORKDIR.value)
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every rename
    try:
        if _DRY_RUN.value:
            print(pipeline.tree(config, graph.resolve(config, workdir)))
            return
        allocator.check_card()
        processes.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _DISTRIBUTED.value)
        # Compiled programs outlive the process: a resumed or repeated run starts with its first step at once.
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
        mesh = sharding.make_mesh(**config.mesh.to_dict())
        pipeline.run(config, workdir, mesh, _STAGES.value)
    except (InputError, NonFinite) as error:
        sys.exit(f"error: {error}")


def run() -> None:
    """Entry point: a missing or mistyped flag or config key is one line, not a traceback."""
    flags.mark_flag_as_required("config")
    try:
        app.run(main)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        found: BaseException = error
        while found.args and isinstance(found.args[0], BaseException):  # ml_collections wraps a mistyped key's KeyError
            found = found.args[0]
        told = " ".join(str(found.args[0] if found.args else found).split())
        if found is not error:
            sys.exit(f"error: --config: no such key: {told}")
        if "config" not in told.lower() and "did you mean" not in told.lower():
            raise
        sys.exit(f"error: {told}")


if __name__ == "__main__":
    run()
