"""Writes one HTML page about one run or several.

espalier report WORKDIR... [--out=report.html]
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from launch import cli, presets, result
from lm import report
from lm.config import UserError, to_mapping

_OUT = flags.DEFINE_string("out", "", "file to write; default report.html in the first WORKDIR")
result.flag()
_DEFAULTS = flags.DEFINE_string(
    "defaults", presets.BASE, "configuration that a single run is compared with"
)


def main(argv: list[str]) -> None:
    workdirs = [Path(argument).expanduser() for argument in argv[1:]]
    if not workdirs:
        raise UserError("which runs? name their folders: espalier report WORKDIR...")
    out = cli.out_file("out", _OUT.value) or workdirs[0] / "report.html"
    defaults = to_mapping(cli.load_config(cli.read_config_file(_DEFAULTS.value)))
    written = report.write(workdirs, out, defaults)
    result.give({"report": str(written), "runs": report.summary(workdirs)})
    print(written)


if __name__ == "__main__":
    cli.run(main, positional=True)
