"""A graph of stages enters; every stage that is not done is run, in order, and leaves its artifact and a manifest.

Finished stages are skipped, an unfinished one resumes, a changed one runs again under a new key.
"""

import contextlib
import dataclasses
import functools
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from mpo_jax import (
    artifacts,
    disk,
    eta,
    graph,
    heading,
    locks,
    metrics,
    processes,
    profiling,
    progress,
    provenance,
    sharding,
    states,
    stopping,
    store,
)  # fmt: skip
from mpo_jax.artifacts import POLICY, REWARD
from mpo_jax.errors import InputError, Stopped
from mpo_jax.evaluation import report, signatures
from mpo_jax.evaluation.sections import Finished
from mpo_jax.graph import Inputs, Node
from mpo_jax.models import hf, hub
from mpo_jax.models.presets import Preset
from mpo_jax.run import Run, StageMesh, as_json, mesh_of, sources_of
from mpo_jax.scorers import names
from mpo_jax.stages import ahead, corpus, kinds
from mpo_jax.stages import job as jobs
from mpo_jax.stages.base import Training
from mpo_jax.stages.job import Job
from mpo_jax.stages.nonfinite import NonFinite
from mpo_jax.states import DONE, STALE, UNFINISHED, statuses

Amount = Callable[[Job, int], float | None]
"""(job, records of the data) -> how much a stage has to compute, in any unit; None: nobody knows."""


def check(config: Run, workdir: epath.Path, mesh, only: Iterable[str] = (), preset: Preset | None = None) -> set[str]:
    """All that can be known to be wrong before anything is loaded, compiled or written, of every stage of the graph.

    The stages that are wanted: those of `only` with what they need, or all. preset: the base model where it is known by
    its numbers alone. InputError, by key, for what is wrong.
    """
    inputs = graph.connections(config)
    wanted = graph.needed(inputs, only)
    if not store.is_remote(workdir) and workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir: {workdir} is no folder; expected one, or a name that is not taken")
    meshes(config, mesh)
    if preset is None:
        try:
            hf.resolve(config.model.path)
        except InputError as error:
            raise InputError(f"model.path: {error}") from None
    check_jobs(plan_jobs(config, workdir, mesh, inputs, preset))
    return wanted


def check_jobs(planned: Iterable[Job], around: Callable[[Job], Any] = contextlib.nullcontext) -> None:
    """Every stage's own check, all that is wrong told together. around: (job) -> a context that each is checked in."""
    told: list[str] = []
    known: set[Any] = set()  # meshes on which the run's own check was made
    for job in planned:
        first = job.mesh not in known
        known.add(job.mesh)
        for each in ([jobs.check] if first else []) + [kinds.of(job.settings).check]:
            try:
                with around(job):
                    each(job)
            except InputError as error:
                told += str(error).split("\n")
    if told:
        raise InputError("\n".join(dict.fromkeys(told)))


def plan_jobs(
    config: Run, workdir: epath.Path, mesh, inputs: Mapping[str, Inputs], preset: Preset | None = None
) -> Iterable[Job]:
    """The job of every stage of the graph, with folders that need not be there. mesh: the run's."""
    own = meshes(config, mesh)
    folders = {name: workdir / name for name in inputs}
    for name, above in inputs.items():
        stage = config.stages[name]
        taken = graph.artifacts(config, above, stage, folders)
        yield Job(name, stage, config, folders[name], workdir, taken, own[name], preset, planned=True)


def meshes(config: Run, mesh) -> dict[str, Any]:
    """The mesh of every stage: the run's, or the same devices divided as the stage says. InputError, by the stages'
    keys, where that can't be."""
    found, told = {}, []
    for name, stage in config.stages.items():
        try:
            found[name] = mesh if stage.mesh == StageMesh() else sharding.divided(mesh, mesh_of(config, stage))
        except InputError as error:
            told.append(f"stages.{name}.{error}")
    if told:
        raise InputError("\n".join(told))
    return found


def check_tokenizer(config: Run, workdir: epath.Path, mesh, names: Iterable[str]) -> None:
    """InputError for what is wrong with the model's tokenizer in view of the data that the stages named read."""
    own = meshes(config, mesh)
    for name in {tuple(sources_of(config.stages[name])): name for name in names}.values():
        jobs.check_tokenizer(Job(name, config.stages[name], config, workdir / name, workdir, {}, own[name]))


def run(
    config: Run,
    workdir: epath.Path,
    mesh,
    only: Iterable[str] = (),
    profile: profiling.Wanted | None = None,
    wait: bool = False,
    amount: Amount = lambda job, pairs: None,
) -> dict[str, Node]:
    """Runs every stage that is not done (or those of `only`, with what they need), in order.

    profile: steps of a stage of which a device trace is written. wait: for a stage that another run is at work on,
    rather than to raise InputError. amount: for the ETA of stages that were never measured."""
    metrics.compiles()  # from here on progress is told of them
    with progress.shown(jobs.is_first()), disk.full_disk_told(workdir):
        return _run(config, workdir, mesh, only, profile, wait, amount)


def _run(
    config: Run,
    workdir: epath.Path,
    mesh,
    only: Iterable[str],
    profile: profiling.Wanted | None,
    wait: bool,
    amount: Amount,
) -> dict[str, Node]:
    for model in _models(config):
        hub.pin(model)
    wanted = check(config, workdir, mesh, only)
    locks.check_shared(workdir)
    nodes = graph.resolve(config, workdir)
    order = [name for name in nodes if name in wanted]
    found = statuses(config, nodes)
    waiting = [name for name in order if found[name].state != DONE]
    if profile is not None and profile.stage not in waiting:
        expected = f"expected one of {', '.join(waiting)}" if waiting else "nothing is left to run"
        raise InputError(f"--profile: stage {profile.stage!r} will not run; {expected}")
    checked = processes.told(
        functools.partial(_check_data, config, workdir, mesh, [nodes[name] for name in waiting]), "data checked"
    )
    with locks.held(workdir / artifacts.LOCKS / artifacts.STAGES_FILE, "the list of stages", wait=True):
        if jobs.is_first():
            folders = {name: node.folder.name for name, node in nodes.items()}
            artifacts.write_json(workdir / artifacts.STAGES_FILE, folders)
            if checked != _checked(workdir):
                artifacts.write_json(workdir / artifacts.CACHE / artifacts.CHECKED, checked)
    here = _Here(config, workdir, mesh, nodes, profile, wait, _amounts(config, workdir, mesh, amount))
    if jobs.is_first():
        done = [name for name in order if name not in waiting]
        jobs.say(heading.of_run(config, workdir, mesh, done, waiting, _left(here, waiting)))
    compiled: dict[str, Job] = {}  # ahead, by their stages
    for number, name in enumerate(order, 1):
        left = [each for each in order[number - 1 :] if each in waiting]
        try:
            stopping.obey()
            place = f"stage {number} of {len(order)}: {name}"
            job = compiled.pop(name, None)
            if (following := _next(here, name, left)) is not None:
                compiled[following.name] = following
            with ahead.compiling(following):
                _bring_up(here, nodes[name], place, left, job)
        except Stopped as stopped:
            where = f", at {stopped.where}" if stopped.where else ""
            jobs.say(f"told to stop in stage {name}{where}; the same command goes on from there")
            raise
    if jobs.is_first() and _is_shown(workdir, nodes):  # drawing it takes longer than much of a warm start
        jobs.say(f"report: {workdir / artifacts.REPORT_PAGE}, unchanged; `mpo report {workdir}` writes it again")
    elif jobs.is_first():
        _report(workdir)
    return nodes


@dataclasses.dataclass(frozen=True)
class _Here:
    """A run while it lasts, see `run`."""

    config: Run
    workdir: epath.Path
    mesh: Any
    nodes: Mapping[str, Node]
    profile: profiling.Wanted | None
    wait: bool
    amounts: Callable[[str, int], float | None]


def _bring_up(here: _Here, node: Node, place: str, left: Iterable[str], job: Job | None = None) -> None:
    """Runs a stage, unless it is done; no other run works on it meanwhile. place: which of the run's it is, in words.
    left: the stages that are to be made, this one among them. job: of the stage, where it was compiled ahead."""

    config, workdir = here.config, here.workdir

    def state() -> str:  # process 0's view of the file system is everybody's
        return processes.told_by_first(lambda: statuses(config, here.nodes)[node.name].state.encode()).decode()

    if state() == DONE:
        jobs.say(f"{place}: done before ({node.folder.name})")
        _drop_states(node.folder)  # what a kill may have left
        return
    with locks.held(workdir / artifacts.LOCKS / f"{node.folder.name}.json", f"stage {node.name}", here.wait):
        if (found := state()) == DONE:
            jobs.say(f"{place}: done by another run meanwhile ({node.folder.name})")
            return
        resumed = found == UNFINISHED
        if jobs.is_first():
            jobs.say(f"{place}{' resumed' if resumed else ''} (ETA of the run {_left(here, left)})")
        began = time.perf_counter()
        if found == STALE:
            _set_aside(node, workdir)
        with profiling.of_stage(here.profile, node.name, node.folder, isinstance(node.settings, Training)):
            run_stage(job or _job(here, node), here.nodes, resumed)
        jobs.say(f"{node.name}: finished in {time.perf_counter() - began:.1f} s ({node.folder.name})")
        if jobs.is_first():
            _warn(node)


def _next(here: _Here, name: str, left: Sequence[str]) -> Job | None:
    """The job of the stage that is made after this one, where all of its inputs but weights are there by now. left: the
    stages that are to be made from here on."""
    if len(left) < 2 or name != left[0] or here.profile is not None:
        return None
    node = here.nodes[left[1]]
    job = _job(here, node)
    if not ahead.possible(job):
        return None
    states = statuses(here.config, here.nodes)
    weights = (POLICY, REWARD)
    made = [
        states[name].state == DONE or kinds.of(here.nodes[name].settings).produces in weights for name in node.sources
    ]
    return job if all(made) else None


def _job(here: _Here, node: Node) -> Job:
    """What a stage is handed."""
    folders = {name: each.folder for name, each in here.nodes.items()}
    taken = graph.artifacts(here.config, node.inputs, node.settings, folders)
    mesh = meshes(here.config, here.mesh)[node.name]
    return Job(node.name, node.settings, here.config, node.folder, here.workdir, taken, mesh)


def _warn(node: Node) -> None:
    """Tells known failures of the method that the figures of a stage show, where it ends rather than in the report."""
    made = Finished(node.name, node.folder, artifacts.read_manifest(node.folder) or {"summary": {}})
    for sign in signatures.of_stage(made):
        progress.say(f"warning: {sign}", sys.stderr)


def _left(here: _Here, names: Iterable[str]) -> eta.Eta:
    """How long stages will take."""
    return eta.of_stages(names, here.config, eta.measured(here.workdir), eta.devices(here.mesh), here.amounts)


def _amounts(config: Run, workdir: epath.Path, mesh, amount: Amount) -> Callable[[str, int], float | None]:
    """(stage, records of the data) -> how much there is to compute, asked once; None where that can't be said."""

    @functools.cache
    def planned() -> dict[str, Job]:
        return {job.name: job for job in plan_jobs(config, workdir, mesh, graph.connections(config))}

    @functools.cache
    def of(name: str, pairs: int) -> float | None:
        try:
            return amount(planned()[name], pairs)
        except InputError:
            return None

    return of


def _check_data(config: Run, workdir: epath.Path, mesh, waiting: Iterable[Node]) -> list[str]:
    """InputError for what is wrong with the data that stages will read, as far as `corpus.check_data` tells, or with
    the tokenizer; what was found right under the same settings and contents is not opened. The hashes (`Node.shared`)
    of all that is right."""
    before = _checked(workdir)
    new = [node for node in waiting if sources_of(node.settings) and node.shared not in before]
    read = dict.fromkeys(source for node in new for source in sources_of(node.settings))
    corpus.check_data(config.data, read)
    check_tokenizer(config, workdir, mesh, [node.name for node in new])
    return list(dict.fromkeys([*before, *(node.shared for node in new)]))


def _checked(workdir: epath.Path) -> list[str]:
    return artifacts.read_json(workdir / artifacts.CACHE / artifacts.CHECKED, default=[])


def _models(config: Run) -> list[str]:
    """What the run loads of models: its base, and those that score."""
    named = [names.terms(value) for stage in config.stages.values() for value in names.settings_of(stage).values()]
    scorers = {name.removeprefix(names.HF) for terms in named for name in terms if name.startswith(names.HF)}
    return [config.model.path, *sorted(scorers)]


def _is_shown(workdir: epath.Path, nodes: Mapping[str, Node]) -> bool:
    """Whether the report is there and younger than every finished stage."""
    page = workdir / artifacts.REPORT_PAGE
    if not page.exists():
        return False
    made = [node.folder / artifacts.MANIFEST for node in nodes.values()]
    return all(path.stat().mtime < page.stat().mtime for path in made if path.exists())


def _report(workdir: epath.Path) -> None:
    """All stages are done: a page that can't be written must not make the run a failed one."""
    try:
        progress.say(f"report: {report.write(workdir, kinds.shown())}")
    except Exception as error:
        progress.say(f"report: not written: {type(error).__name__}: {error}", sys.stderr)


def run_stage(job: Job, nodes: Mapping[str, Node], resumed: bool = False) -> None:
    """Runs one stage, writes its manifest and, as the last thing, drops what it could have resumed from. What the stage
    reads of others is restored straight onto its own mesh. resumed: whether a part of it was done before."""
    began = time.perf_counter()
    config, node, kind = job.config, nodes[job.name], kinds.of(job.settings)
    kind.check(job)
    origin = provenance.of_stage(config, node) if jobs.is_first() else {}
    processes.first(functools.partial(_verify, [nodes[source].folder for source in node.sources]))
    inputs = states.inputs(nodes, node)
    if jobs.is_first():
        node.folder.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(node.folder / artifacts.CONFIG, as_json(config))
        artifacts.write_json(node.folder / artifacts.INPUTS, inputs)
    processes.barrier(f"{node.name} begun")
    with jax.set_mesh(job.mesh):
        try:
            summary = kind.run(job)
        except NonFinite as error:
            raise InputError(f"stages.{node.name}: {error}") from error
    processes.barrier(f"{node.name} finished")
    if jobs.is_first():
        manifest = {
            "name": node.name,
            "kind": node.kind,
            "produces": kind.produces,
            "key": node.key,
            "made": uuid.uuid4().hex,
            "shared": node.shared,
            "inputs": inputs,
            "vocabulary": jobs.model(job).vocab_size,
            "seconds": None if resumed else time.perf_counter() - began,
            "devices": eta.devices(job.mesh),
            "data": [account.as_json() for account in job.accounts],
            "summary": summary,
        }
        artifacts.write_manifest(node.folder, manifest | origin)
    _drop_states(node.folder)
    processes.barrier(f"{node.name} written")


def _drop_states(folder: epath.Path) -> None:
    """Deletes what a stage could have resumed from, the states of a training and the shards of other work: one that is
    done is read for its weights and tables alone. Its manifest is on disk by now, so that a kill in the midst of this
    leaves it done."""
    for name in (artifacts.CHECKPOINTS, artifacts.SHARDS):
        if jobs.is_first() and (folder / name).exists():
            (folder / name).rmtree()


def _verify(folders: Iterable[epath.Path]) -> None:
    """InputError where a finished stage's files are not as they were written."""
    for folder in folders:
        artifacts.verify(folder)


def _set_aside(node: Node, workdir: epath.Path) -> None:
    """Moves what an earlier making left under the same key, so that nothing is overwritten. What it was made from goes
    last: until then the stage is known to be stale."""
    if node.folder.exists() and jobs.is_first():
        target = workdir / artifacts.SET_ASIDE / f"{node.folder.name}-{uuid.uuid4().hex[:8]}"
        store.move(node.folder, target, last=artifacts.INPUTS)
        jobs.say(f"{node.name}: its earlier result was moved to {target}")
    processes.barrier(f"{node.name} set aside")
