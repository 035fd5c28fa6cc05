"""A program of a stage enters; what its compiler says of it leaves: memory of one chip, work, traffic, collectives.

Nothing runs: arguments are shapes. Where the compiler gives up for want of memory, the figure it names is kept.
"""

import collections
import dataclasses
import re
import time
from typing import Any

import jax

from mpo_jax.errors import InputError
from mpo_jax.planning import arithmetic, hlo, work
from mpo_jax.planning import known as kept
from mpo_jax.planning.chips import GIB, Topology
from mpo_jax.planning.known import Compiled, Known
from mpo_jax.stages.programs import Program, device_bytes


@dataclasses.dataclass(frozen=True)
class Report:
    """One program on one chip; all in bytes, unless named otherwise.

    arguments: what it is called with. held: what else lies in memory meanwhile. temporaries: what it needs in between.
    peak: all of it, results that reuse no argument included. flops: of its matrix products, on one chip. needed: those
    of them that are not computed again. moved: in the chip's memory. collectives: kind -> bytes on one chip. largest:
    the biggest temporary, and where it comes from. source: "compiler" or "arithmetic". seconds_to_compile: 0.0 for
    arithmetic. alone: those of the collectives' bytes during which the chip computes nothing; {} for arithmetic, which
    can't tell.
    """

    arguments: int
    held: int
    temporaries: int
    peak: int
    fits: bool
    flops: float
    needed: float
    moved: float
    collectives: dict[str, int]
    largest: str
    source: str
    seconds_to_compile: float = 0.0
    alone: dict[str, int] = dataclasses.field(default_factory=dict)
    text: str = dataclasses.field(default="", repr=False)


def report(program: Program, topology: Topology, mesh, keep_text: bool = False, known: Known | None = None) -> Report:
    """Compiles a program for a topology (under `jax.set_mesh`), or reckons where no compiler of that hardware is.

    keep_text: keep the compiled program's text too. known: is asked first, and takes what is compiled here.
    """
    traced = program.function.trace(*program.arguments)
    flops, needed = (count(traced.jaxpr, program.extent.loops) / topology.size for count in (work.flops, work.needed))
    held, arguments = memory_held(program)
    if not topology.compiled:
        temporaries = arithmetic.temporaries(program.extent, mesh)
        moved, sent = arithmetic.moved(program.extent, mesh), arithmetic.collectives(program.extent, mesh)
        peak = arguments + held + temporaries
        fits = peak <= topology.chip.memory
        return Report(arguments, held, temporaries, peak, fits, flops, needed, moved, sent, "", "arithmetic")
    found = _compile(traced.lower(), topology, program.extent.loops, known)
    # Arguments that the program does not read are dropped from it, but lie in memory all the same.
    arguments = max(arguments, found.arguments)
    temporaries = found.temporaries + found.results if not found.used else max(0, found.used - arguments)
    peak = held + (arguments + temporaries if not found.used else found.used)
    return Report(
        arguments=arguments,
        held=held,
        temporaries=temporaries,
        peak=peak,
        fits=not found.used and peak <= topology.chip.memory,
        flops=flops,
        needed=needed,
        moved=found.moved,
        collectives=found.collectives,
        largest=found.largest,
        source="compiler",
        seconds_to_compile=found.seconds,
        alone=found.alone,
        text=found.text if keep_text else "",
    )


def _compile(lowered: Any, topology: Topology, loops: tuple[int, int], known: Known | None) -> Compiled:
    """What the compiler makes of a lowered program, or made of an equal one: same operations, shapes and shardings."""
    digest = kept.digest(topology.name, loops, lowered.as_text())
    found = known.get(digest) if known is not None else None
    if found is not None:
        return found
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used, largest = _out_of_memory(error)
        found = Compiled(used=used, largest=largest, seconds=time.perf_counter() - began)
    else:
        seconds, memory, text = time.perf_counter() - began, compiled.memory_analysis(), compiled.as_text()
        module = hlo.parse(text, loops)
        kinds: dict[str, int] = collections.Counter()
        alone: dict[str, int] = collections.Counter()
        for each in module.collectives():
            kinds[each.kind] += each.bytes * each.times
            if each.alone:
                alone[each.kind] += each.bytes * each.times
        found = Compiled(
            arguments=memory.argument_size_in_bytes,
            results=max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
            temporaries=memory.temp_size_in_bytes,
            moved=float(module.bytes_moved()),
            collectives=dict(kinds),
            alone=dict(alone),
            largest=_largest(module),
            seconds=seconds,
            text=text,
        )
    if known is not None:
        known.put(digest, found)
    return found


def memory_held(program: Program) -> tuple[int, int]:
    """Bytes on one device of what lies in memory beside the arguments, and of the arguments; each array counts once."""
    arguments = {id(leaf): leaf for leaf in jax.tree.leaves(program.arguments)}
    others = {id(leaf): leaf for leaf in jax.tree.leaves(program.held) if id(leaf) not in arguments}
    return device_bytes(list(others.values())), device_bytes(list(arguments.values()))


def _largest(module: hlo.Module) -> str:
    found = next(iter(module.buffers()), None)
    if found is None:
        return ""
    array, instruction = found
    sizes = ",".join(map(str, array.shape))
    return f"{array.bytes / GIB:.2f} GiB {array.dtype}[{sizes}] {instruction.op_name or instruction.name}"


_USED = re.compile(r"Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _out_of_memory(error: Exception) -> tuple[int, str]:
    """Bytes that the program would need, and its largest allocation, from the compiler's message."""
    message = str(error)
    found = _USED.search(message)
    if found is None:
        raise InputError(f"the compiler gives up: {' '.join(message.split())[:300]}") from error
    used = int(float(found.group(1)) * _UNITS[found.group(2)])
    size, shape, origin = (
        re.search(pattern, message) for pattern in (r"Size: (\S+)", r"Shape: (\S+)", r'op_name="([^"]*)"')
    )
    return used, " ".join(each.group(1) for each in (size, shape, origin) if each)
