"""Trains a run while searching its learning rate (AutoLRS).

`espalier autolrs --config=autolrs --workdir=DIR`, or
`espalier autolrs --config=RUN.py --config.schedule=wsd --lowest=1e-4 --highest=1e-1
    --workdir=DIR`; the same command resumes.

--config names a run, or a file whose get_config returns a search. The schedule keeps its warmup and
decay; the rate between them is chosen stage by stage. Besides its own N steps, a stage costs
--probes probes of N / 10 steps (at least 10, plus --anneal), so 10 probes cost as much as a second
training. DIR holds search.json, autolrs.json, autolrs.md, autolrs.svg, a run folder for each stage,
and decay/, the run of the final decay.
"""

from __future__ import annotations

import json
from typing import Any

from absl import flags

from launch import cli
from lm.mapping import UNFINISHED

_CONFIG = cli.config_flag(study="lm.studies.autolrs:Search")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the search", required=True)
_LOWEST = flags.DEFINE_float("lowest", None, "lowest learning rate; default 1e-4")
_HIGHEST = flags.DEFINE_float("highest", None, "highest learning rate; default 0.1")
_FIRST = flags.DEFINE_integer("first_stage", None, "steps of the first stage; default 100")
_LONGEST = flags.DEFINE_integer("longest_stage", None, "most steps of a stage; default 800")
_PROBES = flags.DEFINE_integer("probes", None, "probes of a stage; default 10")
_VALIDATION = flags.DEFINE_integer("validation", None, "held-out tokens a probe; default 0: none")
_ANNEAL = flags.DEFINE_integer("anneal", None, "steps of decay to zero of each probe; default 0")
_DATA_DIR = cli.data_dir_flag()


def _values() -> dict[str, Any]:
    """The search that the flags describe, as plain values."""
    values = _CONFIG.value.to_dict()
    if "lowest" not in values:
        values = {"run": values, "lowest": 1e-4, "highest": 0.1, "first_stage": 100}
        values |= {"longest_stage": 800, "probes": 10, "validation": 0, "anneal": 0}
    asked = (_LOWEST, _HIGHEST, _FIRST, _LONGEST, _PROBES, _VALIDATION, _ANNEAL)
    return values | {x.name: x.value for x in asked if x.value is not None}


def main(argv: list[str]) -> int:
    del argv  # cli.run refuses positional arguments
    import jax

    from launch.benchmarks import machine
    from lm import files
    from lm.data import prepare
    from lm.report import autolrs as page
    from lm.report.figures import standalone
    from lm.studies import autolrs

    search = autolrs.create(_values())
    workdir = cli.workdir(_WORKDIR.value, "autolrs")
    # All probes share their compiled programs, also when a search is resumed.
    jax.config.update("jax_compilation_cache_dir", str(workdir / ".compiled"))

    def show(found: list[autolrs.Stage]) -> None:
        files.replace(workdir / "autolrs.md", page.table(found))
        files.replace(workdir / "autolrs.svg", standalone(page.figure(found)))

    found = autolrs.run(search, workdir, prepare.resolve_data_dir(_DATA_DIR.value), show)
    if found is None:
        print("stopped and saved; the same command resumes")
        return UNFINISHED
    values = machine.describe("autolrs") | page.plain(found, autolrs.loss(workdir))
    files.replace(workdir / "autolrs.json", json.dumps(values, indent=1) + "\n")
    print(page.summary(values))
    print(f"autolrs.svg, search.json and the runs of the stages are in {workdir}")
    return 0


if __name__ == "__main__":
    cli.run(main)
