"""The public interface of `kernels`: ops by name, forms by name, and one call for all of them.

    names()                                     every op, found by listing the folders
    get(name)                                   its `Op`
    resolve(name, form, target=..., ...)        form "auto" -> a concrete form, with the reason
    split(name, strategy, ranks=..., ...)       the same for the strategy of a split time axis
    apply(name, inputs, form=..., ...)          output and state of T tokens
    init_state(name, ...), step(name, ...)      one token at a time
    flops(name, dims, options)                  forward FLOPs, for MFU and planning

Shapes use the letters of `letters.LEGEND`: q [B, T, H, K], k [B, T, G, K], v [B, T, G, V].
`segment_ids` int32 [B, T] marks packed documents (0 = padding, whose outputs are zeros). Any T >= 1
works: each form pads queries and keys to its own tiles.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Int

from kernels import measured, quarantine, segments, shard, spelling, strategies
from kernels.contract import Dims, InputSpec, Op, Options, Strategy
from kernels.letters import Inputs
from kernels.primitives import device
from kernels.primitives.time_shards import Shards
from kernels.shard import Placement, Rules
from kernels.strategies import Link, Way


class Resolved(NamedTuple):
    """A form that can run, and the reason why it was chosen."""

    form: str
    reason: str


@cache
def names() -> tuple[str, ...]:
    """Every op, found by listing the folders that hold a reference."""
    return tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/reference.py")))


def get(name: str) -> Op:
    """The op of that name; imported on first use."""
    spelling.check("op", name, names())
    return import_module(f"kernels.{name}").OP


def resolve(
    name: str,
    form: str,
    *,
    target: str,
    dims: Dims,
    dtype: DTypeLike,
    options: Options | None = None,
    device_kind: str = "",
) -> Resolved:
    """A concrete form for `target` ("cpu", "gpu", "tpu"), or ValueError with the reasons.

    "auto" first asks what is known about kernels on this device kind (`measured`).
    """
    op = get(name)
    spelling.check("target", target, tuple(op.prefer))
    bound = bind_options(op, options, dims)
    if form != "auto":
        spelling.check("form", form, (*op.forms, "auto"))
        reason = refusal(op, form, dims, dtype, bound, target)
        if reason is not None:
            raise ValueError(f"{name} cannot run as {form} on {target}: {reason}")
        return Resolved(form, "named by the user")
    refused: list[str] = []
    known = measured.table(device_kind)
    row = measured.find(known, name, None, dims, jnp.dtype(dtype).name, bound)
    first = ((row.form, measured.reason(known, row)),) if known and row and row.wins else ()
    for candidate, why in (*first, *op.prefer[target]):
        reason = refusal(op, candidate, dims, dtype, bound, target)
        if reason is None:
            return Resolved(candidate, "; ".join([why, *refused]))
        refused.append(f"not {candidate}: {reason}")
    raise ValueError(f"{name} has no form for {target}: {'; '.join(refused)}")


def wins(name: str, form: str) -> list[str]:
    """Where "auto" takes a form because of what is known about a device (`measured.wins`)."""
    return measured.wins(name, form)


def apply(
    name: str,
    inputs: Inputs,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    state: Any = None,
    form: str,
    options: Options | None = None,
    blocks: Any = None,
    placement: Placement | None = None,
) -> tuple[Array, Any]:
    """Output [B, T, H, V] and state of T tokens, computed by a concrete form.

    With `state` None the tokens are one whole sequence, as in training, and the returned state has
    capacity T. A given state is continued: its rows may have different lengths, and padding in
    `segment_ids` is not written to it. Without `segment_ids` all tokens continue the row's last
    document.

    In a packed row, inputs that are not finite affect only their own document; see `quarantine`.
    The tokens of a document must be contiguous: where an id comes again later, attention
    sees one document and a recurrence two. Padding inside a document is refused where the op counts
    places (softmax with a window, blocks or ALiBi: `Op.counts_places`), because forms would count
    it and a cache would not. Under jit ids have no values yet; there the caller must ensure this.

    A `placement` splits the call over the devices of a mesh (see `shard`).

    Raises:
      ValueError: unknown names, arrays that do not fit, or a form that cannot run this problem.
    """
    op = get(name)
    spelling.check("form", form, tuple(op.forms))
    dims = _dims(op, inputs, options, "T")
    bound = bind_options(op, options, dims)
    inputs = complete_inputs(op, inputs, bound, dims)
    _check_segments(segment_ids, dims, op, bound)
    _check_state(op, state, dims)
    if state is not None:
        _check_causal(op, bound, "continue a state")
    dtype = inputs[op.inputs[0].name].dtype
    mesh, rules, split = _place(op, placement, dims, bound, dtype)
    # The mesh may consist of devices that are not attached.
    placed = jax.devices()[0] if placement is None else placement.mesh.devices.flat[0]
    here = dims if split is None else {**dims, "T": dims["T"] // split[1].count}
    reason = refusal(op, form, here, dtype, bound, device.platform(placed))
    if reason is not None:
        raise ValueError(f"{name} cannot run as {form}: {reason}")
    if blocks is None and form in device.TARGETS:
        blocks = _blocks(op, form, here, dtype, bound, placed.device_kind)
    call = _Call(op, form, bound, blocks, split)
    if not rules:
        return call(inputs, segment_ids, state)
    return shard.over(op, call, bound, (mesh, rules), dims)(inputs, segment_ids, state)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A form, options and tiles, as a function of the arrays on one device. `split` is set where
    devices share rows and these arrays hold one rank's tokens.
    """

    op: Op
    form: str
    options: Options
    blocks: Any
    split: tuple[Strategy, Shards] | None

    def __call__(self, inputs: Inputs, segment_ids: Array | None, state: Any) -> tuple[Array, Any]:
        if segment_ids is None:
            return self._run(inputs, None, state)
        shards = None if self.split is None else self.split[1]
        specs = self.op.needed(self.options)
        clean, state, sick = quarantine.admit(self.op, specs, inputs, segment_ids, state, shards)
        if not self.op.is_causal(self.options):
            sick = quarantine.whole_documents(sick, segment_ids)
        return quarantine.release(self.op, *self._run(clean, segment_ids, state), sick)

    def _run(self, inputs: Inputs, segment_ids: Array | None, state: Any) -> tuple[Array, Any]:
        if self.split is None:
            return self._local(inputs, segment_ids, state)
        strategy, shards = self.split
        if state is None and self.op.state.growth == "constant":
            state = self._empty(inputs)
        given = inputs, segment_ids, state
        return strategy.run(self._local, *given, shards, op=self.op, options=self.options)

    def _local(self, inputs: Inputs, segment_ids: Array | None, state: Any) -> tuple[Array, Any]:
        # The tiled forms need no cache of keys and values where none is carried.
        if state is None and (self.form == "reference" or self.op.state.growth == "constant"):
            state = self._empty(inputs)
        run = self.op.form(self.form)
        if self.form == "reference":
            return run(inputs, segment_ids, state, options=self.options)
        return run(inputs, segment_ids, state, options=self.options, blocks=self.blocks)

    def _empty(self, inputs: Inputs) -> Any:
        dims = _dims(self.op, inputs, self.options, "T")
        dtype = inputs[self.op.inputs[0].name].dtype
        return self.op.init_state(dims, dtype, dims["B"], dims["T"])


def _place(
    op: Op, placement: Placement | None, dims: Dims, options: Options, dtype: DTypeLike
) -> tuple[Any, Rules, tuple[Strategy, Shards] | None]:
    """The checked mesh and rules at this place of the program, and how T is split (None: whole)."""
    if placement is None or placement.mesh.size == 1:
        return None, {}, None
    mesh, rules = shard.here(placement.mesh, placement.rules)
    shard.check(op, dims, placement, rules, mesh)
    strategies.check_name(op, placement.strategy)
    shards = shard.time_shards(rules, mesh, placement.layout)
    if shards is None:
        return mesh, rules, None
    problem = strategies.Problem(shard.of_rank(dims, rules, mesh), options, dtype, shards)
    chosen, _ = strategies.choose(op, placement.strategy, problem, strategies.LEAST_BYTES)
    return mesh, rules, (chosen, shards)


def split(
    name: str,
    strategy: str,
    *,
    dims: Dims,
    options: Options | None,
    dtype: DTypeLike,
    shards: Shards,
    link: Link,
) -> Way:
    """How a row whose time axis is split is computed; see `strategies.choose`."""
    op = get(name)
    problem = strategies.Problem(dims, bind_options(op, options, dims), dtype, shards)
    return strategies.choose(op, strategy, problem, link)[1]


def check_strategy(name: str, strategy: str) -> None:
    """Raises ValueError for a strategy that the op does not have."""
    strategies.check_name(get(name), strategy)


def init_state(name: str, *, dims: Dims, dtype: DTypeLike, batch: int, max_len: int) -> Any:
    """The state before the first token; `max_len` is the capacity of a state of linear growth."""
    return get(name).init_state(dims, dtype, batch, max_len)


def step(
    name: str, inputs: Inputs, state: Any, *, options: Options | None = None
) -> tuple[Any, Array]:
    """One token, which continues the row's current document; inputs without T (q [B, H, K], ...).

    Raises:
      ValueError: the op is not causal with these options.
    """
    op = get(name)
    dims = _dims(op, inputs, options, "")
    bound = bind_options(op, options, dims)
    _check_causal(op, bound, "take one token at a time")
    return op.step(state, complete_inputs(op, inputs, bound, dims), options=bound)


def is_causal(name: str, options: Options | None = None) -> bool:
    """Whether a token's output depends only on itself and the tokens before it."""
    op = get(name)
    return op.is_causal({**op.options, **(options or {})})


def flops(name: str, dims: Dims, options: Options | None = None) -> float:
    """FLOPs of the forward mathematics on [B, T] tokens, where each row is one document.

    A multiply and an add count as two, and only matrix products count. Attention counts only the
    visible pairs (not the half that a causal mask hides). The backward pass costs
    `Op.backward_flops` times as much; recomputation in a form does not count.
    """
    op = get(name)
    return op.flops(dims, bind_options(op, options, dims))


def refusal(
    op: Op, form: str, dims: Dims, dtype: DTypeLike, options: Options, target: str
) -> str | None:
    """Why this cannot run, or None. Checks that hold for every op come first, then the op's own."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"its inputs are {jnp.dtype(dtype).name}; set a floating dtype"
    if form != "reference" and jax.config.read("jax_enable_x64"):
        return "64-bit types are on; unset JAX_ENABLE_X64"
    if (reason := device.refusal(form, target)) is not None:
        return reason
    return op.unsupported(form, dims, dtype, options, target)


def _blocks(
    op: Op, form: str, dims: Dims, dtype: DTypeLike, options: Options, device_kind: str
) -> Any:
    """The tiles that were fastest on this kind of device, or else the form's default tiles."""
    known = measured.table(device_kind)
    row = measured.find(known, op.name, form, dims, jnp.dtype(dtype).name, options)
    default = op.default_blocks(form)
    return dataclasses.replace(default, **row.blocks) if row else default


def bind_options(op: Op, options: Options | None, dims: Dims) -> dict[str, Any]:
    """All options of the op, with defaults filled in; the default `scale` is K^-1/2.

    Raises:
      ValueError: an unknown option, or a size below 1.
    """
    for letter, size in dims.items():
        if size < 1:
            raise ValueError(f"{op.name}: {letter}={size} must be at least 1")
    for name in options or {}:
        spelling.check(f"option of {op.name}", name, tuple(op.options))
    bound = {**op.options, **(options or {})}
    if "scale" in bound and bound["scale"] is None:
        bound["scale"] = 1.0 / math.sqrt(dims["K"])
    return bound


def _letters(spec: InputSpec, time: str) -> list[str]:
    return [letter for letter in spec.letters.split() if letter != "T" or time]


def _dims(
    op: Op, inputs: Mapping[str, Array], options: Options | None, time: str
) -> dict[str, int]:
    """The sizes of all letters; raises ValueError where two inputs disagree."""
    _check_inputs(op, inputs)
    dims: dict[str, int] = {}
    for spec in op.needed({**op.options, **(options or {})}).values():
        if spec.name not in inputs:
            continue
        letters, shape = _letters(spec, time), inputs[spec.name].shape
        if len(letters) != len(shape):
            raise ValueError(
                f"{spec.name} has shape {shape}; {op.name} wants [{' '.join(letters)}]"
            )
        for letter, size in zip(letters, shape, strict=True):
            if dims.setdefault(letter, size) != size:
                raise ValueError(f"{spec.name} has {letter}={size}, another input {dims[letter]}")
    if "G" in dims and dims["H"] % dims["G"]:
        raise ValueError(f"H={dims['H']} must be a multiple of G={dims['G']}")
    return dims


def _check_inputs(op: Op, inputs: Mapping[str, Array]) -> None:
    kinds = {spec.name: spec.kind for spec in op.inputs}
    for name, x in inputs.items():
        spelling.check(f"input of {op.name}", name, tuple(kinds))
        if kinds[name] != "constant" and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{op.name}: {name} is {x.dtype}; set a floating dtype")


def complete_inputs(op: Op, inputs: Inputs, options: Options, dims: Dims) -> Inputs:
    """Exactly the inputs that the options need, with constants filled in, or ValueError."""
    complete: Inputs = {}
    needed = op.needed(options)
    for spec in op.inputs:
        if spec.name in inputs and spec.name not in needed:
            wanted = "=".join(str(part) for part in spec.when or ())
            raise ValueError(f"{op.name} takes the input {spec.name!r} only with {wanted}")
    for name, spec in needed.items():
        if name in inputs:
            complete[name] = inputs[name]
        elif spec.fill is not None:
            complete[name] = spec.fill(dims)
        else:
            raise ValueError(f"{op.name} with these options needs the input {name!r}")
    return complete


def _check_causal(op: Op, options: Options, what: str) -> None:
    if not op.is_causal(options):
        raise ValueError(
            f"{op.name} is not causal with these options and cannot {what}; call it on whole rows"
        )


def _check_segments(segment_ids: Any, dims: Dims, op: Op, options: Options) -> None:
    wanted = dims["B"], dims["T"]
    if segment_ids is None:
        return
    if segment_ids.shape != wanted or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids are {segment_ids.dtype} {segment_ids.shape}; give integers {wanted}"
        )
    is_known = isinstance(segment_ids, np.ndarray) or not (
        isinstance(segment_ids, jax.core.Tracer) or not segment_ids.is_fully_addressable
    )
    if not is_known or not op.counts_places(options):
        return
    if (place := segments.parted(np.asarray(segment_ids))) is not None:
        raise ValueError(
            f"segment_ids have padding inside a document (row {place[0]}, token {place[1]}), and "
            f"{op.name} counts places with these options; put padding after each document"
        )


def _check_state(op: Op, state: Any, dims: Dims) -> None:
    if state is None:
        return
    for (name, letters), array in zip(op.state.fields, state, strict=True):
        sizes = dict(zip(letters.split(), array.shape, strict=True))
        for letter, size in sizes.items():
            if letter in dims and dims[letter] != size:
                raise ValueError(f"state.{name} has {letter}={size}, the inputs {dims[letter]}")
        if sizes.get("S", dims["T"]) < dims["T"]:
            raise ValueError(f"state has room for S={sizes['S']} tokens, the call has {dims['T']}")
