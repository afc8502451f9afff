"""Extras: packages that one part of Espalier needs and a plain installation does not include."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from lm import files

DISTRIBUTION = "espalier-lm"
_FOLDER = Path(__file__).absolute().parent


def command(extra: str) -> str:
    """The command, run from the current folder, that installs an extra into this environment, in
    versions that are known to work together. It differs between a checkout and a wheel.
    """
    python, root = files.short(Path(sys.executable)), _FOLDER.parent
    if (root / "pyproject.toml").is_file():
        place = "." if root == Path.cwd() else str(root)
        pins, what = files.short(root / "constraints.txt"), ["-e", f"{place}[{extra}]"]
    else:
        pins, what = files.short(_FOLDER / "constraints.txt"), [f"{DISTRIBUTION}[{extra}]"]
    return shlex.join([python, "-m", "pip", "install", "-c", pins, *what])
