"""Multi-scale retention (Sun et al. 2023, arXiv 2307.08621, eq. 5 to 8).

    o_t = sum_{j <= t} gamma_h^(t-j) (q_t . k_j) v_j,  gamma_h = 1 - 2^(-5-h)
    y = W_o (RMSNorm(o) * swish(W_g x))

q and k carry RoPE, values are twice as wide as keys. The normalizers of the paper are left out, as
in flash-linear-attention: the norm of each head takes away any factor of o, that of q . k among
them. Parameters 8 D^2 + V; state H K V float32, here 2 D^2 / H.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from kernels.primitives import rope
from lm.modules.linear import linear
from lm.modules.linear_mixer import LinearMixer
from lm.modules.mixer import Along, Call
from lm.modules.norm_gate import NormGate


class Retnet(LinearMixer):
    """Options of a layer label are these fields and those of `LinearMixer`.

    Attributes:
      rope_theta: base of the angles of RoPE
    """

    expand_v: float = 2.0
    rope_theta: float = 1e4

    op: ClassVar[str] = "gated_linear"

    def problem(self) -> str | None:
        if self.rope_theta <= 0:
            return f"rope_theta={self.rope_theta} must be positive"
        odd = f"RoPE needs an even K, got {self.key_dim}" if self.key_dim % 2 else None
        return super().problem() or odd

    def calls(self) -> dict[str, Call]:
        scale = self.context.multipliers.attention_scale(self.key_dim)
        return {"main": self.op_call(self.key_dim, self.value_dim, scale=scale, decay="scalar")}

    def setup(self) -> None:
        super().setup()
        shape = self.width, self.num_heads, self.value_dim
        self.gate = linear(self.context, "D H V", shape, 1)
        self.norm = NormGate(self.context)

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        q, k, v, gate = self.project(x, self.gate)
        q, k = (rope.rotate(heads, positions, theta=self.rope_theta) for heads in (q, k))
        head = jnp.arange(self.num_heads, dtype=jnp.float32)
        log_decay = jnp.broadcast_to(jnp.log1p(-(2.0 ** (-5.0 - head))), v.shape[:-1])
        out = run("main", {"q": q, "k": k, "v": v, "log_decay": log_decay})
        return self.out(self.norm(out, gate))
