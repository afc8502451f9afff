"""Hedgehog (Zhang et al. 2024, arXiv 2402.04347): linear attention with a learned feature map.

    o_t = sum_{j <= t} (phi(q_t) . phi(k_j)) v_j / sum_{j <= t} phi(q_t) . phi(k_j)

phi is a softmax of a learned map of the head and one of its negative. The map starts as the
identity (lm/modules/feature_maps.py has both published kinds). Parameters: 4 D^2, and 2 (K^2 + K)
for `joint` or 2 H K^2 for `split`. State: H 2K (V + 1) float32.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import jax

from lm.modules.feature_maps import Hedgehog as FeatureMap
from lm.modules.linear_mixer import LinearMixer, divide_by_sum, with_ones
from lm.modules.mixer import Along, Call

# With `joint`, a key opposite to its query weighs about exp(-4 |y|); a first token has only itself.
EPS = 1e-12


class Hedgehog(LinearMixer):
    """Options of a layer label are these fields and those of `LinearMixer`.

    Attributes:
      feature_map: joint: one softmax over the map and its negative; split: one of each
    """

    feature_map: Literal["joint", "split"] = "split"

    op: ClassVar[str] = "gated_linear"

    def calls(self) -> dict[str, Call]:
        call = self.op_call(2 * self.key_dim, self.value_dim + 1, scale=1.0, decay="none")
        return {"main": call}

    def setup(self) -> None:
        super().setup()
        self.query_map = FeatureMap(self.context, self.num_heads, self.feature_map)
        self.key_map = FeatureMap(self.context, self.num_heads, self.feature_map)

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        del positions
        q, k, v = self.project(x)
        q, k = self.query_map(q), self.key_map(k)
        out = run("main", {"q": q.astype(v.dtype), "k": k.astype(v.dtype), "v": with_ones(v)})
        return self.out(divide_by_sum(out, EPS))
