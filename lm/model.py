"""The language model: embedding, groups of scanned layers, final norm; and how a pattern becomes
groups.

    x = multiplier * table[tokens]
    for group in groups: scan over its repeats: for label in labels: x = block_label(x)
    hidden = RMSNorm(x) * logits multiplier
    logits = hidden head^T    (formed in lm/loss.py and lm/evaluation/generate.py only)

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

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from kernels import dispatch
from lm import mixers as mixer_folder
from lm.config import ModelConfig, UserError, convert, nearest
from lm.modules.block import Block
from lm.modules.context import Context
from lm.modules.embed import Embed, Head
from lm.modules.mixer import form_field
from lm.modules.mlp import SwiGLU
from lm.modules.norm import RMSNorm
from lm.modules.remat import NAMES, remat_policy
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


class ModelState(NamedTuple):
    """Decode state: per group a tuple over labels of mixer states with leading L; `positions` int32
    [B], the next.
    """

    groups: tuple[Any, ...]
    positions: jax.Array


class Period(nn.Module):
    """The layers of one repeat of a group."""

    blocks: tuple[Block, ...]
    config: ModelConfig

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, states: Any
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D]; `states` a tuple over blocks, or None in training."""
        out, through = [], self._rematted()
        for i, block in enumerate(self.blocks):
            given = None if states is None else states[i]
            x, state = through(block, x, segment_ids, positions, given)
            out.append(state)
        return x, None if states is None else tuple(out)

    def step(self, x: jax.Array, positions: jax.Array, states: Any) -> tuple[jax.Array, Any]:
        out = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block.step(x, positions, state)
            out.append(state)
        return x, tuple(out)

    def _rematted(self) -> Any:
        """A block's forward pass under the policy of the configuration: one block at a time is run
        again, whatever the length of the period.
        """
        if self.config.remat == "none":
            return Block.__call__
        # A scan alone keeps the two passes apart; several blocks in its body need the barrier, or
        # a compiler may run all of them again before the backward pass of the last.
        prevent_cse = self.config.unroll or len(self.blocks) > 1
        policy = remat_policy(self.config)
        return nn.remat(Block.__call__, policy=policy, prevent_cse=prevent_cse)


class Model(nn.Module):
    """Group i is `repeats[i]` times the layers of `groups[i]`. Build one with `create`."""

    context: Context
    config: ModelConfig
    padded_vocab_size: int
    repeats: tuple[int, ...]
    groups: tuple[Period, ...]

    def setup(self) -> None:
        self.embed = Embed(self.context, self.padded_vocab_size, self.config.width)
        self.final_norm = RMSNorm(self.context)
        if not self.config.tied_embeddings:
            self.output = Head(self.context, self.padded_vocab_size, self.config.width)

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        state: ModelState | None = None,
    ) -> tuple[jax.Array, ModelState | None]:
        """tokens, segment_ids, positions int32 [B, T] -> hidden [B, T, D], ready for the head; and
        the state if given.

        With a state this is a prefill that continues it: rows are left-aligned, padding (segment 0)
        at the right.
        """
        x = self.embed(tokens)
        states = [None] * len(self.groups) if state is None else state.groups

        def layer(period: Period, x: jax.Array, group_state: Any) -> tuple[jax.Array, Any]:
            return period(x, segment_ids, positions, group_state)

        x, states = self._through(layer, x, states)
        hidden = self.final_norm(x) * self.context.multipliers.logits
        if state is None:
            return hidden, None
        return hidden, ModelState(states, _next_positions(state.positions, segment_ids, positions))

    def step(self, tokens: jax.Array, state: ModelState) -> tuple[jax.Array, ModelState]:
        """tokens int32 [B], the next of each row -> hidden [B, D] and the state after them."""
        x = self.embed(tokens)

        def layer(period: Period, x: jax.Array, group_state: Any) -> tuple[jax.Array, Any]:
            return period.step(x, state.positions, group_state)

        x, states = self._through(layer, x, state.groups)
        return self.final_norm(x) * self.context.multipliers.logits, ModelState(
            states, state.positions + 1
        )

    def head(self) -> jax.Array:
        """The output matrix [vocab, D]."""
        return self.embed.table if self.config.tied_embeddings else self.output()

    def init_all(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> None:
        """Touches every parameter; what `init` traces."""
        self(tokens, segment_ids, positions)
        self.head()

    def init_state(self, batch: int, max_len: int) -> ModelState:
        """Empty decode state for `batch` rows of at most `max_len` tokens; needs no parameters."""
        groups = []
        for repeat, period in zip(self.repeats, self.groups, strict=True):
            states = tuple(block.mixer.init_state(batch, max_len) for block in period.blocks)
            stack = lambda leaf, n=repeat: jnp.broadcast_to(leaf, (n, *leaf.shape))
            groups.append(jax.tree.map(stack, states))
        return ModelState(tuple(groups), jnp.zeros((batch,), jnp.int32))

    def _through(self, layer: Any, x: jax.Array, states: Any) -> tuple[jax.Array, tuple[Any, ...]]:
        out = []
        for repeat, group, state in zip(self.repeats, self.groups, states, strict=True):
            scan = nn.scan(
                layer,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                length=repeat,
                unroll=repeat if self.config.unroll else 1,
                metadata_params={meta.PARTITION_NAME: "L"},
            )
            x, state = scan(group, x, state)
            out.append(state)
        return x, tuple(out)


def create(
    config: ModelConfig, vocab_size: int, context: Context
) -> tuple[Model, list[LayerRecord]]:
    """The model for the devices of a mesh, its ops' forms resolved once; and the record of every
    layer.

    Raises:
      UserError: an unknown label, mixer or option, a pattern that does not fit the depth, a form
      that cannot run.
    """
    groups = parse_pattern(config.pattern, config.num_layers)
    periods, layers = [], []
    for group in groups:
        # A block per place, not per label: Flax shares the parameters of one module used twice.
        made = [_block(label, config, context) for label in group.labels]
        periods.append(Period(tuple(block for block, _ in made), config))
        layers += [found for _, found in made] * group.repeat
    records = [record._replace(layer=i) for i, found in enumerate(layers) for record in found]
    repeats = tuple(group.repeat for group in groups)
    size = padded_vocab_size(vocab_size)
    return Model(context, config, size, repeats, tuple(periods)), records


def padded_vocab_size(vocab_size: int) -> int:
    """The next multiple of 128 (a TPU lane), so that matmuls and vocabulary shards stay aligned."""
    return -(-vocab_size // 128) * 128


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


def _block(label: str, config: ModelConfig, context: Context) -> tuple[Block, list[LayerRecord]]:
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


def _next_positions(before: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    length = jnp.sum(segment_ids != 0, axis=1)
    last = jnp.take_along_axis(positions, jnp.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
    return jnp.where(length > 0, last + 1, before)


def dummy_inputs(rows: int, time: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, segment ids and positions [rows, time], for tracing `init`."""
    zeros = jnp.zeros((rows, time), jnp.int32)
    return zeros, zeros + 1, zeros
