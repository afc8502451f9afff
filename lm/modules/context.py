"""What every layer of one model shares: number formats, muP multipliers, mesh.

Precision policies (parameters are always float32):

    float32             activations and matmul operands float32
    bfloat16            activations and matmul operands bfloat16, sums float32
    bfloat16_operands   activations and sums float32, matmul operands (both directions) bfloat16
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from kernels import shard
from lm.mup import Multipliers
from lm.sharding import STREAM


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

    def matmul(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """`x` [..., M] times the parameter `w` [M, N]: operands in `operand_dtype`, sums float32,
        result in `compute_dtype`.
        """
        # Rows are one dimension: XLA:CPU is slower at gradients that are sums over two.
        rows = x.reshape(-1, x.shape[-1])
        if self.operand_dtype == jnp.float32:
            product: jax.Array = rows @ w
        else:
            product = _rounded_matmul(self.operand_dtype, rows, w)
        return product.astype(self.compute_dtype).reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_matmul(dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    """Autodiff would multiply the float32 cotangent unrounded; rounding it too is what makes both
    directions cheap.
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered_matmul(
    dtype: Any, whole: NamedSharding, parts: NamedSharding, x: jax.Array, w: jax.Array
) -> jax.Array:
    """x [N, M] times w, whose leading dimensions multiply to M and which is held in `parts`.

    The weight is rounded, then gathered, in the forward and again in the backward pass, so that a
    gathered weight never outlives its layer (ZeRO-3); its gradient is summed in float32.
    """
    return _product(x.astype(dtype), _gather(dtype, whole, w, x.shape[1]))


def _gather(dtype: Any, whole: NamedSharding, w: jax.Array, rows: int) -> jax.Array:
    return jax.lax.with_sharding_constraint(w.astype(dtype), whole).reshape(rows, -1)


def _gathered_fwd(
    dtype: Any, whole: NamedSharding, parts: NamedSharding, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, Any]:
    x_low = x.astype(dtype)
    product = _product(x_low, _gather(dtype, whole, w, x.shape[1]))
    return product, (x_low, w, jnp.zeros((0,), x.dtype))


def _gathered_bwd(
    dtype: Any, whole: NamedSharding, parts: NamedSharding, residuals: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w, like = residuals
    low = cotangent.astype(dtype)
    d_x = _product(low, _gather(dtype, whole, w, x.shape[1]).T).astype(like.dtype)
    d_w = _product(x.T, low).astype(w.dtype).reshape(w.shape)
    return d_x, jax.lax.with_sharding_constraint(d_w, parts)


_gathered_matmul.defvjp(_gathered_fwd, _gathered_bwd)


@dataclasses.dataclass(frozen=True)
class Context:
    """Handed to every module as its first field. `rules`, `weights`: letter of an activation, of a
    parameter -> mesh axes (lm/sharding.py).
    """

    numerics: Numerics
    multipliers: Multipliers
    norm_eps: float
    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]
    weights: Mapping[str, tuple[str, ...]]

    def place(self, x: jax.Array, letters: str) -> jax.Array:
        """x [B, T, ...] laid out over the mesh by its letters; a lone token, [B, ...], as is."""
        mesh, rules = shard.here(self.mesh, self.rules)
        if not rules or x.ndim != len(letters.split()):
            return x
        layout = shard.fitting(letters, x.shape, rules, mesh)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, layout))

    def stream(self, x: jax.Array) -> jax.Array:
        """The residual stream [B, T, D], between layers."""
        return self.place(x, f"B {STREAM} D") if x.ndim == 3 else x

    def matmul(self, x: jax.Array, w: jax.Array, letters: str) -> jax.Array:
        """x [..., M] times the parameter `w` of leading dimensions multiplying to M -> [..., N]."""
        mesh, weights = shard.here(self.mesh, self.weights)
        n = x.shape[-1]
        if "fsdp" not in weights.get("D", ()):
            return self.numerics.matmul(x, w.reshape(n, -1))
        whole = {letter: axes for letter, axes in weights.items() if letter != "D"}
        sharding = [
            NamedSharding(mesh, shard.fitting(letters, w.shape, rules, mesh))
            for rules in (whole, weights)
        ]
        rows = x.reshape(-1, n)
        product: jax.Array = _gathered_matmul(self.numerics.operand_dtype, *sharding, rows, w)
        return product.astype(self.numerics.compute_dtype).reshape(*x.shape[:-1], -1)
