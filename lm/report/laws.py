"""docs/laws.md: every law with its published constants, generated from the laws themselves.

`espalier numbers` rewrites it.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterable

from lm.families import LAWS
from lm.laws import Constant, Law

HEAD = ("constant", "value", "range", "unit", "evidence")
_INTRODUCTION = """# Published laws

What the field has written down about learning rates, batches and losses, as `lm/laws` holds it. One
file is one law. Its fields are its constants, and their defaults are the published values:
`Power()` is the published law, and `Power(a=0.6, b=-0.35, c=0.4)` one that was fitted.
`espalier fit` fits those that have an equation to a table of trainings:

```bash
espalier fit power experiments/power_transfer/sweep.jsonl --out=runs/fit.html
```

Evidence: **P** the paper's own text was read, **C** official code was read, **S** a reading note
that quotes the paper was read, **R** recomputed from public data; **UNCONFIRMED** is to be checked
before it is used. What was fitted over some sizes, tokens and batches says nothing outside them.

This page is written by `espalier numbers`.
"""


def markdown() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for name in LAWS.names():
        law = LAWS.find(name, "law")
        if law.__module__ == f"{LAWS.package}.{name}":  # not of an installed package
            parts.append(_section(name, law))
    return "\n".join(parts)


def rows(constants: Iterable[Constant]) -> list[tuple[str, ...]]:
    """One line per constant, under HEAD."""
    return [
        (
            constant.name,
            f"{constant.value:.6g}",
            "" if constant.low is None else f"{constant.low:g} to {constant.high:g}",
            constant.unit,
            constant.tag,
        )
        for constant in constants
    ]


def domain(constant: Constant) -> str:
    """The range over which a constant was fitted: "tokens 2e+09 to 2.56e+11"."""
    ends = constant.domain.items()
    return ", ".join(f"{key} {low:.3g} to {high:.3g}" for key, (low, high) in ends)


def _section(name: str, law: type[Law]) -> str:
    document = inspect.getdoc(sys.modules[law.__module__]) or ""
    parts = [f"## {name}\n\n{document}\n"]
    if law.equations:
        message = [f"`{e.target}` from {_named(e.reads)}" for e in law.equations]
        parts.append(f"`espalier fit {name}` fits {', and '.join(message)}.\n")
    origin = lambda constant: (constant.source, domain(constant))
    for (source, over), constants in itertools.groupby(law.published, origin):
        parts.append(f"{source}{f' ({over})' if over else ''}:\n")
        lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
        lines += [f"| {' | '.join(row)} |" for row in rows(constants)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _named(columns: Iterable[str]) -> str:
    return " and ".join(f"`{column}`" for column in columns)
