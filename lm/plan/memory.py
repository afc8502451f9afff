"""Bytes of device memory that a training step needs, from formulas: before and without a compiler.

    parameters, optimizer   the shards of the abstract state (exact)
    gradients               a float32 tree laid out like the parameters; with accumulation also the
                            sum over microbatches
    activations             what the backward pass reads: `jax.vjp` of the model is traced, and the
                            residuals that grow with the rows of a batch are counted; so a remat
                            policy and any mixer are included as they are
    working                 the activations of the largest layer while it is differentiated; the
                            gathered weights of a layer, of the next one and of the vocabulary; a
                            chunk of logits; the gradients of hidden states and head
    batch                   the tokens, targets, ... on a device, and the bytes of each token id

A compiler reuses and pads buffers as it likes, so activations and working are estimates.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import build as build_lib
from lm import pattern as pattern_lib
from lm.build import Build
from lm.config import Config, MeshConfig
from lm.data.growth import NO_WARMUP
from lm.modules.remat import PLACES
from lm.parallel import mesh as mesh_lib

DEVICE, HOST = PLACES
# Words in the names of a program that are not modules.
_TOP = r"groups_\d+|embed|output|final_norm"  # the top modules of a model
_TRACED: dict[str, tuple[Residual, ...]] = {}  # keyed by everything that a trace depends on
INPUT, CARRY = "input of the layers", "carry"
_PROGRAM = (
    "while",
    "body",
    "cond",
    "checkpoint",
    "rematted_computation",
    "shard_map",
    "eval_jaxpr",
)
BATCH_BYTES = 6 * 4  # per token: the fields of a Batch are int32 or float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device; `host` are bytes in host memory, per device."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    working: int
    batch: int
    host: int

    @property
    def state(self) -> int:
        return self.parameters + self.optimizer

    @property
    def total(self) -> int:
        return self.state + self.gradients + self.activations + self.working + self.batch


class Residual(NamedTuple):
    """An array kept for the backward pass: the module that makes it, its shape for one row, and the
    bytes that each row adds. `is_stream`: it is as wide as the model. `is_host`: it is kept in host
    memory.
    """

    module: str
    dtype: str
    shape: tuple[int, ...]
    row_bytes: float
    is_stream: bool
    is_host: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activations:
    """What one row of the batch keeps for the backward pass, over all layers.

    `stream` counts arrays as wide as the model. `inner` counts the rest (heads, feed-forward),
    which tensor parallelism divides. `host` is kept in host memory. `layer_stream` and
    `layer_inner` are the mean bytes of a layer that keeps everything, `largest_stream` and
    `largest_inner` those of the layer that keeps most. Where devices share the tokens of a row,
    this is the sum over those devices: an array that each of them gathers counts for each.
    """

    residuals: tuple[Residual, ...]
    layer_stream: float
    layer_inner: float
    largest_stream: float
    largest_inner: float

    @property
    def stream(self) -> float:
        return sum(r.row_bytes for r in self.residuals if r.is_stream and not r.is_host)

    @property
    def inner(self) -> float:
        return sum(r.row_bytes for r in self.residuals if not r.is_stream and not r.is_host)

    @property
    def host(self) -> float:
        return sum(r.row_bytes for r in self.residuals if r.is_host)


def measure(config: Config, devices: Sequence[Any]) -> Activations:
    """Traces the backward pass of the model; takes a few seconds and compiles nothing."""
    everything = dataclasses.replace(config.model, remat="none", kept={})
    whole = residuals(dataclasses.replace(config, model=everything), devices)
    layers = config.model.num_layers
    largest = max(_by_block(config, whole).values(), key=sum, default=(0.0, 0.0))
    return Activations(
        residuals=residuals(config, devices),
        layer_stream=sum(r.row_bytes for r in whole if r.is_stream) / layers,
        layer_inner=sum(r.row_bytes for r in whole if not r.is_stream) / layers,
        largest_stream=largest[0],
        largest_inner=largest[1],
    )


def _by_block(config: Config, whole: tuple[Residual, ...]) -> dict[str, tuple[float, float]]:
    """Bytes of stream and of the rest that one layer keeps, by its place in the pattern."""
    found: dict[str, tuple[float, float]] = {}
    for i, group in enumerate(pattern_lib.parse(config.model.pattern, config.model.num_layers)):
        for j in range(len(group.labels)):
            block = f"groups_{i}/blocks_{j}"
            own = [r for r in whole if r.module == block or r.module.startswith(f"{block}/")]
            stream, inner = (
                sum(r.row_bytes for r in own if r.is_stream == wanted) / group.repeat
                for wanted in (True, False)
            )
            found[block] = stream, inner
    return found


def residuals(config: Config, devices: Sequence[Any]) -> tuple[Residual, ...]:
    """The arrays that the model's forward pass keeps for its backward pass and that grow with the
    batch, largest first. They are traced once per process, on a small mesh with the same split
    axes: what is kept depends on which axes are split, not on their sizes. Only where devices share
    the tokens of rows does it also depend on the number of ranks, and on the heads of each.
    """
    data = config.data
    mesh = _small(config, devices)
    kind, time = devices[0].device_kind, data.context_length
    key = repr((kind, mesh, config.model, config.mup, time, data.tokenizer))
    if key not in _TRACED:
        _TRACED[key] = _traced(dataclasses.replace(config, mesh=mesh), devices)
    return _TRACED[key]


def _small(config: Config, devices: Sequence[Any]) -> MeshConfig:
    """The mesh with each axis reduced to its smallest prime factor, which divides whatever the axis
    divides. Where time is split, tensor and sequence keep their sizes.
    """
    sizes = mesh_lib.create(config.mesh, devices).shape
    kept = ("tensor", "sequence") if sizes["sequence"] > 1 else ()
    few = {
        axis: ways if axis in kept else next((n for n in range(2, ways) if ways % n == 0), ways)
        for axis, ways in sizes.items()
    }
    return dataclasses.replace(config.mesh, **few, zero1=False)


def _traced(config: Config, devices: Sequence[Any]) -> tuple[Residual, ...]:
    sizes = [getattr(config.mesh, axis) for axis in mesh_lib.AXES]
    ways = config.mesh.data * config.mesh.fsdp
    alone = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=ways, batch_warmup=NO_WARMUP),
        optimizer=dataclasses.replace(config.optimizer, memory=DEVICE),
        run=dataclasses.replace(config.run, accumulation=1),
    )
    built = build_lib.build(alone, devices[: math.prod(sizes)])
    # Not with one row per device: JAX drops some dimensions of size one.
    one, two = (_trace(built, n * ways) for n in (2, 3))
    found = []
    for a, b in zip(one.outvars, two.outvars, strict=True):
        dtype, pairs = a.aval.dtype, list(zip(a.aval.shape, b.aval.shape, strict=True))
        grown = float(math.prod(y for _, y in pairs) - math.prod(x for x, _ in pairs))
        if grown:
            shape = tuple(x if x == y else max(1, x // (2 * ways)) for x, y in pairs)
            is_host = "host" in str(getattr(a.aval, "memory_space", "")).lower()
            is_stream = shape[-1:] == (config.model.width,)
            module, size = module_of(_origin(one, a)), grown * dtype.itemsize / ways
            found.append(Residual(module, str(dtype), shape, size, is_stream, is_host))
    return tuple(sorted(found, key=lambda r: -r.row_bytes))


def _trace(built: Build, rows: int) -> Any:
    """The jaxpr whose results are the residuals of the model."""
    ids = jax.ShapeDtypeStruct((rows, built.config.data.context_length), jnp.int32)

    def backward(params: Any, tokens: Any, segment_ids: Any, positions: Any) -> Any:
        def forward(params: Any) -> Any:
            inputs = tokens, segment_ids, positions
            return built.model.apply({"params": params}, *inputs, method="train")

        return jax.tree.leaves(jax.vjp(forward, params)[1])

    return jax.make_jaxpr(backward)(built.abstract_state.params, ids, ids, ids).jaxpr


def _origin(jaxpr: Any, result: Any) -> str:
    """The name of what makes a result, through scans and calls; "" for an argument of `jaxpr`."""
    equation = next((e for e in jaxpr.eqns if any(out is result for out in e.outvars)), None)
    if equation is None:
        return ""
    stack, name = str(equation.source_info.name_stack), equation.primitive.name
    if name == "name":  # jax.ad_checkpoint.checkpoint_name
        return f"{stack}/{equation.params['name']}/name"
    if name in ("device_put", "convert_element_type"):
        return _origin(jaxpr, equation.invars[0]) or f"{stack}/{name}"
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)
    if inner is None or len(inner.outvars) != len(equation.outvars):
        return f"{stack}/{name}"
    place = [out is result for out in equation.outvars].index(True)
    made = inner.outvars[place]
    given = [arg is made for arg in inner.invars]
    if not any(given):
        return f"{stack}/{_origin(inner, made) or name}"
    outer = equation.invars[given.index(True)]
    if name == "scan" and outer.aval.shape == inner.invars[given.index(True)].aval.shape:
        return f"{stack}/{CARRY}"  # passed from one layer or chunk to the next
    return _origin(jaxpr, outer) or f"{stack}/{name}"


def module_of(name: str) -> str:
    """The module that a name in the program or a parameter's name belongs to. The last word of the
    name is an operation or the parameter.

    >>> module_of("jit(step)/jvp(Model)/groups_0.layer/while/body/groups_0/blocks_0/mlp/up/dot")
    'groups_0/blocks_0/mlp/up'
    """
    parts = name.split("/")[:-1]
    words = [w for w in parts if re.fullmatch(r"[a-z]\w*", w) and w not in _PROGRAM]
    start = next((i for i, w in enumerate(words) if re.fullmatch(_TOP, w)), None)
    if start is None and name.endswith(f"/{CARRY}"):
        return INPUT
    if start is None:
        return "loss" if "shard_map" in parts else "other"
    depth = 4 if words[start].startswith("groups_") else 1
    return "/".join(list(dict.fromkeys(words[start:]))[:depth])


def estimate(built: Build, measured: Activations) -> Memory:
    """Bytes per device for the step of `built`."""
    config, mesh = built.config, built.mesh
    device, host = _by_place(built.abstract_state.opt_state, config.optimizer.memory)
    params = shard_bytes(built.abstract_state.params)
    rows, at_once = config.data.batch_size / build_lib.batch_ways(mesh), rows_at_once(built)
    tensor, stream = inner_ways(built), stream_ways(built)
    kept = measured.stream / stream + measured.inner / tensor
    layer = measured.largest_stream / stream + measured.largest_inner / tensor
    gradients = params * (2 if config.run.accumulation > 1 else 1)
    working = layer * at_once + _gathered(built) + _loss(built, at_once)
    if host:  # the moments are on the device while an update uses them
        working += host
    return Memory(
        parameters=params,
        optimizer=device,
        gradients=gradients,
        activations=int(kept * at_once),
        working=int(working),
        batch=int(rows * tokens_of_row(built) * BATCH_BYTES) + 4 * config.data.tokenizer.vocab_size,
        host=host + int(measured.host / stream * at_once),
    )


def rows_at_once(built: Build) -> float:
    """The rows of a microbatch that one device holds."""
    rows = built.config.data.batch_size / build_lib.batch_ways(built.mesh)
    return rows / built.config.run.accumulation


def tokens_of_row(built: Build) -> int:
    """The tokens of a row that one device holds."""
    return built.config.data.context_length // built.mesh.shape["sequence"]


def stream_ways(built: Build) -> int:
    """The number of parts into which the residual stream's time is split."""
    ways = built.mesh.shape["tensor"] if built.config.mesh.stream_over_tensor else 1
    return ways * built.mesh.shape["sequence"]


def inner_ways(built: Build) -> int:
    """The number of parts of arrays as wide as heads or feed-forward."""
    return built.mesh.shape["tensor"] * built.mesh.shape["sequence"]


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    return sum(_shard(leaf) for leaf in jax.tree.leaves(tree))


def whole_bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _shard(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def is_on_host(leaf: Any, place: str) -> bool:
    """Whether a leaf of the optimizer state is in host memory; `place` is optimizer.memory. Devices
    that are not attached may have no host memory to lay it out in (NVIDIA's compiler).
    """
    kind = leaf.sharding.memory_kind
    return kind == "pinned_host" or (kind is None and place == HOST and leaf.ndim > 0)


def _by_place(opt_state: Any, place: str) -> tuple[int, int]:
    """Bytes of a device's shards in device memory, and in host memory."""
    places: Mapping[bool, list[Any]] = {True: [], False: []}
    for leaf in jax.tree.leaves(opt_state):
        places[is_on_host(leaf, place)].append(leaf)
    return shard_bytes(places[False]), shard_bytes(places[True])


def _gathered(built: Build) -> float:
    """Weights gathered over fsdp, rounded: those of a layer and of the next one, and the table."""
    ways = built.mesh.shape["fsdp"]
    if ways == 1:
        return 0.0
    params = built.abstract_state.params
    layers = sum(shard_bytes(v) for k, v in params.items() if k.startswith("groups_"))
    rest = shard_bytes(params) - layers
    rounded = built.model.context.numerics.operand_bytes / 4
    return ways * rounded * (2 * layers / built.config.model.num_layers + rest)


def _loss(built: Build, rows: float) -> float:
    """A chunk of logits with its exponentials and gradient; gradients of head and hidden states."""
    config = built.config
    tokens = rows * tokens_of_row(built)
    vocab = built.model.padded_vocab_size / built.mesh.shape["tensor"]
    chunk = min(config.loss.chunk_size, tokens)
    numerics = built.model.context.numerics
    return (
        chunk * vocab * (4 + 4 + numerics.operand_bytes)
        + 4 * vocab * config.model.width
        + 2 * tokens * config.model.width * numerics.compute_bytes
    )
