"""Linear attention with decay in Triton for NVIDIA GPUs: forward, and a hand-derived backward.

    forward    states (sequential over chunks), outputs (parallel)
    backward   states in reverse, with q for k and dO for V: gives the cotangent dS' of the state
               that leaves each chunk; then keys (dq, dk, d log decay) and values (dV), in parallel

The mathematics is that of tile.py; shared pieces are in `primitives/triton_chunks`. Saved: the
inputs, and the state at the entry of every chunk. The states are bfloat16 where the inputs are,
because the tensor cores would round them in any case; the state that is carried on is float32. A
program adds up its tiles of V; tiles of K are written separately and added afterwards. Nothing is
atomic.
"""

# pyright: basic, reportGeneralTypeIssues=false

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from kernels.blocks import TritonChunk
from kernels.contract import Options
from kernels.gated_linear.tile import GatedState
from kernels.letters import Inputs
from kernels.primitives import triton_call, triton_chunks
from kernels.primitives.triton_chunks import (
    DEFAULT,
    Launch,
    Static,
    across,
    add_up,
    corner,
    ends,
    is_real,
    log_decay,
    pairs,
    place,
    product,
    pull_ends,
    pull_pairs,
    read_chunk,
    toward,
)

CANDIDATES = tuple(
    TritonChunk(
        state_key=key, state_value=value, state_stages=ahead, value=width, num_stages=stages
    )
    for key, value in ((64, 64), (32, 64), (64, 32))
    for ahead in (2, 3)
    for width, stages in ((64, 2), (64, 3), (128, 2))
)


@triton.jit
def states_kernel(
    x,
    y,
    gates,
    marks,
    first,
    visited,
    last,
    HEADS: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
    DECAY: tl.constexpr,
    DOCS: tl.constexpr,
    HALF: tl.constexpr,
    FINE: tl.constexpr,
    REVERSE: tl.constexpr,
) -> None:
    """S' = through S + (col k)^T V from chunk to chunk; writes the state that enters each chunk.

    With REVERSE, x and y are q and dO: dS = through dS' + scale (row q)^T dO from the last chunk.
    """
    head = tl.program_id(0).to(tl.int64)
    k0, v0 = tl.program_id(1) * BK, tl.program_id(2) * BV
    num_chunks = (T + C - 1) // C
    token = head // HEADS * T * HEADS + head % HEADS
    x, y, marks = x + token * K, y + token * V, marks + head // HEADS * (T + 1)
    visited += head * num_chunks * K * V
    if DECAY == "vector":
        gates += token * K
    else:
        gates += head * T
    i = tl.arange(0, C)
    whole, exists = corner(head, k0, v0, K, V, BK, BV)
    s = tl.load(first + whole, mask=exists, other=0.0)
    n = num_chunks - 1 if REVERSE else 0
    reads, stays, goes_on, own, after = read_chunk(gates, marks, n, T, C, DECAY, DOCS)
    real = is_real(marks, n, T, C, DOCS)
    for step in range((T + C - 1) // C):
        n = num_chunks - 1 - step if REVERSE else step
        row, col, through = ends(reads, stays, goes_on, own, after, DECAY)
        keep = real
        following = tl.maximum(n - 1, 0) if REVERSE else tl.minimum(n + 1, num_chunks - 1)
        reads, stays, goes_on, own, after = read_chunk(gates, marks, following, T, C, DECAY, DOCS)
        real = is_real(marks, following, T, C, DOCS)
        there, exists = corner(n, k0, v0, K, V, BK, BV)
        tl.store(visited + there, s.to(visited.dtype.element_ty), mask=exists)
        at, inside = place(n, k0, T, K, HEADS, C, BK)
        x_here = tl.load(x + at, mask=inside, other=0.0)
        y_at, y_inside = place(n, v0, T, V, HEADS, C, BV)
        y_here = tl.load(y + y_at, mask=y_inside, other=0.0)
        if DECAY == "vector":
            g = log_decay(gates, at, inside, keep)
            chosen = i[:, None] >= i[None, :] if REVERSE else i[:, None] < i[None, :]
            x_here = x_here.to(tl.float32) * tl.exp(add_up(chosen, g, HALF, FINE))
            s *= tl.exp(tl.sum(g, 0))[:, None]
        if DECAY != "none" or DOCS:
            factor = row if REVERSE else col
            y_here = y_here.to(tl.float32) * factor[:, None]
            s *= through
        s += SCALE * product(tl.trans(x_here), y_here, HALF)
    tl.store(last + whole, s, mask=exists)


@triton.jit
def keys_kernel(
    q,
    k,
    v,
    d_out,
    gates,
    marks,
    entered,
    d_left,
    d_q,
    d_k,
    d_gates,
    HEADS: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
    DECAY: tl.constexpr,
    DOCS: tl.constexpr,
    HALF: tl.constexpr,
    FINE: tl.constexpr,
) -> None:
    """dq, dk and d log decay of one chunk, head and tile of K (of a per-head decay: one part)."""
    n, head, tile = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    token = head // HEADS * T * HEADS + head % HEADS
    q, k, d_q, d_k = q + token * K, k + token * K, d_q + token * K, d_k + token * K
    v, d_out, marks = v + token * V, d_out + token * V, marks + head // HEADS * (T + 1)
    entered += head * ((T + C - 1) // C) * K * V
    d_left += head * ((T + C - 1) // C) * K * V
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    d_scores = tl.zeros((C, C), tl.float32)
    d_read = tl.zeros((C, BK), tl.float32)
    d_kept = tl.zeros((C, BK), tl.float32)
    d_through = tl.zeros((BK,), tl.float32)
    for first in range(0, V, BV):
        at, inside = place(n, first, T, V, HEADS, C, BV)
        v_here = tl.load(v + at, mask=inside, other=0.0)
        d_here = tl.load(d_out + at, mask=inside, other=0.0)
        there, exists = corner(n, tile * BK, first, K, V, BK, BV)
        s = tl.load(entered + there, mask=exists, other=0.0)
        d_s = tl.load(d_left + there, mask=exists, other=0.0)
        d_scores += product(d_here, tl.trans(v_here), HALF)
        d_read += product(d_here, tl.trans(s), HALF)
        d_kept += product(v_here, tl.trans(d_s), HALF)
        if DECAY != "none":
            d_through += tl.sum(s.to(tl.float32) * d_s.to(tl.float32), 1)
    if DECAY == "vector":
        gates += token * K
    else:
        gates += head * T
    reads, stays, goes_on, own, after = read_chunk(gates, marks, n, T, C, DECAY, DOCS)
    row, col, through = ends(reads, stays, goes_on, own, after, DECAY)
    d_scores *= SCALE * pairs(gates, marks, n, T, C, DECAY, DOCS)
    d_read *= SCALE * row[:, None]
    d_kept *= col[:, None]
    at, inside = place(n, tile * BK, T, K, HEADS, C, BK)
    q_here = tl.load(q + at, mask=inside, other=0.0)
    k_here = tl.load(k + at, mask=inside, other=0.0)
    if DECAY == "vector":
        real = is_real(marks, n, T, C, DOCS)
        g = log_decay(gates, at, inside, real)
        q_here, k_here = q_here.to(tl.float32), k_here.to(tl.float32)
        d_read *= tl.exp(add_up(i >= j, g, HALF, FINE))
        d_kept *= tl.exp(add_up(i < j, g, HALF, FINE))
        d_g = add_up(i <= j, q_here * d_read, HALF, False)
        d_g += add_up(i > j, k_here * d_kept, HALF, False)
        d_g += (through * tl.exp(tl.sum(g, 0)) * d_through)[None, :]
        near = tl.sum(tl.where(i == j, d_scores, 0.0), 1)[:, None]
        d_read += near * k_here
        d_kept += near * q_here
        for level in range(LEVELS):
            factor = tl.exp(add_up(toward(level, C), g, HALF, FINE))
            d_pairs = tl.where(across(level, C), d_scores, 0.0)
            rows, columns = q_here * factor, k_here * factor
            d_rows = product(d_pairs, columns, HALF)
            d_columns = product(tl.trans(d_pairs), rows, HALF)
            d_read += factor * d_rows
            d_kept += factor * d_columns
            d_factor = rows * d_rows + columns * d_columns
            d_g += add_up(tl.trans(toward(level, C)), d_factor, HALF, False)
        d_g = tl.where(real[:, None], d_g, 0.0)
        tl.store(d_gates + token * K + at, d_g.to(d_gates.dtype.element_ty), mask=inside)
    else:
        if DECAY == "scalar":
            weights = d_scores * product(q_here, tl.trans(k_here), HALF)
            d_row = tl.sum(q_here.to(tl.float32) * d_read, 1)
            d_col = tl.sum(k_here.to(tl.float32) * d_kept, 1)
            d_g = pull_ends(d_row, d_col, through * tl.sum(d_through, 0), C)
            d_g += pull_pairs(weights, C)
            t = n * C + tl.arange(0, C)
            part = (tile * tl.num_programs(1) + head) * T + t
            tl.store(d_gates + part, d_g, mask=t < T)
        d_read += product(d_scores, k_here, HALF)
        d_kept += product(tl.trans(d_scores), q_here, HALF)
    tl.store(d_q + at, d_read.to(d_q.dtype.element_ty), mask=inside)
    tl.store(d_k + at, d_kept.to(d_k.dtype.element_ty), mask=inside)


class Arrays(NamedTuple):
    """The inputs of the kernels; `gates` is [B, H, T] or [B, T, H, K]."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]
    gates: Array | None


def apply(
    inputs: Inputs,
    segment_ids: Int[Array, "B T"] | None,
    state: GatedState,
    *,
    options: Options,
    blocks: TritonChunk | None = None,
) -> tuple[Float[Array, "B T H V"], GatedState]:
    """Output and state of T more tokens."""
    time = inputs["q"].shape[1]
    marks, segment = triton_chunks.mark(segment_ids, state.segment, time)
    gates = inputs.get("log_decay")
    if options["decay"] == "scalar":
        gates = triton_chunks.per_head(inputs["log_decay"], segment_ids)
    x = Arrays(inputs["q"], inputs["k"], inputs["v"], gates)
    static = Static(options["scale"], options["decay"], marks is not None, blocks or DEFAULT)
    out, s = attend(static, x, marks, state.s.astype(jnp.float32))
    return out, GatedState(s, segment)


def _attend(
    static: Static, x: Arrays, marks: Array | None, s: Float[Array, "B H K V"]
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    return _forward(static, x, marks, s)[0]


def _forward(
    static: Static, x: Arrays, marks: Array | None, s: Array
) -> tuple[tuple[Array, Array], tuple[Arrays, Array | None, Array]]:
    sizes = triton_chunks.launch(static, x.q, x.v, x.gates)
    entered, s = _visit(sizes, (x.k, x.v), x.gates, marks, s, reverse=False)
    out = triton_chunks.outputs(sizes, x[:3], x.gates, marks, entered)
    return (out, s), (x, marks, entered)


def _visit(
    sizes: Launch,
    xy: tuple[Array, Array],
    gates: Array | None,
    marks: Array | None,
    s: Array,
    *,
    reverse: bool,
) -> tuple[Float[Array, "B H N K V"], Float[Array, "B H K V"]]:
    """The state that enters each chunk, and the one after the last; in reverse, the cotangents."""
    blocks = sizes.static.blocks
    batch, _, heads, *_ = sizes.shape
    tiles = blocks.state_key, blocks.state_value
    _, _, num_key, num_value = sizes.tiles(*tiles)
    constants = sizes.constants(*tiles)
    if not reverse:
        constants["SCALE"] = 1.0
    entered, last = triton_call.call(
        states_kernel,
        *xy,
        *triton_chunks.given(gates, marks),
        s,
        out_shape=[
            jax.ShapeDtypeStruct(sizes.states, sizes.dtype),
            jax.ShapeDtypeStruct(s.shape, jnp.float32),
        ],
        grid=(batch * heads, num_key, num_value),
        num_warps=blocks.state_warps,
        num_stages=blocks.state_stages,
        REVERSE=reverse,
        **constants,
    )
    return entered, last


def _backward(
    static: Static,
    saved: tuple[Arrays, Array | None, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Arrays, None, Array]:
    x, marks, entered = saved
    d_out, d_s = cotangents
    sizes = triton_chunks.launch(static, x.q, x.v, x.gates)
    d_left, d_s = _visit(sizes, (x.q, d_out), x.gates, marks, d_s, reverse=True)
    d_v = triton_chunks.values(sizes, (x.q, x.k, d_out), x.gates, marks, d_left, x.v.dtype)
    d_q, d_k, d_gates = _keys(sizes, x, d_out, marks, (entered, d_left))
    return Arrays(d_q, d_k, d_v, d_gates), None, d_s


def _keys(
    sizes: Launch, x: Arrays, d_out: Array, marks: Array | None, states: tuple[Array, Array]
) -> tuple[Array, Array, Array | None]:
    """dq, dk and the cotangent of the log decay."""
    static, blocks = sizes.static, sizes.static.blocks
    batch, time, heads, key, _ = sizes.shape
    # These programs hold many sums besides their operands, so they read half as much of V.
    tile = sizes.tile[0], sizes.tile[1] // 2
    _, _, num_key, _ = sizes.tiles(*tile)
    d_gates = {
        "none": jax.ShapeDtypeStruct((1,), jnp.float32),
        "scalar": jax.ShapeDtypeStruct((num_key, batch, heads, time), jnp.float32),
        "vector": jax.ShapeDtypeStruct(
            (batch, time, heads, key), jnp.float32 if x.gates is None else x.gates.dtype
        ),
    }[static.decay]
    d_q, d_k, d_g = triton_call.call(
        keys_kernel,
        x.q,
        x.k,
        x.v,
        d_out,
        *triton_chunks.given(x.gates, marks),
        *states,
        out_shape=[
            jax.ShapeDtypeStruct(x.q.shape, x.q.dtype),
            jax.ShapeDtypeStruct(x.k.shape, x.k.dtype),
            d_gates,
        ],
        grid=(sizes.num_chunks, batch * heads, num_key),
        num_warps=blocks.wide_warps,
        num_stages=blocks.num_stages,
        LEVELS=sizes.levels,
        **sizes.constants(*tile),
    )
    if static.decay == "none":
        return d_q, d_k, None
    return d_q, d_k, d_g if static.decay == "vector" else jnp.sum(d_g, axis=0)


attend = jax.custom_vjp(_attend, nondiff_argnums=(0,))
attend.defvjp(_forward, _backward)
