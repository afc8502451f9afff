"""Shell lines that a user can copy as printed: a command of this environment, how to enter the
environment, and what to do next with a run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lm import files

# For each shell: the word that sources a file, and the file of a virtual environment to source.
_ENTER = {"fish": ("source", "activate.fish"), "csh": ("source", "activate.csh")}
_ENTER["tcsh"] = _ENTER["csh"]


def line(name: str, words: Sequence[str] = ()) -> str:
    """A command line of espalier that works in the current folder, whether or not the environment
    is active.
    """
    found = _script()
    if _is_entered(found):
        start = ["espalier"]
    elif found.is_file():
        start = [files.short(found)]
    else:  # a checkout that is not installed
        start = [sys.executable, files.short(Path(__file__).parent.parent / "espalier.py")]
    return shlex.join([*start, name, *words])


def enter() -> str | None:
    """The line that activates this environment in the user's shell; None if it is active or cannot
    be activated.
    """
    shell = Path(os.environ.get("SHELL", "")).name
    word, file = _ENTER.get(shell, (".", "activate"))
    path = _script().parent / file
    if _is_entered(_script()) or not path.is_file():
        return None
    return shlex.join([word, files.short(path)])


def next_lines(workdir: Path, config: Sequence[str]) -> str:
    """What to do next with a finished run: shell lines, each with a comment. `config`: `--config`
    of the run and its overrides, one word each. For a run of the preset quickstart, one line trains
    another mixer.
    """
    run = files.short(workdir)
    lines = [(text, "enter the environment, once a shell") for text in [enter()] if text]
    lines += [
        ("espalier", "every command, and the presets that --config takes"),
        (shlex.join(["espalier", "evaluate", f"--checkpoint={run}"]), "bits per byte"),
        (
            shlex.join(["espalier", "generate", f"--checkpoint={run}", "--prompt=def main("]),
            "what it writes",
        ),
    ]
    if config[0] == "--config=quickstart":
        other = ["--config=quickstart:softmax", *config[1:]]
        other += [f"--workdir={files.short(workdir.parent / 'other')}"]
        lines.append((shlex.join(["espalier", "train", *other]), "another mixer"))
    width = max(len(text) for text, _ in lines)
    return "\n".join(["next:", *(f"  {text:{width}}  # {what}" for text, what in lines)])


def _script() -> Path:
    """The path where an installation puts the console command."""
    return Path(sys.executable).parent / "espalier"


def _is_entered(script: Path) -> bool:
    """Whether `espalier` alone starts the command of this environment."""
    found = shutil.which("espalier")
    return found is not None and script.is_file() and os.path.samefile(found, script)
