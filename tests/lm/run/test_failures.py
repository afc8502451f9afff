"""A failure of the disk is an error of one line; the loss of a process is not a disk failure."""

from __future__ import annotations

import jax
import pytest

from lm.config import UserError
from lm.parallel import watch
from lm.run import failures
from lm.run.failures import RaisedAs

GLOO = "UNKNOWN: Gloo AllGather failed: Connection reset by peer"


def wrapped(cause: Exception) -> None:
    """Raises as Orbax does, with the error of one of its threads as the cause."""
    raise ValueError("while saving") from cause


KINDS = jax.errors.JaxRuntimeError(GLOO), TimeoutError("not all came"), ValueError(GLOO)


@pytest.mark.parametrize("cause", KINDS, ids=lambda error: type(error).__name__)
def test_a_lost_process_is_not_a_user_error(
    cause: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that wait for it end with the status of a lost process (lm/parallel/watch.py)."""
    monkeypatch.setattr(failures, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(watch, "count", lambda: 2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="while saving"), RaisedAs(UserError):
        wrapped(cause)
    with pytest.raises(UserError, match="No space"), RaisedAs(UserError):
        wrapped(OSError("No space left on device"))
    monkeypatch.setattr(watch, "count", lambda: 1)
    with pytest.raises(UserError, match=str(cause)), RaisedAs(UserError):
        wrapped(cause)
