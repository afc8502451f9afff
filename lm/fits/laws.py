"""A law fitted to a table: for each of its equations, from a file to constants with intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import cast, get_args

from lm.families import LAWS
from lm.fits import fit, select
from lm.fits.fit import Fitted
from lm.fits.select import LOSS, RATE
from lm.fits.table import Table
from lm.laws import Equation, Law, Selection
from lm.mapping import UserError

FEWEST = 100  # resamples: an end of a 95 % interval is then about the third value from that side


@dataclasses.dataclass(frozen=True)
class Options:
    """`target` is the one equation to fit; "" means all. `selection` "" and `delta` 0 mean the
    law's own. `hold` are constants that are not fitted.
    """

    target: str = ""
    selection: str = ""
    hold: Mapping[str, float] = dataclasses.field(default_factory=dict)
    delta: float = 0.0
    bootstraps: int = fit.BOOTSTRAPS
    seed: int = 0


def find(name: str) -> type[Law]:
    """A law that has an equation to fit.

    Raises:
      UserError: no such law, or one without an equation.
    """
    law = LAWS.find(name, "LAW")
    if law.equations:
        return law
    fittable = [n for n in LAWS.names() if LAWS.find(n, "LAW").equations]
    raise UserError(f"law {name!r} has no equation to fit; choose one of {', '.join(fittable)}")


def equations(law: type[Law], options: Options) -> tuple[Equation, ...]:
    """The equations to fit, with constants held and with the requested delta and selection.

    Raises:
      UserError: an unknown target or selection, a constant that no equation has, a bad delta.
    """
    found = [e for e in law.equations if options.target in ("", e.target)]
    if not found:
        targets = ", ".join(equation.target for equation in law.equations)
        raise UserError(f"--target={options.target}: the law predicts {targets}")
    if options.selection and options.selection not in get_args(Selection):
        known = ", ".join(get_args(Selection))
        raise UserError(f"--select={options.selection} is not one of {known}")
    if options.delta < 0:
        raise UserError(f"--delta={options.delta:g} must be positive, or 0 for the law's own")
    known_names = {name for equation in found for name in equation.names}
    if unknown := [name for name in options.hold if name not in known_names]:
        fit.held(found[0], {unknown[0]: options.hold[unknown[0]]})
    made = []
    for equation in found:
        own = {n: v for n, v in options.hold.items() if n in equation.names}
        made.append(
            dataclasses.replace(
                fit.held(equation, own) if own else equation,
                delta=options.delta or equation.delta,
                selection=cast(Selection, options.selection or equation.selection),
            )
        )
    return tuple(made)


def fit_table(
    law: type[Law],
    table: Table,
    options: Options,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Fitted, ...]:
    """Every requested equation of a law, fitted to the rows that are selected for it. `progress(n)`
    is called after n more bootstraps.

    Raises:
      UserError: the table or the options cannot be used.
    """
    return tuple(
        fit.fit(
            equation,
            rows(equation, table),
            bootstraps=options.bootstraps,
            seed=options.seed,
            hypotheses=tuple(h for h in law.hypotheses if h[0] in equation.names),
            progress=progress,
        )
        for equation in equations(law, options)
    )


def check_bootstraps(count: int) -> None:
    """Refuses a number of resamples so small that single resamples are the ends of an interval."""
    if 0 < count < FEWEST:
        raise UserError(
            f"--bootstraps={count}: an interval needs at least {FEWEST}; set 1000, or 0 for none"
        )


def rows(equation: Equation, table: Table) -> select.Selected:
    """The rows of a table that are selected for an equation.

    Raises:
      UserError: the table cannot be used.
    """
    needed = dict.fromkeys([equation.target, *equation.reads])
    if equation.selection != "rows":
        needed |= dict.fromkeys([RATE, LOSS])
    diverged = table.diverged()
    return select.select(table.finished(tuple(needed)), equation.selection, diverged)


def fitted_law(law: type[Law], found: tuple[Fitted, ...], hold: Mapping[str, float]) -> Law:
    """The law with the fitted and the held constants; one without an equation is as published."""
    values = dict(hold)
    for one in found:
        values |= one.values
    return law().replaced(values)
