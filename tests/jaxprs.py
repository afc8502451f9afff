"""Equations of a jaxpr that XLA would evaluate while it compiles."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import jax.extend.core

from launch.benchmarks.programs import within

# XLA evaluates these while it compiles, one element at a time, if all operands are constants.
FOLDED = ("argmax", "argmin", "cum", "dot_general", "gather", "reduce", "scatter", "sort")
# A result of these is not a constant to XLA, or XLA never folds it.
OPAQUE = ("iota", "optimization_barrier", "random", "scan", "while")


def foldable(jaxpr: Any, least: int, known: Collection[Any] = ()) -> Iterator[Any]:
    """Equations whose operands are all constants, one of them with at least `least` elements. A
    slice that a scan takes of a constant is a constant too.
    """
    known = set(known)
    is_known = lambda x: not isinstance(x, jax.extend.core.Var) or x in known
    for eqn in jaxpr.eqns:
        name, given = eqn.primitive.name, [is_known(x) for x in eqn.invars]
        if name == "scan":
            consts, carry, _ = (len(list(part.vals)) for part in eqn.params["ft_in"].unpack())
            given[consts : consts + carry] = [False] * carry
        for inner in within(eqn):
            size = len(inner.invars)
            passed = [False] * size if name == "while" else given[len(given) - size :]
            own = [x for x, is_constant in zip(inner.invars, passed, strict=True) if is_constant]
            yield from foldable(inner, least, own)
        if all(given) and not name.startswith(OPAQUE):
            known.update(eqn.outvars)
            if name.startswith(FOLDED) and any(x.aval.size >= least for x in eqn.invars):
                yield eqn
