"""A loop in a TPU kernel over blocks that lie in HBM."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array


class Walk(NamedTuple):
    """A double-buffered loop over blocks in HBM: the next block is fetched during work on this one.

    `copies(step)` are the transfers of a step; consecutive steps use two buffers in turn.
    """

    count: Array
    copies: Callable[[Array], list[Any]]

    def run[Carry](
        self, visit: Callable[[Array, Carry], tuple[Array, Carry]], start: Carry
    ) -> tuple[Array, Carry]:
        """Runs steps until `visit` says stop; returns how many ran, and the last carry."""

        def fetch(step: Array) -> None:
            @pl.when(step < self.count)
            def _() -> None:
                for copy in self.copies(step):
                    copy.start()

        def wait(step: Array) -> None:
            for copy in self.copies(step):
                copy.wait()

        def body(carry: tuple[Array, Array, Carry]) -> tuple[Array, Array, Carry]:
            step, _, carried = carry
            fetch(step + 1)
            wait(step)
            goes_on, carried = visit(step, carried)
            return step + 1, goes_on.astype(jnp.int32), carried

        first = jnp.int32(0)
        fetch(first)
        going = lambda carry: (carry[0] < self.count) & (carry[1] > 0)
        steps, _, end = lax.while_loop(going, body, (first, jnp.int32(1), start))

        @pl.when(steps < self.count)
        def drain() -> None:
            wait(steps)  # fetched but not visited; it must arrive before the buffer is reused

        del drain
        return steps, end
