"""Does the best learning rate stay where it is when the model becomes wider?

    for every pattern, parametrization and width: loss over learning rates (lm/studies/sweep.py)
    -> the optimum of each width -> the number of bins of the grid by which it moves

Tensor Programs V (Yang et al. 2022, arXiv 2203.03466, fig. 1): under muP the optimum of a narrow
model is that of a wide one; under the standard parametrization it falls with the width.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.config import RunValues, UserError, convert, flatten
from lm.studies.rows import Row
from lm.studies.sweep import Sweep

PARAMETRIZATIONS = ("mup", "standard")
MOST_BINS, LEAST_BINS = 1, 2  # at most under muP, at least under the standard parametrization


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Learning rates over widths.

    Attributes:
      run: a whole configuration under muP
      patterns: the patterns that are trained
      widths: widths of the models
      learning_rates: parametrization -> peak rates, a constant factor apart and the same for all
        widths; that factor is a bin
      seeds: seeds of the trainings
    """

    run: RunValues
    patterns: tuple[str, ...]
    widths: tuple[int, ...]
    learning_rates: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...]


class Transfer(NamedTuple):
    """A pattern under a parametrization. `losses`: width -> learning rate -> mean loss over seeds,
    inf where a seed diverged. `best`: width -> learning rate. `shift`: bins from the narrowest to
    the widest. `cost`: nats per token that the widest model loses at the rate of the narrowest.
    """

    pattern: str
    parametrization: str
    losses: Mapping[int, Mapping[float, float]]
    best: Mapping[int, float]
    shift: int
    cost: float

    @property
    def edges(self) -> list[int]:
        """Widths whose best rate is the smallest or largest tried: the optimum may lie beyond."""
        return [w for w, best in self.best.items() if best in (min(x := self.losses[w]), max(x))]

    @property
    def is_as_expected(self) -> bool:
        """Whether the optimum stays under muP, or moves under the standard parametrization."""
        if self.parametrization == "mup":
            return abs(self.shift) <= MOST_BINS and not self.edges
        return abs(self.shift) >= LEAST_BINS


def create(mapping: Mapping[str, Any]) -> Study:
    """Nested plain values -> a study.

    Raises:
      UserError: unknown or missing keys, fewer than two widths or three rates, rates that are not a
      constant factor apart, or a run that is not under muP.
    """
    study: Study = convert(Study, mapping, "config")
    if len(study.widths) < 2 or list(study.widths) != sorted(set(study.widths)):
        raise UserError(f"config.widths={study.widths}: give at least two, rising")
    for name in ("patterns", "seeds"):
        if not getattr(study, name):
            raise UserError(f"config.{name} is empty; name at least one")
    if set(study.learning_rates) - set(PARAMETRIZATIONS) or not study.learning_rates:
        raise UserError(
            f"config.learning_rates has {', '.join(study.learning_rates) or 'nothing'}; give rates "
            f"for {' and '.join(PARAMETRIZATIONS)}, or for one of them"
        )
    for name, rates in study.learning_rates.items():
        _check(f"config.learning_rates.{name}", rates)
    if flatten(study.run).get("mup.parametrization") != "mup":
        raise UserError("config.run.mup.parametrization must be 'mup'; the study sets the other")
    return study


def _check(where: str, rates: Sequence[float]) -> None:
    if len(rates) < 3 or min(rates) <= 0 or list(rates) != sorted(set(rates)):
        raise UserError(f"{where}={rates}: give at least three positive rates, rising")
    steps = [math.log2(b / a) for a, b in itertools.pairwise(rates)]
    if max(steps) - min(steps) > 1e-3:
        raise UserError(
            f"{where}={rates} are not a constant factor apart, so that bins are not equal; give "
            f"{', '.join(f'{rates[0] * 2**i:g}' for i in range(len(rates)))} for example"
        )


def sweep(study: Study) -> Sweep:
    """All trainings, seeds outermost: a growing study completes every curve of a seed first."""
    standard = {"mup.embedding_multiplier": (1.0,), "mup.residual_multiplier": (1.0,)}
    grids = tuple(
        {
            "seed": (seed,),
            "model.pattern": (pattern,),
            "mup.parametrization": (name,),
            **(standard if name == "standard" else {}),
            "width": study.widths,
            "schedule.peak_learning_rate": rates,
        }
        for seed in study.seeds
        for pattern in study.patterns
        for name, rates in study.learning_rates.items()
    )
    return Sweep(run=study.run, grids=grids, min_steps=0, halving=0)


def judge(study: Study, rows: Sequence[Row]) -> list[Transfer]:
    """What the rows of the sweep's cells show; a pattern that lacks a curve is left out."""
    found = []
    for pattern in study.patterns:
        for name, rates in study.learning_rates.items():
            own = [
                x
                for x in rows
                if x["model.pattern"] == pattern and x["mup.parametrization"] == name
            ]
            losses = {width: _curve(own, width, rates, study.seeds) for width in study.widths}
            if all(losses.values()):
                found.append(_transfer(pattern, name, rates, losses))
    return found


def plain(found: Sequence[Transfer]) -> list[dict[str, Any]]:
    """Plain values for JSON; a loss that is not finite is None."""
    finite = lambda x: round(x, 6) if math.isfinite(x) else None
    return [
        one._asdict()
        | {
            "losses": {w: {r: finite(x) for r, x in y.items()} for w, y in one.losses.items()},
            "cost": finite(one.cost),
            "edges": one.edges,
            "is_as_expected": one.is_as_expected,
        }
        for one in found
    ]


def _curve(
    rows: Sequence[Row], width: int, rates: Sequence[float], seeds: Sequence[int]
) -> dict[float, float]:
    """learning rate -> mean loss over the seeds that all rates have; {} if there is none."""
    found: dict[float, dict[int, float]] = {rate: {} for rate in rates}
    for row in rows:
        if row["width"] == width and row["learning_rate"] in found:
            loss = math.inf if row["loss"] is None else row["loss"]
            found[row["learning_rate"]][row["seed"]] = loss
    whole = [seed for seed in seeds if all(seed in x for x in found.values())]
    if not whole:
        return {}
    return {rate: sum(x[s] for s in whole) / len(whole) for rate, x in found.items()}


def _transfer(
    pattern: str, name: str, rates: Sequence[float], losses: Mapping[int, Mapping[float, float]]
) -> Transfer:
    best = {width: min(curve, key=lambda r: curve[r]) for width, curve in losses.items()}
    narrow, wide = min(losses), max(losses)
    shift = rates.index(best[wide]) - rates.index(best[narrow])
    cost = losses[wide][best[narrow]] - losses[wide][best[wide]]
    return Transfer(pattern, name, losses, best, shift, cost)
