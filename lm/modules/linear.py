"""Matrices of the residual stream: heads in and out, and a plain one. Initialised normal with muP's
standard deviation.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from lm.modules.context import Context
from lm.params import declare


class Linear(nn.Module):
    """One hidden matrix without bias. `equation` is the einsum ("btd,df->btf" without the leading
    "bt": "d,df->f").
    """

    context: Context
    letters: str  # of the parameter, e.g. "D F" or "D H K"
    shape: tuple[int, ...]
    contracted: int  # leading dimensions of the parameter that are summed over

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *shape[:contracted]] -> [..., *shape[contracted:]]"""
        std = self.context.multipliers.init_std("hidden")
        init = declare(nn.initializers.normal(std), self.letters, "hidden", decay=True)
        w = self.param("kernel", init, self.shape)
        lead = "".join(chr(ord("n") + i) for i in range(x.ndim - self.contracted))
        inner = "abcdefg"[: len(self.shape)]
        summed, kept = inner[: self.contracted], inner[self.contracted :]
        return self.context.numerics.einsum(f"{lead}{summed},{inner}->{lead}{kept}", x, w)
