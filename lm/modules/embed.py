"""Token embedding and output head. The vocabulary is padded (config.padded_vocab_size); padded ids
never occur.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.modules.context import Context
from lm.params import declare


class Embed(nn.Module):
    """tokens [...] -> multiplier * table[tokens] [..., D]. `table` doubles as the head when
    embeddings are tied.
    """

    context: Context
    padded_vocab_size: int
    width: int

    def setup(self) -> None:
        std = self.context.multipliers.init_std("input")
        init = declare(nn.initializers.normal(std), "vocab D", "input", decay=True)
        self.table = self.param("table", init, (self.padded_vocab_size, self.width))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jnp.take(self.table, tokens, axis=0) * self.context.multipliers.embedding
        return x.astype(self.context.numerics.compute_dtype)


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
