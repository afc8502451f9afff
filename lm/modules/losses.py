"""Losses that a layer adds to the objective, by name.

A loss is float32 [B, T], one number per token, or [], the same number for every token (such as a
penalty on weights). It counts like that token's own loss: multiplied by `loss_weights`, summed over
layers, microbatches and devices, then divided once by the sum of all weights. So it is a sum over
layers and a mean over tokens. Its coefficient is an option of the layer. Metrics log it as
aux/NAME.

An example: the load-balancing loss of a router over N experts (Fedus et al. 2021, arXiv 2101.03961,
eq. 4), alpha N sum_i f_i P_i, contains P_i, the mean over tokens of the probability p_i. A token's
share is

    {"balance": alpha * N * jnp.sum(f * p, axis=-1)}    f [N], p [B, T, N] -> [B, T]

where f, the fraction of tokens that goes to each expert, is that of this microbatch on this device
of the data axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

type Losses = Mapping[str, jax.Array]


def together(several: Iterable[Losses]) -> dict[str, jax.Array]:
    """The losses summed by name."""
    found: dict[str, jax.Array] = {}
    for losses in several:
        found |= {k: found[k] + loss if k in found else loss for k, loss in losses.items()}
    return found


def weighted(losses: Losses, weights: jax.Array) -> dict[str, jax.Array]:
    """Each loss summed over the tokens, float32 []; `weights` is float32 [B, T]."""
    return {name: jnp.sum(weights * loss) for name, loss in losses.items()}
