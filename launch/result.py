"""Results for programs: with `--json`, a command prints one JSON object to stdout and nothing else.
The text that it would print for people goes to stderr.

A command defines the flag by `flag()` and passes its result to `give(values)`; `cli.run` prints it.
After a mistake, stderr has one line, the exit status is 2 and stdout is empty.
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
    """Adds values to the result of the command; a key that is given again is replaced."""
    _given.update(values)


@contextlib.contextmanager
def printed() -> Iterator[None]:
    """Runs a command in the body; with --json, only its result goes to stdout."""
    asked = flags.FLAGS[NAME] if NAME in flags.FLAGS else None  # noqa: SIM401 (FlagValues lacks get)
    if asked is None or asked.value is not True:  # in some commands --json names a file
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield
    print(json.dumps(_plain(_given), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    """Values that JSON can hold. NaN and infinities become text, as in metrics.jsonl."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
