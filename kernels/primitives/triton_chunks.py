"""Chunked recurrences in Triton: what the GPU forms of the recurrent ops share.

Pass 1 has one program per head and tile of the state. It goes from chunk to chunk, carries S in
registers, and writes the state that enters each chunk. Pass 2 has a program for every chunk. Let
`row` be the decay from the entry to the token, `col` the decay from the token to the end, and D_ij
the decay from token j to token i (0 for i < j), as in the tile.py of the ops:

    outputs   O  = scale (row q) S + P V        P = D (q k^T), D inside the sum over K per channel
    values    dV = scale P^T dO + (col k) dS'   dS' is the cotangent of what leaves the chunk

Per-channel decay uses the halving of `decay_halves`. At each level the factor of a token is the
decay between it and the border of its two halves of h tokens. The sums of log decay to the borders
of a level are one product with a matrix of zeros and ones, and so is their derivative. Every sum
is taken over its own span of tokens; no sum is a difference of others.

Arrays are [B, T, H, ...] as in the op. Per-head decays and other gates are [B, H, T] float32, zero
on padding. `marks` [B, 1 + T] holds the document of the carried state and of every token; padding
of document d is stored as -1 - d. States are [B, H, N, K, V]. With HALF the tensor cores multiply
bfloat16, otherwise float32 in three passes (relative error 2^-22). Sums are always float32.
"""

# pyright: basic, reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.blocks import TritonChunk
from kernels.primitives import triton_call

DEFAULT = TritonChunk()


class Static(NamedTuple):
    """What is known at trace time."""

    scale: float
    decay: str
    docs: bool
    blocks: TritonChunk


class Launch(NamedTuple):
    """The sizes of one call, shared by its launches."""

    static: Static
    shape: tuple[int, int, int, int, int]  # B T H K V
    half: bool
    fine: bool

    @property
    def num_chunks(self) -> int:
        return -(-self.shape[1] // self.static.blocks.length)

    @property
    def states(self) -> tuple[int, ...]:
        batch, _, heads, key, value = self.shape
        return batch, heads, self.num_chunks, key, value

    @property
    def levels(self) -> int:
        """How often a chunk can be halved."""
        return self.static.blocks.length.bit_length() - 1

    @property
    def dtype(self) -> Any:
        """The dtype to which the tensor cores would round an operand, so arrays are kept in it."""
        return jnp.bfloat16 if self.half else jnp.float32

    @property
    def tile(self) -> tuple[int, int]:
        """The sizes along K and V of the tile that a program of one chunk visits."""
        blocks = self.static.blocks
        return blocks.channel_key if self.static.decay == "vector" else blocks.key, blocks.value

    def tiles(self, key: int, value: int) -> tuple[int, int, int, int]:
        """The tile of K and V, and how many there are of each. A tile has at least 16 channels, and
        at most the width of the heads rounded up to a power of two.

        Float32 takes twice the room of bfloat16, so its tiles are half as wide.
        """
        sizes = [
            min(max(16, size if self.half else size // 2), max(16, power_of_two(width)))
            for size, width in zip((key, value), self.shape[3:], strict=True)
        ]
        counts = [-(-width // size) for size, width in zip(sizes, self.shape[3:], strict=True)]
        return sizes[0], sizes[1], counts[0], counts[1]

    def constants(self, key: int, value: int) -> dict[str, Any]:
        """The constants that every kernel here takes, for tiles of these sizes."""
        _, time, heads, *widths = self.shape
        block_k, block_v, _, _ = self.tiles(key, value)
        return {
            "HEADS": heads,
            "T": time,
            "K": widths[0],
            "V": widths[1],
            "C": self.static.blocks.length,
            "BK": block_k,
            "BV": block_v,
            "SCALE": self.static.scale,
            "DECAY": self.static.decay,
            "DOCS": self.static.docs,
            "HALF": self.half,
            "FINE": self.fine,
        }


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def launch(static: Static, q: Array, v: Array, gates: Array | None) -> Launch:
    """The sizes that the launches of one call share."""
    fine = gates is not None and gates.dtype != jnp.bfloat16
    half = q.dtype == jnp.bfloat16 and v.dtype == jnp.bfloat16
    batch, time, heads, width = q.shape
    return Launch(static, (batch, time, heads, width, v.shape[3]), half, fine)


def mark(
    segment_ids: Int[Array, "B T"] | None, entry: Int[Array, " B"], time: int
) -> tuple[Int[Array, "B 1+T"] | None, Int[Array, " B"]]:
    """`marks` (None where every row is one document without padding), and each row's last document.

    In `marks`, documents are counted, and the document of the state is number 0.
    """
    belongs = segments.continued(segment_ids, entry, time)
    if segment_ids is None:
        return None, belongs[:, -1]
    count = segments.counted(belongs, entry)
    here = jnp.where(segment_ids != 0, count, -1 - count)
    return jnp.concatenate([jnp.zeros_like(entry)[:, None], here], axis=1), belongs[:, -1]


def per_head(
    gate: Float[Array, "B T H"], segment_ids: Int[Array, "B T"] | None
) -> Float[Array, "B H T"]:
    """A gate in the layout that the kernels read: float32, zero on padding."""
    gate = gate.astype(jnp.float32)
    if segment_ids is not None:
        gate = jnp.where((segment_ids != 0)[..., None], gate, 0.0)
    return jnp.swapaxes(gate, 1, 2)


@triton.jit
def product(x, y, HALF: tl.constexpr) -> Any:
    """x @ y, summed in float32. Float32 operands are split into three parts of 11 bits."""
    if HALF:
        z = tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16))
    else:
        z = tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="tf32x3")
    return z


@triton.jit
def place(n, column, T: tl.constexpr, WIDTH: tl.constexpr, HEADS, C: tl.constexpr, BLOCK) -> Any:
    """Offsets of chunk n, from channel `column` on, in an array [T, HEADS, WIDTH]; and which of
    them exist."""
    i = tl.arange(0, C)[:, None]
    j = column + tl.arange(0, BLOCK)[None, :]
    start = tl.cast(n, tl.int64) * C * HEADS * WIDTH
    return start + (i * HEADS * WIDTH + j), (n * C + i < T) & (j < WIDTH)


@triton.jit
def corner(
    n, row, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
) -> Any:
    """Offsets of a tile of state n in an array [N, K, V], and which of them exist."""
    i = row + tl.arange(0, BK)[:, None]
    j = column + tl.arange(0, BV)[None, :]
    return tl.cast(n, tl.int64) * K * V + (i * V + j), (i < K) & (j < V)


@triton.jit
def documents(marks, n, T: tl.constexpr, C: tl.constexpr) -> Any:
    """The document of each token, which tokens are real, and the documents at entry and end."""
    i = n * C + tl.arange(0, C)
    mark = tl.load(marks + 1 + i, mask=i < T, other=-1)
    entered = tl.load(marks + n * C)
    left = tl.load(marks + tl.minimum(n * C + C, T))
    entered = tl.where(entered < 0, -1 - entered, entered)
    left = tl.where(left < 0, -1 - left, left)
    return tl.where(mark < 0, -1 - mark, mark), mark >= 0, entered, left


@triton.jit
def is_real(marks, n, T: tl.constexpr, C: tl.constexpr, DOCS: tl.constexpr) -> Any:
    """Which tokens of chunk n exist and are not padding."""
    i = n * C + tl.arange(0, C)
    real = i < T
    if DOCS:
        real = tl.load(marks + 1 + i, mask=real, other=-1) >= 0
    return real


@triton.jit
def read_chunk(gates, marks, n, T: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, DOCS) -> Any:
    """The arguments of `ends` for chunk n: only loads, so a loop can issue them one chunk ahead.

    They are: which tokens read the state that entered, which reach the end of the chunk, whether
    the state passes through, and the log decay of each token and of the token after it.
    """
    i = tl.arange(0, C)
    real = n * C + i < T
    reads, stays, goes_on = real, real, True
    own = tl.zeros((C,), tl.float32)
    after = own
    if DECAY == "scalar":
        own = tl.load(gates + n * C + i, mask=real, other=0.0)
        later = (i + 1 < C) & (n * C + i + 1 < T)
        after = tl.load(gates + n * C + i + 1, mask=later, other=0.0)
    if DOCS:
        document, real, entered, left = documents(marks, n, T, C)
        reads, stays = real & (document == entered), real & (document == left)
        goes_on = entered == left
    return reads, stays, goes_on, own, after


@triton.jit
def ends(reads, stays, goes_on, own, after, DECAY: tl.constexpr) -> Any:
    """row [C], col [C], and the factor of the state that passes through, for per-head decay."""
    row, col = tl.where(reads, 1.0, 0.0), tl.where(stays, 1.0, 0.0)
    through = tl.where(goes_on, 1.0, 0.0)
    if DECAY == "scalar":
        row *= tl.exp(tl.cumsum(own, 0))
        col *= tl.exp(tl.cumsum(after, 0, reverse=True))
        through *= tl.exp(tl.sum(own, 0))
    return row, col, through


@triton.jit
def pairs(
    gates, marks, n, T: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr
) -> Any:
    """D [C, C] for per-head decay."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    between = tl.where(i >= j, 1.0, 0.0)
    if DECAY == "scalar":
        at = n * C + tl.arange(0, C)
        own = tl.load(gates + at, mask=at < T, other=0.0)
        span = tl.cumsum(tl.where(i > j, own[:, None], 0.0), 0)
        between = tl.where(i >= j, tl.exp(span), 0.0)
    if DOCS:
        document, real, _, _ = documents(marks, n, T, C)
        same = document[:, None] == document[None, :]
        between = tl.where(same & real[:, None] & real[None, :], between, 0.0)
    return between


@triton.jit
def pull_ends(d_row, d_col, d_through, C: tl.constexpr) -> Any:
    """The cotangent of per-head log decays, from those of log row, log col [C] and log through."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    earlier = tl.sum(tl.where(i > j, d_col[None, :], 0.0), 1)
    return tl.cumsum(d_row, 0, reverse=True) + earlier + d_through


@triton.jit
def pull_pairs(d_pairs, C: tl.constexpr) -> Any:
    """The cotangent of log decays from that of log D [C, C]: g_s is in D_ij for j < s <= i."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    later = tl.cumsum(tl.where(i > j, d_pairs, 0.0), 0, reverse=True)
    return tl.sum(tl.where(i > j, later, 0.0), 1)


@triton.jit
def log_decay(gates, at, inside, real) -> Any:
    """The per-channel log decays of one tile, in float32; zero on padding."""
    own = tl.load(gates + at, mask=inside, other=0.0).to(tl.float32)
    # exp(-1e4) is 0 already, and 0 times infinity would be NaN.
    own = tl.where(own < -1e4, -1e4, own)
    return tl.where(real[:, None], own, 0.0)


@triton.jit
def add_up(chosen, x, HALF: tl.constexpr, FINE: tl.constexpr) -> Any:
    """For each row of `chosen` [C, C]: the sum of the rows of x that it selects.

    Zeros and ones are exact in bfloat16. FINE keeps another 8 bits of x.
    """
    ones = tl.where(chosen, 1.0, 0.0)
    if HALF:
        ones = ones.to(tl.bfloat16)
        head = x.to(tl.bfloat16)
        total = tl.dot(ones, head)
        if FINE:
            total = tl.dot(ones, (x - head.to(tl.float32)).to(tl.bfloat16), total)
    else:
        total = tl.dot(ones, x, input_precision="tf32x3")
    return total


@triton.jit
def toward(level, C: tl.constexpr) -> Any:
    """[t, s]: whether s is between t and the border of t's two halves of 2^level tokens."""
    t = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    is_second = ((t >> level) & 1) == 1
    return ((t >> level) == (s >> level)) & ((is_second & (s <= t)) | ((is_second == 0) & (s > t)))


@triton.jit
def across(level, C: tl.constexpr) -> Any:
    """The pairs i, j that lie on either side of a border between halves of 2^level tokens."""
    i = tl.arange(0, C)[:, None] >> level
    j = tl.arange(0, C)[None, :] >> level
    return ((i & 1) == 1) & (j == i - 1)


@triton.jit
def channel_scores(q, k, g, C: tl.constexpr, LEVELS: tl.constexpr, HALF: tl.constexpr, FINE) -> Any:
    """A_ij = sum_c q_ic k_jc exp(sum_{j < s <= i} g_sc) for i >= j, else 0."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    scores = tl.where(i == j, tl.sum(q * k, 1)[:, None], 0.0)
    for level in range(LEVELS):
        factor = tl.exp(add_up(toward(level, C), g, HALF, FINE))
        found = product(q * factor, tl.trans(k * factor), HALF)
        scores += tl.where(across(level, C), found, 0.0)
    return scores


@triton.jit
def outputs_kernel(
    q,
    k,
    v,
    gates,
    marks,
    entered,
    out,
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
    """O of one chunk, head and tile of V."""
    n, head, first = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) * BV
    token = head // HEADS * T * HEADS + head % HEADS
    q, k, v, out = q + token * K, k + token * K, v + token * V, out + token * V
    marks += head // HEADS * (T + 1)
    entered += head * ((T + C - 1) // C) * K * V
    if DECAY == "vector":
        gates += token * K
    else:
        gates += head * T
    i = tl.arange(0, C)
    found = tl.zeros((C, BV), tl.float32)
    scores = tl.zeros((C, C), tl.float32)
    real = is_real(marks, n, T, C, DOCS)
    for column in range(0, K, BK):
        at, inside = place(n, column, T, K, HEADS, C, BK)
        q_here = tl.load(q + at, mask=inside, other=0.0)
        k_here = tl.load(k + at, mask=inside, other=0.0)
        there, exists = corner(n, column, first, K, V, BK, BV)
        s = tl.load(entered + there, mask=exists, other=0.0)
        if DECAY == "vector":
            g = log_decay(gates, at, inside, real)
            q_here, k_here = q_here.to(tl.float32), k_here.to(tl.float32)
            since = tl.exp(add_up(i[:, None] >= i[None, :], g, HALF, FINE))
            found += product(q_here * since, s, HALF)
            scores += channel_scores(q_here, k_here, g, C, LEVELS, HALF, FINE)
        else:
            found += product(q_here, s, HALF)
            scores += product(q_here, tl.trans(k_here), HALF)
    reads, stays, goes_on, own, after = read_chunk(gates, marks, n, T, C, DECAY, DOCS)
    row, _, _ = ends(reads, stays, goes_on, own, after, DECAY)
    scores *= pairs(gates, marks, n, T, C, DECAY, DOCS)
    at, inside = place(n, first, T, V, HEADS, C, BV)
    v_here = tl.load(v + at, mask=inside, other=0.0)
    found = row[:, None] * found + product(scores, v_here, HALF)
    tl.store(out + at, (SCALE * found).to(out.dtype.element_ty), mask=inside)


@triton.jit
def values_kernel(
    q,
    k,
    d_out,
    gates,
    marks,
    d_left,
    d_v,
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
    STATE: tl.constexpr,
) -> None:
    """dV of one chunk, head and tile of V; without STATE only the part from inside the chunk."""
    n, head, first = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) * BV
    token = head // HEADS * T * HEADS + head % HEADS
    q, k, d_out, d_v = q + token * K, k + token * K, d_out + token * V, d_v + token * V
    marks += head // HEADS * (T + 1)
    if STATE:
        d_left += head * ((T + C - 1) // C) * K * V
    if DECAY == "vector":
        gates += token * K
    else:
        gates += head * T
    i = tl.arange(0, C)
    found = tl.zeros((C, BV), tl.float32)
    scores = tl.zeros((C, C), tl.float32)
    real = is_real(marks, n, T, C, DOCS)
    for column in range(0, K, BK):
        at, inside = place(n, column, T, K, HEADS, C, BK)
        q_here = tl.load(q + at, mask=inside, other=0.0)
        k_here = tl.load(k + at, mask=inside, other=0.0)
        kept = k_here
        if DECAY == "vector":
            g = log_decay(gates, at, inside, real)
            q_here, k_here = q_here.to(tl.float32), k_here.to(tl.float32)
            scores += channel_scores(q_here, k_here, g, C, LEVELS, HALF, FINE)
            kept = k_here * tl.exp(add_up(i[:, None] < i[None, :], g, HALF, FINE))
        else:
            scores += product(q_here, tl.trans(k_here), HALF)
        if STATE:
            there, exists = corner(n, column, first, K, V, BK, BV)
            found += product(kept, tl.load(d_left + there, mask=exists, other=0.0), HALF)
    scores *= SCALE * pairs(gates, marks, n, T, C, DECAY, DOCS)
    at, inside = place(n, first, T, V, HEADS, C, BV)
    d_here = tl.load(d_out + at, mask=inside, other=0.0)
    if STATE:
        reads, stays, goes_on, own, after = read_chunk(gates, marks, n, T, C, DECAY, DOCS)
        _, col, _ = ends(reads, stays, goes_on, own, after, DECAY)
        found *= col[:, None]
    found += product(tl.trans(scores), d_here, HALF)
    tl.store(d_v + at, found.to(d_v.dtype.element_ty), mask=inside)


def given(gates: Array | None, marks: Array | None) -> tuple[Array, Array]:
    """Gates and marks as a kernel's arguments; placeholders for None are never read."""
    return (
        jnp.zeros((1,), jnp.float32) if gates is None else gates,
        jnp.zeros((1,), jnp.int32) if marks is None else marks,
    )


def outputs(
    sizes: Launch,
    qkv: tuple[Array, ...],
    gates: Array | None,
    marks: Array | None,
    entered: Float[Array, "B H N K V"],
) -> Float[Array, "B T H V"]:
    """O of all chunks, in the dtype of q."""
    q, _, v = qkv
    (out,) = _launch(
        sizes, outputs_kernel, (*qkv, *given(gates, marks), entered), (v.shape, q.dtype), {}
    )
    return out


def values(
    sizes: Launch,
    qk_d_out: tuple[Array, ...],
    gates: Array | None,
    marks: Array | None,
    d_left: Float[Array, "B H N K V"] | None,
    dtype: Any,
) -> Float[Array, "B T H V"]:
    """dV of all chunks; without `d_left` only the part from inside each chunk."""
    state = jnp.zeros((1,), sizes.dtype) if d_left is None else d_left
    (d_v,) = _launch(
        sizes,
        values_kernel,
        (*qk_d_out, *given(gates, marks), state),
        (qk_d_out[2].shape, dtype),
        {"STATE": d_left is not None},
    )
    return d_v


def _launch(
    sizes: Launch,
    kernel: Any,
    arrays: tuple[Array, ...],
    out: tuple[tuple[int, ...], Any],
    constants: dict[str, Any],
) -> list[Array]:
    """Launches one program for each chunk, head and tile of V."""
    blocks = sizes.static.blocks
    _, _, _, num_value = sizes.tiles(*sizes.tile)
    return triton_call.call(
        kernel,
        *arrays,
        out_shape=[jax.ShapeDtypeStruct(*out)],
        grid=(sizes.num_chunks, sizes.shape[0] * sizes.shape[2], num_value),
        num_warps=blocks.wide_warps if sizes.static.decay == "vector" else blocks.num_warps,
        num_stages=blocks.num_stages,
        LEVELS=sizes.levels,
        **sizes.constants(*sizes.tile),
        **constants,
    )
