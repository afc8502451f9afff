"""Numbers with the confidence interval that their sample allows, and differences of two of them.

The unit is what was drawn independently: a document, a book, an item, but never a token. A ratio of
sums (nats per token, bits per byte) moves when a unit is left out, and how far it moves shows how
much of it is chance. This is the jackknife's variance, used with Student's t. Units of unequal size
have fewer degrees of freedom than units of equal size: nine books, one of which holds half the
text, have 2 and not 8 (Bell & McCaffrey 2002; MacKinnon, Nielsen & Webb 2023). For equal sizes this
is the usual t interval of a mean.

A stated 95 % interval covers 94 to 99 %, from 2 units on and with sizes that differ a hundredfold.
If errors have a long tail, as an exponential has, and units are few, it covers 91 % (measured in
tests/lm/evaluation/test_statistics.py). One unit gives no interval. Shares of items use Wilson's
interval (1927), which does not collapse at 0 and 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Number:
    """`low`, `high`: the 95 % interval over `num` independent units; nan if there is none.
    `chance`: what guessing gives; None if that has no meaning. `units` [num, 2]: numerator and
    denominator of each unit in a fixed order, kept if models may be compared unit by unit.
    """

    value: float
    low: float
    high: float
    num: int
    chance: float | None = None
    units: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def is_at_chance(self) -> bool:
        """Whether guessing explains it. No verdict may rest on such a number."""
        return self.chance is not None and not self.low > self.chance

    def interval(self, form: str) -> str:
        """ "LOW to HIGH" for people, or the reason why there is no interval; `form` as ".4f"."""
        if math.isnan(self.low):
            return "one unit: no interval" if self.num == 1 else "no interval"
        return f"{self.low:{form}} to {self.high:{form}}"

    def to_mapping(self, *, with_units: bool = False) -> dict[str, Any]:
        """Plain values; None if a value is not finite, since JSON has no nan. Units are then left
        out."""
        plain = {
            key: _plain(getattr(self, key)) for key in ("value", "low", "high", "num", "chance")
        }
        if self.chance is not None:
            plain["at_chance"] = self.is_at_chance
        if with_units and self.units is not None and np.isfinite(self.units).all():
            plain["units"] = np.round(self.units, 6).tolist()
        return plain

    @staticmethod
    def from_mapping(values: dict[str, Any]) -> Number:
        """The inverse of `to_mapping`."""
        sides = (
            math.nan if values[key] is None else float(values[key])
            for key in ("value", "low", "high")
        )
        units = np.array(values["units"], np.float64) if "units" in values else None
        chance = None if values["chance"] is None else float(values["chance"])
        return Number(*sides, num=values["num"], chance=chance, units=units)


def ratio(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    *,
    chance: float | None = None,
    keep_units: bool = False,
) -> Number:
    """sum(numerators) / sum(denominators) over units [num]; nan without units."""
    units = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], 1)
    units = units[units[:, 1] > 0] if not keep_units else units
    if not units[:, 1].sum() > 0:
        return Number(math.nan, math.nan, math.nan, 0, chance)
    value = float(units[:, 0].sum() / units[:, 1].sum())
    low, high = _interval(units, value)
    return Number(value, low, high, len(units), chance, units if keep_units else None)


def share(hits: Sequence[float] | np.ndarray, *, chance: float | None = None) -> Number:
    """The mean of hits [num] in [0, 1], with Wilson's interval. A tie among k may count 1/k."""
    hits = np.asarray(hits, np.float64)
    if not len(hits):
        return Number(math.nan, math.nan, math.nan, 0, chance)
    n, p = len(hits), float(hits.mean())
    return Number(p, *_wilson(p, n), n, chance, np.stack([hits, np.ones(n)], 1))


def share_of_several(
    hits: Sequence[float] | np.ndarray,
    asked: Sequence[float] | np.ndarray,
    *,
    chance: float | None = None,
    keep_units: bool = False,
) -> Number:
    """sum(hits) / sum(asked), where each unit [num] was asked several times. The interval is that
    of a ratio, cut to [0, 1]. If all units agree, it would have no width, and Wilson's is used.
    """
    number = ratio(hits, asked, chance=chance, keep_units=keep_units)
    if math.isnan(number.low):
        return number
    low, high = max(0.0, number.low), min(1.0, number.high)
    if high - low < 1e-9:
        low, high = _wilson(number.value, number.num)
    return dataclasses.replace(number, low=low, high=high)


def mean(values: Sequence[float] | np.ndarray, *, chance: float | None = None) -> Number:
    """The mean over units [num]."""
    return ratio(values, np.ones(len(values)), chance=chance)


def difference(ours: Number, theirs: Number) -> Number:
    """ours - theirs over the same units, so that what both share cancels.

    Raises:
      ValueError: the numbers have no units, or units of different samples.
    """
    a, b = ours.units, theirs.units
    if a is None or b is None or a.shape != b.shape:
        raise ValueError("the two numbers are not of one sample of units")
    value = ours.value - theirs.value
    return Number(value, *_interval(np.concatenate([a, b], 1), value), len(a))


def _interval(units: np.ndarray, value: float) -> tuple[float, float]:
    """The interval of a ratio of units [num, 2], or of a difference of two ratios, [num, 4]."""
    units = units[(units[:, 1::2] > 0).any(axis=1)]
    if len(units) < 2:
        return math.nan, math.nan
    sides = [_left_out(*units[:, i : i + 2].T) for i in range(0, units.shape[1], 2)]
    rest = sides[0][0] - sides[1][0] if len(sides) == 2 else sides[0][0]
    dof = min(dof for _, dof in sides)
    num = len(units)
    error = np.sqrt(np.sum(rest**2) * (num - 1) / num)  # the jackknife's
    half = float(special.stdtrit(dof, 0.5 + CONFIDENCE / 2) * error)
    return value - half, value + half


def _left_out(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, float]:
    """How far each unit moves sum(a) / sum(b) from the ratio of all others [num], and the degrees
    of freedom of the sum of squares of these moves (Satterthwaite's, for a = ratio * b + an error
    of variance b, as in Bell & McCaffrey 2002).

    >>> _left_out(np.ones(9), np.ones(9))[1]
    8.0
    """
    share = b / b.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        moved = (a - a.sum() / b.sum() * b) / (b.sum() * (1 - share))
        weight = share / (1 - share)
        square = np.sum(weight**2)
        dof = weight.sum() ** 2 / (square + square**2 - np.sum(weight**4))
    return moved, float(dof)


def _wilson(p: float, num: int) -> tuple[float, float]:
    z = float(special.ndtri(0.5 + CONFIDENCE / 2))
    middle = (p + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * math.sqrt(p * (1 - p) / num + z**2 / (4 * num**2))
    # Rounding makes 1 - 1e-17 of an exact 1.
    return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
