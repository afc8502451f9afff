"""The contract of an op: plain values and pure functions, read by dispatch, launch and the tests.

    out, state = form(inputs, segment_ids, state, options=..., blocks=...)
    state, out_t = step(inputs_t, state, options=...)

Every op folder builds one `Op`; nothing registers itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any, Literal, NamedTuple, Protocol, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike

type Options = Mapping[str, Any]
type Dims = Mapping[str, int]
type Kind = Literal["normal", "unit", "gate", "log_decay", "constant"]


@dataclass(frozen=True)
class InputSpec:
    """One array of an op.

    `when` is (option, value or tuple of values): the op takes this input only where the option has
    such a value. Two specs of the same name are alternatives. `fill` computes the input from the
    dims where the caller does not pass it. An input of kind "constant" has no gradient.
    """

    name: str
    letters: str
    kind: Kind = "normal"
    when: tuple[str, object] | None = None  # a tuple of values means any of them
    fill: Callable[[Dims], Array] | None = None

    def is_needed(self, options: Options) -> bool:
        if self.when is None:
            return True
        name, wanted = self.when
        return options[name] in (wanted if isinstance(wanted, tuple) else (wanted,))


@dataclass(frozen=True)
class StateSpec:
    """What the op carries along time: (name, letters) of every field, and how the state grows."""

    fields: tuple[tuple[str, str], ...]
    growth: Literal["constant", "linear"]


type Drawn = Mapping[str, np.ndarray]


class Extreme(NamedTuple):
    """Inputs in which all logits or gates are extreme: `change` returns the arrays it replaces. The
    suite compares a form with the reference in float64, relative to each gradient's own size.
    """

    name: str
    change: Callable[[Drawn], Drawn]
    # Forms of a library that lose their digits on these inputs; the README of the op says why.
    beyond: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Case:
    """One problem of the contract suite and of the benchmarks.

    `documents` is none, packed (several per row) or padded (packed, with padding at the end).
    `carried` adds a state whose rows have different lengths, with garbage in the empty slots.
    `gain` multiplies the first input, to reach extreme logits. Tags: fast, slow, bench.
    """

    dims: Dims
    options: Options = field(default_factory=dict[str, Any])
    documents: Literal["none", "packed", "padded"] = "none"
    carried: bool = False
    dtype: str = "float32"
    gain: float = 1.0
    extreme: Extreme | None = None
    tag: Literal["fast", "slow", "bench"] = "slow"

    @property
    def name(self) -> str:
        """The name of the test: T257-H4G2-K17V9-padded-carried-window=50."""
        dims = self.dims
        groups = f"G{dims['G']}" if "G" in dims else ""
        parts = [f"T{dims['T']}", f"H{dims['H']}{groups}"]
        parts += ["".join(f"{letter}{dims[letter]}" for letter in "KVNW" if letter in dims)]
        parts += [self.documents] if self.documents != "none" else []
        parts += ["carried"] if self.carried else []
        parts += [f"gain{self.gain:g}"] if self.gain != 1.0 else []
        parts += [self.extreme.name] if self.extreme else []
        parts += [f"{name}={value}" for name, value in self.options.items()]
        return "-".join([*parts, self.dtype])


class Problem(NamedTuple):
    """The arrays of a case."""

    inputs: dict[str, Array]
    segment_ids: Array | None
    state: Any


class Tolerance(NamedTuple):
    """Relative RMS error allowed between a form and the reference, and why."""

    value: float
    reason: str


type Run = Callable[[dict[str, Array], Options], Array]


class Property(NamedTuple):
    """A fact about the op: `check(run)` returns a computed array and the array it must equal.

    `run(inputs, options)` returns the output of one form.
    """

    name: str
    check: Callable[[Run], tuple[Array, Array]]


class Cache(Protocol):
    """What a reference reads from a state of keys and values (the type is in
    `primitives.kv_cache`)."""

    k: Array
    v: Array
    segment_ids: Array
    length: Array

    def _replace(self, **fields: Array) -> Self: ...


class Memory(Protocol):
    """What a reference reads from a state of one matrix per head, and the document of each row."""

    s: Array
    segment: Array

    def _replace(self, **fields: Array) -> Self: ...


type Form = Callable[..., tuple[Array, Any]]


class Sent(NamedTuple):
    """What one rank sends: bytes in the forward pass of a call, and bytes in its backward pass.

    `hops` counts the messages of both passes that wait for one another: a gather or scatter over R
    ranks is R - 1 of them, an all-to-all is one. `calls` counts JAX's collectives on floats in both
    passes, by name.
    """

    forward: float
    backward: float
    hops: int
    calls: Mapping[str, int]


# Which tokens each rank holds; see `primitives.time_shards`.
type Layout = Literal["contiguous", "zigzag"]


@dataclass(frozen=True)
class Strategy:
    """One way to run an op whose time axis is split over R ranks (`primitives.time_shards`).

        out, state = run(local, inputs, segment_ids, state, shards, op=..., options=...)

    `run` is called inside shard_map with the T/R tokens of a rank. The `state` it is given is the
    state before rank 0; the state it returns is the one after the last rank. Both are whole on
    every rank. Where none is carried, a state of linear growth is None and a state of constant
    growth is an empty one. `local(inputs, segment_ids, state)` is a form of the op on one device;
    the tokens before the shard reach it as the state that it continues.

    `sent(op, dims, options, itemsize, R)` and `unsupported(dims, options, R)`, which returns a
    reason or None, take the dims of one rank, except T, which is that of the whole row. `layouts`
    are the layouts of time that the strategy supports.
    """

    name: Literal["all_to_all", "gather", "ring", "states", "scan", "halo"]
    run: Callable[..., tuple[Array, Any]]
    sent: Callable[["Op", Dims, Options, int, int], Sent]
    unsupported: Callable[[Dims, Options, int], str | None]
    layouts: tuple[Layout, ...]


@dataclass(frozen=True)
class Op:
    """Everything the project knows about one way to mix along time."""

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
    sequence: tuple[Strategy, ...]
    flops: Callable[[Dims, Options], float]
    bytes: Callable[[Dims, Options, int], float]
    cases: tuple[Case, ...]
    tolerances: Mapping[tuple[str, str], Tolerance]
    properties: tuple[Property, ...] = ()
    backward_flops: float = 2.0
    reference_vjp: Callable[..., dict[str, Array]] | None = None
    # Whether, with these options, what a token sees depends on the number of places in between.
    # Then padding may not split a document: forms count such padding, a cache does not.
    counts_places: Callable[[Options], bool] = lambda options: False
    # Whether a token's output depends only on itself and the tokens before it. An op that is not
    # causal takes whole rows: it has no steps, and its state cannot be continued.
    causal: bool | Callable[[Options], bool] = True
    # The state as a loop of steps reads it fastest. `step` takes and returns this one too.
    for_steps: Callable[[Any], Any] = lambda state: state

    def is_causal(self, options: Options) -> bool:
        """Whether the op is causal with these options; all options must be given."""
        return self.causal if isinstance(self.causal, bool) else self.causal(options)

    def needed(self, options: Options) -> dict[str, InputSpec]:
        """The inputs that these options ask for, by name."""
        return {spec.name: spec for spec in self.inputs if spec.is_needed(options)}

    def form(self, name: str) -> Form:
        """The function of a form; its module is imported on first use."""
        return import_module(self.forms[name]).apply

    def default_blocks(self, name: str) -> Any:
        """The tiles of a form written for a device, used where nothing better was measured."""
        return import_module(self.forms[name]).DEFAULT

    def candidate_blocks(self, name: str) -> tuple[Any, ...]:
        """The tiles of such a form that are worth measuring (`espalier tune`)."""
        return import_module(self.forms[name]).CANDIDATES


def modules(package: str, *names: str) -> dict[str, str]:
    """The forms of an op: name -> module of its folder."""
    return {name: f"{package}.{name}" for name in names}


def strategies(package: str) -> tuple[Strategy, ...]:
    """The ways to split the time axis of an op: `STRATEGIES` of its sequence.py. An op without that
    file has none, and refuses a split T.
    """
    name = f"{package}.sequence"
    return import_module(name).STRATEGIES if find_spec(name) else ()


def takes_all(dims: Dims, options: Options, ranks: int) -> None:
    """`unsupported` of a strategy that refuses nothing."""
    del dims, options, ranks


def everywhere(form: str, reason: str, **kernels: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """`prefer` of an op that has one form for every target. `kernels` names the forms written for
    "gpu" or "tpu"; they are taken only where `measured` says that they win.
    """

    def why(target: str) -> str:
        if target == "cpu":
            return reason
        if target not in kernels:
            return f"{reason}; no {target.upper()} kernel yet"
        return f"{reason}; {kernels[target]} is not known to win here, espalier tune measures"

    return {target: ((form, why(target)),) for target in ("cpu", "gpu", "tpu")}


def thinned(*factors: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """A third of the product of these settings, in which any two settings still occur together.

    The indices of a combination must add up to a multiple of three. Whatever two of the settings
    are, a third factor with three or more settings can complete the sum.
    """
    for chosen in product(*(tuple(enumerate(factor)) for factor in factors)):
        if sum(index for index, _ in chosen) % 3 == 0:
            yield tuple(value for _, value in chosen)


def extremes(case: Case, *changes: Extreme) -> tuple[Case, ...]:
    """The case once for each change; one compiled program computes all of them."""
    return tuple(replace(case, extreme=change) for change in changes)


def sample(op: Op, case: Case, seed: int = 0) -> Problem:
    """Random arrays for a case; the same seed gives the same arrays."""
    random = np.random.default_rng(seed)
    dims = case.dims
    drawn: dict[str, np.ndarray] = {}
    for spec in op.needed({**op.options, **case.options}).values():
        if spec.fill is None:
            shape = [dims[letter] for letter in spec.letters.split()]
            value = _DRAW[spec.kind](random.standard_normal(shape))
            drawn[spec.name] = (case.gain if spec is op.inputs[0] else 1.0) * value
    if case.extreme is not None:
        drawn |= case.extreme.change(drawn)
    inputs = {name: jnp.asarray(value, case.dtype) for name, value in drawn.items()}
    first = 3 if case.carried else 1
    segment_ids = None
    if case.documents != "none":
        ids = first + np.sort(random.integers(0, 3, (dims["B"], dims["T"])), axis=1)
        if case.documents == "padded":
            real = random.integers(0, dims["T"] + 1, (dims["B"], 1))
            ids = np.where(np.arange(dims["T"]) < real, ids, 0)
        segment_ids = jnp.asarray(ids, jnp.int32)
    return Problem(inputs, segment_ids, _sample_state(op, case, random) if case.carried else None)


_DRAW: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "normal": lambda x: x,
    "unit": lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True),
    "gate": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "log_decay": lambda x: -np.log1p(np.exp(x)),
}


def _sample_state(op: Op, case: Case, random: np.random.Generator) -> Any:
    """A state in the middle of a row: every number is random, and rows end at different slots."""
    batch, time = case.dims["B"], case.dims["T"]
    capacity = time + 40
    empty = op.init_state(case.dims, case.dtype, batch, capacity)
    length = random.integers(0, 41, batch)
    slot = np.arange(capacity)
    ids = np.where(slot < length[:, None], 1 + (slot > 9) + (slot > 20), 0)
    known = {"length": length, "segment_ids": ids, "segment": random.integers(2, 4, batch)}
    values = [
        known[name] if name in known else random.standard_normal(like.shape)
        for (name, _), like in zip(op.state.fields, empty, strict=True)
    ]
    arrays = [jnp.asarray(x, like.dtype) for x, like in zip(values, empty, strict=True)]
    return type(empty)(*arrays)
