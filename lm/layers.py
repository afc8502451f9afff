"""The layers of a model before the model exists: which mixer and options a label stands for, which
form each op takes, and how the ops split a time axis.

    pattern --pattern.parse--> groups of labels --block--> modules whose ops' forms are resolved

Mixers, feed-forwards, blocks and kinds of matrix are families (lm/families.py). Where a layer does
not name one of them, it takes the model's.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

from kernels import dispatch
from kernels.contract import Sent
from kernels.strategies import LEAST_BYTES, Way
from lm import families
from lm import pattern as pattern_lib
from lm.config import Config, MeshConfig, ModelConfig, UserError, nearest
from lm.families import SIZES, Choice, Family
from lm.modules.block import Block
from lm.modules.context import Context
from lm.modules.mixer import Call, form_field
from lm.modules.remat import NAMES
from lm.mup import Multipliers
from lm.parallel import mesh as mesh_lib
from lm.parallel import sharding
from lm.parallel.matmul import Numerics
from lm.parallel.rows import AUTO, Rows, alternatives, changed, check_known, strategies
from lm.parallel.sharding import AnyMesh
from lm.targets import chips

# Largest size of a dimension of an op, by letter; others are at most 2^20. W is a convolution's
# number of taps, which are unrolled.
MOST = {"W": 1024}


class LayerRecord(NamedTuple):
    """One op of one layer, as run.json records it: the layer's index, label and mixer, the op's
    form and the reason for it. `sequence`: the strategy for a split time axis and the reason, "" if
    it is not split. `sent`: what a rank then sends for one row.
    """

    layer: int
    label: str
    mixer: str
    op: str
    form: str
    reason: str
    sequence: str = ""
    sent: Sent | None = None


def summary(records: Iterable[LayerRecord]) -> list[str]:
    """One line per op and label: its layers, its form, how it splits time, and why."""
    found: dict[LayerRecord, list[int]] = {}
    for record in records:
        layers = found.setdefault(record._replace(layer=0, sent=None), [])
        layers += [record.layer] if record.layer not in layers else []
    return [
        f"{x.label} (layers {', '.join(map(str, layers))}): {x.op} runs as {x.form}, {x.reason}"
        + (f"; it splits rows by {x.sequence}" if x.sequence else "")
        for x, layers in found.items()
    ]


def check(config: ModelConfig) -> dict[str, Layer]:
    """Checks everything about layers that needs no device: pattern, labels, options and their
    types. In a cycled pattern it also checks labels that the depth leaves out. Returns the layers
    of the model by label.

    Raises:
      UserError: the first mistake, in one line.
    """
    groups = pattern_lib.parse(config.pattern, config.num_layers)
    cycle = pattern_lib.parse(config.pattern, pattern_lib.depth(config.pattern, 1 << 16))
    named = dict.fromkeys(label for group in cycle for label in group.labels)
    found = {label: _layer(label, config) for label in {**named, **config.layers}}
    for name in config.kept:
        if name not in NAMES:
            raise UserError(f"unknown tensor model.kept.{name}; {nearest(name, NAMES)}")
    if config.kept and config.remat != "named":
        raise UserError(
            f"model.kept={dict(config.kept)} needs model.remat='named', which is {config.remat!r}; "
            "set one of them"
        )
    return {label: found[label] for group in groups for label in group.labels}


def change_layers(config: ModelConfig, layers: Mapping[str, Mapping[str, Any]]) -> ModelConfig:
    """`config` with changed options for labels in its pattern; `layers` maps a label to options.
    Raises:
      UserError: a label or an option does not exist, or a value has the wrong type.
    """
    groups = pattern_lib.parse(config.pattern, config.num_layers)
    known = sorted({label for group in groups for label in group.labels})
    changed = {label: dict(options) for label, options in config.layers.items()}
    for label, options in layers.items():
        if label not in known:
            raise UserError(f"no layer of the model is labelled {label!r}; {nearest(label, known)}")
        if special := options.keys() & {"mixer", "mlp", "residual", "matrix"}:
            raise UserError(
                f"{label}.{min(special)} is not an option of a mixer; it cannot be changed"
            )
        changed[label] = changed.get(label, {}) | dict(options)
    config = dataclasses.replace(config, layers=changed)
    check(config)
    return config


class Member(NamedTuple):
    """A member of a family: its name, its class, all its options."""

    name: str
    kind: type[Any]
    options: Mapping[str, Any]


class Layer(NamedTuple):
    """What a label stands for. `mlp` is None if the layer has only a mixer. `calls`: the ops of the
    mixer, each with the form that was asked for.
    """

    mixer: Member
    mlp: Member | None
    block: Member
    matrix: Choice
    calls: Mapping[str, tuple[Call, str]]
    is_causal: bool


def _layer(label: str, config: ModelConfig) -> Layer:
    """The members that a label names or takes from the model, checked.

    Raises:
      UserError: a label, member or option is unknown, a value has the wrong type, options
      contradict each other, or the mixer calls an op without having a field for its form.
    """
    names, where = families.MIXERS.names(), f"model.layers.{label}"
    if label not in config.layers and label not in names:
        raise UserError(
            f"model.pattern names {label!r}; {nearest(label, [*config.layers, *names])}"
        )
    options = {"mixer": label, **config.layers.get(label, {})}
    mlp, residual, matrix = (
        options.pop(key, getattr(config, key)) for key in ("mlp", "residual", "matrix")
    )
    mixer = _member(families.MIXERS, options, config, where)
    feed_forward = (
        None if mlp == "none" else _member(families.FEED_FORWARDS, mlp, config, f"{where}.mlp")
    )
    around = _member(families.BLOCKS, residual, config, f"{where}.residual")
    of = _member(families.MATRICES, matrix, config, f"{where}.matrix")
    context = _without_mesh(Choice(of.name, of.options))
    made = {
        where: mixer.kind(context, config.width, **mixer.options),
        f"{where}.residual": around.kind(context, None, None, **around.options),
        f"{where}.matrix": of.kind(context, "", (), 0, **of.options),
    }
    if feed_forward is not None:
        made[f"{where}.mlp"] = feed_forward.kind(context, config.width, **feed_forward.options)
    for place, module in made.items():
        if (problem := module.problem()) is not None:
            raise UserError(f"{place}: {problem}")
    calls = made[where].calls()
    for call in calls:
        if form_field(call) not in mixer.options:
            raise UserError(
                f"{where}: {mixer.kind.__name__} calls an op {call!r} and has no field "
                f'{form_field(call)!r}; add {form_field(call)}: str = "auto" to the class'
            )
    forms = {name: (call, mixer.options[form_field(name)]) for name, call in calls.items()}
    return Layer(mixer, feed_forward, around, context.matrix, forms, made[where].is_causal())


def _without_mesh(matrix: Choice) -> Context:
    """A context in which a module can be asked about itself; nothing is computed in it."""
    multipliers = Multipliers(
        width=1.0,
        embedding=1.0,
        residual=1.0,
        attention_exponent=-0.5,
        base_init_std=1.0,
        width_exponent=-1.0,
        is_scale_free=True,
    )
    return Context(
        numerics=Numerics.create("float32"),
        multipliers=multipliers,
        norm_eps=1.0,
        context_length=1,
        mesh=cast(Any, None),
        rules={},
        weights={},
        matrix=matrix,
        strategies={},
        layout="contiguous",
    )


def _member(family: Family, value: Any, config: ModelConfig, where: str) -> Member:
    """A member, with the model's sizes filled in where its options do not set them."""
    if not isinstance(value, Choice):
        value = family.choose(value, where)
    kind, options = family.find(value.name, where), dict(value.options)
    for key in SIZES:
        if key not in options and key in {field.name for field in dataclasses.fields(kind)}:
            options[key] = getattr(config, key)
        if options.get(key, 1) < 1:
            raise UserError(f"{where}.{key}={options[key]} must be at least 1")
    return Member(value.name, kind, options)


def check_devices(
    layers: Mapping[str, Layer], config: Config, mesh: AnyMesh, targets: Iterable[str]
) -> None:
    """Checks of `block` that need no devices: each op has a form on one of `targets`, and its heads
    and tokens divide over `mesh`.

    Raises:
      UserError: an op has no such form, or does not divide.
    """
    rules = sharding.activations(config.mesh, mesh)
    dtype = Numerics.create(config.model.precision).compute_dtype
    for label, layer in layers.items():
        for call, form in layer.calls.values():
            for letter, size in call.dims.items():
                if size > (most := MOST.get(letter, 1 << 20)):
                    raise UserError(
                        f"model.layers.{label}: {letter}={size} of the op {call.op} must be at "
                        f"most {most}; lower the sizes of the layer"
                    )
            message: list[str] = []
            for target in targets:
                dims = {**call.dims, "T": config.data.context_length}
                problem = {"dims": dims, "dtype": dtype, "options": call.options}
                try:
                    dispatch.resolve(call.op, form, target=target, **problem)
                    break
                except ValueError as error:
                    message.append(str(error))
            else:
                raise UserError(f"model.layers.{label}: {message[0]}")
            _check_split(label, call, mesh, rules)
    rows = Rows(
        config.data.context_length, dtype, mesh, rules, config.mesh.sequence_layout, LEAST_BYTES
    )
    _check_rows(layers, config.mesh, rows)


def _check_rows(layers: Mapping[str, Layer], config: MeshConfig, rows: Rows) -> None:
    """Checks that every layer can split its rows over the mesh. If not, the UserError names
    settings with which every layer can.
    """
    ops = {x: y.calls["main"][0].op for x, y in layers.items() if "main" in y.calls}
    check_known(config, layers, ops.values())
    for label, layer in layers.items():
        try:
            ways(label, layer, config, rows)
        except UserError as error:
            groups = alternatives(config, label, ops)
            found = [first for group in groups for first in _fitting(layers, group, rows)[:1]]
            remedies = [changed(config, fitting) for fitting in found] or ["mesh.sequence=1"]
            raise UserError(f"{error}; set {', or '.join(remedies)}") from None


def _fitting(
    layers: Mapping[str, Layer], configs: Iterable[MeshConfig], rows: Rows
) -> list[MeshConfig]:
    """Those of `configs` with which every layer can split its rows."""
    fitting = []
    for config in configs:
        with contextlib.suppress(UserError):
            for label, layer in layers.items():
                ways(label, layer, config, rows._replace(layout=config.sequence_layout))
            fitting.append(config)
    return fitting


def _check_split(
    label: str, call: Call, mesh: AnyMesh, rules: Mapping[str, tuple[str, ...]]
) -> None:
    split = {letter: size for letter, size in call.dims.items() if letter not in call.whole}
    sharding.check_heads(split, mesh, rules, f"model.layers.{label}")


def ways(label: str, layer: Layer, config: MeshConfig, rows: Rows) -> dict[str, Way]:
    """How each op of a layer splits rows over the mesh; {} if they are not split. A strategy named
    in the configuration applies to the main op only.

    Raises:
      UserError: an op has no strategy for this mesh, or not the one that is named.
    """
    common, own = strategies(config)
    found: dict[str, Way] = {}
    for key, (call, _) in layer.calls.items():
        asked = own.get(label, common) if key == "main" else AUTO
        try:
            way = rows.way(call.op, asked, call.dims, call.options, call.whole)
        except ValueError as error:
            sizes = rows.mesh.shape
            shared = f" (its share of mesh.tensor={sizes['tensor']})" if sizes["tensor"] > 1 else ""
            raise UserError(
                f"model.layers.{label}{shared}, mesh.sequence={sizes['sequence']}, "
                f"mesh.sequence_strategy={asked!r}: {error}"
            ) from None
        found |= {key: way} if way else {}
    return found


def block(
    label: str, config: ModelConfig, context: Context, mesh: MeshConfig
) -> tuple[Block, list[LayerRecord]]:
    """The module of a label, with the forms of its ops and their split of the time axis resolved
    for the devices of `context`, and their records for run.json.

    Raises:
      UserError: as `check`; a form cannot run there; the mesh does not divide the heads.
    """
    layer = _layer(label, config)
    for call, _ in layer.calls.values():
        _check_split(label, call, context.mesh, context.rules)
    device = context.mesh.devices.flat[0]
    target, kind = mesh_lib.target(context.mesh), device.device_kind
    dtype = context.numerics.compute_dtype
    where = context.mesh, context.rules, context.layout, chips.link(kind, target)
    split = ways(label, layer, mesh, Rows(context.context_length, dtype, *where))
    named = {key: way.strategy for key, way in split.items()}
    context = dataclasses.replace(context, matrix=layer.matrix, strategies=named)
    mixer = layer.mixer.kind(context, config.width, **layer.mixer.options)
    forms, records = {}, []
    for key, (call, form) in layer.calls.items():
        try:
            resolved = dispatch.resolve(
                call.op,
                form,
                target=target,
                dims={**call.dims, "T": context.context_length},
                dtype=dtype,
                options=call.options,
                device_kind=kind,
            )
        except ValueError as error:
            raise UserError(f"model.layers.{label}: {error}") from None
        forms[form_field(key)] = resolved.form
        message = f"{split[key].strategy}: {split[key].reason}" if key in split else ""
        sent = split[key].sent if key in split else None
        records.append(LayerRecord(0, label, layer.mixer.name, call.op, *resolved, message, sent))
    mlp = layer.mlp and layer.mlp.kind(context, config.width, **layer.mlp.options)
    return layer.block.kind(context, mixer.clone(**forms), mlp, **layer.block.options), records
