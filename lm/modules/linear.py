"""Matrices of the residual stream: heads in and out, and a plain one. Initialised normal with muP's
standard deviation.
"""

from __future__ import annotations

import math

import jax
from flax import linen as nn

from lm.modules.context import Context
from lm.params import declare


class Linear(nn.Module):
    """One hidden matrix without bias, between any groups of dimensions."""

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
        lead, n = x.shape[: x.ndim - self.contracted], math.prod(self.shape[: self.contracted])
        names = self.letters.split()
        inward, outward = names[: self.contracted], names[self.contracted :]
        x = self.context.place(x, " ".join(["B T", *inward]))
        out = self.context.matmul(x.reshape(*lead, n), w, self.letters)
        out = out.reshape(*lead, *self.shape[self.contracted :])
        if outward == ["D"]:
            return self.context.stream(out)
        return self.context.place(out, " ".join(["B T", *outward]))
