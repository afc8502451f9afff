"""LightNet's additive linear recurrence (Qin et al. 2024, arXiv 2405.21022, section 3).

    lse_t = log sum_{j <= t} exp k_j (each channel),  k'_t = exp(k_t - lse_t),  exp g_t = 1 - k'_t
    S_t = diag(exp g_t) S_{t-1} + k'_t v_t^T,  o_t = S_t^T silu(q_t)
    y = W_o (RMSNorm(o) * swish(W_2 W_1 x))                          the norm over all heads

So a channel of S is the mean of the values so far, weighted by a softmax over time. Parameters:
4 D^2, 2 D R of the gate of rank R, and D. State: H K V, H K of lse, and H K of zeros (the imaginary
part that linear_scan keeps for complex modes); float32.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from lm.modules.linear_mixer import LinearMixer
from lm.modules.low_rank import LowRank
from lm.modules.mixer import Along, Call
from lm.modules.norm_gate import NormGate

# Beyond this 1 - k' has no digits left in float32, and a gradient through log 0 would be infinite.
LARGEST = 1.0 - 2.0**-20


class Lightnet(LinearMixer):
    """Options of a layer label are these fields and those of `LinearMixer`.

    Attributes:
      gate_rank: rank R of the output gate
      sum_form: form of the scan of log sums, or auto
    """

    gate_rank: int = 128
    sum_form: str = "auto"

    op: ClassVar[str] = "gated_linear"

    def problem(self) -> str | None:
        if self.gate_rank < 1:
            return f"gate_rank={self.gate_rank} must be at least 1"
        return super().problem()

    def calls(self) -> dict[str, Call]:
        dims = {"H": self.num_heads, "K": self.key_dim, "N": 1}
        scale = self.context.multipliers.attention_scale(self.key_dim)
        return {
            "main": self.op_call(self.key_dim, self.value_dim, scale=scale, decay="vector"),
            "sum": Call("linear_scan", dims, {"transition": "log_sum"}),
        }

    def setup(self) -> None:
        super().setup()
        shape = self.num_heads, self.value_dim
        self.gate = LowRank(self.context, self.width, self.gate_rank, "H V", shape, use_bias=False)
        self.norm = NormGate(self.context, over="heads")

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        del positions
        q, k, v = self.project(x)
        k = k.astype(jnp.float32)
        share = jnp.exp(k - run("sum", {"x": k}))
        log_decay = jnp.log1p(-jnp.minimum(share, LARGEST))
        inputs = {"q": jax.nn.silu(q), "k": share.astype(q.dtype), "v": v, "log_decay": log_decay}
        return self.out(self.norm(run("main", inputs), self.gate(x)))
