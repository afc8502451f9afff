"""Stick-breaking attention as TPU kernels: forward, dq, and dk with dv.

Time runs along lanes everywhere (q, k, v are [.., width, T]), and tiles are [keys, queries]. So
what is kept for each query is one row of lanes, and no array in HBM is padded to 128 lanes.

    forward    for every block of queries: key blocks from the nearest to the farthest, carrying
               `left`, until all sticks of the block are used up (to the tolerance, if there is
               one, else to e^-104, below which every weight is 0)
    dq         the same key blocks from the farthest to the nearest, carrying `flow`
    dk, dv     for every block of keys: the blocks of queries, of all its heads, that saw it

Each program has a loop that fetches the next block while it works on the current one. A block that
no query sees is neither computed nor fetched. Saved: inputs, log rem, `left` before each tile (T S
/ block_kv floats per head), and the block where each loop stopped. The backward pass adds `flow`,
which is as large as `left`. No two programs write to the same place, so the order of every sum is
fixed.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, Float, Int

from kernels import segments
from kernels.blocks import Attention
from kernels.contract import Options
from kernels.letters import Inputs
from kernels.primitives import device, interleaved, kv_cache, lane_blocks, log_space, products
from kernels.primitives.block_walk import Walk
from kernels.primitives.kv_cache import CacheState
from kernels.primitives.lane_blocks import LANES, Rows, Where
from kernels.stickbreaking import tile

DEFAULT = Attention(512, 512, LANES)
CANDIDATES = tuple(Attention(q, kv, LANES) for q in (256, 512, 1024) for kv in (256, 512, 1024))

# Holds a program's buffers and the intermediates of one tile; the compiler's limit is 16 MiB.
_VMEM = 32 * 2**20


class Static(NamedTuple):
    """What is known at trace time; there are N = B H rows of queries and M = B G rows of keys."""

    heads: int
    groups: int
    blocks: Attention
    scale: float
    strict: bool
    tolerance: float
    dtype: DTypeLike
    out_dtype: DTypeLike

    @property
    def ratio(self) -> int:
        return self.heads // self.groups

    @property
    def is_exact(self) -> bool:
        """Whether operands keep all digits of float32."""
        return jnp.dtype(self.dtype) == jnp.float32

    @property
    def enough(self) -> float:
        """The loop stops when all rows have used up this many nats; e^-104 is 0 in float32."""
        return -math.log(self.tolerance) if self.tolerance else 104.0

    @property
    def products(self) -> products.Products:
        return products.EXACT if self.is_exact else products.ROUNDED

    @property
    def unit(self) -> float:
        """The unit of logarithms: bits save three products per pair, but allow no series."""
        return 1.0 if self.is_exact else math.log(2.0)

    def exp(self, x: Array) -> Array:
        return jnp.exp(x) if self.is_exact else jnp.exp2(x)

    def softplus_and_exp(self, z: Array) -> tuple[Array, Array]:
        """softplus of the logits, and the second argument of `sigmoids`."""
        if self.is_exact:
            return log_space.softplus_and_exp(z)
        return log_space.softplus_and_exp_in_bits(z)

    def sigmoids(self, z: Array, broken: Array, u: Array) -> tuple[Array, Array]:
        """sigmoid(z) and sigmoid(-z)."""
        if self.is_exact:
            return log_space.sigmoids(z, u)
        # An exponential, because a division takes ten operations on a TPU.
        kept = jnp.exp2(-broken)
        return u * kept, kept


class Operands(NamedTuple):
    """Queries, keys and values with time along lanes."""

    q: Float[Array, "N K T"]
    k: Float[Array, "M K S"]
    v: Float[Array, "M V S"]


def apply(
    inputs: Inputs,
    segment_ids: Int[Array, "B T"] | None,
    state: CacheState | None,
    *,
    options: Options,
    blocks: Attention | None = None,
) -> tuple[Float[Array, "B T H V"], CacheState]:
    """Output and state of T more tokens.

    Raises:
      ValueError: the blocks do not fill whole rows of lanes.
    """
    q = inputs["q"]
    placed = kv_cache.place(inputs["k"], inputs["v"], segment_ids, state)
    batch, time, heads = q.shape[:3]
    source, groups = placed.k.shape[1:3]
    blocks = lane_blocks.fit(blocks or DEFAULT, time, source)
    rest = options["remainder"] != "none"
    static = Static(
        heads=heads,
        groups=groups,
        blocks=blocks,
        scale=options["scale"],
        strict=not options["attend_current"],
        tolerance=options["tolerance"],
        dtype=jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32,
        out_dtype=jnp.float32 if rest else q.dtype,
    )
    operands = Operands(
        lane_blocks.along_lanes(q.astype(static.dtype), blocks.block_q),
        lane_blocks.along_lanes(placed.k.astype(static.dtype), blocks.block_kv),
        lane_blocks.along_lanes(placed.v.astype(static.dtype), blocks.block_kv),
    )
    where = lane_blocks.where(placed, time, blocks, strict=static.strict)
    out, log_rem = attend(static, operands, where)
    out = lane_blocks.from_lanes(out, batch, time)
    if rest:
        out = out + jnp.exp(lane_blocks.from_lanes(log_rem, batch, time)) * tile.rest(
            inputs, options
        )
    return segments.blank_padding(out, placed.q_segment).astype(q.dtype), placed.state


# The following runs inside kernels. No index is negative, so `lax.div` and `lax.rem` equal // and
# %. Those also handle signs, for which Mosaic asks what TPU it runs on, and there may be none.


class Sight(NamedTuple):
    """What one block of queries sees of the block of keys that begins at key `first`."""

    static: Static
    first: Array
    slot: Int[Array, "1 rows"]
    segment: Int[Array, "1 rows"] | None
    kv_segment: Int[Array, "1 S"] | None

    def logits(self, q: Float[Array, "K rows"], k: Float[Array, "K S"]) -> Float[Array, "S rows"]:
        """The masked logits of the tile; keys are in the order of `interleaved`."""
        shape = k.shape[1], q.shape[1]
        kv_segment = None
        if self.kv_segment is not None:
            # Turns lanes into a column, by transposing eight equal rows: the smallest transpose.
            column = jnp.broadcast_to(self.kv_segment, (8, shape[0])).T[:, :1]
            kv_segment = jnp.broadcast_to(column, shape)
        source, strict = self.first + interleaved.keys(*shape), self.static.strict
        seen = segments.visible(self.slot, source, self.segment, kv_segment, strict=strict)
        products = self.static.products.tn(k, q) * (self.static.scale / self.static.unit)
        return tile.mask(products, seen)


class Share(NamedTuple):
    """A tile in the backward pass: its weights, the cotangent of its logits, the next `flow`."""

    weights: Float[Array, "S rows"]
    d_z: Float[Array, "S rows"]
    flow: Float[Array, "1 rows"]


def _pull(
    sight: Sight,
    queries: tuple[Float[Array, "K rows"], Float[Array, "V rows"]],
    keys: tuple[Float[Array, "K S"], Float[Array, "V S"]],
    left: Float[Array, "1 rows"],
    flow: Float[Array, "1 rows"],
) -> Share:
    """One tile of the backward pass; `queries` are q and the cotangent of the output."""
    static, (q, d_out), (k, v) = sight.static, queries, keys
    z = sight.logits(q, k)
    broken, u = static.softplus_and_exp(z)
    nearer, _ = interleaved.suffix_sum(broken, left)
    weights = tile.weigh(z - broken, nearer, static.exp)
    moved = weights * static.products.tn(v, d_out)
    farther, flow = interleaved.prefix_sum(moved, flow)
    d_z = tile.logit_cotangent(moved, *static.sigmoids(z, broken, u), farther)
    return Share(weights, d_z, flow)


def _sight(static: Static, rows: Any, j: Array) -> Sight:
    """The sight of a program's queries on block j of the keys."""
    segment, kv_segment, size = None, None, static.blocks.block_kv
    if rows.segment is not None:
        segment, kv_segment = rows.segment[0], rows.kv_segment[0, :, lane_blocks.at(j, size)]
    return Sight(static, j * size, rows.slot[0], segment, kv_segment)


def _fetches(pairs: list[tuple[Any, Any]], arrived: Any, step: Array) -> list[Any]:
    """Transfers of slices in HBM; each goes into one of its two buffers in turn."""
    turn = lax.rem(step, 2)
    return [
        pltpu.make_async_copy(source, two.at[turn], arrived.at[number, turn])
        for number, (source, two) in enumerate(pairs)
    ]


def forward_kernel(
    static: Static,
    nearest: Any,
    farthest: Any,
    rows: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    log_rem: Any,
    lefts: Any,
    stop: Any,
    acc: Any,
    k_two: Any,
    v_two: Any,
    arrived: Any,
) -> None:
    """One block of queries of one head; keys and values stay in HBM."""
    row, i = pl.program_id(0), pl.program_id(1)
    batch, key_row = lax.div(row, static.heads), lax.div(row, static.ratio)
    near = nearest[batch, i]
    acc[...] = jnp.zeros_like(acc)

    def copies(step: Array) -> list[Any]:
        at = lane_blocks.at(near - step, static.blocks.block_kv)
        pairs = [(k.at[key_row, :, at], k_two), (v.at[key_row, :, at], v_two)]
        return _fetches(pairs, arrived, step)

    def visit(step: Array, left: Array) -> tuple[Array, Array]:
        j, turn = near - step, lax.rem(step, 2)
        lefts[0, j] = left
        keys, values = (interleaved.order(two[turn], static.products) for two in (k_two, v_two))
        z = _sight(static, rows, j).logits(q[0], keys)
        broken, _ = static.softplus_and_exp(z)
        nearer, left = interleaved.suffix_sum(broken, left)
        acc[...] += static.products.nn(values, tile.weigh(z - broken, nearer, static.exp))
        # A row whose document begins in this block of keys gains nothing from farther ones.
        wants = (left * static.unit < static.enough) & (rows.farthest[0] < j)
        return jnp.max(jnp.where(wants, 1, 0)) > 0, left

    walk = Walk(jnp.maximum(near - farthest[batch, i] + 1, 0), copies)
    steps, left = walk.run(visit, jnp.zeros((1, static.blocks.block_q), jnp.float32))
    stop[0, 0, i] = near - steps + 1
    log_rem[0] = -left * static.unit
    out[0] = acc[...].astype(out.dtype)


def dq_kernel(
    static: Static,
    nearest: Any,
    rows: Any,
    q: Any,
    k: Any,
    v: Any,
    left: Any,
    stop: Any,
    d_out: Any,
    d_log_rem: Any,
    d_q: Any,
    flows: Any,
    acc: Any,
    k_two: Any,
    v_two: Any,
    arrived: Any,
) -> None:
    """One block of queries of one head; writes `flow` before each tile, for dk and dv."""
    row, i = pl.program_id(0), pl.program_id(1)
    batch, key_row = lax.div(row, static.heads), lax.div(row, static.ratio)
    far = stop[0, 0, i]
    acc[...] = jnp.zeros_like(acc)

    def copies(step: Array) -> list[Any]:
        at = lane_blocks.at(far + step, static.blocks.block_kv)
        pairs = [(k.at[key_row, :, at], k_two), (v.at[key_row, :, at], v_two)]
        return _fetches(pairs, arrived, step)

    def visit(step: Array, flow: Array) -> tuple[Array, Array]:
        j, turn = far + step, lax.rem(step, 2)
        flows[0, j] = flow
        keys, values = (interleaved.order(two[turn], static.products) for two in (k_two, v_two))
        sight = _sight(static, rows, j)
        share = _pull(sight, (q[0], d_out[0]), (keys, values), left[0, j], flow)
        acc[...] += static.products.nn(keys, share.d_z)
        return jnp.bool_(True), share.flow

    walk = Walk(jnp.maximum(nearest[batch, i] - far + 1, 0), copies)
    # d log rem / dz_l = -sigmoid(z_l) for every key, so it enters `flow` beyond the farthest key.
    walk.run(visit, d_log_rem[0])
    d_q[0] = (acc[...] * static.scale).astype(d_q.dtype)


def dkv_kernel(
    static: Static,
    nearest: Any,
    rows: Any,
    k: Any,
    v: Any,
    stop: Any,
    q: Any,
    d_out: Any,
    left: Any,
    flow: Any,
    d_k: Any,
    d_v: Any,
    k_acc: Any,
    v_acc: Any,
    keys: Any,
    values: Any,
    q_two: Any,
    d_out_two: Any,
    left_two: Any,
    flow_two: Any,
    arrived: Any,
    seers: Any,
) -> None:
    """One block of keys of one key head; q, d_out, left and flow stay in HBM."""
    key_row, j = pl.program_id(0), pl.program_id(1)
    batch, block_q = lax.div(key_row, static.groups), static.blocks.block_q
    num_q = stop.shape[-1]
    k_acc[...] = jnp.zeros_like(k_acc)
    v_acc[...] = jnp.zeros_like(v_acc)
    keys[...] = interleaved.order(k[0], static.products)
    values[...] = interleaved.order(v[0], static.products)

    def note(number: Array, count: Array) -> Array:
        head, i = lax.div(number, num_q), lax.rem(number, num_q)
        saw = (stop[head, 0, i] <= j) & (j <= nearest[batch, i])

        @pl.when(saw)
        def _() -> None:
            seers[count] = number

        return count + saw.astype(jnp.int32)

    count = lax.fori_loop(0, static.ratio * num_q, note, jnp.int32(0))

    def copies(step: Array) -> list[Any]:
        row = key_row * static.ratio + lax.div(seers[step], num_q)
        at = lane_blocks.at(lax.rem(seers[step], num_q), block_q)
        pairs = [(q.at[row, :, at], q_two), (d_out.at[row, :, at], d_out_two)]
        pairs += [(left.at[row, j, :, at], left_two), (flow.at[row, j, :, at], flow_two)]
        return _fetches(pairs, arrived, step)

    def visit(step: Array, carry: Array) -> tuple[Array, Array]:
        turn, at = lax.rem(step, 2), lane_blocks.at(lax.rem(seers[step], num_q), block_q)
        segment, kv_segment = None, None
        if rows.segment is not None:
            segment, kv_segment = rows.segment[0, :, at], rows.kv_segment[0]
        first = j * static.blocks.block_kv
        sight = Sight(static, first, rows.slot[0, :, at], segment, kv_segment)
        queries, carries = (q_two[turn], d_out_two[turn]), (left_two[turn], flow_two[turn])
        share = _pull(sight, queries, (keys[...], values[...]), *carries)
        k_acc[...] += static.products.nt(share.d_z, q_two[turn])
        v_acc[...] += static.products.nt(share.weights, d_out_two[turn])
        return jnp.bool_(True), carry

    Walk(count, copies).run(visit, jnp.int32(0))
    for acc, found, scale in ((k_acc, d_k, static.scale), (v_acc, d_v, 1.0)):
        ordered = (acc[...] * scale).T.astype(found.dtype)
        found[0] = interleaved.restore(ordered, static.products)


# The calls of the kernels.


class Residuals(NamedTuple):
    """What the backward pass needs."""

    operands: Operands
    where: Where
    left: Float[Array, "N J 1 T"]
    stop: Int[Array, "N 1 I"]


_HBM = pl.BlockSpec(memory_space=pl.ANY)


def _block(shape: tuple[int, ...], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *at: index(at[0], at[1]))


def _rows_specs(static: Static, rows: Rows, *, is_dkv: bool) -> Any:
    """The blocks of `Rows`. For dk and dv: all queries and one block of keys; else the reverse."""
    heads = static.groups if is_dkv else static.heads
    num_q = rows.slot.shape[-1] if is_dkv else static.blocks.block_q
    queries = _block((1, 1, num_q), lambda n, i: (lax.div(n, heads), 0, 0 if is_dkv else i))
    if rows.kv_segment is None:
        keys = None
    else:
        num_kv = static.blocks.block_kv if is_dkv else rows.kv_segment.shape[-1]
        keys = _block((1, 1, num_kv), lambda n, j: (lax.div(n, heads), 0, j if is_dkv else 0))
    specs: Any = Rows
    segment = None if rows.segment is None else queries
    return specs(queries, segment, keys, None if rows.farthest is None else queries)


def _two(static: Static, *widths: int, size: int) -> list[Any]:
    """Two buffers for each operand whose blocks are streamed."""
    return [pltpu.VMEM((2, width, size), static.dtype) for width in widths]


def _parameters(*dimensions: Any) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=_VMEM)


def _attend(
    static: Static, operands: Operands, where: Where
) -> tuple[Float[Array, "N V T"], Float[Array, "N 1 T"]]:
    """The output before the remainder, and log rem."""
    return _forward(static, operands, where)[0]


def _forward(
    static: Static, operands: Operands, where: Where
) -> tuple[tuple[Array, Array], Residuals]:
    number, width, time = operands.q.shape
    value, source = operands.v.shape[1:]
    block_q, block_kv = static.blocks.block_q, static.blocks.block_kv
    num_q, num_kv = time // block_q, source // block_kv
    along = lambda size: _block((1, size, block_q), lambda n, i: (n, 0, i))

    out, log_rem, left, stop = pl.pallas_call(
        partial(forward_kernel, static),
        out_shape=(
            jax.ShapeDtypeStruct((number, value, time), static.out_dtype),
            jax.ShapeDtypeStruct((number, 1, time), jnp.float32),
            jax.ShapeDtypeStruct((number, num_kv, 1, time), jnp.float32),
            jax.ShapeDtypeStruct((number, 1, num_q), jnp.int32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(number, num_q),
            in_specs=[
                _rows_specs(static, where.rows, is_dkv=False),
                along(width),
                _HBM,
                _HBM,
            ],
            out_specs=(
                along(value),
                along(1),
                _block((1, num_kv, 1, block_q), lambda n, i: (n, 0, 0, i)),
                _stops(1, num_q),
            ),
            scratch_shapes=[
                pltpu.VMEM((value, block_q), jnp.float32),
                *_two(static, width, value, size=block_kv),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        compiler_params=_parameters("parallel", "arbitrary"),
        interpret=device.interpreter(),
        name="stickbreaking_forward",
    )(where.nearest, where.farthest, where.rows, *operands)
    return (out, log_rem), Residuals(operands, where, left, stop)


def _backward(
    static: Static, saved: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Operands, None]:
    d_out, d_log_rem = cotangents
    # The output was rounded to this dtype, so its cotangent needs no more digits.
    d_out = d_out.astype(static.dtype)
    d_q, flow = _backward_q(static, saved, d_out, d_log_rem)
    return Operands(d_q, *_backward_kv(static, saved, d_out, flow)), None


def _backward_q(
    static: Static, saved: Residuals, d_out: Array, d_log_rem: Array
) -> tuple[Float[Array, "N K T"], Float[Array, "N J 1 T"]]:
    operands, rows = saved.operands, saved.where.rows._replace(farthest=None)
    number, width, time = operands.q.shape
    value, num_kv, block_q = operands.v.shape[1], saved.left.shape[1], static.blocks.block_q
    along = lambda size: _block((1, size, block_q), lambda n, i: (n, 0, i))
    carries = _block((1, num_kv, 1, block_q), lambda n, i: (n, 0, 0, i))
    return pl.pallas_call(
        partial(dq_kernel, static),
        out_shape=(
            jax.ShapeDtypeStruct(operands.q.shape, static.dtype),
            jax.ShapeDtypeStruct(saved.left.shape, jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(number, time // block_q),
            in_specs=[
                _rows_specs(static, rows, is_dkv=False),
                along(width),
                _HBM,
                _HBM,
                carries,
                _stops(1, time // block_q),
                along(value),
                along(1),
            ],
            out_specs=(along(width), carries),
            scratch_shapes=[
                pltpu.VMEM((width, block_q), jnp.float32),
                *_two(static, width, value, size=static.blocks.block_kv),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        compiler_params=_parameters("parallel", "parallel"),
        interpret=device.interpreter(),
        name="stickbreaking_dq",
    )(saved.where.nearest, rows, *operands, saved.left, saved.stop, d_out, d_log_rem)


def _backward_kv(
    static: Static, saved: Residuals, d_out: Array, flow: Array
) -> tuple[Float[Array, "M K S"], Float[Array, "M V S"]]:
    operands, rows = saved.operands, saved.where.rows._replace(farthest=None)
    number, width, source = operands.k.shape
    value, block_q, block_kv = operands.v.shape[1], static.blocks.block_q, static.blocks.block_kv
    along = lambda size: _block((1, size, block_kv), lambda m, j: (m, 0, j))
    num_q = saved.stop.shape[-1]
    return pl.pallas_call(
        partial(dkv_kernel, static),
        out_shape=(
            jax.ShapeDtypeStruct(operands.k.shape, static.dtype),
            jax.ShapeDtypeStruct(operands.v.shape, static.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(number, source // block_kv),
            in_specs=[
                _rows_specs(static, rows, is_dkv=True),
                along(width),
                along(value),
                _stops(static.ratio, num_q),
                *[_HBM] * 4,
            ],
            out_specs=(along(width), along(value)),
            scratch_shapes=[
                pltpu.VMEM((block_kv, width), jnp.float32),
                pltpu.VMEM((block_kv, value), jnp.float32),
                pltpu.VMEM((width, block_kv), static.dtype),
                pltpu.VMEM((value, block_kv), static.dtype),
                *_two(static, width, value, size=block_q),
                *[pltpu.VMEM((2, 1, block_q), jnp.float32)] * 2,
                pltpu.SemaphoreType.DMA((4, 2)),
                pltpu.SMEM((static.ratio * num_q,), jnp.int32),
            ],
        ),
        compiler_params=_parameters("parallel", "parallel"),
        interpret=device.interpreter(),
        name="stickbreaking_dkv",
    )(
        saved.where.nearest,
        rows,
        operands.k,
        operands.v,
        saved.stop,
        operands.q,
        d_out,
        saved.left,
        flow,
    )


def _stops(rows: int, num_q: int) -> pl.BlockSpec:
    """The stops of all blocks of queries of the heads that read one key head."""
    return pl.BlockSpec((rows, 1, num_q), lambda *at: (at[0], 0, 0), memory_space=pltpu.SMEM)


attend = jax.custom_vjp(_attend, nondiff_argnums=(0,))
attend.defvjp(_forward, _backward)
