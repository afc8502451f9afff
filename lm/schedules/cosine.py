"""Cosine: linear warmup, then half a cosine from the peak to final_ratio * peak (arXiv 1608.03983).

`decay` is the horizon: where, counted from the start of the run, warmup included, the cosine ends.
"100 percent" is the usual schedule, a longer horizon cuts the cosine short (OLMo 2), a shorter one
leaves a constant floor. `decay_shape` must be "cosine". No stable phase, hence no branching.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ScheduleConfig, UserError
from lm.schedules._schedule import Phases, Run, Schedule


def create(config: ScheduleConfig, run: Run) -> Schedule:
    lengths = {"run_tokens": run.tokens, "tokens_per_step": run.tokens_per_step}
    warmup_end, horizon = config.warmup.tokens(**lengths), config.decay.tokens(**lengths)
    if config.decay_shape != "cosine":
        raise UserError(
            f"schedule.decay_shape={config.decay_shape!r} with schedule.family='cosine'; "
            "set it to 'cosine'"
        )
    if run.decay_start is not None:
        raise UserError(
            "schedule.decay_from with schedule.family='cosine', which has no stable phase; "
            "set family to power or wsd"
        )
    if horizon <= warmup_end:
        raise UserError(
            f"schedule.decay={config.decay} ends the cosine at {horizon:.0f} tokens, within "
            f"schedule.warmup={config.warmup}; set decay to '100 percent'"
        )
    peak = np.float32(config.peak_learning_rate)

    def stable(tokens: jax.Array) -> jax.Array:
        return jnp.full_like(tokens, peak)

    return Schedule(
        phases=Phases(warmup_end, warmup_end, horizon),
        peak=config.peak_learning_rate,
        stable=stable,
        shape="cosine",
        final_ratio=config.final_ratio,
    )
