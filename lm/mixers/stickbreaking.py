"""Stick-breaking attention (Tan et al. 2024, arXiv 2410.17980): there is no position encoding; the
order of the keys gives a bias to recent ones.

A_ij = beta_ij prod_{j<l<i} (1 - beta_il), beta = sigmoid(scale q_i . k_j): the nearest key takes
its share of the stick first. What is left, the remainder, is dropped, or multiplies the query's own
value, or a learned vector per head (`remainder`). With a `tolerance`, blocks of keys are not read
where less than that is left.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
from flax import linen as nn

from lm.modules.heads import HeadMixer
from lm.params import declare


class Stickbreaking(HeadMixer):
    """Options of a layer label are these fields and those of `HeadMixer`.

    Attributes:
      remainder: where the rest of the stick goes: nowhere, to the query's own value, or to a
        learned vector of each head
      attend_current: whether a query sees its own key
      tolerance: keys for which less of the stick than this is left are not read; 0: all are
    """

    remainder: Literal["none", "value", "bias"] = "none"
    attend_current: bool = False
    tolerance: float = 0.0

    op: ClassVar[str] = "stickbreaking"

    def op_options(self) -> dict[str, Any]:
        return {
            "scale": self.context.multipliers.attention_scale(self.head_dim),
            "remainder": self.remainder,
            "attend_current": self.attend_current,
            "tolerance": self.tolerance,
        }

    def setup(self) -> None:
        super().setup()
        if self.remainder == "bias":
            init = declare(nn.initializers.zeros, "H V", "vector", decay=False)
            self.remainder_bias = self.param(
                "remainder_bias", init, (self.num_heads, self.head_dim)
            )

    def op_inputs(self, x: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
        inputs = super().op_inputs(x, positions)
        if self.remainder == "bias":
            inputs |= {"remainder_bias": self.remainder_bias}
        return inputs
