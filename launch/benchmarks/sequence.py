"""A time axis split over eight devices: the bytes that strategies send and that a layer holds.

sent      for every op, strategy and layout: |program / declared - 1|, the distance between the
          bytes of the program's collectives and those that the strategy declares; at least 1 if
          kinds or numbers of collectives differ
fixed     for strategies that send states: bytes sent for rows 8 and 64 times as long, over those
          for the original rows
balance   causal pairs of the busiest rank over those of the least busy one, minus 1
memory    for one layer (norms, mixer, feed-forward and all gradients, without its parameters and
          their gradients): bytes of one of eight devices that share each row over those of a single
          device with whole rows of the same length, by XLA's compiler for the devices at hand

Nothing is timed, so eight devices of one CPU are enough (JAX_NUM_CPU_DEVICES=8).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import dispatch
from kernels.contract import Layout, Op, Sent, Strategy
from kernels.contract import Options as Settings
from kernels.primitives.time_shards import LAYOUTS, Shards
from kernels.shard import Placement
from launch.benchmarks import problem, programs
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result
from lm.build import Build, build
from lm.config import Config, UserError
from lm.plan.changes import apply

RANKS = 8
LONGER = (8, 64)
FIXED = ("states", "scan")
EQUAL = Goal("<=", 0.01)
SAME = Goal("<=", 1.0)
BALANCED = Goal("<=", 0.02)
SIXTH = Goal("<=", 1 / 6)
SHARING = (2, 4, 8)
DIMS = {"B": 1, "T": 512, "H": 16, "G": 8, "K": 32, "V": 32, "N": 4, "W": 4}
# Settings of an op that change what is sent; each gets its own row.
SETTINGS: dict[str, tuple[Settings, ...]] = {
    "gated_linear": ({}, {"decay": "scalar"}, {"decay": "vector"}),
    "delta_rule": ({}, {"decay": "scalar"}),
    "linear_scan": ({}, {"transition": "gate"}, {"transition": "log_sum"}),
}
# For every op, a mixer that uses it.
MIXERS = {
    "softmax": "softmax",
    "stickbreaking": "stickbreaking",
    "gated_linear": "gla",
    "delta_rule": "deltanet",
    "linear_scan": "s4d",
    "gated_conv": "base_conv",
}
LAYER: dict[str, Any] = {
    "model.width": 128,
    "model.num_layers": 1,
    "model.num_heads": 8,
    "model.num_kv_heads": 8,
    "model.head_dim": 16,
    "model.ffn_dim": 256,
    "model.remat": "none",
    "data.context_length": 65536,
    "data.batch_size": 1,
    "mesh.data": 1,
}


def check(options: Options) -> None:
    """Raises:
    UserError: there are fewer devices than ranks.
    """
    del options
    if (found := len(jax.devices())) < RANKS:
        raise UserError(
            f"--cases=sequence splits rows over {RANKS} devices, JAX found {found}; on a CPU set "
            f"JAX_NUM_CPU_DEVICES={RANKS} in the environment"
        )


def run(options: Options) -> Iterator[Result]:
    for name in dispatch.names():
        for settings in SETTINGS.get(name, ({},)):
            for strategy, layout in _ways(dispatch.get(name)):
                yield from _sent(dispatch.get(name), settings, strategy, layout)
    yield from (_balance(layout) for layout in LAYOUTS)
    for name, mixer in MIXERS.items():
        alone = _layer_bytes(_layer(options, mixer, {}))
        for strategy, layout in _ways(dispatch.get(name)):
            yield _memory(options, mixer, strategy.name, layout, alone)


def _ways(op: Op) -> Iterator[tuple[Strategy, Layout]]:
    for strategy in op.sequence:
        for layout in strategy.layouts:
            yield strategy, layout


def _sent(op: Op, settings: Settings, strategy: Strategy, layout: Layout) -> Iterator[Result]:
    call = " ".join([op.name, *(f"{key}={value}" for key, value in settings.items())])
    bound = dispatch.bind_options(op, settings, DIMS)
    forward, both = _collectives(op, settings, strategy, layout, DIMS)
    want = strategy.sent(op, DIMS, bound, 4, RANKS)
    calls = {kind: sum(x.times for x in both if x.kind == kind) for kind in {y.kind for y in both}}
    counted = Sent(_total(forward), _total(both) - _total(forward), want.hops, calls)
    pairs = ((counted.forward, want.forward), (counted.backward, want.backward))
    worst = max(abs(ours / theirs - 1.0) for ours, theirs in pairs)
    times = [DIMS["T"], *(n * DIMS["T"] for n in LONGER)]
    longer = [
        _total(_collectives(op, settings, strategy, layout, DIMS | {"T": time})[1])
        for time in times[1:]
    ]
    declared = [strategy.sent(op, DIMS | {"T": time}, bound, 4, RANKS) for time in times]
    facts = {"op": call, "strategy": strategy.name, "layout": layout, "ranks": RANKS}
    facts |= {"declared": want._asdict(), "program": counted._asdict(), "dims": DIMS}
    facts |= {"times": times, "program_bytes": [_total(both), *longer]}
    facts |= {"declared_bytes": [x.forward + x.backward for x in declared]}
    name = f"{call} by {strategy.name} {layout}"
    value = worst if calls == dict(want.calls) else max(worst, 1.0)
    yield Result(name=f"sent/{name}", value=value, goal=EQUAL, facts=facts)
    if strategy.name in FIXED:
        yield Result(name=f"fixed/{name}", value=max(longer) / _total(both), goal=SAME)


def _total(found: list[programs.Collective]) -> float:
    return sum(x.sent(RANKS) for x in found)


def _collectives(
    op: Op, settings: Settings, strategy: Strategy, layout: Layout, dims: dict[str, int]
) -> tuple[list[programs.Collective], list[programs.Collective]]:
    """The collectives of a forward pass on packed rows, and of one with its backward pass, which
    gives gradients for the inputs with a time axis.
    """
    mesh = jax.make_mesh((RANKS,), ("sequence",), axis_types=(AxisType.Auto,))
    place = Placement(mesh, {"T": ("sequence",)}, strategy.name, layout)
    needed = op.needed({**op.options, **settings})
    arrays = {
        name: jax.ShapeDtypeStruct([dims[x] for x in spec.letters.split()], jnp.float32)
        for name, spec in needed.items()
        if spec.fill is None
    }
    along = {name: x for name, x in arrays.items() if "T" in needed[name].letters.split()}
    fixed = {name: x for name, x in arrays.items() if name not in along}

    def forward(along: Any, fixed: Any, ids: jax.Array) -> jax.Array:
        call = {"form": "chunked", "options": settings, "placement": place}
        return dispatch.apply(op.name, along | fixed, segment_ids=ids, **call)[0]

    gradient = jax.grad(lambda *args: jnp.sum(jnp.sin(forward(*args))))
    args = along, fixed, jax.ShapeDtypeStruct((dims["B"], dims["T"]), jnp.int32)
    return programs.collectives(forward, *args), programs.collectives(gradient, *args)


def _balance(layout: Layout) -> Result:
    time = 16 * RANKS
    shards = Shards(("sequence",), RANKS, layout)
    places = shards.by_rank(np.arange(time), 0).reshape(RANKS, -1)
    pairs = np.sum(places + 1, axis=1)  # a token sees itself and all tokens before it
    goal = BALANCED if layout == "zigzag" else None
    facts = {"pairs": pairs.tolist()}
    return Result(
        name=f"balance/{layout}",
        value=float(pairs.max() / pairs.min() - 1.0),
        goal=goal,
        facts=facts,
    )


def _layer(options: Options, mixer: str, mesh: dict[str, Any]) -> Build:
    changed: Config = apply(problem.config(options, mixer), LAYER | mesh)
    return build(changed, jax.devices()[: mesh.get("mesh.sequence", 1)])


def _layer_bytes(built: Build) -> int:
    """Bytes one device holds while it computes a layer and its gradients, without parameters."""
    period, context = built.model.groups[0], built.model.context
    layer = period.clone(parent=None)
    shape = built.config.data.batch_size, built.config.data.context_length
    placed = lambda *axes: NamedSharding(context.mesh, P(*axes))
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed(None, "sequence"))
    x = jax.ShapeDtypeStruct(
        (*shape, built.config.model.width), jnp.float32, sharding=placed(None, "sequence", None)
    )
    boxed: Any = jax.eval_shape(layer.init, jax.random.key(0), x, rows, rows, None)
    whole = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed())
    params = jax.tree.map(whole, meta.unbox(boxed))

    def both(params: Any, x: jax.Array, rows: jax.Array, cotangent: jax.Array) -> Any:
        out, pull = jax.vjp(lambda p, x: layer.apply(p, x, rows, rows, None)[0], params, x)
        return out, pull(cotangent)

    memory: Any = jax.jit(both).lower(params, x, rows, x).compile().memory_analysis()
    own = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return total - 2 * own  # without the parameters and their gradients


def _memory(options: Options, mixer: str, strategy: str, layout: Layout, alone: int) -> Result:
    found = {1: alone}
    for ranks in SHARING:
        mesh = {"mesh.sequence": ranks, "mesh.sequence_layout": layout}
        mesh |= {"mesh.sequence_strategy": strategy}
        found[ranks] = _layer_bytes(_layer(options, mixer, mesh))
    goal = None if strategy == "gather" else SIXTH  # gather holds keys and values of whole rows
    facts = {"mixer": mixer, "strategy": strategy, "layout": layout, "layer": LAYER}
    facts |= {"ranks": list(found), "bytes": list(found.values())}
    return Result(
        name=f"memory/{mixer} by {strategy} {layout}",
        value=found[RANKS] / alone,
        goal=goal,
        facts=facts,
    )
