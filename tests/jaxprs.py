"""Programs within programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax


def within(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an equation holds: bodies of loops and calls, branches."""
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner
