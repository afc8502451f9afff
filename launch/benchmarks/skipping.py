"""Stick-breaking with a tolerance on what a trained model computes: speed-up, and what it costs.

q, k and v are those of every stick-breaking layer of a run, on its own held-out text, packed as in
training. A side is forward and backward of all these layers, one after another. Errors are relative
root-mean-square, over all layers, of the output and of the gradients for one random cotangent.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lm
from kernels import dispatch
from launch.benchmarks import timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Result
from lm.config import UserError
from lm.data import loader, prepare
from lm.data.batch import Batch, stack
from lm.model import Model

OP = "stickbreaking"
EXACT = "tolerance 0"
TOLERANCES = (1e-3, 1e-6)


class Layer(NamedTuple):
    """What one layer gives to its op, with the form and the static options (as sorted pairs)."""

    inputs: dict[str, jax.Array]
    segment_ids: jax.Array
    form: str
    options: tuple[tuple[str, Any], ...]


def run(options: Options) -> list[Result]:
    """Raises:
    UserError: no run is named, or none of its layers breaks sticks.
    """
    if not options.workdir:
        raise UserError("--cases=skipping reads a trained run; set --workdir=WORKDIR")
    loaded = lm.load(options.workdir)
    data = loaded.config.data
    prepared = prepare.prepare(data, prepare.resolve_data_dir(""), tokenizer=loaded.tokenizer)
    tokens = data.batch_size * data.context_length
    name, rows = next(iter(loader.validation_rows(prepared, data, tokens).items()))
    batch = stack(list(rows))
    layers = capture(loaded.model, loaded.params, batch)
    if not layers:
        raise UserError(f"--workdir={options.workdir}: none of its layers is {OP}")
    facts = {"step": loaded.step, "source": name, "batch": list(batch.tokens.shape)}
    return compare(layers, options.pairs, facts)


def capture(model: Model, params: Any, batch: Batch) -> list[Layer]:
    """The inputs of every stick-breaking op of the model, layer by layer."""
    wanted = ("query", "key", "value", "query_norm", "key_norm")
    apply = functools.partial(
        model.apply,
        mutable=["intermediates"],
        capture_intermediates=lambda module, method: (
            module.name in wanted and method in ("__call__", "place")
        ),
    )
    arrays = batch.tokens, batch.segment_ids, batch.positions
    found: Any = jax.jit(apply)({"params": params}, *arrays)[1]
    layers: list[Layer] = []
    for i, (repeat, period) in enumerate(zip(model.repeats, model.groups, strict=True)):
        for j, block in enumerate(period.blocks):
            call = block.mixer.calls().get("main")
            if call is None or call.op != OP:
                continue
            path = f"groups_{i}", f"blocks_{j}", "mixer"
            outputs, weights = (
                functools.reduce(lambda x, key: x[key], path, tree)
                for tree in (found["intermediates"], params)
            )
            # In this order a norm, where there is one, takes the place of what it normalizes.
            stacked = {name[0]: next(iter(x.values()))[0] for name, x in sorted(outputs.items())}
            if "remainder_bias" in weights:
                stacked["remainder_bias"] = weights["remainder_bias"]
            for n in range(repeat):
                inputs = {name: x[n] for name, x in stacked.items()}
                settings = tuple(sorted(call.options.items()))
                layers.append(
                    Layer(inputs, jnp.asarray(batch.segment_ids), block.mixer.form, settings)
                )
    return layers


def compare(layers: Sequence[Layer], pairs: int, facts: dict[str, Any]) -> list[Result]:
    """Time at tolerance 0 over the time at each tolerance, and the errors there."""
    exact = _side(layers, 0.0)
    names = {f"tolerance {tolerance:g}": tolerance for tolerance in TOLERANCES}
    sides = {EXACT: exact} | {name: _side(layers, x) for name, x in names.items()}
    samples = timing.interleave(sides, pairs)
    want = exact()
    results: list[Result] = []
    for name, tolerance in names.items():
        errors = _errors(sides[name](), want)
        result = timing.ratio(
            f"skipping/speed-up at {tolerance:g}",
            samples,
            (EXACT, name),
            layers=len(layers),
            dims={k: list(x.shape) for k, x in layers[0].inputs.items()},
            errors=errors,
            **facts,
        )
        worst = Result(
            name=f"skipping/error at {tolerance:g}", value=max(errors.values()), facts=errors
        )
        results += [result, worst]
    return results


def _side(layers: Sequence[Layer], tolerance: float) -> Any:
    """A side: output and gradients of every layer, waited for."""

    def side() -> list[Any]:
        return jax.block_until_ready([_forward_and_backward(layer, tolerance) for layer in layers])

    return side


def _forward_and_backward(layer: Layer, tolerance: float) -> dict[str, jax.Array]:
    return _compiled(layer.form, layer.options, tolerance)(layer.inputs, layer.segment_ids)


@functools.cache
def _compiled(form: str, options: tuple[tuple[str, Any], ...], tolerance: float) -> Any:
    def both(inputs: dict[str, jax.Array], segment_ids: jax.Array) -> dict[str, jax.Array]:
        settings = dict(options) | {"tolerance": tolerance}

        def forward(inputs: dict[str, jax.Array]) -> jax.Array:
            kept = {"segment_ids": segment_ids, "form": form, "options": settings}
            return dispatch.apply(OP, inputs, **kept)[0]

        out, pull = jax.vjp(forward, inputs)
        cotangent = jax.random.normal(jax.random.key(0), out.shape, out.dtype)
        return {"out": out} | {f"d_{name}": x for name, x in pull(cotangent)[0].items()}

    return jax.jit(both)


def _errors(got: Sequence[dict[str, jax.Array]], want: Sequence[dict[str, jax.Array]]) -> Any:
    """Relative root-mean-square error of each array, over all layers."""
    errors: dict[str, float] = {}
    for name in want[0]:
        pairs = [
            (np.asarray(x[name], np.float64), np.asarray(y[name], np.float64))
            for x, y in zip(got, want, strict=True)
        ]
        moved = sum(float(np.sum((x - y) ** 2)) for x, y in pairs)
        errors[name] = (moved / sum(float(np.sum(y**2)) for _, y in pairs)) ** 0.5
    return errors
