"""Refined: a schedule made from the gradient norms that another run logged (Defazio et al. 2023,
arXiv 2310.07831).

    w_t = G_t^-power,   eta_t ~ w_t * sum_{p > t} w_p / sum_p w_p,   largest value 1, last 0   [C]

Constant norms give a linear decay; norms that are large at first give a warmup. `profile` is the
rate divided by the peak at equally spaced points of a run, from its start to its end, and linear in
between. The configuration holds it, so the run does not need the other one. `espalier schedules
--refine=RUN` makes a profile from the log of a run, by `refine`. optax does not have such a
schedule.

The norms are smoothed by a running median with reflected ends [C], over the share `window` of the
run (0.1, UNCONFIRMED). Smaller norms are raised to a quantile, and norms that are not finite are
left out. power = 2 squares the norm, as for SGD [C]. The paper's variant for Adam has
w_t = 1 / |g_t|_1 (UNCONFIRMED). Here that is power = 1, with the logged Euclidean norm in place of
the L1 norm.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lm.mapping import UserError
from lm.schedules import Phases, Rule, Run, Schedule

CELLS = 2000  # a longer log is reduced to this many medians


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refined(Rule):
    """Its options.

    Attributes:
      profile: rates over the peak at equal distances from the start of the run to its end
    """

    profile: tuple[float, ...] = (1.0, 0.0)

    def problem(self) -> str | None:
        if len(self.profile) < 2:
            return f"profile has {len(self.profile)} points; set 2 or more"
        if not all(0.0 <= x <= 1.0 for x in self.profile) or max(self.profile) != 1.0:
            return "profile must lie in [0, 1] with a largest value of 1.0; divide by its largest"
        return None

    def schedule(self, run: Run) -> Schedule:
        table = np.asarray(self.profile, np.float32) * np.float32(self.peak_learning_rate)
        return Schedule(
            phases=Phases(0.0, 0.0, float(run.tokens)),
            peak=self.peak_learning_rate,
            stable=Partial(_between, table, np.float32((len(table) - 1) / float(run.tokens))),
            shape="linear",
            final_ratio=0.0,
            is_whole=True,
        )


def _between(table: Any, scale: Any, tokens: jax.Array) -> jax.Array:
    return jnp.interp(tokens * scale, jnp.arange(len(table), dtype=jnp.float32), table)


def refine(
    norms: np.ndarray, *, window: float, quantile: float, power: float, points: int | None
) -> np.ndarray:
    """Gradient norms at equal distances -> the profile, float64, whose largest value is 1.

    Args:
      window: the width of the running median as a share of the run; 0 means no smoothing.
      quantile: smaller norms are raised to this quantile.
      power: the weight of a point is its norm to the minus `power`.
      points: the number of points of the profile; None means one per norm.

    Raises:
      UserError: fewer than two norms, or none that is finite and positive.
    """
    g = np.asarray(norms, np.float64)
    g = np.where(np.isfinite(g) & (g > 0), g, np.nan)
    if len(g) < 2 or np.isnan(g).all():
        raise UserError(
            f"{len(g)} gradient norms, {np.count_nonzero(~np.isnan(g))} of them finite and "
            "positive; name a run that logged at least two"
        )
    if len(g) > CELLS:
        g = np.array([_median(part) for part in np.array_split(g, CELLS)])
    width = min(round(window * len(g)) | 1, 2 * len(g) - 1)  # odd; a reflection cannot be longer
    padded = np.pad(g, width // 2, mode="reflect")
    g = np.array([_median(x) for x in np.lib.stride_tricks.sliding_window_view(padded, width)])
    at = np.arange(len(g))
    g = np.interp(at, at[~np.isnan(g)], g[~np.isnan(g)])
    weights = (np.maximum(g, np.quantile(g, quantile)) / g.max()) ** -power
    tails = weights.sum() - np.cumsum(weights)
    profile = weights * np.maximum(tails, 0.0) / weights.sum()
    profile[-1] = 0.0
    if points is not None:
        profile = np.interp(np.linspace(0, len(g) - 1, points), at, profile)
    return profile / profile.max()


def _median(values: np.ndarray) -> float:
    finite = values[~np.isnan(values)]
    return float(np.median(finite)) if len(finite) else np.nan
