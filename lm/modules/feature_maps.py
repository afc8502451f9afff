"""Feature maps of linear attention: phi(q) . phi(k) in place of exp(q . k).

elu        1 + elu(x)                                      Katharopoulos et al., arXiv 2006.16236
relu       max(x, 0)
identity   x
taylor     [1, x / d^1/4, x_i^2 / (2 d)^1/2, x_i x_j / d^1/2 (i < j)]        arXiv 2402.18668
           so that phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / d^1/2
Hedgehog   softmax of a learned map and of its negative                      arXiv 2402.04347
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm.modules.context import Context
from lm.params import declare

FIXED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "elu": lambda x: 1.0 + jax.nn.elu(x),
    "relu": jax.nn.relu,
    "identity": lambda x: x,
}


def taylor_dim(width: int) -> int:
    """The number of features of a head of this width: 153 for 16."""
    return 1 + width + width * (width + 1) // 2


def taylor(x: jax.Array) -> jax.Array:
    """x [..., K] -> [..., 1 + K + K (K + 1) / 2], float32; each product of two channels once."""
    width = x.shape[-1]
    wide = x.astype(jnp.float32)
    first, second = np.triu_indices(width)
    weight = np.where(first == second, math.sqrt(0.5), 1.0) / math.sqrt(width)
    products = wide[..., first] * wide[..., second] * weight.astype(np.float32)
    ones = jnp.ones_like(wide[..., :1])
    return jnp.concatenate([ones, wide / width**0.25, products], axis=-1)


class Hedgehog(nn.Module):
    """x [..., H, K] -> [..., H, 2 K], through a matrix W that starts as the identity.

    `joint` is one softmax over [2 y, -2 y] with y = W x + b, shared by the heads (the layer of
    flash-linear-attention). `split` is one softmax of y = W x and one of -y, with W per head
    (LoLCATs).
    """

    context: Context
    num_heads: int
    kind: Literal["joint", "split"]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        wide = x.astype(jnp.float32)
        if self.kind == "joint":
            init = declare(_identity, "K K", "vector", decay=False)
            w = self.param("kernel", init, (width, width))
            zeros = declare(nn.initializers.zeros, "K", "vector", decay=False)
            y = jnp.einsum("...k,kf->...f", wide, w) + self.param("bias", zeros, (width,))
            return jax.nn.softmax(jnp.concatenate([2 * y, -2 * y], axis=-1), axis=-1)
        init = declare(_identity, "H K K", "vector", decay=False)
        w = self.param("kernel", init, (self.num_heads, width, width))
        y = jnp.einsum("...hk,hkf->...hf", wide, w)
        return jnp.concatenate([jax.nn.softmax(y), jax.nn.softmax(-y)], axis=-1)


def _identity(key: jax.Array, shape: tuple[int, ...], *args: Any) -> jax.Array:
    del key, args
    return jnp.broadcast_to(jnp.eye(shape[-1]), shape)
