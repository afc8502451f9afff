"""Recurrences cut into chunks of C tokens, and how packed documents cut them again.

Arrays `[B, T, H, ...]` become `[N, B, H, C, ...]`, zeros behind the last token. A document that
starts inside a chunk must not read what was carried into the chunk, nor tokens before it; a
document that ends inside must not reach the carried state. With `doc(i)` the document of token i of
a chunk, `entered` the one at its entry and `left` the one at its end:

    o_i      = [doc(i) = entered] (what i reads of S_in) + sum_{j <= i, doc(j) = doc(i)} ...
    S_out    = [entered = left] (decayed S_in) + sum_{doc(j) = left} ...

Padding belongs to the document before it (`segments.continued`) and writes nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kernels import segments
from kernels.blocks import round_up
from kernels.contract import Case, Options, thinned


class Documents(NamedTuple):
    """Masks of each chunk; `segment` is the document at the end of the last one."""

    entry: Bool[Array, "N B C"]
    last: Bool[Array, "N B C"]
    same: Bool[Array, "N B C C"]
    through: Bool[Array, "N B"]
    keep: Bool[Array, "N B C"]


def cut(x: Array, length: int) -> Array:
    """`[B, T, H, ...]` -> `[N, B, H, C, ...]`, with zeros behind the last token."""
    batch, time, heads = x.shape[:3]
    padded = round_up(time, length)
    widths = [(0, 0), (0, padded - time)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, widths) if padded > time else x
    x = x.reshape(batch, padded // length, length, heads, *x.shape[3:])
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)


def join(x: Array, time: int) -> Array:
    """`[N, B, H, C, ...]` -> `[B, T, H, ...]`, the inverse of `cut`."""
    x = jnp.moveaxis(jnp.moveaxis(x, 2, 3), 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :time]


def documents(
    segment_ids: Int[Array, "B T"] | None, entry: Int[Array, " B"], length: int, time: int
) -> tuple[Documents | None, Int[Array, " B"]]:
    """The masks, None where every row is one document without padding; and each row's last
    document."""
    belongs = segments.continued(segment_ids, entry, time)
    if segment_ids is None:
        return None, belongs[:, -1]
    wide = ((0, 0), (0, round_up(time, length) - time))
    doc = jnp.pad(belongs, wide, mode="edge").reshape(entry.shape[0], -1, length)
    keep = jnp.pad(segment_ids != 0, wide).reshape(doc.shape)
    doc, keep = doc.swapaxes(0, 1), keep.swapaxes(0, 1)
    left = doc[:, :, -1]
    entered = jnp.concatenate([entry[None], left[:-1]])
    masks = Documents(
        doc == entered[..., None],
        doc == left[..., None],
        doc[..., :, None] == doc[..., None, :],
        entered == left,
        keep,
    )
    return masks, belongs[:, -1]


def dims(time: int, key: int, value: int, **others: int) -> dict[str, int]:
    """Dims of a small problem: two rows, three heads."""
    return {"B": 2, "T": time, "H": 3, "K": key, "V": value, **others}


def every_case(settings: Sequence[Options], **others: int) -> tuple[Case, ...]:
    """The slow cases: these options with lengths, documents and states, thinned."""
    return tuple(
        Case(dims(time, 17, 9, **others), options, documents, carried)
        for time, options, documents, carried in thinned(
            (1, 63, 64, 65, 257), settings, ("none", "packed", "padded"), (False, True)
        )
    )
