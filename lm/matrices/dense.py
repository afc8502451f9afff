"""A matrix stored as one array, initialized from a normal with muP's standard deviation."""

from __future__ import annotations

from flax import linen as nn

from lm.modules.linear import Factor, Matrix, role_of
from lm.params import declare


class Dense(Matrix):
    @nn.compact
    def chains(self) -> tuple[tuple[Factor, ...], ...]:
        role = role_of(self.letters, self.contracted)
        normal = nn.initializers.normal(self.context.multipliers.init_std(role))
        init = declare(normal, self.letters, role, decay=True, contracted=self.contracted)
        kernel = self.param("kernel", init, self.shape)
        return ((Factor(kernel, self.letters, self.contracted),),)
