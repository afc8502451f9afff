"""Where each tensor of a Hugging Face folder lives in our tree of parameters, and back.

    theirs                                        ours                              shapes
    model.embed_tokens.weight                     embed/table                       [V, D]
    lm_head.weight (untied)                       output/table                      [V, D]
    model.norm.weight                             final_norm/scale                  [D]
    model.layers.N.input_layernorm.weight         GROUP/BLOCK/mixer_norm/scale [L]  [D]
    model.layers.N.self_attn.q_proj.weight        .../mixer/query/kernel [L]   [H K, D]: [D, H, K]
    model.layers.N.self_attn.o_proj.weight        .../mixer/out/kernel [L]     [D, H K]: [H, K, D]
    model.layers.N.mlp.gate_proj.weight           .../mlp/gate/kernel [L]      [F, D]: [D, F]

Their matrices are [out, in]. Ours are [in, out] with the heads as separate dimensions, and the
matrices of all layers of a group are stacked, L first. Both sides pair the halves of a head in
RoPE, so nothing is permuted. Rows of our tables beyond the vocabulary are padding.

Folders of our own (README.md) hold our leaves unchanged, with "." for "/" in their names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import params as params_lib
from lm.build import Build

TABLES = {"embed/table": "model.embed_tokens.weight", "output/table": "lm_head.weight"}
FINAL_NORM = {"final_norm/scale": "model.norm.weight"}
LAYER = {
    "mixer_norm/scale": "input_layernorm.weight",
    "mixer/query/kernel": "self_attn.q_proj.weight",
    "mixer/key/kernel": "self_attn.k_proj.weight",
    "mixer/value/kernel": "self_attn.v_proj.weight",
    "mixer/out/kernel": "self_attn.o_proj.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
}


class Entry(NamedTuple):
    """One tensor of theirs: its name and shape, and the row of our `leaf` where it lies (None: the
    whole leaf). `is_matrix`: it is transposed, and cut into heads.
    """

    name: str
    shape: tuple[int, ...]
    leaf: str
    row: int | None
    is_matrix: bool

    def put(self, value: np.ndarray, leaf: np.ndarray) -> None:
        """Puts their tensor into our leaf, converting it to the leaf's dtype."""
        if self.row is not None:
            leaf[self.row] = (value.T if self.is_matrix else value).reshape(leaf.shape[1:])
        elif self.leaf in TABLES:
            leaf[: len(value)] = value
        else:
            leaf[...] = value

    def take(self, leaf: np.ndarray) -> np.ndarray:
        """Takes their tensor out of our leaf."""
        if self.row is None:
            return leaf[: self.shape[0]] if self.leaf in TABLES else leaf
        return leaf[self.row].reshape(self.shape[::-1]).T if self.is_matrix else leaf[self.row]


def leaves(built: Build) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of our parameters, by name, in the tree's order."""
    infos = jax.tree.leaves(built.infos, is_leaf=params_lib.is_info)
    names = jax.tree.leaves(params_lib.names(built.infos))
    return {name: info.shape for name, info in zip(names, infos, strict=True)}


def places(built: Build) -> list[tuple[str, int]]:
    """For each layer of the model, the prefix of its block's names, and its row in the stack."""
    found = []
    for g, (repeat, period) in enumerate(zip(built.model.repeats, built.model.groups, strict=True)):
        blocks = range(len(period.blocks))
        found += [(f"groups_{g}/blocks_{b}/", row) for row in range(repeat) for b in blocks]
    return found


def transformers(built: Build) -> list[Entry]:
    """The tensors of a transformers folder. Those of one leaf are together, so that a leaf is read
    or written once.
    """
    size = built.config.data.tokenizer.vocab_size
    layer_of = {place: n for n, place in enumerate(places(built))}
    found = []
    for leaf, shape in leaves(built).items():
        if leaf in TABLES:
            found.append(Entry(TABLES[leaf], (size, shape[1]), leaf, None, False))
        elif leaf in FINAL_NORM:
            found.append(Entry(FINAL_NORM[leaf], shape, leaf, None, False))
        else:
            found += _of_layers(leaf, shape, layer_of)
    return found


def _of_layers(
    leaf: str, shape: tuple[int, ...], layer_of: dict[tuple[str, int], int]
) -> Iterator[Entry]:
    group, block, part = leaf.split("/", 2)
    is_matrix = part.endswith("/kernel")
    flat = shape[1:]
    if is_matrix:
        contracted = 2 if part == "mixer/out/kernel" else 1
        flat = (math.prod(flat[contracted:]), math.prod(flat[:contracted]))
    for row in range(shape[0]):
        name = f"model.layers.{layer_of[f'{group}/{block}/', row]}.{LAYER[part]}"
        yield Entry(name, flat, leaf, row, is_matrix)


def own(built: Build) -> list[Entry]:
    """The tensors of a folder of our own, which are our leaves."""
    return [
        Entry(leaf.replace("/", "."), shape, leaf, None, False)
        for leaf, shape in leaves(built).items()
    ]


def subtree(tree: Any, leaf: str) -> Any:
    """The part of a nested dict that leads to one leaf, without anything else."""
    key, _, rest = leaf.partition("/")
    return {key: subtree(tree[key], rest) if rest else tree[key]}
