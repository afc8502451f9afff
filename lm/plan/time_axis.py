"""What the ops of a run send, and how long they wait, where devices share the tokens of rows.

Each op of a layer has a strategy (kernels/strategies.py), which declares what a rank sends for a
row. A step sends that for every row of a device: in the forward pass, again where the backward pass
recomputes the layer (unless remat keeps what recurrences received), and in the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

from kernels import dispatch
from kernels.primitives.rank_state import STATES
from lm import build as build_lib
from lm.build import Build


class Split(NamedTuple):
    """`layers` calls of an op in the layers of one label, by one strategy. The bytes are those that
    a device sends in a step: forward, `again` in the forward passes that remat repeats, and
    backward. `hops` counts the messages of a step that wait for one another.
    """

    label: str
    layers: int
    op: str
    strategy: str
    forward: float
    again: float
    backward: float
    hops: float

    @property
    def bytes(self) -> float:
        return self.forward + self.again + self.backward


def splits(built: Build) -> tuple[Split, ...]:
    """The splits in the order of the layers; () where no mesh axis splits time."""
    config = built.config
    rows = config.data.batch_size / build_lib.batch_ways(built.mesh)
    found: dict[tuple[str, str, str], Split] = {}
    for record in built.layers:
        if record.sent is None:
            continue
        strategy, sent = record.sequence.partition(":")[0], record.sent
        is_kept = strategy in ("states", "scan") and STATES in config.model.kept
        repeats = 0 if config.model.remat == "none" or is_kept else 1
        key = record.label, record.op, strategy
        old = found.get(key, Split(record.label, 0, record.op, strategy, 0.0, 0.0, 0.0, 0.0))
        found[key] = old._replace(
            layers=old.layers + 1,
            forward=old.forward + rows * sent.forward,
            again=old.again + rows * sent.forward * repeats,
            backward=old.backward + rows * sent.backward,
            # `sent.hops` counts both passes: half of them are forward.
            hops=old.hops + config.run.accumulation * sent.hops * (1 + repeats / 2),
        )
    return tuple(found.values())


def waiting(built: Build) -> float:
    """FLOPs of a forward pass over a row for which all ranks wait for the busiest one. In a
    contiguous layout the last tokens of a row see most keys; an exchange for heads and zig-zag rows
    share the work evenly.
    """
    ranks, length = built.mesh.shape["sequence"], built.config.data.context_length
    if ranks == 1 or built.config.mesh.sequence_layout == "zigzag":
        return 0.0
    total = 0.0
    for repeat, period in zip(built.model.repeats, built.model.groups, strict=True):
        for block in period.blocks:
            strategies = block.mixer.context.strategies
            for name, call in block.mixer.calls().items():
                if strategies[name] == "all_to_all":
                    continue
                whole, before = (
                    dispatch.flops(call.op, call.dims | {"B": 1, "T": tokens}, call.options)
                    for tokens in (length, length - length // ranks)
                )
                total += repeat * (ranks * (whole - before) - whole)
    return total
