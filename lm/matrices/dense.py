"""A matrix that is one array, initialised normal with muP's standard deviation."""

from __future__ import annotations

from flax import linen as nn

from lm.modules.linear import Factor, Matrix
from lm.params import declare


class Dense(Matrix):
    @nn.compact
    def chains(self) -> tuple[tuple[Factor, ...], ...]:
        std = self.context.multipliers.init_std("hidden")
        init = declare(nn.initializers.normal(std), self.letters, "hidden", decay=True)
        kernel = self.param("kernel", init, self.shape)
        return ((Factor(kernel, self.letters, self.contracted),),)
