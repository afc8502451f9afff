"""Diagonal linear recurrences, one token at a time."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.contract import Options
from kernels.letters import Inputs
from kernels.linear_scan.tile import Modes
from kernels.primitives.running_lse import EMPTY


def step(state: Modes, inputs: Inputs, *, options: Options) -> tuple[Modes, Float[Array, "B H K"]]:
    """Decays or rotates h, adds the token, and reads the output."""
    floats = {name: array.astype(jnp.float32) for name, array in inputs.items()}
    x, segment = floats["x"][..., None], jnp.maximum(state.segment, 1)
    if options["transition"] == "log_sum":
        before = jnp.where(state.segment[:, None, None] == 0, EMPTY, state.re[..., 0])
        h = jnp.logaddexp(before, floats["x"])
        return Modes(h[..., None], state.im, segment), h.astype(inputs["x"].dtype)
    if options["transition"] == "gate":
        h = jnp.exp(floats["log_decay"])[..., None] * state.re + x
        return Modes(h, state.im, segment), h[..., 0].astype(inputs["x"].dtype)
    magnitude = jnp.exp(floats["log_magnitude"])
    re, im = magnitude * jnp.cos(floats["angle"]), magnitude * jnp.sin(floats["angle"])
    h_re = re * state.re - im * state.im + x
    h_im = re * state.im + im * state.re
    out = jnp.sum(floats["c_re"] * h_re - floats["c_im"] * h_im, axis=-1)
    return Modes(h_re, h_im, segment), out.astype(inputs["x"].dtype)
