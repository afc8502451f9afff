"""Softmax attention as in Llama: grouped queries, RoPE or ALiBi or neither, window, query-key norm,
logit soft cap.

o_i = sum_j softmax_j(scale q_i . k_j) v_j over visible j <= i. RoPE (Su et al. 2021, arXiv
2104.09864) turns q and k by their position in the document; ALiBi (Press et al. 2021, arXiv
2108.12409) subtracts a slope times the distance; query-key norm (Henry et al. 2020, arXiv
2010.04245) is an RMSNorm of each head before RoPE. Keys are cached after both.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax

from kernels.primitives import rope
from lm.modules.heads import HeadMixer


class Softmax(HeadMixer):
    """Options of a layer label are these fields and those of `HeadMixer`."""

    position_encoding: Literal["rope", "alibi", "none"] = "rope"
    rope_theta: float = 1e4
    window: int = 0  # visible keys, the query's own included; 0: all
    logits_soft_cap: float = 0.0  # 0: none

    op: ClassVar[str] = "softmax"

    def op_options(self) -> dict[str, Any]:
        return {
            "scale": self.context.multipliers.attention_scale(self.head_dim),
            "window": self.window,
            "alibi": self.position_encoding == "alibi",
            "logits_soft_cap": self.logits_soft_cap,
        }

    def op_inputs(self, x: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
        inputs = super().op_inputs(x, positions)
        if self.position_encoding == "rope":
            turned = {
                name: rope.rotate(inputs[name], positions, theta=self.rope_theta) for name in "qk"
            }
            inputs |= turned
        return inputs
