"""Token embedding and output head. The vocabulary is padded (config.padded_vocab_size); padded ids
never occur in data.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from kernels import shard
from lm.modules.context import Context
from lm.params import declare


class Embed(nn.Module):
    """tokens [...] -> multiplier * table[tokens] [..., D]. With tied embeddings `table` is the
    head, too.
    """

    context: Context
    padded_vocab_size: int
    width: int

    def setup(self) -> None:
        std = self.context.multipliers.init_std("input")
        init = declare(nn.initializers.normal(std), "vocab D", "input", decay=True)
        self.table = self.param("table", init, (self.padded_vocab_size, self.width))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.context.stream(lookup(self.context, self.table, tokens))


class Head(nn.Module):
    """An untied output matrix [vocab, D]."""

    context: Context
    padded_vocab_size: int
    width: int

    def setup(self) -> None:
        std = self.context.multipliers.init_std("output")
        init = declare(nn.initializers.normal(std), "vocab D", "output", decay=True)
        self.table = self.param("table", init, (self.padded_vocab_size, self.width))

    def __call__(self) -> jax.Array:
        return self.table


def lookup(context: Context, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """multiplier * table [vocab, D] at tokens int32 [B, ...] -> [B, ..., D], activations' dtype.

    Where devices share the vocabulary, each looks up the rows it holds, and the parts are summed
    (Shoeybi et al. 2019, arXiv 1909.08053, sec. 3): no device sees the whole table.
    """
    scale, dtype = context.multipliers.embedding, context.numerics.compute_dtype
    rules = {**context.rules, "D": context.weights.get("D", ())}
    mesh, rules = shard.here(context.mesh, rules)
    vocab, features = (rules.get(letter, ()) for letter in ("vocab", "D"))
    # In a decode step the tokens are [B], without a time axis to split.
    layout = tuple(rules.get(letter, ()) for letter in ("B", "T")[: tokens.ndim])
    if not (any(layout) or vocab or features):
        return (jnp.take(table, tokens, axis=0) * scale).astype(dtype)
    return _lookup(_Placed(mesh, layout, vocab, features, scale, dtype), table, tokens)


class _Placed(NamedTuple):
    """The mesh axes of the dimensions of the tokens (rows and time), of the vocabulary, and of the
    table's features; and the multiplier and dtype of the result.
    """

    mesh: Any
    tokens: tuple[tuple[str, ...], ...]
    vocab: tuple[str, ...]
    features: tuple[str, ...]
    scale: float
    dtype: Any

    def over(self, function: Any, inputs: str, output: str) -> Any:
        """`function` on local parts; "t" stands for a table, "b" for an array with token axes."""
        specs = {
            "t": P(self.vocab or None, self.features or None),
            "b": P(*(axes or None for axes in self.tokens)),
        }
        return shard.wrap(function, self.mesh, tuple(specs[x] for x in inputs), specs[output])

    def local(self, tokens: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
        """The row in the local part of the table, and whether the token is in that part."""
        if not self.vocab:
            return tokens, jnp.ones(tokens.shape, bool)
        return shard.local_index(tokens, self.vocab, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(placed: _Placed, table: jax.Array, tokens: jax.Array) -> jax.Array:
    def part(table: jax.Array, tokens: jax.Array) -> jax.Array:
        table = (table * placed.scale).astype(placed.dtype)
        if placed.features:
            table = jax.lax.all_gather(table, placed.features, axis=1, tiled=True)
        row, inside = placed.local(tokens, table.shape[0])
        x = jnp.where(inside[..., None], jnp.take(table, row, axis=0), 0)
        return shard.total(x, placed.vocab)

    return placed.over(part, "tb", "b")(table, tokens)


def _lookup_fwd(placed: _Placed, table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Any]:
    return _lookup(placed, table, tokens), (tokens, jnp.zeros((table.shape[0], 0), table.dtype))


def _lookup_bwd(placed: _Placed, residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, None]:
    """The table's gradient: scattered on the devices that hold the rows, then summed over the
    batch."""
    tokens, like = residuals
    ways = math.prod(placed.mesh.shape[axis] for axis in placed.vocab)

    def part(tokens: jax.Array, cotangent: jax.Array) -> jax.Array:
        rows = like.shape[0] // ways
        row, inside = placed.local(tokens, rows)
        kept = jnp.where(inside[..., None], cotangent.astype(jnp.float32) * placed.scale, 0.0)
        d_table = jnp.zeros((rows, cotangent.shape[-1]), jnp.float32).at[row].add(kept)
        return shard.total(d_table, sum(placed.tokens, ()), placed.features, 1)

    return placed.over(part, "bb", "t")(tokens, cotangent).astype(like.dtype), None


_lookup.defvjp(_lookup_fwd, _lookup_bwd)
