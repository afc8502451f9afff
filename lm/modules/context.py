"""The settings that every module of one model shares.

An example: a mesh with data=2, tensor=2 gives rules {"B": ("data",), "H": ("tensor",), ...}. Then
`place(q, "B T H K")` of q [B=4, T=6, H=8, K=16] keeps [2, 6, 4, 16] on a device. The q [B, H, K] of
a single token stays as it is.
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
    """Every module's first field. `context_length` is the number of tokens of a training row, for
    which forms are chosen. `rules` and `weights` map a letter of an activation, or of a parameter,
    to mesh axes (lm/parallel/sharding.py). `matrix` is the kind of the layer's matrices
    (lm/modules/linear.py). `strategies` names for each op of the layer, by the names of
    `Mixer.calls`, how it splits the time axis; {} where no mesh axis splits it. `layout` says which
    tokens a device then holds (kernels/primitives/time_shards.py).
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
        """x [B, T, ...] laid out over the mesh by its letters; a single token's [B, ...] as is."""
        mesh, rules = shard.here(self.mesh, self.rules)
        if not rules or x.ndim != len(letters.split()):
            return x
        layout = shard.fitting(letters, x.shape, rules, mesh)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, layout))

    def stream(self, x: jax.Array) -> jax.Array:
        """The residual stream [B, T, D] in its layout between layers."""
        return self.place(x, f"B {STREAM} D") if x.ndim == 3 else x

    def matmul(self, x: jax.Array, *weights: Weight) -> list[jax.Array]:
        """x [..., *M] times parameters -> [..., *N] for each, in the activations' dtype. A weight
        is the array [*M, *N], its letters, and the number of dimensions M.
        """
        split = Split(self.mesh, self.rules, self.weights)
        return products(self.numerics, split, x, weights)
