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
        """`x` times the parameter `w`: operands in `operand_dtype`, sums in float32, the result in
        `compute_dtype`. Every letter of the equation stands in two of (x, w, result).
        """
        return _matmul(equation, self, x, w).astype(self.compute_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(equation: str, numerics: Numerics, x: jax.Array, w: jax.Array) -> jax.Array:
    """The rule below is autodiff's, with the cotangent rounded to `operand_dtype` like the other
    operands (else one of two would stay float32), and with w's gradient in w's own layout: the
    transposed product that autodiff writes costs XLA:CPU a copy of every activation.
    """
    return _product(equation, numerics, x, w)


def _product(equation: str, numerics: Numerics, x: jax.Array, w: jax.Array) -> jax.Array:
    operands = x.astype(numerics.operand_dtype), w.astype(numerics.operand_dtype)
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _matmul_fwd(
    equation: str, numerics: Numerics, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(equation, numerics, x, w), (x, w)


def _matmul_bwd(
    equation: str, numerics: Numerics, residuals: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    letters, out = equation.split("->")
    of_x, of_w = letters.split(",")
    dx = _product(f"{out},{of_w}->{of_x}", numerics, cotangent, w)
    dw = _product(f"{of_x},{out}->{of_w}", numerics, x, cotangent)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


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
