"""Printed digits and identities of the laws of losses."""

from __future__ import annotations

import numpy as np
import pytest

from lm.laws import annealing, chinchilla, multi_power, over_training
from lm.laws.annealing import Annealing
from lm.laws.average_parameters import AverageParameters
from lm.laws.chinchilla import Chinchilla
from lm.laws.compute import Compute
from lm.laws.multi_power import MultiPower
from lm.laws.vocabulary import Vocabulary
from lm.mapping import UserError


def cosine(peak: float, steps: int, warmup: int) -> np.ndarray:
    """The rate of every step, counted from 0: linear warmup, then half a cosine to 0."""
    at = np.arange(steps)
    falling = 0.5 * peak * (1 + np.cos(np.pi * (at - warmup) / (steps - warmup)))
    return np.where(at < warmup, peak * at / max(warmup, 1), falling)


@pytest.mark.parametrize("law", [Chinchilla(), chinchilla.refitted()])
def test_the_best_size_is_a_minimum(law: Chinchilla) -> None:
    for compute in (1e18, 1e21, 5.76e23):
        n = law.best_parameters(compute)
        assert 6 * n * law.best_tokens(compute) == pytest.approx(compute, rel=1e-12)
        sizes = n * np.geomspace(0.5, 2.0, 4001)
        losses = law.loss(sizes, compute / 6 / sizes)
        assert sizes[np.argmin(losses)] == pytest.approx(n, rel=1e-3)


def test_published_constants_of_chinchilla() -> None:
    law = Chinchilla()
    assert (law.E, law.A, law.B, law.alpha, law.beta) == (1.69, 406.4, 410.7, 0.34, 0.28)
    refit = chinchilla.refitted()
    assert (refit.E, refit.A, refit.B) == (1.8172, 482.01, 2085.43)
    assert (refit.alpha, refit.beta) == (0.3478, 0.3658)
    # 70e9 parameters and 1.4e12 tokens, by hand: 1.69 + 406.4 / 4873.47 + 410.7 / 2516.44.
    expected = 1.69 + 406.4 * np.exp(-0.34 * np.log(70e9)) + 410.7 * np.exp(-0.28 * np.log(1.4e12))
    assert law.loss(70e9, 1.4e12) == pytest.approx(expected, rel=1e-12)
    assert Chinchilla.constant("tokens per parameter of MiniCPM").value == 192


def test_over_training_is_chinchilla_in_other_variables() -> None:
    E, A, B, alpha = 1.7, 320.0, 410.0, 0.31
    law = over_training.of_chinchilla(E, A, B, alpha)
    same = Chinchilla(E=E, A=A, alpha=alpha, B=B, beta=alpha)
    n = np.geomspace(1e7, 1e10, 5)[:, None]
    d = np.geomspace(1e9, 1e12, 7)
    np.testing.assert_allclose(law.loss(6 * n * d, d / n), same.loss(n, d), rtol=1e-12)
    assert law.error(0.0) == pytest.approx(law.epsilon - law.k)
    assert law.error(np.inf) == law.epsilon


def test_compute_is_kaplan() -> None:
    c = 3.1e8 * 86400e15
    assert Compute().loss(c) == pytest.approx(1.0, rel=1e-12)
    assert Compute().loss(c / 1e6) == pytest.approx(1e6**0.05, rel=1e-12)


def test_sums_of_the_printed_cosine() -> None:
    """A peak of 2e-4 and 20,000 steps with 500 of warmup give S1 = 2.0501 and S2 = 0.19747. A
    constant rate with a warmup gives S2 = 0.
    """
    s1, s2 = annealing.sums(cosine(2e-4, 20_000, 500), 0.999)
    assert f"{s1[-1]:.4f}" == "2.0501"
    assert f"{s2[-1]:.5f}" == "0.19747"
    constant = np.where(np.arange(1000) < 50, np.arange(1000) / 50, 1.0) * 2e-4
    s1, s2 = annealing.sums(constant, 0.999)
    assert s1[-1] == pytest.approx(0.2)
    assert not s2.any()


def test_sums_are_the_double_sum() -> None:
    rng = np.random.default_rng(1)
    rates = np.concatenate([[0.1, 0.5], 1.0 - np.sort(rng.uniform(size=20))])
    flat, momentum = annealing.flat_start(rates), 0.9
    gaps = [0.0, *(flat[:-1] - flat[1:])]
    for s in (0, 5, 21):
        double = sum(gaps[k] * momentum ** (i - k) for i in range(s + 1) for k in range(1, i + 1))
        s1, s2 = annealing.sums(rates, momentum)
        assert s1[s] == pytest.approx(sum(flat[: s + 1]), rel=1e-12)
        assert s2[s] == pytest.approx(double, rel=1e-12, abs=1e-15)


def test_annealing_predicts_more_for_a_decay() -> None:
    law = Annealing()
    constant = np.full(20_000, 2e-4)
    s1, _ = annealing.sums(constant, 0.999)
    np.testing.assert_allclose(law.curve(constant), 2.628 + 0.430 * s1**-0.550, rtol=1e-12)
    decayed = np.concatenate([constant[:16_000], np.linspace(2e-4, 0, 4000)])
    assert law.curve(decayed)[-1] < law.curve(constant)[-1] - 0.02


def test_multi_power_is_its_double_sum() -> None:
    law = MultiPower()
    rates = np.concatenate([np.linspace(1e-5, 3e-4, 20), np.full(30, 3e-4), cosine(3e-4, 40, 0)])
    for s in (1, 20, 50, 77, 90):
        total = np.cumsum(rates)[s - 1]
        drop = 0.0
        for k in range(2, s + 1):
            gap, rate = rates[k - 2] - rates[k - 1], rates[k - 1]
            if gap == 0 or rate <= 0:
                continue
            x = rate**-law.gamma * sum(rates[k - 1 : s])
            drop += gap * (1 - (1 + law.C * x) ** -law.beta)
        expected = law.L0 + law.A * total**-law.alpha - law.B * drop
        assert law.curve(rates, [s])[0] == pytest.approx(expected, rel=1e-9)
    np.testing.assert_array_equal(law.curve(rates)[[0, 89]], law.curve(rates, [1, 90]))


def test_multi_power_is_finite_at_a_rate_of_zero() -> None:
    rates = np.array([1e-3, 1e-3, 0.0, 0.0])
    found = MultiPower().curve(rates)
    assert np.isfinite(found).all()
    assert found[3] == found[2]


def test_shipped_constants_of_multi_power() -> None:
    assert multi_power.shipped(25).L0 == 3.040
    assert multi_power.shipped(100) == MultiPower()
    assert multi_power.shipped(400).B == 523.425
    assert MultiPower.constant("gamma of 400M").value == 0.635


@pytest.mark.parametrize(
    ("shape", "sparsity", "kept"), [("linear", 0.8, 0.60), ("cubic", 0.8, 0.50), ("linear", 0, 1)]
)
def test_average_parameters(shape, sparsity: float, kept: float) -> None:
    law = AverageParameters()
    assert law.average(sparsity, shape) == pytest.approx(kept, abs=1e-12)
    share = np.linspace(0, 1, 200_001)
    integral = np.trapezoid(law.kept(share, sparsity, shape), share)
    assert law.average(sparsity, shape) == pytest.approx(integral, abs=1e-6)
    assert law.loss(1e9, 1e10) == Chinchilla().loss(1e9, 1e10)


def test_average_over_compute() -> None:
    """It equals a sum over small steps of compute; pruned models see more tokens."""
    law = AverageParameters()
    c = (np.arange(100_000) + 0.5) / 100_000
    tokens = 1 / law.kept(c, 0.8, "cubic")
    average = np.sum(law.kept(c, 0.8, "cubic") * tokens) / np.sum(tokens)
    assert law.average_over_compute(0.8, "cubic") == pytest.approx(average, rel=1e-6)
    assert law.average_over_compute(0.8, "cubic") < law.average(0.8, "cubic")
    with pytest.raises(UserError, match=r"sparsity=1.0 must lie in \[0, 1\)"):
        law.average(1.0)


def test_vocabulary() -> None:
    law = Vocabulary()
    assert f"{law.tokens_per_character(32_000):.4f}" == "0.2534"
    assert f"{law.tokens_per_character(65_536):.4f}" == "0.2385"
    assert law.tokens_per_character(300e3) == law.tokens_per_character(200e3)
    for size, words in ((3e9, 37e3), (7e9, 60e3), (70e9, 218e3), (300e9, 383e3)):
        assert law.best(size) == pytest.approx(words, rel=1e-12)
    assert 37e3 < law.best(5e9) < 60e3
    assert law.best(1e9) < 37e3
    n, v, h = law.at_compute(1e20)
    assert n == pytest.approx(0.08 * 1e10)
    assert v == pytest.approx(0.20 * 10**8.4)
    assert h == pytest.approx(6.42 * 1e10)
    expected = -5.533 + 1.831 / 2**0.447 + 0.196 / 0.1**0.671 + 2.124 / 40**0.447
    assert law.loss(2e9, 1e8, 40e9) == pytest.approx(expected, rel=1e-12)
    assert law.advice(60e3, 7e9) is None
    message = law.advice(16e3, 7e9)
    assert message is not None
    assert message.startswith("vocab=16000 is 3.8 times off the 60000 words")
