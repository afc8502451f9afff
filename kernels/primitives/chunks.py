"""Recurrences cut into chunks of C tokens, and the masks for documents inside a chunk.

Arrays `[B, T, H, ...]` become `[N, B, H, C, ...]`, with zeros after the last token. A document
that starts inside a chunk must not read the state carried into the chunk, nor earlier tokens. A
document that ends inside a chunk must not reach the carried state. Let `doc(i)` be the document of
token i, `entered` the document of the state at the chunk's entry, `left` that of its last token:

    o_i      = [doc(i) = entered] (what i reads of S_in) + sum_{j <= i, doc(j) = doc(i)} ...
    S_out    = [entered = left] (decayed S_in) + sum_{doc(j) = left} ...

Padding belongs to the document before it (`segments.continued`) and writes nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels import segments
from kernels.blocks import round_up
from kernels.contract import Case, Drawn, Extreme, Options, thinned
from kernels.primitives import square


class Marks(NamedTuple):
    """For each token: how many documents have begun in its chunk so far, and 1 (0 for padding).

    Both are float32, which TPU kernels can sum along lanes.
    """

    begun: Float[Array, "*batch C"]
    real: Float[Array, "*batch C"]


class Documents(NamedTuple):
    """Masks of a chunk. `entry`: token i is still in the document at the entry. `last`: token j is
    in the document at the end. `same`: i and j are in one document. `through`: the whole chunk is
    one document. `keep`: the token is not padding."""

    entry: Bool[Array, "*batch C 1"]
    last: Bool[Array, "*batch C 1"]
    same: Bool[Array, "*batch C C"]
    through: Bool[Array, "*batch 1 1"]
    keep: Bool[Array, "*batch C 1"]


def cut(x: Array, length: int) -> Array:
    """`[B, T, H, ...]` -> `[N, B, H, C, ...]`, with zeros after the last token."""
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


def marks(
    segment_ids: Int[Array, "B T"] | None, entry: Int[Array, " B"], length: int, time: int
) -> tuple[Marks | None, Int[Array, " B"]]:
    """Marks [N, B, C] (None where every row is one document without padding), and the last document
    of each row."""
    belongs = segments.continued(segment_ids, entry, time)
    if segment_ids is None:
        return None, belongs[:, -1]
    before = segments.previous(belongs, entry)

    def cut_row(x: Bool[Array, "B T"]) -> Float[Array, "N B C"]:
        wide = ((0, 0), (0, round_up(time, length) - time))
        return jnp.pad(x, wide).astype(jnp.float32).reshape(x.shape[0], -1, length).swapaxes(0, 1)

    begun = jnp.cumsum(cut_row(belongs != before), axis=-1)
    return Marks(begun, cut_row(segment_ids != 0)), belongs[:, -1]


def documents(rows: Marks | None) -> Documents | None:
    """The masks of a chunk, from marks of shape [..., 1, C]."""
    if rows is None:
        return None
    begun = square.to_column(rows.begun)
    left = jnp.max(rows.begun, axis=-1, keepdims=True)
    real = square.to_column(rows.real)
    return Documents(begun == 0.0, begun == left, begun == rows.begun, left == 0.0, real > 0.0)


def per_head(marks: Marks | None) -> Marks | None:
    """Marks [..., B, C] as rows [..., B, 1, 1, C], to go with arrays [..., B, H, C, K]."""
    return None if marks is None else Marks(*(x[..., None, None, :] for x in marks))


def dims(time: int, key: int, value: int, **others: int) -> dict[str, int]:
    """Dims of a small problem: two rows, three heads."""
    return {"B": 2, "T": time, "H": 3, "K": key, "V": value, **others}


def near(name: str, *values: float) -> Extreme:
    """One input within a hundredth of these values. The tokens take the values in turn (or the
    channels, for an input without time).
    """

    def change(drawn: Drawn) -> Drawn:
        shape = drawn[name].shape
        turns = np.resize(values, shape[1]).reshape(-1, *[1] * (len(shape) - 2))
        return {name: turns * (1.0 - 0.01 * np.random.default_rng(0).random(shape))}

    return Extreme(f"{name}{'and'.join(f'{x:g}' for x in values)}", change)


def every_case(settings: Sequence[Options], **others: int) -> tuple[Case, ...]:
    """The slow cases: these options with all lengths, documents and states, thinned."""
    return tuple(
        Case(dims(time, 17, 9, **others), options, documents, carried)
        for time, options, documents, carried in thinned(
            (1, 63, 64, 65, 257), settings, ("none", "packed", "padded"), (False, True)
        )
    )
