"""The console command `espalier`: `espalier NAME` runs launch/NAME.py as `python -m launch.NAME`.

A command is a file of this folder that ends in `cli.run(main)`; the first sentence of its docstring
describes it. Commands are not registered anywhere else, and only the one that runs is imported.
"""

from __future__ import annotations

import ast
import re
import runpy
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

import lm
from kernels.spelling import near
from launch import cli, ends, presets
from lm.extras import DISTRIBUTION
from lm.mapping import UserError

HERE = Path(__file__).parent
HELP = ("-h", "--help", "-help", "help")


def names() -> list[str]:
    """The commands, in alphabetical order."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in HERE.glob("*.py")}
    return sorted(name for name, text in texts.items() if "\n    cli.run(main" in text)


def summary(path: Path) -> str:
    """The first sentence of a file's docstring, without its full stop."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    text = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    return re.split(r": `|\.\s|\.$", text)[0]


def listing() -> str:
    """The text that `espalier` prints without arguments."""
    known = names()
    width = max(map(len, known))
    lines = [f"  {name:{width}}  {summary(HERE / f'{name}.py')}" for name in known]
    return "\n".join(
        [
            "espalier COMMAND [--flag=value ...]; espalier COMMAND --help lists its flags",
            "",
            *lines,
            "",
            *textwrap.wrap(f"--config takes a file or a name: {', '.join(presets.forms())}", 80),
        ]
    )


def run(words: list[str]) -> NoReturn:
    """Runs the command that the first word names; the other words are its command line.

    Raises:
      SystemExit: always, with the command's status, or 2 if the command does not exist.
    """
    name, *flags = words or ["help"]
    ends.outlast_readers()
    if name in HELP:
        print(listing())
        raise SystemExit(0)
    if name == "--version":
        print(f"{DISTRIBUTION} {lm.__version__}")
        raise SystemExit(0)
    with cli.mistakes_in_one_line():
        if name not in (known := names()):
            close = near(name.replace("-", "_"), known)
            hint = f"did you mean {close!r}?" if close else "espalier alone lists them"
            raise UserError(f"{name!r} is not a command of espalier; {hint}")
    sys.argv[:] = [str(HERE / f"{name}.py"), *flags]
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)
    raise AssertionError("a command ends by SystemExit")
