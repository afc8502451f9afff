"""The layers of a model before there is one: the pattern language, labels to mixers and their
options, and the forms of their ops.

    pattern --parse_pattern--> groups of labels --block--> modules whose ops' forms are resolved

A pattern is data: "a" or "a,b" or a tuple is one group cycled over the depth (a remainder its own
group), and ((repeat, labels), ...) are groups. A label is an entry of model.layers, or a bare mixer
name with its defaults. Mixers are found by listing lm/mixers; their options are their Flax fields.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from kernels import dispatch
from lm import mixers as mixer_folder
from lm.config import ModelConfig, UserError, convert, nearest
from lm.modules.block import Block
from lm.modules.context import Context
from lm.modules.mixer import form_field
from lm.modules.mlp import SwiGLU
from lm.modules.remat import NAMES
from lm.parallel import mesh as mesh_lib
from lm.parallel import sharding

# What a layer takes from the model's sizes unless its options say otherwise, where it has them.
HEAD_SIZES = ("num_heads", "num_kv_heads", "head_dim")


class Group(NamedTuple):
    """`repeat` times the layers `labels`, in order; one scan."""

    repeat: int
    labels: tuple[str, ...]


class LayerRecord(NamedTuple):
    """What run.json says of an op of one layer: the layer's index, label and mixer, the op's form
    and why that form.
    """

    layer: int
    label: str
    mixer: str
    op: str
    form: str
    reason: str


def parse_pattern(pattern: Any, num_layers: int) -> tuple[Group, ...]:
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
    depth = sum(group.repeat * len(group.labels) for group in groups)
    if depth != num_layers:
        raise UserError(
            f"model.pattern has {depth} layers, model.num_layers={num_layers}; make them equal"
        )
    return groups


def pattern_depth(pattern: Any, num_layers: int) -> int:
    """The layers that explicit groups add up to; `num_layers` for a cycled pattern."""
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
        if not fits or not isinstance(group[1], str | tuple) or not group[1]:
            raise UserError(f"model.pattern: group {group!r} must be (repeat >= 1, labels)")
    return tuple(
        Group(n, tuple(p.strip() for p in s.split(",")) if isinstance(s, str) else s)
        for n, s in pairs
    )


def mixer_names() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(mixer_folder.__path__)))


def mixer_class(name: str) -> type[Any]:
    """The Flax module of lm/mixers/<name>.py: the file's name in camel case.

    Raises:
      UserError: no such file, or no such class in it.
    """
    if name not in mixer_names():
        raise UserError(f"unknown mixer {name!r}; {nearest(name, mixer_names())}")
    module = importlib.import_module(f"{mixer_folder.__name__}.{name}")
    wanted = "".join(part.capitalize() for part in name.split("_"))
    if not hasattr(module, wanted):
        raise UserError(f"{module.__file__} has no class {wanted}; name the mixer's class so")
    return getattr(module, wanted)


def check(config: ModelConfig) -> None:
    """Everything about layers that needs no device: pattern, labels, options and their types.

    Raises:
      UserError: one line on the first mistake.
    """
    groups = parse_pattern(config.pattern, config.num_layers)
    for label in {*config.layers, *(label for group in groups for label in group.labels)}:
        _layer(label, config)
    for name in config.kept:
        if name not in NAMES:
            raise UserError(f"unknown tensor model.kept.{name}; {nearest(name, NAMES)}")
    if config.kept and config.remat != "named":
        raise UserError(
            f"model.kept={dict(config.kept)} is of model.remat='named', which is {config.remat!r}; "
            "set one of them"
        )


def change_layers(config: ModelConfig, layers: Mapping[str, Mapping[str, Any]]) -> ModelConfig:
    """`config` with other options of labels that its pattern has; `layers` maps label to options.

    Raises:
      UserError: a label or an option that is not there, or a value of another type.
    """
    groups = parse_pattern(config.pattern, config.num_layers)
    known = sorted({label for group in groups for label in group.labels})
    changed = {label: dict(options) for label, options in config.layers.items()}
    for label, options in layers.items():
        if label not in known:
            raise UserError(f"no layer of the model is labelled {label!r}; {nearest(label, known)}")
        if special := options.keys() & {"mixer", "mlp"}:
            raise UserError(f"{label}.{min(special)} is no option of a mixer; it cannot be changed")
        changed[label] = changed.get(label, {}) | dict(options)
    config = dataclasses.replace(config, layers=changed)
    check(config)
    return config


def _layer(label: str, config: ModelConfig) -> tuple[str, type[Any], str, dict[str, Any]]:
    """A label's mixer name, its class, its mlp, and the options of the mixer with the model's head
    sizes filled in.
    """
    if label not in config.layers and label not in mixer_names():
        raise UserError(
            f"model.pattern names {label!r}; {nearest(label, [*config.layers, *mixer_names()])}"
        )
    options = dict(config.layers.get(label, {}))
    name = options.pop("mixer", label)
    mlp = options.pop("mlp", "swiglu")
    if mlp not in ("swiglu", "none"):
        raise UserError(f"model.layers.{label}.mlp={mlp!r} is not one of swiglu, none")
    cls = mixer_class(name)
    fields = {
        f.name: f
        for f in dataclasses.fields(cls)
        if f.name not in ("parent", "name", "context", "width")
    }
    hints = typing.get_type_hints(cls)
    for key, value in options.items():
        where = f"model.layers.{label}.{key}"
        if key not in fields:
            raise UserError(f"unknown option {where}; {nearest(key, fields)}")
        options[key] = convert(hints[key], value, where)
    for key in HEAD_SIZES:
        where = f"model.layers.{label}.{key}" if key in options else f"model.{key}"
        if key in fields and options.setdefault(key, getattr(config, key)) < 1:
            raise UserError(f"{where}={options[key]} must be at least 1")
    problem = cls(None, config.width, **options).problem()
    if problem is not None:
        raise UserError(f"model.layers.{label}: {problem}")
    return name, cls, mlp, options


def block(label: str, config: ModelConfig, context: Context) -> tuple[Block, list[LayerRecord]]:
    """The module of a label, the forms of its ops resolved for the devices of `context`; and what
    run.json says of those.

    Raises:
      UserError: as `check`; a form that cannot run there, heads that the mesh does not divide.
    """
    name, cls, mlp, options = _layer(label, config)
    mixer = cls(context, config.width, **options)
    forms, records = {}, []
    for key, call in mixer.calls().items():
        try:
            resolved = dispatch.resolve(
                call.op,
                getattr(mixer, form_field(key)),
                target=mesh_lib.target(context.mesh),
                dims={**call.dims, "T": context.context_length},
                dtype=context.numerics.compute_dtype,
                options=call.options,
                device_kind=context.mesh.devices.flat[0].device_kind,
            )
        except ValueError as error:
            raise UserError(f"model.layers.{label}: {error}") from None
        split = {letter: size for letter, size in call.dims.items() if letter not in call.whole}
        sharding.check_heads(split, context.mesh, context.rules, f"model.layers.{label}")
        forms[form_field(key)] = resolved.form
        records.append(LayerRecord(0, label, name, call.op, *resolved))
    mlp_module = None if mlp == "none" else SwiGLU(context, config.width, config.ffn_dim)
    return Block(context, mixer.clone(**forms), mlp_module), records
