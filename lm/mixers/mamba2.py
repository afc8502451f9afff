"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, sections 6 and 7): a state-space dual.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T,  y_t = h_t^T C_t + D x_t
    dt = softplus(W_dt x + dt_bias),  A = -exp(A_log)
    x, B, C: projection, causal convolution over 4 tokens with bias, SiLU
    out = W_o RMSNorm(y * silu(z)), with the norm over the heads of a group

This is linear attention with q = C, k = B, v = dt x and a per-head decay. Let E = expand D. There
are H = E / P heads of width P = head_dim, and G groups that share B and C: head h reads group
h // (H / G). Parameters: D (2 E + 2 G N + H) + 5 (E + 2 G N) + 3 H + E + E D. State: E N, and
4 (E + 2 G N) of the convolutions, float32. It is published without a feed-forward; set mlp to none
for that.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.modules.linear import linear, project
from lm.modules.mixer import Along, Call, Mixer
from lm.modules.norm_gate import NormGate
from lm.modules.short_conv import ShortConv
from lm.modules.step_size import dt_bias, log_uniform
from lm.params import declare


class Mamba2(Mixer):
    """Options of a layer label are these fields.

    Attributes:
      head_dim: width P of a head; unset: the model's
      expand: inner width over the model's
      state_dim: state N of each channel
      num_groups: groups G of heads that share B and C
      conv_size: taps of the causal convolution of x, B and C
      form: form of the op, or auto, which takes what was measured to be best on the device
      conv_form: form of the convolution of x, or auto
      group_conv_form: form of the convolution of B and C, or auto
    """

    head_dim: int
    expand: int = 2
    state_dim: int = 128
    num_groups: int = 1
    conv_size: int = 4
    form: str = "auto"
    conv_form: str = "auto"
    group_conv_form: str = "auto"

    op: ClassVar[str] = "gated_linear"

    def problem(self) -> str | None:
        inner = self.expand * self.width
        if min(self.expand, self.state_dim, self.num_groups, self.conv_size) < 1:
            return (
                f"expand={self.expand}, state_dim={self.state_dim}, num_groups={self.num_groups}, "
                f"conv_size={self.conv_size} must be at least 1"
            )
        if inner % self.head_dim or self.num_heads % self.num_groups:
            return (
                f"expand * width = {inner} must be whole heads of head_dim={self.head_dim}, and "
                f"their number a multiple of num_groups={self.num_groups}"
            )
        return None

    @property
    def num_heads(self) -> int:
        return self.expand * self.width // self.head_dim

    def calls(self) -> dict[str, Call]:
        h, n = self.num_heads, self.state_dim
        dims = {"H": h, "K": n, "V": self.head_dim}
        shared = ShortConv.call(2 * self.num_groups, n, self.conv_size, use_bias=True)
        return {
            "main": Call(self.op, dims, {"scale": 1.0, "decay": "scalar"}),
            "conv": ShortConv.call(h, self.head_dim, self.conv_size, use_bias=True),
            "group_conv": shared._replace(whole=("H", "G")),
        }

    def setup(self) -> None:
        d, h, p, n = self.width, self.num_heads, self.head_dim, self.state_dim
        groups, taps = 2 * self.num_groups, self.conv_size
        self.gate = linear(self.context, "D H V", (d, h, p), 1)
        self.value = linear(self.context, "D H V", (d, h, p), 1)
        self.shared = linear(self.context, "D groups N", (d, groups, n), 1)  # B, then C
        self.dt = linear(self.context, "D H", (d, h), 1)
        self.conv = ShortConv(self.context, h, p, taps, use_bias=True)
        self.group_conv = ShortConv(self.context, groups, n, taps, use_bias=True, letter="groups")
        init = declare(log_uniform(1.0, 16.0), "H", "vector", decay=False)
        self.A_log = self.param("A_log", init, (h,))
        self.dt_bias = self.param("dt_bias", declare(dt_bias, "H", "vector", decay=False), (h,))
        self.D = self.param("D", declare(nn.initializers.ones, "H", "vector", decay=False), (h,))
        self.norm = NormGate(
            self.context, over="heads", gate_is="before", num_groups=self.num_groups
        )
        self.out = linear(self.context, "H V D", (h, p, d), 2)

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        del positions
        value, shared, dt, gate = project(x, self.value, self.shared, self.dt, self.gate)
        values = jax.nn.silu(self.conv(value, run, "conv"))
        shared = jax.nn.silu(self.group_conv(shared, run, "group_conv"))
        keys, queries = jnp.split(shared, 2, axis=-2)
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias)
        repeat = self.num_heads // self.num_groups
        inputs = {
            "q": jnp.repeat(queries, repeat, axis=-2),
            "k": jnp.repeat(keys, repeat, axis=-2),
            "v": (values * dt[..., None]).astype(values.dtype),
            "log_decay": -jnp.exp(self.A_log) * dt,
        }
        out = run("main", inputs) + (self.D[:, None] * values).astype(values.dtype)
        return self.out(self.norm(out, gate))
