"""DeltaNet (Yang et al. 2024, arXiv 2406.06484, eq. 2 and section 3.4).

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = K^-1/2 S_t^T q_t
    q, k, v: projection, causal convolution over 4 tokens, SiLU; q and k of unit length
    beta = sigmoid(W_b x)       twice that with `negative_eigenvalues` (arXiv 2411.12537)
    y = W_o RMSNorm(o), with the norm over each head

Parameters: 4 D^2 + D H + 4 * 3 D + V. State: D K, and 4 * 3 D of the convolutions, float32.
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


class Deltanet(LinearMixer):
    """Options of a layer label are these fields and those of `LinearMixer`.

    Attributes:
      conv_size: taps of the causal convolution of q, k and v; 0: none
      negative_eigenvalues: whether beta reaches 2, so that a step may turn the state around
      conv_form: form of the short convolution, or auto
    """

    conv_size: int = 4
    negative_eigenvalues: bool = False
    conv_form: str = "auto"

    op: ClassVar[str] = "delta_rule"

    def problem(self) -> str | None:
        return (
            f"conv_size={self.conv_size} is negative" if self.conv_size < 0 else super().problem()
        )

    def calls(self) -> dict[str, Call]:
        # Keys have unit length, so the scale does not grow with the width: muP leaves it as it is.
        scale = self.key_dim**-0.5
        calls = {"main": self.op_call(self.key_dim, self.value_dim, scale=scale, decay="none")}
        if self.conv_size:
            channels = 2 * self.key_dim + self.value_dim
            calls["conv"] = ShortConv.call(self.num_heads, channels, self.conv_size)
        return calls

    def setup(self) -> None:
        super().setup()
        d, h = self.width, self.num_heads
        self.beta = linear(self.context, "D H", (d, h), 1)
        self.norm = NormGate(self.context)
        if self.conv_size:
            channels = 2 * self.key_dim + self.value_dim
            self.conv = ShortConv(self.context, h, channels, self.conv_size)

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        del positions
        *heads, beta = self.project(x, self.beta)
        heads = jnp.concatenate(heads, axis=-1)
        if self.conv_size:
            heads = self.conv(heads, run, "conv")
        q, k, v = unit_keys(heads, self.key_dim)
        beta = jax.nn.sigmoid(beta.astype(jnp.float32))
        beta = 2.0 * beta if self.negative_eigenvalues else beta
        out = run("main", {"q": q, "k": k, "v": v, "beta": beta})
        return self.out(self.norm(out))
