"""The time that evaluation adds to training: one set, as often as experiments/base.py evaluates."""

from __future__ import annotations

import jax

from launch.benchmarks import problem, timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result

SHARE = Goal("<=", 0.05)


def run(options: Options) -> list[Result]:
    return [_share(options, mixer) for mixer in problem.MIXERS]


def _share(options: Options, mixer: str) -> Result:
    built = problem.built(options, mixer)
    config, state = built.config, built.init(0)
    batch = built.put(problem.batch(options.sizes))
    compiled = built.score.lower(state.params, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
    params = jax.tree.map(lambda x: x.copy(), state.params)  # the step donates those of its state
    step = problem.compiled_step(options, built)
    token_bytes = built.put_replicated(problem.token_bytes(options.sizes))
    sides = {
        "train": timing.thread(step, state, batch, token_bytes, built.numbers),
        "score": lambda: jax.block_until_ready(compiled(params, batch)),
    }
    samples = timing.interleave(sides, options.pairs)
    steps = config.run_steps
    evaluations = steps // config.steps(config.evaluate.every)
    batches = evaluations * -(-config.evaluate.max_tokens // config.tokens_per_step)
    one = timing.ratio("", samples, ("score", "train"))
    return Result(
        name=f"evaluation/{mixer}",
        value=one.value * batches / steps,
        by_medians=None if one.by_medians is None else one.by_medians * batches / steps,
        goal=SHARE,
        samples=one.samples,
        facts={"steps": steps, "batches": batches, "tokens_each": config.evaluate.max_tokens},
    )
