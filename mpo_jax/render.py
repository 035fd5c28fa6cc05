"""The folder of a run enters; its report is written again, with what was judged or finished since.

`mpo report WORKDIR`, or `python -m mpo_jax.render --run=WORKDIR`.
"""

from absl import flags
from etils import epath

from mpo_jax import artifacts, command
from mpo_jax.errors import InputError
from mpo_jax.evaluation import report
from mpo_jax.stages import kinds


def define() -> None:
    flags.DEFINE_string("run", None, "The run's folder; may stand without the flag's name.")


def work() -> None:
    workdir = epath.Path(command.required(flags.FLAGS.run, "run", "the --workdir of a run"))
    if not (workdir / artifacts.STAGES_FILE).exists():
        raise InputError(f"--run: {workdir} holds no {artifacts.STAGES_FILE}; expected the --workdir of a run")
    print(f"report: {report.write(workdir, kinds.shown())}")


def run() -> None:
    command.start(define, work, folders="run")


if __name__ == "__main__":
    run()
