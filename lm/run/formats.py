"""The configuration as it is kept in config.json and in every checkpoint, with the number of its
format; what an earlier format holds is brought to this one here, and nowhere else. So is the state
of a checkpoint from before it counted tokens and rows.

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

# What every model of the first format was made of, without a key for it.
MODEL_OF_1: Mapping[str, Any] = {
    "mlp": {"family": "swiglu"},
    "residual": {"family": "pre_norm"},
    "matrix": {"family": "dense"},
}


def write(config: Config) -> dict[str, Any]:
    """Plain values for JSON: the format, and every key."""
    return {KEY: FORMAT, **to_mapping(config)}


def read(values: Mapping[str, Any], where: str) -> Config:
    """The inverse of `write`, of this format or an earlier one; `where` names the file in messages.

    Raises:
      UserError: a later format, or values that are not a configuration.
    """
    plain = upgraded(values, where)
    try:
        return from_mapping(plain)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def upgraded(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of today's format, without its number; values are not looked at.

    Raises:
      UserError: a later format, or an earlier one without its keys.
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
    """What of a state is in a checkpoint whose arrays have these names: one written before tokens
    and rows were counted has the rest.
    """
    if "tokens" in names:
        return state
    return {k: v for k, v in state._asdict().items() if k not in ("tokens", "rows")}


def counted(
    found: Mapping[str, Any], abstract: TrainState, *, tokens: int, rows: int
) -> TrainState:
    """The state of such a checkpoint, with its counts."""
    place = lambda number, like: jax.device_put(count(number), like.sharding)
    return TrainState(
        **found, tokens=place(tokens, abstract.tokens), rows=place(rows, abstract.rows)
    )
