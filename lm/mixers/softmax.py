"""Softmax attention as in Llama: grouped queries; RoPE, ALiBi or neither; window or blocks; sinks,
query-key norm, logit soft cap.

o_i = sum_j softmax_j(scale q_i . k_j) v_j over visible j <= i. RoPE (Su et al. 2021, arXiv
2104.09864) rotates q and k by their position in the document. ALiBi (Press et al. 2021, arXiv
2108.12409) subtracts a slope times the distance. Query-key norm (Henry et al. 2020, arXiv
2010.04245) is an RMSNorm of each head before RoPE. Keys are cached after both. A sink is a learned
logit per head that takes weight and has no value. Blocks are DiagAttention (Qin et al. 2022, arXiv
2210.10340).

`window`, `global_tokens` and `distance_ceiling` together are LM-Infinite (Han et al. 2023, arXiv
2308.16137). Then the op rotates q and k itself, and keys are cached unrotated. These options have
no parameters, so a model trained without them can be evaluated with them.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
from flax import linen as nn

from kernels.primitives import rope
from lm.modules.heads import HeadMixer
from lm.params import declare


class Softmax(HeadMixer):
    """Options of a layer label are these fields and those of `HeadMixer`.

    Attributes:
      position_encoding: RoPE, ALiBi or none
      rope_theta: base of the angles of RoPE
      window: visible keys, including the query's own; 0: all
      logits_soft_cap: c of c tanh(logits / c); 0: none
      sink: whether each head has a learned logit that takes weight and has no value
      block: size of the blocks of DiagAttention: i sees j only where floor(i / block) = floor(j /
        block); 0: no blocks
      global_tokens: the first tokens of each document, visible beyond the window
      distance_ceiling: the distance for keys beyond the window, at most it; 0: none
      scale: multiplies q . k; 0: the parametrization's scale (lm/mup.py)
      rope_scaling: RoPE for longer texts (kernels/primitives/rope.py): (factor,), or Llama 3.1's
        (factor, low cut, high cut, original length); (): none
    """

    position_encoding: Literal["rope", "alibi", "none"] = "rope"
    rope_theta: float = 1e4
    window: int = 0
    logits_soft_cap: float = 0.0
    sink: bool = False
    block: int = 0
    global_tokens: int = 0
    distance_ceiling: int = 0
    scale: float = 0.0
    rope_scaling: tuple[float, ...] = ()

    op: ClassVar[str] = "softmax"

    def problem(self) -> str | None:
        if self.position_encoding == "rope" and self.rope_theta <= 0:
            return f"rope_theta={self.rope_theta} must be positive"
        if self.position_encoding == "rope" and self.head_dim % 2:
            return f"RoPE needs an even K, got head_dim={self.head_dim}"
        if len(self.rope_scaling) not in (0, 1, 4) or min(self.rope_scaling, default=1.0) <= 0:
            return f"rope_scaling={self.rope_scaling} must be (), or 1 or 4 positive numbers"
        if self.rope_scaling and (self.position_encoding != "rope" or self.distance_ceiling):
            return "rope_scaling needs RoPE and no distance_ceiling; set it to ()"
        if self.scale < 0:
            return f"scale={self.scale} must be >= 0; 0 takes the parametrization's scale"
        return super().problem()

    def setup(self) -> None:
        super().setup()
        if self.sink:
            init = declare(nn.initializers.zeros, "H", "vector", decay=False)
            self.sink_logit = self.param("sink", init, (self.num_heads,))

    def op_options(self) -> dict[str, Any]:
        is_turned_by_op = self.distance_ceiling > 0 and self.position_encoding == "rope"
        return {
            "scale": self.scale or self.context.multipliers.attention_scale(self.head_dim),
            "window": self.window,
            "alibi": self.position_encoding == "alibi",
            "logits_soft_cap": self.logits_soft_cap,
            "sink": self.sink,
            "block": self.block,
            "global_tokens": self.global_tokens,
            "distance_ceiling": self.distance_ceiling,
            "rope_theta": self.rope_theta if is_turned_by_op else 0.0,
        }

    def op_inputs(self, x: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
        inputs = super().op_inputs(x, positions)
        if self.sink:
            inputs |= {"sink": self.sink_logit}
        if self.position_encoding == "rope" and not self.distance_ceiling:
            form = {"theta": self.rope_theta, "scaling": self.rope_scaling}
            inputs |= {name: rope.rotate(inputs[name], positions, **form) for name in "qk"}
        return inputs
