"""Printed digits of the laws of rates and batches (power, step_law, critical_batch, batch_rate)."""

from __future__ import annotations

import numpy as np
import pytest

from lm.laws.batch_rate import AdamSettings, adam_sde, scale_rate
from lm.laws.critical_batch import CriticalBatch, examples_at, noise_scale, steps_at
from lm.laws.growth_timing import GrowthTiming
from lm.laws.power import Power
from lm.laws.step_law import StepLaw
from lm.mapping import UserError


def digits(value: float, printed: str) -> None:
    """Asserts that `value` rounds to the printed digits."""
    mantissa = printed.lower().split("e")[0]
    places = len(mantissa.replace("-", "").replace(".", "").lstrip("0"))
    assert f"{value:.{places - 1}e}" == f"{float(printed):.{places - 1}e}"


@pytest.mark.parametrize(
    ("beta", "knee"),
    [
        (32, "2.9047e7"),
        (128, "4.4016e8"),
        (256, "1.7134e9"),
        (512, "6.6699e9"),
        (1024, "2.5964e10"),
    ],
)
def test_knees_of_power(beta: int, knee: str) -> None:
    digits(Power().knee(4096.0 * beta), knee)


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (1e11, "1.005449e-2"),
        (1e12, "3.107134e-3"),
        (1.25e12, "2.772910e-3"),
        (2.5e12, "1.947200e-3"),
        (1e13, "9.601961e-4"),
        (1.2e13, "8.749385e-4"),
    ],
)
def test_rates_of_power(tokens: float, rate: str) -> None:
    law = Power()
    digits(law.rate(1024 * 4096.0, tokens), rate)
    # The rate is proportional to the batch in tokens and does not depend on the sequence length.
    assert law.rate(512 * 8192.0, tokens) == law.rate(1024 * 4096.0, tokens)
    assert law.rate(2048 * 4096.0, tokens) == pytest.approx(2 * float(rate), rel=1e-6)


def test_power_is_capped_before_its_knee() -> None:
    law = Power()
    knee = law.knee(4096.0 * 128)
    assert law.capped(4096.0 * 128, knee / 2) == 0.02
    assert law.capped(4096.0 * 128, knee) == pytest.approx(0.02, rel=1e-12)
    assert law.capped(4096.0 * 128, 2 * knee) == pytest.approx(0.02 * 2**-0.51, rel=1e-12)


def test_the_printed_rate_of_ten_trillion_tokens() -> None:
    aggregate = Power(a=Power.constant("a of all sizes").value)
    digits(aggregate.rate(1024 * 4096.0, 1e13), "1.104e-3")


@pytest.mark.parametrize(
    ("parameters", "tokens", "rate", "batch"),
    [
        (1e9, 1e11, "1.6325e-3", "1.1077e6"),
        (7e9, 1.4e12, "9.1656e-4", "4.9988e6"),
        (1e8, 2e9, "2.5367e-3", "1.1866e5"),
    ],
)
def test_step_law(parameters: float, tokens: float, rate: str, batch: str) -> None:
    digits(StepLaw().rate(parameters, tokens), rate)
    digits(StepLaw().batch(tokens), batch)


@pytest.mark.parametrize(
    ("loss", "batch"), [(2.5, "3.978e6"), (3.0, "1.275e6"), (3.5, "4.873e5"), (2.0, "1.601e7")]
)
def test_batch_of_a_loss(loss: float, batch: str) -> None:
    digits(CriticalBatch().batch_of_loss(loss), batch)


def test_critical_batch() -> None:
    law = CriticalBatch()
    assert round(law.batch(151e6) / 512) in (985, 986)  # printed 985
    digits(law.batch(151e6), "5.04e5")
    assert abs(law.batch(1200e6) / 512 - 2610) < 2
    digits(law.batch(1200e6), "1.336e6")
    fixed = {"k": law.constant("k at 3.07e9 tokens").value, "p": 0.087}
    assert law.replaced(fixed).batch(1e6) == pytest.approx(621.341 * 512)


def test_time_against_data() -> None:
    """(S/S_min - 1)(E/E_min - 1) = 1, with E_min / S_min the critical batch."""
    for batch in (10.0, 300.0, 1e4):
        steps, examples = steps_at(batch, 200.0, 300.0), examples_at(batch, 6e4, 300.0)
        assert examples == pytest.approx(steps * batch)
        assert (steps / 200.0 - 1) * (examples / 6e4 - 1) == pytest.approx(1.0)


def test_noise_scale_of_gaussian_gradients() -> None:
    rng = np.random.default_rng(0)
    mean = rng.normal(size=200)
    mean *= 1.0 / np.linalg.norm(mean)
    sigma = np.sqrt(9.237 / 200)  # tr(Sigma) / |G|^2 = 9.237
    norms = [
        np.mean(np.sum((mean + sigma / np.sqrt(b) * rng.normal(size=(4000, 200))) ** 2, axis=1))
        for b in (8, 512)
    ]
    signal, noise, ratio = noise_scale(8, 512, *norms)
    assert signal == pytest.approx(1.0, rel=0.01)
    assert noise == pytest.approx(9.237, rel=0.02)
    assert ratio == noise / signal
    with pytest.raises(UserError, match="needs two sizes"):
        noise_scale(8, 8, 1.0, 1.0)


@pytest.mark.parametrize(
    ("parameters", "tokens", "printed"),
    [
        (8e9, 15e12, "6.58e9"),
        (7e9, 2e12, "11.11e9"),
        (13e9, 2e12, "15.84e9"),
        (70e9, 2e12, "42.48e9"),
    ],
)
def test_growth_timing(parameters: float, tokens: float, printed: str) -> None:
    found = GrowthTiming().tokens(parameters, 6 * parameters * tokens)
    assert f"{found:.2e}" == f"{float(printed):.2e}"


def test_rules_of_batch_and_rate() -> None:
    assert scale_rate(1e-3, 256, 1024, "linear") == pytest.approx(4e-3)
    assert scale_rate(1e-3, 256, 1024, "sqrt") == pytest.approx(2e-3)
    assert scale_rate(1e-3, 256, 1024, "power", c=0.3) == pytest.approx(1e-3 * 4**0.3)
    # eta_max / (1 + noise/B)^c: linear far below the noise scale, flat far above it.
    rule = {"rule": "mccandlish", "c": 1.0, "noise_batch": 1e6}
    assert scale_rate(1e-3, 1, 2, **rule) == pytest.approx(2e-3, rel=1e-5)
    assert scale_rate(1e-3, 1e9, 2e9, **rule) == pytest.approx(1e-3, rel=1e-3)
    both = scale_rate(scale_rate(1e-3, 1e5, 1e6, **rule), 1e6, 1e5, **rule)
    assert both == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scale_rate(-1.0, 1, 2, "sqrt"), "rate=-1.0 must be positive"),
        (lambda: scale_rate(1.0, 0, 2, "sqrt"), "old batch=0 must be positive"),
        (lambda: scale_rate(1.0, 1, 2, "cube"), "rule='cube' is not one of linear, sqrt"),  # type: ignore[arg-type]
        (lambda: scale_rate(1.0, 1, 2, "mccandlish"), "set noise_batch > 0"),
        (lambda: adam_sde(AdamSettings(1e-3, 0.9, 0.95, 1e-8), 0.0), "factor=0.0 must be positive"),
        (
            lambda: adam_sde(AdamSettings(1e-3, 0.9, 0.95, 1e-8), 10.0),
            "beta1=0.9 at 10 times the batch is 0.00, which is not an average; scale the batch by",
        ),
        (lambda: adam_sde(AdamSettings(1e-3, 0.99, 0.95, 1e-8), 20.0), "beta2=0.95 at 20 times"),
    ],
)
def test_bad_rules_are_refused(call, message: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)


def test_adam_settings_scale_by_the_sde_rule() -> None:
    made = adam_sde(AdamSettings(1e-3, 0.9, 0.95, 1e-8), 4.0)
    assert made == pytest.approx((2e-3, 0.6, 0.8, 5e-9))
    back = adam_sde(made, 0.25)
    assert back == pytest.approx((1e-3, 0.9, 0.95, 1e-8))


def test_remarks_on_the_knee() -> None:
    columns = {"batch_tokens": np.array([4096.0 * 32, 4096.0 * 128, 4096.0 * 1024])}
    (message,) = Power().remarks(columns)
    assert message.endswith(
        "after 2.9e+07 tokens at a batch of 131072, after 2.6e+10 tokens at a batch of 4.1943e+06"
    )
    (flat,) = Power(a=1e-5, b=-0.04).remarks(columns)
    assert "from the first token at a batch of 131072" in flat
    (rising,) = Power(b=0.1).remarks(columns)
    assert "there is no knee" in rising
