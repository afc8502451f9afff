"""Causal convolution, one token at a time: shift the tail, then W multiply-adds per channel."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.contract import Options
from kernels.gated_conv.tile import Tail
from kernels.letters import Inputs


def step(state: Tail, inputs: Inputs, *, options: Options) -> tuple[Tail, Float[Array, "B H K"]]:
    """Appends the token to the tail, then weighs the tail."""
    del options  # the keys of `inputs` say the same
    x = inputs["x"]
    new = x.astype(jnp.float32)[:, :, None]
    tail = jnp.concatenate([state.tail[:, :, 1:], new], axis=2)
    out = jnp.sum(tail * jnp.swapaxes(inputs["weight"].astype(jnp.float32), 1, 2), axis=2)
    if "bias" in inputs:
        out = out + inputs["bias"].astype(jnp.float32)
    if "gate" in inputs:
        out = out * inputs["gate"].astype(jnp.float32)
    return Tail(tail, jnp.maximum(state.segment, 1)), out.astype(x.dtype)
