"""What mixers with a state of fixed size share: q, k, v of every head, and the way back.

    q, k [..., H, K], v [..., H, V] from x [..., D]
    K = expand_k head_dim,  V = expand_v head_dim

Queries, keys and values have equally many heads, as in the published layers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lm.modules.linear import Matrix, linear, project
from lm.modules.mixer import Call, Mixer


class LinearMixer(Mixer):
    """`form` is already a concrete form when parameters are initialized.

    Attributes:
      num_heads: heads H; unset: the model's
      head_dim: width of a head; unset: the model's
      expand_k: width K of a key over `head_dim`
      expand_v: width V of a value over `head_dim`
      form: form of the op, or auto, which takes what was measured to be best on the device
    """

    num_heads: int
    head_dim: int
    expand_k: float = 1.0
    expand_v: float = 1.0
    form: str = "auto"

    op: ClassVar[str]

    def problem(self) -> str | None:
        for name in ("expand_k", "expand_v"):
            size = self.head_dim * getattr(self, name)
            if size < 1 or size != int(size):
                factor = f"{name}={getattr(self, name)}"
                return f"{factor} times head_dim={self.head_dim} is not a whole width"
        return None

    @property
    def key_dim(self) -> int:
        return int(self.head_dim * self.expand_k)

    @property
    def value_dim(self) -> int:
        return int(self.head_dim * self.expand_v)

    def op_call(self, key_dim: int, value_dim: int, **options: Any) -> Call:
        """The call of the op for heads of these widths."""
        return Call(self.op, {"H": self.num_heads, "K": key_dim, "V": value_dim}, options)

    def setup(self) -> None:
        d, h, k, v = self.width, self.num_heads, self.key_dim, self.value_dim
        self.query = linear(self.context, "D H K", (d, h, k), 1)
        self.key = linear(self.context, "D H K", (d, h, k), 1)
        self.value = linear(self.context, "D H V", (d, h, v), 1)
        self.out = linear(self.context, "H V D", (h, v, d), 2)

    def project(self, x: jax.Array, *others: Matrix) -> list[jax.Array]:
        """x [..., D] -> q, k [..., H, K], v [..., H, V], and the outputs of `others`."""
        return project(x, self.query, self.key, self.value, *others)


def with_ones(v: jax.Array) -> jax.Array:
    """v [..., V] -> [..., V + 1]: the last column sums the weights."""
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def divide_by_sum(out: jax.Array, eps: float) -> jax.Array:
    """[..., V + 1] -> [..., V]: the weighted mean; 0 where there is no weight (padding)."""
    wide = out.astype(jnp.float32)
    return (wide[..., :-1] / (wide[..., -1:] + eps)).astype(out.dtype)
