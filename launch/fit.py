"""Fits a published law to a table of trainings.

    espalier fit power runs/sweep/sweep.jsonl --out=fit.html --json=fit.json
    espalier fit step_law grid.csv --column=learning_rate=lr --column=tokens=D
    espalier fit power table.jsonl --hold=c=1            # one batch: its exponent is held

The first argument is a law of lm/laws that has an equation; `espalier catalog` lists them. The
second is a table of JSON lines, CSV or Parquet with the columns of `espalier sweep`. Intervals come
from 1,000 bootstrap resamples; rows whose trainings share a trunk are resampled together.
"""

from __future__ import annotations

import json

from absl import flags

from launch import cli, values
from lm.mapping import UserError

_OUT = flags.DEFINE_string("out", "", "HTML page to write: the fit, its residuals, other laws")
_JSON = flags.DEFINE_string("json", "", "JSON file to write")
_FIGURE = flags.DEFINE_string("figure", "", "SVG file to write: the target against tokens")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the resamples", lower_bound=0)
_BOOTSTRAPS = flags.DEFINE_integer(
    "bootstraps", 1000, "resamples, at least 100; 0: no intervals", lower_bound=0
)
_TARGET = flags.DEFINE_string("target", "", "column to predict, for a law with several")
_SELECT = flags.DEFINE_string("select", "", "vertex, near, best or rows; empty: the law's own")
_DELTA = flags.DEFINE_float("delta", 0.0, "Huber delta of log residuals; 0: the law's own")
_COLUMN = flags.DEFINE_multi_string("column", [], "OURS=THEIRS: a column's name in the table")
_HOLD = flags.DEFINE_multi_string("hold", [], "NAME=VALUE: a constant that is not fitted")


def main(argv: list[str]) -> None:
    if len(argv) != 3:
        raise UserError("name a law and a table: espalier fit power table.jsonl")
    from lm import files
    from lm.fits import laws, table

    named = (("out", _OUT), ("json", _JSON), ("figure", _FIGURE))
    laws.check_bootstraps(_BOOTSTRAPS.value)
    out, summary, figure = (cli.out_file(name, flag.value) for name, flag in named)
    cli.check_suffix("figure", figure, ".svg")
    law = laws.find(argv[1])
    hold = values.numbers("hold", _HOLD.value)
    options = laws.Options(
        _TARGET.value, _SELECT.value, hold, _DELTA.value, _BOOTSTRAPS.value, _SEED.value
    )
    equations = laws.equations(law, options)
    if figure is not None and not any(equation.is_over_tokens for equation in equations):
        raise UserError(f"--figure={figure}: {argv[1]} has no curve over tokens; leave it out")
    total = _BOOTSTRAPS.value * len(equations)
    columns = values.pairs("column", _COLUMN.value, "OURS=THEIRS, as tokens=D")
    rows = table.read(cli.path("TABLE", argv[2]), columns)
    # These imports are slow, so the mistakes above are reported first.
    from lm.report import figures, fit
    from lm.run.progress import CountBar

    with CountBar("resamples", total) as bar:
        fits = laws.fit_table(law, rows, options, bar.advance)
    fitted = laws.fitted_law(law, fits, hold)
    found = fit.Found(argv[1], argv[2], law, fitted, fits, hold)
    fit.show(found)
    if figure is not None:
        files.replace(figure, figures.standalone(fit.over_tokens(found)))
    if out is not None:
        fit.write(found, out)
    if summary is not None:
        from launch.benchmarks import machine

        written = machine.describe("fit") | fit.values(found)
        files.replace(summary, json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, positional=True)
