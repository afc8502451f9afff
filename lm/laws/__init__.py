"""Laws of rates, batches and losses, one file each, found by listing this folder.

A file holds one frozen dataclass, named like the file in camel case. Its fields are the constants
of the law, and their defaults are the published values: `Power()` is the published law, and
`Power(a=3.1, b=-0.4, c=0.7)` is one that was fitted. `published` holds the same constants with
unit, domain, source and evidence. `equations` is what lm/fits can fit to a table. A method `rate`,
`batch` or `loss` predicts the column `learning_rate`, `batch_tokens` or `loss`; if there is an
equation for it, its arguments are the columns that the equation reads.

Everything is float64 on the host. Columns and quantities have the same name and unit in every law:
`learning_rate` (peak), `batch_tokens` (tokens per step), `tokens` (of the run), `body_parameters`
(without embeddings), `parameters` (all), `loss` (nats per token), `compute` (FLOPs of the run).
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np

# The evidence for a number: P the paper's own text, C official code, S a reading note that quotes
# the paper, R recomputed from public data; UNCONFIRMED numbers must be checked before use.
Tag = Literal["P", "C", "S", "R", "UNCONFIRMED"]
Selection = Literal["vertex", "near", "best", "rows"]
Columns = Mapping[str, np.ndarray]

LOSS_DELTA = 1e-3  # of the Huber loss on log losses (Hoffmann et al. 2022; arXiv 2408.11029)
RATE_DELTA = 0.3  # on log rates: optima on a grid of factors of two scatter by 10 to 30 %


@dataclasses.dataclass(frozen=True)
class Constant:
    """A published constant.

    Attributes:
      unit: the unit of the value; "1" is a pure number.
      domain: quantity -> the smallest and the largest value it was fitted to.
      tag: the evidence for the number (`Tag`).
      low, high: the published interval or range; None if none is printed.
    """

    name: str
    value: float
    unit: str
    domain: Mapping[str, tuple[float, float]]
    source: str
    tag: Tag
    low: float | None = None
    high: float | None = None

    def outside(self, **at: float) -> tuple[str, ...]:
        """One sentence for each quantity of `at` that lies outside the domain."""
        return tuple(
            f"{key}={at[key]:.4g} lies outside {low:.4g} to {high:.4g}, where {self.name} was "
            f"fitted ({self.source})"
            for key, (low, high) in self.domain.items()
            if key in at and not low <= at[key] <= high
        )


def constants(
    source: str,
    domain: Mapping[str, tuple[float, float]],
    *rows: tuple[Any, ...],
) -> tuple[Constant, ...]:
    """Constants of one source and domain. A row is (name, value, unit, tag), optionally with the
    published low and high.
    """
    frozen = types.MappingProxyType(dict(domain))
    return tuple(
        Constant(name, value, unit, frozen, source, tag, *interval)
        for name, value, unit, tag, *interval in rows
    )


@dataclasses.dataclass(frozen=True)
class Equation:
    """A law as an equation that can be fitted to a table.

    Attributes:
      target: the column that it predicts, which is positive.
      reads: the columns that it predicts from.
      names: the constants, in the order of theta.
      is_log: for each constant, whether theta holds its logarithm; then it is positive.
      starts: for each constant, the values from which fits start, in every combination.
      evaluate: theta [S, P] and columns [R] -> the log of the prediction [S, R] and its derivative
        by theta [S, P, R].
      pairs: for each exponent, its index in theta and that of the factor it goes with. The two
        trade off against each other by the choice of units, which says nothing about the data.
      delta: the log residual at which the Huber loss turns from a square to a line.
      selection: which rows of a sweep are used to fit it (lm/fits/select.py).
    """

    target: str
    reads: tuple[str, ...]
    names: tuple[str, ...]
    is_log: tuple[bool, ...]
    starts: tuple[tuple[float, ...], ...]
    evaluate: Callable[[np.ndarray, Columns], tuple[np.ndarray, np.ndarray]]
    pairs: tuple[tuple[int, int], ...]
    delta: float
    selection: Selection

    @property
    def is_over_tokens(self) -> bool:
        """Whether it predicts a rate or a loss from tokens, so that it can be drawn over them."""
        return "tokens" in self.reads and self.target in ("learning_rate", "loss")

    def to_theta(self, values: Mapping[str, float]) -> np.ndarray:
        """Constants by name -> theta [P]."""
        logs = zip(self.names, self.is_log, strict=True)
        return np.array([np.log(values[n]) if is_log else values[n] for n, is_log in logs])

    def to_values(self, theta: np.ndarray) -> np.ndarray:
        """theta [..., P] -> the constants [..., P]."""
        return np.where(self.is_log, np.exp(np.where(self.is_log, theta, 0.0)), theta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
    """The base of every law; its fields are its constants."""

    published: ClassVar[tuple[Constant, ...]] = ()
    equations: ClassVar[tuple[Equation, ...]] = ()
    # Constants that a fit tests against a value, such as Power's exponent of the batch against 1.
    hypotheses: ClassVar[tuple[tuple[str, float], ...]] = ()

    def problem(self) -> str | None:
        """What is wrong with the constants, in one line."""
        return None

    def remarks(self, columns: Columns) -> tuple[str, ...]:
        """Sentences on what the constants imply at the rows that they were fitted to."""
        del columns
        return ()

    @classmethod
    def constant(cls, name: str) -> Constant:
        """A published constant by its name."""
        return next(constant for constant in cls.published if constant.name == name)

    @classmethod
    def outside(cls, **at: float) -> tuple[str, ...]:
        """One sentence for each quantity of `at`, and domain, that lies outside the domains of the
        law's own constants (its fields). `Power.outside(tokens=1e6, batch_tokens=8192)`
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        notes: dict[tuple[Any, ...], str] = {}
        for constant in (c for c in cls.published if c.name in fields):
            for key, (low, high) in constant.domain.items():
                if key in at and not low <= at[key] <= high:
                    notes.setdefault(
                        (key, low, high),
                        f"{key}={at[key]:.4g} lies outside {low:.4g} to {high:.4g}, where "
                        f"{cls.__name__} was fitted ({constant.source})",
                    )
        return tuple(notes.values())

    def replaced(self, values: Mapping[str, float]) -> Self:
        """The law with other constants."""
        return dataclasses.replace(self, **values)


def log_linear(
    target: str,
    factor: str,
    exponents: Mapping[str, tuple[str, float]],
    *,
    delta: float,
    selection: Selection,
) -> Equation:
    """target = factor * prod_j (column_j / unit_j)^exponent_j. `exponents` maps the name of each
    exponent to its column and unit.
    """
    names = (factor, *exponents)

    def evaluate(theta: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        logs = [np.log(columns[column] / unit) for column, unit in exponents.values()]
        design = np.stack([np.ones_like(logs[0]), *logs])
        return theta @ design, np.broadcast_to(design, (len(theta), *design.shape))

    return Equation(
        target=target,
        reads=tuple(dict.fromkeys(column for column, _ in exponents.values())),
        names=names,
        is_log=(True, *(False for _ in exponents)),
        starts=((1.0,), *((0.0,) for _ in exponents)),
        evaluate=evaluate,
        pairs=tuple((place, 0) for place in range(1, len(names))),
        delta=delta,
        selection=selection,
    )


def sum_of_powers(
    target: str,
    floor: str,
    terms: Iterable[tuple[str, str, str]],
    *,
    starts: tuple[tuple[float, ...], ...],
    selection: Selection = "best",
) -> Equation:
    """target = floor + sum_j factor_j / column_j^exponent_j. A term is the names of its factor and
    its exponent, and its column. The floor and the factors are positive.
    """
    terms = tuple(terms)
    names = (floor, *(name for factor, exponent, _ in terms for name in (factor, exponent)))

    def evaluate(theta: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        logs = [np.log(columns[column]) for _, _, column in terms]
        parts = [np.broadcast_to(np.exp(theta[:, :1]), (len(theta), len(logs[0])))]
        slopes = [parts[0]]
        for j, log in enumerate(logs):
            part = np.exp(theta[:, 1 + 2 * j, None] - theta[:, 2 + 2 * j, None] * log)
            parts.append(part)
            slopes += [part, -log * part]
        total = np.sum(parts, axis=0)
        return np.log(total), np.stack(slopes, axis=1) / total[:, None]

    return Equation(
        target=target,
        reads=tuple(dict.fromkeys(column for _, _, column in terms)),
        names=names,
        is_log=(True, *(is_log for _ in terms for is_log in (True, False))),
        starts=starts,
        evaluate=evaluate,
        pairs=tuple((2 + 2 * j, 1 + 2 * j) for j in range(len(terms))),
        delta=LOSS_DELTA,
        selection=selection,
    )
