"""The settings that every module of one model shares.

An example: mesh data=2, tensor=2 gives rules {"B": ("data",), "H": ("tensor",), ...}, so that
`place(q, "B T H K")` of q [B=4, T=6, H=8, K=16] keeps [2, 6, 4, 16] on a device; a lone token's
q [B, H, K] stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding

from kernels import shard
from kernels.contract import Layout
from lm.families import Choice
from lm.mup import Multipliers
from lm.parallel.matmul import Numerics, Split, Weight, products
from lm.parallel.sharding import STREAM


@dataclasses.dataclass(frozen=True)
class Context:
    """Handed to every module as its first field. `context_length`: tokens of a training row, for
    which forms are chosen. `rules`, `weights`: letter of an activation, of a parameter -> mesh axes
    (lm/parallel/sharding.py). `matrix`: the kind of the layer's matrices (lm/modules/linear.py).
    `strategies`: of the layer, how each of its ops splits the time axis, by the names of
    `Mixer.calls`; {} where no axis of the mesh splits it. `layout`: which tokens a device then
    holds (kernels/primitives/time_shards.py).
    """

    numerics: Numerics
    multipliers: Multipliers
    norm_eps: float
    context_length: int
    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]
    weights: Mapping[str, tuple[str, ...]]
    matrix: Choice
    strategies: Mapping[str, str]
    layout: Layout

    def place(self, x: jax.Array, letters: str) -> jax.Array:
        """x [B, T, ...] laid out over the mesh by its letters; a lone token, [B, ...], as is."""
        mesh, rules = shard.here(self.mesh, self.rules)
        if not rules or x.ndim != len(letters.split()):
            return x
        layout = shard.fitting(letters, x.shape, rules, mesh)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, layout))

    def stream(self, x: jax.Array) -> jax.Array:
        """The residual stream [B, T, D], between layers."""
        return self.place(x, f"B {STREAM} D") if x.ndim == 3 else x

    def matmul(self, x: jax.Array, *weights: Weight) -> list[jax.Array]:
        """x [..., *M] times parameters -> [..., *N] of each, in the activations' dtype. A weight is
        the array [*M, *N], its letters, and the number of dimensions M.
        """
        split = Split(self.mesh, self.rules, self.weights)
        return products(self.numerics, split, x, weights)
