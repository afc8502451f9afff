"""Causal convolution in plain XLA, for any backend, with a hand-written backward.

The forward pass and the cotangent of x are each one fused pass of W multiply-adds over whole rows.
The cotangent of the weight is a loop over chunks of tokens that adds into [B, W, H, K]. Only the
inputs are saved.

Where there is padding between tokens of one document, a gather first moves the tokens together, and
the outputs are moved back. A condition at run time skips this for all other batches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import segments
from kernels.blocks import Chunk, round_up
from kernels.contract import Options
from kernels.gated_conv import tile
from kernels.gated_conv.tile import Line, Tail
from kernels.letters import Inputs
from kernels.primitives import gaps


def apply(
    inputs: Inputs,
    segment_ids: Int[Array, "B T"] | None,
    state: Tail,
    *,
    options: Options,
    blocks: Chunk | None = None,
) -> tuple[Float[Array, "B T H K"], Tail]:
    """Output and state of T more tokens."""
    del options  # the keys of `inputs` say the same
    x = inputs["x"]
    time, taps = x.shape[1], inputs["weight"].shape[-1]
    belongs = segments.continued(segment_ids, state.segment, time)
    old, line = jnp.moveaxis(state.tail, 2, 1), None
    if segment_ids is None:
        # In a row that has no document yet, the first token starts one.
        old = jnp.where((state.segment == 0)[:, None, None, None], 0.0, old)
    else:
        line = tile.line(segment_ids, belongs, state.segment, taps)
    new = jnp.moveaxis(tile.next_tail(x, old, line), 1, 2)
    out = _convolve((blocks or Chunk(32)).length, inputs, old, line)
    out = segments.blank_padding(out, segment_ids).astype(x.dtype)
    return out, Tail(new, belongs[:, -1])


type PerToken = tuple[Array, Any]


def _without_gaps(
    line: Line | None, call: Callable[..., PerToken], *arrays: Float[Array, "B T H K"]
) -> PerToken:
    """`call(age, *arrays)`, with arrays in which neighbors in a document are adjacent.

    The first result must have one row for each token.
    """
    if line is None:
        return call(None, *arrays)

    def move(*arrays: Array) -> PerToken:
        age = gaps.together(line.age, line.places)
        out, others = call(age, *(gaps.together(x, line.places) for x in arrays))
        return gaps.back(out, line.places), others

    return lax.cond(line.places.any, move, lambda *arrays: call(line.age, *arrays), *arrays)


def _plain(inputs: Inputs, halo: Array, line: Line | None) -> Float[Array, "B T H K"]:
    """The convolution and its bias, before the gate."""
    weight = _by_tap(inputs)
    call = lambda age, x: (tile.convolve(_after(halo, x), weight, age), ())
    out, _ = _without_gaps(line, call, inputs["x"])
    return out + inputs["bias"].astype(jnp.float32) if "bias" in inputs else out


def _by_tap(inputs: Inputs) -> Float[Array, "W H K"]:
    return jnp.moveaxis(inputs["weight"].astype(jnp.float32), -1, 0)


def _after(halo: Float[Array, "B W H K"], x: Float[Array, "B T H K"]) -> Array:
    return jnp.concatenate([halo[:, 1:], x.astype(jnp.float32)], axis=1)


def _convolution(
    length: int, inputs: Inputs, halo: Float[Array, "B W H K"], line: Line | None
) -> Float[Array, "B T H K"]:
    """The output of all tokens; the oldest row of `halo` is not read."""
    return _forward(length, inputs, halo, line)[0]


def _forward(
    length: int, inputs: Inputs, halo: Array, line: Line | None
) -> tuple[Array, tuple[Inputs, Array, Line | None]]:
    del length
    out = _plain(inputs, halo, line)
    out = out * inputs["gate"].astype(jnp.float32) if "gate" in inputs else out
    return out, (inputs, halo, line)


def _backward(
    length: int, saved: tuple[Inputs, Array, Line | None], d_out: Array
) -> tuple[Inputs, Array, None]:
    inputs, halo, line = saved
    weight = _by_tap(inputs)
    grads: Inputs = {}
    if "gate" in inputs:
        grads["gate"] = d_out * _plain(inputs, halo, line)
        d_out = d_out * inputs["gate"].astype(jnp.float32)
    if "bias" in inputs:
        # A product with ones, because XLA:CPU is slow at sums over rows.
        ones = jnp.ones(d_out.shape[:2], jnp.float32)
        grads["bias"] = jnp.einsum("bt,bthk->hk", ones, d_out, precision=lax.Precision.HIGHEST)

    def call(age: Array | None, x: Array, d_out: Array) -> PerToken:
        d_z = tile.spread(d_out, weight, age)
        d_weight = _correlate(length, _after(halo, x), d_out, age)
        before = weight.shape[0] - 1
        return d_z[:, before:], (d_z[:, :before], d_weight)

    grads["x"], (d_halo, d_weight) = _without_gaps(line, call, inputs["x"], d_out)
    grads["weight"] = jnp.moveaxis(d_weight, 0, -1)
    grads = {name: grads[name].astype(x.dtype) for name, x in inputs.items()}
    return grads, jnp.pad(d_halo, ((0, 0), (1, 0), (0, 0), (0, 0))), None


def _correlate(
    length: int, z: Array, d_out: Float[Array, "B T H K"], age: Array | None
) -> Float[Array, "W H K"]:
    """The cotangent of the weight, computed `length` tokens at a time."""
    batch, time = d_out.shape[:2]
    taps = z.shape[1] - time + 1
    length = min(length, time)
    end = round_up(time, length) - time
    wide = ((0, 0), (0, end), (0, 0), (0, 0))
    z, d_out = jnp.pad(z, wide), jnp.pad(d_out, wide)
    age = None if age is None else jnp.pad(age, wide[:2])

    def add(chunk: Array, total: Array) -> Array:
        part = lambda x, size: lax.dynamic_slice_in_dim(x, chunk * length, size, 1)
        here = None if age is None else part(age, length)
        return tile.correlate(total, part(z, length + taps - 1), part(d_out, length), here)

    start = jnp.zeros((batch, taps, *z.shape[2:]), jnp.float32)
    return jnp.sum(lax.fori_loop(0, (time + end) // length, add, start), axis=0)


_convolve = jax.custom_vjp(_convolution, nondiff_argnums=(0,))
_convolve.defvjp(_forward, _backward)
