"""Matrices of the residual stream: heads in and out, and a plain one. Initialised normal with muP's
standard deviation.
"""

from __future__ import annotations

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
    def weight(self) -> jax.Array:
        """[*shape]"""
        std = self.context.multipliers.init_std("hidden")
        init = declare(nn.initializers.normal(std), self.letters, "hidden", decay=True)
        return self.param("kernel", init, self.shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *shape[:contracted]] -> [..., *shape[contracted:]]"""
        return project(x, self)[0]

    def place(self, out: jax.Array) -> jax.Array:
        """The output laid out by its letters; what returns to the residual stream, as that is."""
        outward = self.letters.split()[self.contracted :]
        if outward == ["D"]:
            return self.context.stream(out)
        return self.context.place(out, " ".join(["B T", *outward]))


def project(x: jax.Array, *layers: Linear) -> list[jax.Array]:
    """The outputs of several matrices of one input. Under tensor parallelism the gradient of that
    input is then summed over the devices once.
    """
    weights = [(layer.weight(), layer.letters, layer.contracted) for layer in layers]
    products = layers[0].context.matmul(x, *weights)
    return [layer.place(y) for layer, y in zip(layers, products, strict=True)]
