"""The cells of a sweep: every combination of values as a run of its own, and which of them are
decays of one trunk.

    run, {"schedule.peak_learning_rate": (0.01, 0.02), "run.length": ("1e6 tokens", "2e6 tokens")}
    -> 4 cells of 2 trunks

A schedule with a stable phase is the same function of tokens up to its decay, however long the run
is planned. So cells that differ only in length and decay are branches of one training, the trunk,
and the axis of tokens costs one run. Lengths and decays are rounded to whole steps here, so that a
branch is, bit for bit, the run that its cell's configuration describes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm import build as build_lib
from lm.config import Config, Duration, UserError, flatten, from_mapping, nearest, to_mapping
from lm.mapping import lasting
from lm.schedules import Phased
from lm.studies import answers, grid, sizes

WIDTH = "width"  # an axis with its own rule: heads and feed-forwards grow with the model
# Options of a schedule that do not affect the trunk.
DECAY = ("decay", "decay_shape", "final_ratio", "half_life")
START = ("init_from", "decay_from")


class Cell(NamedTuple):
    """The coordinates of a cell in the grid (lm/studies/grid.py), which name its folder: digest of
    the trunk, steps of the run, digest of the cell. A trunk's cells are done in order of steps.
    """

    trunk: str
    steps: int
    digest: str


@dataclasses.dataclass(frozen=True)
class Planned:
    """The run of a cell. `values` are those that the axes set, by key. `asked` is everything that
    the outcome depends on. `start` is the step at which its decay branches from the trunk; None for
    a run without a trunk.
    """

    config: Config
    values: Mapping[str, Any]
    asked: Mapping[str, Any]
    start: int | None

    @property
    def trunk(self) -> Config:
        """The run up to the decay; for a run without a trunk, the whole run."""
        if self.start is None:
            return self.config
        return dataclasses.replace(
            self.config,
            schedule=dataclasses.replace(self.config.schedule, decay=Duration(0, "steps")),
            run=dataclasses.replace(self.config.run, length=Duration(self.start, "steps")),
        )


def plan(
    run: Mapping[str, Any], grids: Sequence[Mapping[str, Sequence[Any]]], min_steps: int
) -> dict[Cell, Planned]:
    """Every cell of every grid, once, in the order of the grids, without cells of fewer than
    `min_steps` steps.

    Raises:
      UserError: an axis is not a key of a run, has no values or one value twice; a combination is
      refused as a run; or no cell is left.
    """
    content, found = functools.cache(answers.digest), {}
    longest = 0
    for axes in grids:
        _check(axes, run)
        for values in itertools.product(*axes.values()):
            planned = _plan(run, dict(zip(axes, values, strict=True)), content)
            longest = max(longest, planned.config.run_steps)
            if planned.config.run_steps >= min_steps:
                found.setdefault(_cell(planned), planned)
    if not found:
        raise UserError(
            f"the longest cell of the grid has {longest} steps, min_steps is {min_steps}; set "
            f"min_steps={longest} or a longer run.length"
        )
    _check_runs(found)
    return found


def _check(axes: Mapping[str, Sequence[Any]], run: Mapping[str, Any]) -> None:
    keys = flatten(run)
    groups = {key.rpartition(".")[0] for key in keys} | {""}
    for key, values in axes.items():
        if key in START:
            raise UserError(f"grid: {key} is set by the sweep itself; leave it out of the grid")
        if key.rpartition(".")[0] not in groups:
            raise UserError(f"grid: no key {key!r} in a run; {nearest(key, keys)}")
        if not values:
            raise UserError(f"grid: {key} has no values; give at least one")
        texts = [json.dumps(to_mapping(value)) for value in values]
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise UserError(f"grid: {key} has the value {twice[0]} twice; give it once")


def _check_runs(found: Mapping[Cell, Planned]) -> None:
    """Checks every kind of run once, as far as possible without a device."""
    checked = set()
    for planned in found.values():
        kind = json.dumps(to_mapping({"model": planned.config.model, "data": planned.config.data}))
        if kind not in checked:
            build_lib.check(planned.config)
            checked.add(kind)


def _plan(run: Mapping[str, Any], values: Mapping[str, Any], content: Any) -> Planned:
    mapping: Any = to_mapping(dict(run))
    for key, value in values.items():
        if key != WIDTH:
            _set(mapping, key, value)
    try:
        config = from_mapping(mapping)
        if WIDTH in values:
            config = sizes.widened(config, values[WIDTH])
    except UserError as error:
        raise UserError(f"grid cell {_shown(values)}: {error}") from None
    for key in START:
        if getattr(config, key):
            raise UserError(
                f"{key}={getattr(config, key)!r}: a sweep starts its runs from step 0; set ''"
            )
    return _with_trunk(config, values, content)


def _set(mapping: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key. A member of a family given by its name alone takes its own defaults."""
    *above, last = key.split(".")
    node = mapping
    for name in above:
        node = node[name]
    is_family = isinstance(node.get(last), dict) and isinstance(value, str)
    node[last] = {"family": value} if is_family else value


def _with_trunk(config: Config, values: Mapping[str, Any], content: Any) -> Planned:
    per_step, steps, start = config.tokens_per_step, config.run_steps, None
    length = Duration(steps, "steps")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, length=length))
    schedule = config.schedule
    lengths = {"run_tokens": config.run_tokens, "tokens_per_step": per_step}
    if isinstance(schedule, Phased) and schedule.decay.value > 0:
        decay = max(1, round(schedule.decay.tokens(**lengths) / per_step))
        phases = _in_tokens(schedule, lengths) | {"decay": Duration(decay, "steps")}
        exact = dataclasses.replace(schedule, **phases)
        # Otherwise there is nothing before the decay, or it falls into the batch warmup.
        if decay < steps and steps - decay >= config.batches.warmup_steps:
            config, start = dataclasses.replace(config, schedule=exact), steps - decay
    problem = config.schedule.misfit(**lengths, is_branch=False)
    if problem is not None:
        raise UserError(f"grid cell {_shown(values)}: {problem}")
    return Planned(config, values, asked(config, content), start)


def _in_tokens(schedule: Phased, lengths: Mapping[str, Any]) -> dict[str, Duration]:
    """The warmup in tokens, and every other duration given in percent, because a percentage is of
    this run and not of its trunk.
    """
    options = {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)}
    return {
        name: Duration(value.tokens(**lengths), "tokens")
        for name, value in options.items()
        if isinstance(value, Duration) and (name == "warmup" or value.unit == "percent")
    }


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def asked(config: Config, content: Any) -> dict[str, Any]:
    """What no resumed run may change, plus the length and how much text is held out. Contents
    replace paths, which differ between machines.
    """
    asked = lasting(config)
    for name, source in config.data.sources.items():
        asked[f"data.sources.{name}.path"] = content(source.path) or source.path
    if path := config.data.tokenizer.path:
        asked["data.tokenizer.path"] = content(path) or path
    return asked | {
        "run.length": str(config.run.length),
        "evaluate.max_tokens": config.evaluate.max_tokens,
    }


def _cell(planned: Planned) -> Cell:
    own = grid.digest(planned.asked)
    if planned.start is None:
        return Cell(own, planned.config.run_steps, own)
    without = {"run.length", *(f"schedule.{option}" for option in DECAY)}
    shared = {key: value for key, value in planned.asked.items() if key not in without}
    return Cell(grid.digest(shared), planned.config.run_steps, own)
