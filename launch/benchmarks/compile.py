"""Compile time of a deep and of a shallow model: a scan over layers makes them nearly equal."""

from __future__ import annotations

from launch.benchmarks import problem, timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result

GOAL = Goal("<=", 1.3)
MOST = 5  # of each, however many pairs are asked for


def run(options: Options) -> list[Result]:
    return [_compare(options, mixer) for mixer in problem.MIXERS]


def _compare(options: Options, mixer: str) -> Result:
    """Tracing, lowering and compiling; a fresh function each time, so that nothing is cached."""
    repeats = min(options.pairs, MOST)
    sides = {}
    for depth in options.sizes.depths:
        fresh = [problem.built(options, mixer, depth) for _ in range(repeats + 1)]
        sides[f"{depth} layers"] = lambda fresh=fresh: problem.compiled_step(options, fresh.pop())
    samples = timing.interleave(sides, repeats)
    shallow, deep = sides
    return timing.ratio(f"compile/{mixer}", samples, (deep, shallow), GOAL)
