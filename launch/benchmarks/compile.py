"""Compile time of a deep model over a shallow one, and of generation for eight prompts over one.

Both should be near 1: a scan over layers compiles one layer, and generation compiles the same
program with other shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launch.benchmarks import problem, timing
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal, Result

GOAL = Goal("<=", 1.3)
MOST = 5  # samples of each side, even if more pairs are asked for
PROMPTS = (1, 8)


def run(options: Options) -> list[Result]:
    return [
        compare(options, mixer) for mixer in problem.MIXERS for compare in (_steps, _generation)
    ]


def _steps(options: Options, mixer: str) -> Result:
    sides = {
        f"{depth} layers": _fresh(problem.compiled_step, options, mixer, depth)
        for depth in options.sizes.depths
    }
    return _ratio(f"compile/{mixer}", options, sides)


def _generation(options: Options, mixer: str) -> Result:
    """Generates as many new tokens as a context has, after prompts of 16 tokens."""

    def compiled(rows: int) -> Callable[[Options, Any], Any]:
        return lambda options, built: problem.compiled_generation(options, built, rows)

    depth = options.sizes.depths[0]
    sides = {f"{rows} prompts": _fresh(compiled(rows), options, mixer, depth) for rows in PROMPTS}
    return _ratio(f"compile/generate/{mixer}", options, sides)


def _fresh(
    compiled: Callable[[Options, Any], Any], options: Options, mixer: str, depth: int
) -> Callable[[], Any]:
    """Traces, lowers and compiles a fresh model on every call, so that nothing is cached."""
    fresh = [problem.built(options, mixer, depth) for _ in range(_repeats(options) + 1)]
    return lambda: compiled(options, fresh.pop())


def _repeats(options: Options) -> int:
    return min(options.pairs, MOST)


def _ratio(name: str, options: Options, sides: dict[str, Callable[[], Any]]) -> Result:
    samples = timing.interleave(sides, _repeats(options))
    small, large = sides
    return timing.ratio(name, samples, (large, small), GOAL)
