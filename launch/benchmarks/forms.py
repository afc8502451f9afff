"""What a form of an op costs on a device: measured where it is here, modelled where it is not.

    modelled seconds   max(FLOPs of the op / peak, bytes / HBM bandwidth), bytes = arguments +
                       outputs + twice the temporaries, by the target's compiler
    peak bytes         arguments + outputs + temporaries, by the same compiler

The backward pass counts `Op.backward_flops` times the forward. A model says nothing of how well a
kernel fills the units; it says what no kernel of these bytes can beat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import contract, dispatch
from kernels.contract import Case
from kernels.primitives import device
from launch.benchmarks import timing
from lm.targets import Chip

BASELINE = "chunked"
WIDTHS = (64, 128)
LENGTHS = (2048, 8192)
DIMS = {"B": 2, "H": 8, "G": 8}
RULES = {"B": ("data",)}


class Cost(NamedTuple):
    """Of one pass."""

    seconds: float
    peak: int


class Costs(NamedTuple):
    """Of the forward pass, and of forward and backward together."""

    forward: Cost
    both: Cost


def problems(
    names: Sequence[str], widths: Sequence[int] = WIDTHS, lengths: Sequence[int] = LENGTHS
) -> Iterator[tuple[str, Case]]:
    """Every setting of the bench cases of these ops, in bfloat16."""
    for name in names:
        op = dispatch.get(name)
        bench = [case.options for case in op.cases if case.tag == "bench"]
        # What one of them sets, the others leave at its default: that is said too.
        usual = {key: op.options[key] for options in bench for key in options}
        settings = [usual | dict(options) for options in bench]
        for options in {str(options): options for options in settings}.values():
            for width in widths:
                for time in lengths:
                    dims = {**DIMS, "T": time, "K": width, "V": width}
                    yield name, Case(dims, options, dtype="bfloat16")


def modelled(name: str, case: Case, form: str, blocks: Any, chip: Chip, place: Any) -> Costs:
    """Compiles for one device of a target, `place`.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses.
    """
    op = dispatch.get(name)
    peak, bandwidth = chip.peak_flops("bfloat16"), chip.hbm_bandwidth
    assert peak is not None
    assert bandwidth is not None
    forward = dispatch.flops(name, case.dims, case.options)
    found = []
    work = {"forward": forward, "both": (1 + op.backward_flops) * forward}
    for which, function in passes(name, case, form, blocks, mesh(place)).items():
        shapes = jax.eval_shape(lambda: arrays(name, case))
        stats = lower(function, shapes, mesh(place)).compile().memory_analysis()
        assert stats is not None
        held = stats.argument_size_in_bytes + stats.output_size_in_bytes
        moved = held + 2 * stats.temp_size_in_bytes
        seconds = max(work[which] / peak, moved / bandwidth)
        found.append(Cost(seconds, held + stats.temp_size_in_bytes))
    return Costs(*found)


def measured(
    name: str, case: Case, sides: Mapping[str, tuple[str, Any]], pairs: int
) -> dict[str, Costs]:
    """Each side is a form and its tiles; all are run in turn on the first device."""
    here = mesh(jax.devices()[0])
    given = arrays(name, case)
    costs: dict[str, list[Cost]] = {side: [] for side in sides}
    for which in ("forward", "both"):
        compiled = {
            side: jax.jit(passes(name, case, *how, here)[which]).lower(*given).compile()
            for side, how in sides.items()
        }
        calls = {side: timing.waiting(program, given) for side, program in compiled.items()}
        samples = timing.interleave(calls, pairs)
        for side, program in compiled.items():
            stats = program.memory_analysis()
            assert stats is not None
            peak = stats.argument_size_in_bytes + stats.output_size_in_bytes
            peak += stats.temp_size_in_bytes
            costs[side].append(Cost(float(np.median(samples[side])), peak))
    return {side: Costs(*found) for side, found in costs.items()}


def passes(
    name: str, case: Case, form: str, blocks: Any, mesh: Mesh
) -> dict[str, Callable[..., Any]]:
    """(inputs, cotangent) -> the output; the same with the gradients."""

    def forward(inputs: Any, cotangent: jax.Array) -> Any:
        del cotangent
        return dispatch.apply(
            name,
            inputs,
            form=form,
            options=case.options,
            blocks=blocks,
            mesh=mesh,
            rules=RULES,
        )[0]

    def both(inputs: Any, cotangent: jax.Array) -> Any:
        out, pull = jax.vjp(lambda inputs: forward(inputs, cotangent), inputs)
        return out, pull(cotangent)

    return {"forward": forward, "both": both}


def mesh(place: Any) -> Mesh:
    """Of this one device."""
    return Mesh(np.array([place]), ("data",), axis_types=(AxisType.Auto,))


def refusal(name: str, case: Case, form: str, target: str) -> str | None:
    """Why the form cannot take the problem on this target, or None."""
    op = dispatch.get(name)
    options = dispatch.bind_options(op, case.options, case.dims)
    return dispatch.refusal(op, form, case.dims, jax.numpy.dtype("bfloat16"), options, target)


def kernel(name: str, target: str) -> str | None:
    """The op's form that is written for this target, if it has one."""
    found = [f for f in dispatch.get(name).forms if device.TARGETS.get(f) == target]
    return found[0] if found else None


def arrays(name: str, case: Case) -> tuple[Any, jax.Array]:
    """Inputs of a problem, and a cotangent of its output."""
    inputs = contract.sample(dispatch.get(name), case).inputs
    shape = [case.dims[letter] for letter in dispatch.get(name).out.split()]
    drawn = np.random.default_rng(1).standard_normal(shape)
    return inputs, jax.numpy.asarray(drawn, case.dtype)


def lower(function: Callable[..., Any], given: Any, mesh: Mesh) -> Any:
    """For devices that are not there: shapes alone, `given` those of the arguments. As inside a
    model, arrays come from and go to projections, heads side by side, and their layouts are for the
    compiler to choose.
    """

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1) if x.ndim > 2 else x

    def run(*given_flat: Any) -> Any:
        whole = jax.tree.map(lambda x, like: x.reshape(like.shape), given_flat, given)
        return jax.tree.map(flat, function(*whole))

    chosen = Format(Layout.AUTO, NamedSharding(mesh, PartitionSpec()))
    jitted = jax.jit(run, in_shardings=chosen, out_shardings=chosen)
    return jitted.lower(*jax.tree.map(lambda x: jax.eval_shape(flat, x), given))
