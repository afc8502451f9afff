"""Matrix products of a chunk. The form chooses how operands are rounded; sums are float32.

    nn(x, y) = x y        nt(x, y) = x y^T        tn(x, y) = x^T y

`AS_GIVEN` leaves float32 operands to the backend's default. `EXACT` keeps all their digits (six
passes of a TPU's matrix unit), `SPLIT` keeps 16 bits (three passes), `ROUNDED` rounds them to
bfloat16 (one pass).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Float


class Products(NamedTuple):
    """One way to multiply matrices; leading dimensions are batch dimensions and must agree."""

    dtype: DTypeLike
    precision: lax.Precision | None

    def nn(self, x: Float[Array, "*b I K"], y: Float[Array, "*b K J"]) -> Float[Array, "*b I J"]:
        return self._sum_over(x, y, -1, -2)

    def nt(self, x: Float[Array, "*b I K"], y: Float[Array, "*b J K"]) -> Float[Array, "*b I J"]:
        return self._sum_over(x, y, -1, -1)

    def tn(self, x: Float[Array, "*b K I"], y: Float[Array, "*b K J"]) -> Float[Array, "*b I J"]:
        return self._sum_over(x, y, -2, -2)

    def ones(self, x: Float[Array, "*b I K"], mask: Bool[Array, "K J"]) -> Float[Array, "*b I J"]:
        """x times the matrix that is one where `mask` is true, else zero; keeps all digits of x."""
        flat = x.reshape(-1, x.shape[-1])
        if self == AS_GIVEN:
            return EXACT.nn(flat, mask.astype(flat.dtype)).reshape(x.shape)
        # Three parts of 8 bits hold a float32, and ones are exact: half as many passes as `EXACT`.
        high = lax.reduce_precision(flat, exponent_bits=8, mantissa_bits=7)
        middle = lax.reduce_precision(flat - high, exponent_bits=8, mantissa_bits=7)
        matrix = mask.astype(jnp.float32)
        low = ROUNDED.nn(flat - high - middle, matrix)
        product = ROUNDED.nn(high, matrix) + (ROUNDED.nn(middle, matrix) + low)
        return product.reshape(x.shape)

    def _sum_over(self, x: Array, y: Array, left: int, right: int) -> Array:
        batch = tuple(range(x.ndim - 2))
        contracted = ((x.ndim + left,), (y.ndim + right,))
        return lax.dot_general(
            x.astype(self.dtype),
            y.astype(self.dtype),
            (contracted, (batch, batch)),
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )


AS_GIVEN = Products("float32", None)
EXACT = Products("float32", lax.Precision.HIGHEST)
SPLIT = Products("float32", lax.Precision.HIGH)
ROUNDED = Products("bfloat16", None)
