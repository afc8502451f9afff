"""Where kernels written for a device run: on that device, or interpreted anywhere, as in tests.

    pallas_tpu     on a TPU; elsewhere inside `interpreted()`, where Pallas interprets kernels
    triton_gpu     on an NVIDIA GPU; elsewhere in a process started with TRITON_INTERPRET=1, where
                   Triton itself interprets kernels with numpy

Nothing is interpreted unless that is requested, because it takes thousands of times as long.
"""

import importlib.util
import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

TARGETS = {"pallas_tpu": "tpu", "triton_gpu": "gpu"}  # forms that are written for one target

_INTERPRETER: ContextVar[Any] = ContextVar("interpreter", default=False)


def refusal(form: str, target: str) -> str | None:
    """Why no kernel of this form runs on `target` ("cpu", "gpu", "tpu"), or None."""
    if form not in TARGETS:
        return None
    if form == "triton_gpu" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; install the extra gpu"
    if target == TARGETS[form] or (target == "cpu" and _is_interpreted(form)):
        return None
    return f"it is written for {TARGETS[form]}; set form to auto"


def platform(device: Any) -> str:
    """The target of a JAX device, attached or from a topology: "cpu", "gpu" or "tpu"."""
    name = str(device.platform)
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


@contextmanager
def interpreted(how: Any = True) -> Generator[None]:
    """Pallas kernels traced inside are interpreted. `how` may be a `pltpu.InterpretParams`, which
    also simulates a TPU's memories and is far slower still.
    """
    token = _INTERPRETER.set(how)
    try:
        yield
    finally:
        _INTERPRETER.reset(token)


def interpreter() -> Any:
    """The value of `pallas_call`'s argument `interpret`."""
    return _INTERPRETER.get()


def _is_interpreted(form: str) -> bool:
    if form == "pallas_tpu":
        return bool(_INTERPRETER.get())
    return os.environ.get("TRITON_INTERPRET") == "1"
