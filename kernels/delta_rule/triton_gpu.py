"""The delta rule in Triton for NVIDIA GPUs: forward, and a hand-derived backward.

    forward    inverse    A = (I + M)^-1 of every chunk                            parallel
               products   W = A (beta read K), U = A (beta V)                      parallel
               recall     N = U - W S,  S' = through S + (write K)^T N             chunk after chunk
               outputs    O = scale read (Q S) + P N                               parallel
    backward   products   W again
               values     the part P^T dO of dN                                    parallel
               retreat    dN = P^T dO + (write K) dS'                              last chunk first
                          dS = through dS' + scale (read Q)^T dO - W^T dN
               keys       dX = A^T dN, then dq, dk, dv, d beta, d log decay        parallel

The mathematics is that of tile.py, but with W: then the sequential part needs two products per
chunk instead of three. Shared pieces are in `primitives/triton_chunks`. Saved: the inputs, A, N and
the state at the entry of every chunk. The last three are bfloat16 where the inputs are, because the
tensor cores would round them in any case; the state that is carried on is float32. A program adds
up its tiles of V; tiles of K are written separately and added afterwards. Nothing is atomic.

With e = V - read (K S) the derivative by beta is dX e + (dM L) 1. It needs no product of its own,
because dM = -dX N^T and K (dX S^T)^T are computed anyway.
"""

# pyright: basic, reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from kernels.blocks import TritonChunk
from kernels.contract import Options
from kernels.delta_rule.tile import Memory
from kernels.letters import Inputs
from kernels.primitives import triton_call, triton_chunks
from kernels.primitives.triton_chunks import (
    DEFAULT,
    Launch,
    Static,
    corner,
    ends,
    pairs,
    place,
    product,
    pull_ends,
    pull_pairs,
    read_chunk,
)

SHARED_MEMORY = 216 * 1024  # a part of the 227 KB that a program may use on Hopper
CANDIDATES = tuple(
    TritonChunk(recall_value=width, state_warps=warps, state_stages=ahead, num_stages=stages)
    for width, warps in ((16, 4), (32, 4), (64, 4), (64, 8))
    for ahead in (2, 3)
    for stages in (2, 3)
)


@triton.jit
def exactly(x, y) -> Any:
    """x @ y in float32, in three passes: rounding to 11 bits would spoil an inverse."""
    return tl.dot(x, y, input_precision="tf32x3")


@triton.jit
def unit_inverse(m, C: tl.constexpr, BASE: tl.constexpr, MERGES: tl.constexpr) -> Any:
    """(I + m)^-1 for strictly lower triangular m; see `tile.unit_inverse`.

    Blocks of BASE rows are inverted by substitution, all at once. Let X be the inverse of the
    diagonal blocks of some size, and B the entries that couple them in pairs. Then X - X B X is the
    inverse of the diagonal blocks of twice the size.
    """
    above = tl.arange(0, C // BASE)[:, None, None, None]
    beside = tl.arange(0, C // BASE)[None, None, :, None]
    cut = tl.reshape(m, (C // BASE, BASE, C // BASE, BASE))
    diagonal = tl.sum(tl.where(above == beside, cut, 0.0), 2)
    i = tl.arange(0, BASE)[None, :, None]
    j = tl.arange(0, BASE)[None, None, :]
    found = tl.where(i == j, 1.0, 0.0) + tl.zeros((C // BASE, BASE, BASE), tl.float32)
    for step in range(BASE - 1):
        column = tl.sum(tl.where(j == step, diagonal, 0.0), 2)
        row = tl.sum(tl.where(i == step, found, 0.0), 1)
        found -= column[:, :, None] * row[:, None, :]
    x = tl.reshape(tl.where(above == beside, found[:, :, None, :], 0.0), (C, C))
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    for merge in range(MERGES):
        size = BASE << merge
        couples = ((i // size) % 2 == 1) & (j // size == i // size - 1)
        x -= exactly(exactly(x, tl.where(couples, m, 0.0)), x)
    return x


@triton.jit
def inverse_kernel(
    k,
    beta,
    gates,
    marks,
    inverse,
    HEADS: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BASE: tl.constexpr,
    MERGES: tl.constexpr,
    SCALE: tl.constexpr,
    DECAY: tl.constexpr,
    DOCS: tl.constexpr,
    HALF: tl.constexpr,
    FINE: tl.constexpr,
) -> None:
    """A = (I + diag(beta) L)^-1 of one chunk and head, with L_ij = D_ij k_i . k_j for j < i."""
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k += (head // HEADS * T * HEADS + head % HEADS) * K
    marks += head // HEADS * (T + 1)
    gates += head * T
    i = tl.arange(0, C)
    gram = tl.zeros((C, C), tl.float32)
    for column in range(0, K, BK):
        at, inside = place(n, column, T, K, HEADS, C, BK)
        k_here = tl.load(k + at, mask=inside, other=0.0)
        gram += product(k_here, tl.trans(k_here), HALF)
    lower = gram * pairs(gates, marks, n, T, C, DECAY, DOCS)
    gate = tl.load(beta + head * T + n * C + i, mask=n * C + i < T, other=0.0)
    m = tl.where(i[:, None] > i[None, :], gate[:, None] * lower, 0.0)
    found = unit_inverse(m, C, BASE, MERGES)
    there = (head * ((T + C - 1) // C) + n) * C * C + (i[:, None] * C + i[None, :])
    tl.store(inverse + there, found.to(inverse.dtype.element_ty))


@triton.jit
def products_kernel(
    k,
    v,
    beta,
    gates,
    marks,
    inverse,
    w,
    u,
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
    VALUES: tl.constexpr,
) -> None:
    """W = A (beta read K) and, with VALUES, U = A (beta V) of one chunk and head."""
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = head // HEADS * T * HEADS + head % HEADS
    k, w = k + token * K, w + token * K
    marks += head // HEADS * (T + 1)
    gates += head * T
    i = tl.arange(0, C)
    gate = tl.load(beta + head * T + n * C + i, mask=n * C + i < T, other=0.0)
    there = (head * ((T + C - 1) // C) + n) * C * C + (i[:, None] * C + i[None, :])
    solved = tl.load(inverse + there).to(tl.float32) * gate[None, :]
    reads, stays, goes_on, own, after = read_chunk(gates, marks, n, T, C, DECAY, DOCS)
    row, _, _ = ends(reads, stays, goes_on, own, after, DECAY)
    for column in range(0, K, BK):
        at, inside = place(n, column, T, K, HEADS, C, BK)
        found = product(solved * row[None, :], tl.load(k + at, mask=inside, other=0.0), HALF)
        tl.store(w + at, found.to(w.dtype.element_ty), mask=inside)
    if VALUES:
        v, u = v + token * V, u + token * V
        for column in range(0, V, BV):
            at, inside = place(n, column, T, V, HEADS, C, BV)
            found = product(solved, tl.load(v + at, mask=inside, other=0.0), HALF)
            tl.store(u + at, found.to(u.dtype.element_ty), mask=inside)


@triton.jit
def recall_kernel(
    k,
    w,
    u,
    gates,
    marks,
    first,
    entered,
    wrote,
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
) -> None:
    """N = U - W S and S' = through S + (write K)^T N from chunk to chunk, with all of K at once."""
    head, v0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV
    num_chunks = (T + C - 1) // C
    token = head // HEADS * T * HEADS + head % HEADS
    k, w, u, wrote = k + token * K, w + token * K, u + token * V, wrote + token * V
    marks += head // HEADS * (T + 1)
    gates += head * T
    entered += head * num_chunks * K * V
    whole, exists = corner(head, 0, v0, K, V, BK, BV)
    s = tl.load(first + whole, mask=exists, other=0.0)
    reads, stays, goes_on, own, after = read_chunk(gates, marks, 0, T, C, DECAY, DOCS)
    for n in range((T + C - 1) // C):
        _row, col, through = ends(reads, stays, goes_on, own, after, DECAY)
        following = tl.minimum(n + 1, num_chunks - 1)
        reads, stays, goes_on, own, after = read_chunk(gates, marks, following, T, C, DECAY, DOCS)
        there, exists = corner(n, 0, v0, K, V, BK, BV)
        tl.store(entered + there, s.to(entered.dtype.element_ty), mask=exists)
        at, inside = place(n, 0, T, K, HEADS, C, BK)
        w_here = tl.load(w + at, mask=inside, other=0.0)
        k_here = tl.load(k + at, mask=inside, other=0.0)
        v_at, v_inside = place(n, v0, T, V, HEADS, C, BV)
        u_here = tl.load(u + v_at, mask=v_inside, other=0.0).to(tl.float32)
        new = u_here - product(w_here, s, HALF)
        tl.store(wrote + v_at, new.to(wrote.dtype.element_ty), mask=v_inside)
        if DECAY != "none" or DOCS:
            new *= col[:, None]
            s *= through
        s += product(tl.trans(k_here), new, HALF)
    tl.store(last + whole, s, mask=exists)


@triton.jit
def retreat_kernel(
    q,
    k,
    w,
    d_out,
    d_inside,
    gates,
    marks,
    d_last,
    d_left,
    d_wrote,
    d_first,
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
) -> None:
    """dN and dS from the last chunk to the first, with all of K at once."""
    head, v0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV
    num_chunks = (T + C - 1) // C
    token = head // HEADS * T * HEADS + head % HEADS
    q, k, w = q + token * K, k + token * K, w + token * K
    d_out, d_inside, d_wrote = d_out + token * V, d_inside + token * V, d_wrote + token * V
    marks += head // HEADS * (T + 1)
    gates += head * T
    d_left += head * num_chunks * K * V
    whole, exists = corner(head, 0, v0, K, V, BK, BV)
    d_s = tl.load(d_last + whole, mask=exists, other=0.0)
    reads, stays, goes_on, own, after = read_chunk(gates, marks, num_chunks - 1, T, C, DECAY, DOCS)
    for step in range((T + C - 1) // C):
        n = num_chunks - 1 - step
        row, col, through = ends(reads, stays, goes_on, own, after, DECAY)
        reads, stays, goes_on, own, after = read_chunk(
            gates, marks, tl.maximum(n - 1, 0), T, C, DECAY, DOCS
        )
        there, exists = corner(n, 0, v0, K, V, BK, BV)
        tl.store(d_left + there, d_s.to(d_left.dtype.element_ty), mask=exists)
        at, inside = place(n, 0, T, K, HEADS, C, BK)
        q_here = tl.load(q + at, mask=inside, other=0.0)
        k_here = tl.load(k + at, mask=inside, other=0.0)
        w_here = tl.load(w + at, mask=inside, other=0.0)
        v_at, v_inside = place(n, v0, T, V, HEADS, C, BV)
        d_here = tl.load(d_out + v_at, mask=v_inside, other=0.0)
        d_new = tl.load(d_inside + v_at, mask=v_inside, other=0.0).to(tl.float32)
        d_new += col[:, None] * product(k_here, d_s, HALF)
        tl.store(d_wrote + v_at, d_new.to(d_wrote.dtype.element_ty), mask=v_inside)
        if DECAY != "none" or DOCS:
            d_here = d_here.to(tl.float32) * row[:, None]
            d_s *= through
        d_s += SCALE * product(tl.trans(q_here), d_here, HALF)
        d_s -= product(tl.trans(w_here), d_new, HALF)
    tl.store(d_first + whole, d_s, mask=exists)


@triton.jit
def keys_kernel(
    q,
    k,
    v,
    beta,
    gates,
    marks,
    inverse,
    wrote,
    entered,
    d_out,
    d_wrote,
    d_left,
    d_q,
    d_k,
    d_v,
    d_beta,
    d_gates,
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
) -> None:
    """dq, dk, and the tile's parts of d beta and d log decay; the first tile of K writes dv."""
    n, head, tile = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    num_chunks = (T + C - 1) // C
    token = head // HEADS * T * HEADS + head % HEADS
    q, k, d_q, d_k = q + token * K, k + token * K, d_q + token * K, d_k + token * K
    v, d_v, wrote = v + token * V, d_v + token * V, wrote + token * V
    d_out, d_wrote = d_out + token * V, d_wrote + token * V
    marks += head // HEADS * (T + 1)
    gates += head * T
    entered += head * num_chunks * K * V
    d_left += head * num_chunks * K * V
    t = tl.arange(0, C)
    gate = tl.load(beta + head * T + n * C + t, mask=n * C + t < T, other=0.0)
    there = (head * num_chunks + n) * C * C + (t[None, :] * C + t[:, None])
    solved = tl.load(inverse + there)  # transposed
    d_scores = tl.zeros((C, C), tl.float32)
    d_m = tl.zeros((C, C), tl.float32)
    d_read = tl.zeros((C, BK), tl.float32)
    d_kept = tl.zeros((C, BK), tl.float32)
    d_asked = tl.zeros((C, BK), tl.float32)
    d_gate = tl.zeros((C,), tl.float32)
    d_through = 0.0
    for first in range(0, V, BV):
        at, inside = place(n, first, T, V, HEADS, C, BV)
        new = tl.load(wrote + at, mask=inside, other=0.0)
        d_here = tl.load(d_out + at, mask=inside, other=0.0)
        d_x = product(solved, tl.load(d_wrote + at, mask=inside, other=0.0), HALF)
        at_state, exists = corner(n, tile * BK, first, K, V, BK, BV)
        s = tl.load(entered + at_state, mask=exists, other=0.0)
        d_s = tl.load(d_left + at_state, mask=exists, other=0.0)
        d_scores += product(d_here, tl.trans(new), HALF)
        d_m -= product(d_x, tl.trans(new), HALF)
        d_read += product(d_here, tl.trans(s), HALF)
        d_kept += product(new, tl.trans(d_s), HALF)
        d_asked += product(d_x, tl.trans(s), HALF)
        if DECAY == "scalar":
            d_through += tl.sum(s.to(tl.float32) * d_s.to(tl.float32))
        if tile == 0:
            v_here = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
            d_gate += tl.sum(d_x * v_here, 1)
            tl.store(d_v + at, (gate[:, None] * d_x).to(d_v.dtype.element_ty), mask=inside)
    reads, stays, goes_on, own, after = read_chunk(gates, marks, n, T, C, DECAY, DOCS)
    row, col, through = ends(reads, stays, goes_on, own, after, DECAY)
    between = pairs(gates, marks, n, T, C, DECAY, DOCS)
    at, inside = place(n, tile * BK, T, K, HEADS, C, BK)
    q_here = tl.load(q + at, mask=inside, other=0.0)
    k_here = tl.load(k + at, mask=inside, other=0.0)
    d_scores *= SCALE * between
    d_m = tl.where(t[:, None] > t[None, :], d_m * between, 0.0)
    d_read *= SCALE * row[:, None]
    d_kept *= col[:, None]
    d_asked *= row[:, None]
    gram = d_m * product(k_here, tl.trans(k_here), HALF)
    recalled = tl.sum(k_here.to(tl.float32) * d_asked, 1)
    d_gate += tl.sum(gram, 1) - recalled
    part = (tile * tl.num_programs(1) + head) * T + n * C + t
    tl.store(d_beta + part, d_gate, mask=n * C + t < T)
    if DECAY == "scalar":
        weights = d_scores * product(q_here, tl.trans(k_here), HALF)
        d_row = tl.sum(q_here.to(tl.float32) * d_read, 1) - gate * recalled
        d_col = tl.sum(k_here.to(tl.float32) * d_kept, 1)
        d_g = pull_ends(d_row, d_col, through * d_through, C)
        d_g += pull_pairs(weights + gate[:, None] * gram, C)
        tl.store(d_gates + part, d_g, mask=n * C + t < T)
    d_gram = gate[:, None] * d_m
    d_read += product(d_scores, k_here, HALF)
    d_kept += product(tl.trans(d_scores), q_here, HALF)
    d_kept += product(d_gram + tl.trans(d_gram), k_here, HALF) - gate[:, None] * d_asked
    tl.store(d_q + at, d_read.to(d_q.dtype.element_ty), mask=inside)
    tl.store(d_k + at, d_kept.to(d_k.dtype.element_ty), mask=inside)


class Arrays(NamedTuple):
    """The inputs of the kernels."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]
    beta: Float[Array, "B H T"]
    gates: Float[Array, "B H T"] | None


class Residuals(NamedTuple):
    """What the backward pass needs."""

    x: Arrays
    marks: Int[Array, "B 1+T"] | None
    inverse: Float[Array, "B H N C C"]
    wrote: Float[Array, "B T H V"]
    entered: Float[Array, "B H N K V"]


def apply(
    inputs: Inputs,
    segment_ids: Int[Array, "B T"] | None,
    state: Memory,
    *,
    options: Options,
    blocks: TritonChunk | None = None,
) -> tuple[Float[Array, "B T H V"], Memory]:
    """Output and state of T more tokens."""
    time = inputs["k"].shape[1]
    marks, segment = triton_chunks.mark(segment_ids, state.segment, time)
    gates = None
    if options["decay"] == "scalar":
        gates = triton_chunks.per_head(inputs["log_decay"], segment_ids)
    beta = triton_chunks.per_head(inputs["beta"], segment_ids)
    x = Arrays(inputs["q"], inputs["k"], inputs["v"], beta, gates)
    static = Static(options["scale"], options["decay"], marks is not None, blocks or DEFAULT)
    out, s = recur(static, x, marks, state.s.astype(jnp.float32))
    return out, Memory(s, segment)


def _recur(
    static: Static, x: Arrays, marks: Array | None, s: Float[Array, "B H K V"]
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    return _forward(static, x, marks, s)[0]


def _forward(
    static: Static, x: Arrays, marks: Array | None, s: Array
) -> tuple[tuple[Array, Array], Residuals]:
    sizes = triton_chunks.launch(static, x.q, x.v, x.gates)
    given = triton_chunks.given(x.gates, marks)
    length = static.blocks.length
    (inverse,) = _chunks(
        sizes,
        inverse_kernel,
        (x.k, x.beta, *given),
        [((*sizes.states[:3], length, length), sizes.dtype)],
        BASE=static.blocks.base,
        MERGES=(length // static.blocks.base).bit_length() - 1,
    )
    w, u = _products(sizes, x, given, inverse, values=True)
    entered, wrote, s = _along(
        sizes,
        recall_kernel,
        (x.k, w, u, *given, s),
        [(sizes.states, sizes.dtype), (x.v.shape, sizes.dtype), (s.shape, jnp.float32)],
    )
    out = triton_chunks.outputs(sizes, (x.q, x.k, wrote), x.gates, marks, entered)
    return (out, s), Residuals(x, marks, inverse, wrote, entered)


def _backward(
    static: Static, saved: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Arrays, None, Array]:
    x, marks, inverse, wrote, entered = saved
    d_out, d_s = cotangents
    sizes = triton_chunks.launch(static, x.q, x.v, x.gates)
    given = triton_chunks.given(x.gates, marks)
    w, _ = _products(sizes, x, given, inverse, values=False)
    d_inside = triton_chunks.values(sizes, (x.q, x.k, d_out), x.gates, marks, None, sizes.dtype)
    d_left, d_wrote, d_s = _along(
        sizes,
        retreat_kernel,
        (x.q, x.k, w, d_out, d_inside, *given, d_s),
        [(sizes.states, sizes.dtype), (x.v.shape, sizes.dtype), (d_s.shape, jnp.float32)],
    )
    batch, time, heads, *_ = sizes.shape
    _, _, num_key, _ = sizes.tiles(*sizes.tile)
    part = (num_key, batch, heads, time)
    d_q, d_k, d_v, d_beta, d_gates = _chunks(
        sizes,
        keys_kernel,
        (x.q, x.k, x.v, x.beta, *given, inverse, wrote, entered, d_out, d_wrote, d_left),
        [
            (x.q.shape, x.q.dtype),
            (x.k.shape, x.k.dtype),
            (x.v.shape, x.v.dtype),
            (part, jnp.float32),
            ((1,) if x.gates is None else part, jnp.float32),
        ],
        tiles=num_key,
    )
    d_gates = None if x.gates is None else jnp.sum(d_gates, axis=0)
    return Arrays(d_q, d_k, d_v, jnp.sum(d_beta, axis=0), d_gates), None, d_s


def _products(
    sizes: Launch, x: Arrays, given: tuple[Array, Array], inverse: Array, *, values: bool
) -> list[Array]:
    """W, and U if it is requested."""
    return _chunks(
        sizes,
        products_kernel,
        (x.k, x.v, x.beta, *given, inverse),
        [(x.k.shape, sizes.dtype), (x.v.shape if values else (1,), sizes.dtype)],
        VALUES=values,
    )


def _chunks(
    sizes: Launch,
    kernel: Any,
    arrays: tuple[Array, ...],
    outs: list[tuple[tuple[int, ...], Any]],
    tiles: int = 1,
    **constants: Any,
) -> list[Array]:
    """Launches a program for each chunk, head and tile of K."""
    blocks = sizes.static.blocks
    # The kernel for keys holds five sums besides its operands, so it reads half as much of V.
    is_wide = kernel is keys_kernel
    tile = blocks.key, blocks.value // 2 if is_wide else blocks.value
    return triton_call.call(
        kernel,
        *arrays,
        out_shape=[jax.ShapeDtypeStruct(*out) for out in outs],
        grid=(sizes.num_chunks, sizes.shape[0] * sizes.shape[2], tiles),
        num_warps=blocks.wide_warps if is_wide else blocks.num_warps,
        num_stages=blocks.num_stages,
        **sizes.constants(*tile),
        **constants,
    )


def _along(
    sizes: Launch,
    kernel: Any,
    arrays: tuple[Array, ...],
    outs: list[tuple[tuple[int, ...], Any]],
) -> list[Array]:
    """Launches a program for each head and tile of V, which goes along the chunks with all of K."""
    blocks = sizes.static.blocks
    width = triton_chunks.power_of_two(sizes.shape[3])
    tile = 512, blocks.recall_value * 128 // max(128, width)
    block_k, block_v, _, num_value = sizes.tiles(*tile)
    itemsize = jnp.dtype(sizes.dtype).itemsize
    ahead = itemsize * blocks.length * (3 * block_k + 2 * block_v)
    room = SHARED_MEMORY - itemsize * block_k * block_v
    return triton_call.call(
        kernel,
        *arrays,
        out_shape=[jax.ShapeDtypeStruct(*out) for out in outs],
        grid=(sizes.shape[0] * sizes.shape[2], num_value),
        num_warps=blocks.state_warps,
        num_stages=max(1, min(blocks.state_stages, room // ahead)),
        **sizes.constants(*tile),
    )


recur = jax.custom_vjp(_recur, nondiff_argnums=(0,))
recur.defvjp(_forward, _backward)
