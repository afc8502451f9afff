"""Prints what published laws advise for a budget.

    espalier recipe --parameters=1e7 --tokens=2e8 --out=recipe.py
    espalier recipe --flops=1e17 --tokens=1e9 --config=quickstart

Set two of --flops, --parameters (without embeddings) and --tokens; C = 6 N D gives the third. It
prints the learning rate, batch, warmup, decay, vocabulary and more by each law, with the law's
evidence; how far the laws differ; which values lie outside a law's domain; and muP's multipliers.
--config sets the shape of the model, the data and everything else. --out writes an experiment that
follows the advice, --json all of the above.
"""

from __future__ import annotations

import json

from absl import flags

from launch import cli, presets
from lm.config import to_mapping

_CONFIG = cli.config_flag(is_required=False)
_FLOPS = flags.DEFINE_float("flops", None, "FLOPs of the whole training")
_PARAMETERS = flags.DEFINE_float("parameters", None, "parameters without embeddings")
_TOKENS = flags.DEFINE_float("tokens", None, "tokens of the whole training")
_OUT = flags.DEFINE_string("out", "", "experiment to write, FILE.py")
_JSON = flags.DEFINE_string("json", "", "JSON file to write")


def main(argv: list[str]) -> None:
    del argv  # cli.run refuses positional arguments
    base = cli.load_config(_CONFIG.value or cli.read_config_file(presets.BASE))
    out, summary = (cli.out_file(n, f.value) for n, f in (("out", _OUT), ("json", _JSON)))
    from rich.console import Console

    from launch import experiments
    from launch.benchmarks import machine
    from lm import files
    from lm.report import recipe as page
    from lm.studies import recipe

    asked = recipe.budget(_FLOPS.value, _PARAMETERS.value, _TOKENS.value)
    config = recipe.configured(base, asked)
    found = recipe.rows(asked, config)
    values = {
        "budget": asked._asdict(),
        "laws": [row._asdict() for row in found],
        "spreads": [spread._asdict() for spread in recipe.spreads(found)],
        "multipliers": recipe.multipliers(config),
        "warnings": recipe.warnings(found, asked, config),
        "config": to_mapping(config),
    }
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, page.WIDTH)
    page.show(values, console)
    if out is not None:
        title = f"{asked.parameters:.3g} parameters, {asked.tokens:.3g} tokens, by espalier recipe."
        experiments.write(out, title, to_mapping(config))
    if summary is not None:
        text = json.dumps(machine.describe("recipe") | {"recipe": values}, indent=1)
        files.replace(summary, text + "\n")


if __name__ == "__main__":
    cli.run(main)
