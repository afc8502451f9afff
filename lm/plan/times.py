"""How long a step would take: modelled from the target's published rates, never measured.

    compute   (model FLOPs + recomputed FLOPs) / devices / peak FLOP/s; for the busiest rank where
              devices share the tokens of rows (time_axis.py)
    memory    bytes to and from HBM / its bandwidth: weights read for every pass over every
              microbatch, activations written and read; parameters, moments and gradients updated
    network   bytes sent / bandwidth of the links, one collective after another, plus the latency
              of the messages along a split time axis that wait for one another
    step      max(compute, memory) + network: no communication is hidden

A real step is slower where matmuls miss the peak, and faster where communication is hidden.
"""

from __future__ import annotations

import dataclasses

from lm import build as build_lib
from lm.build import Build
from lm.plan import memory as memory_lib
from lm.plan import time_axis, traffic
from lm.plan.memory import Activations, Memory
from lm.plan.traffic import Flow
from lm.targets import Target

_UPDATE = 4 * 7  # bytes per parameter: p, m, v and gradient are read; p, m, v are written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of a step; `mfu` is the model's own FLOPs as a share of peak FLOP/s."""

    compute: float
    memory: float
    network: float
    step: float
    tokens_per_second: float
    mfu: float


def estimate(
    built: Build,
    target: Target,
    memory: Memory,
    measured: Activations,
    flows: list[Flow],
) -> Times | None:
    """The times, or None for a target without published rates."""
    config = built.config
    peak = target.chip.peak_flops(config.model.precision)
    sending = traffic.seconds(flows, built.mesh, target)
    if peak is None or target.chip.hbm_bandwidth is None or sending is None:
        return None
    hops = sum(split.hops for split in time_axis.splits(built))
    network = sending + hops * (target.chip.link_latency or 0.0)
    length = config.data.context_length
    busiest = 1 + time_axis.waiting(built) / build_lib.forward_flops(built, length)
    flops = build_lib.flops_per_token(built) * config.tokens_per_step / built.mesh.size
    again = recomputed(built, measured)
    compute = flops * busiest * (1 + again / 3) / peak
    moved = _hbm_bytes(built, memory, measured, again)
    to_memory = moved / target.chip.hbm_bandwidth
    step = max(compute, to_memory) + network
    return Times(
        compute=compute,
        memory=to_memory,
        network=network,
        step=step,
        tokens_per_second=config.tokens_per_step / step,
        mfu=flops / peak / step,
    )


def recomputed(built: Build, measured: Activations) -> float:
    """The share of the forward pass, by FLOPs, that the backward pass recomputes."""
    config = built.config
    if config.model.remat == "none":
        return 0.0
    everything = measured.layer_inner * config.model.num_layers
    if config.model.remat == "full" or measured.inner + measured.host < 0.05 * everything:
        return 1.0  # a policy that keeps almost nothing
    length = config.data.context_length
    forward = build_lib.forward_flops(built, length)
    saved = build_lib.saved_flops(built, length)
    if config.model.remat == "dots":
        return saved["op"] / forward
    head = 2.0 * config.model.width * built.model.padded_vocab_size * length
    kept = sum(flops for name, flops in saved.items() if name in config.model.kept)
    return max(0.0, forward - head - kept) / forward


def _hbm_bytes(built: Build, memory: Memory, measured: Activations, again: float) -> float:
    """Bytes to and from HBM, for one device and step."""
    config, mesh = built.config, built.mesh
    tensor, tokens = mesh.shape["tensor"], memory_lib.tokens_of_row(built)
    weights = 2 * memory.parameters / 4 * mesh.shape["fsdp"]  # gathered, rounded to two bytes
    passes = config.run.accumulation * (3 + again)
    rows = config.data.batch_size / build_lib.batch_ways(mesh)
    layer = (measured.layer_stream + measured.layer_inner / tensor) / mesh.shape["sequence"]
    activations = 2 * rows * layer * config.model.num_layers * (1 + again)
    chunks = rows * tokens * built.model.padded_vocab_size / tensor
    update = _UPDATE * (memory.optimizer + memory.host) / 8
    return passes * weights + activations + 4 * 4 * chunks + update
