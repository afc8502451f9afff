"""Overrides on a command line, `--config.key=value`: what they set, of which member of a family,
and the mistakes among them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from ml_collections import ConfigDict

from lm.config import Config, ModelConfig, UserError, flatten, nearest
from lm.families import SIZES, Family
from lm.mapping import field_marks

# The keys of a configuration that hold a member of a family, wherever they stand in it.
FAMILIES = {
    name: mark
    for section in (Config, ModelConfig)
    for name, marks in field_marks(section).items()
    for mark in marks
    if isinstance(mark, Family)
}


def members_by_name(argv: list[str], name: str) -> list[str]:
    """`--config.schedule=wsd`, or with a space for the "=", as `--config.schedule.family=wsd`."""
    found = []
    for arg in argv:
        match = re.fullmatch(rf"(--?{name}\.(?:run\.)?(?:model\.)?(\w+))(=[\w.-]*)?", arg)
        family = FAMILIES.get(match[2]) if match else None
        found.append(f"{match[1]}.{family.key}{match[3] or ''}" if match and family else arg)
    return found


def read(name: str, argv: list[str]) -> dict[str, str]:
    """The overrides, dotted key -> text of the last value: `--config.a.b=1`, `--config.a.b 1` and
    `--noconfig.a.c`, whose text is the word after it.
    """
    found = {}
    for arg, after in zip(argv[1:], [*argv[2:], ""], strict=True):
        if match := re.match(rf"--?(?:no)?{name}\.([^=]+)(?:=(.*))?", arg, flags=re.DOTALL):
            found[match[1]] = after if match[2] is None else match[2]
    return found


def axes(flag: str, values: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """Axes of a grid: ["seed=0,1", 'model.pattern=["gla","gla,softmax"]'] -> {"seed": (0, 1), ...}.
    Values are a JSON list, or stand between commas, each JSON where it can be, else a word.

    Raises:
      UserError: no key or no values, or a key twice.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for text in values:
        key, equals, listed = text.partition("=")
        if not (key and equals and listed):
            raise UserError(f"--{flag}={text}: write KEY=VALUE,VALUE, as seed=0,1")
        if key in found:
            raise UserError(f"--{flag}: {key} is given twice; give all of its values once")
        whole = _plain(listed)
        found[key] = tuple(whole if isinstance(whole, list) else map(_plain, listed.split(",")))
    return found


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text.strip()


def complete_families(config: ConfigDict, overrides: Mapping[str, str], flag: str) -> None:
    """Gives the overrides the keys of the families that they are about, wherever they stand among
    the flags: `--config.schedule.family=wsd` drops the options of the schedule in the file and
    takes the defaults of the other; an option that the file leaves out gets its default.
    """
    for override in overrides:
        group, _, option = override.rpartition(".")
        family = _family(group)
        node = _find(config, group)
        if family is None or not isinstance(node, ConfigDict) or family.key not in node:
            continue
        name = overrides.get(f"{group}.{family.key}", node[family.key])
        if name != node[family.key]:
            node = ConfigDict({family.key: name} | family.defaults(name, f"{flag}.{group}"))
        elif option not in node:
            node = ConfigDict(family.defaults(name, f"{flag}.{group}") | node.to_dict())
        else:
            continue
        above, _, last = group.rpartition(".")
        _find(config, above)[last] = node


def _find(config: ConfigDict, dotted: str) -> Any:
    """The value at a dotted key, the whole for ""; None where there is none."""
    node: Any = config
    for key in filter(None, dotted.split(".")):
        node = node[key] if isinstance(node, ConfigDict) and key in node else None
    return node


def _key_hint(config: ConfigDict, unknown: str, siblings: ConfigDict, dotted: str) -> str:
    """Whose option it is, else the nearest key of the group, else one of the same name elsewhere,
    else the group's keys.
    """
    if not siblings:
        return "the group is empty: set it whole, as a Python dict"
    group, _, leaf = dotted.rpartition(".")
    family = _family(group)
    if family is not None and family.key in siblings:
        has = lambda name: unknown in family.describe(name, group)
        if unknown in SIZES and has(siblings[family.key]):
            return (
                f"it is the model's unless {group} is set whole, as a Python dict; set model.{leaf}"
            )
        if owners := [name for name in family.names() if has(name)]:
            return (
                f"it is an option of {' and '.join(owners)}, and {group}.{family.key} is "
                f"{siblings[family.key]}"
            )
        return nearest(unknown, siblings)
    elsewhere = [key for key in flatten(config.to_dict()) if key.split(".")[-1] == leaf]
    if elsewhere and not get_close_matches(unknown, list(siblings), n=1):
        return f"did you mean {elsewhere[0]!r}?"
    return nearest(unknown, siblings)


def check_key(config: ConfigDict, override: str, flag: str) -> None:
    node: Any = config
    walked = flag
    for key in override.split("."):
        if not isinstance(node, ConfigDict):
            raise UserError(f"{walked} is a value, not a group of keys: {flag}.{override}")
        if key not in node:
            hint = _key_hint(config, key, node, override)
            raise UserError(f"unknown key {walked}.{key}; {hint}")
        node = node[key]
        walked = f"{walked}.{key}"


def _family(group: str) -> Family | None:
    """The family of the last key of a dotted one."""
    return FAMILIES.get(group.rpartition(".")[2])


def pairs(flag: str, given: Iterable[str]) -> Iterable[tuple[str, str]]:
    """NAME=VALUE of a repeatable flag, split."""
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"--{flag}={text}: write NAME=VALUE, as --{flag}=c=1")
        yield name, value


def numbers(flag: str, given: Iterable[str]) -> dict[str, float]:
    """The same, each value a finite number."""
    found = {}
    for name, value in pairs(flag, given):
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if not math.isfinite(found[name]):
            raise UserError(f"--{flag}={name}={value} is not a finite number")
    return found
