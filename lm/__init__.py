"""Training of language models. `lm.load(workdir)` is where a notebook starts.

>>> import lm
>>> loaded = lm.load("runs/quickstart")  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm.run.checkpoint import Loaded

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def load(
    workdir: str | os.PathLike[str],
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    mesh: Mapping[str, Any] | None = None,
) -> Loaded:
    """Loads the newest checkpoint of a run, or the checkpoint folder given: model, params,
    tokenizer and config. `layers` changes options of layer labels: {"softmax": {"window": 512}}.
    `mesh`: how all devices of this machine share the work, such as {"sequence": 4}; without it, one
    device does all the work.

    Raises:
      UserError: there is no checkpoint, or it is damaged; an option is unknown or has parameters.
    """
    from lm.run import checkpoint  # here, since it imports jax

    return checkpoint.load(workdir, layers, mesh)
