"""The configuration as stored in config.json and in every checkpoint, with a format number. This is
the only place that converts earlier formats to the current one. It also converts the state of
checkpoints that do not yet count tokens and rows.

    1   (no number) one schedule with the keys of all, `schedule.decay_from`, AdamW without a name,
        `mesh.sequence_parallel`
    2   members of families by name with their own options (lm/families.py), `decay_from` beside
        `init_from`, `mesh.stream_over_tensor`
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any

import jax

from lm.config import Config, UserError, from_mapping, to_mapping
from lm.state import TrainState, count

FORMAT = 2
KEY = "format"

# The parts of every model in format 1, which had no keys for them.
MODEL_OF_1: Mapping[str, Any] = {
    "mlp": {"family": "swiglu"},
    "residual": {"family": "pre_norm"},
    "matrix": {"family": "dense"},
}


def write(config: Config) -> dict[str, Any]:
    """Plain values for JSON: the format number, and every key."""
    return {KEY: FORMAT, **to_mapping(config)}


def read(values: Mapping[str, Any], where: str) -> Config:
    """The inverse of `write`, for this format or an earlier one; `where` names the file.

    Raises:
      UserError: the format is later than this version's, or the values are not a configuration.
    """
    plain = upgraded(values, where)
    try:
        return from_mapping(plain)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def upgraded(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values with the keys of the current format, without the format number. Values are not
    checked.

    Raises:
      UserError: the format is later than this version's, or keys of an earlier format are missing.
    """
    plain = copy.deepcopy(dict(values))
    number = plain.pop(KEY, 1)
    if type(number) is not int or number not in range(1, FORMAT + 1):
        raise UserError(
            f"{where} has format {number!r}, this version reads up to {FORMAT}; use the version "
            "that wrote it, or a later one"
        )
    try:
        for upgrade in _UPGRADES[number - 1 :]:
            plain = upgrade(plain)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is not a configuration ({error!r}); restore it") from None
    return plain


def _from_1(values: dict[str, Any]) -> dict[str, Any]:
    schedule, mesh = values["schedule"], values["mesh"]
    values["decay_from"] = schedule.pop("decay_from")
    if schedule["family"] != "power":
        del schedule["a"], schedule["b"]
    if schedule["family"] == "cosine":
        schedule["horizon"] = schedule.pop("decay")
        del schedule["decay_shape"]
    mesh["stream_over_tensor"] = mesh.pop("sequence_parallel")
    values["optimizer"] = {"family": "adamw", **values["optimizer"]}
    values["objective"] = {"family": "next_token"}
    values["model"] |= MODEL_OF_1
    return values


_UPGRADES = (_from_1,)  # from format 1, from format 2, ...


def stored(state: TrainState, names: Container[str]) -> TrainState | dict[str, Any]:
    """The part of a state that a checkpoint with these array names holds. A checkpoint written
    before tokens and rows were counted has everything else.
    """
    if "tokens" in names:
        return state
    return {k: v for k, v in state._asdict().items() if k not in ("tokens", "rows")}


def counted(
    found: Mapping[str, Any], abstract: TrainState, *, tokens: int, rows: int
) -> TrainState:
    """The whole state from such an earlier checkpoint, with the counts added."""
    place = lambda number, like: jax.device_put(count(number), like.sharding)
    return TrainState(
        **found, tokens=place(tokens, abstract.tokens), rows=place(rows, abstract.rows)
    )
