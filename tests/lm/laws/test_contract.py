"""What every law in the folder must be: its defaults are the published constants, and the
derivatives of its equations are right.
"""

from __future__ import annotations

import dataclasses
import typing

import numpy as np
import pytest

from lm.families import LAWS
from lm.laws import Equation, Law, Tag
from lm.mapping import UserError

EQUATIONS = [
    pytest.param(name, equation, id=f"{name}-{equation.target}")
    for name in LAWS.names()
    for equation in LAWS.find(name, "law").equations
]
# The method of a law that predicts a column; its arguments are the columns that it reads.
METHODS = {"learning_rate": "rate", "batch_tokens": "batch", "loss": "loss"}
# The domain of each column.
RANGES = {
    "tokens": (1e9, 1e11),
    "batch_tokens": (1e5, 1e6),
    "body_parameters": (1e7, 1e9),
    "average_parameters": (1e7, 1e9),
    "compute": (1e17, 1e21),
    "tokens_per_parameter": (5.0, 500.0),
    "summed_rate": (0.1, 3.0),
    "annealed_rate": (0.01, 0.2),
}


def columns(equation: Equation, rows: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    draw = lambda low, high: np.exp(rng.uniform(np.log(low), np.log(high), rows))
    return {name: draw(*RANGES[name]) for name in equation.reads}


@pytest.mark.parametrize("name", LAWS.names())
def test_the_defaults_are_published(name: str) -> None:
    law = LAWS.find(name, "law")
    assert issubclass(law, Law)
    assert law().problem() is None
    assert law.published
    for constant in law.published:
        assert constant.tag in typing.get_args(Tag)
        assert constant.unit
        assert constant.source
        assert all(low < high or low == high for low, high in constant.domain.values())
        if constant.low is not None and constant.high is not None:
            assert constant.low <= constant.value <= constant.high
    numbers = [f for f in dataclasses.fields(law) if isinstance(f.default, int | float)]
    if name == "batch_rate":  # each run has its own noise scale
        numbers = [f for f in numbers if f.name != "noise_batch"]
    for field in numbers:
        assert law.constant(field.name).value == field.default, field.name


@pytest.mark.parametrize(("name", "equation"), EQUATIONS)
def test_an_equation_is_the_law(name: str, equation: Equation) -> None:
    """A fit predicts what the law's own method gives."""
    law = LAWS.find(name, "law")()
    data = columns(equation)
    theta = equation.to_theta(dataclasses.asdict(law) | {"E": getattr(law, "E", 0) or 1e-300})
    log, _ = equation.evaluate(theta[None], data)
    predicted = getattr(law, METHODS[equation.target])(**data)
    np.testing.assert_allclose(np.exp(log[0]), predicted, rtol=1e-12)
    values = equation.to_values(theta)
    np.testing.assert_allclose(
        equation.to_theta(dict(zip(equation.names, values, strict=True))), theta
    )


@pytest.mark.parametrize(("name", "equation"), EQUATIONS)
def test_derivatives_equal_central_differences(name: str, equation: Equation) -> None:
    """Derivatives equal central differences, for several theta at once."""
    law = LAWS.find(name, "law")()
    data = columns(equation)
    start = equation.to_theta(dataclasses.asdict(law) | {"E": getattr(law, "E", 0) or 0.5})
    theta = start + np.array([[0.0], [0.01]])
    log, slopes = equation.evaluate(theta, data)
    assert log.shape == (2, 7)
    for p in range(len(start)):
        step = np.zeros_like(start)
        step[p] = 1e-6
        up, _ = equation.evaluate(theta + step, data)
        down, _ = equation.evaluate(theta - step, data)
        np.testing.assert_allclose(slopes[:, p], (up - down) / 2e-6, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", LAWS.names())
def test_a_value_outside_the_domain_is_named(name: str) -> None:
    law = LAWS.find(name, "law")
    for constant in law.published:
        for key, (low, high) in constant.domain.items():
            (message,) = constant.outside(**{key: 2 * high + 1})
            assert message.startswith(
                f"{key}={2 * high + 1:.4g} lies outside {low:.4g} to {high:.4g}"
            )
            assert constant.source in message
            assert constant.outside(**{key: high}) == ()
    assert law.outside() == ()


def test_a_law_names_every_column_outside_its_domain() -> None:
    power = LAWS.find("power", "law")
    assert power.outside(tokens=1e10, batch_tokens=1e6) == ()
    message = power.outside(tokens=1e6, batch_tokens=8192.0)
    assert [line.split("=")[0] for line in message] == ["tokens", "batch_tokens"]
    assert "Power was fitted (Shen et al. 2024" in message[0]


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"law: b=0: a rate that does not depend on tokens"):
        LAWS.create({"law": "power", "b": 0.0}, "law")
    with pytest.raises(UserError, match=r"start=0.8, end=0.75: pruning needs 0 <= start < end"):
        LAWS.create({"law": "average_parameters", "start": 0.8}, "law")
    with pytest.raises(UserError, match=r"needs the noise scale: set noise_batch > 0"):
        LAWS.create({"law": "batch_rate", "rule": "mccandlish"}, "law")
