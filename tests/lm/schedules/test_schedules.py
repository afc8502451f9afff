"""Schedules against published numbers and a float64 formula; longer runs and branches agree."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import schedules
from lm.families import SCHEDULES
from lm.mapping import Duration, UserError

STEP_1024 = 1024 * 4096  # tokens of a step of the published batch


def config(family: str = "power", **changes: typing.Any) -> typing.Any:
    """A schedule without a warmup and, except for cosine, with a decay over the last tenth."""
    base = {} if family == "cosine" else {"decay": "10 percent"}
    values = {"family": family, "warmup": "0 tokens", **base, **changes}
    return SCHEDULES.create(values, "schedule")


def create(
    rule: typing.Any, run_tokens: float, tokens_per_step: int, decay_start: float | None = None
) -> schedules.Schedule:
    return rule.schedule(schedules.Run(run_tokens, tokens_per_step, decay_start))


def power_at(n: float, *, batch: float, **changes: typing.Any) -> float:
    """The stable phase of Power, without warmup and decay."""
    return float(create(config(decay="0 steps", **changes), 1e15, int(batch * 4096))(n))


def restated(n: np.ndarray, c: typing.Any, *, batch: float, phases: schedules.Phases) -> np.ndarray:
    """The formula of Power in float64, with an exponential decay."""
    warmup, start, end = phases
    law = lambda m: np.minimum(c.peak_learning_rate, batch * c.a * np.maximum(m, 1e-9) ** c.b)
    r, e = c.final_ratio, np.e
    x = np.clip((n - start) / (end - start), 0, 1)
    decay = ((1 - r) * e / (e - 1) * np.exp(-x) + (r * e - 1) / (e - 1)) * law(start)
    return np.where(n < warmup, n / warmup * law(warmup), np.where(n <= start, law(n), decay))


def test_an_unknown_schedule_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"unknown schedule 'powr'; did you mean 'power'"):
        config("powr")


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(32, 2.9047e7), (128, 4.4016e8), (256, 1.7134e9), (512, 6.6699e9), (1024, 2.5964e10)],
)
def test_power_knee(batch: int, expected: float) -> None:
    assert config().knee(batch * 4096) == pytest.approx(expected, rel=1e-4)
    assert power_at(0.99 * expected, batch=batch) == np.float32(0.02)
    assert power_at(1.01 * expected, batch=batch) < 0.02 * (1 - 4e-3)


@pytest.mark.parametrize("b", [-0.51, -0.2, -0.1, -0.05, -1e-4, -1e-37])
@pytest.mark.parametrize("a", [4.0, 1e-5, 1e-30])
def test_power_is_its_formula_however_flat(a: float, b: float) -> None:
    """This holds even where the knee overflows a float or lies before the first token."""
    for n in (1.0, 1e9, 1e13):
        assert power_at(n, batch=256, a=a, b=b) == pytest.approx(
            min(0.02, 256 * a * n**b), rel=2e-6
        )
    assert 0 < power_at(0.0, batch=256, a=a, b=b) <= 0.02


def test_a_law_below_float32_is_refused() -> None:
    text = config(a=1e-37).misfit(run_tokens=10**9, tokens_per_step=4, is_branch=False)
    assert text is not None
    assert "schedule.a=1e-37 with 4 tokens a step" in text
    assert "raise a" in text


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1e11, 1.005449e-2),
        (1e12, 3.107134e-3),
        (1.25e12, 2.772910e-3),
        (2.5e12, 1.947200e-3),
        (1e13, 9.601961e-4),
        (1.2e13, 8.749385e-4),
    ],
)
def test_power_published_values(tokens: float, expected: float) -> None:
    assert power_at(tokens, batch=1024) == pytest.approx(expected, rel=1e-6)


def test_power_value_printed_in_the_paper() -> None:
    assert power_at(1e13, batch=1024, a=4.6) == pytest.approx(1.104e-3, rel=1e-3)


def test_power_is_homogeneous_in_the_batch_and_has_slope_b() -> None:
    assert power_at(1e12, batch=768) == pytest.approx(3 * power_at(1e12, batch=256), rel=1e-6)
    low, high = power_at(1e11, batch=256), power_at(1e13, batch=256)
    assert np.log(high / low) / np.log(1e13 / 1e11) == pytest.approx(-0.51, abs=1e-6)


def test_power_depends_on_tokens_per_step_not_on_its_factors() -> None:
    assert power_at(1e11, batch=1024) == power_at(1e11, batch=512 * 8192 / 4096)


@pytest.mark.parametrize("final_ratio", [0.0, 0.1])
def test_float32_agrees_with_float64(final_ratio: float) -> None:
    c = config(warmup="1e9 tokens", decay="20 percent", final_ratio=final_ratio)
    schedule = create(c, run_tokens=1e13, tokens_per_step=STEP_1024)
    n = np.concatenate([[0.0], np.geomspace(1e6, 8e12, 400), np.linspace(8e12, 1.1e13, 200)])
    n = n.astype(np.float32).astype(np.float64)
    expected = restated(n, c, batch=1024.0, phases=schedule.phases)
    got = np.asarray(schedule(n), np.float64)
    stable = n <= schedule.phases.decay_start
    np.testing.assert_allclose(got[stable], expected[stable], rtol=1e-6)
    # In the decay the error is relative to the rate at its start: x is as coarse as a float32 n.
    np.testing.assert_allclose(got[~stable], expected[~stable], rtol=1e-6, atol=2e-6 * 1.1e-3)


def test_granite_warmup_to_the_peak_coincides_before_the_knee() -> None:
    warmup = 2500 * STEP_1024
    schedule = create(config(warmup="2500 steps"), run_tokens=1.2e13, tokens_per_step=STEP_1024)
    assert warmup < config().knee(STEP_1024)
    n = np.linspace(0, warmup, 11, dtype=np.float32)
    np.testing.assert_allclose(schedule(n), n / warmup * 0.02, rtol=1e-6)


def test_warmup_past_the_knee_rises_to_the_law_not_to_the_peak() -> None:
    schedule = create(config(warmup="1e11 tokens"), run_tokens=1e13, tokens_per_step=STEP_1024)
    assert float(schedule(1e11)) == pytest.approx(1.005449e-2, rel=1e-6)
    assert float(schedule(5e10)) == pytest.approx(1.005449e-2 / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", (0.75, 0.5, 0.25)),
        ("sqrt", (0.5, 0.2929, 0.1340)),
        ("cosine", (0.8536, 0.5, 0.1464)),
        ("exponential", (0.6501, 0.3775, 0.1653)),
    ],
)
@pytest.mark.parametrize("final_ratio", [0.0, 0.2])
@pytest.mark.parametrize("family", ["wsd", "power"])
def test_decay_shapes(
    shape: str, expected: tuple[float, ...], final_ratio: float, family: str
) -> None:
    c = config(family=family, decay="400 tokens", decay_shape=shape, final_ratio=final_ratio)
    schedule = create(c, run_tokens=1000.0, tokens_per_step=10)
    got = np.asarray(schedule(np.array([600.0, 700.0, 800.0, 900.0, 1000.0, 1080.0])))
    got = got / float(schedule(600.0))
    inner = [final_ratio + (1 - final_ratio) * f for f in expected]
    np.testing.assert_allclose(got, [1.0, *inner, final_ratio, final_ratio], atol=5e-5)
    assert (got >= np.float32(final_ratio) * (1 - 1e-6)).all()
    assert (np.diff(got[:5]) < 0).all()


def test_wsd_phases() -> None:
    c = config(family="wsd", peak_learning_rate=0.01, warmup="10 steps", decay_shape="linear")
    schedule = create(c, run_tokens=1000.0, tokens_per_step=10)
    assert schedule.phases == (100.0, 900.0, 1000.0)
    got = schedule(np.array([0.0, 50.0, 100.0, 500.0, 900.0, 950.0]))
    np.testing.assert_allclose(got, [0, 0.005, 0.01, 0.01, 0.01, 0.005], rtol=1e-6)


@pytest.mark.parametrize("family", ["power", "wsd", "cosine"])
def test_rates_are_continuous_between_phases(family: str) -> None:
    decay = {} if family == "cosine" else {"decay": "20 percent", "decay_shape": "linear"}
    c = config(family=family, warmup="1e9 tokens", **decay)
    schedule = create(c, run_tokens=1e11, tokens_per_step=STEP_1024)
    for joint in schedule.phases:
        before, after = np.asarray(schedule(np.array([joint * (1 - 1e-5), joint * (1 + 1e-5)])))
        assert abs(after - before) < 2e-4 * 0.02


@pytest.mark.parametrize("family", ["power", "wsd"])
def test_a_longer_plan_agrees_bit_for_bit_until_the_decay(family: str) -> None:
    tokens_per_step, steps = 8 * 512, 2000
    c = config(family=family, warmup="1e6 tokens", decay="20 percent")
    short, long = (
        jax.jit(create(c, run_tokens=k * steps * tokens_per_step, tokens_per_step=tokens_per_step))
        for k in (1, 2)
    )
    n = jnp.arange(steps, dtype=jnp.float32) * tokens_per_step
    a, b = np.asarray(short(n)), np.asarray(long(n))
    decay_start = int(0.8 * steps)
    assert (a[: decay_start + 1] == b[: decay_start + 1]).all()
    assert (a[decay_start + 1 :] < b[decay_start + 1 :]).all()


@pytest.mark.parametrize("decay", ["20 percent", "400 steps", "1638400 tokens"])
@pytest.mark.parametrize("family", ["power", "wsd"])
def test_a_branch_equals_the_run_planned_for_its_length(family: str, decay: str) -> None:
    tokens_per_step = 4096
    c = config(family=family, warmup="1e6 tokens", decay=decay, final_ratio=0.05)
    start = 1600 * tokens_per_step
    total = schedules.branch_tokens(c.decay, start, tokens_per_step)
    assert total == 2000 * tokens_per_step
    branch = create(c, run_tokens=1e12, tokens_per_step=tokens_per_step, decay_start=start)
    planned = create(c, run_tokens=total, tokens_per_step=tokens_per_step)
    trunk = create(c, run_tokens=1e12, tokens_per_step=tokens_per_step)
    assert branch.phases == planned.phases
    n = jnp.arange(2001, dtype=jnp.float32) * tokens_per_step
    got = np.asarray(branch(n))
    np.testing.assert_array_equal(got, planned(n))
    np.testing.assert_array_equal(got[:1601], np.asarray(trunk(n))[:1601])
    assert got[1601] < got[1600]


def test_branch_length_is_whole_steps() -> None:
    assert schedules.branch_tokens(Duration(10, "percent"), 1000, 10) == 1000 + 120
    assert schedules.branch_tokens(Duration(1, "tokens"), 1000, 10) == 1010
    # 0.2 / 99.8 of 17,964 steps are 36, and 36.00000000000001 in float64.
    assert schedules.branch_tokens(Duration(0.2, "percent"), 17964 * 1536, 1536) == 18000 * 1536


def test_branch_inside_the_warmup_is_refused() -> None:
    c = config(warmup="10 steps")
    with pytest.raises(
        UserError, match=r"decay_from has seen 50 tokens.*ends at 100.*later checkpoint"
    ):
        create(c, run_tokens=1000.0, tokens_per_step=10, decay_start=50.0)


def test_cosine_ends_at_its_horizon() -> None:
    def make(horizon: str) -> schedules.Schedule:
        c = config("cosine", warmup="100 tokens", horizon=horizon, final_ratio=0.1)
        return create(c, run_tokens=1100.0, tokens_per_step=10)

    got = (
        np.asarray(make("100 percent")(np.array([50.0, 100.0, 350.0, 600.0, 1100.0, 1200.0])))
        / 0.02
    )
    mid = lambda f: 0.1 + 0.9 * f
    np.testing.assert_allclose(got, [0.5, 1, mid(0.8536), mid(0.5), 0.1, 0.1], rtol=1e-4)
    assert make("2100 tokens").phases == (100.0, 100.0, 2100.0)
    assert float(make("2100 tokens")(1100.0)) == pytest.approx(0.02 * mid(0.5), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "is_branch", "message"),
    [
        ({"horizon": "5 steps"}, False, "schedule.horizon=5 steps ends the decay at 50 tokens"),
        ({"warmup": "100 steps"}, False, "set a longer horizon or a shorter warmup"),
        ({}, True, "decay_from with schedule.family='cosine', which has no stable phase"),
    ],
)
def test_cosine_refuses_bad_phases(
    changes: dict[str, typing.Any], is_branch: bool, message: str
) -> None:
    rule = config("cosine", **{"warmup": "10 steps"} | changes)
    text = rule.misfit(run_tokens=1000, tokens_per_step=10, is_branch=is_branch)
    assert message in text


def test_cosine_has_no_decay_shape() -> None:
    with pytest.raises(UserError, match=r"unknown option schedule\.decay_shape"):
        config("cosine", decay_shape="linear")


@pytest.mark.parametrize("family", ["power", "wsd", "cosine"])
@pytest.mark.parametrize("warmup", ["0 steps", "10 steps"])
def test_rates_are_never_nan(family: str, warmup: str) -> None:
    decay = {} if family == "cosine" else {"decay": "20 percent", "decay_shape": "cosine"}
    c = config(family=family, warmup=warmup, **decay)
    schedule = create(c, run_tokens=1e13, tokens_per_step=STEP_1024)
    with jax.debug_nans(True):
        first = float(jax.jit(schedule)(jnp.float32(0.0)))
        assert float(jax.jit(schedule)(jnp.float32(1e13))) < 1e-8
    assert first == (np.float32(0.02) if warmup == "0 steps" else 0.0)


def test_float32_in_and_out_under_jit_and_vmap() -> None:
    schedule = create(config(), run_tokens=1e13, tokens_per_step=STEP_1024)
    n = jnp.linspace(0, 1e13, 7, dtype=jnp.float32)
    got = jax.jit(jax.vmap(schedule))(n)
    assert got.dtype == jnp.float32
    assert schedule(jnp.asarray(5, jnp.int32)).dtype == jnp.float32
    np.testing.assert_allclose(got, [float(schedule(x)) for x in n], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", ["wsd", "power"])
def test_a_decay_by_half_lives(family: str) -> None:
    """MiniCPM decays so: after five half-lives 0.031 is left. The final ratio is the floor."""
    rule = config(family, decay="1000 tokens", decay_shape="half_life", half_life="20 steps")
    schedule = create(rule, run_tokens=2000.0, tokens_per_step=10)
    n = np.array([1000.0, 1100, 1200, 1500, 2000, 3000])
    got = np.asarray(schedule(n)) / float(schedule(1000.0))
    np.testing.assert_allclose(got, 0.5 ** np.array([0, 0.5, 1, 2.5, 5, 5]), rtol=1e-6)
    floored = config(
        family, decay="1000 tokens", decay_shape="half_life", half_life="20 steps", final_ratio=0.25
    )
    floor = float(create(floored, run_tokens=2000.0, tokens_per_step=10)(1900.0))
    assert floor == pytest.approx(0.25 * float(schedule(1000.0)), rel=1e-6)


def test_geometric_is_optax_exponential_decay() -> None:
    rule = config("wsd", decay="50 percent", decay_shape="geometric", final_ratio=0.2)
    schedule = create(rule, run_tokens=1000.0, tokens_per_step=1)
    theirs = optax.exponential_decay(0.02, 500, 0.2, transition_begin=500)
    steps = np.arange(0, 1001, 50)
    np.testing.assert_allclose(schedule(steps * 1.0), theirs(steps), rtol=1e-6)


def test_a_geometric_decay_to_zero_is_refused() -> None:
    for family in ("wsd", "power"):
        with pytest.raises(
            UserError, match=r"never reaches final_ratio=0\.0; set final_ratio=0\.1"
        ):
            config(family, decay_shape="geometric")


def test_a_configuration_from_before_half_lives_is_unchanged() -> None:
    before = {
        "family": "wsd",
        "peak_learning_rate": 0.01,
        "warmup": "5 steps",
        "decay": "10 percent",
        "decay_shape": "linear",
        "final_ratio": 0.0,
    }
    assert SCHEDULES.to_mapping(SCHEDULES.create(before, "schedule")) == before
