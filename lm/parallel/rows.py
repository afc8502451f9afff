"""Rows whose tokens devices share: the strategy asked of each layer, and how its op splits rows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from jaxtyping import DTypeLike

from kernels import dispatch, shard
from kernels.contract import Layout
from kernels.primitives.time_shards import LAYOUTS
from kernels.shard import Rules
from kernels.spelling import near, nearest
from kernels.strategies import Link, Way
from lm.config import MeshConfig, UserError
from lm.parallel.sharding import AnyMesh

AUTO = "auto"


class Rows(NamedTuple):
    """Rows of `time` tokens, computed in `dtype` on a mesh whose devices are joined by `link`."""

    time: int
    dtype: DTypeLike
    mesh: AnyMesh
    rules: Rules
    layout: Layout
    link: Link

    def way(
        self,
        op: str,
        strategy: str,
        dims: Mapping[str, int],
        options: Mapping[str, Any],
        whole: Collection[str],
    ) -> Way | None:
        """How a call of an op splits rows over time; None if the mesh does not split them. Letters
        in `whole` are not split over any axis.

        Raises:
          ValueError: the op does not have that strategy, or has none that takes the problem.
        """
        shards = shard.time_shards(self.rules, self.mesh, self.layout)
        if shards is None:
            dispatch.check_strategy(op, strategy)
            return None
        rules = {letter: axes for letter, axes in self.rules.items() if letter not in whole}
        # One row is enough, since what a strategy sends is proportional to the number of rows.
        sizes = shard.of_rank(dims, rules, self.mesh) | {"B": 1, "T": self.time}
        problem = {"dims": sizes, "options": options, "dtype": self.dtype}
        return dispatch.split(op, strategy, **problem, shards=shards, link=self.link)


def strategies(mesh: MeshConfig) -> tuple[str, dict[str, str]]:
    """The strategy of all layers, and those of labels that have their own. "gather" gives
    ("gather", {}), and "a=states,b=ring" gives ("auto", {"a": "states", "b": "ring"}).

    Raises:
      UserError: the text is neither of the two, or names a label twice.
    """
    text = mesh.sequence_strategy
    if re.fullmatch(r"\s*\w+\s*", text):
        return text.strip(), {}
    own = _by_label(text)
    if own is None:
        tidy = re.sub(r"[{}()'\"\s]", "", text).replace(":", "=")
        advice = ",".join(part for part in tidy.split(",") if _by_label(part)) or AUTO
        raise UserError(
            f"mesh.sequence_strategy={text!r} is not auto, the name of a strategy or "
            f"LABEL=NAME,LABEL=NAME; set mesh.sequence_strategy={_quoted(advice)}"
        )
    labels = [label for label, _ in own]
    if twice := [label for label in labels if labels.count(label) > 1]:
        first = _written(dict(reversed(own)))
        raise UserError(
            f"mesh.sequence_strategy={text!r} names {twice[0]!r} twice; set "
            f"mesh.sequence_strategy={_quoted(first)}, or the other"
        )
    return AUTO, dict(own)


def check_known(config: MeshConfig, labels: Collection[str], ops: Collection[str]) -> None:
    """Checks that every named label is one of `labels`, and that some op has the strategy for all
    layers.

    Raises:
      UserError: a label or the strategy is unknown.
    """
    common, own = strategies(config)
    _check_word(config, common, {AUTO}.union(*map(_names, ops)), "no layer has such a strategy")
    for label in own:
        _check_word(config, label, labels, f"no layer is labelled {label!r}")


def _check_word(config: MeshConfig, word: str, known: Collection[str], problem: str) -> None:
    if word in known:
        return
    text, close = config.sequence_strategy, near(word, known)
    mended = re.sub(rf"(?<![^,\s]){re.escape(word)}(?=\s*(=|$))", close or "", text)
    advice = f"set mesh.sequence_strategy={_quoted(mended if close else AUTO)}"
    if not close:
        advice = f"{nearest(word, known)}; {advice}"
    raise UserError(f"mesh.sequence_strategy={text!r}: {problem}; {advice}")


def _by_label(text: str) -> list[tuple[str, str]] | None:
    """ "a=states,b=ring" as pairs; None for a text of another form."""
    pairs = [re.fullmatch(r"\s*([^=,]*[^=,\s])\s*=\s*(\w+)\s*", x) for x in text.split(",")]
    return [(x[1], x[2]) for x in pairs if x] if all(pairs) else None


def _written(own: Mapping[str, str]) -> str:
    """The inverse of `_by_label`: {"a": "states", "b": "ring"} as "a=states,b=ring"."""
    return ",".join(f"{label}={name}" for label, name in own.items())


def _quoted(value: object) -> str:
    return str(value) if str(value).isidentifier() else repr(value)


def alternatives(
    config: MeshConfig, label: str, ops: Mapping[str, str]
) -> Iterator[list[MeshConfig]]:
    """Other settings to try if the layers of `label` cannot split their rows: for each key a list
    of configurations, in this order. `ops` maps every label to its main op.
    """
    common, own = strategies(config)
    kept = dict(own)
    if common != AUTO:  # the other labels can keep it
        kept = {x: common for x, op in ops.items() if common in _names(op)}
    kept.pop(label, None)
    names = _names(ops[label]) if label in own and label in ops else []
    texts = [kept | {label: name} for name in names]
    texts += [kept, {}]
    yield [dataclasses.replace(config, sequence_strategy=_written(x) or AUTO) for x in texts]
    others = [layout for layout in LAYOUTS if layout != config.sequence_layout]
    yield [dataclasses.replace(config, sequence_layout=layout) for layout in others]


def changed(old: MeshConfig, new: MeshConfig) -> str:
    """The first key that differs, written as a setting: "mesh.sequence_layout=contiguous"."""
    for field in dataclasses.fields(MeshConfig):
        if (value := getattr(new, field.name)) != getattr(old, field.name):
            return f"mesh.{field.name}={_quoted(value)}"
    raise ValueError("the two are equal")


def _names(op: str) -> list[str]:
    return [strategy.name for strategy in dispatch.get(op).sequence]
