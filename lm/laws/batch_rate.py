"""Batch and rate: how the learning rate changes with the batch.

    linear      eta * k                       SGD below the critical batch; Power's c = 1
    sqrt        eta * sqrt(k)                 Adam (Granziol et al. 2020, arXiv 2006.09092)
    power       eta * k^c                     c fitted (power.py)
    mccandlish  eta_max / (1 + noise / B)^c   McCandlish et al. 2018 (arXiv 1812.06162)

with k = new batch / old batch. `adam_sde` scales all of Adam's settings together.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal, NamedTuple

from lm.laws import Constant, Law, constants
from lm.mapping import NOT_NEGATIVE, UserError

RuleName = Literal["linear", "sqrt", "power", "mccandlish"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRate(Law):
    """`c` is the exponent of "power" and "mccandlish". `noise_batch` is the noise scale of
    "mccandlish", in the unit of the batches.
    """

    rule: RuleName = "sqrt"
    c: float = 0.5
    noise_batch: Annotated[float, NOT_NEGATIVE] = 0.0

    published: ClassVar[tuple[Constant, ...]] = constants(
        "Granziol et al. 2020, arXiv 2006.09092, adaptive methods",
        {},
        ("c", 0.5, "1", "P"),
    ) + constants(
        "McCandlish et al. 2018, arXiv 1812.06162",
        {},
        ("c of SGD", 1.0, "1", "S"),
        ("c of Adam", 0.5, "1", "S", 0.5, 1.0),
    )

    def problem(self) -> str | None:
        if self.rule == "mccandlish" and not self.noise_batch:
            return "rule='mccandlish' needs the noise scale: set noise_batch > 0"
        return None

    def scale(self, rate: float, old: float, new: float) -> float:
        """The rate for a batch of `new`, from that for `old`.

        Raises:
          UserError: a rate or a batch that is not positive.
        """
        for name, value in (("rate", rate), ("old batch", old), ("new batch", new)):
            if not value > 0:
                raise UserError(f"{name}={value} must be positive")
        if self.rule == "mccandlish":
            damped = [(1.0 + self.noise_batch / batch) ** self.c for batch in (old, new)]
            return rate * damped[0] / damped[1]
        exponent = {"linear": 1.0, "sqrt": 0.5, "power": self.c}[self.rule]
        return rate * (new / old) ** exponent


def scale_rate(
    rate: float,
    old: float,
    new: float,
    rule: RuleName,
    *,
    c: float = 0.5,
    noise_batch: float = 0.0,
) -> float:
    """The rate for a batch of `new` tokens, from that for `old`, by a rule.

    Raises:
      UserError: an unknown rule, a missing noise scale, or a value that is not positive.
    """
    rules = ("linear", "sqrt", "power", "mccandlish")
    if rule not in rules:
        raise UserError(f"rule={rule!r} is not one of {', '.join(rules)}")
    made = BatchRate(rule=rule, c=c, noise_batch=noise_batch)
    if (problem := made.problem()) is not None:
        raise UserError(problem)
    return made.scale(rate, old, new)


class AdamSettings(NamedTuple):
    rate: float
    beta1: float
    beta2: float
    epsilon: float


def adam_sde(settings: AdamSettings, factor: float) -> AdamSettings:
    """Adam's settings for `factor` = k times the batch, chosen so that the stochastic differential
    equation that Adam follows stays the same (Malladi et al. 2022, arXiv 2205.10287; UNCONFIRMED):
    rate * sqrt(k), 1 - beta -> k (1 - beta), epsilon / sqrt(k).

    Raises:
      UserError: a factor that is not positive, or one at which k (1 - beta) reaches 1.
    """
    if not factor > 0:
        raise UserError(f"factor={factor} must be positive")
    for name in ("beta1", "beta2"):
        beta = getattr(settings, name)
        # 10 * (1 - 0.9) should be 1, but binary fractions just miss it.
        if round(factor * (1.0 - beta), 12) >= 1.0:
            raise UserError(
                f"{name}={beta} at {factor:g} times the batch is {1 - factor * (1 - beta):.2f}, "
                f"which is not an average; scale the batch by less than {1 / (1 - beta):.3g}"
            )
    return AdamSettings(
        settings.rate * factor**0.5,
        1.0 - factor * (1.0 - settings.beta1),
        1.0 - factor * (1.0 - settings.beta2),
        settings.epsilon / factor**0.5,
    )
