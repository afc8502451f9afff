"""Diagonal linear recurrences chunk by chunk in plain XLA, for any backend, with a hand-written
backward.

Modes: four products per channel (`tile`) for all chunks at once, and a scan over the states of the
chunks. Documents inside a chunk are numbered 0, 1, ... (their rank). The product within the chunk
is computed once per rank, as often as the chunk with the most documents needs: once or twice,
unless documents are shorter than chunks. Gate: C steps for all chunks side by side, a scan over
chunks, and C steps again.

Saved: the inputs, and the states at the entries of chunks. The backward pass is the same recurrence
from the last token to the first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels import segments
from kernels.blocks import Chunk, round_up
from kernels.contract import Options
from kernels.letters import Inputs
from kernels.linear_scan import tile
from kernels.linear_scan.tile import Maps, Modes
from kernels.primitives import chunks, gaps
from kernels.primitives.running_lse import running_lse

HIGHEST = lax.Precision.HIGHEST


class Ranked(NamedTuple):
    """Masks of a packed row's chunks. `rank` counts the documents that began in the chunk after its
    first token."""

    entry: Bool[Array, "N B C"]
    last: Bool[Array, "N B C"]
    through: Bool[Array, "N B"]
    rank: Int[Array, "N B C"]


def apply(
    inputs: Inputs,
    segment_ids: Int[Array, "B T"] | None,
    state: Modes,
    *,
    options: Options,
    blocks: Chunk | None = None,
) -> tuple[Float[Array, "B T H K"], Modes]:
    """Output and state of T more tokens; without modes `im` stays unchanged."""
    time = inputs["x"].shape[1]
    # Modes need matrices of C x C for every channel, so longer chunks cost more than they save.
    length = min((blocks or Chunk(32 if options["transition"] == "modes" else 64)).length, time)
    run = {"gate": _gated, "modes": _modal, "log_sum": _summed}[options["transition"]]
    out, state = run(inputs, segment_ids, state, length)
    return segments.blank_padding(out, segment_ids).astype(inputs["x"].dtype), state


def _summed(
    inputs: Inputs, segment_ids: Array | None, state: Modes, length: int
) -> tuple[Array, Modes]:
    del length  # an associative scan over the whole row
    x = inputs["x"].astype(jnp.float32)
    belongs = segments.continued(segment_ids, state.segment, x.shape[1])
    starts = belongs != segments.previous(belongs, state.segment)
    is_token = jnp.ones_like(starts) if segment_ids is None else segment_ids != 0
    h = running_lse(x, state.re[..., 0], (starts, is_token))
    return h, Modes(h[:, -1, ..., None], state.im, belongs[:, -1])


def _gated(
    inputs: Inputs, segment_ids: Array | None, state: Modes, length: int
) -> tuple[Array, Modes]:
    x = inputs["x"]
    belongs = segments.continued(segment_ids, state.segment, x.shape[1])
    starts = belongs != segments.previous(belongs, state.segment)
    is_token = jnp.ones_like(starts) if segment_ids is None else segment_ids != 0
    h = _scan(length, x, inputs["log_decay"], state.re[..., 0], (starts, is_token))
    return h, Modes(h[:, -1, ..., None], state.im, belongs[:, -1])


type Marks = tuple[Bool[Array, "B T"], Bool[Array, "B T"]]


def _scan_value(
    length: int,
    x: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H K"],
    h: Float[Array, "B H K"],
    marks: Marks,
) -> Float[Array, "B T H K"]:
    """h after every token; `marks` are where documents start, and which tokens are not padding."""
    return _scan_forward(length, x, log_decay, h, marks)[0]


def _scan_forward(
    length: int, x: Array, log_decay: Array, h: Array, marks: Marks
) -> tuple[Array, tuple[Array, Array, Array, Marks, Array]]:
    factor, tokens = (_by_step(part, length) for part in _factors(x, log_decay, marks))
    entries = _entries(factor, tokens, h)
    out = _by_time(tile.walk(factor, tokens, entries), x.shape[1])
    return out, (x, log_decay, h, marks, entries)


def _scan_backward(
    length: int, saved: tuple[Array, Array, Array, Marks, Array], d_out: Array
) -> tuple[Array, Array, Array, None]:
    x, log_decay, h, marks, entries = saved
    starts, is_token = (mark[..., None, None] for mark in marks)
    factor, tokens = _factors(x, log_decay, marks)
    steps = _by_step(factor, length), _by_step(tokens, length)
    out = _by_time(tile.walk(*steps, entries), x.shape[1])
    before = jnp.concatenate([h[:, None], out[:, :-1]], axis=1)
    # From the last token to the first: the cotangent of h_t takes that of h_{t+1} times a_{t+1}.
    after = jnp.concatenate([factor[:, 1:], jnp.zeros_like(factor[:, :1])], axis=1)
    back = _by_step(after, length), _by_step(d_out, length)
    ends = _entries(*back, jnp.zeros_like(h), reverse=True)
    d_h = _by_time(tile.walk(*back, ends, reverse=True), x.shape[1])
    d_x = jnp.where(is_token, d_h, 0.0)
    d_log_decay = jnp.where(is_token & ~starts, d_h * before * factor, 0.0)
    d_start = factor[:, 0] * d_h[:, 0]
    return d_x.astype(x.dtype), d_log_decay.astype(log_decay.dtype), d_start, None


_scan = jax.custom_vjp(_scan_value, nondiff_argnums=(0,))
_scan.defvjp(_scan_forward, _scan_backward)


def _factors(x: Array, log_decay: Array, marks: Marks) -> tuple[Array, Array]:
    """The factor that multiplies h at each token, and the number that is added."""
    starts, is_token = (mark[..., None, None] for mark in marks)
    factor = jnp.where(is_token, jnp.exp(log_decay.astype(jnp.float32)), 1.0)
    return jnp.where(starts, 0.0, factor), jnp.where(is_token, x.astype(jnp.float32), 0.0)


def _by_step(x: Float[Array, "B T H K"], length: int) -> Float[Array, "C N B H K"]:
    """Chunks side by side; the first axis is the token inside the chunk."""
    batch, time, *channels = x.shape
    end = round_up(time, length) - time
    x = jnp.pad(x, ((0, 0), (0, end), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(batch, -1, length, *channels), (2, 1), (0, 1))


def _by_time(x: Float[Array, "C N B H K"], time: int) -> Float[Array, "B T H K"]:
    x = jnp.moveaxis(x, (0, 1), (2, 1))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :time]


def _entries(
    factor: Array, tokens: Array, h: Float[Array, "B H K"], *, reverse: bool = False
) -> Float[Array, "N B H K"]:
    """h at the entry of every chunk."""

    def advance(h: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        return chunk[0] * h + chunk[1], h

    whole = tile.summarize(factor, tokens, reverse=reverse)
    return lax.scan(advance, h, whole, reverse=reverse)[1]


def _modal(
    inputs: Inputs, segment_ids: Array | None, state: Modes, length: int
) -> tuple[Array, Modes]:
    x, old = inputs["x"], state
    time, places, ranked = x.shape[1], None, None
    belongs = segments.continued(segment_ids, state.segment, time)
    if segment_ids is None:
        # In a row that has no document yet, the first token starts one.
        is_new = (state.segment == 0)[:, None, None, None]
        old = state._replace(re=jnp.where(is_new, 0.0, old.re), im=jnp.where(is_new, 0.0, old.im))
        last = jnp.full((x.shape[0],), time - 1, jnp.int32)
    else:
        places = gaps.gaps(segment_ids, belongs, state.segment)
        x = segments.blank_padding(x, segment_ids)
        # Powers of lambda count places, so the tokens of a document must be adjacent.
        x, ids = lax.cond(
            places.any,
            lambda *arrays: tuple(gaps.together(array, places) for array in arrays),
            lambda *arrays: arrays,
            *(x, segment_ids),
        )
        belongs = segments.continued(ids, state.segment, time)
        ranked = _rank(ids, state.segment, length)
        index = jnp.arange(time, dtype=jnp.int32)
        last = jnp.max(jnp.where(ids != 0, index, -1), axis=1)
    flat = [inputs[name].astype(jnp.float32) for name in ("log_magnitude", "angle", "c_re", "c_im")]
    magnitude, angle, c_re, c_im = (part.reshape(-1, part.shape[-1]) for part in flat)
    table = tile.powers(jnp.arange(length + 1), length, magnitude, angle)
    maps = tile.maps(table[0], table[1], c_re, c_im)
    h = jnp.concatenate([_by_channel(old.re), _by_channel(old.im)], axis=-1)
    out, entries = _mix(length, maps, x, h, ranked)
    end = _leave(table, maps.write, (x, entries), segments.counted(belongs, state.segment), last)
    if places is not None:
        out = lax.cond(places.any, lambda out: gaps.back(out, places), lambda out: out, out)
    re, im = (_by_row(part, old.re) for part in jnp.split(end, 2, axis=-1))
    return out, Modes(re, im, belongs[:, -1])


def _by_channel(h: Float[Array, "B H K N"]) -> Float[Array, "D B N"]:
    return jnp.swapaxes(h.reshape(h.shape[0], -1, h.shape[3]), 0, 1)


def _by_row(h: Float[Array, "D B N"], like: Array) -> Float[Array, "B H K N"]:
    return jnp.swapaxes(h, 0, 1).reshape(like.shape)


def _rank(segment_ids: Array, entry: Array, length: int) -> Ranked:
    marks, _ = chunks.marks(segment_ids, entry, length, segment_ids.shape[1])
    assert marks is not None
    begun, left = marks.begun, marks.begun[..., -1]
    rank = (begun - begun[..., :1]).astype(jnp.int32)
    return Ranked(begun == 0.0, begun == left[..., None], left == 0.0, rank)


def _leave(
    table: tuple[Array, Array],
    write: Float[Array, "D C 2N"],
    seen: tuple[Float[Array, "B T H K"], Float[Array, "N D B 2N"]],
    document: Int[Array, "B T"],
    last: Int[Array, " B"],
) -> Float[Array, "D B 2N"]:
    """The state after the last token of each row, which may be anywhere in its chunk. Documents
    are counted, and the document of the state is number 0.
    """
    x, entries = seen
    length = write.shape[1]
    chunk = jnp.maximum(last, 0) // length
    count = last + 1 - chunk * length  # tokens in that chunk; 0 in a row of padding
    current = document[:, -1]
    # Moves the chunk's tokens to its end, so that the same powers of lambda apply.
    number = jnp.arange(length, dtype=jnp.int32) - length + count[:, None]
    place = jnp.maximum(number + (chunk * length)[:, None], 0)
    is_there = (number >= 0) & (gaps.take(document, place) == current[:, None])
    tokens = jnp.where(is_there[..., None, None], gaps.take(x, place).astype(jnp.float32), 0.0)
    tokens = tokens.reshape(*tokens.shape[:2], -1)
    written = jnp.einsum("bcd,dcm->dbm", tokens, write, precision=HIGHEST)
    before = jnp.take_along_axis(document, jnp.maximum(chunk * length - 1, 0)[:, None], axis=1)
    entered = jnp.where(chunk > 0, before[:, 0], 0)
    h = jnp.take_along_axis(entries, chunk[None, None, :, None], axis=0)[0]
    by = jnp.concatenate([part[count] for part in table], axis=-1)
    through = (entered == current)[:, None]
    return jnp.where(through, tile.jump(h, jnp.swapaxes(by, 0, 1)), 0.0) + written


def _mix_value(
    length: int,
    maps: Maps,
    x: Float[Array, "B T H K"],
    h: Float[Array, "D B 2N"],
    ranked: Ranked | None,
) -> tuple[Float[Array, "B T H K"], Float[Array, "N D B 2N"]]:
    """The output of every token, and the state at the entry of every chunk."""
    return _mix_forward(length, maps, x, h, ranked)[0]


def _mix_forward(
    length: int, maps: Maps, x: Array, h: Array, ranked: Ranked | None
) -> tuple[tuple[Array, Array], tuple[Maps, Array, Ranked | None, Array]]:
    tokens = _cut(x, length)
    if ranked is None:
        both = _times(tokens, jnp.concatenate([maps.toeplitz, maps.write], axis=-1))
        out, written = both[..., :length], both[..., length:]
    else:
        out = _within(tokens, maps.toeplitz, ranked)
        written = _times(jnp.where(ranked.last, tokens, 0.0), maps.write)

    def advance(h: Array, chunk: tuple[Array, Array | None]) -> tuple[Array, Array]:
        written, through = chunk
        return _pass(tile.jump(h, maps.jump[:, None]), through) + written, h

    through = None if ranked is None else ranked.through
    _, entries = lax.scan(advance, h, (jnp.swapaxes(written, 0, 1), through))
    read = _times(jnp.swapaxes(entries, 0, 1), maps.read)
    out = out + (read if ranked is None else jnp.where(ranked.entry, read, 0.0))
    return (_join(out, x), entries), (maps, x, ranked, entries)


def _mix_backward(
    length: int,
    saved: tuple[Maps, Array, Ranked | None, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Maps, Array, Array, None]:
    maps, x, ranked, entries = saved
    d_out, d_entries = _cut(cotangents[0], length), cotangents[1]
    tokens = _cut(x, length)
    asked = d_out if ranked is None else jnp.where(ranked.entry, d_out, 0.0)
    kept = tokens if ranked is None else jnp.where(ranked.last, tokens, 0.0)
    d_entries = d_entries + jnp.swapaxes(_times(asked, _transposed(maps.read)), 0, 1)
    by = tile.conjugate(maps.jump)[:, None]

    def retreat(
        carry: tuple[Array, Array], chunk: tuple[Array, Array, Array | None]
    ) -> tuple[tuple[Array, Array], Array]:
        d_h, d_jump = carry
        entered, d_entry, through = chunk
        passed = _pass(d_h, through)
        d_jump = d_jump + jnp.sum(tile.jump(passed, tile.conjugate(entered)), axis=1)
        return (d_entry + tile.jump(passed, by), d_jump), d_h

    through = None if ranked is None else ranked.through
    start = jnp.zeros_like(entries[0]), jnp.zeros_like(maps.jump)
    (d_h, d_jump), d_written = lax.scan(retreat, start, (entries, d_entries, through), reverse=True)
    d_written = jnp.swapaxes(d_written, 0, 1)
    d_tokens = _times(d_written, _transposed(maps.write))
    if ranked is None:
        d_tokens = d_tokens + _times(d_out, _transposed(maps.toeplitz))
        d_toeplitz = _products(tokens, d_out)
    else:
        d_tokens = jnp.where(ranked.last, d_tokens, 0.0)
        d_tokens = d_tokens + _within(d_out, _transposed(maps.toeplitz), ranked)
        d_toeplitz = _within_products(tokens, d_out, ranked)
    d_read = _products(jnp.swapaxes(entries, 0, 1), asked)
    d_maps = Maps(d_toeplitz, d_read, _products(kept, d_written), d_jump)
    return d_maps, _join(d_tokens, x).astype(x.dtype), d_h, None


_mix = jax.custom_vjp(_mix_value, nondiff_argnums=(0,))
_mix.defvjp(_mix_forward, _mix_backward)


def _cut(x: Float[Array, "B T H K"], length: int) -> Float[Array, "D N B C"]:
    batch, time, heads, width = x.shape
    end = round_up(time, length) - time
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, end), (0, 0), (0, 0)))
    return jnp.transpose(x.reshape(batch, -1, length, heads * width), (3, 1, 0, 2))


def _join(x: Float[Array, "D N B C"], like: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    batch, time, heads, width = like.shape
    return jnp.transpose(x, (2, 1, 3, 0)).reshape(batch, -1, heads, width)[:, :time]


def _pass(h: Float[Array, "D B 2N"], through: Bool[Array, " B"] | None) -> Array:
    return h if through is None else jnp.where(through[:, None], h, 0.0)


def _transposed(x: Float[Array, "D i j"]) -> Float[Array, "D j i"]:
    return jnp.swapaxes(x, 1, 2)


def _times(x: Float[Array, "D N B i"], matrix: Float[Array, "D i j"]) -> Float[Array, "D N B j"]:
    """Every chunk of every row times the matrix of its channel."""
    rows = x.reshape(x.shape[0], -1, x.shape[3])
    return jnp.matmul(rows, matrix, precision=HIGHEST).reshape(*x.shape[:3], -1)


def _products(x: Float[Array, "D N B i"], y: Float[Array, "D N B j"]) -> Float[Array, "D i j"]:
    """The cotangent of the matrix in `_times`."""
    return jnp.einsum("dnbi,dnbj->dij", x, y, precision=HIGHEST)


def _within(
    x: Float[Array, "D N B C"], matrix: Float[Array, "D C C"], ranked: Ranked
) -> Float[Array, "D N B C"]:
    """`_times`, applied to the tokens of each document separately."""

    def add(rank: Array, out: Array) -> Array:
        own = ranked.rank == rank
        return jnp.where(own, _times(jnp.where(own, x, 0.0), matrix), out)

    return lax.fori_loop(0, jnp.max(ranked.rank) + 1, add, jnp.zeros_like(x))


def _within_products(
    x: Float[Array, "D N B C"], y: Float[Array, "D N B C"], ranked: Ranked
) -> Float[Array, "D C C"]:
    """`_products`, where each token is paired only with tokens of its own document."""

    def add(rank: Array, total: Array) -> Array:
        own = ranked.rank == rank
        return total + _products(jnp.where(own, x, 0.0), jnp.where(own, y, 0.0))

    zeros = jnp.zeros((x.shape[0], x.shape[3], y.shape[3]), jnp.float32)
    return lax.fori_loop(0, jnp.max(ranked.rank) + 1, add, zeros)
