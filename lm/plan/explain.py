"""Explains "out of memory": the largest buffers by module, and three changes with their savings.

    explain(config, devices, error) -> text

The buffers are those that the error names, where a compiler lists them. Otherwise they are state,
gradients and the arrays kept for the backward pass, from the formulas of memory.py. Nothing is
compiled or run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from lm import params as params_lib
from lm.build import Build
from lm.config import Config
from lm.plan import changes, memory, program
from lm.plan.memory import Activations
from lm.plan.table import rows, size

BUFFERS = 8


class Buffer(NamedTuple):
    """`what` is parameters, optimizer, gradients, activations, logits, or the compiler's word."""

    bytes: float
    what: str
    module: str
    shape: str


def explain(config: Config, devices: Sequence[Any], error: str) -> str:
    """What takes the memory of a device, and what to change, for a terminal. `error` is the message
    of a RESOURCE_EXHAUSTED, or "".
    """
    built, needs = changes.estimate(config, devices)
    measured = memory.measure(config, devices)
    named = from_message(error)
    source = "named by the compiler" if named else "estimated"
    found = (named or buffers(built, measured))[:BUFFERS]
    lines = [("", "bytes", "of", "shape")]
    lines += [(b.module, size(b.bytes), b.what, b.shape) for b in found]
    parts = [f"out of memory: {' '.join(error.split())[:300]}"] if error else []
    needed = program.needed_bytes(error)
    parts.append(
        f"a device needs {size(needs.total)} by the formula: state {size(needs.state)}, gradients "
        f"{size(needs.gradients)}, activations {size(needs.activations)}, working "
        f"{size(needs.working)}" + (f"; the error names {size(needed)}" if needed else "")
    )
    parts.append(f"largest buffers of a device ({source})\n{rows(lines)}")
    proposals = changes.proposed(config, devices)
    table = [("change", "saves", "leaves")]
    table += [(c.flags, size(c.saved), size(c.memory.total)) for c in proposals]
    parts.append("each by itself, by the formula\n" + rows(table))
    return "\n\n".join(parts) + "\n"


def from_message(error: str) -> list[Buffer]:
    """The allocations that TPU compilers list: "Size: 1.50G ... op_name="..." ... Shape: ..."."""
    found = []
    for entry in re.split(r"\n\s*\d+\. (?=Size: )", error)[1:]:
        amount = re.match(r"Size: ([\d.]+)([KMGT]?)", entry)
        name = re.search(r'op_name="([^"]*)"', entry)
        shape = re.search(r"Shape: ([\w\[\],]+)", entry)
        if amount is None:
            continue
        where = memory.module_of(name[1]) if name else "other"
        bytes_ = float(amount[1]) * program.UNITS[amount[2]]
        found.append(Buffer(bytes_, "program", where, shape[1] if shape else ""))
    return sorted(found, key=lambda buffer: -buffer.bytes)


def buffers(built: Build, measured: Activations) -> list[Buffer]:
    """The buffers of one device by the formulas, largest first."""
    config = built.config
    rows_at_once, tensor = memory.rows_at_once(built), built.mesh.shape["tensor"]
    found = []
    for residual in measured.residuals:
        if residual.is_host:
            continue
        of = memory.stream_ways if residual.is_stream else memory.inner_ways
        amount = residual.row_bytes * rows_at_once / of(built)
        shape = f"{residual.dtype}{list(residual.shape)} a row"
        found.append(Buffer(amount, "activations", residual.module, shape))
    found += _weights(built)
    vocab = built.model.padded_vocab_size // tensor
    tokens = int(min(config.loss.chunk_size, rows_at_once * memory.tokens_of_row(built)))
    found.append(Buffer(4 * tokens * vocab, "logits", "loss", f"float32[{tokens}, {vocab}]"))
    return sorted(found, key=lambda buffer: -buffer.bytes)


def _weights(built: Build) -> list[Buffer]:
    """Parameters with their moments, and gradients."""
    params = jax.tree.leaves(built.abstract_state.params)
    names = jax.tree.leaves(params_lib.names(built.infos))
    moments = [
        x
        for x in jax.tree.leaves(built.abstract_state.opt_state)
        if x.ndim and not memory.is_on_host(x, built.config.optimizer.memory)
    ]
    found = []
    for i, (name, param) in enumerate(zip(names, params, strict=True)):
        shard = param.sharding.shard_shape(param.shape)
        module, shape = memory.module_of(name), f"float32{list(shard)}"
        amount = 4 * math.prod(shard)
        found += [Buffer(amount, what, module, shape) for what in ("parameters", "gradients")]
        for moment in moments[i :: len(params)]:
            shard = moment.sharding.shard_shape(moment.shape)
            amount, shape = 4 * math.prod(shard), f"float32{list(shard)}"
            found.append(Buffer(amount, "optimizer", module, shape))
    return found
