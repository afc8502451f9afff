"""Puts plans side by side in a Markdown table.

espalier plan_table experiments/plans/*.json --output=experiments/plans/plans.md
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from launch import cli
from lm.config import UserError

_OUTPUT = flags.DEFINE_string("output", None, "file to write", required=True)


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        raise UserError("name files written by espalier plan, as experiments/plans/*.json")
    output = cli.path("output", _OUTPUT.value)
    from lm import files
    from lm.plan import page

    files.replace(output, page.page([Path(name) for name in argv[1:]]))
    print(f"written: {output}")


if __name__ == "__main__":
    cli.run(main, positional=True)
