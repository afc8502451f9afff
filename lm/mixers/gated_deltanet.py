"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464, eq. 10 and section 3.4).

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = K^-1/2 S_t^T q_t
    log alpha = -exp(A_log) softplus(W_a x + dt_bias),  beta = sigmoid(W_b x)
    q, k, v: projection, causal convolution over 4 tokens, SiLU; q and k of unit length
    y = W_o (RMSNorm(o) * swish(W_g x)), with the norm over each head

Keys are 0.75 times and values 1.5 times as wide as a head of the model. So the layer has 6 D^2
parameters, 2 D H of gates, 12 D of the convolution, 2 H and V. State: 1.125 D K', where K' is the
model's head width, and 4 * 3 D of the convolution, float32.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from lm.modules.linear import linear
from lm.modules.linear_mixer import LinearMixer
from lm.modules.mixer import Along, Call
from lm.modules.norm import unit_keys
from lm.modules.norm_gate import NormGate
from lm.modules.short_conv import ShortConv
from lm.modules.step_size import dt_bias, log_uniform
from lm.params import declare


class GatedDeltanet(LinearMixer):
    """Options of a layer label are these fields and those of `LinearMixer`.

    Attributes:
      conv_size: taps of the causal convolution of q, k and v; 0: none
      conv_form: form of the short convolution, or auto
    """

    expand_k: float = 0.75
    expand_v: float = 1.5
    conv_size: int = 4
    conv_form: str = "auto"

    op: ClassVar[str] = "delta_rule"

    def problem(self) -> str | None:
        if self.conv_size < 1:
            return f"conv_size={self.conv_size} must be at least 1"
        return super().problem()

    @property
    def channels(self) -> int:
        return 2 * self.key_dim + self.value_dim

    def calls(self) -> dict[str, Call]:
        # Keys have unit length, so the scale does not grow with the width: muP leaves it as it is.
        scale = self.key_dim**-0.5
        return {
            "main": self.op_call(self.key_dim, self.value_dim, scale=scale, decay="scalar"),
            "conv": ShortConv.call(self.num_heads, self.channels, self.conv_size),
        }

    def setup(self) -> None:
        super().setup()
        d, h = self.width, self.num_heads
        self.beta = linear(self.context, "D H", (d, h), 1)
        self.decay = linear(self.context, "D H", (d, h), 1)
        init = declare(log_uniform(1e-4, 16.0), "H", "vector", decay=False)
        self.A_log = self.param("A_log", init, (h,))
        self.dt_bias = self.param("dt_bias", declare(dt_bias, "H", "vector", decay=False), (h,))
        self.gate = linear(self.context, "D H V", (d, h, self.value_dim), 1)
        self.norm = NormGate(self.context)
        self.conv = ShortConv(self.context, h, self.channels, self.conv_size)

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        del positions
        *heads, beta, decay, gate = self.project(x, self.beta, self.decay, self.gate)
        heads = self.conv(jnp.concatenate(heads, axis=-1), run, "conv")
        q, k, v = unit_keys(heads, self.key_dim)
        dt = jax.nn.softplus(decay.astype(jnp.float32) + self.dt_bias)
        inputs = {
            "q": q,
            "k": k,
            "v": v,
            "beta": jax.nn.sigmoid(beta.astype(jnp.float32)),
            "log_decay": -jnp.exp(self.A_log) * dt,
        }
        return self.out(self.norm(run("main", inputs), gate))
