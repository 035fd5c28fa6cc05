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
    """One collective of the program. bytes: of its larger side, on one device, each time. times: how often it runs."""

    kind: str
    arrays: tuple[Array, ...]
    bytes: int
    times: int
    op_name: str
    computation: str


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name: their instructions by name, in order. loop: see `parse`."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    loop: int

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation that is not inside a fusion runs."""
        counts: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            counts[name] = counts.get(name, 0) + times
            for instruction in self.computations[name].values():
                for called, each in self._called(instruction):
                    visit(called, times * each)

        visit(self.entry, 1)
        return counts

    def _called(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        if instruction.opcode == "while":
            body = re.search(r"body=%([\w.\-]+)", instruction.rest)
            condition = re.search(r"condition=%([\w.\-]+)", instruction.rest)
            assert body and condition
            yield body.group(1), self.trips(instruction, condition.group(1))
        elif instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
            text = (
                branches.group(1)
                if branches
                else " ".join(re.findall(r"(?:true|false)_computation=%[\w.\-]+", instruction.rest))
            )
            for name in _NAME.findall(text):
                yield name, 1
        elif instruction.opcode in ("call", "async-start"):
            for name in _CALLED.findall(instruction.rest):
                yield name, 1

    def trips(self, loop: Instruction, condition: str) -> int:
        """Iterations of a while loop: what XLA knows, or the bound of its condition, or `loop`."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known.group(1))
        inside = self.computations[condition]
        root = next(instruction for instruction in inside.values() if instruction.root)
        if root.opcode == "compare" and "direction=LT" in root.rest and len(root.operands) == 2:
            bound = inside.get(root.operands[1])
            if bound is not None and bound.opcode == "constant":
                found = re.match(r"(\d+)\)", bound.rest)
                if found:
                    return int(found.group(1))
        return self.loop

    def collectives(self) -> list[Collective]:
        """Every collective, those inside fusions too."""
        found, seen = [], set()
        for name, times in self.runs.items():
            for instruction in self._with_fused(name):
                kind = _between_slices(instruction) or instruction.opcode.removesuffix("-start")
                if kind not in COLLECTIVES and not kind.endswith(BETWEEN_SLICES):
                    continue
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                # The halves of an asynchronous fusion both hold the collective.
                key = (name, kind, channel.group(1)) if channel else (name, instruction.name)
                if key in seen:
                    continue
                seen.add(key)
                found.append(
                    Collective(kind, instruction.arrays, _payload(instruction), times, instruction.op_name, name)
                )
        return found

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

    def _with_fused(self, computation: str) -> Iterator[Instruction]:
        for instruction in self.computations[computation].values():
            yield instruction
            if instruction.opcode in ("fusion", "custom-call"):
                for called in _CALLED.findall(instruction.rest):
                    if called in self.computations:
                        yield from self._with_fused(called)

    def _traffic(self, computation: dict[str, Instruction], instruction: Instruction) -> int:
        if instruction.opcode.endswith("-start"):
            return _started(instruction)
        if instruction.opcode == "fusion":
            called = _CALLED.search(instruction.rest)
            inside = self.computations[called.group(1)] if called else {}
        else:
            inside = {}
        total = self._written(instruction, inside)
        for index, operand in enumerate(instruction.operands):
            source = computation.get(operand)
            if source is None:
                continue
            if instruction.opcode in ("dynamic-slice", "gather") and index == 0:
                total += instruction.bytes
            elif instruction.opcode == "dynamic-update-slice" and index == 0:
                continue
            else:
                whole = sum(array.bytes for array in source.arrays if array.in_hbm)
                total += min(whole, _read_by(inside, index, whole)) if inside else whole
        return total

    def _written(self, instruction: Instruction, inside: dict[str, Instruction]) -> int:
        if instruction.opcode == "dynamic-update-slice":
            return 0  # the update is read, and written in its place: counted with the operands
        whole = sum(array.bytes for array in instruction.arrays if array.in_hbm)
        for each in inside.values():
            if each.root and each.opcode == "dynamic-update-slice" and len(each.operands) > 1:
                update = inside.get(each.operands[1])
                return min(whole, update.bytes) if update else whole
        return whole


def parse(text: str, loop: int = 1) -> Module:
    """A module from `compiled.as_text()`. loop: iterations of loops whose end the text does not tell."""
    computations: dict[str, dict[str, Instruction]] = {}
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
    return Module(computations, entry, loop)


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


def _read_by(inside: dict[str, Instruction], index: int, whole: int) -> int:
    """What a fusion reads of its operand: slices of it, where nothing else reads it."""
    parameter = next(
        (each for each in inside.values() if each.opcode == "parameter" and each.rest.startswith(f"{index})")), None
    )
    if parameter is None:
        return whole
    total = 0
    for each in inside.values():
        if parameter.name not in each.operands:
            continue
        if each.opcode in ("dynamic-slice", "gather") and each.operands[0] == parameter.name:
            total += each.bytes
        elif each.opcode == "dynamic-update-slice" and each.operands[0] == parameter.name:
            continue
        else:
            return whole
    return total
