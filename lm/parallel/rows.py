"""Rows whose tokens devices share: what is asked of each layer, and how one of its ops does it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jaxtyping import DTypeLike

from kernels import dispatch, shard
from kernels.contract import Layout
from kernels.shard import Rules
from kernels.strategies import Link, Way
from lm.config import MeshConfig, UserError
from lm.parallel.sharding import AnyMesh

AUTO = "auto"


class Rows(NamedTuple):
    """Rows of `time` tokens, computed in `dtype` on a mesh whose devices a link joins."""

    time: int
    dtype: DTypeLike
    mesh: AnyMesh
    rules: Rules
    layout: Layout
    link: Link

    def way(
        self,
        op: str,
        strategy: str,
        dims: Mapping[str, int],
        options: Mapping[str, Any],
        whole: Collection[str],
    ) -> Way | None:
        """How a call of an op splits them, None where the mesh does not; letters in `whole` are
        split over no axis.

        Raises:
          ValueError: the op has not that strategy, or none that takes the problem.
        """
        shards = shard.time_shards(self.rules, self.mesh, self.layout)
        if shards is None:
            dispatch.check_strategy(op, strategy)
            return None
        rules = {letter: axes for letter, axes in self.rules.items() if letter not in whole}
        # A row is enough: what a strategy sends is in proportion to them.
        sizes = shard.of_rank(dims, rules, self.mesh) | {"B": 1, "T": self.time}
        problem = {"dims": sizes, "options": options, "dtype": self.dtype}
        return dispatch.split(op, strategy, **problem, shards=shards, link=self.link)


def strategies(mesh: MeshConfig) -> tuple[str, dict[str, str]]:
    """The strategy of all layers, and those of labels that differ: "gather", {}, or of
    "a=states,b=ring" auto, {"a": "states", "b": "ring"}.

    Raises:
      UserError: neither of the two.
    """
    pairs = [[part.strip() for part in x.split("=")] for x in mesh.sequence_strategy.split(",")]
    if len(pairs) == len(pairs[0]) == 1:
        return pairs[0][0], {}
    named = {pair[0]: pair[-1] for pair in pairs}
    if len(named) < len(pairs) or not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise UserError(
            f"mesh.sequence_strategy={mesh.sequence_strategy!r}: write auto, the name of a "
            "strategy, or label=name,label=name"
        )
    return AUTO, named
