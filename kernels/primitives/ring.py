"""Attention over a split time axis by a ring: keys and values travel from rank to rank, so no rank
ever holds those of all tokens (Liu et al., Ring Attention, arXiv 2310.01889).

At step t rank p works on the block that started at rank p - t (mod R). In the forward pass blocks
move to the next rank, so p sees the blocks of p, p - 1, ..., 0, and then p + 1, ..., of which it
sees nothing in a contiguous layout. In the backward pass blocks move the other way, and p sees the
same blocks from the last step to the first. The float32 cotangents of a block travel with it and
are back home after R hops. R = 3:

    step       0      1      2             rank      0          1          2
    rank 0     0      2      1             forward   0 2 1      1 0 2      2 1 0
    rank 1     1      0      2             backward  1 2 0      2 0 1      0 1 2
    rank 2     2      1      0

The next block is on its way while a rank works on this one. It works in slabs of `size` keys, the
nearest first (in the backward pass the farthest first), so only one slab at a time is cut into
tiles and converted to float32. A carried cache is whole on every rank; it is visited in place, as
the farthest block. Every rank knows the documents of the whole row (they are small integers), so
slots, documents and positions are compared as on one device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels.blocks import Attention
from kernels.contract import Dims, Op, Options, Sent
from kernels.letters import Inputs
from kernels.primitives import gathered_keys, kv_cache
from kernels.primitives.kv_cache import CacheState, Tokens
from kernels.primitives.time_shards import Shards

# The number of hops that are unrolled in the program. XLA:CPU may start what follows a loop before
# the loop has ended; where both send, ranks can wait for each other forever.
_UNROLLED = 8


class Block(NamedTuple):
    """The keys and values of one rank, or of the cache."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]

    def wide(self) -> "Block":
        """The same in float32."""
        return Block(self.k.astype(jnp.float32), self.v.astype(jnp.float32))

    def zeros(self) -> "Block":
        """Float32 zeros of the same shapes."""
        return Block(*(jnp.zeros(x.shape, jnp.float32) for x in self))

    def like(self, other: "Block") -> "Block":
        """The same in the dtypes of `other`."""
        return Block(self.k.astype(other.k.dtype), self.v.astype(other.v.dtype))


class Where(NamedTuple):
    """The places of tokens: this rank's queries (`own`), the keys of all ranks, rank after rank
    (`row`), and the keys of the cache (`cached`).
    """

    own: Tokens
    row: Tokens
    cached: Tokens

    def of(self, shards: Shards, step: Int[Array, ""]) -> Tokens:
        """The keys of the block that this rank visits at this step."""
        source = (shards.rank() - step) % shards.count
        return _of_rank(self.row, source, self.own.slot.shape[1])

    def subdivided(self, block: int) -> "Where":
        """The same tokens, where every `block` tokens of a document are a document of their own."""
        return Where(*(tokens.subdivided(block) for tokens in self))


class Problem(NamedTuple):
    """What a ring works on: this rank's block, the block of a carried cache, where all tokens are,
    and the cache after them. That cache costs a gather, but only if something reads it.
    """

    own: Block
    cache: Block | None
    where: Where
    after: CacheState


def problem(
    inputs: Inputs, segment_ids: Int[Array, "B T/R"] | None, state: Any, shards: Shards
) -> Problem:
    """The problem of one rank."""
    appended = gathered_keys.appended(inputs, segment_ids, state, shards)
    before, _, _, ids = appended
    time = ids.shape[1]
    if segment_ids is None and state is None:
        place = jnp.broadcast_to(shards.by_rank(jnp.arange(time, dtype=jnp.int32), 0), ids.shape)
        row = cached = Tokens(place, jnp.ones_like(place), place)
    else:
        new, cached = kv_cache.tokens(ids, before)
        row = jax.tree.map(lambda x: shards.by_rank(x, 1), new)
    own = _of_rank(row, shards.rank(), time // shards.count)
    # Nobody sees the tokens that a cache has no room for, as on one device.
    kept = jnp.where(row.slot < before.segment_ids.shape[1], row.segment, 0)
    where = Where(own, row._replace(segment=kept), cached)
    cache = None if state is None else Block(state.k, state.v)
    after, _ = kv_cache.append(*appended)
    return Problem(Block(inputs["k"], inputs["v"]), cache, where, after)


def _of_rank(row: Tokens, rank: Int[Array, ""], time: int) -> Tokens:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, rank * time, time, axis=1), row)


def _sent_on(shards: Shards, tree: Any, distance: int) -> Any:
    pairs = [(rank, (rank + distance) % shards.count) for rank in range(shards.count)]
    return jax.tree.map(lambda x: lax.ppermute(x, shards.axes, pairs), tree)


def near_to_far[C](
    shards: Shards,
    own: Block,
    visit: Callable[[C, Block, Int[Array, ""]], tuple[C, Any]],
    carry: C,
) -> tuple[C, Any]:
    """Calls `visit(carry, block, step)`, which returns the carry and what to keep of this step, for
    steps 0 ... R - 1. Returns the last carry, and what all steps kept, stacked.
    """

    def hop(state: tuple[Block, C], step: Int[Array, ""]) -> tuple[tuple[Block, C], Any]:
        block, carry = state
        coming = _sent_on(shards, block, 1)
        carry, kept = visit(carry, block, step)
        return lax.optimization_barrier((coming, carry)), kept

    steps = jnp.arange(shards.count - 1, dtype=jnp.int32)
    (block, carry), kept = lax.scan(hop, (own, carry), steps, unroll=_UNROLLED)
    carry, last = visit(carry, block, jnp.int32(shards.count - 1))
    return carry, jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), kept, last)


def far_to_near[C](
    shards: Shards,
    own: Block,
    visit: Callable[[C, Block, Block, Int[Array, ""]], tuple[C, Block]],
    carry: C,
) -> tuple[C, Block]:
    """Calls `visit(carry, sums, block, step)`, which returns the carry and `sums` with the block's
    cotangents added, for steps R - 1 ... 0. Returns the last carry, and the sums of this rank's own
    block.
    """

    def hop(state: tuple[Block, Block, C], step: Int[Array, ""]) -> tuple[Any, None]:
        block, sums, carry = state
        # One message after the other: with both on their way, four more blocks are alive.
        block, sums = lax.optimization_barrier((block, _sent_on(shards, sums, -1)))
        coming = _sent_on(shards, block, -1)
        carry, sums = visit(carry, sums, block, step)
        return lax.optimization_barrier((coming, sums, carry)), None

    steps = jnp.arange(shards.count - 1, 0, -1, dtype=jnp.int32)
    start = _sent_on(shards, own, -1), own.zeros(), carry
    (block, sums, carry), _ = lax.scan(hop, start, steps, unroll=_UNROLLED)
    return visit(carry, _sent_on(shards, sums, -1), block, jnp.int32(0))


def take_slabs[C](
    size: int,
    block: Block,
    tokens: Tokens,
    take: Callable[[C, Block, Tokens, Int[Array, ""]], C],
    carry: C,
) -> C:
    """Applies `take(carry, slab, tokens, index)` to the slabs of a block, from the last one to the
    first."""
    block, tokens = _whole_slabs((block, tokens), size)
    number = tokens.slot.shape[1] // size

    def step(n: Int[Array, ""], carry: C) -> C:
        index = number - 1 - n
        slab, here = _slab((block, tokens), index, size)
        return take(carry, slab, here, index)

    return lax.fori_loop(0, number, step, carry)


def pull_slabs[C](
    size: int,
    block: Block,
    tokens: Tokens,
    pull: Callable[[C, Block, Tokens, Int[Array, ""]], tuple[C, Block]],
    carry: tuple[C, Block],
) -> tuple[C, Block]:
    """Applies `pull(carry, slab, tokens, index)`, which returns the carry and the slab's
    cotangents, to the slabs of a block, from the first one to the last. The cotangents are added to
    those of the block in `carry`.
    """
    time = tokens.slot.shape[1]
    block, tokens, sums = _whole_slabs((block, tokens, carry[1]), size)

    def step(index: Int[Array, ""], carry: tuple[C, Block]) -> tuple[C, Block]:
        slab, here = _slab((block, tokens), index, size)
        own, more = pull(carry[0], slab, here, index)
        more = jax.tree.map(lambda x, y: x + y, _slab(carry[1], index, size), more)
        put = lambda x, y: lax.dynamic_update_slice_in_dim(x, y, index * size, axis=1)
        return own, jax.tree.map(put, carry[1], more)

    own, sums = lax.fori_loop(0, tokens.slot.shape[1] // size, step, (carry[0], sums))
    return own, jax.tree.map(lambda x: x[:, :time], sums)


def _slab(tree: Any, index: Int[Array, ""], size: int) -> Any:
    cut = lambda x: lax.dynamic_slice_in_dim(x, index * size, size, axis=1)
    return jax.tree.map(cut, tree)


def _whole_slabs[X](tree: X, size: int) -> X:
    """The tree padded to whole slabs, with document 0 on the padding."""

    def pad(x: Array) -> Array:
        rest = -x.shape[1] % size
        return jnp.pad(x, [(0, 0), (0, rest), *[(0, 0)] * (x.ndim - 2)]) if rest else x

    return jax.tree.map(pad, tree)


def tiles(time: int) -> Attention:
    """The tiles of a rank that has `time` tokens. They are large only where one tile's
    intermediates are small beside everything else the rank holds.
    """
    size = 128 if time <= 8192 else 256
    return Attention(size, size).fit(time, time)


def sent(op: Op, dims: Dims, options: Options, itemsize: int, ranks: int) -> Sent:
    """A block (two arrays) makes R - 1 hops in the forward pass, and R in the backward pass, with
    its cotangents."""
    del op, options
    numbers = dims["B"] * dims["T"] / ranks * dims["G"] * (dims["K"] + dims["V"])
    forward, backward = (ranks - 1) * itemsize, ranks * (itemsize + 4)
    calls = {"ppermute": 2 * (ranks - 1) + 4 * ranks}
    return Sent(numbers * forward, numbers * backward, 2 * ranks - 1, calls)
