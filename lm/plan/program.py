"""The step compiled for the target: its memory and collectives, or why the compiler refuses it."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax

from lm.build import Build
from lm.plan import memory, traffic
from lm.plan.traffic import Flow

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Bytes on one device as the compiler reports them (`memory_analysis`). `state` is updated in
    place; `temporaries` are everything else but the batch. `refusal` is the compiler's message
    where it makes no program; for one that does not fit, `total` is known if the message says it.
    `substituted` names the parts of the step that could not be compiled as they would run.
    """

    seconds: float
    state: int | None
    batch: int | None
    temporaries: int | None
    code: int | None
    host: int | None
    total: int | None
    flows: tuple[Flow, ...]
    refusal: str
    substituted: str

    @property
    def is_unsupported(self) -> bool:
        """Refused for a reason other than its size: a missing feature or a compiler fault."""
        return bool(self.refusal) and not is_out_of_memory(self.refusal)


def create(built: Build) -> Program:
    """Lowers and compiles the real step; an error of the compiler becomes the refusal."""
    began = time.monotonic()
    try:
        executable: Any = built.lowered().compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        message = str(error) or type(error).__name__
        return _refused(built, message, time.monotonic() - began)
    account = executable.memory_analysis()
    alias = account.alias_size_in_bytes
    # The outputs that are not the state are metrics, which have hardly any size.
    rest = account.argument_size_in_bytes - alias
    temporaries = account.temp_size_in_bytes + account.output_size_in_bytes - alias
    code = account.generated_code_size_in_bytes
    return Program(
        seconds=time.monotonic() - began,
        state=alias,
        batch=rest,
        temporaries=temporaries,
        code=code,
        host=account.host_argument_size_in_bytes + account.host_temp_size_in_bytes,
        total=alias + rest + temporaries + code,
        flows=tuple(traffic.compiled(executable.as_text(), dict(built.mesh.shape))),
        refusal="",
        substituted=_substituted(built),
    )


def _substituted(built: Build) -> str:
    is_placed = any(x.sharding.memory_kind for x in jax.tree.leaves(built.abstract_state.opt_state))
    if built.config.optimizer.memory != memory.HOST or is_placed:
        return ""
    return "this compiler has no host memory: the moments are counted in that of the device"


def _refused(built: Build, message: str, seconds: float) -> Program:
    total = needed_bytes(message) if is_out_of_memory(message) else None
    if total is not None and "temporaries" in message:  # the message leaves out the arguments
        total += memory.shard_bytes(built.abstract_state)
    return Program(
        seconds=seconds,
        state=None,
        batch=None,
        temporaries=None,
        code=None,
        host=None,
        total=total,
        flows=(),
        refusal=" ".join(message.split()),
        substituted=_substituted(built),
    )


def is_out_of_memory(message: str) -> bool:
    return "RESOURCE_EXHAUSTED" in message or "CompileTimeHbmOom" in message


def needed_bytes(message: str) -> int | None:
    """What a compiler or an allocator says it would need; None if the message does not say.

    >>> needed_bytes("memory required for HLO temporaries (18.02G) exceeds available HBM (15.75G)")
    19348827668
    """
    patterns = (
        r"\(([\d.]+)([KMGT]?)i?B?\) exceeds available",
        r"[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
        r"([\d.]+)([KMGT]) exceeds [\d.]+[KMGT]",
        r"trying to allocate ([\d.]+)\s?([KMGT]?)i?[Bb]",
    )
    for pattern in patterns:
        if found := re.search(pattern, message):
            return int(float(found[1]) * UNITS[found[2]])
    return None
