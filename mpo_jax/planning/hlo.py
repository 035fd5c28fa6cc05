"""The text of a compiled program enters; its collectives, the memory it moves and its largest buffers leave.

XLA's own cost analysis counts the body of a loop once; here a loop counts as often as it runs, as far as the text says.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

_SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2,
          "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8}  # fmt: skip
_ARRAY = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%([\w.\-]+)")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = " between slices"
"""What ends the kind of a collective that the compiler has made into sends over the network between slices."""
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "iota",
         "after-all", "partition-id", "replica-id", "async-start", "async-update"}  # fmt: skip
"""Instructions that move nothing themselves; nor does what ends another, `-done`."""


@dataclasses.dataclass(frozen=True)
class Array:
    """dtype and shape of a result; in_hbm: not in a memory on the core."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool = True

    @property
    def bytes(self) -> int:
        size = _SIZES.get(self.dtype, 4)
        for each in self.shape:
            size *= each
        return int(size)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """Where in the source program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program. bytes: of its larger side, on one device, each time. times: how often it runs.
    alone: nothing is computed while it travels, because the program waits for its end where it begins."""

    kind: str
    arrays: tuple[Array, ...]
    bytes: int
    times: int
    op_name: str
    computation: str
    alone: bool


Computation = dict[str, Instruction]
"""Instructions by name, in order."""


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name. loops: see `parse`."""

    computations: dict[str, Computation]
    entry: str
    loops: tuple[int, int]

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation that is not inside a fusion runs."""
        counts: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            counts[name] = counts.get(name, 0) + times
            for instruction in self.computations[name].values():
                for called, each in self._called(name, instruction):
                    visit(called, times * each)

        visit(self.entry, 1)
        return counts

    def _called(self, caller: str, instruction: Instruction) -> Iterator[tuple[str, int]]:
        if instruction.opcode == "while":
            yield _named("body", instruction), self.trips(caller, instruction)
        elif instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
            text = (
                branches.group(1)
                if branches
                else " ".join(re.findall(r"(?:true|false)_computation=%[\w.\-]+", instruction.rest))
            )
            yield max(_NAME.findall(text), key=self._size), 1
        elif instruction.opcode in ("call", "async-start"):
            for name in _CALLED.findall(instruction.rest):
                yield name, 1

    def _size(self, name: str) -> int:
        """Bytes of all that a computation and those that it calls write: which branch of a conditional counts."""
        total = 0
        for instruction in self.computations[name].values():
            total += instruction.bytes
            total += sum(times * self._size(called) for called, times in self._called(name, instruction))
        return total

    def trips(self, caller: str, loop: Instruction) -> int:
        """Iterations of a while loop in the computation `caller`: what its text tells, or what `parse` was told."""
        told = self._told(caller, loop)
        if told is not None:
            return told
        innermost, around = self.loops
        return around if self._open(_named("body", loop)) else innermost

    def _open(self, name: str) -> bool:
        """Whether a computation has a loop whose end its text does not tell."""
        for instruction in self.computations[name].values():
            if instruction.opcode == "while" and self._told(name, instruction) is None:
                return True
            if any(self._open(called) for called, _ in self._called(name, instruction)):
                return True
        return False

    def _told(self, caller: str, loop: Instruction) -> int | None:
        """What XLA knows of a loop's iterations, or what its counter's bound, start and step make."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known.group(1))
        condition, body = (self.computations[_named(part, loop)] for part in ("condition", "body"))
        root = _root(condition)
        if root.opcode != "compare" or "direction=LT" not in root.rest or len(root.operands) != 2:
            return None
        bound = _constant(condition, root.operands[1])
        if bound is None:
            return None
        start, step = self._counter(caller, loop, body, condition.get(root.operands[0]))
        return max(0, -(-(bound - start) // step))

    def _counter(self, caller: str, loop: Instruction, body: Computation, read: Instruction | None) -> tuple[int, int]:
        """Start and step of the counter that a loop's condition reads; 0 and 1 where the text does not tell. The loops
        in which XLA sends weights around while it multiplies go by two."""
        index = read and re.search(r"index=(\d+)", read.rest)
        if not index or read is None or read.opcode != "get-tuple-element":
            return 0, 1
        place, initial = int(index.group(1)), self.computations[caller].get(loop.operands[0])
        start = (
            _constant(self.computations[caller], initial.operands[place]) if initial and initial.operands[place:] else 0
        )
        result = _source(body, _root(body).operands[place])
        steps = [_constant(body, each) for each in result.operands] if result and result.opcode == "add" else []
        return start or 0, next((each for each in steps if each), 1)

    def collectives(self) -> list[Collective]:
        """Every collective, those inside fusions too, each once for every time that it is begun.

        An asynchronous one is a chain of fusions: one begins it, others carry it on beside their own work, inside
        loops too, and one ends it. All of them hold its text; the computation that runs least often begins it.
        """
        found: dict[tuple, Collective] = {}
        for name, times in self.runs.items():
            for holder, instruction in self._with_fused(name):
                kind = _between_slices(instruction) or instruction.opcode.removesuffix("-start")
                if kind not in COLLECTIVES and not kind.endswith(BETWEEN_SLICES):
                    continue
                chain = re.search(r'(?:chain_id|async_collective_name)="([^"]*)"', instruction.rest)
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                key = (
                    (kind, chain.group(1), channel and channel.group(1)) if chain else (name, holder, instruction.name)
                )
                if key in found and found[key].times <= times:
                    continue
                if kind == "all-reduce" and "all-reduce-scatter" in holder:
                    kind = "reduce-scatter"  # how the TPU compiler writes one: a sum of which each chip keeps a part
                    size = instruction.bytes
                else:
                    size = _payload(instruction)
                alone = not (chain or instruction.opcode.endswith("-start") or kind.endswith(BETWEEN_SLICES))
                found[key] = Collective(kind, instruction.arrays, size, times, instruction.op_name, name, alone)
        return list(found.values())

    def bytes_moved(self) -> int:
        """Bytes read and written in HBM by the instructions of all computations, each as often as it runs."""
        total = 0
        for name, times in self.runs.items():
            computation = self.computations[name]
            for instruction in computation.values():
                if instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
                    total += times * self._traffic(computation, instruction)
        return total

    def buffers(self) -> list[tuple[Array, Instruction]]:
        """Results outside fusions that may need room in HBM, the largest first; arguments are left out."""
        found = []
        for name in self.runs:
            for instruction in self.computations[name].values():
                if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
                    continue
                found += [(array, instruction) for array in instruction.arrays if array.in_hbm]
        return sorted(found, key=lambda each: -each[0].bytes)

    def _with_fused(self, computation: str) -> Iterator[tuple[str, Instruction]]:
        """A computation's instructions and those of its fusions, each with the computation that holds it."""
        for instruction in self.computations[computation].values():
            yield computation, instruction
            if instruction.opcode in ("fusion", "custom-call"):
                for called in _CALLED.findall(instruction.rest):
                    if called in self.computations:
                        yield from self._with_fused(called)

    def _traffic(self, computation: Computation, instruction: Instruction) -> int:
        if instruction.opcode.endswith("-start"):
            return _started(instruction)
        called = self._fused(instruction)
        results, carried = self._carried(instruction, called)
        total = self._written(instruction, called, results)
        for index, operand in enumerate(instruction.operands):
            source = computation.get(operand)
            if source is None or index in carried:
                continue
            if instruction.opcode in ("dynamic-slice", "gather") and index == 0:
                total += instruction.bytes
            elif instruction.opcode == "dynamic-update-slice" and index == 0:
                continue
            else:
                whole = sum(array.bytes for array in source.arrays if array.in_hbm)
                total += self._read(called, index, whole) if called else whole
        return total

    def _fused(self, instruction: Instruction) -> str:
        """The computation of a fusion, "" for any other instruction."""
        found = _CALLED.search(instruction.rest) if instruction.opcode == "fusion" else None
        return found.group(1) if found else ""

    def _carried(self, instruction: Instruction, called: str) -> tuple[set[int], set[int]]:
        """Results and operands of a fusion that belong to a collective under way, which it hands on untouched."""
        aliases = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.rest) if called else None
        if aliases is None:
            return set(), set()
        kinds = {each.opcode for _, each in self._with_fused(called)}
        if not kinds.intersection(COLLECTIVES):
            return set(), set()
        pairs = re.findall(r"\{(\d*)\}: \((\d+),", aliases.group(1))
        return {int(result or 0) for result, _ in pairs}, {int(operand) for _, operand in pairs}

    def _written(self, instruction: Instruction, called: str, carried: set[int]) -> int:
        if instruction.opcode == "dynamic-update-slice":
            return 0  # the update is read, and written in its place: counted with the operands
        sizes = [array.bytes * array.in_hbm for array in instruction.arrays]
        if called:
            root = _root(self.computations[called])
            parts = root.operands if root.opcode == "tuple" else (root.name,)
            if len(parts) == len(sizes):
                sizes = [self._updated(called, part, size) for part, size in zip(parts, sizes, strict=True)]
        return sum(size for index, size in enumerate(sizes) if index not in carried)

    def _updated(self, computation: str, name: str, whole: int) -> int:
        """What a fusion writes of one of its results: the part that it updates in place, or all of it."""
        inside = self.computations[computation]
        each = _source(inside, name)
        if each is not None and each.opcode == "dynamic-update-slice" and len(each.operands) > 1:
            update = inside.get(each.operands[1])
            return min(whole, update.bytes) if update else whole
        if each is not None and (called := self._fused(each)):
            return self._updated(called, _root(self.computations[called]).name, whole)
        return whole

    def _read(self, computation: str, index: int, whole: int) -> int:
        """What a fusion reads of its operand: slices of it, where nothing else reads it, in fusions inside it too."""
        for each in self.computations[computation].values():
            if each.opcode == "parameter" and each.rest.startswith(f"{index})"):
                return self._used(computation, each.name, whole)
        return whole

    def _used(self, computation: str, name: str, whole: int) -> int:
        inside = self.computations[computation]
        total = whole if inside[name].root else 0  # handed out as it is
        for each in inside.values():
            for index in (index for index, operand in enumerate(each.operands) if operand == name):
                if each.opcode in ("dynamic-slice", "gather", "slice") and index == 0:
                    total += each.bytes
                elif each.opcode in ("bitcast", "pad"):
                    total += self._used(computation, each.name, whole)
                elif called := self._fused(each):
                    total += self._read(called, index, whole)
                elif each.opcode != "dynamic-update-slice" or index != 0:
                    return whole
        return min(whole, total)


def parse(text: str, loops: tuple[int, int] = (1, 1)) -> Module:
    """A module from `compiled.as_text()`. loops: iterations of loops whose end the text does not tell: of innermost
    ones, and of those around them."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line)) is not None:
            current[instruction.name] = instruction
    return Module(computations, entry, loops)


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%([\w.\-]+) = (.*)$", line)
    if found is None:
        return None
    text = found.group(3)
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    shape, text = text[:end], text[end:].lstrip()
    start = text.find("(")
    if start < 0:
        return None
    stop = _closing(text, start)
    operands = text[start + 1 : stop]
    literal = text[:start] in ("constant", "parameter")  # what stands in their brackets is no operand
    rest = (operands + ")" if literal else "") + text[stop + 1 :]
    return Instruction(
        found.group(2), text[:start], _arrays(shape), tuple(_NAME.findall(operands)), rest, bool(found.group(1))
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if depth == 0:
                return index
    return len(text) - 1


def _arrays(shape: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(size) for size in sizes.split(",") if size), "S(" not in (layout or ""))
        for dtype, sizes, layout in _ARRAY.findall(shape)
    )


def _started(instruction: Instruction) -> int:
    """What an asynchronous instruction moves: its result names both its sides."""
    if instruction.opcode in ("copy-start", "slice-start"):  # as much as the smaller side holds
        source, target = instruction.arrays[:2]
        return min(source.bytes, target.bytes) * (source.in_hbm + target.in_hbm)
    return sum(array.bytes for array in instruction.arrays if array.in_hbm)


def _between_slices(instruction: Instruction) -> str:
    """The kind of collective that a send over the network is part of; empty for all else."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
    if found is None or instruction.opcode != "send":
        return ""
    return found.group(1).lower().replace("_", "-") + BETWEEN_SLICES


def _payload(instruction: Instruction) -> int:
    """The larger side; a start's result holds its operand too."""
    sizes = [array.bytes for array in instruction.arrays]
    if instruction.opcode.endswith("-start"):
        return max(sizes, default=0)
    if instruction.opcode == "send":  # its context and token stand beside what is sent
        return sizes[0]
    if instruction.opcode == "reduce-scatter":
        return sum(sizes) * _group(instruction.rest)
    return sum(sizes)


def _group(rest: str) -> int:
    """Devices of a replica group."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return listed.group(1).count(",") + 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if iota:
        return int(iota.group(2))
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest)
    if axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes.group(1)))
        size = 1
        for axis in re.findall(r"'(\w+)'", axes.group(2)):
            size *= int(sizes.get(axis, 1))
        return size
    return 1


def _named(role: str, instruction: Instruction) -> str:
    """The computation that an instruction names as its body or condition."""
    found = re.search(rf"{role}=%([\w.\-]+)", instruction.rest)
    assert found
    return found.group(1)


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.root)


def _source(computation: Computation, name: str) -> Instruction | None:
    """The instruction of a name, or what it is a mere copy of."""
    found = computation.get(name)
    while found is not None and found.opcode in ("bitcast", "copy") and found.operands:
        found = computation.get(found.operands[0])
    return found


def _constant(computation: Computation, name: str) -> int | None:
    found = _source(computation, name)
    number = re.match(r"(\d+)\)", found.rest) if found is not None and found.opcode == "constant" else None
    return int(number.group(1)) if number else None
