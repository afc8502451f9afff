"""What every schedule must be, over all files of lm/schedules."""

from __future__ import annotations

import dataclasses
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.families import SCHEDULES
from lm.mapping import Duration, UserError
from lm.schedules import Phases, Run, Schedule

TOKENS, PER_STEP = 4096 * 2000, 4096

# Corners of an option by its kind: those that its marks or `problem` refuse are left out.
FLOATS = (1.2e-38, 1e-10, 1e-4, 0.5, 0.999, 1.0, 30.0, 1e10, 3.4e38)
DURATIONS = (
    "0 tokens",
    "1e-40 tokens",
    "0.3 tokens",
    "1 tokens",
    "1 steps",
    "0.1 percent",
    "50 percent",
    "99.99999999 percent",
    "100 percent",
    "9e15 percent",
    "9e15 tokens",
)


def corners(name: str) -> dict[str, list[typing.Any]]:
    """Values of every option of a schedule, each of which it takes with the others as they are."""
    member = SCHEDULES.find(name, "schedule")
    hints, found = typing.get_type_hints(member), {}
    for field in dataclasses.fields(member):
        if hints[field.name] is Duration:
            values: list[typing.Any] = [*DURATIONS]
        elif typing.get_origin(hints[field.name]) is typing.Literal:
            values = [*typing.get_args(hints[field.name])]
        else:
            assert hints[field.name] is float, f"corners of {field.name}: {hints[field.name]}"
            values = [0.0, *FLOATS, *(-x for x in FLOATS)]
        found[field.name] = [value for value in values if is_taken(name, {field.name: value})]
        assert found[field.name], field.name
    return found


def is_taken(name: str, options: dict[str, typing.Any]) -> bool:
    try:
        SCHEDULES.create({"family": name} | options, "schedule")
    except UserError:
        return False
    return True


def cases(name: str) -> list[dict[str, typing.Any]]:
    """Every corner with the defaults, and 60 combinations of corners."""
    values, random = corners(name), np.random.default_rng(0)
    alone = [{key: value} for key, some in values.items() for value in some]
    mixed = [
        {key: some[random.integers(len(some))] for key, some in values.items()} for _ in range(60)
    ]
    return [options for options in alone + mixed if is_taken(name, options)]


def check_curve(schedule: Schedule, peak: float, run_tokens: float, told: str) -> None:
    """At all its borders finite, not negative, at most the peak, and without a jump."""
    borders = [x for x in schedule.phases if 2.0**12 <= x < 1e30]
    sides = [float(np.float32(x * (1 + s))) for x in borders for s in (-(2.0**-20), 0.0, 2.0**-20)]
    grid = [0.0, 1.0, PER_STEP, 0.5 * run_tokens, run_tokens, 1e18]
    n = np.zeros(15, np.float32)
    n[: len(grid) + len(sides)] = grid + sides
    rates = np.asarray(jitted(schedule.curve, n), np.float64)
    assert np.isfinite(rates).all(), told
    assert (rates >= 0).all(), told
    assert rates.max() <= peak * (1 + 1e-6), told
    for i in range(len(borders)):
        before, at, after = rates[len(grid) + 3 * i : len(grid) + 3 * i + 3]
        steep = phases_end_within(schedule.phases, 2.0**-8 * borders[i])
        assert steep or max(abs(at - before), abs(after - at)) <= 2e-2 * peak, told


def phases_end_within(phases: Phases, tokens: float) -> bool:
    """Whether the decay is so short that it is a fall."""
    return phases.decay_end - phases.decay_start < tokens


@jax.jit
def jitted(curve: typing.Any, n: jax.Array) -> jax.Array:
    return curve(n)


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_every_corner_is_a_curve_or_refused(name: str) -> None:
    """As a run and as a branch, short and long: what `misfit` lets through is a learning rate."""
    curves = 0
    for options, (run_tokens, start) in itertools.product(
        cases(name), [(TOKENS, None), (2.0**60, None), (TOKENS, 0.5 * TOKENS)]
    ):
        rule = SCHEDULES.create({"family": name} | options, "schedule")
        fits = rule.misfit(
            run_tokens=int(run_tokens), tokens_per_step=PER_STEP, is_branch=start is not None
        )
        if fits is not None:
            continue
        try:
            schedule = rule.schedule(Run(run_tokens, PER_STEP, start))
        except UserError:
            continue
        check_curve(schedule, rule.peak_learning_rate, run_tokens, f"{options} {start}")
        curves += 1
    assert curves > 50


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
