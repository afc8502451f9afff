"""Sets of text named on the command line, on which a checkpoint is evaluated."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lm.config import DataConfig, UserError
from lm.data.config import held_out

if TYPE_CHECKING:
    from lm.evaluation.evaluate import Result  # imports jax

TEXT = "text"  # the name of the only set of --text
WHOLE = 1 << 62  # tokens of a set to score: all of them


def added(data: DataConfig, values: Iterable[str]) -> DataConfig:
    """The data of a run, with the sets of `--source=NAME:PATH` added to its own.

    Raises:
      UserError: the flag is malformed, or a name is given twice or belongs to a source of the run.
    """
    sources = dict(data.sources)
    for value in values:
        name, _, path = value.partition(":")
        if not re.fullmatch(r"[\w-]+", name) or not path:
            raise UserError(f"--source={value!r} must be NAME:PATH with a word as NAME")
        if name in data.sources:
            raise UserError(f"--source={name}:... is a source of the run; choose another name")
        if name in sources:
            raise UserError(f"--source gives the name {name!r} twice; choose another name")
        sources[name] = held_out(path, "text")
    return dataclasses.replace(data, sources=sources)


def alone(data: DataConfig, path: str) -> DataConfig:
    """Data whose only set is `--text=PATH`."""
    return dataclasses.replace(data, sources={TEXT: held_out(path, "text")})


@contextlib.contextmanager
def by_flag() -> Iterator[None]:
    """In the body, mistakes in the set of --text name the flag and not a key of the run's data.

    Raises:
      UserError: the mistake, with the flag's name.
    """
    try:
        yield
    except UserError as error:
        text = str(error).replace(f"data.sources.{TEXT}.path", "--text")
        raise UserError(text.replace(f" of data.sources.{TEXT}", "")) from error


def line(result: Result, path: str) -> str:
    """The line that --text prints for a result of BitsPerByte. The end of a text counts as a token
    without bytes. The first token counts only if something predicts it.
    """
    numbers = result.numbers
    bits, nats, units = numbers[f"bpb/{TEXT}"], numbers[f"loss/{TEXT}"], numbers["bpb"].units
    interval = "" if math.isnan(bits.low) else f" (95 %: {bits.interval('.4f')})"
    num_bytes = 0 if units is None else int(units[:, 1].sum())
    return (
        f"{path}: {bits.value:.4f} bits per byte{interval}, perplexity {math.exp(nats.value):.4g} "
        f"({nats.value:.4f} nats per token); {result.cost.tokens:,} tokens, {num_bytes:,} bytes"
    )
