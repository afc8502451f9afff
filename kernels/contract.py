"""The contract of an op: plain values and pure functions, read by dispatch, launch and the tests.

    out, state = form(inputs, segment_ids, state, options=..., blocks=...)
    state, out_t = step(inputs_t, state, options=...)

Every op folder builds one `Op`; nothing registers itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, NamedTuple, Protocol, Self

from jaxtyping import Array, DTypeLike

type Options = Mapping[str, Any]
type Dims = Mapping[str, int]
type Kind = Literal["normal", "unit", "gate", "log_decay", "constant"]


@dataclass(frozen=True)
class InputSpec:
    """One array of an op.

    `when` names the option value that asks for this input; `fill` computes it from the dims where
    the caller does not give it. A constant has no gradient.
    """

    name: str
    letters: str
    kind: Kind = "normal"
    when: tuple[str, object] | None = None
    fill: Callable[[Dims], Array] | None = None

    def is_needed(self, options: Options) -> bool:
        return self.when is None or options[self.when[0]] == self.when[1]


@dataclass(frozen=True)
class StateSpec:
    """What the op carries along time: letters of every field, and how it grows."""

    fields: tuple[tuple[str, str], ...]
    growth: Literal["constant", "linear"]


@dataclass(frozen=True)
class Case:
    """One problem of the contract suite and of the benches.

    `documents` is none, packed (several per row) or padded (packed, with padding at the end).
    `gain` multiplies queries, to reach extreme logits.
    """

    name: str
    dims: Dims
    options: Options = field(default_factory=dict[str, Any])
    documents: Literal["none", "packed", "padded"] = "none"
    dtype: str = "float32"
    gain: float = 1.0
    tags: tuple[str, ...] = ("slow",)


class Tolerance(NamedTuple):
    """Relative RMS error allowed between a form and the reference, and why."""

    value: float
    reason: str


type Property = Callable[[Callable[..., Any]], None]


class Cache(Protocol):
    """What a reference asks of a state of keys and values (`primitives.kv_cache` has the type)."""

    k: Array
    v: Array
    segment_ids: Array
    length: Array

    def _replace(self, **fields: Array) -> Self: ...


type Form = Callable[..., tuple[Array, Any]]


@dataclass(frozen=True)
class Op:
    """All there is to know about one way to mix along time."""

    name: str
    inputs: tuple[InputSpec, ...]
    out: str
    options: Options
    forms: Mapping[str, str]
    unsupported: Callable[[str, Dims, DTypeLike, Options, str], str | None]
    prefer: Mapping[str, tuple[tuple[str, str], ...]]
    state: StateSpec
    init_state: Callable[..., Any]
    step: Callable[..., tuple[Any, Array]]
    sequence: str
    flops: Callable[[Dims, Options], float]
    bytes: Callable[[Dims, Options, int], float]
    cases: tuple[Case, ...]
    tolerances: Mapping[tuple[str, str], Tolerance]
    properties: tuple[Property, ...] = ()
    backward_flops: float = 2.0
    reference_vjp: Callable[..., dict[str, Array]] | None = None

    def form(self, name: str) -> Form:
        """The function of a form; its module is imported on first use."""
        return import_module(self.forms[name]).apply
