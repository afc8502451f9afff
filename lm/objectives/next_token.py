"""The cross-entropy of every next token, weighted by `batch.loss_weights`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from lm.data.batch import Batch
from lm.objectives import Forward, Found


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    is_causal: ClassVar[bool] = True

    def problem(self) -> str | None:
        return None

    def __call__(self, forward: Forward, params: Any, batch: Batch) -> Found:
        hidden = forward.hidden(params, batch)
        targets, weights = batch.targets, batch.loss_weights
        return Found(*forward.loss(hidden.states, hidden.head, targets, weights), hidden.losses)
