"""Ranks schedules by their predicted final loss.

    espalier predict_loss runs/constant runs/cosine --key=eval/stdlib/loss
        --schedule=linear --schedule="wsd:decay=10 percent" --out=predicted.html

The annealing law (arXiv 2408.11029) is fitted to the losses that the runs logged; the runs may
differ only in schedule, length and seed. A --schedule has the length of the first run and, unless
it sets them, that run's peak and warmup. The loss of --held_out=RUN is predicted from its own
schedule and compared with the logged one. The law's momentum is not fitted, since one curve does
not identify it; it is 1 - 20 / (steps of the longest run).
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from absl import flags

from launch import cli, members
from lm.config import UserError
from lm.families import SCHEDULES

_SCHEDULE = flags.DEFINE_multi_string("schedule", [], "NAME:OPTION=VALUE,...; repeatable")
_KEY = flags.DEFINE_string("key", "train/loss", "logged loss: train/loss or eval/NAME/loss")
_HELD_OUT = flags.DEFINE_multi_string("held_out", [], "run folder to predict and score; repeatable")
_MOMENTUM = flags.DEFINE_float("momentum", None, "lambda, the law's momentum", 0.001, 0.99999)
_BOOTSTRAPS = flags.DEFINE_integer("bootstraps", 200, "resamples of the fit", 0, 10_000)
_OUT = flags.DEFINE_string("out", "predicted.html", "page to write; empty: none")
_SVG = flags.DEFINE_string("svg", "", "picture to write")
_JSON = flags.DEFINE_string("json", "", "JSON file to write")


def main(argv: list[str]) -> None:
    if len(argv) < 2 or not (_SCHEDULE.value or _HELD_OUT.value):
        raise UserError("name runs and schedules: espalier predict_loss RUN --schedule=wsd")
    outs = [cli.out_file(n, f.value) for n, f in (("out", _OUT), ("svg", _SVG), ("json", _JSON))]
    asked = {text: members.member("schedule", text, SCHEDULES) for text in _SCHEDULE.value}
    from launch.benchmarks import machine
    from lm import files
    from lm.report import figures
    from lm.report import predict_loss as page
    from lm.report.schedules import like
    from lm.run.progress import Waiting
    from lm.studies import predict_loss

    runs = [predict_loss.read(cli.path("RUN", word), _KEY.value) for word in argv[1:]]
    held_out = [predict_loss.read(cli.path("held_out", w), _KEY.value) for w in _HELD_OUT.value]
    predict_loss.check_alike([*runs, *held_out])
    momentum = predict_loss.momentum(runs) if _MOMENTUM.value is None else _MOMENTUM.value
    first = runs[0].config
    rules = {text: like(first, values, f"--schedule={text}") for text, values in asked.items()}
    with Waiting("fitting the annealing law"):
        found = predict_loss.fit(runs, momentum, _BOOTSTRAPS.value)
    rates = {text: predict_loss.rates(rule, first) for text, rule in rules.items()}
    rows = [predict_loss.predicted(found, text, curve) for text, curve in rates.items()]
    rows += [predict_loss.scored(found, run) for run in held_out]
    values: dict[str, Any] = {
        "runs": [run.name for run in runs],
        "key": _KEY.value,
        "law": dataclasses.asdict(found.law),
        "residual": predict_loss.residual(found, runs),
        "schedules": page.plain(rows),
    }
    print(page.table(values), end="")
    drawn = predict_loss.lines(found, runs, held_out, rates)
    texts = (
        page.document(values, drawn),
        figures.standalone(page.figure(drawn)),
        json.dumps(machine.describe("predict_loss") | {"predicted": values}, indent=1) + "\n",
    )
    for out, text in zip(outs, texts, strict=True):
        if out is not None:
            files.replace(out, text)


if __name__ == "__main__":
    cli.run(main, positional=True)
