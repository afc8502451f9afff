"""Plans a run for a machine, which may be absent.

    espalier plan --config=quickstart --target=v5e-16 [--search] [--output=plan.json]

Prints a summary of the run, the memory of a device, the bytes devices send, modelled times, and the
command that starts the run. --search tries every mesh, remat policy, accumulation and strategy for
long rows, and compiles the best 3.
"""

from __future__ import annotations

import json
import shlex

from absl import flags

from launch import cli, result

_CONFIG = cli.config_flag()
_TARGET = flags.DEFINE_string(
    "target", None, "machine: v5e-16, v5p-256, v6e-8, v4-32, tpu7x-8, h100-64, cpu-8", required=True
)
_SEARCH = flags.DEFINE_bool("search", False, "choose mesh, strategies, remat and accumulation")
_COMPILE = flags.DEFINE_bool("compile", True, "--nocompile: use formulas only, in seconds")
_OUTPUT = flags.DEFINE_string("output", "plan.json", "file to write; empty: none")
result.flag()
_WORKDIR = flags.DEFINE_string("workdir", "runs/planned", "workdir in the printed command")


def main(argv: list[str]) -> None:
    config = cli.load_config(_CONFIG.value)
    output, workdir = cli.out_file("output", _OUTPUT.value), cli.path("workdir", _WORKDIR.value)
    from launch.benchmarks import machine
    from lm import files, layers, targets  # imports jax, so only after the config was checked
    from lm import plan as plan_lib
    from lm.plan import explain, search, table
    from lm.run.progress import Waiting

    layers.check(config.model)
    target = targets.parse(_TARGET.value)
    targets.start(target)
    launch = plan_lib.Launch(shlex.join(cli.config_words()), str(workdir))
    points: list[search.Point] = []
    how = {"is_compiled": _COMPILE.value}
    with Waiting(f"planning for {target.name}") as waiting:
        if _SEARCH.value:
            found, points = search.search(config, target, launch, waiting.show, **how)
        else:
            found = plan_lib.plan(config, target, launch, **how)
    if points:
        print(search.table(points), end="\n\n")
    print(table.text(found), end="")
    values = plan_lib.to_json(found) | {"search": search.to_json(points)}
    if found.fits is False and not (found.program and found.program.is_unsupported):
        refusal = found.program.refusal if found.program else ""
        devices = targets.devices(target, **how)
        values["explained"] = explain.explain(found.config, devices, refusal)
        print(f"\n{values['explained']}", end="")
    values = machine.describe("plan") | values
    result.give(values)
    if output:
        files.replace(output, json.dumps(values, indent=1) + "\n")
        print(f"\nwritten: {output}")


if __name__ == "__main__":
    cli.run(main)
