"""What attention mixers share: projections to heads and back, query-key norm, the call of their op.

A mixer derives from `HeadMixer`, names its op, and defines `op_options` (static) and, where they
differ, `op_inputs`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax

from lm.modules.linear import linear, project
from lm.modules.mixer import Along, Call, Mixer
from lm.modules.norm import RMSNorm


class HeadMixer(Mixer):
    """x [B, T, D] -> q [B, T, H, K], k, v [B, T, G, K] -> op -> [B, T, D]. `form` is already a
    concrete form when parameters are initialized.

    Attributes:
      num_heads: query heads H; unset: the model's
      num_kv_heads: key and value heads G; unset: the model's
      head_dim: width K of a head; unset: the model's
      form: form of the op, or auto, which takes what was measured to be best on the device
      qk_norm: whether each query and key head has an RMSNorm
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    form: str = "auto"
    qk_norm: bool = False

    op: ClassVar[str]

    def op_options(self) -> dict[str, Any]:
        """The static options of the op."""
        raise NotImplementedError

    def op_inputs(self, x: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
        """x [..., D], positions [...] -> the op's inputs."""
        q, k, v = project(x, self.query, self.key, self.value)
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        return {"q": q, "k": k, "v": v}

    def dims(self) -> dict[str, int]:
        """The sizes of the op's letters that are known when the model is built."""
        return {"H": self.num_heads, "G": self.num_kv_heads, "K": self.head_dim, "V": self.head_dim}

    def problem(self) -> str | None:
        if self.num_heads % self.num_kv_heads:
            return (
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        return None

    def setup(self) -> None:
        d, h, g, k = self.width, self.num_heads, self.num_kv_heads, self.head_dim
        self.query = linear(self.context, "D H K", (d, h, k), 1)
        self.key = linear(self.context, "D G K", (d, g, k), 1)
        self.value = linear(self.context, "D G V", (d, g, k), 1)
        self.out = linear(self.context, "H V D", (h, k, d), 2)
        if self.qk_norm:
            self.query_norm = RMSNorm(self.context, "K")
            self.key_norm = RMSNorm(self.context, "K")

    def calls(self) -> dict[str, Call]:
        return {"main": Call(self.op, self.dims(), self.op_options())}

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        return self.out(run("main", self.op_inputs(x, positions)))
