"""What a lower loss is worth: how much more the first pattern spends to reach the same loss.

    speed-up = T_first(l) / T_pattern(l)     l = the higher of the two losses at the end of training

T(l) is the number of tokens after which a run has come down to l. Multiplied by the operations or
seconds per token it gives the compute-equivalent and the wall-clock speed-up. 1.25 in tokens means
that the first pattern needs 1.25 times the tokens, or this one 0.8 of them. Both have reached the
higher of the two losses, so nothing is extrapolated.

Losses are those of training text, which every pattern reads in the same order under the same seed.
A batch may be easy, so the first of many noisy losses below l comes too early. Therefore T(l) is
read from a smooth curve on a logarithmic axis of tokens: lines through a third of the points around
each point (local regression, Cleveland 1979), then the nearest decreasing curve (isotonic
regression). The better pattern reaches l before its learning rate has come down; a run planned for
that length would have a lower loss there. So the true factor is further from 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import optimize

from lm.report.compared import Curve, Row, SpeedUp
from lm.studies import verdict

Interval = tuple[float, float | None, float | None]


def speed_ups(rows: Sequence[Row]) -> list[SpeedUp]:
    """The speed-up of every trained pattern over the first. Left out are patterns whose curve was
    not kept or is not finite, and those where one of the two is below l from its first point on.
    """
    first, found = rows[0], []
    for row in rows[1:]:
        if first.curve is None or row.curve is None:
            continue
        logs = _log_tokens(first.curve, row.curve)
        if logs is None:
            continue
        flops = np.log(first.flops_per_token / row.flops_per_token)
        seconds = np.log(row.tokens_per_second / first.tokens_per_second)
        sides = (_mean(logs + shift) for shift in (0.0, flops, seconds))
        found.append(SpeedUp(row.pattern, *sides))
    return found


def _log_tokens(base: Curve, ours: Curve) -> np.ndarray | None:
    """log T_base(l) - log T_ours(l) of every seed [S]; None if one cannot be determined."""
    found = []
    for base_bits, our_bits in zip(base.bits, ours.bits, strict=True):
        if not np.isfinite([*base_bits, *our_bits]).all():
            return None
        sides = [_smooth(*x) for x in ((base.tokens, base_bits), (ours.tokens, our_bits))]
        level = max(side[-1] for side in sides)
        reached = [
            log_reached(np.log(curve.tokens), side, level)
            for curve, side in zip((base, ours), sides, strict=True)
        ]
        found.append(reached[0] - reached[1])
    return np.array(found) if np.isfinite(found).all() else None


def _smooth(tokens: Sequence[float], bits: Sequence[float]) -> np.ndarray:
    """The losses [n] smoothed so that they never rise."""
    x, y = np.log(tokens), np.asarray(bits)
    reach, lines = max(1, len(x) // 6), []
    for i in range(len(x)):
        near = slice(max(0, i - reach), i + reach + 1)
        lines.append(np.polynomial.Polynomial.fit(x[near], y[near], 1)(x[i]))
    return optimize.isotonic_regression(np.array(lines), increasing=False).x


def log_reached(log_tokens: np.ndarray, losses: np.ndarray, level: float) -> float:
    """Where `losses` [n], which never rise, first reach `level`, interpolated between the points
    log_tokens [n]; nan if they are below it from the start.
    """
    at = int(np.argmax(losses <= level))
    if at == 0:
        return float("nan")
    share = (losses[at - 1] - level) / (losses[at - 1] - losses[at])
    return float(log_tokens[at - 1] + share * (log_tokens[at] - log_tokens[at - 1]))


def _mean(logs: np.ndarray) -> Interval:
    """The geometric mean of factors over seeds, with its interval."""
    low, high = verdict.over_seeds(logs)
    up = lambda x: None if x is None else round(float(np.exp(x)), 4)
    return round(float(np.exp(logs.mean())), 4), up(low), up(high)
