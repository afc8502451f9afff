"""H3 (Fu et al. 2022, arXiv 2212.14052, section 3): two state-space models between projections.

    y = W_o (q * SSM_diag(SSM_shift(k) * v)),  q, k, v = W_q x, W_k x, W_v x

SSM_shift is a convolution: learned weights on the last `shift_taps` inputs of a channel. SSM_diag
is S4D (lm/modules/diagonal.py). Both have a skip. The paper's language models have two attention
layers among these; use a pattern. Parameters: 4 D^2 + D (W + 1) and D (2 N + 2). State: D N / 2
complex and D W, float32.
"""

from __future__ import annotations

from typing import ClassVar

import jax
from flax import linen as nn

from lm.modules.diagonal import Diagonal
from lm.modules.linear import linear, project
from lm.modules.mixer import Along, Call, Mixer
from lm.params import declare


class H3(Mixer):
    """Options of a layer label are these fields. The width is cut into `num_heads` equal parts only
    so that it can be split over the mesh. Heads of one channel are the published layer.

    Attributes:
      num_heads: equal parts of the width; unset: the model's
      state_dim: state N of each channel
      shift_taps: inputs that the shift remembers
      form: form of the op, or auto, which takes what was measured to be best on the device
      shift_form: form of the shift, or auto
    """

    num_heads: int
    state_dim: int = 64
    shift_taps: int = 64
    form: str = "auto"
    shift_form: str = "auto"

    op: ClassVar[str] = "linear_scan"

    def problem(self) -> str | None:
        if self.width % self.num_heads:
            return f"width={self.width} is not a multiple of num_heads={self.num_heads}"
        if self.state_dim < 2 or self.state_dim % 2 or self.shift_taps < 1:
            return (
                f"state_dim={self.state_dim} must be even: modes come in conjugate pairs; "
                f"shift_taps={self.shift_taps} must be at least 1"
            )
        return None

    @property
    def channels(self) -> int:
        return self.width // self.num_heads

    def calls(self) -> dict[str, Call]:
        dims = {"H": self.num_heads, "K": self.channels, "W": self.shift_taps}
        return {
            "main": Diagonal.call(self.num_heads, self.channels, self.state_dim),
            "shift": Call("gated_conv", dims, {"bias": False, "gate": True}),
        }

    def setup(self) -> None:
        d, h, k = self.width, self.num_heads, self.channels
        self.query, self.key, self.value = (
            linear(self.context, "D H K", (d, h, k), 1) for _ in range(3)
        )
        # Unit variance of an output of a normalized input: the variances of all taps add up to 1.
        std = self.shift_taps**-0.5
        init = declare(nn.initializers.normal(std), "H K W", "vector", decay=False)
        self.shift = self.param("shift", init, (h, k, self.shift_taps))
        ones = declare(nn.initializers.ones, "H K", "vector", decay=False)
        self.shift_skip = self.param("shift_D", ones, (h, k))
        self.ssm = Diagonal(self.context, h, k, self.state_dim)
        self.out = linear(self.context, "H K D", (h, k, d), 2)

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        del positions
        q, k, v = project(x, self.query, self.key, self.value)
        weight = self.shift.at[..., -1].add(self.shift_skip)
        kv = run("shift", {"x": k, "weight": weight, "gate": v})
        return self.out(q * self.ssm(kv, run, "main"))
