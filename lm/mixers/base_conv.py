"""BaseConv (Arora et al. 2023, arXiv 2312.04927, section 5; the local layer of BASED, 2402.18668).

    y = W_o ((W_g x + b_g) * (h * (W_u x) + b_h))         h: a causal filter of W taps per channel

A product of a gate and a short convolution, `expand` times as wide as the model. Parameters:
3 expand D^2 and expand D (W + 2). State: expand D W float32, the W inputs that a token's output
reads.
"""

from __future__ import annotations

from typing import ClassVar

import jax
from flax import linen as nn

from lm.modules.linear import linear, project
from lm.modules.mixer import Along, Call, Mixer
from lm.params import declare


class BaseConv(Mixer):
    """Options of a layer label are these fields. The width is cut into `num_heads` equal parts only
    so that it can be split over the mesh.

    Attributes:
      num_heads: equal parts of the width; unset: the model's
      expand: width of the product over the model's
      conv_size: taps of the causal filter
      form: form of the op, or auto, which takes what was measured to be best on the device
    """

    num_heads: int
    expand: int = 4
    conv_size: int = 3
    form: str = "auto"

    op: ClassVar[str] = "gated_conv"

    def problem(self) -> str | None:
        if min(self.expand, self.conv_size) < 1:
            return f"expand={self.expand}, conv_size={self.conv_size} must be at least 1"
        if self.width * self.expand % self.num_heads:
            return (
                f"expand * width = {self.width * self.expand} is not a multiple of "
                f"num_heads={self.num_heads}"
            )
        return None

    @property
    def channels(self) -> int:
        return self.width * self.expand // self.num_heads

    def calls(self) -> dict[str, Call]:
        dims = {"H": self.num_heads, "K": self.channels, "W": self.conv_size}
        return {"main": Call(self.op, dims, {"bias": True, "gate": True})}

    def setup(self) -> None:
        d, h, k = self.width, self.num_heads, self.channels
        self.input = linear(self.context, "D H K", (d, h, k), 1)
        self.gate = linear(self.context, "D H K", (d, h, k), 1)
        self.out = linear(self.context, "H K D", (h, k, d), 2)
        filters = nn.initializers.normal(self.conv_size**-0.5)
        zeros = declare(nn.initializers.zeros, "H K", "vector", decay=False)
        shape = h, k, self.conv_size
        self.filter = self.param("filter", declare(filters, "H K W", "vector", decay=True), shape)
        self.filter_bias = self.param("filter_bias", zeros, (h, k))
        self.gate_bias = self.param("gate_bias", zeros, (h, k))

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        del positions
        values, gate = project(x, self.input, self.gate)
        inputs = {
            "x": values,
            "weight": self.filter,
            "bias": self.filter_bias,
            "gate": gate + self.gate_bias.astype(x.dtype),
        }
        return self.out(run("main", inputs))
