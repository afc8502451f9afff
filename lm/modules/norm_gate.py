"""The end of a recurrent layer: a norm of the op's output, and a gate from the layer's input.

    after (GLA, RetNet, Gated DeltaNet)    RMSNorm(o) * act(g)
    before (Mamba-2)                       RMSNorm(o * act(g))

The norm is over each head, with one scale for all heads; or over all heads of a token, cut into
`num_groups` groups of neighboring heads, each with a norm of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.modules.context import Context
from lm.modules.norm import by_rms
from lm.modules.remat import recomputed
from lm.params import declare

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swish": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
}


class NormGate(nn.Module):
    """o [..., H, V], gate [..., H, V] or None -> [..., H, V] in the activations' dtype."""

    context: Context
    over: Literal["head", "heads"] = "head"
    gate_is: Literal["after", "before"] = "after"
    activation: Literal["swish", "sigmoid"] = "swish"
    num_groups: int = 1  # groups of heads; used where the norm is over heads

    @nn.compact
    def __call__(self, o: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        letters, axes = ("V", (-1,)) if self.over == "head" else ("H V", (-2, -1))
        init = declare(nn.initializers.ones, letters, "vector", decay=False)
        scale = self.param("scale", init, o.shape[-len(axes) :])

        @recomputed
        def gated(o: jax.Array, gate: jax.Array | None, scale: jax.Array) -> jax.Array:
            wide, opened = o.astype(jnp.float32), 1.0
            if gate is not None:
                opened = ACTIVATIONS[self.activation](gate.astype(jnp.float32))
            if self.gate_is == "before":
                wide = wide * opened
            if self.over == "heads":
                wide = wide.reshape(*o.shape[:-2], self.num_groups, -1, o.shape[-1])
            out = by_rms(wide, axes, self.context.norm_eps).reshape(o.shape) * scale
            if self.gate_is == "after":
                out = out * opened
            return out.astype(self.context.numerics.compute_dtype)

        return gated(o, gate, scale)
