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
from mpo_jax.planning.tune import Tuned
from mpo_jax.run import Run


def heading(config: Run, topology: Topology, mesh: Mapping[str, int], assumptions: Assumptions) -> str:
    """What was planned, and what was assumed."""
    data = config.data
    source = "by the compiler of that hardware" if topology.compiled else "BY ARITHMETIC, not by a compiler"
    return (
        f"{config.name}: {config.model.path} on {topology.name}, {topology.size} x {topology.chip.name} with "
        f"{topology.chip.memory / GIB:.2f} GiB each, mesh {_sizes(mesh)}\n"
        f"memory {source}; rows of at most {data.max_length} tokens, replies of {data.max_response}; seconds and "
        f"chip-hours are estimates: {assumptions.pairs:,} pairs, {assumptions.easy:.0%} of them easy, "
        f"{assumptions.utilisation:.0%} of a chip's peak"
    )


COLUMNS = (
    f"{'stage':24} {'arguments':>9} {'held':>7} {'temp.':>7} {'peak GiB':>8} fits {'TFLOP':>8} {'moved GB':>8} "
    f"{'sent GB':>8} {'s a call':>9} waits for   {'calls':>8} {'chip-hours':>10}"
)


def lines(name: str, plan: StagePlan) -> str:
    """A line for each program, then what its biggest temporary and its collectives are; last, the stage's disk, and the
    mesh where it has one of its own."""
    found = []
    for program, planned in plan.programs.items():
        report, seconds = planned.report, planned.seconds
        sent = sum(report.collectives.values())
        found.append(
            f"{name + '/' + program:24} {report.arguments / GIB:9.2f} {report.held / GIB:7.2f} "
            f"{report.temporaries / GIB:7.2f} {report.peak / GIB:8.2f} {'yes ' if report.fits else 'NO  '} "
            f"{report.flops / 1e12:8.1f} {report.moved / 1e9:8.1f} {sent / 1e9:8.2f} {seconds.total:9.3f} "
            f"{seconds.bound:11} {math.ceil(planned.calls):8,} {planned.total_seconds * plan.chips / 3600:10.1f}"
        )
        if report.collectives:
            kinds = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in sorted(report.collectives.items()))
            found.append(f"    {kinds}")
        if report.largest:
            found.append(f"    biggest temporary: {report.largest}")
    disk = plan.storage
    found.append(
        f"    disk of {name}: {disk.rest / GIB:.2f} GiB at rest, {disk.peak / GIB:.2f} GiB at its peak "
        f"(weights {disk.weights / GIB:.2f}, checkpoints {disk.states / GIB:.2f}, rows at most {disk.rows / GIB:.2f})"
    )
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


def tuned_line(name: str, before: StagePlan, tuned: Tuned) -> str:
    """What the stage takes now, and with the settings found."""
    if not tuned.flags:
        return f"    {name}: nothing of {tuned.tried} settings tried is faster"
    return (
        f"    {name}: {before.seconds:,.0f} s and {before.peak / GIB:.2f} GiB become {tuned.plan.seconds:,.0f} s and "
        f"{tuned.plan.peak / GIB:.2f} GiB (estimate; {tuned.tried} tried) with: {' '.join(tuned.flags)}"
    )


def as_json(
    topology: Topology,
    mesh: Mapping[str, int],
    plans: Mapping[str, StagePlan],
    proposals: Mapping[str, Proposal],
    assumptions: Assumptions,
    tuned: Mapping[str, Tuned] | None = None,
) -> dict[str, Any]:
    return {
        "topology": topology.name,
        "chips": topology.size,
        "chip": topology.chip.name,
        "memory_per_chip": topology.chip.memory,
        "source": "compiler" if topology.compiled else "arithmetic",
        "mesh": dict(mesh),
        "assumptions": dataclasses.asdict(assumptions),
        "disk_bytes_at_rest": sum(plan.storage.rest for plan in plans.values()),
        "disk_bytes_at_peak": storage.peak(plan.storage for plan in plans.values()),
        "stages": {
            name: _stage(plan, mesh, proposals.get(name), (tuned or {}).get(name)) for name, plan in plans.items()
        },
    }


def _stage(plan: StagePlan, mesh: Mapping[str, int], proposal: Proposal | None, tuned: Tuned | None) -> dict[str, Any]:
    found = {
        "fits": plan.fits,
        "mesh": dict(plan.mesh or mesh),
        "peak_bytes_per_chip": plan.peak,
        "seconds_estimate": plan.seconds,
        "chip_hours_estimate": plan.chip_hours,
        "disk": dataclasses.asdict(plan.storage),
        "disk_bytes_at_rest": plan.storage.rest,
        "disk_bytes_at_peak": plan.storage.peak,
        "programs": {name: _program(planned) for name, planned in plan.programs.items()},
    }
    if proposal is not None:
        found["proposal"] = list(proposal.flags) if proposal.plan is not None else None
    if tuned is not None:
        found["tuned"] = {
            "flags": list(tuned.flags),
            "tried": tuned.tried,
            "peak_bytes_per_chip": tuned.plan.peak,
            "seconds_estimate": tuned.plan.seconds,
        }
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
        "bytes_moved_per_chip": report.moved,
        "collective_bytes_per_chip": report.collectives,
        "biggest_temporary": report.largest,
        "seconds_estimate": planned.seconds.total,
        "waits_for": planned.seconds.bound,
        "calls_estimate": planned.calls,
        "seconds_to_compile": report.seconds_to_compile,
    }
