"""Families: each key of the configuration that names a member lists the files of one folder.

A family is a folder, such as lm/schedules. Each file in it holds one class, named like the file in
camel case (`wsd.py`: `Wsd`), and the fields of that class are its options:

    {"family": "wsd", "decay": "10 percent"}             what an experiment or a flag writes
    -> lm/schedules/wsd.py: Wsd                          found by listing the folder
    -> Wsd(decay=Duration(10, "percent"), warmup=...)    converted and checked, defaults filled in
    -> problem()                                         its own checks: one line, or None

To add a member, add its file. An installed package can add one without a fork, by an entry point in
the group "espalier.<folder>":

    [project.entry-points."espalier.schedules"]
    sawtooth = "my_package.sawtooth:Sawtooth"

Members whose class is a Flax module cannot be made before the model is built. The configuration
then holds a `Choice`: the member's name with all its options.
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
    """A member by name with all its options, those given and the defaults of the rest."""

    name: str
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """`folder`: the folder of lm. `noun`: what messages call a member. `key`: the entry of a
    mapping that names the member. `given`: fields of a Flax module that the model fills in, which
    are not options. `needs`: attributes that the class of a member must define.
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
        """All members: files without a leading underscore, and those from installed packages."""
        return tuple(sorted({*self._files(), *self._installed()}))

    def find(self, name: Any, where: str) -> type[Any]:
        """The class of a member. `where` is the key that names it, for messages.

        Raises:
          UserError: there is no such member, or its file has no such class, or two members have
          this name, or the class is not a valid member (`_check`).
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
            raise UserError(f"{module.__file__} has no class {wanted}; give its class that name")
        return self._check(getattr(module, wanted), f"lm/{self.folder}/{name}.py: {wanted}")

    def _check(self, member: type[Any], place: str) -> type[Any]:
        """Checks that the configuration can hold this class, so that a slip in its file is reported
        when the member is named and not by a later failure.
        """
        # Not hasattr: every class is callable, so hasattr would always find `__call__`.
        written = {name for kind in member.__mro__[:-1] for name in vars(kind)}
        if missing := [need for need in self.needs if need not in written]:
            raise UserError(
                f"{place} has no {missing[0]!r}; see what a {self.noun} needs in CONTRIBUTING.md"
            )
        if not dataclasses.is_dataclass(member):
            raise UserError(f"{place} is not a dataclass; write @dataclasses.dataclass above it")
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
                f"{place}: {undeclared[0]!r} is not a field; write @dataclasses.dataclass("
                "frozen=True, kw_only=True) above the class"
            )
        if self.key in options:
            raise UserError(f"{place}: an option cannot be named {self.key!r}; rename it")
        for name, field in options.items():
            if self.given is not None and name in SIZES:
                continue
            if field.default in (dataclasses.MISSING, None):
                raise UserError(
                    f"{place}: the option {name!r} has no default; give it a number, a word, a "
                    "Duration or a tuple of them in its file"
                )
        return member

    def name_of(self, member: type[Any]) -> str:
        """The name of a member's class; the inverse of `find`."""
        package, _, name = member.__module__.rpartition(".")
        if package == self.package:
            return name
        return next(n for n, point in self._installed().items() if point.load() is member)

    def defaults(self, name: Any, where: str) -> dict[str, Any]:
        """The default options of a member, as plain values that a flag can override."""
        plain = lambda x: tuple(map(to_mapping, x)) if isinstance(x, tuple) else to_mapping(x)
        return {key: plain(x) for key, x in self._defaults(self.find(name, where), where).items()}

    def _defaults(self, member: type[Any], where: str) -> dict[str, Any]:
        """The defaults, converted to their annotated types: 1 becomes 1.0 for a float."""
        hints = annotations(member)
        return {
            key: convert(hints[key], to_mapping(field.default), f"{where}.{key}")
            for key, field in self._options(member).items()
            if field.default is not dataclasses.MISSING
        }

    def class_of(self, value: Any) -> type[Any]:
        """The class of a member that the configuration holds."""
        return self.find(value.name, self.noun) if isinstance(value, Choice) else type(value)

    def choose(self, value: Any, where: str) -> Choice:
        """A name, or a mapping of the key and options -> the name and all options, converted.
        Raises:
          UserError: the member or an option is unknown, or a value has the wrong type.
        """
        if isinstance(value, str):
            value = {self.key: value}
        if not isinstance(value, Mapping) or self.key not in value:
            message = f"name a {self.noun}, {{{self.key!r}: NAME, ...}}"
            raise UserError(f"{where}={shown(value)}: {message}")
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
        """As `choose`, but makes the member itself and runs its own checks.

        Raises:
          UserError: as `choose`; or the options contradict each other.
        """
        chosen = self.choose(value, where)
        made = self.find(chosen.name, where)(**chosen.options)
        if (problem := made.problem()) is not None:
            raise UserError(f"{where}: {problem}")
        return made

    def convert(self, value: Any, where: str) -> Any:
        """The value of a configuration field marked with this family."""
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
        """Option -> its default and what it must be, in words, for all options of a member."""
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
    """The files of a folder. Cached, because tracing a model asks for every matrix's kind."""
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


# Fields that take the model's size unless a layer sets them; they need no default.
SIZES = ("num_heads", "num_kv_heads", "head_dim", "ffn_dim")
LAYER = ("parent", "name", "context", "width")  # what the model passes to every module of a layer

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
    """Mark of a mapping from labels to members of a family, each {key: name, **options}. A label
    that is itself a member's name needs no key. `parts`: keys beside the options, each of which
    names a member of another family.
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
