"""TransNormer's NormAttention (Qin et al. 2022, arXiv 2210.10340, eq. 8).

    O = XNorm(phi(Q) (phi(K)^T V)),  phi = 1 + elu

There is no denominator: the norm of the output bounds the gradients instead. The paper's early
layers are DiagAttention, which is softmax attention within blocks, an option of the softmax mixer;
use a pattern for the hybrid. Which activation and which norm the paper's T1 and T2 use is
UNCONFIRMED, so both are options. Parameters: 4 D^2 + D, or 4 D^2 + V with a norm of each head.
State: H K V float32.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import jax

from lm.modules.feature_maps import FIXED
from lm.modules.linear_mixer import LinearMixer
from lm.modules.mixer import Along, Call
from lm.modules.norm_gate import NormGate


class Transnormer(LinearMixer):
    """Options of a layer label are these fields and those of `LinearMixer`.

    Attributes:
      feature_map: phi, 1 + elu or another
      norm_over: whether the norm of the output is over each head or over all heads
    """

    feature_map: Literal["elu", "relu", "identity"] = "elu"
    norm_over: Literal["head", "heads"] = "heads"

    op: ClassVar[str] = "gated_linear"

    def calls(self) -> dict[str, Call]:
        return {"main": self.op_call(self.key_dim, self.value_dim, scale=None, decay="none")}

    def setup(self) -> None:
        super().setup()
        self.norm = NormGate(self.context, over=self.norm_over)

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        del positions
        q, k, v = self.project(x)
        phi = FIXED[self.feature_map]
        return self.out(self.norm(run("main", {"q": phi(q), "k": phi(k), "v": v})))
