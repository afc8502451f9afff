"""What a training step sends between devices: by formula, by the compiled program, and its time.

Bytes sent by one device per step (ring formulas: lm/plan/hlo.py). n is the number of a parameter's
elements on a device, A the number of microbatches, w the bytes of a rounded weight. The systems are
those of Rajbhandari et al. 2020, arXiv 1910.02054, and Shoeybi et al. 2019, arXiv 1909.08053:

    data      an all-reduce of gradients, 8 n (R-1)/R, once; under ZeRO-1 a reduce-scatter and an
              all-gather of the new parameters, 4 n (R-1)/R each
    fsdp      per microbatch every weight is gathered for the forward and for the backward pass,
              2 w n (R-1), and gradients are reduce-scattered, 4 n (R-1)
    tensor    per layer and microbatch an all-reduce of [B, T, D] after mixer and feed-forward in
              the forward pass and before them in the backward pass; the mixer's again where remat
              recomputes the layer; one for the embeddings and one for their gradient. Under
              stream_over_tensor each is a reduce-scatter, and an all-gather comes before every
              branch, in every pass
    sequence  per microbatch an all-reduce of every gradient, 8 n (R-1)/R, and what the strategy of
              each op sends (time_axis.py); every device has 1/R of the tokens
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from kernels import shard
from lm import params as params_lib
from lm.build import Build, batch_ways
from lm.parallel.mesh import target as platform
from lm.plan import hlo, time_axis
from lm.plan.time_axis import Split
from lm.targets import Target

GRADIENT = 4  # bytes per element: gradients and parameters are float32
# The collectives of a strategy, forward and backward.
KINDS = {
    "all_to_all": ("all-to-all", "all-to-all"),
    "gather": ("all-gather", "reduce-scatter"),
    "states": ("all-gather", "all-gather"),
    "ring": ("collective-permute", "collective-permute"),
    "scan": ("collective-permute", "collective-permute"),
    "halo": ("collective-permute", "collective-permute"),
}


class Flow(NamedTuple):
    """`bytes` a device sends per step by one kind of collective over `axes`."""

    kind: str
    axes: tuple[str, ...]
    bytes: float


def formula(built: Build) -> list[Flow]:
    """The flows of a step of `built` on its mesh, without those of a few scalars."""
    flows: list[Flow] = []
    infos = jax.tree.leaves(built.infos, is_leaf=params_lib.is_info)
    params = jax.tree.leaves(built.abstract_state.params)
    moments = jax.tree.leaves(built.gradients)
    for info, param, moment in zip(infos, params, moments, strict=True):
        kind = "hidden" if info.contracted else info.role
        flows += _weight(built, kind, param, moment)
    flows += _tensor(built)
    for split in time_axis.splits(built):
        forward, backward = KINDS[split.strategy]
        flows += [Flow(forward, ("sequence",), split.forward + split.again)]
        flows += [Flow(backward, ("sequence",), split.backward)]
    return total(flows)


def total(flows: Iterable[Flow]) -> list[Flow]:
    """The flows summed by kind and axes, largest first."""
    sums: dict[tuple[str, tuple[str, ...]], float] = {}
    for flow in flows:
        key = flow.kind, flow.axes
        sums[key] = sums.get(key, 0.0) + flow.bytes
    found = [Flow(*key, size) for key, size in sums.items() if size]
    return sorted(found, key=lambda flow: -flow.bytes)


def compiled(text: str, mesh: Mapping[str, int]) -> list[Flow]:
    """The flows of a compiled step."""
    found = hlo.collectives(text, mesh)
    return total(Flow(c.kind, c.axes, c.times * c.bytes_sent) for c in found)


def of_strategies(splits: Iterable[Split], flows: Iterable[Flow]) -> float:
    """The bytes of the flows along the time axis alone whose kinds belong to these strategies; sums
    of gradients are not included.
    """
    kinds = {kind for split in splits for kind in KINDS[split.strategy]}
    return sum(flow.bytes for flow in flows if flow.kind in kinds and flow.axes == ("sequence",))


def _weight(built: Build, role: str, param: Any, moment: Any) -> list[Flow]:
    """The gathers and reductions of one parameter."""
    config, sizes = built.config, built.mesh.shape
    microbatches = config.run.accumulation
    local = math.prod(param.sharding.shard_shape(param.shape))
    flows = []
    ways = sizes["fsdp"]
    if "fsdp" in shard.axes(param.sharding.spec):
        numerics = built.model.context.numerics
        rounded = GRADIENT if role == "vector" else numerics.operand_bytes
        # The embedding is gathered like activations, and again, rounded, where it is the head.
        looked_up = numerics.compute_bytes
        reads = {"input": [looked_up], "output": [rounded]}.get(role, [rounded, rounded])
        if role == "input" and config.model.tied_embeddings:
            reads = [looked_up, rounded]
        elif role == "hidden" and platform(built.mesh) == "gpu" and config.model.remat != "none":
            reads.append(rounded)  # XLA:GPU gathers again for what remat recomputes
        sent = local * (ways - 1) * microbatches
        flows += [Flow("all-gather", ("fsdp",), sent * sum(reads))]
        flows += [Flow("reduce-scatter", ("fsdp",), sent * GRADIENT)]
    elif ways > 1:  # whole on every device of a batch axis, so summed over that axis
        sent = 2 * local * GRADIENT * (ways - 1) / ways
        flows += [Flow("all-reduce", ("fsdp",), sent * microbatches)]
    ways = sizes["sequence"]
    sent = 2 * local * GRADIENT * (ways - 1) / ways
    flows += [Flow("all-reduce", ("sequence",), sent * microbatches)]
    ways = sizes["data"]
    if ways > 1:
        sent = local * GRADIENT * (ways - 1) / ways
        kinds = (
            ["reduce-scatter", "all-gather"]
            if "data" in shard.axes(moment.spec)
            else ["all-reduce"] * 2
        )
        flows += [Flow(kind, ("data",), sent) for kind in kinds]
    return flows


def _tensor(built: Build) -> list[Flow]:
    """The sums of the residual stream over the tensor axis, in the dtype of activations."""
    config, ways = built.config, built.mesh.shape["tensor"]
    if ways == 1:
        return []
    tokens = config.tokens_per_step / batch_ways(built.mesh) / built.mesh.shape["sequence"]
    width = config.model.width * built.model.context.numerics.compute_bytes
    once = tokens * width * (ways - 1) / ways
    branches = both = 0  # over all layers; `both`: layers with a mixer and a feed-forward
    for repeat, period in zip(built.model.repeats, built.model.groups, strict=True):
        with_mlp = sum(block.mlp is not None for block in period.blocks)
        branches += repeat * (len(period.blocks) + with_mlp)
        both += repeat * with_mlp
    is_remade = config.model.remat != "none"
    # A layer's feed-forward can be recomputed only after the mixer's sum.
    again = both if is_remade and "mixer" not in config.model.kept else 0
    ends = 2  # the embeddings, and the gradient of what the head reads
    sums = 2 * branches + again + ends
    if not config.mesh.stream_over_tensor:
        return [Flow("all-reduce", ("tensor",), 2 * once * sums)]
    gathers = 2 * branches + (branches if is_remade else 0) + ends
    scattered = Flow("reduce-scatter", ("tensor",), once * sums)
    return [scattered, Flow("all-gather", ("tensor",), once * gathers)]


def seconds(flows: Iterable[Flow], mesh: Mesh, target: Target) -> float | None:
    """All flows one after another at the target's bandwidths; None if those are not known."""
    if target.chip.link_bandwidth is None:
        return None
    return sum(flow.bytes / bandwidth(flow.axes, mesh, target) for flow in flows)


def bandwidth(axes: tuple[str, ...], mesh: Mesh, target: Target) -> float:
    """Bytes/s that one device sends in a collective over these axes (() counts as all of them).

    Within a slice (TPU) or a host (GPU) this is the bandwidth of its links. Between hosts every
    device has an adapter, and the devices of one host that take part share the work.
    """
    chip = target.chip
    assert chip.link_bandwidth is not None
    if chip.network_bandwidth is None:
        return chip.link_bandwidth
    moved = axes or mesh.axis_names
    grid = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    place = tuple(slice(None) if axis in moved else 0 for axis in mesh.axis_names)
    hosts = grid[place].ravel() // target.devices_per_host
    members = int(np.bincount(hosts).max())
    if len(set(hosts.tolist())) == 1:
        return chip.link_bandwidth
    return min(chip.link_bandwidth, members * chip.network_bandwidth)
