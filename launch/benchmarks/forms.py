"""The cost of a form of an op on a device: measured if the device is here, else modelled.

    modelled seconds   max(FLOPs of the op / peak, bytes / HBM bandwidth), bytes = arguments +
                       outputs + twice the temporaries, by the target's compiler
    peak bytes         arguments + outputs + temporaries, by the same compiler

The backward pass counts `Op.backward_flops` times the forward FLOPs. The model does not know how
well a kernel uses the hardware units: it is a lower bound for kernels that move these bytes.

Kernels are timed on problems with the same number of tokens (`timed`). The time of an op that stops
once a stick is used up depends on q and k, so such an op gets two problems of each size:

    random keys    q and k, and so the logits, are normal: a stick is used up within 130 keys
    shy keys       all logits are near -8: 32,768 keys take some 26 bits of a stick, and nothing
                   stops before 150 bits
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import contract, dispatch
from kernels.contract import Case, Options
from kernels.primitives import device
from kernels.shard import Placement
from launch.benchmarks import ops, timing
from lm.targets import Chip

BASELINE = "chunked"
WIDTHS = (64, 128)
LENGTHS = (2048, 8192)
DIMS = {"B": 2, "H": 8, "G": 8}
RULES = {"B": ("data",)}
PASSES = ("forward", "both")
RANDOM, SHY = "random keys", "shy keys"
SHY_LOGIT = -8.0
DRAWN = 2048
# What compilers raise: RuntimeError for XLA's errors and what cuDNN cannot do, ValueError for
# Triton's. The row of a result quotes the message.
REFUSALS = (RuntimeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the problems that kernels are timed on: every width at every length, always with
    `tokens` in a batch. The ceilings of the device are measured by a product of matrices with
    `square` rows and columns and by a copy of `copied` bytes.
    """

    widths: tuple[int, ...] = (64, 128)
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    tokens: int = 32768
    heads: int = 16
    square: int = 8192
    copied: int = 1 << 30


SIZES = Sizes()


class Timed(NamedTuple):
    """A problem, and its kind of keys ("" for an op whose time does not depend on them)."""

    op: str
    case: Case
    keys: str

    @property
    def title(self) -> str:
        """Such as "T2048/gated_linear decay=none-K64" or "T2048/stickbreaking K64 shy keys"."""
        settings = [f"{k}={v}" for k, v in self.case.options.items()]
        settings = "-".join([*settings, f"K{self.case.dims['K']}"])
        return f"T{self.case.dims['T']}/{' '.join(x for x in (self.op, settings, self.keys) if x)}"


class Chosen(NamedTuple):
    """The form to run on this device. If it is not the device's kernel, `refused` says why."""

    form: str
    refused: dict[str, str]


class Cost(NamedTuple):
    """Seconds and peak bytes of one pass."""

    seconds: float
    peak: int


class Costs(NamedTuple):
    """The cost of the forward pass, and of forward and backward together."""

    forward: Cost
    both: Cost


def problems(
    names: Sequence[str], widths: Sequence[int] = WIDTHS, lengths: Sequence[int] = LENGTHS
) -> Iterator[tuple[str, Case]]:
    """Every setting of the bench cases of these ops, in bfloat16."""
    for name in names:
        for options in settings(name):
            for width in widths:
                for time in lengths:
                    dims = {**DIMS, "T": time, "K": width, "V": width}
                    yield name, Case(dims, options, dtype="bfloat16")


def settings(name: str) -> list[Options]:
    """The different options of an op's bench cases."""
    op = dispatch.get(name)
    bench = [case.options for case in op.cases if case.tag == "bench"]
    # An option that only some of them set is written out for the others, with its default.
    usual = {key: op.options[key] for options in bench for key in options}
    found = [usual | dict(options) for options in bench]
    return list({str(options): options for options in found}.values())


def timed(asked: Iterable[tuple[str, Options]], sizes: Sizes) -> Iterator[Timed]:
    """Ops with options at every size, in bfloat16, with both kinds of keys where they matter."""
    for name, options in asked:
        for time in sizes.lengths:
            for width in sizes.widths:
                dims = {"B": max(1, sizes.tokens // time), "T": time, "K": width, "V": width}
                dims |= {"H": sizes.heads, "G": sizes.heads}
                for keys in kinds(name):
                    yield Timed(name, Case(dims, options, dtype="bfloat16"), keys)


def kinds(name: str) -> tuple[str, ...]:
    """The kinds of keys that an op is timed on."""
    return (RANDOM, SHY) if "tolerance" in dispatch.get(name).options else ("",)


def drawn(problem: Timed) -> tuple[Any, jax.Array]:
    """Inputs and a cotangent; for shy keys one channel of q and k is constant.

    At most 2,048 tokens of one row are drawn, and repeated: a host draws more slowly than a device
    computes.
    """
    op, case = dispatch.get(problem.op), problem.case
    options = dispatch.bind_options(op, case.options, case.dims)
    row = {**case.dims, "B": 1, "T": math.gcd(case.dims["T"], DRAWN)}
    inputs, cotangent = arrays(problem.op, dataclasses.replace(case, dims=row))

    def repeat(x: jax.Array, letters: str) -> jax.Array:
        return jnp.tile(x, [case.dims[x] // row[x] for x in letters.split()])

    inputs = {name: repeat(x, op.needed(options)[name].letters) for name, x in inputs.items()}
    if problem.keys == SHY:
        size = math.sqrt(-SHY_LOGIT / options["scale"])
        inputs |= {name: inputs[name].at[..., 0].set(x) for name, x in (("q", size), ("k", -size))}
    return inputs, repeat(cotangent, op.out)


def timer(problem: Timed, form: str, which: str, inputs: Any) -> timing.Timer:
    """A timer of one of `PASSES` on this device; `inputs` come from `drawn`.

    Raises:
      one of REFUSALS: the form does not compile or does not fit.
    """
    place = mesh(jax.devices()[0])
    run = timing.timer(passes(problem.op, problem.case, form, None, place)[which], *inputs)
    run(1)
    return run


def reason(error: Exception) -> str:
    """The first line of the message of one of REFUSALS."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def chosen(name: str, case: Case) -> Chosen:
    """The kernel of this device, even if `auto` would choose another form. If there is none, or it
    refuses the problem, the form that `auto` chooses.
    """
    target = jax.default_backend()
    form = kernel(name, target)
    if form is None:
        return Chosen(ops.resolve(name, case), {})
    reason = refusal(name, case, form, target)
    return Chosen(form, {}) if reason is None else Chosen(ops.resolve(name, case), {form: reason})


def modelled(name: str, case: Case, form: str, blocks: Any, chip: Chip, place: Any) -> Costs:
    """The modelled costs, from programs compiled for `place`, one device of a target.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses.
    """
    peak, bandwidth = chip.peak_flops("bfloat16"), chip.hbm_bandwidth
    assert peak is not None
    assert bandwidth is not None
    found = []
    for which, function in passes(name, case, form, blocks, mesh(place)).items():
        shapes = jax.eval_shape(lambda: arrays(name, case))
        stats = lower(function, shapes, mesh(place)).compile().memory_analysis()
        assert stats is not None
        held = stats.argument_size_in_bytes + stats.output_size_in_bytes
        moved = held + 2 * stats.temp_size_in_bytes
        seconds = max(work(name, case, which).flops / peak, moved / bandwidth)
        found.append(Cost(seconds, held + stats.temp_size_in_bytes))
    return Costs(*found)


def measured(
    name: str, case: Case, sides: Mapping[str, tuple[str, Any]], pairs: int
) -> dict[str, Costs]:
    """The measured costs of each side, a form with its tiles. All sides run in turn on the first
    device, with keys at which nothing stops early. A side that does not compile or does not fit is
    left out.
    """
    here = mesh(jax.devices()[0])
    given = drawn(Timed(name, case, kinds(name)[-1]))
    costs: dict[str, list[Cost]] = {side: [] for side in sides}
    for which in PASSES:
        timers: dict[str, timing.Timer] = {}
        peaks: dict[str, int] = {}
        for side in list(costs):
            try:
                function = passes(name, case, *sides[side], here)[which]
                program = jax.jit(function).lower(*given).compile()
                timers[side] = timing.queueing(program, given)
                timers[side](1)
            except REFUSALS:
                del costs[side]
                timers.pop(side, None)
                continue
            stats = program.memory_analysis()
            assert stats is not None
            peaks[side] = stats.argument_size_in_bytes + stats.output_size_in_bytes
            peaks[side] += stats.temp_size_in_bytes
        samples = timing.take_turns(timers, pairs) if timers else {}
        for side, taken in samples.items():
            costs[side].append(Cost(float(np.median(taken)), peaks[side]))
    return {side: Costs(*found) for side, found in costs.items()}


class Work(NamedTuple):
    """What one of `PASSES` has to do: its FLOPs, and the fewest bytes it must move."""

    flops: float
    bytes: float


def work(name: str, case: Case, which: str) -> Work:
    """The work by the op's own counts (`Op.flops`, `Op.bytes`, `Op.backward_flops`)."""
    op = dispatch.get(name)
    options = dispatch.bind_options(op, case.options, case.dims)
    times = 1.0 + op.backward_flops if which == "both" else 1.0
    moved = op.bytes(case.dims, options, jnp.dtype(case.dtype).itemsize)
    return Work(times * op.flops(case.dims, options), times * moved)


def passes(
    name: str, case: Case, form: str, blocks: Any, mesh: Mesh, segment_ids: Any = None
) -> dict[str, Callable[..., Any]]:
    """The functions of PASSES: (inputs, cotangent) -> output, and -> output and gradients."""

    def forward(inputs: Any, cotangent: jax.Array) -> Any:
        del cotangent
        return dispatch.apply(
            name,
            inputs,
            segment_ids=segment_ids,
            form=form,
            options=case.options,
            blocks=blocks,
            placement=Placement(mesh, RULES, "auto", "contiguous"),
        )[0]

    def both(inputs: Any, cotangent: jax.Array) -> Any:
        out, pull = jax.vjp(lambda inputs: forward(inputs, cotangent), inputs)
        return out, pull(cotangent)

    return {"forward": forward, "both": both}


def mesh(place: Any) -> Mesh:
    """A mesh of this one device."""
    return Mesh(np.array([place]), ("data",), axis_types=(AxisType.Auto,))


def refusal(name: str, case: Case, form: str, target: str) -> str | None:
    """Why the form cannot take the problem on this target, or None."""
    op = dispatch.get(name)
    options = dispatch.bind_options(op, case.options, case.dims)
    return dispatch.refusal(op, form, case.dims, jnp.dtype(case.dtype), options, target)


def kernel(name: str, target: str) -> str | None:
    """The op's form that is written for this target, if it has one."""
    found = [f for f in dispatch.get(name).forms if device.TARGETS.get(f) == target]
    return found[0] if found else None


def arrays(name: str, case: Case) -> tuple[Any, jax.Array]:
    """Inputs of a problem, and a cotangent of its output."""
    inputs = contract.sample(dispatch.get(name), case).inputs
    shape = [case.dims[letter] for letter in dispatch.get(name).out.split()]
    drawn = np.random.default_rng(1).standard_normal(shape)
    return inputs, jnp.asarray(drawn, case.dtype)


def lower(function: Callable[..., Any], given: Any, mesh: Mesh) -> Any:
    """Lowers a function for devices that are absent, from `given`, the shapes of its arguments. As
    inside a model, heads lie side by side in the arrays, which come from and go to projections, and
    the compiler chooses the layouts.
    """

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1) if x.ndim > 2 else x

    def run(*given_flat: Any) -> Any:
        whole = jax.tree.map(lambda x, like: x.reshape(like.shape), given_flat, given)
        return jax.tree.map(flat, function(*whole))

    chosen = Format(Layout.AUTO, NamedSharding(mesh, PartitionSpec()))
    jitted = jax.jit(run, in_shardings=chosen, out_shardings=chosen)
    return jitted.lower(*jax.tree.map(lambda x: jax.eval_shape(flat, x), given))
