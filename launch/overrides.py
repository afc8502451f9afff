"""Overrides on a command line, `--config.key=value`: how they change the values of a file.

    argv -- split --> other words, {key: text} -- apply --> the values of the file, changed

The dataclasses (lm/config.py, the studies) and the families define which keys exist and the type of
each. A flag can therefore set a key that the file leaves out: an option of a member, a label of
`model.layers`, a source, a task. Naming another member of a family drops the options of the
previous member, wherever that flag stands on the line. A key that no dataclass describes must be in
the file, and the flag's text is read as the type of the value there.
"""

from __future__ import annotations

import copy
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, NamedTuple

from kernels.spelling import near
from launch import values
from lm import families
from lm.config import UserError, flatten, nearest
from lm.families import Family, Labels
from lm.mapping import OWN, Holds, annotations, field_marks

Text = str | bool  # what an override sets; a boolean if the flag has no value
ABSENT = object()
TYPES = (bool, int, float, str)
NAMING = {family.key for family in families.ALL}


def split(argv: list[str], name: str) -> tuple[list[str], dict[str, Text]]:
    """The words of a command line that are not overrides, and the overrides by dotted key. If a key
    is given twice, the last one counts. `--config.a.b 1` means `--config.a.b=1`; a flag without a
    value is True, and `--noconfig.a.b` is False.
    """
    rest: list[str] = []
    found: dict[str, Text] = {}
    places = iter(range(len(argv)))
    for i in places:
        if argv[i] == "--":
            return rest + argv[i:], found
        match = re.fullmatch(rf"--?(no)?{name}\.([^=]+)(?:=(.*))?", argv[i], flags=re.DOTALL)
        if match is None:
            rest.append(argv[i])
            continue
        is_off, key, text = match.groups()
        after = argv[i + 1] if i + 1 < len(argv) else "--"
        found.pop(key, None)
        if is_off:
            found[key] = False
        elif text is not None:
            found[key] = text
        elif re.match(r"--?[a-zA-Z]|--$", after):
            found[key] = True
        else:
            found[key] = argv[next(places)]
    return rest, found


def axes(flag: str, given: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """Axes of a grid: ["seed=0,1", "model.pattern=[gla, 'gla,softmax']"] -> {"seed": (0, 1), ...}.
    The values are a list in [], or are separated by commas.

    Raises:
      UserError: a key or its values are missing, or a key is given twice.
    """
    found: dict[str, tuple[Any, ...]] = {}
    form = "KEY=VALUE,VALUE, as seed=0,1"
    for key, listed in values.pairs(flag, given, form).items():
        if not listed:
            raise UserError(f"--{flag}={key}=: write {form}")
        whole = values.literal(listed if listed.startswith("[") else f"[{listed}]")
        words = tuple(values.literal(part.strip()) for part in listed.split(","))
        found[key] = whole if isinstance(whole, tuple) else words
    return found


def apply(
    given: Mapping[str, Any],
    kind: Any,
    asked: Mapping[str, Text],
    flag: str,
    base: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """The values `given`, changed by the overrides `asked`. `kind` is their dataclass, None if no
    dataclass describes them. A new source, or a section that the file lacks, starts with the values
    that it has in `base`.

    Raises:
      UserError: a key is unknown, a value cannot be read, or a mapping comes after a key inside it.
    """
    changed = copy.deepcopy(dict(given))
    setting = _Setting(changed, flag, base)
    for i, key in enumerate(asked):
        text = asked[key]
        inside = next((x for x in list(asked)[:i] if x.startswith(f"{key}.")), None)
        if inside and isinstance(text, str) and text.strip().startswith("{"):
            raise UserError(
                f"{flag}.{key} comes after {flag}.{inside} and would undo it; swap them"
            )
    # A mapping comes before the keys in it, and the name of a member before its options.
    order = lambda key: (key.count("."), key.rpartition(".")[2] not in NAMING)
    for key in sorted(asked, key=order):
        setting.set(changed, kind, key.split("."), asked[key], flag)
    return changed


class _Label(NamedTuple):
    """The type of an entry in a mapping that is marked with Labels."""

    labels: Labels


class _Setting(NamedTuple):
    """`whole`: all values, for hints. `flag`: the prefix of dotted keys in messages. `base`: reads
    the values with which a new section starts.
    """

    whole: Mapping[str, Any]
    flag: str
    base: Callable[[], Mapping[str, Any]]

    def set(self, node: Any, kind: Any, key: list[str], text: Text, where: str) -> Any:
        """`node`, a value of type `kind` at `where`, after setting the `key` inside it."""
        family = _family(kind)
        is_name = family is not None and key == [family.key]
        if not key or is_name:
            named = _named(node, kind, family, text, where)
            return _read(kind, text, where) if named is None else named
        if node is ABSENT:
            node = self.begun(kind, where)
        elif family is not None and isinstance(node, str):
            node = {family.key: node}
        if not isinstance(node, dict):
            raise UserError(f"{where} is a value, not a group of keys: {where}.{'.'.join(key)}")
        first, *rest = key
        inner = self.kind_of(node, kind, first, where)
        node[first] = self.set(node.get(first, ABSENT), inner, rest, text, f"{where}.{first}")
        return node

    def begun(self, kind: Any, where: str) -> dict[str, Any]:
        """The initial values of a group that the file lacks."""
        plain = _plain(kind)
        if not is_dataclass(plain):
            return {}
        found: Any = self.base()
        for key in where.removeprefix(f"{self.flag}.").removeprefix("run.").split("."):
            found = found if isinstance(found, Mapping) else {}
            found = found.get(key, next(iter(found.values()), None))
        own = [name for name, marks in field_marks(plain).items() if OWN in marks]
        found = found if isinstance(found, Mapping) else {}
        return {key: copy.deepcopy(x) for key, x in found.items() if key not in own}

    def kind_of(self, node: Mapping[str, Any], kind: Any, key: str, where: str) -> Any:
        """The type of `node[key]`, an annotated type or _Label.

        Raises:
          UserError: the key is unknown.
        """
        plain, family = _plain(kind), _family(kind)
        if labels := _mark(kind, Labels):
            return _Label(labels)
        if family is not None:
            known = self.options(node, kind, family, key, where)
        elif is_dataclass(plain):
            known = annotations(plain)
        elif typing.get_origin(plain) is not None and len(typing.get_args(plain)) == 2:
            return typing.get_args(plain)[1]  # the values of a mapping with free keys
        else:
            known = {name: _type(value) for name, value in node.items()}
        if key not in known:
            hint = self.hint(key, node, known, family, where)
            raise UserError(f"unknown key {where}.{key}; {hint}")
        return known[key]

    def options(
        self, node: Mapping[str, Any], kind: Any, family: Family, key: str, where: str
    ) -> dict[str, Any]:
        """The keys of a member of a family."""
        parts = kind.labels.parts if isinstance(kind, _Label) else {}
        if key in parts:
            return {key: Annotated[Any, part] for key, part in parts.items()}
        label = where.rpartition(".")[2] if isinstance(kind, _Label) else None
        name = node.get(family.key, label)
        if family.key not in node and name not in family.names():
            raise UserError(
                f"{where} does not name a {family.noun}; set {where}.{family.key} to "
                f"{', '.join(family.names())}"
            )
        return {family.key: str, **family.kinds(name, where)}

    def hint(
        self,
        unknown: str,
        node: Mapping[str, Any],
        known: Mapping[str, Any],
        family: Family | None,
        where: str,
    ) -> str:
        """A hint for an unknown key: the members that have it as an option, or a key of that name
        in another group, or the nearest key of this group, or all keys of this group.
        """
        if family is not None:
            owners = [x for x in family.names() if unknown in family.kinds(x, where)]
            if owners and family.key in node:
                group = where.removeprefix(f"{self.flag}.")
                return (
                    f"it is an option of {' and '.join(owners)}, and {group}.{family.key} is "
                    f"{node[family.key]}"
                )
            return nearest(unknown, known)
        elsewhere = [key for key in flatten(self.whole) if key.split(".")[-1] == unknown]
        if elsewhere and near(unknown, known) is None:
            return f"did you mean {elsewhere[0]!r}?"
        return nearest(unknown, known) if known else "the group is empty"


def _named(node: Any, kind: Any, family: Family | None, text: Text, where: str) -> Any:
    """The member that `text` names in a single word. Its options are kept only if `node` names the
    same member. None if `text` is not a single word, or `kind` is not a family.
    """
    if family is None or isinstance(text, bool):
        return None
    name = values.literal(text)
    if not isinstance(name, str):
        return None
    label = where.rpartition(".")[2] if isinstance(kind, _Label) else None
    if isinstance(node, dict) and node.get(family.key, label) == name:
        return node
    if label is None and name not in family.names():
        return name  # such as "none"; a mistake is reported when the name is converted
    parts = kind.labels.parts if isinstance(kind, _Label) and isinstance(node, dict) else {}
    return {family.key: name} | {key: node[key] for key in parts if key in node}


def _read(kind: Any, text: Text, where: str) -> Any:
    kind = Mapping if isinstance(kind, _Label) or _family(kind) else kind
    if isinstance(text, str):
        return values.read(kind, text, where)
    if _plain(kind) is not bool:
        raise UserError(f"{where} has no value; write {where}=VALUE")
    return text


def _plain(kind: Any) -> Any:
    """A type without marks; for a mapping that is converted later, its dataclass."""
    if holds := _mark(kind, Holds):
        return holds.kind
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _mark(kind: Any, wanted: type[Any]) -> Any:
    marks = typing.get_args(kind)[1:] if typing.get_origin(kind) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, wanted)), None)


def _family(kind: Any) -> Family | None:
    return kind.labels.family if isinstance(kind, _Label) else _mark(kind, Family)


def _type(value: Any) -> Any:
    """The type of a value that no dataclass describes."""
    if isinstance(value, Mapping):
        return None
    if isinstance(value, list | tuple):
        return tuple
    return type(value) if isinstance(value, TYPES) else Any
