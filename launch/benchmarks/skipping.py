"""Stick-breaking with a tolerance, on q, k and v of a trained model: speed-up, error and time.

    espalier bench --cases=skipping --workdir=RUN --precision=bfloat16 --out=FILE

q, k and v are taken from every stick-breaking layer of a run, on its held-out text, packed as in
training. They have the run's precision, or are rounded to bfloat16 with `--precision=bfloat16`, so
that a run trained in float32 on a CPU can measure bfloat16 kernels on a GPU. The form is the kernel
of this device if it takes the problem, else the form that the layer has here; the same holds for
softmax.

A side is one program of all these layers, forward alone or with the backward pass. Softmax runs on
the same packed rows, and again on whole rows: a kernel that knows documents only as a mask reads T
x T numbers, and is faster without it. The goal holds against both, for bfloat16 on a GPU or TPU.
Errors are relative root-mean-square errors over all layers, of the output and of the gradients for
one random cotangent.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lm
from kernels import dispatch
from kernels.contract import Case
from launch.benchmarks import forms, timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result
from lm.config import UserError
from lm.data import loader, prepare
from lm.data.batch import Batch, stack
from lm.model import Model

OP, BASELINE = "stickbreaking", "softmax"
PACKED, WHOLE = "softmax", "softmax of whole rows"
EXACT = "tolerance 0"
TOLERANCES = {f"tolerance {tolerance:g}": tolerance for tolerance in (1e-3, 1e-6)}
GOALS = {"tolerance 0.001": Goal("<=", 1.3)}


class Layer(NamedTuple):
    """The inputs of one layer's op, its form, and its static options as sorted pairs.

    `segment_ids` is None for whole rows, where each row is one document.
    """

    inputs: dict[str, jax.Array]
    segment_ids: jax.Array | None
    form: str
    options: tuple[tuple[str, Any], ...]
    op: str = OP

    def case(self) -> Case:
        """The layer's problem, as the other benchmarks describe one."""
        (batch, time, heads, key), (_, _, groups, value) = (self.inputs[x].shape for x in "qv")
        dims = {"B": batch, "T": time, "H": heads, "G": groups, "K": key, "V": value}
        return Case(dims, dict(self.options), dtype=self.inputs["q"].dtype.name)


class Program(NamedTuple):
    """A compiled program and its arguments."""

    run: Callable[..., Any]
    given: tuple[Any, ...]

    def outputs(self) -> list[dict[str, jax.Array]]:
        """The outputs of each layer, once they have been computed."""
        return jax.block_until_ready(self.run(*self.given))


def check(options: Options) -> None:
    """Raises:
    UserError: --workdir names no run.
    """
    if not options.workdir:
        raise UserError("--cases=skipping reads a trained run; set --workdir=WORKDIR")


def run(options: Options) -> list[Result]:
    """Raises:
    UserError: as `check`, or the run has no stick-breaking layer.
    """
    check(options)
    loaded = lm.load(options.workdir)
    data = loaded.config.data
    prepared = prepare.prepare(data, prepare.resolve_data_dir(""), tokenizer=loaded.tokenizer)
    tokens = data.batch_size * data.context_length
    name, rows = next(iter(loader.validation_rows(prepared, data, tokens).items()))
    batch = stack(list(rows))
    layers = capture(loaded.model, loaded.params, batch)
    if not layers:
        raise UserError(f"--workdir={options.workdir}: the run has no layer of {OP}")
    if options.precision != "float32":
        layers = [rounded(layer) for layer in layers]
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
            # In sorted order the output of query_norm replaces that of query; likewise for key.
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


def rounded(layer: Layer) -> Layer:
    """The layer with q, k and v rounded to bfloat16."""
    arrays = {name: layer.inputs[name].astype(jnp.bfloat16) for name in "qkv"}
    return layer._replace(inputs=layer.inputs | arrays)


def compare(layers: Sequence[Layer], pairs: int, facts: dict[str, Any]) -> list[Result]:
    """The time at tolerance 0 over that at each tolerance, the errors at each tolerance, and all
    times over those of softmax.
    """
    layers = [_on_this_device(layer) for layer in layers]
    baseline = [_softmax(layer) for layer in layers]
    sides = {
        name: [_tolerating(layer, tolerance) for layer in layers]
        for name, tolerance in {EXACT: 0.0, **TOLERANCES}.items()
    }
    softmaxes = {PACKED: baseline, WHOLE: [x._replace(segment_ids=None) for x in baseline]}
    facts = facts | {
        "layers": len(layers),
        "dims": {k: list(x.shape) for k, x in layers[0].inputs.items()},
        "dtype": layers[0].case().dtype,
        "forms": {OP: layers[0].form, BASELINE: baseline[0].form},
    }
    results: list[Result] = []
    for which in forms.PASSES:
        programs = {name: _compiled(given, which) for name, given in sides.items()}
        refused: dict[str, str] = {}
        for name, given in softmaxes.items():
            try:
                programs[name] = _compiled(given, which)
            except forms.REFUSALS as error:
                refused[name] = forms.reason(error)
        timers = {name: timing.queueing(x.run, x.given) for name, x in programs.items()}
        samples = timing.take_turns(timers, pairs)
        if which == "both":
            results += _speed_ups(programs, samples, facts)
        results += _beside(which, samples, facts | {"refused": refused})
    return results


def _speed_ups(
    programs: dict[str, Program], samples: timing.Samples, facts: dict[str, Any]
) -> Iterator[Result]:
    want = programs[EXACT].outputs()
    for name, tolerance in TOLERANCES.items():
        errors = _errors(programs[name].outputs(), want)
        over = EXACT, name
        title = f"skipping/speed-up at {tolerance:g}"
        yield timing.ratio(title, samples, over, errors=errors, **facts)
        title = f"skipping/error at {tolerance:g}"
        yield Result(name=title, value=max(errors.values()), facts=errors)


def _beside(which: str, samples: timing.Samples, facts: dict[str, Any]) -> Iterator[Result]:
    """The rows of times over those of softmax."""
    has_goals = jax.default_backend() != "cpu" and facts["dtype"] == "bfloat16"
    for name, other in itertools.product((EXACT, *TOLERANCES), (PACKED, WHOLE)):
        title = f"skipping/{name}/{which}/over {other}"
        if other in facts["refused"]:
            yield timing.refused(title, **facts)
        else:
            goal = GOALS.get(name) if has_goals else None
            yield timing.ratio(title, samples, (name, other), goal, **facts)


def _on_this_device(layer: Layer) -> Layer:
    """The layer in the form of this device's kernel, if the kernel takes the problem."""
    form = forms.kernel(OP, jax.default_backend())
    if form is None or forms.refusal(OP, layer.case(), form, jax.default_backend()):
        return layer
    return layer._replace(form=form)


def _tolerating(layer: Layer, tolerance: float) -> Layer:
    options = dict(layer.options) | {"tolerance": tolerance}
    return layer._replace(options=tuple(sorted(options.items())))


def _softmax(layer: Layer) -> Layer:
    """Softmax on the layer's q, k and v, with its scale."""
    inputs = {name: layer.inputs[name] for name in "qkv"}
    options = tuple((name, value) for name, value in layer.options if name == "scale")
    plain = layer._replace(op=BASELINE, inputs=inputs, options=options)
    return plain._replace(form=forms.chosen(BASELINE, plain.case()).form)


def _compiled(layers: Sequence[Layer], which: str) -> Program:
    """One program of all these layers, run once. A single layer could take less time than starting
    its program.

    Raises:
      one of forms.REFUSALS: the program does not compile or does not fit.
    """
    run = [functools.partial(_both if which == "both" else _forward, layer) for layer in layers]

    def whole(given: Sequence[Any]) -> list[dict[str, jax.Array]]:
        return [one(*arrays) for one, arrays in zip(run, given, strict=True)]

    given = [(layer.inputs, layer.segment_ids) for layer in layers]
    program = Program(jax.jit(whole).lower(given).compile(), (given,))
    program.outputs()
    return program


def _forward(layer: Layer, inputs: dict[str, jax.Array], segment_ids: Any) -> dict[str, jax.Array]:
    kept: Any = {"segment_ids": segment_ids, "form": layer.form, "options": dict(layer.options)}
    return {"out": dispatch.apply(layer.op, inputs, **kept)[0]}


def _both(layer: Layer, inputs: dict[str, jax.Array], segment_ids: Any) -> dict[str, jax.Array]:
    """The output, and the gradients for a random cotangent, named `d_` + the input's name."""
    out, pull = jax.vjp(lambda inputs: _forward(layer, inputs, segment_ids)["out"], inputs)
    cotangent = jax.random.normal(jax.random.key(0), out.shape, out.dtype)
    return {"out": out} | {f"d_{name}": x for name, x in pull(cotangent)[0].items()}


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
