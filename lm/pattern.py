"""The pattern language of `model.pattern`: which layer stands where.

A pattern is data. "a", "a,b" or a tuple of labels is cycled over the depth; a remainder becomes a
group of its own. ((repeat, labels), ...) lists the groups. A label is an entry of model.layers, or
the name of a mixer with its default options (lm/layers.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lm.config import UserError


class Group(NamedTuple):
    """The layers `labels`, in order, repeated `repeat` times in one scan."""

    repeat: int
    labels: tuple[str, ...]


def parse(pattern: Any, num_layers: int) -> tuple[Group, ...]:
    """ "a,b" over 5 layers -> ((2, (a, b)), (1, (a,))); explicit groups are checked against the
    depth.
    """
    labels = (
        tuple(part.strip() for part in pattern.split(",")) if isinstance(pattern, str) else pattern
    )
    if not isinstance(labels, tuple) or not labels or "" in labels:
        raise UserError(
            f"model.pattern={pattern!r}: write labels such as 'a,b', "
            "or groups ((repeat, labels), ...)"
        )
    if all(isinstance(label, str) for label in labels):
        repeat, rest = divmod(num_layers, len(labels))
        groups = (Group(repeat, labels), Group(1, labels[:rest]))
        return tuple(group for group in groups if group.repeat and group.labels)
    groups = _groups(labels)
    found = sum(group.repeat * len(group.labels) for group in groups)
    if found != num_layers:
        raise UserError(
            f"model.pattern has {found} layers, model.num_layers={num_layers}; make them equal"
        )
    return groups


def depth(pattern: Any, num_layers: int) -> int:
    """The number of layers in explicit groups; `num_layers` for a cycled pattern."""
    if not isinstance(pattern, tuple) or all(isinstance(label, str) for label in pattern):
        return num_layers
    return sum(group.repeat * len(group.labels) for group in _groups(pattern))


def _groups(pairs: Any) -> tuple[Group, ...]:
    for group in pairs:
        fits = (
            isinstance(group, tuple)
            and len(group) == 2
            and isinstance(group[0], int)
            and group[0] > 0
        )
        labels = group[1] if fits else ()
        if not labels or not all(isinstance(x, str) and x.strip() for x in _listed(labels)):
            raise UserError(f"model.pattern: group {group!r} must be (repeat >= 1, labels)")
    return tuple(Group(n, tuple(map(str.strip, _listed(labels)))) for n, labels in pairs)


def _listed(labels: Any) -> tuple[Any, ...]:
    """The labels of a group, a tuple or text such as "a,b"; (None,) for anything else."""
    if isinstance(labels, str):
        return tuple(labels.split(","))
    return labels if isinstance(labels, tuple) else (None,)
