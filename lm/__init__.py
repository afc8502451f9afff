"""Training of language models. `lm.load(workdir)` is where a notebook starts.

>>> import lm
>>> loaded = lm.load("runs/quickstart")  # doctest: +SKIP
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lm.checkpoint import Loaded

__all__ = ["load"]


def load(workdir: str | os.PathLike[str]) -> Loaded:
    """The newest checkpoint of a run, or the checkpoint folder given: model, params, tokenizer,
    config.

    Raises:
      UserError: nothing there, or damaged.
    """
    from lm import checkpoint  # here, since it imports jax

    return checkpoint.load(workdir)
