"""The grammar of a value on a command line, shared by every flag that takes one.

    3   -1   1e-3   1_000         a number, as Python writes it; also nan and inf
    true   False                  a boolean, as Python or JSON writes it
    (1, 'a')   [a, b]             a list; inside brackets a name needs no quotes
    {'a': 1, b: [true]}           a mapping
    '10'   "a, b"                 text that would otherwise read as something else
    softmax   10 percent   a/*.md anything else is a word: the text itself

Where the type of a key is known, a value for text, a duration or a choice of words is taken
literally, and the brackets of a list may be left out: a,b.
"""

from __future__ import annotations

import ast
import math
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal

from lm.mapping import Duration, UserError, shown

NAMES = {"true": True, "false": False, "null": None}
NAMES |= {"nan": math.nan, "inf": math.inf, "infinity": math.inf}
SCALARS = {bool: "true or false", int: "an integer", float: "a number"}
BRACKETS = ("(", "[", "{")


def literal(text: str) -> Any:
    """The value that `text` writes, lists as tuples; `text` itself if it is a word."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # such as an unknown escape
            node = ast.parse(text.strip(), mode="eval").body
        # "a,b" may be a pattern or a list; the type of the key decides, so it stays text here.
        is_bare = isinstance(node, ast.Tuple) and not text.strip().startswith(BRACKETS)
        is_word = isinstance(node, ast.Name) and node.id.lower() not in NAMES
        return text if is_bare or is_word else _value(node)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text


def _value(node: ast.expr) -> Any:
    """The value of a syntax tree.

    Raises:
      ValueError: the tree is an expression that is not a plain value.
    """
    match node:
        case ast.Constant(bool() | int() | float() | str() | None):
            return node.value
        case ast.Name():
            return NAMES.get(node.id.lower(), node.id)
        case ast.UnaryOp(ast.USub() | ast.UAdd()):
            number = _value(node.operand)
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError("a sign before a value that is not a number")
            return -number if isinstance(node.op, ast.USub) else number
        case ast.Tuple() | ast.List():
            return tuple(map(_value, node.elts))
        case ast.Dict() if None not in node.keys:
            keys = [_value(key) for key in node.keys if key is not None]
            if not all(isinstance(key, str | int | float) for key in keys):
                raise ValueError("a key that is neither text nor a number")
            return dict(zip(keys, map(_value, node.values), strict=True))
    raise ValueError("an expression")


def read(kind: Any, text: str, where: str) -> Any:
    """The value that `text` writes for a key of type `kind`, an annotation, or None if the type is
    not known. `where` names the key in messages.

    Raises:
      UserError: the text is not a value of that type.
    """
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    origin, value = typing.get_origin(kind), literal(text)
    if kind in (str, Duration) or origin is Literal:
        return value if isinstance(value, str) else text
    if kind in SCALARS:
        fits = isinstance(value, int | float if kind is float else kind)
        if not fits or isinstance(value, bool) != (kind is bool):
            raise UserError(f"{where}={text[:80]} is not {SCALARS[kind]}")
        return value
    if kind is not None and value is text and text.strip().startswith(BRACKETS):
        raise UserError(
            f"{where}={shown(text)} does not read as a value; close its brackets and quote its "
            "words, as in ((1,'a'),(2,'b c'))"
        )
    if kind is tuple or origin is tuple:
        return _listed(kind, text, value, where)
    is_group = is_dataclass(kind) or Mapping in (kind, origin)
    if is_group and not isinstance(value, dict):
        raise UserError(f"{where}={shown(text)} is not a dict; write {{'key': value}}")
    return value


def _listed(kind: Any, text: str, value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, tuple):
        return value
    if isinstance(value, str) and value is not text:  # quoted: a comma in it does not separate
        return (value,)
    item = (typing.get_args(kind) or (Any,))[0]
    return tuple(read(item, part, where) for part in text.split(",")) if text else ()


def pairs(flag: str, given: Iterable[str], form: str) -> dict[str, str]:
    """The KEY=VALUE pairs of a repeatable flag: ["a=1", "b=2"] -> {"a": "1", "b": "2"}. `form` is
    what a message says to write.

    Raises:
      UserError: a key or the sign = is missing, or a key is given twice.
    """
    found: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UserError(f"--{flag}={text}: write {form}")
        if key in found:
            raise UserError(f"--{flag}={key} is given twice")
        found[key] = value
    return found


def numbers(flag: str, given: Iterable[str]) -> dict[str, float]:
    """The NAME=NUMBER pairs of a repeatable flag; each number must be finite."""
    found = {}
    for name, value in pairs(flag, given, f"NAME=VALUE, as --{flag}=c=1").items():
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if not math.isfinite(found[name]):
            raise UserError(f"--{flag}={name}={value} is not a finite number")
    return found
