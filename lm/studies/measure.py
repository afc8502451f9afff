"""What a model costs: seconds and memory of a train step, seconds and state of a decode step.

Times are taken in rounds that visit every side in turn, so a slow minute of the machine affects all
of them. The reported time is the lower quartile over the rounds.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import params as params_lib
from lm.build import Build
from lm.data.batch import Batch
from lm.model import Model
from lm.run import record
from lm.studies import grid
from lm.studies.grid import Grid

DECODE_STEPS = 16  # in one call, so that the overhead of the call does not count


@dataclasses.dataclass(frozen=True)
class Training:
    """`seconds` of a step; `peak_bytes` are the arguments and temporaries of its compiled program,
    as the compiler counts them.
    """

    seconds: float
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class Times:
    """For every build, by name: a train step, and seconds per token by tokens in the state."""

    training: Mapping[str, Training]
    decoding: Mapping[str, Mapping[str, float]]


def timed(
    builds: Mapping[str, Build], rounds: int, contexts: Sequence[int], workdir: Path
) -> Times:
    """The times on this machine, taken once and stored in workdir/timing, by a single process,
    because two would slow each other down.
    """
    device = jax.devices()[0]
    asked = {
        "runs": {name: built.config for name, built in builds.items()},
        "rounds": rounds,
        "contexts": contexts,
        "machine": [device.platform, device.device_kind, len(jax.devices()), record.cpu()],
    }
    cell = ("timing",)
    timing = Grid(folder=workdir, outcome=Times, asked={cell: asked}, if_changed="again")

    def work(cell: tuple[str], place: Path) -> Times:
        print(
            f"timing decode steps and then train steps of {', '.join(builds)}: each is compiled, "
            f"then run in {rounds} rounds",
            file=sys.stderr,
            flush=True,
        )
        by_name = {
            name: {str(context): seconds for context, seconds in found.items()}
            for name, found in decode_steps(builds, contexts, rounds).items()
        }
        return Times(train_steps(builds, rounds), by_name)

    found = grid.run(timing, work, grid.all_of(timing))
    assert found is not None, "work never stops"
    return found[cell]


def train_steps(builds: Mapping[str, Build], rounds: int) -> dict[str, Training]:
    """Times every build's train step on one random batch."""
    compiled = {name: _step(built) for name, built in builds.items()}
    seconds = quartiles({name: side for name, (side, _) in compiled.items()}, rounds)
    return {name: Training(seconds[name], peak) for name, (_, peak) in compiled.items()}


def decode_steps(
    builds: Mapping[str, Build], contexts: Sequence[int], rounds: int
) -> dict[str, dict[int, float]]:
    """Seconds per token of one row whose state holds `context` tokens, by context.

    The state is an empty one of that capacity: a step computes over all of it, whatever it holds.
    """
    sides: dict[tuple[str, int], Callable[[], object]] = {}
    for name, built in builds.items():
        params = built.init(0).params
        for context in contexts:
            sides[name, context] = decoder(built.model, params, context)
    seconds = quartiles(sides, rounds)
    return {name: {c: seconds[name, c] / DECODE_STEPS for c in contexts} for name in builds}


def parameters(built: Build) -> int:
    """Parameters outside the embedding and the output matrix."""
    infos = {k: v for k, v in built.infos.items() if k not in ("embed", "output")}
    return params_lib.count(infos)["total"]


def state_bytes(model: Model, length: int) -> int:
    """The bytes that decoding carries for one row after `length` tokens."""
    state = jax.eval_shape(lambda: model.init_state(1, length))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def quartiles[K](sides: Mapping[K, Callable[[], object]], rounds: int) -> dict[K, float]:
    """Seconds per call of every side: the lower quartile over rounds that visit all sides."""
    samples: dict[K, list[float]] = {key: [] for key in sides}
    for i in range(rounds + 1):
        for key, side in sides.items():
            start = time.perf_counter()
            side()
            if i:  # the first round warms up
                samples[key].append(time.perf_counter() - start)
    return {key: float(np.quantile(x, 0.25)) for key, x in samples.items()}


def _step(built: Build) -> tuple[Callable[[], object], int]:
    config = built.config
    shape = config.data.batch_size, config.data.context_length
    tokens = np.random.default_rng(0).integers(0, config.data.tokenizer.vocab_size, shape)
    ones, index = np.ones(shape, np.int32), np.arange(shape[1], dtype=np.int32)
    batch = Batch(
        tokens=tokens.astype(np.int32),
        targets=np.roll(tokens, -1, axis=1).astype(np.int32),
        segment_ids=ones,
        positions=np.broadcast_to(index, shape),
        source_ids=0 * ones,
        loss_weights=ones.astype(np.float32),
    )
    placed = built.put(batch)
    token_bytes = built.put_replicated(jnp.ones(config.data.tokenizer.vocab_size, jnp.int32))
    numbers = built.put_replicated(built.numbers)
    held = [built.init(0)]
    compiled = built.step.lower(held[0], placed, token_bytes, numbers).compile()  # pyright: ignore[reportFunctionMemberAccess]
    memory = compiled.memory_analysis()

    def side() -> None:
        held[0], _ = compiled(held[0], placed, token_bytes, numbers)
        jax.block_until_ready(held[0])

    return side, int(memory.argument_size_in_bytes + memory.temp_size_in_bytes)


def decoder(model: Model, params: Any, context: int) -> Callable[[], object]:
    """Decodes DECODE_STEPS greedy tokens of one row, in one compiled call."""

    params, state = model.apart(params, model.init_state(1, context))

    def step(carry: tuple[jax.Array, Any], _: None) -> tuple[tuple[jax.Array, Any], None]:
        token, state = carry
        hidden, state = model.apply({"params": params}, token, state, method="step")
        head: Any = model.apply({"params": params}, method="head")
        return (jnp.argmax(hidden @ head.T, axis=-1).astype(jnp.int32), state), None

    @jax.jit
    def run(token: jax.Array, state: Any) -> jax.Array:
        return jax.lax.scan(step, (token, state), None, DECODE_STEPS)[0][0]

    token = jnp.zeros((1,), jnp.int32)
    return lambda: jax.block_until_ready(run(token, state))
