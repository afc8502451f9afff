"""A recurrence over ranks (`rank_state`) by passing the state from rank to rank, in blocks (the
All-Scan of ZeCO, arXiv 2507.01004).

Blocks are cut along an axis of the state that `advance` does not mix: the rows of a state that
decays, as in the paper, or the columns of a state that a matrix P multiplies from the left (then P
is not sent). At tick t rank p has block t - p of `entered` and sends the same block after
`advance`. For n blocks over R ranks that takes R + n - 2 messages, one after another:

    tick       0    1    2    3    4
    rank 0     0    1    2               n = 3, R = 3: the messages of
    rank 1          0    1    2          ticks 0 to 3
    rank 2               0    1    2

A rank receives one state and nothing else, however many ranks there are. In the backward pass the
cotangents of `entered` travel in the same way from the last rank to the first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int

from kernels.contract import Sent
from kernels.primitives.rank_state import STATES, Advance
from kernels.primitives.time_shards import Shards


class Cut(NamedTuple):
    """Where blocks are cut: along this axis of the state and of the fields of `done`. A field of
    size 1 along it belongs to every block, and so do the fields of `done` named in `whole`.
    """

    axis: int
    whole: tuple[str, ...] = ()

    def of_state(self, state: Any, index: Int[Array, ""], count: int) -> Any:
        """Block `index` of `count` of the state."""
        return jax.tree.map(lambda x: self._block(x, index, count), state)

    def of_done(self, done: Any, index: Int[Array, ""], count: int) -> Any:
        """The part of `done` that acts on that block of the state."""
        parts = {name: x for name, x in done._asdict().items() if name not in self.whole}
        return done._replace(**self.of_state(parts, index, count))

    def together(self, blocks: Any) -> Any:
        """[count, B, ...] -> [B, ...], the inverse of `of_state`."""
        return jax.tree.map(self._joined, blocks)

    def _block(self, x: Array, index: Int[Array, ""], count: int) -> Array:
        if x.shape[self.axis] == 1:
            return x
        size = x.shape[self.axis] // count
        return lax.dynamic_slice_in_dim(x, index * size, size, self.axis)

    def _joined(self, blocks: Array) -> Array:
        x = jnp.moveaxis(blocks, 0, self.axis)
        count, size = x.shape[self.axis : self.axis + 2]
        return x.reshape(*x.shape[: self.axis], count * size, *x.shape[self.axis + 2 :])


def num_blocks(size: int, ranks: int) -> int:
    """How many blocks an axis of this size is cut into: its largest divisor up to 4 (R - 1).

    A pass takes (R - 1 + n) (latency + state / (n bandwidth)). That is least where n is the square
    root of (R - 1) state / (latency bandwidth), which depends on the device. With n = 4 (R - 1) a
    rank waits in a fifth of the R - 1 + n ticks and sends (R - 2) / n < 1/4 more than one state, so
    more blocks could not save more than that. If the size is a power of two and at least 4 (R - 1),
    it has a divisor above 2 (R - 1), and the excess is below 1/2.
    """
    return max(n for n in range(1, 4 * (ranks - 1) + 1) if size % n == 0)


def enter(cut: Cut, advance: Advance, shards: Shards, done: Any, first: Any) -> Any:
    """The state at this rank's first token. With `cut` bound it is a `rank_state.Enter`."""
    return _enter(cut, advance, shards, done, first)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _enter(cut: Cut, advance: Advance, shards: Shards, done: Any, first: Any) -> Any:
    return _forward(cut, advance, shards, done, first)[0]


def _forward(
    cut: Cut, advance: Advance, shards: Shards, done: Any, first: Any
) -> tuple[Any, tuple[Any, Any]]:
    def send(entered: Any, index: Int[Array, ""], count: int) -> Any:
        return advance(cut.of_done(done, index, count), entered)

    entered = checkpoint_name(_handed_on(cut, shards, first, send, 1), STATES)
    return entered, (done, entered)


def _backward(
    cut: Cut, advance: Advance, shards: Shards, saved: tuple[Any, Any], given: Any
) -> tuple[Any, Any]:
    done, entered = saved

    def send(left: Any, index: Int[Array, ""], count: int) -> Any:
        """The cotangent of the state that entered this rank, from that of the state it leaves."""
        step = partial(advance, cut.of_done(done, index, count))
        (back,) = jax.vjp(step, cut.of_state(entered, index, count))[1](left)
        return jax.tree.map(jnp.add, cut.of_state(given, index, count), back)

    # The state that the last rank leaves enters no rank, so its cotangent is zero.
    left = _handed_on(cut, shards, jax.tree.map(jnp.zeros_like, given), send, -1)
    d_done, back = jax.vjp(advance, done, entered)[1](left)
    # shard_map sums the cotangents of an array that is whole on every rank: only rank 0 adds one.
    is_first = shards.rank() == 0
    return d_done, jax.tree.map(lambda x, y: jnp.where(is_first, x + y, 0.0), given, back)


_enter.defvjp(_forward, _backward)


def _handed_on(
    cut: Cut, shards: Shards, start: Any, send: Callable[..., Any], way: Literal[1, -1]
) -> Any:
    """What each rank receives from the rank before it (`way` 1) or after it (-1), all blocks
    together; `start` on the rank that has no such neighbor. `send(block, index, count)` is what a
    rank sends once it has received block `index`.
    """
    count = num_blocks(jax.tree.leaves(start)[0].shape[cut.axis], shards.count)
    place = shards.rank() if way == 1 else shards.count - 1 - shards.rank()
    is_start = place == 0

    def tick(came: Any, t: Int[Array, ""]) -> tuple[Any, Any]:
        # Before its first block and after its last one a rank sends what nobody reads.
        index = jnp.clip(t - place, 0, count - 1)
        own = cut.of_state(start, index, count)
        block = jax.tree.map(partial(jnp.where, is_start), own, came)
        flat, tree_of = ravel_pytree(send(block, index, count))  # one message
        came = tree_of(shards.from_before(flat, way))
        return came, came

    none = jax.tree.map(jnp.zeros_like, cut.of_state(start, jnp.int32(0), count))
    ticks = jnp.arange(shards.count + count - 2, dtype=jnp.int32)
    _, came = lax.scan(tick, none, ticks)
    # Block 0 arrives at the end of tick place - 1; at place 0 nothing arrives.
    own = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, place - 1, count), came)
    return jax.tree.map(partial(jnp.where, is_start), start, cut.together(own))


def sent(state: float, size: int, ranks: int) -> Sent:
    """Bytes sent by a rank whose state has `state` numbers, with `size` along the axis cut."""
    count = num_blocks(size, ranks)
    messages = ranks + count - 2
    each = 4.0 * state * messages / count
    return Sent(each, each, 2 * messages, {"ppermute": 2 * messages})
