"""BASED's linear half (Arora et al. 2024, arXiv 2402.18668, section 4): Taylor feature map.

    phi(q) . phi(k) = 1 + s + s^2 / 2,  s = q . k / d'^1/2         the second-order exp
    o_t = sum_{j <= t} (phi(q_t) . phi(k_j)) v_j / sum_{j <= t} phi(q_t) . phi(k_j)

Queries and keys have width d' = `feature_dim` (16 in the paper, which gives 153 features: each
product of two channels once). The other half of the paper's layers is a sliding window; a pattern
of both is the hybrid. Parameters: 2 D^2 + 2 D H d'. State: H 153 (V + 1) float32.
"""

from __future__ import annotations

from typing import ClassVar

import jax

from lm.modules.feature_maps import taylor, taylor_dim
from lm.modules.linear_mixer import LinearMixer, divide_by_sum, with_ones
from lm.modules.mixer import Along, Call

EPS = 1e-12


class Based(LinearMixer):
    """Options of a layer label are these fields and those of `LinearMixer`, but for `expand_k`.

    Attributes:
      feature_dim: width of queries and keys before the feature map
    """

    feature_dim: int = 16

    op: ClassVar[str] = "gated_linear"

    def problem(self) -> str | None:
        if self.feature_dim < 1:
            return f"feature_dim={self.feature_dim} must be at least 1"
        if self.expand_k != 1.0:
            return f"expand_k={self.expand_k} has no effect here; set expand_k=1.0, and feature_dim"
        return super().problem()

    @property
    def key_dim(self) -> int:
        return self.feature_dim

    def calls(self) -> dict[str, Call]:
        features = taylor_dim(self.feature_dim)
        return {"main": self.op_call(features, self.value_dim + 1, scale=1.0, decay="none")}

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        del positions
        q, k, v = self.project(x)
        # The features stay float32, because their products are sums of up to 153 terms.
        q, k = taylor(q), taylor(k)
        return self.out(divide_by_sum(run("main", {"q": q, "k": k, "v": with_ones(v)}), EPS))
