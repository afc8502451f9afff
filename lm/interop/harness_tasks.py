"""Checks, without executing anything, that the tasks of a folder for lm-evaluation-harness are
data.

A task is a .yaml file and the files that it includes. `!function module.name` in one of them
imports the Python file module.py beside it before the task is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from lm.config import UserError

PLAIN = "tag:yaml.org,2002:"
PYTHON = f"{PLAIN}python/"


def check_is_data(folder: Path) -> None:
    """Checks every task file of a folder.

    Raises:
      UserError: a file is not YAML, or holds a value that is made by code.
    """
    pending, seen = sorted(folder.rglob("*.yaml")), set()
    while pending:
        path = pending.pop()
        try:
            path = path.resolve()
            if path in seen:
                continue
            seen.add(path)
            root = yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
        except (OSError, yaml.YAMLError, ValueError, RuntimeError) as error:
            message = " ".join(str(getattr(error, "problem", None) or error).split())
            raise UserError(f"{path}: cannot be read ({message}); mend or remove it") from None
        for node in _nodes(root):
            if not node.tag.startswith(PLAIN) or node.tag.startswith(PYTHON):
                raise UserError(
                    f"{path}, line {node.start_mark.line + 1}: {node.tag} runs Python of that "
                    "folder; read it, then set --trust_tasks"
                )
        pending += [path.parent / name for name in _included(root)]


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """All nodes, each once, since an alias may lead back to a node above it."""
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            pending += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value


def _included(root: yaml.Node | None) -> list[str]:
    """The files that a key `include` names, one or a list, at any depth: a merge (`<<`) can lift it
    to the task, and a group holds tasks.
    """
    mappings = [node for node in _nodes(root) if isinstance(node, yaml.MappingNode)]
    pairs = [pair for node in mappings for pair in node.value]
    found = [value for key, value in pairs if key.value == "include"]
    nested = [node for value in found for node in _nodes(value)]
    return [node.value for node in nested if isinstance(node, yaml.ScalarNode)]
