"""Batch: what a training or evaluation step receives, all arrays `[B, T]`.

`segment_ids` number the documents of a row from 1; 0 is padding, which is only at the end of a row.
`positions` count from 0 inside a segment. `loss_weights` are 1 on real targets and 0 on padding.

Bits per byte of a document excludes its end of text, which has no bytes, and its first token, which
nothing predicts:

    bpb = sum(nll * weights) / (ln 2 * sum(num_bytes))
    num_bytes = bytes of the target, weights = loss_weights where num_bytes > 0
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    tokens: Any  # int32, inputs; never an end of text
    targets: Any  # int32, the next token of the same document
    segment_ids: Any  # int32
    positions: Any  # int32
    source_ids: Any  # int32, index into DataConfig.sources
    loss_weights: Any  # float32


class Share(NamedTuple):
    """The part of every batch that one process loads. The rows of a batch are cut into `num_parts`
    equal parts, and `parts` are the numbers of this process's parts, in ascending order.

    >>> Share((1, 3), 4).rows(8)
    [2, 3, 6, 7]
    """

    parts: tuple[int, ...]
    num_parts: int

    def rows(self, num_rows: int) -> list[int]:
        """The rows of the share in a batch of `num_rows`, a multiple of `num_parts`."""
        size = num_rows // self.num_parts
        return [part * size + i for part in self.parts for i in range(size)]


WHOLE = Share((0,), 1)


def byte_weights(batch: Batch, token_bytes: Any) -> tuple[Any, Any]:
    """(weights, num_bytes) of each target, as numpy or jax arrays like the inputs.

    >>> one = np.ones((1, 2), np.int32)
    >>> batch = Batch(one, np.array([[7, 9]]), one, one, one, np.ones((1, 2), np.float32))
    >>> token_bytes = np.array([1, 1, 1, 1, 1, 1, 1, 4, 1, 0])  # 9 is end of text
    >>> weights, num_bytes = byte_weights(batch, token_bytes)
    >>> weights.tolist(), num_bytes.tolist()
    ([[1.0, 0.0]], [[4.0, 0.0]])
    """
    target_bytes = token_bytes[batch.targets]
    return batch.loss_weights * (target_bytes > 0), batch.loss_weights * target_bytes


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows `[T]` -> one batch `[B, T]`."""
    return Batch(*(np.stack(field) for field in zip(*rows, strict=True)))
