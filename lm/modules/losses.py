"""Losses that a layer adds to the objective, by name.

Each is float32 [B, T], a number of every token, or [], the same number of every token (a penalty on
weights). It counts as that token's own loss does: times `loss_weights`, added up over layers,
microbatches and devices, then divided once by the sum of all weights. So it is a sum over layers
and a mean over tokens; its coefficient is an option of the layer. A step shows it as aux/NAME.

An example: the balance of a router over N experts (Fedus et al. 2021, arXiv 2101.03961, eq. 4),
alpha N sum_i f_i P_i, has P_i, the mean over tokens of the probability p_i. A token's share is

    {"balance": alpha * N * jnp.sum(f * p, axis=-1)}    f [N], p [B, T, N] -> [B, T]

where f, the part of the tokens that each expert takes, is of this microbatch and place of data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

type Losses = Mapping[str, jax.Array]


def together(several: Iterable[Losses]) -> dict[str, jax.Array]:
    """Added up by name."""
    found: dict[str, jax.Array] = {}
    for losses in several:
        found |= {k: found[k] + loss if k in found else loss for k, loss in losses.items()}
    return found


def weighted(losses: Losses, weights: jax.Array) -> dict[str, jax.Array]:
    """The sum of each over the tokens, float32 []; `weights` float32 [B, T]."""
    return {name: jnp.sum(weights * loss) for name, loss in losses.items()}
