"""Matmuls of activations with parameters: number formats, and parameters split over a mesh.

Precision policies (parameters are always float32):

    float32             activations and matmul operands float32
    bfloat16            activations and matmul operands bfloat16, sums float32
    bfloat16_operands   activations and sums float32, matmul operands (both directions) bfloat16

An example: mesh fsdp=2, tensor=2; x [B=4, T=6, D=8]; `up` [D=8, F=10] with D over fsdp and F over
tensor, and `down` [F=10, D=8] likewise. One device holds:

    up, held                        [4, 5]       float32
    up, rounded and gathered        [8, 5]       over fsdp, in the forward and in the backward pass
    x                               [2, 6, 8]    rows over fsdp, D whole
    y = x up                        [2, 6, 5]    complete: D, which is summed over, is whole
    cotangent of y                  [2, 6, 5]    laid out like y
    gradient of x                   [2, 6, 8]    a device's 5 of F give a partial sum; added up over
                                                 tensor once, for all weights that x multiplies
    gradient of up                  [4, 5]       a device's 2 rows give a partial sum; added up over
                                                 fsdp in float32, into the layout held

    z = y down                      [2, 6, 8]    a device's 5 of F give a partial sum; added up over
                                                 tensor, in the activations' dtype
      with stream_over_tensor       [2, 3, 8]    the same sum, scattered along T
    cotangent of z, to be multiplied  [2, 6, 8]  gathered along T again
    gradient of y                   [2, 6, 5]    complete

A gathered weight never outlives its layer (ZeRO-3, Rajbhandari et al. 2020, arXiv 1910.02054).
Columns and rows over tensor are Megatron's (Shoeybi et al. 2019, arXiv 1909.08053).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels import shard
from kernels.shard import Rules
from lm.parallel.sharding import STREAM

PROJECTION = "projection"  # the name for remat policies of a product with a split parameter

# A parameter [*M, *N], its letters, and the number of dimensions M, which are summed over.
type Weight = tuple[jax.Array, str, int]


@dataclasses.dataclass(frozen=True)
class Numerics:
    """`compute_dtype` is the activations' dtype, `operand_dtype` what matmuls multiply."""

    compute_dtype: Any
    operand_dtype: Any

    @staticmethod
    def create(precision: str) -> Numerics:
        f32, bf16 = jnp.float32, jnp.bfloat16
        table = {"float32": (f32, f32), "bfloat16": (bf16, bf16), "bfloat16_operands": (f32, bf16)}
        return Numerics(*table[precision])

    @property
    def compute_bytes(self) -> int:
        return jnp.dtype(self.compute_dtype).itemsize

    @property
    def operand_bytes(self) -> int:
        return jnp.dtype(self.operand_dtype).itemsize

    def matmul(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """`x` [..., M] times the parameter `w` [M, N]: operands are `operand_dtype`, sums float32,
        the result `compute_dtype`.
        """
        # Flattened to one row dimension: XLA:CPU is slower at gradients that sum over two.
        rows = x.reshape(-1, x.shape[-1])
        if self.operand_dtype == jnp.float32:
            product: jax.Array = rows @ w
        else:
            product = _rounded_matmul(self.operand_dtype, rows, w)
        return product.astype(self.compute_dtype).reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_matmul(dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    """Autodiff would multiply by the float32 cotangent without rounding it. Rounding it too makes
    both directions cheap.
    """
    return _product(x.astype(dtype), w.astype(dtype))


def _rounded_fwd(dtype: Any, x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    x_low, w_low = x.astype(dtype), w.astype(dtype)
    like = jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype)
    return _product(x_low, w_low), (x_low, w_low, *like)


def _rounded_bwd(dtype: Any, residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w, x_like, w_like = residuals
    low = cotangent.astype(dtype)
    return _product(low, w.T).astype(x_like.dtype), _product(x.T, low).astype(w_like.dtype)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


_rounded_matmul.defvjp(_rounded_fwd, _rounded_bwd)


@dataclasses.dataclass(frozen=True)
class Split:
    """The mesh, and the tables letter -> mesh axes for activations and for parameters
    (lm/parallel/sharding.py).
    """

    mesh: Mesh
    activations: Rules
    weights: Rules


def products(
    numerics: Numerics, split: Split, x: jax.Array, weights: Sequence[Weight]
) -> list[jax.Array]:
    """x [..., *M] times parameters [*M, *N] -> [..., *N] for each, in the activations' dtype."""
    _, rules = shard.here(split.mesh, split.weights)
    _, around = shard.here(split.mesh, split.activations)
    # Flattened rows cannot stay split over time: each device would gather the rows of all devices.
    if not rules and "T" not in around:
        return [_local(numerics, x, w, contracted) for w, _, contracted in weights]
    layouts = [_layout(split, x, weight) for weight in weights]
    found: dict[int, jax.Array] = {}
    # One sum for all weights that are split alike; a weight that no axis splits needs none.
    for summed in dict.fromkeys(layout.summed for layout in layouts):
        chosen = [i for i, layout in enumerate(layouts) if layout.summed == summed]
        alike, ws = [layouts[i] for i in chosen], [weights[i][0] for i in chosen]
        made: Any = _split_matmul(numerics, tuple(alike), x, ws)
        named = [checkpoint_name(product, PROJECTION) for product in made]
        found |= dict(zip(chosen, named, strict=True))
    return [found[i] for i in range(len(weights))]


def _local(numerics: Numerics, x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    lead, rows = x.shape[: x.ndim - contracted], math.prod(w.shape[:contracted])
    out = numerics.matmul(x.reshape(*lead, rows), w.reshape(rows, -1))
    return out.reshape(*lead, *w.shape[contracted:])


class _Layout(NamedTuple):
    """The layouts for a split parameter w [*M, *N], where M has `contracted` dimensions.

    w is stored as `held` and multiplied as `used`. x has the layout `source`, x w the layout
    `product`, and the cotangent of x w is multiplied in the layout `cotangent`. x w must be summed
    over the mesh axes `added`, and a product with w^T over `summed`.
    """

    contracted: int
    held: NamedSharding
    used: NamedSharding
    source: PartitionSpec
    product: PartitionSpec
    cotangent: PartitionSpec
    added: tuple[str, ...]
    summed: tuple[str, ...]

    def gathered(self, w: jax.Array, dtype: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(w.astype(dtype), self.used)

    def at(self, layout: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.used.mesh, layout)


def _layout(split: Split, x: jax.Array, weight: Weight) -> _Layout:
    w, letters, contracted = weight
    mesh, weights = shard.here(split.mesh, split.weights)
    _, rules = shard.here(split.mesh, split.activations)
    names, span = letters.split(), x.ndim - contracted
    lead = ["B", "T"] if span == 2 else ["B"]
    stream = ["B", STREAM] if span == 2 and names[contracted:] == ["D"] else lead
    whole = {n: tuple(a for a in axes if a != "fsdp") for n, axes in weights.items()}
    held, used = (shard.fitting(letters, w.shape, table, mesh) for table in (weights, whole))
    rows, streamed = (
        shard.fitting(" ".join(text), x.shape[:span], rules, mesh) for text in (lead, stream)
    )
    inward, outward = used[:contracted], used[contracted:]
    return _Layout(
        contracted,
        NamedSharding(mesh, held),
        NamedSharding(mesh, used),
        source=PartitionSpec(*rows, *inward),
        product=PartitionSpec(*streamed, *outward),
        cotangent=PartitionSpec(*rows, *outward),
        added=shard.axes(used, *range(contracted)),
        summed=shard.axes(used, *range(contracted, w.ndim)),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _split_matmul(
    numerics: Numerics, layouts: Sequence[_Layout], x: jax.Array, ws: Any
) -> list[jax.Array]:
    """x [..., *M] times each parameter w [*M, *N] -> [..., *N].

    The weight is rounded and then gathered, in the forward pass and again in the backward pass, so
    a gathered weight never outlives its layer (ZeRO-3). Its gradient is summed in float32. Where
    devices hold partial sums, of an output or of the gradient of x by all weights, these are summed
    once, in the activations' dtype. Nothing is reshaped, because the partitioner follows dimensions
    and not products of them.
    """
    low = x.astype(numerics.operand_dtype)
    return [_product_of(numerics, a, low, w) for a, w in zip(layouts, ws, strict=True)]


def _product_of(numerics: Numerics, layout: _Layout, x: jax.Array, w: jax.Array) -> jax.Array:
    w = layout.gathered(w, numerics.operand_dtype)

    def part(x: jax.Array, w: jax.Array) -> jax.Array:
        out = _contract(x, w, layout.contracted).astype(numerics.compute_dtype)
        is_streamed = "tensor" in shard.axes(layout.product, 1)
        return shard.total(out, layout.added, layout.added if is_streamed else (), 1)

    if not layout.added:
        return _contract(x, w, layout.contracted).astype(numerics.compute_dtype)
    specs = layout.source, layout.used.spec
    return shard.wrap(part, layout.used.mesh, specs, layout.product)(x, w)


def _contract(a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
    return jnp.tensordot(a, b, dims, preferred_element_type=jnp.float32)


def _split_fwd(
    numerics: Numerics, layouts: Sequence[_Layout], x: jax.Array, ws: Any
) -> tuple[Any, Any]:
    return _split_matmul(numerics, layouts, x, ws), (x.astype(numerics.operand_dtype), ws)


def _split_bwd(
    numerics: Numerics, layouts: Sequence[_Layout], residuals: Any, cotangents: Any
) -> tuple[jax.Array, Any]:
    x, ws = residuals
    lead = tuple(range(x.ndim - layouts[0].contracted))
    lows = [
        jax.lax.with_sharding_constraint(c.astype(numerics.operand_dtype), a.at(a.cotangent))
        for a, c in zip(layouts, cotangents, strict=True)
    ]

    def back(lows: Any, whole: Any) -> jax.Array:
        total = jnp.float32(0)
        for layout, low, w in zip(layouts, lows, whole, strict=True):
            outward = w.ndim - layout.contracted
            ends = tuple(range(low.ndim - outward, low.ndim)), tuple(range(-outward, 0))
            total = total + _contract(low, w, ends)
        total = total.astype(numerics.compute_dtype)
        return shard.total(total, layouts[0].summed)

    whole = [a.gathered(w, numerics.operand_dtype) for a, w in zip(layouts, ws, strict=True)]
    if layouts[0].summed:
        specs = [a.cotangent for a in layouts], [a.used.spec for a in layouts]
        back = shard.wrap(back, layouts[0].used.mesh, specs, layouts[0].source)
    d_ws = [
        jax.lax.with_sharding_constraint(_contract(x, low, (lead, lead)).astype(w.dtype), a.held)
        for a, low, w in zip(layouts, lows, ws, strict=True)
    ]
    return back(lows, whole), d_ws


_split_matmul.defvjp(_split_fwd, _split_bwd)
