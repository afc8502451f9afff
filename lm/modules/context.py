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
from jax.sharding import Mesh

from lm.mup import Multipliers


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

    def einsum(self, equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """`x` times the parameter `w`: operands in `operand_dtype`, sums float32, result in
        `compute_dtype`.
        """
        if self.operand_dtype == jnp.float32:
            return jnp.einsum(equation, x, w)
        product: jax.Array = _rounded_einsum(equation, self.operand_dtype, x, w)
        return product.astype(self.compute_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded_einsum(equation: str, dtype: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    """Autodiff would multiply the float32 cotangent unrounded; rounding it too is what makes both
    directions cheap.
    """
    return jnp.einsum(
        equation, x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32
    )


def _rounded_fwd(equation: str, dtype: Any, x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    x_low, w_low = x.astype(dtype), w.astype(dtype)
    out = jnp.einsum(equation, x_low, w_low, preferred_element_type=jnp.float32)
    return out, (x_low, w_low, jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype))


def _rounded_bwd(
    equation: str, dtype: Any, residuals: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Every equation used is a plain matmul: each letter stands in two of (x, w, out), so the
    # transposes are einsums too.
    x, w, x_like, w_like = residuals
    letters, out = equation.split("->")
    lx, lw = letters.split(",")
    low = cotangent.astype(dtype)
    dx = jnp.einsum(f"{out},{lw}->{lx}", low, w, preferred_element_type=jnp.float32)
    dw = jnp.einsum(f"{lx},{out}->{lw}", x, low, preferred_element_type=jnp.float32)
    return dx.astype(x_like.dtype), dw.astype(w_like.dtype)


_rounded_einsum.defvjp(_rounded_fwd, _rounded_bwd)


@dataclasses.dataclass(frozen=True)
class Context:
    """Handed to every module as its first field. `rules`: activation letter -> mesh axes
    (lm/sharding.py).
    """

    numerics: Numerics
    multipliers: Multipliers
    norm_eps: float
    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]
