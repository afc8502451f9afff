"""Writes experiments: one file with `get_config` that states every key of a run."""

from __future__ import annotations

import pprint
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm import files

TEXT = '''"""{title}

    espalier train --config={path} --workdir=DIR
"""

from ml_collections import ConfigDict, FieldReference

VALUES = {values}


def get_config() -> ConfigDict:
    """Every key of the run."""
    pattern = FieldReference(VALUES["model"]["pattern"], field_type=object)
    return ConfigDict(VALUES | {{"model": VALUES["model"] | {{"pattern": pattern}}}})
'''


def write(path: Path, title: str, values: Mapping[str, Any]) -> None:
    """Writes `values` (from lm.config.to_mapping) as an experiment that every launcher takes.

    Args:
      title: sentences for its docstring; line breaks are kept.
    """
    shown = pprint.pformat(_frozen(values), width=98, compact=True, sort_dicts=False)
    title = title.replace("\\", "/").replace('"""', "'''")
    files.replace(path, TEXT.format(title=title, path=shlex.quote(str(path)), values=shown))


def _frozen(value: Any) -> Any:
    """Converts lists to tuples, which flags can set."""
    if isinstance(value, Mapping):
        return {key: _frozen(inner) for key, inner in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
