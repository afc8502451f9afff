"""Reads the commands of README.md, CONTRIBUTING.md and docs/*.md: each line of a bash block.

Lines of a block `sh` are not read: they need a file or a folder that the reader makes first.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from launch import cli
from launch import command as command_lib

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```bash\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# A line outside a block that looks like a command: a reader would type it, and no test runs it.
INDENTED = re.compile(r"^ {4,}(espalier|python -m|launch/\w+|\.venv/bin/) .*$", re.MULTILINE)
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=.*")


class Command(NamedTuple):
    """A command of a page. `env` holds the variables set before it on its line; `words` are split
    as by a shell.
    """

    page: str
    env: dict[str, str]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)

    @property
    def is_ours(self) -> bool:
        return self.words[0] == "espalier"


def commands(path: Path) -> list[Command]:
    """All commands in the bash blocks of a page, in order."""
    page = str(path.relative_to(ROOT))
    blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
    return [found for _, block in blocks for found in _commands(page, block)]


def _commands(page: str, block: str) -> Iterator[Command]:
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            first, words = words[:end], words[end + 1 :]
            count = next((i for i, x in enumerate(first) if not ASSIGNMENT.fullmatch(x)), 0)
            env = dict(x.split("=", 1) for x in first[:count])
            yield Command(page, env, tuple(first[count:]))


def unfenced(path: Path) -> list[str]:
    """Lines of a page that look like commands and are not in a block."""
    return INDENTED.findall(FENCED.sub("", path.read_text(encoding="utf-8")))


@contextlib.contextmanager
def launcher(name: str) -> Iterator[Any]:
    """Imports the module of a command again, so that only its flags and those of absl are defined.
    Afterwards the flags and modules that other tests had imported are restored.
    """
    known, module = flags.FLAGS, f"launch.{name}"
    was_parsed, imported = known.is_parsed(), sys.modules.pop(module, None)
    of_absl = {
        flag.name
        for owner, found in known.flags_by_module_dict().items()
        if owner.startswith("absl")
        for flag in found
    }
    others = {flag: known[flag] for flag in set(known) - of_absl}

    def forget() -> None:
        for flag in set(known) - of_absl:
            delattr(known, flag)
        known.unparse_flags()
        sys.modules.pop(module, None)

    forget()
    try:
        yield importlib.import_module(module)
    finally:
        forget()
        for flag, kept in others.items():
            if flag == kept.name:  # defining a flag defines its short name too
                known[flag] = kept
        if imported is not None:
            sys.modules[module] = imported
        if was_parsed:
            known.mark_as_parsed()


def check(words: tuple[str, ...]) -> None:
    """Parses the flags, configuration and overrides of a command line of `espalier`. The
    configuration of a run is checked completely.

    Raises:
      UserError: The command line has a mistake.
    """
    name, *arguments = words[1:] or ["help"]
    if name == "help":
        return
    assert name in command_lib.names(), name
    with launcher(name) as module:
        text = Path(module.__file__).read_text(encoding="utf-8")
        default = ["--config=base"] if name == "import_hf" else []  # as launch/import_hf.py does
        argv = [f"launch/{name}.py", *default, *arguments]
        if "--help" in arguments:
            return
        cli.parse(argv, flags.FLAGS, are_positional_allowed="positional=True" in text)
        config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
        if config is not None and not isinstance(config, str) and "model" in config:
            cli.load_config(config)
