"""Draws the learning rates of schedules against tokens.

    espalier schedules --schedule=power --schedule="wsd:decay_shape=sqrt,decay=10 percent"
        --tokens=1e9 --tokens_per_step=65536 --out=rates.html
    espalier schedules --config=quickstart --schedule=cosine

--schedule (repeatable) names a file of lm/schedules with its options. --config adds the schedule of
an experiment and sets the length of the run and its tokens per step. --out is a page (.html) or a
figure (.svg). --refine=RUN adds the schedule derived from the gradient norms that RUN logged (arXiv
2310.07831); --experiment=FILE.py then writes --config with that schedule, for espalier train.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from launch import cli, members
from lm.config import UserError, to_mapping
from lm.families import SCHEDULES

_CONFIG = cli.config_flag(is_required=False)
_SCHEDULE = flags.DEFINE_multi_string("schedule", [], "NAME:OPTION=VALUE,...; repeatable")
_TOKENS = flags.DEFINE_float("tokens", None, "length of the run", lower_bound=1, upper_bound=2**53)
_PER_STEP = flags.DEFINE_integer("tokens_per_step", None, "batch in tokens", lower_bound=1)
_OUT = flags.DEFINE_string("out", "schedules.html", "page (.html) or figure (.svg) to write")
_REFINE = flags.DEFINE_string("refine", "", "run folder whose gradient norms give a schedule")
_WINDOW = flags.DEFINE_float("window", 0.1, "running median, share of the run", 0.0, 1.0)
_QUANTILE = flags.DEFINE_float("quantile", 0.01, "raises smaller norms to it", 0.0, 1.0)
_POWER = flags.DEFINE_float("power", 2.0, "of the norm: 2 (SGD) or 1 (Adam)", 0.0, 4.0)
_POINTS = flags.DEFINE_integer("points", 101, "in the refined profile", 2, 10_000)
_EXPERIMENT = flags.DEFINE_string("experiment", "", "file for --config with the refined schedule")


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    out = cli.out_file("out", _OUT.value)
    if out is None or out.suffix not in (".html", ".svg"):
        raise UserError(f"--out={_OUT.value} is not a page or figure; end it in .html or .svg")
    experiment = cli.out_file("experiment", _EXPERIMENT.value)
    if experiment and not (_REFINE.value and _CONFIG.value):
        raise UserError(f"--experiment={experiment} needs --refine=RUN and --config=FILE; set both")
    config = cli.load_config(_CONFIG.value) if _CONFIG.value else None
    tokens = _TOKENS.value or (config and config.run_tokens)
    if not (tokens and (per_step := _PER_STEP.value or (config and config.tokens_per_step))):
        raise UserError(
            "length of run or step is missing; set --tokens and --tokens_per_step, or --config"
        )
    from launch import experiments
    from lm import files
    from lm.report import figures, schedules

    rules: dict[str, Any] = schedules.of_config(config) if config else {}
    for text in _SCHEDULE.value:
        values = members.member("schedule", text, SCHEDULES)
        rules[text] = schedules.rule(values, f"--schedule={text}")
    if _REFINE.value:
        options = schedules.Refining(_WINDOW.value, _QUANTILE.value, _POWER.value, _POINTS.value)
        profile = schedules.profile(cli.path("refine", _REFINE.value), options)
        peak = config.schedule.peak_learning_rate if config else 0.02
        values = {"family": "refined", "peak_learning_rate": peak, "profile": list(profile)}
        rules[f"refined by {_REFINE.value}"] = schedules.rule(values, "schedule")
        if experiment and config:
            title = f"The learning rate that the gradient norms of {_REFINE.value} ask for."
            experiments.write(experiment, title, to_mapping(config) | {"schedule": values})
    if not rules:
        raise UserError("nothing to draw; set --schedule, --refine or --config")
    drawn = schedules.create(rules, int(tokens), per_step)
    if out.suffix == ".svg":
        files.replace(out, figures.standalone(schedules.figure(drawn)))
    else:
        title = f"{tokens:,.0f} tokens in steps of {per_step:,}"
        files.replace(out, schedules.document(drawn, title))
    print(f"written: {out}" + (f", {experiment}" if experiment else ""))


if __name__ == "__main__":
    cli.run(main)
