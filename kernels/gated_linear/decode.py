"""Linear attention with decay, one token at a time: O(K V) per head, however long the past."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.contract import Options
from kernels.gated_linear.tile import GatedState
from kernels.letters import Inputs


def step(
    state: GatedState, inputs: Inputs, *, options: Options
) -> tuple[GatedState, Float[Array, "B H V"]]:
    """Decays the memory, writes the token's value under its key, then reads with its query."""
    q, k, v = (inputs[name].astype(jnp.float32) for name in ("q", "k", "v"))
    s = state.s
    if options["decay"] != "none":
        decay = jnp.exp(inputs["log_decay"].astype(jnp.float32))
        s = decay.reshape(*decay.shape[:2], -1, 1) * s
    s = s + k[..., :, None] * v[..., None, :]
    out = jnp.einsum("bhkv,bhk->bhv", s, options["scale"] * q)
    return GatedState(s, jnp.maximum(state.segment, 1)), out.astype(inputs["q"].dtype)
