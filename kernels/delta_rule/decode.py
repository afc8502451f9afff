"""The delta rule, one token at a time: three products of the state with a vector."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.contract import Options
from kernels.delta_rule.tile import Memory
from kernels.letters import Inputs


def step(
    state: Memory, inputs: Inputs, *, options: Options
) -> tuple[Memory, Float[Array, "B H V"]]:
    """Decays the memory, corrects it at the token's key, then reads it with the query."""
    q, k, v, beta = (inputs[name].astype(jnp.float32) for name in ("q", "k", "v", "beta"))
    s = state.s
    if "log_decay" in inputs:
        s = jnp.exp(inputs["log_decay"].astype(jnp.float32))[..., None, None] * s
    wrote = beta[..., None] * (v - jnp.einsum("bhkv,bhk->bhv", s, k))
    s = s + k[..., None] * wrote[..., None, :]
    out = options["scale"] * jnp.einsum("bhkv,bhk->bhv", s, q)
    return Memory(s, jnp.maximum(state.segment, 1)), out.astype(inputs["q"].dtype)
