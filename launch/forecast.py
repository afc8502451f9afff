"""Writes down the loss of a bigger run, and scores it afterwards.

    espalier forecast --table=runs/sweep/sweep.jsonl --law=chinchilla \\
      --config=experiments/big.py --out=experiments/big/forecast.json      # commit that file
    espalier train    --config=experiments/big.py --workdir=runs/big
    espalier forecast --out=experiments/big/forecast.json --score=runs/big

The law is fitted to the lowest loss of each size and length in a table, or to finished runs of one
recipe (--run=WORKDIR, repeatable). The forecast run must have at least --factor (30) times the
compute of the largest fitted one. A forecast is never overwritten; --score refuses a run that has
another configuration or began before it. `espalier numbers` puts it into a README that names it.
"""

from __future__ import annotations

from absl import flags

from launch import cli
from lm.mapping import UserError

_CONFIG = cli.config_flag(is_required=False)
_OUT = flags.DEFINE_string("out", None, "JSON file of the forecast", required=True)
_TABLE = flags.DEFINE_string("table", "", "table of small runs: .jsonl, .csv or .parquet")
_RUN = flags.DEFINE_multi_string("run", [], "folder of a finished small run; repeatable")
_LAW = flags.DEFINE_string("law", "chinchilla", "law of the loss: chinchilla, compute, ...")
_SELECT = flags.DEFINE_string("select", "", "best or rows; empty: the law's own")
_FACTOR = flags.DEFINE_float(
    "factor", 30.0, "least compute of the run over the largest fitted", lower_bound=1.0
)
_MOST = flags.DEFINE_float(
    "most_compute", 0.0, "most FLOPs (6 N D) of a fitted run; 0: no limit", lower_bound=0.0
)
_BOOTSTRAPS = flags.DEFINE_integer("bootstraps", 1000, "resamples", lower_bound=100)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the resamples", lower_bound=0)
_SCORE = flags.DEFINE_string("score", "", "folder of the run: adds its loss to the forecast")


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    out = cli.out_file("out", _OUT.value)
    assert out is not None
    if _SCORE.value:
        from lm.studies import forecast

        _show(forecast.score(out, cli.path("score", _SCORE.value)))
        return
    if out.exists():
        raise UserError(f"--out={out} exists, and a forecast is never overwritten; name another")
    if _CONFIG.value is None:
        raise UserError("--config is missing; name the run to forecast")
    if bool(_TABLE.value) == bool(_RUN.value):
        raise UserError("name the small runs: set --table=FILE, or --run=WORKDIR several times")
    from lm.fits import laws, table

    rows = table.read(cli.path("table", _TABLE.value)) if _TABLE.value else None
    config = cli.load_config(_CONFIG.value)
    from launch.benchmarks import machine
    from lm.run.progress import CountBar
    from lm.studies import forecast

    rows = rows or forecast.table_of([cli.path("run", path) for path in _RUN.value])
    options = laws.Options(selection=_SELECT.value, bootstraps=_BOOTSTRAPS.value, seed=_SEED.value)
    run = forecast.target(config)
    with CountBar("resamples", options.bootstraps) as bar:
        limits = {"factor": _FACTOR.value, "most_compute": _MOST.value}
        found = forecast.make(_LAW.value, rows, run, options, **limits, progress=bar.advance)
    forecast.write(out, machine.describe("forecast"), found)
    _show(forecast.read(out))


def _show(values: dict[str, object]) -> None:
    from lm.report import forecast

    for name, value in zip(forecast.HEAD, forecast.row(values), strict=True):
        print(f"{name}: {value}")


if __name__ == "__main__":
    cli.run(main)
