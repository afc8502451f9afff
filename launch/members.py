"""Flags that set options of layers, tasks, schedules and the mesh: `--layer`, `--task`, ...

Values follow the grammar of launch/values.py, and the type of the option if its member is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags

from launch import values
from lm.config import MeshConfig
from lm.families import MIXERS, TASKS, Family
from lm.mapping import UserError, annotations, nearest

# The launcher that asks for the flag owns it, so that `--help` lists it.
flags.disclaim_key_flags()

KEYS = annotations(MeshConfig)


def layer_flag() -> flags.FlagHolder[list[str]]:
    """Defines the repeatable `--layer=LABEL.OPTION=VALUE`, read by `layers`."""
    return flags.DEFINE_multi_string(
        "layer", [], "LABEL.OPTION=VALUE: replaces an option that the run's layers have; repeatable"
    )


def layers(given: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Options by label: ["softmax.window=512"] -> {"softmax": {"window": 512}}."""
    found = _assignments("layer", given, "softmax.window=512")
    return {
        label: _options(MIXERS, label, options, f"--layer={label}")
        for label, options in found.items()
    }


def mesh_flag() -> flags.FlagHolder[list[str]]:
    """Defines the repeatable `--mesh=KEY=VALUE`, read by `mesh`."""
    return flags.DEFINE_multi_string(
        "mesh",
        [],
        "KEY=VALUE, as sequence=4: a mesh of all devices; default: one device; repeatable",
    )


def mesh(given: Iterable[str]) -> dict[str, Any]:
    """Keys of a configuration's mesh: ["sequence=4"] -> {"sequence": 4}."""
    asked = values.pairs("mesh", given, "KEY=VALUE, as sequence=4")
    for key in asked:
        if key not in KEYS:
            raise UserError(f"--mesh={key}: a mesh has no such key; {nearest(key, KEYS)}")
    return {key: values.read(KEYS[key], text, f"--mesh={key}") for key, text in asked.items()}


def tasks(given: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Options by label of `--task`. A single word is a task with its defaults: ["position"] ->
    {"position": {}}.
    """
    bare = {text: {} for text in given if re.fullmatch(r"[\w-]+", text)}
    found = _assignments("task", [x for x in given if x not in bare], "blimp.max_items=100")
    return bare | {
        label: _options(TASKS, options.get(TASKS.key, label), options, f"--task={label}")
        for label, options in found.items()
    }


def member(flag: str, text: str, family: Family) -> dict[str, Any]:
    """A member of a family and its options, from one word: "wsd:decay_shape=sqrt,decay=10 percent"
    -> {"family": "wsd", "decay_shape": "sqrt", "decay": "10 percent"}.

    Raises:
      UserError: the member does not exist, or the text has another form.
    """
    name, colon, rest = text.partition(":")
    family.find(name, f"--{flag}={text}")
    found: dict[str, str] = {}
    for part in re.split(r",(?=\w+=)", rest) if colon else []:
        key, equals, value = part.partition("=")
        if not (equals and re.fullmatch(r"\w+", key)):
            raise UserError(f"--{flag}={text}: write NAME:OPTION=VALUE,OPTION=VALUE")
        if key in found:
            raise UserError(f"--{flag}={text}: {key} is given twice")
        found[key] = value
    return {family.key: name, **_options(family, name, found, f"--{flag}={name}")}


def _assignments(flag: str, given: Iterable[str], example: str) -> dict[str, dict[str, str]]:
    """The values of LABEL.OPTION=VALUE, as text, by label and option."""
    found: dict[str, dict[str, str]] = {}
    form = f"LABEL.OPTION=VALUE, as {example}"
    for name, value in values.pairs(flag, given, form).items():
        label, _, option = name.rpartition(".")
        if not (label and option):
            raise UserError(f"--{flag}={name}={value}: write {form}")
        found.setdefault(label, {})[option] = value
    return found


def _options(
    family: Family, name: str | None, options: Mapping[str, str], where: str
) -> dict[str, Any]:
    """A member's options, each value read by the type of its option. If the member or the option is
    not known here, by the general grammar.
    """
    kinds = family.kinds(name, where) if name in family.names() else {}
    return {
        key: values.read(kinds.get(key), text, f"{where}.{key}") for key, text in options.items()
    }
