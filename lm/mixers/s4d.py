"""S4D (Gu et al. 2022, arXiv 2206.11893): a diagonal state-space model for every channel.

    y = GLU(W gelu(SSM(x)) + b)        SSM and its S4D-Lin initialization: lm/modules/diagonal.py

Parameters: 2 D^2 + 2 D of the gated linear unit, and D (2 N + 2) of the state-space models. State:
D N / 2 complex numbers as float32 pairs.
"""

from __future__ import annotations

from typing import ClassVar

import jax
from flax import linen as nn

from lm.modules.diagonal import Diagonal
from lm.modules.linear import linear
from lm.modules.mixer import Along, Call, Mixer
from lm.params import declare


class S4d(Mixer):
    """Options of a layer label are these fields. The width is cut into `num_heads` equal parts only
    so that it can be split over the mesh.

    Attributes:
      num_heads: equal parts of the width; unset: the model's
      state_dim: state N of each channel
      form: form of the op, or auto, which takes what was measured to be best on the device
    """

    num_heads: int
    state_dim: int = 64
    form: str = "auto"

    op: ClassVar[str] = "linear_scan"

    def problem(self) -> str | None:
        if self.width % self.num_heads:
            return f"width={self.width} is not a multiple of num_heads={self.num_heads}"
        if self.state_dim < 2 or self.state_dim % 2:
            return f"state_dim={self.state_dim} must be even: modes come in conjugate pairs"
        return None

    @property
    def channels(self) -> int:
        return self.width // self.num_heads

    def calls(self) -> dict[str, Call]:
        return {"main": Diagonal.call(self.num_heads, self.channels, self.state_dim)}

    def setup(self) -> None:
        d, h, k = self.width, self.num_heads, self.channels
        self.ssm = Diagonal(self.context, h, k, self.state_dim)
        self.value = linear(self.context, "H K D", (h, k, d), 2)
        self.gate = linear(self.context, "H K D", (h, k, d), 2)
        init = declare(nn.initializers.zeros, "D", "vector", decay=False)
        self.value_bias = self.param("value_bias", init, (d,))
        self.gate_bias = self.param("gate_bias", init, (d,))

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        del positions
        heads = x.reshape(*x.shape[:-1], self.num_heads, self.channels)
        y = jax.nn.gelu(self.ssm(heads, run, "main"), approximate=False)
        value = self.value(y) + self.value_bias.astype(x.dtype)
        gate = self.gate(y) + self.gate_bias.astype(x.dtype)
        return value * jax.nn.sigmoid(gate)
