"""What attention mixers share: projections to heads and back, query-key norm, the call of their op,
its state.

A mixer derives from `HeadMixer`, names its op, and gives `op_options` (static) and, where they
differ, `op_inputs`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import linen as nn

from kernels import dispatch
from lm.modules.context import Context
from lm.modules.linear import Linear
from lm.modules.norm import RMSNorm


class HeadMixer(nn.Module):
    """x [B, T, D] -> q [B, T, H, K], k, v [B, T, G, K] -> op -> [B, T, D]. `form` is resolved
    before init.
    """

    context: Context
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    form: str = "auto"
    qk_norm: bool = False

    op: ClassVar[str]

    def op_options(self) -> dict[str, Any]:
        """Static options of the op."""
        raise NotImplementedError

    def op_inputs(self, x: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
        """x [..., D], positions [...] -> the op's inputs."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        return {"q": q, "k": k, "v": v}

    def dims(self) -> dict[str, int]:
        """Letters the op knows at build time."""
        return {"H": self.num_heads, "G": self.num_kv_heads, "K": self.head_dim, "V": self.head_dim}

    def setup(self) -> None:
        d, h, g, k = self.width, self.num_heads, self.num_kv_heads, self.head_dim
        self.query = Linear(self.context, "D H K", (d, h, k), 1)
        self.key = Linear(self.context, "D G K", (d, g, k), 1)
        self.value = Linear(self.context, "D G V", (d, g, k), 1)
        self.out = Linear(self.context, "H V D", (h, k, d), 2)
        if self.qk_norm:
            self.query_norm = RMSNorm(self.context, "K")
            self.key_norm = RMSNorm(self.context, "K")

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, state: Any
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D]; segment_ids, positions int32 [B, T]; `state` None in training."""
        out, state = dispatch.apply(
            self.op,
            self.op_inputs(x, positions),
            segment_ids=segment_ids,
            state=state,
            form=self.form,
            options=self.op_options(),
            mesh=self.context.mesh,
            rules=self.context.rules,
        )
        return self.out(out), state

    def step(self, x: jax.Array, positions: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """x [B, D], positions int32 [B]: one token a row, in the row's current document."""
        inputs = self.op_inputs(x, positions)
        state, out = dispatch.step(self.op, inputs, state, options=self.op_options())
        return self.out(out), state

    def init_state(self, batch: int, max_len: int) -> Any:
        """The op's empty state for `max_len` tokens a row."""
        dtype = self.context.numerics.compute_dtype
        return dispatch.init_state(
            self.op, dims=self.dims(), dtype=dtype, batch=batch, max_len=max_len
        )
