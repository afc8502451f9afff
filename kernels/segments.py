"""Packed documents: what `segment_ids` mean, defined once for every op.

`segment_ids` is int32 `[B, T]`: 0 is padding, and documents count up from 1. A slot is an index
along the row (of the batch, or of the cache). Token i sees key j when j is not in the future and
both belong to the same document:

    visible(i, j) = [0 <= i - j < window] and segment_i = segment_j != 0

A strict op excludes the token itself (0 < i - j).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int


def visible(
    q_slot: Int[Array, "*q"],
    kv_slot: Int[Array, "*kv"],
    q_segment: Int[Array, "*q"] | None = None,
    kv_segment: Int[Array, "*kv"] | None = None,
    *,
    strict: bool = False,
    window: int = 0,
) -> Bool[Array, "*qkv"]:
    """The mask over broadcast slots; `window` counts the token itself, 0 means no window."""
    distance = q_slot - kv_slot
    mask = distance >= int(strict)
    if window:
        mask &= distance < window
    if q_segment is not None and kv_segment is not None:
        mask &= (q_segment == kv_segment) & (kv_segment != 0)
    return mask


def positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of every token inside its document, from 0; 0 on padding."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return jnp.where(segment_ids != 0, index - latest(resets(segment_ids)), 0)


def latest(marked: Bool[Array, "B T *h"]) -> Int[Array, "B T *h"]:
    """The index of the last marked token at or before each token; -1 where there is none."""
    index = jnp.arange(marked.shape[1], dtype=jnp.int32).reshape(-1, *(1,) * (marked.ndim - 2))
    # Not jnp.maximum.accumulate: that is a loop of T steps, with several launches each on a GPU.
    return lax.cummax(jnp.where(marked, index, -1), axis=1)


def resets(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True where a document (or a run of padding) starts."""
    first = jnp.ones_like(segment_ids[:, :1], dtype=bool)
    return jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)


def continued(
    segment_ids: Int[Array, "B T"] | None, entry: Int[Array, " B"], time: int
) -> Int[Array, "B T"]:
    """The document of every token. Padding belongs to the document before it, and padding before
    the first token to `entry`.

    A recurrence restarts exactly where this changes. Without ids all `time` tokens continue
    `entry`, or document 1 in a row that has none yet.
    """
    if segment_ids is None:
        return jnp.broadcast_to(jnp.maximum(entry, 1)[:, None], (entry.shape[0], time))
    newest = latest(segment_ids != 0)
    known = jnp.take_along_axis(segment_ids, jnp.maximum(newest, 0), axis=1)
    return jnp.where(newest >= 0, known, entry[:, None])


def parted(segment_ids: np.ndarray) -> tuple[int, int] | None:
    """Row and index of the first padding in [B, T] that lies between tokens of one document."""
    index = np.arange(segment_ids.shape[1])
    is_token = segment_ids != 0
    last = np.maximum.accumulate(np.where(is_token, index, 0), axis=1)
    coming = np.where(is_token, index, len(index) - 1)[:, ::-1]
    coming = np.minimum.accumulate(coming, axis=1)[:, ::-1]
    before, after = (np.take_along_axis(segment_ids, at, axis=1) for at in (last, coming))
    found = np.argwhere(~is_token & (before == after) & (before != 0))
    return (int(found[0, 0]), int(found[0, 1])) if len(found) else None


def previous(belongs: Int[Array, "B T"], entry: Int[Array, " B"]) -> Int[Array, "B T"]:
    """The document of the token before each token; for the first token that is `entry`."""
    return jnp.concatenate([entry[:, None], belongs[:, :-1]], axis=1)


def counted(belongs: Int[Array, "B T"], entry: Int[Array, " B"]) -> Int[Array, "B T"]:
    """How many documents have begun in a row up to each token; the document of `entry` is number 0.
    An id that comes again counts as another document. `belongs` is the result of `continued`.
    """
    return jnp.cumsum(belongs != previous(belongs, entry), axis=1, dtype=jnp.int32)


def slots(segment_ids: Int[Array, "B T"], length: Int[Array, " B"]) -> Int[Array, "B T"]:
    """The slot of every token if all tokens except padding are appended after `length`."""
    return length[:, None] + jnp.cumsum(segment_ids != 0, axis=1, dtype=jnp.int32) - 1


def count_pairs(time: int, *, strict: bool = False, window: int = 0) -> int:
    """How many (query, key) pairs one document of `time` tokens has."""
    seen = min(window, time) if window else time
    triangle = seen * (seen + 1) // 2 + (time - seen) * seen
    return triangle - time if strict else triangle


def blank_padding(
    out: Array,
    segment_ids: Int[Array, "B T"] | None,
) -> Array:
    """Outputs `[B, T, ...]` with zeros on padding."""
    return out if segment_ids is None else put(0.0, segment_ids == 0, out)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def put(value: float, mask: Bool[Array, "..."], x: Array) -> Array:
    """x, with `value` where the mask over its leading dimensions is true.

    The backward pass keeps only this mask. A differentiated `jnp.where` keeps a mask as large as x
    and an array of the values: in bfloat16 1.5 times the memory of x, for every layer of a scan.
    """
    wide = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return jnp.where(wide, jnp.asarray(value, x.dtype), x)


put.defvjp(
    lambda value, mask, x: (put(value, mask, x), mask),
    lambda _, mask, cotangent: (None, put(0.0, mask, cotangent)),
)
