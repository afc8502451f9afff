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
    """The newest checkpoint of a run, or the checkpoint folder given: model, params, tokenizer,
    config. `layers`: options of layer labels that differ from the run's, {"softmax": {"window":
    512}}. `mesh`: how all devices of this machine share the work, {"sequence": 4}; one device has
    all of it unless set.

    Raises:
      UserError: nothing there, or damaged; options that the model has not, or that have parameters.
    """
    from lm.run import checkpoint  # here, since it imports jax

    return checkpoint.load(workdir, layers, mesh)
