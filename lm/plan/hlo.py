"""Compiled HLO text -> its collectives: kind, bytes sent, how often, over which mesh axes.

    parse(text)                computations and instructions
    collectives(text, mesh)    every collective of the entry computation and all it calls

A collective in a loop counts as often as the loop runs; nested loops multiply. An asynchronous
collective is counted at its start. The TPU compiler may spread one collective over a chain of
fusions and repeat it in each; the chain counts once. It writes a reduce-scatter as an all-reduce
inside a fusion whose computation is named all-reduce-scatter.

Bytes sent per device over R devices, where X is the full tensor and x the local one (ring
algorithms):

    all-gather, reduce-scatter  X (R-1)/R      all-reduce  2 X (R-1)/R
    all-to-all                  x (R-1)/R      collective-permute  x
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
_BITS = {"pred": 8, "bf16": 16, "token": 0}
_SHAPE = re.compile(r"\b(pred|bf16|[fsuc]\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


class Instruction(NamedTuple):
    """`shapes` are those of the result, or of the parts of a tuple: (dtype, dimensions)."""

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(num_bytes(*shape) for shape in self.shapes)

    @property
    def op_name(self) -> str:
        """The program's name for it, "jit(step)/.../mixer/query/dot_general"; "" if unknown."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Module(NamedTuple):
    entry: str
    computations: dict[str, list[Instruction]]


class Collective(NamedTuple):
    """One collective. It runs `times` per step; one device sends `bytes_sent` each time. `axes` are
    the mesh axes it runs over, () where its groups are not a product of axes. `dtypes` are those of
    what is sent, `group` the device numbers of its first group.
    """

    kind: str
    times: int
    bytes_sent: float
    axes: tuple[str, ...]
    dtypes: tuple[str, ...]
    group: tuple[int, ...]
    op_name: str


def num_bytes(dtype: str, dims: Sequence[int]) -> int:
    """
    >>> num_bytes("bf16", (4, 8))
    64
    """
    bits = _BITS.get(dtype) or int(re.sub(r"^\D+(\d+).*", r"\1", dtype))
    return math.ceil(math.prod(dims) * bits / 8)


def parse(text: str) -> Module:
    """The computations by name, and the name of the entry computation.

    Raises:
      ValueError: the text is not HLO.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            body = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif re.match(r"\}(, execution_thread=.*)?$", line):  # a kernel's metadata has such lines
            body = None
        elif body is not None and (instruction := _instruction(line)):
            body.append(instruction)
    if not entry:
        raise ValueError("no ENTRY computation: this is not HLO text")
    return Module(entry, computations)


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    end = _closing(line, found.end()) if line[found.end()] == "(" else line.index(" ", found.end())
    kind, rest = line[found.end() : end], line[end:].lstrip()
    opcode = rest[: rest.index("(")]
    close = _closing(rest, len(opcode))
    operands = re.findall(r"%([\w.\-]+)", rest[len(opcode) : close])
    shapes = tuple(
        (dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _SHAPE.findall(kind)
    )
    if opcode == "constant":  # its value is where other instructions have operands
        return Instruction(found[2], opcode, shapes, (), rest[len(opcode) :], bool(found[1]))
    return Instruction(found[2], opcode, shapes, tuple(operands), rest[close:], bool(found[1]))


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i + 1
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def multiplicity(module: Module) -> dict[str, int]:
    """How often each computation runs in one run of the entry. A loop of unknown length counts
    once, and so does every branch.
    """
    times: dict[str, int] = {}

    def visit(name: str, factor: int) -> None:
        times[name] = times.get(name, 0) + factor
        for instruction in module.computations[name]:
            for called, is_loop in _called(instruction):
                if called in module.computations:
                    trips = trip_count(module, instruction) if is_loop else 1
                    visit(called, factor * trips)

    visit(module.entry, 1)
    return times


def _called(instruction: Instruction) -> Iterator[tuple[str, bool]]:
    """The computations that an instruction calls, and whether each is a loop's body."""
    if instruction.opcode.endswith(("-done", "-update")):
        return
    for role, name in _CALLED.findall(instruction.attributes):
        yield name, instruction.opcode == "while" and role == "body"
    for names in _BRANCHES.findall(instruction.attributes):
        yield from ((name.strip().lstrip("%"), False) for name in names.split(","))


def trip_count(module: Module, loop: Instruction) -> int:
    """How often a while loop's body runs: as annotated, or else from 0 to the bound in its
    condition, in steps of the increment in its body; 1 if it depends on data.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    called = dict(_CALLED.findall(loop.attributes))
    condition = {i.name: i for i in module.computations.get(called["condition"], [])}
    root = next((i for i in condition.values() if i.is_root), None)
    if root is None or (root.opcode == "compare" and "direction=LT" not in root.attributes):
        return 1
    read = [condition[o] for o in root.operands if o in condition]
    bounds = [int(m[1]) for i in read if (m := _value(i))]
    places = [m[1] for i in read if (m := re.search(r"index=(\d+)", i.attributes))]
    if len(bounds) != 1 or len(places) != 1:
        return 1
    return -(-bounds[0] // _step(module, called["body"], int(places[0])))


def _value(instruction: Instruction) -> re.Match[str] | None:
    return re.match(r"\((\d+)\)", instruction.attributes) if not instruction.operands else None


def _step(module: Module, body: str, place: int) -> int:
    """The increment that a loop's body adds to element `place` of its state; 1 if unreadable."""
    producers = {i.name: i for i in module.computations.get(body, [])}
    root = next((i for i in producers.values() if i.is_root and i.opcode == "tuple"), None)
    found = producers.get(root.operands[place]) if root else None
    while found is not None and found.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        found = producers.get(found.operands[0])
    if found is None or found.opcode != "add":
        return 1
    values = [int(m[1]) for o in found.operands if o in producers and (m := _value(producers[o]))]
    return max(1, values[0]) if values else 1


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives that send data; `mesh` maps axes to sizes, in the mesh's order."""
    module = parse(text)
    times = multiplicity(module)
    found: dict[str, Collective] = {}
    for name, count in times.items():
        producers = {i.name: i for i in module.computations[name]}
        for instruction in producers.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            collective = _collective(instruction, kind, producers, mesh)
            if not collective.bytes_sent:
                continue
            chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
            key = f"chain {chain[1]}" if chain else f"{name}/{instruction.name}"
            before = found[key].times if key in found else 0
            found[key] = collective._replace(times=max(count, before))
    return list(found.values())


def _collective(
    instruction: Instruction,
    kind: str,
    producers: Mapping[str, Instruction],
    mesh: Mapping[str, int],
) -> Collective:
    sent = [shape for o in instruction.operands for shape in producers[o].shapes]
    size = sum(num_bytes(*shape) for shape in sent)
    if kind == "collective-permute":
        pairs = [p for p in _pairs(instruction.attributes) if p[0] != p[1]]
        group, axes = (pairs[0] if pairs else (0,)), _moved(pairs, mesh)
        amount = float(size if pairs else 0)
    else:
        group = groups(instruction.attributes, math.prod(mesh.values()))[0]
        axes, ways = axes_of(group, mesh), len(group)
        full = {"all-gather": ways * size, "all-reduce": 2 * size}.get(kind, size)
        amount = full * (ways - 1) / ways
    dtypes = tuple(sorted({dtype for dtype, _ in sent}))
    return Collective(kind, 1, amount, axes, dtypes, group, instruction.op_name)


def groups(attributes: str, total: int) -> list[tuple[int, ...]]:
    """The groups of device numbers, from any of the four notations of replica_groups:
    {{0,1},{2,3}}, [2,2]<=[4], [2,2]<=[2,2]T(1,0), mesh['data'=2,'fsdp'=2] {'fsdp'}.
    """
    if found := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, dims = _numbers(found[1]), _numbers(found[2])
        order = _numbers(found[3]) if found[3] else list(range(len(dims)))
        ids = np.arange(total).reshape(dims).transpose(order).reshape(shape)
        return [tuple(int(i) for i in row) for row in ids]
    if found := re.search(r"replica_groups=@?\w*mesh\[(.*?)\]\s*\{(.*?)\}", attributes):
        return _mesh_groups(found[1], found[2], total)
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", attributes):
        return [tuple(_numbers(row)) for row in re.findall(r"\{([\d,]+)\}", found[1])]
    return [tuple(range(total))]


def _mesh_groups(sizes: str, wanted: str, total: int) -> list[tuple[int, ...]]:
    """The groups along some axes of a named mesh. 'fsdp':(2)4 means the part of size 4 of an axis,
    after a part of size 2.
    """
    mesh = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    assert math.prod(mesh.values()) == total, (sizes, total)
    dims: list[int] = []
    chosen: list[int] = []
    parts = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", wanted)
    }
    for name, size in mesh.items():
        before, part = parts.get(name, (1, 0))
        part = part or (size if name in parts else 1)
        dims += [before, part, size // (before * part)]
        if name in parts:
            chosen.append(len(dims) - 2)
    kept = [i for i in range(len(dims)) if i not in chosen]
    ids = np.arange(total).reshape(dims).transpose([*kept, *chosen])
    rows = ids.reshape(-1, math.prod(dims[i] for i in chosen))
    return [tuple(int(i) for i in row) for row in rows]


def axes_of(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a group's devices differ; () if the group is not the whole product
    of these axes.
    """
    axes = _differing(group, mesh)
    return axes if math.prod(mesh[axis] for axis in axes) == len(group) else ()


def _moved(pairs: Sequence[tuple[int, ...]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the hops of a permutation move."""
    found = {axis for pair in pairs for axis in _differing(pair, mesh)}
    return tuple(axis for axis in mesh if axis in found)


def _differing(devices: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    places = np.stack(np.unravel_index(np.asarray(devices), tuple(mesh.values())))
    rows = zip(mesh, places, strict=True)
    return tuple(axis for axis, row in rows if len(set(row.tolist())) > 1)


def _pairs(attributes: str) -> list[tuple[int, ...]]:
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    return (
        [tuple(_numbers(pair)) for pair in re.findall(r"\{(\d+,\d+)\}", found[1])] if found else []
    )


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
