"""Fits: the solver against scipy, constants recovered from data made by a law, intervals, warnings
and refusals.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from lm.fits import fit, select, solve
from lm.fits.fit import Fitted
from lm.fits.select import Selected
from lm.laws.chinchilla import Chinchilla
from lm.laws.compute import Compute
from lm.laws.over_training import OverTraining
from lm.laws.power import Power
from lm.laws.step_law import StepLaw
from lm.mapping import UserError
from tests.lm.fits import sweeps
from tests.lm.fits.test_select import made

TRUE = Power()
EQUATION = Power.equations[0]


def losses(law: Chinchilla, count: int, noise: float, seed: int) -> Selected:
    """Losses of models of random sizes and lengths, four for each trunk."""
    rng = np.random.default_rng(seed)
    n, d = (
        np.exp(rng.uniform(np.log(lo), np.log(hi), count)) for lo, hi in ((1e7, 1e9), (1e9, 1e11))
    )
    loss = law.loss(n, d) * np.exp(noise * rng.normal(size=count))
    columns = {"loss": loss, "body_parameters": n, "tokens": d, "compute": 6 * n * d}
    return Selected(columns, tuple(frozenset([str(i // 4)]) for i in range(count)), ())


@pytest.mark.parametrize("noise", [0.0, 5e-3])
def test_the_solver_finds_what_scipy_finds(noise: float) -> None:
    """L-BFGS-B on the same Huber loss, started at the truth, does not get lower."""
    law, given = Chinchilla(), losses(Chinchilla(), 150, noise, 0)
    equation = Chinchilla.equations[0]
    logs = np.log(given.columns["loss"])
    data = solve.Data({name: given.columns[name] for name in equation.reads}, logs)
    found = solve.full(equation, data, np.ones(150))

    def huber(theta: np.ndarray) -> float:
        E, A, alpha, B, beta = equation.to_values(theta)
        n, d = given.columns["body_parameters"], given.columns["tokens"]
        size = np.abs(logs - np.log(E + A / n**alpha + B / d**beta))
        return float(np.sum(np.where(size < 1e-3, size**2 / 2, 1e-3 * (size - 5e-4))))

    truth = equation.to_theta(dataclasses.asdict(law))
    other = minimize(huber, truth, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-12})
    assert found.cost[0] == pytest.approx(huber(found.theta[0]), abs=1e-12)
    assert found.cost[0] <= other.fun * (1 + 1e-6) + 1e-15
    if not noise:
        np.testing.assert_allclose(
            equation.to_values(found.theta[0]), dataclasses.astuple(law), 1e-6
        )


def test_over_training_and_compute_are_recovered() -> None:
    rng = np.random.default_rng(3)
    compute, ratio = np.exp(rng.uniform((39, 1.6), (48, 6.5), (80, 2))).T
    law = OverTraining()
    columns = {
        "compute": compute,
        "tokens_per_parameter": ratio,
        "loss": law.loss(compute, ratio),
    }
    trunks = tuple(frozenset([str(i)]) for i in range(80))
    found = fit.fit(law.equations[0], Selected(columns, trunks, ()), bootstraps=0)
    for name in ("E", "a", "b", "eta"):
        assert found.values[name] == pytest.approx(getattr(law, name), rel=1e-4), name
    other = Compute(E=1.6, K=400.0, alpha=0.13)
    columns |= {"loss": other.loss(compute)}
    found = fit.fit(other.equations[0], Selected(columns, trunks, ()), bootstraps=0)
    assert found.values == pytest.approx({"E": 1.6, "K": 400.0, "alpha": 0.13}, rel=1e-4)


def test_power_from_a_sweep_whose_optima_are_known() -> None:
    law = Power(a=0.5, b=-0.4, c=0.5)
    found = fit.fit(EQUATION, select.select(made(sweeps.rows(law)), "vertex"), bootstraps=200)
    assert found.values == pytest.approx({"a": 0.5, "b": -0.4, "c": 0.5}, rel=0.05)
    assert [left.scale for left in found.left_out] == ["width=64", "width=128"]
    assert all(left.without < 0.05 for left in found.left_out)
    assert found.warnings == ()


def test_step_law_from_its_near_optimal_set() -> None:
    rng = np.random.default_rng(0)
    law, rows = StepLaw(), []
    for n in (6e7, 2e8, 6e8):
        for d in (2e9, 1e10, 5e10):
            for i, j in np.ndindex(13, 11):
                rate, batch = (
                    law.rate(n, d) * 2.0 ** (i / 2 - 3),
                    law.batch(d) * 2.0 ** (j / 2 - 2.5),
                )
                offset = np.log(rate / law.rate(n, d)) ** 2 + np.log(batch / law.batch(d)) ** 2
                loss = 2.5 + 0.004 * offset + 1e-5 * rng.normal()
                row = {"body_parameters": n, "tokens": d, "learning_rate": rate, "loss": loss}
                rows.append(row | {"batch_tokens": batch})
    selected = select.select(made(rows), "near")
    rate, batch = (fit.fit(e, selected, bootstraps=300) for e in StepLaw.equations)
    for name, low, high in (("alpha", -0.774, -0.655), ("beta", 0.271, 0.345)):
        assert low < rate.values[name] < high
    assert 0.534 < batch.values["gamma"] < 0.606


def recovered(seed: int, law: Power = TRUE, **options: Any) -> Fitted:
    return fit.fit(EQUATION, sweeps.optima(law, seed), seed=seed, **options)


def covered(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """How many intervals hold the true a, b and c, and the errors of b."""
    inside, errors = np.zeros(3), []
    for seed in range(seeds):
        found = recovered(seed)
        ends = [found.intervals[name] for name in "abc"]
        inside += [lo <= getattr(TRUE, n) <= hi for n, (lo, hi) in zip("abc", ends, strict=True)]
        errors.append(found.values["b"] - TRUE.b)
    return inside, np.array(errors)


def test_power_is_recovered_with_twenty_percent_of_noise() -> None:
    inside, errors = covered(8)
    assert (inside >= 6).all()
    assert np.sqrt(np.mean(errors**2)) < 0.02


@pytest.mark.slow
def test_intervals_of_power_cover_the_truth_in_ninety_of_a_hundred() -> None:
    """b has a standard error of 0.013, that of least squares on 126 optima with 20 % noise."""
    inside, errors = covered(100)
    assert (inside >= 90).all(), inside
    assert np.sqrt(np.mean(errors**2)) < 0.02
    assert np.abs(errors.mean()) < 0.005
    assert np.mean(np.abs(errors) <= 0.02) > 0.8


def test_the_exponent_of_the_batch_is_tested() -> None:
    (test,) = recovered(1, hypotheses=(("c", 1.0),)).tests
    assert test.is_inside
    assert test.p > 0.05
    (test,) = recovered(1, Power(c=0.3), hypotheses=(("c", 1.0),)).tests
    assert not test.is_inside
    assert test.p < 1e-6
    assert test.statistic < -10


@pytest.mark.slow
def test_the_wald_test_has_its_nominal_error_rate() -> None:
    found = [recovered(s, hypotheses=(("c", 1.0),), bootstraps=50).tests[0].p for s in range(200)]
    assert 0.01 < np.mean(np.array(found) < 0.05) < 0.12


def test_an_outlier_changes_little() -> None:
    given = sweeps.optima(TRUE, 5)
    spoiled = dict(given.columns)
    spoiled["learning_rate"] = spoiled["learning_rate"].copy()
    spoiled["learning_rate"][60] *= 100
    before = fit.fit(EQUATION, given, bootstraps=0).values["b"]
    after = fit.fit(EQUATION, dataclasses.replace(given, columns=spoiled), bootstraps=0).values["b"]
    assert after == pytest.approx(before, abs=0.01)


def test_a_held_constant_is_not_fitted() -> None:
    equation = fit.held(EQUATION, {"c": 1.0})
    found = fit.fit(equation, sweeps.optima(TRUE, 2), bootstraps=50)
    assert set(found.values) == {"a", "b"}
    one = sweeps.optima(TRUE, 2)
    keep = one.columns["batch_tokens"] == sweeps.BATCHES[0]
    columns = {name: values[keep] for name, values in one.columns.items()}
    trunks = tuple(t for t, k in zip(one.trunks, keep, strict=True) if k)
    alone = Selected(columns, trunks, ())
    with pytest.raises(UserError, match=r"all 21 rows have batch_tokens=65536, .* sweep batch_tok"):
        fit.fit(EQUATION, alone, bootstraps=0)
    assert fit.fit(equation, alone, bootstraps=0).values["b"] == pytest.approx(-0.51, abs=0.1)
    for values, message in (
        ({"d": 1.0}, "--hold=d=1: the constants of this law are a, b, c"),
        ({"a": -1.0}, "--hold=a=-1 must be positive"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "leave one to fit"),
    ):
        with pytest.raises(UserError) as caught:
            fit.held(EQUATION, values)
        assert message in str(caught.value)


def test_columns_that_change_together_are_refused() -> None:
    """A batch in exact proportion to the tokens is refused; a nearly proportional one is
    warned of.
    """
    given = sweeps.optima(TRUE, 0)
    columns = dict(given.columns) | {"batch_tokens": given.columns["tokens"] / 1e4}
    with pytest.raises(UserError, match=r"do not tell (a and )?b and c apart"):
        fit.fit(EQUATION, dataclasses.replace(given, columns=columns), bootstraps=0)
    jitter = np.exp(1e-4 * np.random.default_rng(0).normal(size=len(given)))
    columns["batch_tokens"] = columns["batch_tokens"] * jitter
    found = fit.fit(EQUATION, dataclasses.replace(given, columns=columns), bootstraps=0)
    assert "b and c trade against each other" in found.warnings[0]
    assert found.condition > 1e3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": np.zeros(126)}, "all 126 rows have seed=0; an interval needs two seeds"),
        ({"trunks": 4}, "clusters that share no trunk: 4; an interval needs 5"),
        ({"trunks": 1}, "clusters that share no trunk: 1;"),
        ({"rows": 3}, "3 rows for 3 constants (a, b, c); sweep 4 cells or more"),
        ({"rows": 1}, "all 1 rows have tokens=2e+09, so nothing can be fitted over it"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    given = sweeps.optima(TRUE, 0)
    columns, trunks = dict(given.columns), given.trunks
    if "seed" in change:
        columns["seed"] = change["seed"]
    if "trunks" in change:
        trunks = tuple(frozenset([str(i % change["trunks"])]) for i in range(126))
    if "rows" in change:
        places = np.array([0, 7, 50])[: change["rows"]]
        columns = {name: values[places] for name, values in columns.items()}
        trunks = trunks[: change["rows"]]
    selected = Selected(columns, trunks, ())
    with pytest.raises(UserError) as caught:
        fit.fit(EQUATION, selected)
    assert message in str(caught.value)
    if "rows" not in change:
        assert "--bootstraps=0" in str(caught.value)
        assert fit.fit(EQUATION, selected, bootstraps=0).intervals == {}


def test_a_seed_gives_the_same_intervals() -> None:
    assert recovered(3, bootstraps=100).intervals == recovered(3, bootstraps=100).intervals
    heard: list[int] = []
    recovered(3, bootstraps=100, progress=heard.append)
    assert sum(heard) == 100


@pytest.mark.slow
def test_two_thousand_rows_take_less_than_a_minute() -> None:
    began = time.perf_counter()
    found = fit.fit(Chinchilla.equations[0], losses(Chinchilla(), 2000, 5e-3, 0))
    assert time.perf_counter() - began < 60
    for name, (low, high) in found.intervals.items():
        assert low < getattr(Chinchilla(), name) < high
