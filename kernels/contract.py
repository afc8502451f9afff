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

    `when` names the option, and its value or values, that ask for this input; two specs of one
    name are alternatives. `fill` computes it from the dims where the caller does not give it. A
    constant has no gradient.
    """

    name: str
    letters: str
    kind: Kind = "normal"
    when: tuple[str, object] | None = None  # a tuple of values is any of them
    fill: Callable[[Dims], Array] | None = None

    def is_needed(self, options: Options) -> bool:
        if self.when is None:
            return True
        name, wanted = self.when
        return options[name] in (wanted if isinstance(wanted, tuple) else (wanted,))


@dataclass(frozen=True)
class StateSpec:
    """What the op carries along time: letters of every field, and how it grows."""

    fields: tuple[tuple[str, str], ...]
    growth: Literal["constant", "linear"]


type Drawn = Mapping[str, np.ndarray]


class Extreme(NamedTuple):
    """Inputs in which all logits or gates are extreme: `change` gives those that it replaces. A
    form is held to the reference in float64, relative to a gradient however small.
    """

    name: str
    change: Callable[[Drawn], Drawn]
    # Forms of a library that lose their digits here, as the README of the op says.
    beyond: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Case:
    """One problem of the contract suite and of the benches.

    `documents` is none, packed (several per row) or padded (packed, with padding at the end).
    `carried` adds a state whose rows have different lengths, with rubbish in the empty slots.
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
        """What a test is called: T257-H4G2-K17V9-padded-carried-window=50."""
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
    """Arrays of a case."""

    inputs: dict[str, Array]
    segment_ids: Array | None
    state: Any


class Tolerance(NamedTuple):
    """Relative RMS error allowed between a form and the reference, and why."""

    value: float
    reason: str


type Run = Callable[[dict[str, Array], Options], Array]


class Property(NamedTuple):
    """A fact about the op: `check(run)` gives what it computes and what that must be.

    `run(inputs, options)` is the output of one form.
    """

    name: str
    check: Callable[[Run], tuple[Array, Array]]


class Cache(Protocol):
    """What a reference asks of a state of keys and values (`primitives.kv_cache` has the type)."""

    k: Array
    v: Array
    segment_ids: Array
    length: Array

    def _replace(self, **fields: Array) -> Self: ...


class Memory(Protocol):
    """What a reference asks of a state that is a matrix a head, and the document of each row."""

    s: Array
    segment: Array

    def _replace(self, **fields: Array) -> Self: ...


type Form = Callable[..., tuple[Array, Any]]


class Sent(NamedTuple):
    """Bytes that one rank sends in the forward pass of a call, and in its backward pass; `hops`:
    messages of both that wait for one another. A gather or scatter over R ranks is R - 1 of them,
    an exchange between all ranks one. `calls`: JAX's collectives of floats in both, by name.
    """

    forward: float
    backward: float
    hops: int
    calls: Mapping[str, int]


# Which tokens a rank holds, see `primitives.time_shards`.
type Layout = Literal["contiguous", "zigzag"]


@dataclass(frozen=True)
class Strategy:
    """One way to run an op whose time axis is split over R ranks (`primitives.time_shards`).

        out, state = run(local, inputs, segment_ids, state, shards, op=..., options=...)

    runs inside shard_map on the T/R tokens of a rank. `state` is the one before rank 0, whole on
    every rank, and so is the one returned; of linear growth it is None where none is carried, of
    constant growth it is always there. `local(inputs, segment_ids, state)` is a form of the op on
    one device: what came before the shard is given to it as the state that it continues.
    `sent(op, dims, options, itemsize, R)` and `unsupported(dims, options, R)`, a reason or None,
    take the dims of one rank, but T of the whole row. `layouts`: those of time that it takes.
    """

    name: Literal["all_to_all", "gather", "ring", "states", "scan", "halo"]
    run: Callable[..., tuple[Array, Any]]
    sent: Callable[["Op", Dims, Options, int, int], Sent]
    unsupported: Callable[[Dims, Options, int], str | None]
    layouts: tuple[Layout, ...]


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
    sequence: tuple[Strategy, ...]
    flops: Callable[[Dims, Options], float]
    bytes: Callable[[Dims, Options, int], float]
    cases: tuple[Case, ...]
    tolerances: Mapping[tuple[str, str], Tolerance]
    properties: tuple[Property, ...] = ()
    backward_flops: float = 2.0
    reference_vjp: Callable[..., dict[str, Array]] | None = None
    # Whether with these options what a token sees depends on how many places lie in between: then
    # padding may not part a document. Forms count it, a cache does not.
    counts_places: Callable[[Options], bool] = lambda options: False
    # Whether a token's output depends on itself and the tokens before it alone. An op that is not
    # causal takes whole rows: it has no steps, and its state cannot be continued.
    causal: bool | Callable[[Options], bool] = True

    def is_causal(self, options: Options) -> bool:
        """Whether it is with these options, all of which are given."""
        return self.causal if isinstance(self.causal, bool) else self.causal(options)

    def needed(self, options: Options) -> dict[str, InputSpec]:
        """The inputs that these options ask for, by name."""
        return {spec.name: spec for spec in self.inputs if spec.is_needed(options)}

    def form(self, name: str) -> Form:
        """The function of a form; its module is imported on first use."""
        return import_module(self.forms[name]).apply

    def default_blocks(self, name: str) -> Any:
        """The tiles of a form written for a device, where nobody has measured better ones."""
        return import_module(self.forms[name]).DEFAULT

    def candidate_blocks(self, name: str) -> tuple[Any, ...]:
        """The tiles of such a form that are worth a measurement (`launch.tune`)."""
        return import_module(self.forms[name]).CANDIDATES


def modules(package: str, *names: str) -> dict[str, str]:
    """The forms of an op: name -> module of its folder."""
    return {name: f"{package}.{name}" for name in names}


def strategies(package: str) -> tuple[Strategy, ...]:
    """How the time axis of an op can be split: `STRATEGIES` of its sequence.py. An op without that
    file has none, and a split T is refused.
    """
    name = f"{package}.sequence"
    return import_module(name).STRATEGIES if find_spec(name) else ()


def takes_all(dims: Dims, options: Options, ranks: int) -> None:
    """`unsupported` of a strategy that refuses nothing."""
    del dims, options, ranks


def everywhere(form: str, reason: str, **kernels: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """`prefer` of an op that has one form for every target; `kernels` names the forms written for
    "gpu" or "tpu", which are taken where `measured` says that they win.
    """

    def why(target: str) -> str:
        if target == "cpu":
            return reason
        if target not in kernels:
            return f"{reason}; no {target.upper()} kernel yet"
        return f"{reason}; {kernels[target]} is not known to win here, launch.tune measures"

    return {target: ((form, why(target)),) for target in ("cpu", "gpu", "tpu")}


def thinned(*factors: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """A third of the product of these settings, in which any two settings still meet.

    The indices of a combination add up to a multiple of three: any two leave a third factor, of
    three settings or more, to make the sum right.
    """
    for chosen in product(*(tuple(enumerate(factor)) for factor in factors)):
        if sum(index for index, _ in chosen) % 3 == 0:
            yield tuple(value for _, value in chosen)


def extremes(case: Case, *changes: Extreme) -> tuple[Case, ...]:
    """The case with each of these: problems that one compiled program answers."""
    return tuple(replace(case, extreme=change) for change in changes)


def sample(op: Op, case: Case, seed: int = 0) -> Problem:
    """Random arrays for a case, the same for the same seed."""
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
    """A state in the middle of a row: every number is random, rows end at different slots."""
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
