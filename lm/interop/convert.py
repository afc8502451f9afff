"""Puts the weights of one pattern of layers into another, for example softmax into a hybrid.

Layer n takes from layer n everything with the same name within the layer and the same shape: norms,
the feed-forward, and query, key, value and out of mixers that have them. The same holds for
embedding, head and final norm. The rest is initialized, and the report says what.

A label that the source does not have takes the options of the source's layers with the same mixer,
such as the base of RoPE. Options that still differ are in the report too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import build as build_lib
from lm import model as model_lib
from lm import params as params_lib
from lm import pattern as pattern_lib
from lm.build import Build
from lm.config import ModelConfig
from lm.interop.hf_config import FLAX_FIELDS
from lm.run.progress import WeightsBar

# Layer (None: outside of layers), and the parameter's name within it.
Key = tuple[int | None, str]


class Place(NamedTuple):
    """Where a layer's parameter lies: the row of a leaf (None: the whole leaf), and its shape
    there.
    """

    leaf: str
    row: int | None
    shape: tuple[int, ...]


class Report(NamedTuple):
    """Parameters by layer and name: copied; new and initialized; in the source but unused.
    `changed` lists options of layers, with both values instead of a parameter's name.
    """

    copied: list[Key]
    initialized: list[Key]
    unused: list[Key]
    changed: list[Key]

    def lines(self) -> list[str]:
        """One line for each list."""
        return [f"{name}: {_listed(keys)}" for name, keys in self._asdict().items()]


def model_config(
    source: ModelConfig, pattern: Any, given: Mapping[str, Mapping[str, Any]]
) -> ModelConfig:
    """`source` with another pattern, as deep as its groups say, and with the options `given` by
    label. Options that are not given are the source's.
    """
    num_layers = pattern_lib.depth(pattern, source.num_layers)
    target = dataclasses.replace(source, pattern=pattern, num_layers=num_layers)
    before, after = _labels(source), _labels(target)
    layers = {label: dict(options) for label, options in source.layers.items()}
    for label in dict.fromkeys([*after, *given]):
        old, new = layers.get(label, {}), dict(given.get(label, {}))
        mixer = new.get("mixer", old.get("mixer", label))
        if label not in _mixers(source) or mixer != old.get("mixer", label):
            there = [a for a, b in zip(before, after, strict=False) if b == label]
            old = _shared(source, mixer, there) or _shared(source, mixer, before)
        if found := old | new:
            layers[label] = found
    return dataclasses.replace(target, layers=layers)


def _labels(config: ModelConfig) -> list[str]:
    """The label of every layer."""
    groups = pattern_lib.parse(config.pattern, config.num_layers)
    return [label for group in groups for _ in range(group.repeat) for label in group.labels]


def _mixers(config: ModelConfig) -> dict[str, str]:
    """The mixer of every label that the pattern or the options name."""
    labels = dict.fromkeys([*config.layers, *_labels(config)])
    return {label: config.layers.get(label, {}).get("mixer", label) for label in labels}


def _shared(source: ModelConfig, mixer: str, labels: Iterable[str]) -> dict[str, Any]:
    """The options that have the same value in all of `labels` with this mixer."""
    mixers = _mixers(source)
    alike = [dict(source.layers.get(x, {})) for x in labels if mixers[x] == mixer]
    return {k: v for k, v in alike[0].items() if all(o.get(k) == v for o in alike)} if alike else {}


def convert(
    params_from: Any, built_from: Build, built_to: Build, seed: int = 0
) -> tuple[Any, Report]:
    """The parameters of `built_to`: those of `params_from` that fit, and the rest initialized from
    `seed`.
    """
    source, target = places(built_from.infos), places(built_to.infos)
    taken = {key for key, place in target.items() if key in source}
    taken = {key for key in taken if source[key].shape == target[key].shape}
    theirs = dict(_by_name(params_from))
    made = {name: np.array(leaf) for name, leaf in _by_name(_init(built_to, seed))}
    sizes = [math.prod(target[key].shape) * made[target[key].leaf].itemsize for key in taken]
    with WeightsBar("copying", sum(sizes)) as bar:
        for key in taken:
            a, b = source[key], target[key]
            value = np.asarray(theirs[a.leaf] if a.row is None else theirs[a.leaf][a.row])
            made[b.leaf][... if b.row is None else b.row] = value
            bar.advance(value.nbytes)
    abstract = built_to.abstract_state.params
    arrays = [jax.device_put(made[name], like.sharding) for name, like in _by_name(abstract)]
    params = jax.tree.unflatten(jax.tree.structure(abstract), arrays)
    lists = ([k for k in target if k in taken], [k for k in target if k not in taken])
    unused = [k for k in source if k not in taken]
    return params, Report(*lists, unused, list(changed(built_from, built_to)))


def changed(built_from: Build, built_to: Build) -> Iterator[Key]:
    """Changed options of layers that keep their mixer, such as "rope_theta 500000.0 -> 10000.0"."""
    pairs = zip(_blocks(built_from), _blocks(built_to), strict=False)
    for layer, (a, b) in enumerate(pairs):
        if type(a.mixer) is type(b.mixer):
            names = {field.name for field in dataclasses.fields(a.mixer)} - {*FLAX_FIELDS}
            for name in sorted(n for n in names if n != "form" and not n.endswith("_form")):
                old, new = getattr(a.mixer, name), getattr(b.mixer, name)
                if old != new:
                    yield layer, f"{name} {old} -> {new}"


def _blocks(built: Build) -> list[Any]:
    """The block of every layer."""
    periods = zip(built.model.repeats, built.model.groups, strict=True)
    return [block for n, period in periods for _ in range(n) for block in period.blocks]


def places(infos: Any) -> dict[Key, Place]:
    """The place of every parameter of every layer, from a tree of ParamInfo. Layers are numbered by
    group, then by repeat, then by block within a repeat.
    """
    named = dict(_by_name(infos))
    inside = [name for name in named if name.startswith("groups_")]
    found: dict[Key, Place] = {
        (None, name): Place(name, None, named[name].shape) for name in named.keys() - set(inside)
    }
    split = [(name, *name.split("/", 2)) for name in inside]
    first = 0
    for group in sorted({g for _, g, _, _ in split}, key=_number):
        blocks = sorted({b for _, g, b, _ in split if g == group}, key=_number)
        (repeat,) = {named[name].shape[0] for name, g, _, _ in split if g == group}
        for name, _, block, part in (s for s in split if s[1] == group):
            for row in range(repeat):
                layer = first + row * len(blocks) + blocks.index(block)
                found[layer, part] = Place(name, row, named[name].shape[1:])
        first += repeat * len(blocks)
    return dict(sorted(found.items(), key=lambda item: (item[0][1], item[0][0] or 0)))


def _init(built: Build, seed: int) -> Any:
    """Initial parameters alone; `built.init` would make an optimizer's state too."""

    def init() -> Any:
        inputs = model_lib.dummy_inputs(
            build_lib.batch_ways(built.mesh), 8 * built.mesh.shape["sequence"]
        )
        made = built.model.init(jax.random.key(seed), *inputs, method="init_all")["params"]
        return params_lib.split(made)[0]

    return jax.jit(init)()


def _by_name(tree: Any) -> Iterator[tuple[str, Any]]:
    leaves = jax.tree.leaves(tree, is_leaf=params_lib.is_info)
    return zip(jax.tree.leaves(params_lib.names(tree)), leaves, strict=True)


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _listed(keys: Iterable[Key]) -> str:
    """Parameters by name with their layers: "embed/table, mlp/up/kernel of layers 0 1 2"."""
    layers: dict[str, list[int]] = {}
    for layer, part in keys:
        layers.setdefault(part, []).extend([] if layer is None else [layer])
    parts = [f"{p} of layers {' '.join(map(str, n))}" if n else p for p, n in layers.items()]
    return ", ".join(parts) or "nothing"
