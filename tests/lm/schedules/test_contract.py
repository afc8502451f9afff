"""What every schedule in lm/schedules must be."""

from __future__ import annotations

import dataclasses
import itertools
import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.families import SCHEDULES
from lm.mapping import Duration, UserError
from lm.schedules import Rule, Run, Schedule

TOKENS, PER_STEP = 4096 * 2000, 4096

# Extreme values of an option by its type. Those that its marks or `problem` refuse are left out.
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
    """Extreme values of every option that the schedule accepts while the other options are
    defaults.
    """
    member = SCHEDULES.find(name, "schedule")
    hints, found = typing.get_type_hints(member), {}
    for field in dataclasses.fields(member):
        if hints[field.name] is Duration:
            values: list[typing.Any] = [*DURATIONS]
        elif typing.get_origin(hints[field.name]) is typing.Literal:
            values = [*typing.get_args(hints[field.name])]
        elif typing.get_origin(hints[field.name]) is tuple:
            kinds = DURATIONS if typing.get_args(hints[field.name])[0] is Duration else FLOATS
            default: typing.Any = field.default
            values = [default, *itertools.combinations(kinds, len(default))]
            values = [[str(x) if isinstance(x, Duration) else x for x in xs] for xs in values]
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
    """Every extreme value with the defaults, and 60 combinations of extreme values."""
    values, random = corners(name), np.random.default_rng(0)
    alone = [{key: value} for key, some in values.items() for value in some]
    mixed = [
        {key: some[random.integers(len(some))] for key, some in values.items()} for _ in range(60)
    ]
    return [options for options in alone + mixed if is_taken(name, options)]


def spans(rule: Rule, run_tokens: float) -> list[float]:
    """The lengths in tokens of all durations of the rule, and what each leaves of the run."""
    found = [getattr(rule, field.name) for field in dataclasses.fields(rule)]
    lengths = {"run_tokens": run_tokens, "tokens_per_step": PER_STEP}
    own = [x.tokens(**lengths) for x in found if isinstance(x, Duration)]
    return own + [run_tokens - x for x in own]


def check_curve(schedule: Schedule, rule: Rule, run_tokens: float, message: str) -> None:
    """At the borders of its phases, the curve is finite, not negative and at most the peak. It does
    not jump there if the rule is continuous.
    """
    peak = rule.peak_learning_rate
    borders = [x for x in schedule.phases if 2.0**12 <= x < 1e30]
    sides = [float(np.float32(x * (1 + s))) for x in borders for s in (-(2.0**-20), 0.0, 2.0**-20)]
    grid = [0.0, 1.0, PER_STEP, 0.5 * run_tokens, run_tokens, 1e18]
    n = np.zeros(15, np.float32)
    n[: len(grid) + len(sides)] = grid + sides
    rates = np.asarray(jitted(schedule.curve, n), np.float64)
    assert np.isfinite(rates).all(), message
    assert (rates >= 0).all(), message
    assert rates.max() <= peak * (1 + 1e-6), message
    for i in range(len(borders)):
        before, at, after = rates[len(grid) + 3 * i : len(grid) + 3 * i + 3]
        lengths = [schedule.phases.decay_end - schedule.phases.decay_start]
        lengths += spans(rule, run_tokens)
        steep = any(0 < x < 2.0**-8 * borders[i] for x in lengths)
        assert (
            steep or not rule.is_continuous or max(abs(at - before), abs(after - at)) <= 2e-2 * peak
        ), message


@jax.jit
def jitted(curve: typing.Any, n: jax.Array) -> jax.Array:
    return curve(n)


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_every_corner_is_a_curve_or_refused(name: str) -> None:
    """For runs and branches, short and long, options that `misfit` accepts give a valid curve."""
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
        check_curve(schedule, rule, run_tokens, f"{options} {start}")
        curves += 1
    assert curves > 50


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_a_rate_is_a_finite_float32_of_tokens(name: str) -> None:
    rule = SCHEDULES.create({"family": name, "peak_learning_rate": 0.01}, "schedule")
    message = rule.misfit(run_tokens=TOKENS, tokens_per_step=PER_STEP, is_branch=False)
    assert message is None, "the defaults of a schedule must fit a run of 2,000 steps"
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
    """muP and sweeps over rates rely on this, at least in the warmup."""
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


def create(name: str, run: Run, **options: typing.Any) -> Schedule:
    return SCHEDULES.create({"family": name} | options, "schedule").schedule(run)


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_rates_and_lengths_are_arguments_of_one_program(name: str) -> None:
    n = np.float32(0)
    one, other = (
        jax.jit(lambda curve, n: curve(n)).lower(made.curve, n).as_text()
        for made in (
            create(name, Run(TOKENS, PER_STEP)),
            create(name, Run(3 * TOKENS, 2 * PER_STEP), peak_learning_rate=0.003),
        )
    )
    assert one == other


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_a_run_that_is_resumed_has_the_curve_of_its_configuration(name: str) -> None:
    """The values in config.json give the same bits; so does a curve evaluated in two parts."""
    rule = SCHEDULES.create({"family": name}, "schedule")
    again = SCHEDULES.create(json.loads(json.dumps(SCHEDULES.to_mapping(rule))), "schedule")
    assert again == rule
    n = np.arange(2001, dtype=np.float32) * PER_STEP
    whole, parts = (x.schedule(Run(TOKENS, PER_STEP)).curve for x in (rule, again))
    np.testing.assert_array_equal(jitted(whole, n)[1000:], jitted(parts, n[1000:]))


@pytest.mark.parametrize("name", [x for x in SCHEDULES.names() if x != "power"])
def test_a_rate_depends_on_tokens_and_not_on_steps(name: str) -> None:
    """Power is the exception, as its law depends on the batch in tokens, however it is divided."""
    n = np.linspace(0, TOKENS, 64, dtype=np.float32)
    one, other = (create(name, Run(TOKENS, k * PER_STEP)).curve for k in (1, 2))
    np.testing.assert_array_equal(jitted(one, n), jitted(other, n))


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_a_longer_plan_has_the_same_bits_until_the_decay(name: str) -> None:
    rule = SCHEDULES.find(name, "schedule")
    if not rule.can_branch:
        pytest.skip("its curve depends on the length of the run from the first step")
    short, long = (create(name, Run(k * TOKENS, PER_STEP)) for k in (1, 2))
    start = short.phases.decay_start
    n = np.arange(2000, dtype=np.float32) * PER_STEP
    a, b = jitted(short.curve, n), jitted(long.curve, n)
    np.testing.assert_array_equal(a[n <= start], b[n <= start])
    assert (a[n > start] < b[n > start]).all()
    branch = create(name, Run(4 * TOKENS, PER_STEP, start))
    assert branch.phases == short.phases
    np.testing.assert_array_equal(jitted(branch.curve, n), a)
