"""The cross-entropy of every next token, weighted by `batch.loss_weights`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from lm.data.batch import Batch
from lm.objectives import Forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    def problem(self) -> str | None:
        return None

    def __call__(self, forward: Forward, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden, head = forward.hidden(params, batch)
        return forward.loss(hidden, head, batch.targets, batch.loss_weights)
