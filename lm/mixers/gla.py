"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635, eq. 3 and section 4.4).

    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t
    g = log sigmoid(x W_1 W_2 + b) / 16            W_1 W_2 of rank 16
    y = W_o (RMSNorm(o) * swish(W_g x))

Keys are half as wide as values. Parameters: 4 D^2 + 16 (D + D/2) + D/2 + V. State: D^2 / (2 H)
float32.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from lm.modules.linear import linear
from lm.modules.linear_mixer import LinearMixer
from lm.modules.low_rank import LowRank
from lm.modules.mixer import Along, Call
from lm.modules.norm_gate import NormGate


class Gla(LinearMixer):
    """Options of a layer label are these fields and those of `LinearMixer`.

    Attributes:
      gate_rank: rank of the two matrices of the gate
      gate_divisor: what the logarithm of the gate is divided by
    """

    expand_k: float = 0.5
    gate_rank: int = 16
    gate_divisor: float = 16.0

    op: ClassVar[str] = "gated_linear"

    def problem(self) -> str | None:
        if self.gate_rank < 1 or self.gate_divisor <= 0:
            return f"gate_rank={self.gate_rank}, gate_divisor={self.gate_divisor} must be positive"
        return super().problem()

    def calls(self) -> dict[str, Call]:
        scale = self.context.multipliers.attention_scale(self.key_dim)
        return {"main": self.op_call(self.key_dim, self.value_dim, scale=scale, decay="vector")}

    def setup(self) -> None:
        super().setup()
        d, h, k, v = self.width, self.num_heads, self.key_dim, self.value_dim
        self.decay = LowRank(self.context, d, self.gate_rank, "H K", (h, k))
        self.gate = linear(self.context, "D H V", (d, h, v), 1)
        self.norm = NormGate(self.context)

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        del positions
        q, k, v, gate = self.project(x, self.gate)
        log_decay = jax.nn.log_sigmoid(self.decay(x).astype(jnp.float32)) / self.gate_divisor
        out = run("main", {"q": q, "k": k, "v": v, "log_decay": log_decay})
        return self.out(self.norm(out, gate))
