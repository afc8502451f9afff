"""What every sequence mixer is: projections and gates around calls of ops, written once for a span
of tokens and for a single token.

A mixer derives from `Mixer` and defines

    calls()                 its ops: dims and static options, known when the model is built
    mix(x, positions, run)  x [..., D] -> [..., D], where run(name, inputs) is one op along time

The leading shape is [B, T] in training and prefill, and [B] in a decode step; `run` then applies
the op or steps it. The state of a mixer is a dict of its ops' states, by the names of `calls`. A
call NAME is computed by the form in the field NAME_form (`form` for main), so each call needs one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from kernels import dispatch
from kernels.shard import Placement
from lm.modules.context import Context
from lm.modules.losses import Losses


class Call(NamedTuple):
    """One op of a mixer; the letters in `whole` are not split over devices."""

    op: str
    dims: dict[str, int]
    options: dict[str, Any]
    whole: tuple[str, ...] = ()


def form_field(name: str) -> str:
    """The field of a mixer that names the form of a call: `form` for main, else NAME_form."""
    return "form" if name == "main" else f"{name}_form"


class Along:
    """Runs the ops of one mixer along time: over T tokens if `segment_ids` are given, else for one
    token. What a mixer puts into `losses` is added to the objective (lm/modules/losses.py).
    """

    def __init__(self, mixer: Mixer, segment_ids: jax.Array | None, states: Any) -> None:
        self.mixer, self.calls, self.segment_ids = mixer, mixer.calls(), segment_ids
        self.before, self.after = states, {}
        self.losses: dict[str, jax.Array] = {}

    def __call__(self, name: str, inputs: dict[str, jax.Array]) -> jax.Array:
        """Runs one op; its inputs and output have T or not, as the mixer's."""
        call, context = self.calls[name], self.mixer.context
        state = None if self.before is None else self.before[name]
        if self.segment_ids is None:
            self.after[name], out = dispatch.step(call.op, inputs, state, options=call.options)
            return out
        strategy = context.strategies.get(name, "auto")
        rules = {k: axes for k, axes in context.rules.items() if k not in call.whole}
        out, self.after[name] = dispatch.apply(
            call.op,
            inputs,
            segment_ids=self.segment_ids,
            state=state,
            form=getattr(self.mixer, form_field(name)),
            options=call.options,
            placement=Placement(context.mesh, rules, strategy, context.layout),
        )
        return checkpoint_name(out, "op") if name == "main" else out


class Mixer(nn.Module):
    """`form` and the other form fields are concrete forms when parameters are initialized."""

    context: Context
    width: int

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; asked before any device is touched."""
        return None

    def calls(self) -> dict[str, Call]:
        """The ops of the layer; `main` is the one that the layer is named after."""
        raise NotImplementedError

    def is_causal(self) -> bool:
        """Whether a token's output depends only on itself and the tokens before it. By default
        this holds if it holds for all ops; a mixer that looks ahead outside of them overrides it.
        """
        return all(dispatch.is_causal(call.op, call.options) for call in self.calls().values())

    def flops(self, matrices: int, length: int) -> float:
        """Model FLOPs of a forward pass over one row of `length` tokens: those of the ops (causal
        pairs only), and two per token for every element of its hidden matrices, `matrices`.
        """
        return 2.0 * matrices * length + self.op_flops(length)

    def op_flops(self, length: int) -> float:
        """The FLOPs of the ops alone."""
        sizes = {"B": 1, "T": length}
        calls = self.calls().values()
        return sum(dispatch.flops(call.op, call.dims | sizes, call.options) for call in calls)

    def mix(self, x: jax.Array, positions: jax.Array, run: Along) -> jax.Array:
        """x [..., D], positions int32 [...] -> [..., D]."""
        raise NotImplementedError

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, state: Any
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D]; segment_ids, positions int32 [B, T]; `state` None in training."""
        out, state, _ = self.span(x, segment_ids, positions, state)
        return out, state

    def span(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, state: Any
    ) -> tuple[jax.Array, Any, Losses]:
        """The same, and also the mixer's losses."""
        run = Along(self, segment_ids, state)
        return self.mix(x, positions, run), run.after, run.losses

    def step(self, x: jax.Array, positions: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """x [B, D], positions int32 [B]: one token per row, in the row's current document."""
        run = Along(self, None, state)
        return self.mix(x, positions, run), run.after

    def for_steps(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state as a loop of `step` reads it fastest; only `step` takes it."""
        calls = self.calls()
        return {name: dispatch.get(calls[name].op).for_steps(x) for name, x in state.items()}

    def init_state(self, batch: int, max_len: int) -> dict[str, Any]:
        """The empty states of the ops; a state that grows has room for `max_len` tokens per row."""
        dtype = self.context.numerics.compute_dtype
        return {
            name: dispatch.init_state(
                call.op, dims=call.dims, dtype=dtype, batch=batch, max_len=max_len
            )
            for name, call in self.calls().items()
        }
