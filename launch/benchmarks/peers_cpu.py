"""Our train step and generation against torch's on this CPU, in two processes that take turns.

    espalier bench --cases=peers_cpu --peer_python=TORCH/bin/python --out=FILE

TORCH is an environment with torch and transformers (`pip install torch transformers`; torch's CPU
wheels). The peer is transformers' Llama with the same sizes (peer_model.py), eager and compiled.
Both sides use float32. A step is forward, backward, clipping and AdamW; ours also does what
`espalier train` adds: document masks, the guard against bad steps, and the logged metrics. `by
hand` is the same step in plain JAX (bare.py).

    steps/T512     4 rows of 512 tokens
    steps/T8192    1 row of 8,192, where attention weighs most
    products/T512  only the matrix products of a step, to see whether XLA's are the limit
    generate/...   greedy tokens after prompts, with both caches; `first` is the first call, which
                   compiles
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from launch.benchmarks import bare, peer, problem, timing
from launch.benchmarks.peer import PeerError, Process
from launch.benchmarks.problem import Options, Sizes
from launch.benchmarks.timing import Goal, Result
from lm.config import UserError
from lm.evaluation import generate

SCRIPT = Path(__file__).with_name("peer_model.py")
CPUINFO = Path("/proc/cpuinfo")
STEP, LONG, STICK = Goal("<=", 1.0), Goal("<=", 1.0), Goal("<=", 1.3)
STEP_AMX = Goal("<=", 1 / 0.9)  # oneDNN multiplies float32 with the matrix unit, XLA does not
FIRST = Goal("<=", 1.5)


class Steps(NamedTuple):
    """A batch, the mixers that train on it with the goal of each beside the peer's best form, and
    the largest number of samples, since a long row takes seconds.
    """

    rows: int
    length: int
    goals: dict[str, Goal | None]
    most: int


class Prompts(NamedTuple):
    """Prompts to continue, and how long ours may take of the peer's time."""

    rows: int
    length: int
    new: int
    goal: Goal | None


STEPS = (
    Steps(4, 512, {"softmax": STEP, "stickbreaking": None}, 1000),
    Steps(1, 8192, {"softmax": LONG, "stickbreaking": STICK, "gla": None}, 12),
)
PROMPTS = (
    Prompts(1, 256, 256, Goal("<=", 1 / 2)),
    Prompts(8, 256, 256, Goal("<=", 1 / 1.2)),
    Prompts(1, 7936, 256, None),
)
MOST_GENERATIONS = 10


def check(options: Options) -> None:
    """Raises:
    UserError: JAX's backend is not a CPU, or the peer does not start.
    """
    if jax.default_backend() != "cpu":
        raise UserError(
            f"--cases=peers_cpu times a CPU, not {jax.default_backend()}; set JAX_PLATFORMS=cpu"
        )
    try:
        with _started(options) as process:
            process.describe()
    except (PeerError, OSError) as error:
        raise UserError(
            f"--cases=peers_cpu: no peer runs in {_python(options)}: {error}; name the Python of "
            "an environment with torch and transformers by --peer_python"
        ) from None


def run(
    options: Options,
    steps: tuple[Steps, ...] = STEPS,
    prompts: tuple[Prompts, ...] = PROMPTS,
) -> Iterator[Result]:
    for asked in steps:
        yield from _steps(options, asked)
    yield _products(options, steps[0])
    for asked in prompts:
        yield from _generation(options, asked)


def _python(options: Options) -> str:
    return options.peer_python or sys.executable


def _started(options: Options) -> Any:
    sizes = options.sizes
    shape = sizes.num_layers, sizes.width, sizes.num_heads, sizes.ffn_dim, sizes.vocab_size
    # -P, since other files of this folder have the names of modules that libraries import.
    return peer.started([_python(options), "-P", str(SCRIPT), *map(str, shape)])


def _steps(options: Options, asked: Steps) -> Iterator[Result]:
    sizes = dataclasses.replace(options.sizes, batch_size=asked.rows, context_length=asked.length)
    options = dataclasses.replace(options, sizes=sizes)
    sides: dict[str, Callable[[], object]] = {}
    for mixer in asked.goals:
        sides[f"ours, {mixer}"] = _step(options, mixer)
    sides["by hand, softmax"] = _by_hand(options)
    with _started(options) as process:
        for form in ("eager", "compiled"):
            sides[f"torch {form}"] = _asking(process, f"{form}:{asked.rows},{asked.length}")
        samples = timing.interleave(sides, min(options.pairs, asked.most))
        facts = {"peer": process.describe(), "rows": asked.rows, "length": asked.length}
    tokens = asked.rows * asked.length
    facts["tokens_per_second"] = {n: tokens / float(np.median(x)) for n, x in samples.items()}
    peers = ("torch eager", "torch compiled")
    best = min(peers, key=lambda side: float(np.median(samples[side])))
    for mixer, goal in asked.goals.items():
        name = f"steps/T{asked.length}/{mixer} over {best}"
        goal = STEP_AMX if goal is STEP and _has_amx() else goal
        yield timing.ratio(name, samples, (f"ours, {mixer}", best), goal, **facts)
    for other in {*peers, "by hand, softmax"} - {best}:
        name = f"steps/T{asked.length}/softmax over {other}"
        yield timing.ratio(name, samples, ("ours, softmax", other), **facts)


def _asking(process: Process, what: str) -> Callable[[], object]:
    return lambda: process.ask(what, 1)


def _step(options: Options, mixer: str) -> Callable[[], object]:
    built = problem.built(options, mixer)
    batch = built.put(problem.batch(options.sizes))
    token_bytes = built.put_replicated(problem.token_bytes(options.sizes))
    compiled = problem.compiled_step(options, built)
    return timing.thread(compiled, built.init(0), batch, token_bytes, built.numbers)


def _by_hand(options: Options) -> Callable[[], object]:
    built = problem.built(options, "softmax")
    batch = built.put(problem.batch(options.sizes))
    state = bare.init(built, built.init(0).params)
    lowered = jax.jit(bare.create(built), donate_argnums=0).lower(state, batch)
    return timing.thread(lowered.compile(dict(options.compiler_options)), state, batch)


def _has_amx() -> bool:
    return CPUINFO.is_file() and "amx_tile" in CPUINFO.read_text()


def _products(options: Options, asked: Steps) -> Result:
    tokens = asked.rows * asked.length
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    weights = [draw(*shape) for shape in _weights(options.sizes)]  # [inner, outer]
    inputs = {size: draw(tokens, size) for size in {size for w in weights for size in w.shape}}

    def multiply(weights: list[jax.Array], inputs: dict[int, jax.Array]) -> list[Any]:
        found = []
        for w in weights:
            x, c = inputs[w.shape[0]], inputs[w.shape[1]]
            found.append((x @ w, c @ w.T, x.T @ c))
        return found

    ours = timing.call(multiply, weights, inputs)
    with _started(options) as process:
        theirs = _asking(process, f"products:{asked.rows},{asked.length}")
        samples = timing.interleave({"ours": ours, "torch": theirs}, options.pairs)
        flops = sum(6.0 * tokens * w.shape[0] * w.shape[1] for w in weights)
        rates = {side: flops / float(np.median(x)) for side, x in samples.items()}
        facts = {"peer": process.describe(), "flops": flops, "flops_per_second": rates}
    name = f"products/T{asked.length}/ours over torch"
    return timing.ratio(name, samples, ("ours", "torch"), **facts)


def _weights(sizes: Sizes) -> list[tuple[int, int]]:
    """(inner, outer) of every matrix of the model: the head once, then the layers."""
    width, ffn_dim = sizes.width, sizes.ffn_dim
    layer = [(width, width)] * 4 + [(width, ffn_dim)] * 2 + [(ffn_dim, width)]
    return [(width, sizes.vocab_size), *layer * sizes.num_layers]


def _generation(options: Options, asked: Prompts) -> Iterator[Result]:
    built = problem.built(options, "softmax")
    params = built.init(0).params
    vocabulary = generate.Vocabulary(options.sizes.vocab_size, -1)  # nothing ends a text
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, options.sizes.vocab_size, (asked.rows, asked.length)).tolist()
    chosen = generate.GenerateOptions(
        max_new_tokens=asked.new, temperature=0.0, top_k=0, top_p=1.0, seed=0
    )

    def ours() -> object:
        return generate.generate(
            built.model, params, prompts, options=chosen, vocabulary=vocabulary
        )

    title = f"B{asked.rows}-{asked.length}+{asked.new}"
    with _started(options) as process:
        theirs = _asking(process, f"generate:{asked.rows},{asked.length},{asked.new}")
        process.describe()
        sides = {"ours": ours, "torch": theirs}
        first = {side: [_seconds(function)] for side, function in sides.items()}
        samples = timing.interleave(sides, min(options.pairs, MOST_GENERATIONS))
        facts: dict[str, Any] = {"peer": process.describe()}
    tokens = asked.rows * asked.new
    facts["tokens_per_second"] = {n: tokens / float(np.median(x)) for n, x in samples.items()}
    sides = ("ours", "torch")
    yield timing.ratio(f"generate/{title}/ours over torch", samples, sides, asked.goal, **facts)
    yield timing.ratio(f"generate/{title}/first, ours over torch", first, sides, FIRST, **facts)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
