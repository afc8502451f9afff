"""What the families of schedules share: phases, shapes of the decay, the product that joins them.

    eta(n) = ramp(n) * stable(clip(n, Nw, Ns)) * fall(n)     n: tokens before the update, float32
    ramp(n) = min(n / Nw, 1)
    fall(n) = 1 - (1 - r) * drop(x),  x = clip((n - Ns) / Nd, 0, 1),  r = final_ratio

Nw is the end of the warmup, Ns the start of the decay, Nd its length. So the warmup rises linearly
to stable(Nw), the decay starts at stable(Ns) and stays at its last value beyond its end. `ramp` is
exactly 1 after the warmup and `fall` exactly 1 before the decay: in between, not even the last bit
depends on how long the run is planned.

`drop` rises from 0 to 1. "exponential" is the affine exponential of the Power scheduler's published
code, f(x) = A e^-x + B with f(0) = 1, f(1) = r (arXiv 2408.13359); "sqrt" is the 1-sqrt of arXiv
2405.18392.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lm.config import ScheduleConfig, UserError

DROPS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "exponential": lambda x: -jnp.expm1(-x) / np.float32(-math.expm1(-1.0)),
    "linear": lambda x: x,
    "sqrt": jnp.sqrt,
    "cosine": lambda x: jnp.square(jnp.sin(x * np.float32(math.pi / 2))),
}


class Run(NamedTuple):
    """Where a schedule is used. `decay_start`: tokens at the checkpoint a decay branches from."""

    tokens: float
    tokens_per_step: int
    decay_start: float | None


class Phases(NamedTuple):
    """Ends and starts of the phases in tokens; without a decay, decay_start equals decay_end."""

    warmup_end: float
    decay_start: float
    decay_end: float


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Schedule:
    """tokens -> learning rate, both float32; works on arrays and under jit and vmap."""

    phases: Phases
    peak: float
    stable: Callable[[jax.Array], jax.Array]
    shape: str
    final_ratio: float

    def __call__(self, tokens: ArrayLike) -> jax.Array:
        warmup_end, decay_start, decay_end = self.phases
        tokens = jnp.asarray(tokens, jnp.float32)
        rate = self.stable(jnp.clip(tokens, np.float32(warmup_end), np.float32(decay_start)))
        if warmup_end > 0:
            rate = rate * jnp.minimum(tokens / np.float32(warmup_end), 1.0)
        if decay_end > decay_start:
            x = (tokens - np.float32(decay_start)) / np.float32(decay_end - decay_start)
            rate = rate * fall(
                jnp.clip(x, 0.0, 1.0), shape=self.shape, final_ratio=self.final_ratio
            )
        return rate


def fall(x: jax.Array, *, shape: str, final_ratio: float) -> jax.Array:
    """The factor of the decay at progress x in [0, 1]: 1 at 0, `final_ratio` at 1, never less."""
    factor = 1.0 - np.float32(1.0 - final_ratio) * DROPS[shape](x)
    return jnp.maximum(factor, np.float32(final_ratio))  # rounding may end a hair below


def warmup_stable_decay(
    config: ScheduleConfig, run: Run, stable: Callable[[jax.Array], jax.Array]
) -> Schedule:
    """The schedule of a family that has a stable phase, from which a decay may branch.

    Raises:
      UserError: the branch point lies inside the warmup.
    """
    warmup_end = config.warmup.tokens(run_tokens=run.tokens, tokens_per_step=run.tokens_per_step)
    if run.decay_start is None:
        decay = config.decay.tokens(run_tokens=run.tokens, tokens_per_step=run.tokens_per_step)
        phases = Phases(warmup_end, float(run.tokens) - decay, float(run.tokens))
    else:
        if run.decay_start < warmup_end:
            raise UserError(
                f"schedule.decay_from has seen {run.decay_start:.0f} tokens, schedule.warmup="
                f"{config.warmup} ends at {warmup_end:.0f}; branch from a later checkpoint"
            )
        end = branch_tokens(config, run.decay_start, run.tokens_per_step)
        phases = Phases(warmup_end, float(run.decay_start), float(end))
    return Schedule(
        phases=phases,
        peak=config.peak_learning_rate,
        stable=stable,
        shape=config.decay_shape,
        final_ratio=config.final_ratio,
    )


def branch_tokens(config: ScheduleConfig, decay_start: float, tokens_per_step: int) -> int:
    """Total tokens of a run that decays from a checkpoint at `decay_start` tokens.

    The decay takes `config.decay`, rounded up to whole steps; percent counts in the whole branched
    run, decay_start plus the decay.
    """
    decay = config.decay
    if decay.unit == "percent":
        assert 0 < decay.value < 100, (
            f"{decay=}: lm.config.validate lets only (0, 100) percent through"
        )
        tokens = decay_start * decay.value / (100.0 - decay.value)
    else:
        tokens = decay.tokens(run_tokens=decay_start, tokens_per_step=tokens_per_step)
    # A ratio such as 3.0000000000000004 is 3 steps.
    steps = max(1, math.ceil(round(tokens / tokens_per_step, 6)))
    return int(decay_start) + steps * tokens_per_step
