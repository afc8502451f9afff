"""The language model: embedding, groups of scanned layers, final norm.

    x = multiplier * table[tokens]
    for group in groups: scan over its repeats: for label in labels: x = block_label(x)
    hidden = RMSNorm(x) * logits multiplier
    logits = hidden head^T    (formed in lm/loss.py and lm/evaluation/generate.py only)

A group is one scan over its repeats, with stacked parameters; lm/layers.py makes groups and blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta

from lm import layers as layer_lib
from lm import pattern as pattern_lib
from lm.config import MeshConfig, ModelConfig
from lm.layers import LayerRecord
from lm.modules.block import Block
from lm.modules.context import Context
from lm.modules.embed import Embed, Head
from lm.modules.losses import Losses, together
from lm.modules.norm import RMSNorm
from lm.modules.remat import remat_policy
from lm.parallel import mesh as mesh_lib
from lm.parallel import placement
from lm.params import STACKED

FROZEN, DROPOUT = "frozen", "dropout"  # a collection of arrays, and a stream of random keys


class ModelState(NamedTuple):
    """Decode state. `groups`: for each group a tuple over labels of mixer states, stacked along a
    leading L. `positions` int32 [B]: the next position of each row.
    """

    groups: tuple[Any, ...]
    positions: jax.Array


class Apart(NamedTuple):
    """The same for a loop of steps, not stacked: for each group a tuple over its repeats, each a
    tuple over labels of mixer states as `Mixer.for_steps` gives them.
    """

    groups: tuple[tuple[Any, ...], ...]
    positions: jax.Array


class Period(nn.Module):
    """The layers of one repeat of a group."""

    blocks: tuple[Block, ...]
    config: ModelConfig

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, states: Any
    ) -> tuple[jax.Array, Any, Losses]:
        """x [B, T, D]; `states` is a tuple over blocks, or None in training."""
        out, found = [], []
        for i, block in enumerate(self.blocks):
            given = None if states is None else states[i]
            through = self._rematted(type(block))
            x, state, losses = through(block, x, segment_ids, positions, given)
            out.append(state)
            found.append(losses)
        return x, None if states is None else tuple(out), together(found)

    def step(self, x: jax.Array, positions: jax.Array, states: Any) -> tuple[jax.Array, Any]:
        out = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block.step(x, positions, state)
            out.append(state)
        return x, tuple(out)

    def for_steps(self, states: Any) -> Any:
        """The states of the blocks as a loop of `step` reads them fastest."""
        pairs = zip(self.blocks, states, strict=True)
        return tuple(block.mixer.for_steps(state) for block, state in pairs)

    def _rematted(self, kind: type[Block]) -> Any:
        """A block's forward pass under the configured remat policy. Each block is recomputed on its
        own, whatever the length of the period.
        """
        if self.config.remat == "none":
            return kind.__call__
        # For one block, scan itself keeps forward and backward apart. Several blocks in its body
        # need the barrier, or a compiler may recompute all of them before the last one's backward.
        prevent_cse = self.config.unroll or len(self.blocks) > 1
        policy = remat_policy(self.config)
        return nn.remat(kind.__call__, policy=policy, prevent_cse=prevent_cse)


class Model(nn.Module):
    """Group i repeats the layers of `groups[i]` `repeats[i]` times. Use `create` to build one."""

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
        the new state if one is given.

        With a state this is a prefill that continues it. Rows must be left-aligned, with padding
        (segment 0) on the right.
        """
        hidden, states, _ = self._span(tokens, segment_ids, positions, state)
        if state is None:
            return hidden, None
        places = placement.columns(tokens.shape[1], self.context.mesh, self.context.layout)
        after = _next_positions(state.positions, segment_ids, positions, places)
        return hidden, ModelState(states, after)

    def train(
        self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Losses]:
        """hidden [B, T, D] as from a call, and the losses of all layers (lm/modules/losses.py).
        Modules draw random numbers if `apply` is given rngs={"dropout": key}.
        """
        hidden, _, losses = self._span(tokens, segment_ids, positions, None)
        return hidden, losses

    def _span(
        self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, Losses]:
        def layer(period: Period, x: jax.Array, group_state: Any) -> tuple[jax.Array, Any]:
            x, after, losses = period(x, segment_ids, positions, group_state)
            return x, (after, losses)

        states = [None] * len(self.groups) if state is None else state.groups
        x, found = self._through(layer, self.embed(tokens), states)
        hidden = self.final_norm(x) * self.context.multipliers.logits
        # Each group's losses are stacked over its repeats.
        over_layers = lambda losses: {k: jnp.sum(loss, axis=0) for k, loss in losses.items()}
        losses = together(over_layers(losses) for _, losses in found)
        return hidden, tuple(after for after, _ in found), losses

    def step[S: (ModelState, Apart)](self, tokens: jax.Array, state: S) -> tuple[jax.Array, S]:
        """tokens int32 [B], one per row -> hidden [B, D] and the new state. If the state is apart,
        the parameters are too.
        """
        x, groups = self.embed(tokens), []

        def layer(period: Period, x: jax.Array, group_state: Any) -> tuple[jax.Array, Any]:
            return period.step(x, state.positions, group_state)

        if isinstance(state, ModelState):
            x, groups = self._through(layer, x, state.groups)
        else:
            for group, before in zip(self.groups, state.groups, strict=True):
                after = []
                for i, own in enumerate(before):
                    x, now = _own_parameters(layer, i)(group, x, own)
                    after.append(now)
                groups.append(tuple(after))
        hidden = self.final_norm(x) * self.context.multipliers.logits
        return hidden, state._replace(groups=tuple(groups), positions=state.positions + 1)

    def apart(self, params: Any, state: ModelState) -> tuple[Any, ModelState | Apart]:
        """Parameters and state as a loop of steps takes them on this mesh. On a CPU the layers are
        apart: a step then updates the state of each where it is, and reads its parameters where
        they are. A scan over stacks would copy both in every step. On other devices nothing
        changes: there a scan gathers the split weights of one layer at a time.
        """
        if mesh_lib.target(self.context.mesh) != "cpu":
            return params, state
        found, groups = dict(params), []
        for i, (repeat, period) in enumerate(zip(self.repeats, self.groups, strict=True)):
            name = f"groups_{i}"
            found[name] = {_layer_name(n): _at(params[name], n) for n in range(repeat)}
            layers = [_at(state.groups[i], n) for n in range(repeat)]
            groups.append(tuple(period.for_steps(states) for states in layers))
        return found, Apart(tuple(groups), state.positions)

    @property
    def is_causal(self) -> bool:
        """Whether no token sees a later one. Only such a model can decode."""
        return all(block.mixer.is_causal() for period in self.groups for block in period.blocks)

    def head(self) -> jax.Array:
        """The output matrix [vocab, D]."""
        return self.embed.table if self.config.tied_embeddings else self.output()

    def init_all(self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> None:
        """Touches every parameter; `init` traces this."""
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
                variable_axes={"params": 0, "intermediates": 0, FROZEN: 0},
                split_rngs={"params": True, DROPOUT: True},
                length=repeat,
                unroll=repeat if self.config.unroll else 1,
                metadata_params={meta.PARTITION_NAME: STACKED},
            )
            x, state = scan(group, x, state)
            out.append(state)
        return x, tuple(out)


def create(
    config: ModelConfig, vocab_size: int, context: Context, mesh: MeshConfig
) -> tuple[Model, list[LayerRecord]]:
    """The model for the devices of a mesh, with its ops' forms resolved, and a record per layer.

    Raises:
      UserError: a label, mixer or option is unknown, the pattern does not fit the depth, or a form
      cannot run.
    """
    # On a CPU a scan copies parameters, and what the backward pass keeps, into stacks and out of
    # them: 6 % of a step of 6 layers. Without it the compiler works longer: 1.14 times as long for
    # 6 layers, 1.4 for 12.
    is_shallow = config.num_layers <= config.cpu_unroll
    is_unrolled = config.unroll or (is_shallow and mesh_lib.target(context.mesh) == "cpu")
    config = dataclasses.replace(config, unroll=is_unrolled)
    groups = pattern_lib.parse(config.pattern, config.num_layers)
    periods, layers = [], []
    for group in groups:
        # One block per place, not per label: if a module is used twice, Flax shares its parameters.
        made = [layer_lib.block(label, config, context, mesh) for label in group.labels]
        periods.append(Period(tuple(block for block, _ in made), config))
        layers += [found for _, found in made] * group.repeat
    records = [record._replace(layer=i) for i, found in enumerate(layers) for record in found]
    repeats = tuple(group.repeat for group in groups)
    size = padded_vocab_size(vocab_size)
    return Model(context, config, size, repeats, tuple(periods)), records


def _own_parameters(layer: Any, index: int) -> Any:
    """`layer` for one repeat of a group whose parameters are apart."""
    own = lambda variables: {kind: tree[_layer_name(index)] for kind, tree in variables.items()}
    return nn.map_variables(layer, ["params"], trans_in_fn=own)


def _layer_name(index: int) -> str:
    return f"layer_{index}"


def _at(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def padded_vocab_size(vocab_size: int) -> int:
    """The next multiple of 128 (a TPU lane), which keeps matmuls and vocabulary shards aligned."""
    return -(-vocab_size // 128) * 128


def _next_positions(
    before: jax.Array, segment_ids: jax.Array, positions: jax.Array, places: np.ndarray
) -> jax.Array:
    """The position after the last token of each row. `places`: the place in the row of every
    column.
    """
    length = jnp.sum(segment_ids != 0, axis=1)
    is_last = places == (length - 1)[:, None]
    last = jnp.sum(jnp.where(is_last, positions, 0), axis=1)
    return jnp.where(length > 0, last + 1, before)


def dummy_inputs(rows: int, time: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, segment ids and positions [rows, time], for tracing `init`."""
    zeros = jnp.zeros((rows, time), jnp.int32)
    return zeros, zeros + 1, zeros
