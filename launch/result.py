"""Results that programs read: with `--json` a command prints one JSON object to stdout and nothing
else there; what it would print for people goes to stderr.

A command defines the flag by `flag()` and says its result by `give(values)`; `cli.run` prints it. A
mistake is one line on stderr and status 2, as ever, and then stdout is empty.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

# The launcher that asks for the flag owns it, so that `--help` lists it.
flags.disclaim_key_flags()

NAME = "json"
_given: dict[str, Any] = {}


def flag() -> None:
    """Defines `--json`."""
    flags.DEFINE_bool(NAME, False, "print one JSON object to stdout and nothing else there")


def give(values: Mapping[str, Any]) -> None:
    """Says what the result of the command is; a second call replaces keys of the first."""
    _given.update(values)


@contextlib.contextmanager
def printed() -> Iterator[None]:
    """Around a command: with --json its result alone is on stdout."""
    asked = flags.FLAGS[NAME] if NAME in flags.FLAGS else None  # noqa: SIM401 (it has no get)
    if asked is None or asked.value is not True:  # --json of another command may name a file
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield
    print(json.dumps(_plain(_given), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    """What is not finite as text, as in metrics.jsonl: JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
