"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 8 to 12).

    o_t = sum_{j <= t} (phi(q_t) . phi(k_j)) v_j / sum_{j <= t} phi(q_t) . phi(k_j)

phi = 1 + elu in the paper. Without `normalize` there is no denominator, and each head's output is
RMS-normalized instead (Qin et al., arXiv 2210.10340). Parameters: 4 D^2, state: H K (V + 1)
float32; without `normalize` 4 D^2 + V and H K V.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import jax

from lm.modules.feature_maps import FIXED
from lm.modules.linear_mixer import LinearMixer, divide_by_sum, with_ones
from lm.modules.mixer import Along, Call
from lm.modules.norm_gate import NormGate

EPS = 1e-6


class Linear(LinearMixer):
    """Options of a layer label are these fields and those of `LinearMixer`.

    Attributes:
      feature_map: phi, 1 + elu or another
      normalize: whether the output is divided by the sum of the weights; else each head has an
        RMSNorm
    """

    feature_map: Literal["elu", "relu", "identity"] = "elu"
    normalize: bool = True

    op: ClassVar[str] = "gated_linear"

    def problem(self) -> str | None:
        if self.normalize and self.feature_map == "identity":
            return (
                "feature_map='identity' gives weights of both signs, whose sum may be 0; "
                "set normalize=False"
            )
        return super().problem()

    def calls(self) -> dict[str, Call]:
        value_dim = self.value_dim + self.normalize
        scale = 1.0 if self.normalize else None
        return {"main": self.op_call(self.key_dim, value_dim, scale=scale, decay="none")}

    def setup(self) -> None:
        super().setup()
        if not self.normalize:
            self.norm = NormGate(self.context)

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        del positions
        q, k, v = self.project(x)
        phi = FIXED[self.feature_map]
        inputs = {"q": phi(q), "k": phi(k), "v": with_ones(v) if self.normalize else v}
        out = run("main", inputs)
        return self.out(divide_by_sum(out, EPS) if self.normalize else self.norm(out))
