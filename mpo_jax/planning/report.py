"""The plans of a run's stages enter; a table for people, and JSON for programs, leave."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mpo_jax.planning import storage
from mpo_jax.planning.chips import GIB, Topology
from mpo_jax.planning.estimate import Assumptions
from mpo_jax.planning.proposal import Proposal
from mpo_jax.planning.stages import Planned, StagePlan
from mpo_jax.planning.tune import Tuned, mesh_name
from mpo_jax.run import Run


def heading(config: Run, topology: Topology, mesh: Mapping[str, int], assumptions: Assumptions) -> str:
    """What was planned, and what was assumed."""
    data = config.data
    source = "by the compiler of that hardware" if topology.compiled else "BY ARITHMETIC, not by a compiler"
    return (
        f"{config.name}: {config.model.path} on {topology.name}, {topology.size} x {topology.chip.name} with "
        f"{topology.chip.memory / GIB:.2f} GiB each, mesh {_sizes(mesh)}\n"
        f"memory {source}; rows of at most {data.max_length} tokens, replies of {data.max_response}; seconds and "
        f"chip-hours are estimates: {assumptions.pairs:,} pairs{_read(assumptions)}, {assumptions.easy:.0%} of them "
        f"easy, {assumptions.utilisation:.0%} of a chip's peak"
    )


def _read(assumptions: Assumptions) -> str:
    """Where chip-hours take the rows' lengths from."""
    found = assumptions.lengths
    if found is None:
        return " of unknown lengths (chip-hours: from the shortest to the longest that the settings allow)"
    return f" read from the data (chip-hours by the lengths of {len(found.pieces):,} of them; sampled replies unknown)"


def hours(least: float, most: float) -> str:
    """A range, or one figure where both ends are the same."""
    ends = [f"{each:,.1f}" if most < 10 else f"{each:,.0f}" for each in (least, most)]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


COLUMNS = (
    f"{'stage':24} {'arguments':>9} {'held':>7} {'temp.':>7} {'peak GiB':>8} fits {'TFLOP':>8} {'moved GB':>8} "
    f"{'sent GB':>8} {'s a call':>9} waits for   {'MFU <=':>6} {'calls':>8} {'chip-hours':>12}"
)


def lines(name: str, plan: StagePlan) -> str:
    """A line for each program, then what its biggest temporary and its collectives are; last, the stage's disk, the MFU
    of all programs together, and the mesh where it has one of its own."""
    found = []
    for program, planned in plan.programs.items():
        report, seconds = planned.report, planned.seconds
        sent = sum(report.collectives.values())
        found.append(
            f"{name + '/' + program:24} {report.arguments / GIB:9.2f} {report.held / GIB:7.2f} "
            f"{report.temporaries / GIB:7.2f} {report.peak / GIB:8.2f} {'yes ' if report.fits else 'NO  '} "
            f"{report.flops / 1e12:8.1f} {report.moved / 1e9:8.1f} {sent / 1e9:8.2f} {seconds.total:9.3f} "
            f"{seconds.bound:11} {planned.mfu:6.1%} {math.ceil(planned.calls):8,} "
            f"{hours(planned.least_seconds * plan.chips / 3600, planned.total_seconds * plan.chips / 3600):>12}"
        )
        if report.collectives:
            kinds = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in sorted(report.collectives.items()))
            found.append(f"    {kinds}")
        if planned.alone:
            found.append(
                f"    {sum(report.alone.values()) / 1e9:.2f} GB of these are sent while the chip computes nothing, "
                f"{planned.alone:.3f} s a call"
            )
        if report.largest:
            found.append(f"    biggest temporary: {report.largest}")
    disk = plan.storage
    found.append(
        f"    disk of {name}: {disk.rest / GIB:.2f} GiB at rest, {disk.peak / GIB:.2f} GiB at its peak "
        f"(weights {disk.weights / GIB:.2f}, checkpoints {disk.states / GIB:.2f}, rows at most {disk.rows / GIB:.2f}"
        + (f", snapshots {disk.snapshots / GIB:.2f})" if disk.snapshots else ")")
    )
    if len(plan.programs) > 1:
        found.append(f"    MFU of {name}: at most {plan.mfu:.1%} in all, if every row had the largest length")
    if plan.mesh:
        found.append(f"    mesh of {name}: {_sizes(plan.mesh)}")
    return "\n".join(found)


def _sizes(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in mesh.items())


def disk_line(plans: Mapping[str, StagePlan]) -> str:
    """What the workdir needs for the stages planned, in their order."""
    each = [plan.storage for plan in plans.values()]
    rest = sum(one.rest for one in each)
    return f"disk: {rest / GIB:,.2f} GiB at rest, {storage.peak(each) / GIB:,.2f} GiB at its peak"


def proposal_line(name: str, proposal: Proposal) -> str:
    if proposal.plan is None:
        return f"    {name} does not fit, nor with any of {proposal.tried} changes tried; take a larger topology"
    peak = proposal.plan.peak / GIB
    return f"    {name} does not fit; it does ({peak:.2f} GiB) with: {' '.join(proposal.flags)}"


def tuned_lines(tuned: Tuned) -> str:
    """For every stage what it takes now, and with the settings found; then the mesh for all, and for each alone."""
    found = []
    for name, before in tuned.before.items():
        best = tuned.stages[name][tuned.mesh]
        if not best.changes and tuned.mesh == tuned.now:
            found.append(f"    {name}: {before.seconds:,.0f} s; nothing that was tried is faster")
            continue
        found.append(
            f"    {name}: {before.seconds:,.0f} s and {before.peak / GIB:.2f} GiB become {best.plan.seconds:,.0f} s "
            f"and {best.plan.peak / GIB:.2f} GiB with: {' '.join(tuned.flags(name, tuned.mesh)) or 'the mesh alone'}"
        )
    now = sum(plan.seconds for plan in tuned.before.values())
    flags = tuned.mesh_flags
    found.append(
        f"    all: {now:,.0f} s become {tuned.seconds(tuned.mesh):,.0f} s on the mesh "
        f"{mesh_name(tuned.mesh)}{': ' + ' '.join(flags) if flags else ', which is the present one'} (estimates)"
    )
    alone = {name: tuned.best_mesh(name) for name in tuned.stages}
    found += [
        f"    {name} alone would take {tuned.stages[name][mesh].plan.seconds:,.0f} s on {mesh_name(mesh)} with: "
        f"{' '.join(tuned.flags(name, mesh)) or 'the settings that it has'}"
        for name, mesh in alone.items()
        if mesh != tuned.mesh
    ]
    keyed = [name for name, tried in tuned.stages.items() if "batch_size" in tried[tuned.mesh].changes]
    if keyed:
        found.append(
            f"    batch_size of {', '.join(keyed)} changes no reply but enters the stage's key: set it before the run"
        )
    found.append(
        f"{tuned.reckoned} settings reckoned, {tuned.compiled} programs compiled for them"
        f"{'' if tuned.complete else '; more would have been: --compiles allows no more'}"
    )
    return "\n".join(found)


def as_json(
    topology: Topology,
    mesh: Mapping[str, int],
    plans: Mapping[str, StagePlan],
    proposals: Mapping[str, Proposal],
    assumptions: Assumptions,
    tuned: Tuned | None = None,
) -> dict[str, Any]:
    return {
        "topology": topology.name,
        "chips": topology.size,
        "chip": topology.chip.name,
        "memory_per_chip": topology.chip.memory,
        "source": "compiler" if topology.compiled else "arithmetic",
        "mesh": dict(mesh),
        "assumptions": {
            "pairs": assumptions.pairs,
            "easy": assumptions.easy,
            "utilisation": assumptions.utilisation,
            "lengths": "unknown" if assumptions.lengths is None else "data",
        },
        "disk_bytes_at_rest": sum(plan.storage.rest for plan in plans.values()),
        "disk_bytes_at_peak": storage.peak(plan.storage for plan in plans.values()),
        "tuned_mesh": mesh_name(tuned.mesh) if tuned else None,
        "stages": {name: _stage(name, plan, mesh, proposals.get(name), tuned) for name, plan in plans.items()},
    }


def _stage(
    name: str, plan: StagePlan, mesh: Mapping[str, int], proposal: Proposal | None, tuned: Tuned | None
) -> dict[str, Any]:
    found = {
        "fits": plan.fits,
        "mesh": dict(plan.mesh or mesh),
        "peak_bytes_per_chip": plan.peak,
        "seconds_estimate": plan.seconds,
        "chip_hours_estimate": plan.chip_hours,
        "mfu_at_most": plan.mfu,
        "least_chip_hours_estimate": plan.least_chip_hours,
        "disk": dataclasses.asdict(plan.storage),
        "disk_bytes_at_rest": plan.storage.rest,
        "disk_bytes_at_peak": plan.storage.peak,
        "programs": {name: _program(planned) for name, planned in plan.programs.items()},
    }
    if proposal is not None:
        found["proposal"] = list(proposal.flags) if proposal.plan is not None else None
    if tuned is not None and name in tuned.stages:
        found["tuned"] = [
            {
                "mesh": mesh_name(mesh),
                "flags": list(tuned.flags(name, mesh)),
                "fits": tried.plan.fits,
                "peak_bytes_per_chip": tried.plan.peak,
                "seconds_estimate": tried.plan.seconds,
            }
            for mesh, tried in tuned.stages[name].items()
        ]
    return found


def _program(planned: Planned) -> dict[str, Any]:
    report = planned.report
    return {
        "fits": report.fits,
        "source": report.source,
        "argument_bytes": report.arguments,
        "held_bytes": report.held,
        "temporary_bytes": report.temporaries,
        "peak_bytes_per_chip": report.peak,
        "flops_per_chip": report.flops,
        "model_flops_per_chip": report.needed,
        "bytes_moved_per_chip": report.moved,
        "collective_bytes_per_chip": report.collectives,
        "collective_bytes_alone_per_chip": report.alone,
        "seconds_of_collectives_alone": planned.alone,
        "biggest_temporary": report.largest,
        "seconds_estimate": planned.seconds.total,
        "waits_for": planned.seconds.bound,
        "mfu_at_most": planned.mfu,
        "calls_estimate": planned.calls,
        "seconds_to_compile": report.seconds_to_compile,
    }
