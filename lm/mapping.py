"""The one conversion between plain nested values and typed frozen dataclasses, in both directions.

`convert` walks annotations (scalars, Literal, tuple, Mapping, nested dataclasses, Duration). It
rejects unknown keys, missing keys and wrong types, each in one line. No field has a default: the
values must state everything.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from kernels.spelling import nearest

# Exit statuses: a mistake, which a second try would repeat; unfinished work, which the same command
# continues (EX_TEMPFAIL in sysexits.h); an interruption from the keyboard.
MISTAKE, UNFINISHED, INTERRUPTED = 2, 75, 130


class UserError(Exception):
    """A mistake that the user can fix, described in one line: what is wrong, the two values, what
    to set. Launchers exit with status 2.
    """


# Arrays have 32 bits: integers must be below INTEGERS in magnitude, other nonzero numbers must lie
# between SMALLEST and LARGEST. Tokens are counted exactly up to 2^53, the longest duration.
INTEGERS, SMALLEST, LARGEST, LONGEST = 1 << 31, 2.0**-126, 2.0**128, 2.0**53

# Names of kinds of values as one writes them in a file, where they differ from Python's.
NAMES: dict[Any, str] = {Mapping: "dict", list | tuple: "list"}


def shown(value: Any) -> str:
    """A value as messages show it, shortened if it is long."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"{'-' if value < 0 else ''}2^{value.bit_length() - 1} or more"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} letters)"


@dataclasses.dataclass(frozen=True)
class Duration:
    """A span of training with its unit, written "500 steps", "1e6 tokens" or "10 percent" (of the
    whole run).
    """

    value: float
    unit: Literal["steps", "tokens", "percent"]

    @staticmethod
    def parse(text: str, where: str) -> Duration:
        parts = text.split()
        units = ("steps", "tokens", "percent")
        if len(parts) != 2 or parts[1] not in units:
            raise UserError(
                f"{where}={shown(text)} is not a duration; write a number and one of "
                f"{', '.join(units)}"
            )
        try:
            value = float(parts[0])
        except ValueError:
            raise UserError(f"{where}={shown(text)}: {parts[0]!r:.40} is not a number") from None
        if not math.isfinite(value) or value < 0:
            raise UserError(f"{where}={shown(text)} must be a finite duration >= 0")
        if value > LONGEST:
            raise UserError(f"{where}={shown(text)} is too long; set at most {LONGEST:.1e}")
        return Duration(value, typing.cast(Any, parts[1]))

    def tokens(self, *, run_tokens: float, tokens_per_step: int) -> float:
        """The span in tokens, given the length of the run and of a step."""
        scale = {"tokens": 1.0, "steps": float(tokens_per_step), "percent": run_tokens / 100.0}
        return self.value * scale[self.unit]

    def __str__(self) -> str:
        short = f"{self.value:g}"
        return f"{short if float(short) == self.value else repr(self.value)} {self.unit}"


def to_mapping(value: Any) -> Any:
    """The inverse of `from_mapping`: nested dicts, lists and scalars that JSON can store."""
    if isinstance(value, Duration):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {}
        for name, marks in field_marks(type(value)).items():
            if is_neutral(marks, getattr(value, name)):
                continue
            reader = _reader(marks)
            inverse = to_mapping if reader is None else reader.to_mapping
            found[name] = inverse(getattr(value, name))
        return found
    if isinstance(value, Mapping):
        return {str(k): to_mapping(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_mapping(v) for v in value]
    return value


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; used for differences between two configurations."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Flattened keys whose values differ: key -> (old, new). None stands for an absent key."""
    a, b = flatten(old), flatten(new)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


@dataclasses.dataclass(frozen=True)
class Bound:
    """Mark of a field: a condition on its values, and the words in which a message states it."""

    must: str
    holds: Callable[[Any], bool]


POSITIVE = Bound("must be positive", lambda x: x > 0)
NOT_NEGATIVE = Bound("must be >= 0", lambda x: x >= 0)
SHARE = Bound("must lie in [0, 1]", lambda x: 0.0 <= x <= 1.0)
BELOW_ONE = Bound("must lie in [0, 1)", lambda x: 0.0 <= x < 1.0)

# Mark of a field (or of a whole section) that may differ when a run is resumed. Such a field
# changes the length of a run, what it logs, on which devices its arrays are, or the order of sums.
# It never changes what a step computes, except for what a module draws (lm/step.py: each place on
# the data axis has its own key).
FREE = "free"


# Mark of a field that a new entry of a mapping (say a source added by a flag) must set itself.
OWN = "own"


@dataclasses.dataclass(frozen=True)
class Later:
    """Mark of a field that was added after configurations without it had been written. A mapping
    without the key means `neutral`, and `to_mapping` omits the key when the field has that value.
    So an old configuration still reads the same, and still has the same digest. An option of a
    family must have `neutral` as its default.
    """

    neutral: Any


def is_neutral(marks: tuple[Any, ...], value: Any) -> bool:
    """Whether a field with these marks has the value that a mapping without its key means. For a
    member of a family, the mapping that names the member is compared.
    """
    neutral = [mark.neutral for mark in marks if isinstance(mark, Later)]
    if not neutral:
        return False
    reader = _reader(marks)
    return neutral[0] == (value if reader is None else reader.to_mapping(value))


def completed(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a dataclass with its missing `Later` keys added, also in dataclasses inside it,
    so that a flag can name them. The defaults of families' options are added elsewhere.
    """
    found = dict(values)
    hints = annotations(kind)
    for name, marks in field_marks(kind).items():
        inner = hints[name]
        plain = typing.get_args(inner)[0] if typing.get_origin(inner) is Annotated else inner
        if name not in found:
            neutral = [to_mapping(mark.neutral) for mark in marks if isinstance(mark, Later)]
            found.update(zip([name], neutral, strict=False))
        elif dataclasses.is_dataclass(plain) and isinstance(found[name], Mapping):
            found[name] = completed(typing.cast(type[Any], plain), found[name])
    return found


@dataclasses.dataclass(frozen=True)
class Unit:
    """Mark of a number: what it counts, which messages say after it."""

    name: str


@dataclasses.dataclass(frozen=True)
class Holds:
    """Mark of a field whose plain mapping is converted later; its keys are the fields of `kind`."""

    kind: type[Any]


Count = Annotated[int, POSITIVE]
Tokens = Annotated[int, POSITIVE, Unit("tokens")]


class Reader(typing.Protocol):
    """Mark of a field whose values have their own conversion (lm/families.py)."""

    def convert(self, value: Any, where: str) -> Any: ...

    def to_mapping(self, value: Any) -> Any: ...

    def class_of(self, value: Any) -> type[Any]: ...


@functools.cache
def annotations(kind: Any) -> dict[str, Any]:
    """Annotations of a class, with marks. Cached: evaluating them dominated a conversion's time."""
    return typing.get_type_hints(kind, include_extras=True)


@functools.cache
def field_marks(kind: type[Any]) -> dict[str, tuple[Any, ...]]:
    """The marks of every field of a dataclass, `Annotated[kind, *marks]`, by name."""
    hints = annotations(kind)
    return {
        f.name: typing.get_args(hints[f.name])[1:]
        if typing.get_origin(hints[f.name]) is Annotated
        else ()
        for f in dataclasses.fields(kind)
    }


def free_keys(value: Any, prefix: str = "") -> tuple[str, ...]:
    """Dotted keys of all fields marked FREE, in a dataclass and in those inside it."""
    found: list[str] = []
    for name, marks in field_marks(type(value)).items():
        inner = getattr(value, name)
        reader = _reader(marks)
        if FREE in marks:
            found.append(f"{prefix}{name}")
        elif reader is not None:
            options = field_marks(reader.class_of(inner))
            found += [f"{prefix}{name}.{key}" for key, mark in options.items() if FREE in mark]
        elif dataclasses.is_dataclass(inner) and not isinstance(inner, Duration):
            found += free_keys(inner, f"{prefix}{name}.")
    return tuple(found)


def lasting(value: Any) -> dict[str, Any]:
    """Everything that a resumed run must not change, as plain values by dotted key."""
    free = free_keys(value)
    return {
        key: plain
        for key, plain in flatten(to_mapping(value)).items()
        if not any(f"{key}.".startswith(f"{name}.") for name in free)
    }


def _reader(marks: tuple[Any, ...]) -> Reader | None:
    return next((mark for mark in marks if hasattr(mark, "convert")), None)


def _reads(kind: Any) -> bool:
    """Whether a value of this kind, or one inside it, has its own conversion."""
    if typing.get_origin(kind) is Annotated:
        return _reader(typing.get_args(kind)[1:]) is not None
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return False
    return any(map(_reads, annotations(kind).values()))


def _marked(kind: Any, value: Any, where: str) -> Any:
    inner, *marks = typing.get_args(kind)
    if (reader := _reader(tuple(marks))) is not None:
        return reader.convert(value, where)
    value = convert(inner, value, where)
    unit = next((f" {mark.name}" for mark in marks if isinstance(mark, Unit)), "")
    for mark in marks:
        number = value.value if isinstance(value, Duration) else value
        if isinstance(mark, Bound) and not mark.holds(number):
            raise UserError(f"{where}={value}{unit} {mark.must}")
    return value


def convert(kind: Any, value: Any, where: str) -> Any:
    """Converts a plain value to an annotated type (scalar, Literal, tuple, Mapping or dataclass,
    each with or without marks). A UserError names `where`.
    """
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return _marked(kind, value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return (
            Duration.parse(_typed(str, value, where), where)
            if kind is Duration
            else _fields(kind, value, where)
        )
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UserError(f"{where}={shown(value)} is not one of {', '.join(map(str, choices))}")
        return value
    if origin is not None and issubclass(origin, Mapping):
        item = typing.get_args(kind)[1]
        pairs = _typed(Mapping, value, where).items()
        return types.MappingProxyType({str(k): convert(item, v, f"{where}.{k}") for k, v in pairs})
    if origin is tuple:
        item = typing.get_args(kind)[0]
        return tuple(
            convert(item, v, f"{where}[{i}]")
            for i, v in enumerate(_typed(list | tuple, value, where))
        )
    if kind is Any:
        return _freeze(value)
    return _typed(kind, value, where)


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return types.MappingProxyType({str(k): _freeze(v) for k, v in value.items()})
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


def _fields(kind: Any, value: Any, where: str) -> Any:
    value = _typed(Mapping, value, where)
    hints = annotations(kind)
    value = completed(kind, value)
    for key in value:
        if key not in hints:
            raise UserError(f"unknown key {where}.{key}; {nearest(str(key), hints)}")
    for key in hints:
        if key not in value:
            raise UserError(f"missing key {where}.{key}; experiments/base.py states every key")
    # Values with their own conversion come last: the file of a family imports JAX, and a mistake
    # elsewhere is reported without waiting for that.
    order = sorted(hints, key=lambda key: _reads(hints[key]))
    return kind(**{key: convert(hints[key], value[key], f"{where}.{key}") for key in order})


def _typed(kind: Any, value: Any, where: str) -> Any:
    """Checks the type, and that arrays can hold the number or files can hold the text."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < LARGEST else math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        name = NAMES.get(kind) or getattr(kind, "__name__", str(kind))
        raise UserError(f"{where}={shown(value)} is a {type(value).__name__}; set a {name}")
    if kind is int and abs(value) >= INTEGERS:
        raise UserError(f"{where}={shown(value)} must be below 2^31 in size")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{where}={value!r} must be finite")
    if kind is float and value and not SMALLEST <= abs(value) < LARGEST:
        raise UserError(f"{where}={value!r} must be 0, or from 1.2e-38 to 3.4e38 in size")
    if isinstance(value, str):
        check_text(value, where)
    return value


def check_text(text: str, where: str) -> None:
    """Checks that a file can hold the text.

    Raises:
      UserError: the text is not UTF-8 (a byte of a command line that is not UTF-8 becomes a lone
      surrogate), or contains a NUL, which would end a file name.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"place {error.start} of {shown(text)}"
        raise UserError(f"{where} is not UTF-8 at {place}; write it in UTF-8") from None
    if "\0" in text:
        raise UserError(f"{where}={shown(text)} holds a NUL; leave it out")
