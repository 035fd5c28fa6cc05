"""The job of a stage that is to come enters; what it will call is compiled while the stage before it is at work.

The job keeps the programs, and the stage must be handed the same. Nothing is compiled ahead on several hosts: to read
the stage's rows they would have to meet, while the other stage's collectives are under way. Nor on a GPU, on which XLA
times kernels while it compiles; nor on several virtual devices of one CPU, which wait for each other in the threads
that XLA compiles in; nor on a CPU of few processors, which a stage that computes on it leaves no time for.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator

import jax

from mpo_jax import progress
from mpo_jax.errors import InputError
from mpo_jax.stages import kinds
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.job import Job

PROCESSORS = 4
"""Of a host whose CPU is the device, at least. On two, a stage became slower by as much as the next one gained."""


def possible(job: Job) -> bool:
    """Whether a stage's programs can be compiled before it begins."""
    spare = job.mesh.size == 1 and shapes.processors() >= PROCESSORS
    free = job.platform == "tpu" or (job.platform == "cpu" and spare)
    return free and job.config.compile_next and jax.process_count() == 1


@contextlib.contextmanager
def compiling(job: Job | None) -> Iterator[None]:
    """While a stage runs in the context, a thread compiles what `job` will call, once `programs.AT_WORK` says that
    there is time. When the stage ends, the program that is being compiled is waited for, and no other is begun: what is
    left, the next stage compiles side by side."""
    shapes.AT_WORK.clear()
    if job is None:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_compile, args=(job, over), name=f"compile {job.name}")
    try:
        thread.start()
        yield
    finally:
        over.set()
        shapes.AT_WORK.set()
        progress.compiling(f"a program of {job.name}")
        thread.join()
        progress.compiled()


def _compile(job: Job, over: threading.Event) -> None:
    shapes.AT_WORK.wait()
    try:
        with progress.aside():
            with jax.set_mesh(job.mesh):
                wanted = [] if over.is_set() else shapes.different(kinds.of(job.settings).calls(job))
            for call in wanted:
                if over.is_set():
                    return
                shapes.compile_call(job.mesh, call)
    except InputError:
        pass  # it can't be told yet, or the stage itself will say what is wrong
    except Exception as error:  # nothing of the run depends on it
        progress.say(f"{job.name}: not compiled ahead: {type(error).__name__}: {error}", sys.stderr)
    finally:
        job.accounts.clear()  # of the data that was read here; the stage reads it, and tells of it, itself
