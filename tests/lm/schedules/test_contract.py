"""What every schedule must be, over all files of lm/schedules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.families import SCHEDULES
from lm.schedules import Run

TOKENS, PER_STEP = 4096 * 2000, 4096


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_a_rate_is_a_finite_float32_of_tokens(name: str) -> None:
    rule = SCHEDULES.create({"family": name, "peak_learning_rate": 0.01}, "schedule")
    told = rule.misfit(run_tokens=TOKENS, tokens_per_step=PER_STEP, is_branch=False)
    assert told is None, "the defaults of a schedule must fit a run of 2,000 steps"
    schedule = rule.schedule(Run(TOKENS, PER_STEP))
    n = jnp.linspace(0, 1.1 * TOKENS, 257, dtype=jnp.float32)
    with jax.debug_nans(True):
        rates = np.asarray(jax.jit(schedule)(n))
    assert rates.dtype == np.float32
    assert (rates >= 0).all()
    assert rates.max() <= 0.01 * (1 + 1e-6), "peak_learning_rate is the largest rate"
    assert rates.max() > 0
    each = np.asarray([float(schedule(x)) for x in n[::32]])
    np.testing.assert_allclose(rates[::32], each, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_a_rate_scales_with_its_peak(name: str) -> None:
    """What muP and a sweep over rates rely on, in the warmup at least."""
    n = jnp.float32(PER_STEP)
    low, high = (
        float(
            SCHEDULES.create({"family": name, "peak_learning_rate": peak}, "s").schedule(
                Run(TOKENS, PER_STEP)
            )(n)
        )
        for peak in (1e-4, 2e-4)
    )
    assert high == pytest.approx(2 * low, rel=1e-5)
