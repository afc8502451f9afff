"""The keys of a configuration: type, unit, default, allowed values and meaning of each.

Nothing is listed here by hand. Keys and types are the fields of the dataclasses (lm/config.py, the
studies) and of the members of the families. Allowed values come from types and marks. Meanings come
from the section "Attributes:" in the docstring of a class. Defaults are the values of a base
configuration; for a member, those in its file.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from lm.families import Family, Labels
from lm.mapping import FREE, Bound, Duration, Holds, Later, Unit, annotations, to_mapping

NAME, LABEL = "NAME", "LABEL"  # in a key: a name that the user chooses; a label of a layer or task
TYPES = {bool: "true or false", int: "integer", float: "number", str: "text", Duration: "duration"}
TYPES |= {Any: "text or list"}
UNITS = {Duration: "steps, tokens or percent"}
FREE_KEYS = "A key that is free may differ when a run is resumed."
HEAD = ("key", "type", "unit", "default", "allowed", "meaning")


class Key(NamedTuple):
    """One key. `default` is None if every configuration must state the value. `is_free`: whether it
    may differ when a run is resumed.
    """

    key: str
    type: str
    unit: str
    default: Any
    allowed: str
    meaning: str
    is_free: bool = False


class Section(NamedTuple):
    """Keys under one heading; `about` is a sentence."""

    title: str
    about: str
    keys: list[Key]


def meanings(kind: type[Any]) -> dict[str, str]:
    """Field -> meaning, for the fields of a class and of its bases: "name: meaning" in the section
    "Attributes:" of their docstrings.
    """
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        text = inspect.cleandoc(vars(one).get("__doc__") or "")
        section = re.search(r"^Attributes:\n((?:  .*\n?|\n)+)", text, flags=re.MULTILINE)
        for item in re.findall(r"^  (\w+): ((?:.|\n    )+)", section[1] if section else "", re.M):
            found[item[0]] = " ".join(item[1].split())
    return found


def sections(kind: type[Any], base: Mapping[str, Any], under: str = "") -> list[Section]:
    """The keys of a dataclass, followed by those of every member of the families in it. `base`: the
    values of a configuration. `under`: only keys inside this one; "": all.
    """
    places: dict[str, tuple[Family, str]] = {}
    keys = list(_keys(kind, base, "", False, places))
    found = [Section("Keys", (inspect.getdoc(kind) or "").split("\n")[0], keys)]
    for where, (family, key) in places.items():
        found += [_member(family, name, where, key) for name in family.names()]
    is_in = lambda key: not under or f"{key}.".startswith(f"{under}.")
    found = [one._replace(keys=[x for x in one.keys if is_in(x.key)]) for one in found]
    return [one for one in found if one.keys]


def _keys(
    kind: type[Any],
    base: Any,
    prefix: str,
    is_free: bool,
    places: dict[str, tuple[Family, str]],
) -> Iterator[Key]:
    """The keys of a dataclass; adds the families among them to `places`, by key."""
    meaning = meanings(kind)
    base = base if isinstance(base, Mapping) else {}
    for name, hint in annotations(kind).items():
        marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
        plain = typing.get_args(hint)[0] if marks else hint
        neutral = next((to_mapping(x.neutral) for x in marks if isinstance(x, Later)), None)
        key, default, free = f"{prefix}{name}", base.get(name, neutral), is_free or FREE in marks
        family = next((mark for mark in marks if isinstance(mark, Family)), None)
        labels = next((mark for mark in marks if isinstance(mark, Labels)), None)
        whole = next((mark.kind for mark in marks if isinstance(mark, Holds)), None)
        item = typing.get_args(plain)[-1] if _is_mapping(plain) else None
        if dataclasses.is_dataclass(plain) and plain is not Duration and family is None:
            yield from _keys(typing.cast(Any, plain), default, f"{key}.", free, places)
        elif item is not None and dataclasses.is_dataclass(item):
            first = next(iter(default.values()), {}) if isinstance(default, Mapping) else {}
            yield from _keys(typing.cast(Any, item), first, f"{key}.{NAME}.", free, places)
        elif family is not None:
            places[key] = (family, family.key)
            chosen = default.get(family.key) if isinstance(default, Mapping) else default
            allowed = " | ".join(family.names())
            yield Key(key, family.noun, "", chosen, allowed, meaning.get(name, ""), free)
        else:
            text = meaning.get(name, "")
            if whole is not None:
                text += f"; its keys are those of {whole.__module__}.{whole.__name__}"
            allowed = "" if labels is None else f"labels of a {labels.family.noun}"
            if labels is not None:
                places[f"{key}.{LABEL}"] = (labels.family, labels.family.key)
            shown = default if whole is None else None
            yield _key(key, hint, shown, text, free, allowed)


def _member(family: Family, name: str, where: str, key: str) -> Section:
    """The options of a member of a family under the key `where`."""
    member = family.find(name, where)
    meaning, defaults = meanings(member), family.defaults(name, where)
    module = importlib.import_module(member.__module__)
    about = " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())
    keys = [
        _key(f"{where}.{option}", hint, defaults.get(option), meaning.get(option, ""), False)
        for option, hint in family.kinds(name, where).items()
    ]
    return Section(f"{where}.{key}={name}", about, keys)


def _key(key: str, hint: Any, default: Any, meaning: str, is_free: bool, allowed: str = "") -> Key:
    marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    plain = typing.get_args(hint)[0] if marks else hint
    must = [re.sub(r"^must (be |lie )?", "", x.must).split(";")[0] for x in marks if _is_bound(x)]
    units = [mark.name for mark in marks if isinstance(mark, Unit)]
    kind, words = _type(plain)
    return Key(
        key,
        kind,
        ", ".join(units) or UNITS.get(plain, ""),
        to_mapping(default),
        ", ".join([x for x in (allowed, words, *must) if x]),
        meaning,
        is_free or FREE in marks,
    )


def _is_bound(mark: Any) -> bool:
    return isinstance(mark, Bound)


def _is_mapping(kind: Any) -> bool:
    origin = typing.get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _type(kind: Any) -> tuple[str, str]:
    """The type in words, and the allowed words if the value is one of several."""
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Literal:
        return "word", " | ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        item, words = _type(typing.get_args(kind)[0])
        return f"list of {item}", words
    if _is_mapping(kind) or kind is Mapping:
        return "mapping", _type(typing.get_args(kind)[-1])[1] if typing.get_args(kind) else ""
    return TYPES.get(kind, "mapping"), ""


def shown(value: Any) -> str:
    """A default as a flag would write it; "-" if every configuration must state the value."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value or "''"
    if isinstance(value, list | tuple):
        return str(list(value))
    return str(value)


def text(found: list[Section], width: int = 100) -> str:
    """The text that --help_config prints."""
    lines = [FREE_KEYS, ""]
    for section in found:
        lines += [section.title, *textwrap.wrap(section.about, width)]
        for key in section.keys:
            unit = f" ({key.unit})" if key.unit else ""
            free = "; free" if key.is_free else ""
            lines.append(f"  {key.key} = {shown(key.default)}")
            text = f"{key.type}{unit}" + (f", {key.allowed}" if key.allowed else "")
            wrapped = textwrap.wrap(f"{text}: {key.meaning}{free}", width - 6)
            lines += [f"      {line}" for line in wrapped]
        lines.append("")
    return "\n".join(lines)


def markdown(found: list[Section]) -> str:
    """The same as Markdown tables, for docs/reference.md."""
    lines = []
    cell = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    for section in found:
        lines += [f"### {section.title}", "", section.about, ""]
        lines += ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
        for key in section.keys:
            values = (f"`{key.key}`", key.type, key.unit, f"`{shown(key.default)}`", key.allowed)
            free = " (free)" if key.is_free else ""
            lines.append("| " + " | ".join(map(cell, (*values, key.meaning + free))) + " |")
        lines.append("")
    return "\n".join(lines)
