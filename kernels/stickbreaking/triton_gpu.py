"""Stick-breaking attention for NVIDIA GPUs in Triton: forward, dq, and dk with dv.

Keys are processed in pairs (even, odd). With u = e^z, two keys share a logarithm and an
exponential:

    log2((1 + u0) (1 + u1))                                     what both take off, in bits
    E = 2^-(left + the same, summed over the pair and nearer ones)
    A0 = u0 E              A1 = u1 (1 + u0) E

That is four special-function operations for two keys, where a single key costs three. (In the
backward pass E covers only nearer pairs, and u0 and u1 are first divided by (1 + u0) (1 + u1):
where keys take nearly everything, 2^-left would be 0.) z is capped at 62 bits: above that,
sigmoid(z) is 1 in float32, and the key leaves less than 1e-18 of the stick. Sums along a tile are
products with a triangle of ones. Their operand is split into two bfloat16 parts (relative error
2^-17); float32 inputs are not split, and take three passes of the tensor cores.

    forward    a program has a block of queries of one head and visits its keys, nearest first,
               until no query has anything left (2^-150: every weight is then 0 in float32) or more
               than the tolerance; it writes `left` before each tile, and which tiles it visited
    dq         the same tiles, farthest first; it writes `flow` before each tile
    dk and dv  a program has a block of keys and walks a list of the blocks of queries that visited
               it, in all heads that read its key head

Each program owns what it writes: nothing is added atomically, and two runs agree in every bit.
"""

# pyright: basic, reportAttributeAccessIssue=false
# ruff: noqa: ANN202

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int
from triton.language.extra.cuda import libdevice

from kernels import segments
from kernels.blocks import TritonAttention
from kernels.contract import Options
from kernels.letters import Inputs
from kernels.primitives import kv_cache, triton_call
from kernels.primitives.kv_cache import CacheState, Placed
from kernels.stickbreaking import tile

DEFAULT = TritonAttention()
CANDIDATES = tuple(
    TritonAttention(block_q, block_kv, num_warps, num_stages, span)
    for block_q, block_kv, num_warps in ((128, 64, 8), (64, 64, 4), (128, 32, 8))
    for num_stages in (2, 3)
    for span in (2, 4, 16)
)

MASKED = tl.constexpr(-1e30)  # a finite stand-in for -inf: 2^MASKED is 0
CERTAIN = tl.constexpr(62.0)  # bits; (1 + 2^62)^2 is finite, and its inverse not 0
LN2 = tl.constexpr(math.log(2.0))
USED_UP = 150.0  # bits; 2^-150 is 0 in float32


class Where(NamedTuple):
    """Slot and document of queries and keys, and the first block of keys with a query's document.

    The document of padding is -1 among queries and 0 among keys; `begin` of padding is past all
    blocks. Where nothing is packed, every array is [1] zeros.
    """

    q_slot: Int[Array, "B T"]
    q_segment: Int[Array, "B T"]
    kv_segment: Int[Array, "B S"]
    begin: Int[Array, "B T"]


class Sizes(NamedTuple):
    """The constants of a compiled kernel; one-letter names are the usual dimensions.

    There are I by J tiles of M queries by N keys; memory has room for TILES tiles per head. T_END
    and S_END are T and S, or 0 where these are multiples of the blocks. SCALE is in bits.
    """

    T: int
    S: int
    H: int
    G: int
    K: int
    V: int
    M: int
    N: int
    I: int
    J: int
    TILES: int
    SPAN: int
    T_END: int
    S_END: int
    SCALE: float
    ENOUGH: float
    STRICT: int
    PACKED: bool
    CARRIED: bool
    REMAINDER: bool
    PRECISE: bool
    SAVE: bool = True


class Residuals(NamedTuple):
    """What the backward pass needs. `ends` is the range of key blocks that each block of queries
    visited: the first one, and one past the last.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    where: Where
    rem: Float[Array, "B H T"]
    left: Float[Array, "BH TILES M"]
    ends: Int[Array, "BH I 2"]


def apply(
    inputs: Inputs,
    segment_ids: Int[Array, "B T"] | None,
    state: CacheState | None,
    *,
    options: Options,
    blocks: TritonAttention | None = None,
) -> tuple[Float[Array, "B T H V"], CacheState]:
    """Output and state of T more tokens."""
    q = inputs["q"]
    placed = kv_cache.place(inputs["k"], inputs["v"], segment_ids, state)
    blocks = _fit(blocks or DEFAULT, max(q.shape[3], placed.v.shape[3]), q.dtype)
    k, v = (x.astype(q.dtype) for x in (placed.k, placed.v))
    sizes = _sizes(q, placed, options, blocks)
    launch = (blocks.num_warps, blocks.num_stages)
    out, rem = attend(sizes, launch, q, k, v, _locate(placed, sizes.N))
    if sizes.REMAINDER:
        out = out + jnp.swapaxes(rem, 1, 2)[..., None] * tile.rest(inputs, options)
    return segments.blank_padding(out, placed.q_segment).astype(q.dtype), placed.state


def _fit(blocks: TritonAttention, width: int, dtype: Any) -> TritonAttention:
    """Smaller tiles for float32 and for heads wider than 128, which take more registers."""
    if dtype == jnp.bfloat16 and width <= 128:
        return blocks
    warps = min(blocks.num_warps, 4 if dtype == jnp.float32 else 8)
    size = min(blocks.block_q, 64)
    return TritonAttention(size, min(blocks.block_kv, 32), warps, 1, blocks.span)


def _sizes(q: Array, placed: Placed, options: Options, blocks: TritonAttention) -> Sizes:
    (_, time, heads, key), (_, source, groups, value) = q.shape, placed.v.shape
    num_q, num_kv = -(-time // blocks.block_q), -(-source // blocks.block_kv)
    # Tiles per head: those under the diagonal, or all tiles where queries continue a cache.
    under = blocks.block_q // blocks.block_kv * num_q * (num_q + 1) // 2
    enough = -math.log2(options["tolerance"]) if options["tolerance"] else USED_UP
    return Sizes(
        T=time,
        S=source,
        H=heads,
        G=groups,
        K=key,
        V=value,
        M=blocks.block_q,
        N=blocks.block_kv,
        I=num_q,
        J=num_kv,
        TILES=under if placed.q_slot is None else num_q * num_kv,
        SPAN=blocks.span,
        T_END=time if time % blocks.block_q else 0,
        S_END=source if source % blocks.block_kv else 0,
        SCALE=float(options["scale"]) / math.log(2.0),
        ENOUGH=min(enough, USED_UP),
        STRICT=int(not options["attend_current"]),
        PACKED=placed.q_segment is not None,
        CARRIED=placed.q_slot is not None,
        REMAINDER=options["remainder"] != "none",
        PRECISE=q.dtype == jnp.float32,
    )


def _locate(placed: Placed, block: int) -> Where:
    if placed.q_segment is None or placed.kv_segment is None:
        return Where(*[jnp.zeros((1,), jnp.int32)] * 4)
    batch, source = placed.kv_segment.shape
    number = -(-source // block)
    ids = jnp.pad(placed.kv_segment, ((0, 0), (0, number * block - source)))
    ids = ids.reshape(batch, number, 1, block)
    low = jnp.min(jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max), axis=-1)
    high = jnp.max(ids, axis=-1)
    wanted = placed.q_segment[:, None]
    holds = (low <= wanted) & (wanted <= high) & (wanted > 0)
    index = jnp.arange(number, dtype=jnp.int32)[:, None]
    begin = jnp.min(jnp.where(holds, index, number), axis=1)
    slot = jnp.zeros((1,), jnp.int32) if placed.q_slot is None else placed.q_slot
    q_segment = jnp.where(placed.q_segment > 0, placed.q_segment, -1)
    return Where(slot, q_segment, placed.kv_segment, begin)


def _call(kernel: Any, launch: tuple[int, int], sizes: Sizes, count: int, *arrays: Any) -> Any:
    """Launches `count` programs on all arrays but the last, which lists the outputs' shapes."""
    *inputs, out_shape = arrays
    return triton_call.call(
        kernel,
        *inputs,
        out_shape=out_shape,
        grid=(count,),
        num_warps=launch[0],
        num_stages=launch[1],
        D=sizes,
    )


def _attend(
    sizes: Sizes,
    launch: tuple[int, int],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    where: Where,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H T"]]:
    """The output before the remainder (float32 if there is a remainder), and the remainder."""
    return _forward(sizes._replace(SAVE=False), launch, q, k, v, where)[0]


def _forward(
    sizes: Sizes, launch: tuple[int, int], q: Array, k: Array, v: Array, where: Where
) -> tuple[tuple[Array, Array], Residuals]:
    batch, time, heads, _ = q.shape
    rows = batch * heads
    dtype = jnp.float32 if sizes.REMAINDER else q.dtype
    shapes = [
        jax.ShapeDtypeStruct((batch, time, heads, sizes.V), dtype),
        jax.ShapeDtypeStruct((batch, heads, time), jnp.float32),
        jax.ShapeDtypeStruct((rows, sizes.TILES, sizes.M) if sizes.SAVE else (1,), jnp.float32),
        jax.ShapeDtypeStruct((rows, sizes.I, 2), jnp.int32),
    ]
    out, rem, left, ends = _call(
        _forward_kernel, launch, sizes, rows * sizes.I, q, k, v, *where, shapes
    )
    return (out, rem), Residuals(q, k, v, where, rem, left, ends)


def _backward(
    sizes: Sizes, launch: tuple[int, int], saved: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    q, k, v, where, rem, left, ends = saved
    d_out, d_rem = cotangents
    # d log rem / dz_l = -sigmoid(z_l) for every key, so it enters `flow` beyond the farthest key.
    flow = d_rem * rem if sizes.REMAINDER else jnp.zeros((1,), jnp.float32)
    d_out = d_out.astype(q.dtype)  # exact: it has that dtype, or had it before the remainder
    given = (q, k, v, *where[:3], d_out, left)
    shapes = [q, jax.ShapeDtypeStruct(left.shape, jnp.float32)]
    rows = q.shape[0] * sizes.H
    d_q, flows = _call(_query_kernel, launch, sizes, rows * sizes.I, *given, ends, flow, shapes)
    order, count = _visitors(ends, sizes)
    programs = q.shape[0] * sizes.G * sizes.J
    d_k, d_v = _call(_key_kernel, launch, sizes, programs, *given, flows, order, count, [k, v])
    return d_q, d_k, d_v, None


def _visitors(
    ends: Int[Array, "BH I 2"], sizes: Sizes
) -> tuple[Int[Array, "BG J IR"], Int[Array, "BG J"]]:
    """For every block of keys: which blocks of queries visited it, and how many. An entry is
    i R + r, where r is the head among the R that read one key head.
    """
    ratio = sizes.H // sizes.G
    ends = ends.reshape(-1, ratio, sizes.I, 2).swapaxes(1, 2).reshape(-1, 1, sizes.I * ratio, 2)
    block = jnp.arange(sizes.J, dtype=jnp.int32)[:, None]
    visited = (ends[..., 0] <= block) & (block < ends[..., 1])
    order = jnp.argsort(~visited, axis=-1, stable=True)
    return order.astype(jnp.int32), jnp.sum(visited, axis=-1, dtype=jnp.int32)


@triton.constexpr_function
def _padded(width: int) -> Any:
    """The padded width of an operand: a power of two that the matrix unit accepts."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def _rows(base, first, rows, LIMIT: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows first + rows of one head, with their width padded to a power of two; zeros outside.

    LIMIT 0 means that all rows are inside.
    """
    column = tl.arange(0, _padded(WIDTH))
    start = base + tl.cast(first, tl.int64) * (HEADS * WIDTH)
    place = start + (rows[:, None] * (HEADS * WIDTH) + column[None, :])
    if LIMIT == 0 and _padded(WIDTH) == WIDTH:
        return tl.load(place)
    inside = column[None, :] < WIDTH
    if LIMIT > 0:
        inside = (rows[:, None] < LIMIT - first) & inside
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([ROWS, _padded(WIDTH)], tl.float32)


@triton.jit
def _put_rows(
    base, first, rows, value, LIMIT: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr
):
    """Writes rows in the layout that `_rows` reads."""
    column = tl.arange(0, _padded(WIDTH))
    inside = (rows[:, None] < LIMIT - first) & (column[None, :] < WIDTH)
    start = base + tl.cast(first, tl.int64) * (HEADS * WIDTH)
    place = start + (rows[:, None] * (HEADS * WIDTH) + column[None, :])
    tl.store(place, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _halves(x):
    """The even and the odd keys: the halves of a tile's columns, so no data moves."""
    pairs = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    return tl.split(tl.permute(pairs, [0, 2, 1]))


@triton.jit
def _whole(even, odd):
    """The inverse of `_halves`."""
    pairs = tl.permute(tl.join(even, odd), [0, 2, 1])
    return tl.reshape(pairs, [even.shape[0], 2 * even.shape[1]])


@triton.jit
def _pairs(D: tl.constexpr):
    """The order of a tile's keys: the even ones, then the odd ones."""
    place = tl.arange(0, D.N)
    return place % (D.N // 2) * 2 + place // (D.N // 2)


@triton.jit
def _exp(q, k, keys, rows, kv_segment, D: tl.constexpr, MASK: tl.constexpr):
    """u = e^z of queries with even and with odd keys, 0 where a key is not seen. `rows` are slots
    and documents of the queries.
    """
    z = tl.dot(q, tl.trans(k), input_precision="tf32x3") * D.SCALE
    if MASK:
        seen = rows[0][:, None] - keys[None, :] >= D.STRICT
        if D.PACKED:
            inside = keys < D.S if D.S_END else keys >= 0
            segment = tl.load(kv_segment + keys, mask=inside, other=0)
            seen = seen & (rows[1][:, None] == segment[None, :])
        z = tl.where(seen, z, MASKED)
    return _halves(tl.exp2(tl.minimum(z, CERTAIN)))


@triton.jit
def _triangle(D: tl.constexpr, NEARER: tl.constexpr, OWN: tl.constexpr):
    """A triangle of -1 for nearer pairs (with OWN including this pair) or of 1 for farther pairs.
    It is stacked twice where sums have two bfloat16 parts.
    """
    SIZE: tl.constexpr = D.N // 2 if D.PRECISE else D.N
    source, target = tl.arange(0, SIZE)[:, None] % (D.N // 2), tl.arange(0, D.N // 2)[None, :]
    ones = tl.where(source < target, 1.0, 0.0)
    if NEARER:
        ones = tl.where(source >= target if OWN else source > target, -1.0, 0.0)
    return ones if D.PRECISE else ones.to(tl.bfloat16)


@triton.jit
def _sums(x, triangle, start, D: tl.constexpr):
    """start + x triangle, with one value of `start` per row."""
    sums = tl.broadcast_to(start[:, None], x.shape)
    if D.PRECISE:
        return tl.dot(x, triangle, sums, input_precision="tf32x3")
    else:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(_whole(high, low), triangle, sums)


@triton.jit
def _bits(product, D: tl.constexpr):
    """log2; the hardware's has an error of 2^-22, the exact one takes a dozen instructions more."""
    if D.PRECISE:
        return tl.log2(product)
    else:
        return libdevice.fast_log2f(product)


@triton.jit
def _shares(u, left, triangle, D: tl.constexpr):
    """The weights of both keys of each pair, and what each key leaves: 1 - sigmoid(z)."""
    product = (1.0 + u[0]) * (1.0 + u[1])
    bits = _bits(product, D)
    rest = tl.exp2(_sums(bits, triangle, -left, D))
    inverse = 1.0 / product if D.PRECISE else tl.exp2(-bits)
    kept = (1.0 + u[1]) * inverse, (1.0 + u[0]) * inverse
    return (u[0] * inverse * rest, u[1] * kept[1] * rest), kept


@triton.jit
def _cotangents(u, kept, weights, d_weights, flow, triangle, D: tl.constexpr):
    """The cotangents of the logits, and `flow` after the tile.

    dz_j = sigmoid(-z_j) (G_j - e^z_j (sum_{l < j} G_l + flow)), G = A (dO V^T)
    """
    moved = (weights[0] * d_weights[0], weights[1] * d_weights[1])
    pair = moved[0] + moved[1]
    before = _sums(pair, triangle, flow, D)
    even = kept[0] * (moved[0] - u[0] * before)
    odd = kept[1] * (moved[1] - u[1] * (before + moved[0]))
    return even, odd, flow + tl.sum(pair, 1)


@triton.jit
def _forward_tile(j, sums, q, where, at, triangle, D: tl.constexpr, MASK: tl.constexpr):
    """The output and `left` after the tile; `at` points to k, v, documents and left."""
    out, left = sums
    if D.SAVE:
        tl.store(at[3] + j * D.M + tl.arange(0, D.M), left)
    pairs = _pairs(D)
    k = _rows(at[0], j * D.N, pairs, D.S_END, D.G, D.K)
    u = _exp(q, k, j * D.N + pairs, where, at[2], D, MASK)
    bits = _bits((1.0 + u[0]) * (1.0 + u[1]), D)
    rest = tl.exp2(_sums(bits, triangle, -left, D))
    v = _rows(at[1], j * D.N, pairs, D.S_END, D.G, D.V)
    weights = _whole(u[0] * rest, u[1] * (1.0 + u[0]) * rest)
    return tl.dot(weights.to(v.dtype), v, out, input_precision="tf32x3"), left + tl.sum(bits, 1)


@triton.jit
def _places(q_slot, q_segment, b, rows, D: tl.constexpr):
    """The slots and documents of queries."""
    slot, segment = rows, rows
    if D.CARRIED:
        slot = tl.load(q_slot + b * D.T + rows, mask=rows < D.T, other=0)
    if D.PACKED:
        segment = tl.load(q_segment + b * D.T + rows, mask=rows < D.T, other=-1)
    return slot, segment


@triton.jit
def _first_tile(bh, i, D: tl.constexpr):
    """The index, among the tiles of all heads, of the tile of query block i and key block 0."""
    inside = i * D.J if D.CARRIED else (D.M // D.N) * (i * (i + 1) // 2)
    return tl.cast(bh, tl.int64) * D.TILES + inside


@triton.jit
def _forward_kernel(
    q, k, v, q_slot, q_segment, kv_segment, begin, out, rem, lefts, ends, D: tl.constexpr
):
    """One block of queries of one head. The last blocks have the most work and start first."""
    i, bh = D.I - 1 - tl.program_id(0) % D.I, tl.program_id(0) // D.I
    b, h = (bh // D.H).to(tl.int64), bh % D.H
    g = h // (D.H // D.G)
    rows = i * D.M + tl.arange(0, D.M)
    where = _places(q_slot, q_segment, b, rows, D)
    first = tl.where(rows < D.T, 0, D.J)
    low, high = i * 0, tl.minimum((i + 1) * (D.M // D.N), D.J)
    if D.PACKED:
        first = tl.load(begin + b * D.T + rows, mask=rows < D.T, other=D.J)
        last = tl.max(tl.where(where[1] > 0, where[0] + 1 - D.STRICT, 0), 0)
        low, high = tl.min(first, 0), tl.minimum(tl.cdiv(last, D.N), D.J)
    lefts += _first_tile(bh, i, D) * D.M if D.SAVE else 0
    key, value = k + (b * D.S * D.G + g) * D.K, v + (b * D.S * D.G + g) * D.V
    at = (key, value, kv_segment + b * D.S, lefts)
    query = _rows(q + (b * D.T * D.H + h) * D.K, i * D.M, tl.arange(0, D.M), D.T_END, D.H, D.K)
    triangle, sums = _triangle(D, True, True), (_zeros(D.M, D.V), rows * 0.0)
    j = high - 1
    if not D.PACKED:
        # Tiles on the diagonal need a mask; every query sees all farther keys.
        for n in range(high - i * (D.M // D.N)):
            sums = _forward_tile(j - n, sums, query, where, at, triangle, D, True)
        j = i * (D.M // D.N) - 1
    # A query whose document begins in a block already visited gains nothing from farther ones.
    goes_on = (j >= low) & (tl.max(tl.where((sums[1] < D.ENOUGH) & (first <= j), 1, 0), 0) > 0)
    while goes_on:
        count = tl.minimum(D.SPAN, j - low + 1)
        for n in range(count):
            sums = _forward_tile(j - n, sums, query, where, at, triangle, D, D.PACKED)
        j -= count
        goes_on = (j >= low) & (tl.max(tl.where((sums[1] < D.ENOUGH) & (first <= j), 1, 0), 0) > 0)
    tl.store(ends + (bh * D.I + i) * 2, j + 1)
    tl.store(ends + (bh * D.I + i) * 2 + 1, high)
    tl.store(rem + bh.to(tl.int64) * D.T + rows, tl.exp2(-sums[1]), mask=rows < D.T)
    into = out + (b * D.T * D.H + h) * D.V
    _put_rows(into, i * D.M, tl.arange(0, D.M), sums[0], D.T, D.H, D.V)


@triton.jit
def _query_tile(j, sums, own, where, at, triangles, D: tl.constexpr, MASK: tl.constexpr):
    """dq after the tile, and `flow` for the next nearer tile.

    `own` are q and dO of the block; `at` points to k, v, documents, left and flow.
    """
    d_q, flow = sums
    row = tl.arange(0, D.M)
    left = tl.load(at[3] + j * D.M + row)
    tl.store(at[4] + j * D.M + row, flow)
    pairs = _pairs(D)
    k = _rows(at[0], j * D.N, pairs, D.S_END, D.G, D.K)
    v = _rows(at[1], j * D.N, pairs, D.S_END, D.G, D.V)
    u = _exp(own[0], k, j * D.N + pairs, where, at[2], D, MASK)
    weights, kept = _shares(u, left, triangles[0], D)
    d_weights = _halves(tl.dot(own[1], tl.trans(v), input_precision="tf32x3"))
    even, odd, flow = _cotangents(u, kept, weights, d_weights, flow, triangles[1], D)
    d_z = _whole(even.to(k.dtype), odd.to(k.dtype))
    return tl.dot(d_z, k, d_q, input_precision="tf32x3"), flow


@triton.jit
def _query_kernel(
    q, k, v, q_slot, q_segment, kv_segment, d_out, lefts, ends, d_log_rem, d_q, flows,
    D: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head."""
    i, bh = D.I - 1 - tl.program_id(0) % D.I, tl.program_id(0) // D.I
    b, h = (bh // D.H).to(tl.int64), bh % D.H
    g = h // (D.H // D.G)
    rows = i * D.M + tl.arange(0, D.M)
    where = _places(q_slot, q_segment, b, rows, D)
    tile = _first_tile(bh, i, D) * D.M
    key, value = k + (b * D.S * D.G + g) * D.K, v + (b * D.S * D.G + g) * D.V
    at = (key, value, kv_segment + b * D.S, lefts + tile, flows + tile)
    query = _rows(q + (b * D.T * D.H + h) * D.K, i * D.M, tl.arange(0, D.M), D.T_END, D.H, D.K)
    from_out = d_out + (b * D.T * D.H + h) * D.V
    own = (query, _rows(from_out, i * D.M, tl.arange(0, D.M), D.T_END, D.H, D.V))
    triangles = _triangle(D, True, False), _triangle(D, False, False)
    flow = rows * 0.0
    if D.REMAINDER:
        flow = tl.load(d_log_rem + bh.to(tl.int64) * D.T + rows, mask=rows < D.T, other=0.0)
    sums = (_zeros(D.M, D.K), flow)
    low, high = tl.load(ends + (bh * D.I + i) * 2), tl.load(ends + (bh * D.I + i) * 2 + 1)
    diagonal = low if D.PACKED else i * (D.M // D.N)
    for j in range(low, diagonal):
        sums = _query_tile(j, sums, own, where, at, triangles, D, False)
    for j in range(diagonal, high):
        sums = _query_tile(j, sums, own, where, at, triangles, D, True)
    into, scaled = d_q + (b * D.T * D.H + h) * D.K, sums[0] * (D.SCALE * LN2)
    _put_rows(into, i * D.M, tl.arange(0, D.M), scaled, D.T, D.H, D.K)


@triton.jit
def _key_tile(n, sums, own, at, triangles, D: tl.constexpr, MASK: tl.constexpr):
    """dk and dv, transposed, after one more block of queries of one head.

    `own` are slots, k and v of the keys. `at` points to q, dO, (slots, documents), left and flow
    (of the first head and block of queries), and to the list of blocks.
    """
    entry = tl.load(at[5] + n)
    i, h = entry // (D.H // D.G), entry % (D.H // D.G)
    row = tl.arange(0, D.M)
    place = _first_tile(h, i, D) * D.M
    where = _places(at[2][0], at[2][1], 0, i * D.M + row, D)
    q = _rows(at[0] + h * D.K, i * D.M, row, D.T_END, D.H, D.K)
    d_out = _rows(at[1] + h * D.V, i * D.M, row, D.T_END, D.H, D.V)
    u = _exp(q, own[1], own[0], where, at[2][2], D, MASK)
    d_weights = _halves(tl.dot(d_out, tl.trans(own[2]), input_precision="tf32x3"))
    weights, kept = _shares(u, tl.load(at[3] + place + row), triangles[0], D)
    a = _whole(weights[0].to(q.dtype), weights[1].to(q.dtype))
    d_v = tl.dot(tl.trans(d_out), a, sums[1], input_precision="tf32x3")
    flow = tl.load(at[4] + place + row)
    even, odd, _ = _cotangents(u, kept, weights, d_weights, flow, triangles[1], D)
    d_z = _whole(even.to(q.dtype), odd.to(q.dtype))
    return tl.dot(tl.trans(q), d_z, sums[0], input_precision="tf32x3"), d_v


@triton.jit
def _key_kernel(
    q, k, v, q_slot, q_segment, kv_segment, d_out, lefts, flows, order, counts, d_k, d_v,
    D: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key head. The first blocks have the most work."""
    j, bg = tl.program_id(0) % D.J, tl.program_id(0) // D.J
    b, g = (bg // D.G).to(tl.int64), bg % D.G
    pairs = _pairs(D)
    key, value = (b * D.S * D.G + g) * D.K, (b * D.S * D.G + g) * D.V
    own_k = _rows(k + key, j * D.N, pairs, D.S_END, D.G, D.K)
    own = (j * D.N + pairs, own_k, _rows(v + value, j * D.N, pairs, D.S_END, D.G, D.V))
    listed = order + (bg.to(tl.int64) * D.J + j) * (D.I * (D.H // D.G))
    head = b * D.T * D.H + g * (D.H // D.G)
    tile = (_first_tile(b * D.H + g * (D.H // D.G), 0, D) + j) * D.M
    places = (q_slot + b * D.T, q_segment + b * D.T, kv_segment + b * D.S)
    at = (q + head * D.K, d_out + head * D.V, places, lefts + tile, flows + tile, listed)
    triangles = _triangle(D, True, False), _triangle(D, False, False)
    sums = (tl.trans(_zeros(D.N, D.K)), tl.trans(_zeros(D.N, D.V)))
    count = tl.load(counts + bg * D.J + j)
    # Where nothing is packed, each head's first block of queries is the one on the diagonal.
    diagonal = 0 if D.PACKED else tl.minimum(D.H // D.G, count)
    for n in range(diagonal):
        sums = _key_tile(n, sums, own, at, triangles, D, True)
    # Hoisting anything out of this loop would need registers that are not available.
    for n in tl.range(diagonal, count, disable_licm=True):
        sums = _key_tile(n, sums, own, at, triangles, D, D.PACKED)
    scaled = tl.trans(sums[0]) * (D.SCALE * LN2)
    _put_rows(d_k + key, j * D.N, pairs, scaled, D.S, D.G, D.K)
    _put_rows(d_v + value, j * D.N, pairs, tl.trans(sums[1]), D.S, D.G, D.V)


attend = jax.custom_vjp(_attend, nondiff_argnums=(0, 1))
attend.defvjp(_forward, _backward)
