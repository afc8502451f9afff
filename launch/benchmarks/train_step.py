"""Our train step against the same step written by hand: the overhead of the framework."""

from __future__ import annotations

import jax

from launch.benchmarks import bare, problem, timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result

GOAL = Goal("<=", 1.05)


def run(options: Options) -> list[Result]:
    return [_compare(options, mixer) for mixer in problem.MIXERS]


def _compare(options: Options, mixer: str) -> Result:
    built = problem.built(options, mixer)
    batch = built.put(problem.batch(options.sizes))
    token_bytes = built.put_replicated(problem.token_bytes(options.sizes))
    given = batch, token_bytes, built.numbers
    state = built.init(0)
    bare_state = bare.init(built, state.params)
    lowered = jax.jit(bare.create(built), donate_argnums=0).lower(bare_state, batch)
    bare_step = lowered.compile(dict(options.compiler_options))
    sides = {
        "ours": timing.thread(problem.compiled_step(options, built), state, *given),
        "bare": timing.thread(bare_step, bare_state, batch),
    }
    samples = timing.interleave(sides, options.pairs)
    return timing.ratio(
        f"train_step/{mixer}", samples, ("ours", "bare"), GOAL, form=built.layers[0].form
    )
