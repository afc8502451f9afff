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
