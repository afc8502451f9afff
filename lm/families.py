"""Families: a folder of files is what one key of the configuration may name.

A family is a folder, say lm/schedules. Each file in it holds one class, named as the file in camel
case (`wsd.py`: `Wsd`), and the fields of that class are its options:

    {"family": "wsd", "decay": "10 percent"}             what an experiment or a flag writes
    -> lm/schedules/wsd.py: Wsd                          found by listing the folder
    -> Wsd(decay=Duration(10, "percent"), warmup=...)    converted and checked, defaults filled in
    -> problem()                                         its own checks: one line, or None

Adding a member is adding its file. An installed package adds one without a fork, by an entry point
of the group "espalier.<folder>":

    [project.entry-points."espalier.schedules"]
    sawtooth = "my_package.sawtooth:Sawtooth"

Members whose class is a Flax module need a built model before they can be made; the configuration
then holds a `Choice`, the member's name with all its options.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import types
import typing
from collections.abc import Mapping
from typing import Any

from lm.mapping import (
    Bound,
    Unit,
    UserError,
    annotations,
    convert,
    field_marks,
    is_neutral,
    nearest,
    shown,
    to_mapping,
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A member by name, with its options: those given and the defaults of the others."""

    name: str
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """`folder` of lm; `noun` names a member in messages; `key` is the entry of a mapping that names
    it. `given`: fields of a Flax module that the model fills in, which are not options. `needs`:
    what the class of a member must have.
    """

    folder: str
    noun: str
    key: str = "family"
    given: tuple[str, ...] | None = None
    needs: tuple[str, ...] = ("problem",)

    @property
    def package(self) -> str:
        return f"lm.{self.folder}"

    def names(self) -> tuple[str, ...]:
        """Every member: files without a leading underscore, and what installed packages add."""
        return tuple(sorted({*self._files(), *self._installed()}))

    def find(self, name: Any, where: str) -> type[Any]:
        """The class of a member; `where` is the key that names it, for messages.

        Raises:
          UserError: no such member, or no such class in its file; two members of one name; a class
          that is not a member (`_check`).
        """
        if name not in self.names():
            near = nearest(str(name), self.names())
            raise UserError(f"{where}: unknown {self.noun} {shown(name)}; {near}")
        installed = self._installed().get(name)
        if installed is not None:
            if name in self._files():
                raise UserError(
                    f"{where}={name!r}: {installed.value} of an installed package has the name of "
                    f"a file of lm/{self.folder}; rename its entry point"
                )
            return self._check(_load(installed, where), installed.value)
        module = importlib.import_module(f"{self.package}.{name}")
        wanted = "".join(part.capitalize() for part in name.split("_"))
        if not hasattr(module, wanted):
            raise UserError(f"{module.__file__} has no class {wanted}; name the class so")
        return self._check(getattr(module, wanted), f"lm/{self.folder}/{name}.py: {wanted}")

    def _check(self, member: type[Any], told: str) -> type[Any]:
        """What a class must be for the configuration to hold it, so that a slip in its file is told
        when it is named, and not by what goes wrong later.
        """
        # Not hasattr: every class can be called, so that has `__call__`.
        written = {name for kind in member.__mro__[:-1] for name in vars(kind)}
        if missing := [need for need in self.needs if need not in written]:
            raise UserError(
                f"{told} has no {missing[0]!r}; see what a {self.noun} needs in CONTRIBUTING.md"
            )
        if not dataclasses.is_dataclass(member):
            raise UserError(f"{told} is not a dataclass; write @dataclasses.dataclass above it")
        options = self._options(member)
        own = annotations(member)
        undeclared = [
            name
            for name in inspect.get_annotations(member)
            if name not in member.__dataclass_fields__
            and typing.get_origin(own[name]) is not typing.ClassVar
        ]
        if undeclared:
            raise UserError(
                f"{told}: {undeclared[0]!r} is not a field; write @dataclasses.dataclass("
                "frozen=True, kw_only=True) above the class"
            )
        if self.key in options:
            raise UserError(f"{told}: an option cannot be named {self.key!r}; rename it")
        for name, field in options.items():
            if self.given is not None and name in SIZES:
                continue
            if field.default in (dataclasses.MISSING, None):
                raise UserError(
                    f"{told}: the option {name!r} has no default; give it a number, a word, a "
                    "Duration or a tuple of them in its file"
                )
        return member

    def name_of(self, member: type[Any]) -> str:
        """The inverse of `find`."""
        package, _, name = member.__module__.rpartition(".")
        if package == self.package:
            return name
        return next(n for n, point in self._installed().items() if point.load() is member)

    def defaults(self, name: Any, where: str) -> dict[str, Any]:
        """What a member's options are where nothing is said, as values that a flag can override."""
        plain = lambda x: tuple(map(to_mapping, x)) if isinstance(x, tuple) else to_mapping(x)
        return {key: plain(x) for key, x in self._defaults(self.find(name, where), where).items()}

    def _defaults(self, member: type[Any], where: str) -> dict[str, Any]:
        """As annotated: 1 is 1.0 where a float is wanted."""
        hints = annotations(member)
        return {
            key: convert(hints[key], to_mapping(field.default), f"{where}.{key}")
            for key, field in self._options(member).items()
            if field.default is not dataclasses.MISSING
        }

    def class_of(self, value: Any) -> type[Any]:
        """That of a member as the configuration holds it."""
        return self.find(value.name, self.noun) if isinstance(value, Choice) else type(value)

    def choose(self, value: Any, where: str) -> Choice:
        """A name, or a mapping of the key and options -> the name and all options, converted.

        Raises:
          UserError: an unknown member or option, a value of another type.
        """
        if isinstance(value, str):
            value = {self.key: value}
        if not isinstance(value, Mapping) or self.key not in value:
            told = f"name a {self.noun}, {{{self.key!r}: NAME, ...}}"
            raise UserError(f"{where}={shown(value)}: {told}")
        name = value[self.key]
        member = self.find(name, where)
        fields, hints = self._options(member), annotations(member)
        options = self._defaults(member, where)
        for key, given in value.items():
            if key == self.key:
                continue
            if key not in fields:
                raise UserError(f"unknown option {where}.{key}; {nearest(str(key), fields)}")
            options[key] = convert(hints[key], given, f"{where}.{key}")
        return Choice(name, types.MappingProxyType(options))

    def create(self, value: Any, where: str) -> Any:
        """As `choose`, and the member itself, checked.

        Raises:
          UserError: what `choose` raises; options that contradict each other.
        """
        chosen = self.choose(value, where)
        made = self.find(chosen.name, where)(**chosen.options)
        if (problem := made.problem()) is not None:
            raise UserError(f"{where}: {problem}")
        return made

    def convert(self, value: Any, where: str) -> Any:
        """What a field of the configuration that is marked with this family holds."""
        return self.create(value, where) if self.given is None else self.choose(value, where)

    def to_mapping(self, value: Any) -> dict[str, Any]:
        """The inverse of `convert`: the key and every option."""
        if isinstance(value, Choice):
            marks = field_marks(self.class_of(value))
            options = {k: x for k, x in value.options.items() if not is_neutral(marks[k], x)}
            return {self.key: value.name, **to_mapping(options)}
        return {self.key: self.name_of(type(value)), **to_mapping(value)}

    def kinds(self, name: Any, where: str) -> dict[str, Any]:
        """The annotated types of a member's options, by name."""
        member = self.find(name, where)
        return {key: annotations(member)[key] for key in self._options(member)}

    def describe(self, name: Any, where: str) -> dict[str, str]:
        """The options of a member, each with its default and what it must be, in words."""
        member = self.find(name, where)
        found = {}
        defaults = self._defaults(member, where)
        for key in self._options(member):
            default = str(to_mapping(defaults[key])) if key in defaults else "the model's"
            words = field_marks(member)[key]
            must = [mark.must for mark in words if isinstance(mark, Bound)]
            units = [mark.name for mark in words if isinstance(mark, Unit)]
            found[key] = ", ".join([" ".join([default, *units]), *must])
        return found

    def _options(self, member: type[Any]) -> dict[str, dataclasses.Field[Any]]:
        given = self.given or ()
        return {f.name: f for f in dataclasses.fields(member) if f.init and f.name not in given}

    def _files(self) -> tuple[str, ...]:
        return _listed(self.package)

    def _installed(self) -> dict[str, importlib.metadata.EntryPoint]:
        return _entry_points(f"espalier.{self.folder}")


@functools.cache
def _listed(package: str) -> tuple[str, ...]:
    """The folder is read once: every matrix of a model that is traced asks for its kind."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return tuple(module.name for module in found if not module.name.startswith("_"))


def _load(point: importlib.metadata.EntryPoint, where: str) -> type[Any]:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{where}={point.name!r}: {point.value} of an installed package cannot be imported "
            f"({error}); mend or remove that package"
        ) from None


@functools.cache
def _entry_points(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=group):
        if (other := found.setdefault(point.name, point)).value != point.value:
            raise UserError(
                f"two installed packages name {point.name!r} in {group}: {other.value} and "
                f"{point.value}; remove one of them"
            )
    return found


# Fields that take a size of the model unless a layer says otherwise; they need no default.
SIZES = ("num_heads", "num_kv_heads", "head_dim", "ffn_dim")
LAYER = ("parent", "name", "context", "width")  # what the model gives to every module of a layer

SCHEDULES = Family("schedules", "schedule")
OPTIMIZERS = Family("optimizers", "optimizer")
OBJECTIVES = Family("objectives", "objective", needs=("problem", "is_causal", "__call__"))
TASKS = Family(
    "evals",
    "task",
    key="task",
    needs=("problem", "items", "numbers", "headline", "unit", "is_better"),
)


@dataclasses.dataclass(frozen=True)
class Labels:
    """Mark of a mapping from labels to members of a family, each {key: name, **options}; a label
    that is itself a member's name needs no key. `parts`: keys beside the options that name members
    of other families.
    """

    family: Family
    parts: Mapping[str, Family] = types.MappingProxyType({})


MIXERS = Family("mixers", "mixer", key="mixer", given=LAYER)
FEED_FORWARDS = Family("feed_forward", "feed-forward", given=LAYER)
BLOCKS = Family("blocks", "block", given=(*LAYER, "mixer", "mlp"))
MATRICES = Family("matrices", "kind of matrix", given=(*LAYER, "letters", "shape", "contracted"))

LAYERS = Labels(MIXERS, {"mlp": FEED_FORWARDS, "residual": BLOCKS, "matrix": MATRICES})

TRACKERS = Family("trackers", "tracker", needs=("problem", "package", "open"))

LAWS = Family("laws", "law", key="law", needs=("problem", "published"))
READERS = Family("readers", "reader", key="reader", needs=("problem", "endings", "rows"))

ALL = (
    *(SCHEDULES, OPTIMIZERS, OBJECTIVES, TASKS),
    *(MIXERS, FEED_FORWARDS, BLOCKS, MATRICES),
    *(TRACKERS, LAWS, READERS),
)
