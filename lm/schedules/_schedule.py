"""What schedules share: phases, shapes of the decay, and the product that combines them.

    eta(n) = ramp(n) * stable(clip(n, Nw, Ns)) * fall(n)     n: tokens before the update, float32
    ramp(n) = min(n / Nw, 1)
    fall(n) = max(f(x), r),  x = clip((n - Ns) / Nd, 0, 1),  r = final_ratio

Nw is the end of the warmup, Ns the start of the decay, Nd its length. So the warmup rises linearly
to stable(Nw), and the decay starts at stable(Ns) and keeps its last value beyond its end. `ramp` is
exactly 1 after the warmup, and `fall` is exactly 1 before the decay: in between, not even the last
bit depends on the planned length of the run.

Shapes f with f(0) = 1, and f(1) = r except for the last one:

    exponential   A e^-x + B                    published code of Power (arXiv 2408.13359) [C]
    linear        1 - (1 - r) x
    sqrt          1 - (1 - r) sqrt(x)           1-sqrt (arXiv 2405.18392) [S]
    cosine        r + (1 - r) (1 + cos(pi x)) / 2
    geometric     r^x, for r > 0                anneal of infinite schedules (arXiv 2403.08763) [S]
    half_life     0.5^((n - Ns) / half_life)    MiniCPM (arXiv 2404.06395) [P]; 5,000 steps there

optax has linear_schedule, cosine_decay_schedule and exponential_decay (geometric). They compile
their lengths in, and count steps as integers; the tests compare these shapes with them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

Fall = Callable[[jax.Array, float], jax.Array]  # x in [0, 1], final ratio -> factor


def _dropping(drop: Callable[[jax.Array], jax.Array]) -> Fall:
    """A fall from a `drop` that rises from 0 to 1."""
    return lambda x, final_ratio: 1.0 - np.float32(1.0 - final_ratio) * drop(x)


FALLS: Mapping[str, Fall] = {
    "exponential": _dropping(lambda x: -jnp.expm1(-x) / np.float32(-math.expm1(-1.0))),
    "linear": _dropping(lambda x: x),
    "sqrt": _dropping(jnp.sqrt),
    "cosine": _dropping(lambda x: jnp.square(jnp.sin(x * np.float32(math.pi / 2)))),
    "geometric": lambda x, final_ratio: jnp.exp(x * np.float32(math.log(final_ratio))),
}


def halving(half_lives: float) -> Partial:
    """A fall that halves the rate this many times, whatever the final ratio."""
    # A rate that is halved 200 times is 0 in float32.
    return Partial(_halved, np.float32(min(half_lives, 200.0)))


def _halved(half_lives: Any, x: jax.Array, final_ratio: float) -> jax.Array:
    del final_ratio  # it is the floor, which is the same for all falls
    return jnp.exp2(-half_lives * x)


class Run(NamedTuple):
    """Where a schedule is used. `decay_start` is the tokens at the checkpoint from which a decay
    branches, at the rate that the trunk had there. `tokens` then only defines a warmup given in
    percent.
    """

    tokens: float
    tokens_per_step: int
    decay_start: float | None = None


class Phases(NamedTuple):
    """The ends and starts of the phases in tokens. Without a decay, decay_start equals decay_end. A
    phase shorter than one token does not exist.
    """

    warmup_end: float
    decay_start: float
    decay_end: float


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["warmup_end", "warmup_rate", "decay_start", "decay_rate", "stable", "fall"],
    meta_fields=["final_ratio", "has_warmup", "has_decay"],
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Curve:
    """tokens -> learning rate, both float32. Its float32 numbers are arguments of compiled code, so
    schedules that differ only in rates and lengths share one compilation. Compiled in are which
    phases exist, the shape of the decay and its final ratio. Lengths are stored as 1 / tokens for
    equal bits: XLA divides by a constant in this way, but not by an argument.
    """

    warmup_end: Any
    warmup_rate: Any
    decay_start: Any
    decay_rate: Any
    stable: Partial
    fall: Partial
    final_ratio: float
    has_warmup: bool
    has_decay: bool

    def __call__(self, tokens: ArrayLike) -> jax.Array:
        tokens = jnp.asarray(tokens, jnp.float32)
        rate = self.stable(jnp.clip(tokens, self.warmup_end, self.decay_start))
        if self.has_warmup:
            rate = rate * jnp.minimum(tokens * self.warmup_rate, 1.0)
        if self.has_decay:
            x = jnp.clip((tokens - self.decay_start) * self.decay_rate, 0.0, 1.0)
            factor = self.fall(x, self.final_ratio)
            # Rounding may end slightly below the floor.
            rate = rate * jnp.maximum(factor, np.float32(self.final_ratio))
        return rate


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Schedule:
    """tokens -> learning rate, both float32; works on arrays, and under jit and vmap. `stable` is a
    `jax.tree_util.Partial` of a function of its numbers and of the tokens. A function that contains
    its numbers works too, but is compiled for each schedule. `shape` names a fall, or is one. With
    `is_whole`, `stable` is the rate at all tokens, warmup and decay included; the phases then only
    say where these are.
    """

    phases: Phases
    peak: float
    stable: Callable[[jax.Array], jax.Array]
    shape: str | Fall
    final_ratio: float
    is_whole: bool = False

    @property
    def has_decay(self) -> bool:
        return self.phases.decay_end > self.phases.decay_start and self.final_ratio < 1.0

    def last_before_decay(self, steps_of: Callable[[float], float]) -> int | None:
        """The last step at which the decay could still start from elsewhere: none of its updates is
        made, and the first is due. None without a decay. `steps_of`: tokens -> steps.
        """
        return int(steps_of(self.phases.decay_start) + 1e-6) if self.has_decay else None

    def is_decayed(self, tokens: float, tokens_per_step: int) -> bool:
        """Whether the weights at `tokens` contain an update of the decay. The last step took
        `tokens_per_step`, so its update was made that many tokens earlier; at `decay_start` itself
        the factor of the decay is 1.
        """
        last, start = tokens / tokens_per_step - 1, self.phases.decay_start / tokens_per_step
        return self.has_decay and last > start + 1e-6

    @property
    def curve(self) -> Curve:
        warmup_end, decay_start, decay_end = self.phases
        if self.is_whole:
            warmup_end, decay_start, decay_end = 0.0, math.inf, math.inf
        has_decay = not self.is_whole and decay_end - decay_start >= 1
        fall = FALLS[self.shape] if isinstance(self.shape, str) else self.shape
        return Curve(
            warmup_end=np.float32(warmup_end),
            warmup_rate=inverse(warmup_end),
            decay_start=np.float32(decay_start),
            decay_rate=inverse(decay_end - decay_start if has_decay else 0.0),
            stable=_partial(self.stable),
            fall=_partial(fall),
            final_ratio=self.final_ratio,
            has_warmup=warmup_end >= 1,
            has_decay=has_decay,
        )

    def __call__(self, tokens: ArrayLike) -> jax.Array:
        return self.curve(tokens)


def _partial(function: Callable[..., jax.Array]) -> Partial:
    return function if isinstance(function, Partial) else Partial(function)


def inverse(length: float) -> np.float32:
    """1 / length in tokens; 0 for a phase that does not exist."""
    return np.float32(1 if length >= 1 else 0) / np.float32(max(length, 1))


def flat(rate: float) -> Partial:
    """A stable phase at this rate."""
    return Partial(_constant, np.float32(rate))


def _constant(rate: Any, tokens: jax.Array) -> jax.Array:
    return jnp.full_like(tokens, rate)
