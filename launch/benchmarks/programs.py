"""The structure of a program before any compiler sees it: inner jaxprs, and collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval as pe


class Collective(NamedTuple):
    """One operand of a collective: JAX's name of the primitive, bytes, and how often it runs."""

    kind: str
    bytes: int
    times: int

    def sent(self, ranks: int) -> float:
        """Bytes that one of `ranks` sends in all runs together, by ring algorithms."""
        rest = ranks - 1
        share = {
            "all_gather": rest,
            "reduce_scatter": rest / ranks,
            "psum": 2 * rest / ranks,
            "all_to_all": rest / ranks,
            "ppermute": 1,
        }
        return share[self.kind] * self.bytes * self.times


def within(eqn: Any) -> Iterator[Any]:
    """The jaxprs inside an equation: bodies of loops and calls, and branches."""
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner


def collectives(call: Callable[..., Any], *args: Any) -> list[Collective]:
    """The collectives of floats in a program, after dead code has been removed."""
    closed = jax.make_jaxpr(call)(*args)
    used, _ = pe.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))
    return list(_walk(used, 1))


def _walk(jaxpr: Any, times: int) -> Iterator[Collective]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name != "axis_index" and (name == "psum" or "axis_name" in eqn.params):
            for x in (x.aval for x in eqn.invars):
                if jnp.issubdtype(x.dtype, jnp.floating):
                    yield Collective(name, x.size * x.dtype.itemsize, times)
        runs = eqn.params["length"] if name == "scan" else 1
        for inner in within(eqn):
            yield from _walk(inner, times * runs)
