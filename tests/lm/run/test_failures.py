"""Failures of the disk are told in one line; those of other processes are not the disk's."""

from __future__ import annotations

import jax
import pytest

from lm.config import UserError
from lm.parallel import watch
from lm.run import failures
from lm.run.failures import RaisedAs

GLOO = "UNKNOWN: Gloo AllGather failed: Connection reset by peer"


def wrapped(cause: Exception) -> None:
    """As Orbax raises what a thread of its own found."""
    raise ValueError("while saving") from cause


KINDS = jax.errors.JaxRuntimeError(GLOO), TimeoutError("not all came"), ValueError(GLOO)


@pytest.mark.parametrize("cause", KINDS, ids=lambda error: type(error).__name__)
def test_a_process_that_is_gone_is_no_mistake(
    cause: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends those who wait for it with the status of a loss (lm/parallel/watch.py)."""
    monkeypatch.setattr(failures, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(watch, "count", lambda: 2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="while saving"), RaisedAs(UserError):
        wrapped(cause)
    with pytest.raises(UserError, match="No space"), RaisedAs(UserError):
        wrapped(OSError("No space left on device"))
    monkeypatch.setattr(watch, "count", lambda: 1)
    with pytest.raises(UserError, match=str(cause)), RaisedAs(UserError):
        wrapped(cause)
