"""Cross-entropy from hidden states, a chunk of tokens at a time: no [B, T, vocab] array exists.

Per token, with logits l = W h and lse = log sum exp l:

    nll = lse - l[target];   objective = sum over tokens of weight * (nll + z * lse^2)      (z-loss: PaLM, sec. 5)

The gradient is formed while the chunk's logits are at hand: dl = weight * (softmax(l) (1 + 2 z lse)
- onehot(target)), dh = dl W, dW += dl^T h; the backward pass only multiplies by the scalar
cotangent. So the logits matmul runs once, at the price of holding dW in float32, which is valid
because a sum is linear in its terms.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lm.config import LossConfig


class LossOptions(NamedTuple):
    """Static. `vocab_size` masks the padded rows of the head; `operand_dtype` is what the logits
    matmul multiplies.
    """

    z_loss: float
    chunk_size: int
    vocab_size: int
    operand_dtype: Any
    batch_axes: tuple[str, ...]

    @staticmethod
    def create(
        config: LossConfig, vocab_size: int, operand_dtype: Any, batch_axes: tuple[str, ...]
    ) -> LossOptions:
        return LossOptions(config.z_loss, config.chunk_size, vocab_size, operand_dtype, batch_axes)


def objective(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    mesh: Mesh,
    options: LossOptions,
) -> tuple[jax.Array, jax.Array]:
    """Sum of weighted losses and the per-token negative log-likelihood.

    hidden [B, T, D], head [vocab, D], targets int32 [B, T], weights float32 [B, T] -> float32 [],
    float32 [B, T]. The sum is over the whole batch, undivided; only it carries a gradient (to
    hidden and head).
    """
    if not options.batch_axes:
        return _local(hidden, head, targets, weights, options)
    axes = options.batch_axes

    def shard(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, nll = _local(*args, options)
        return jax.lax.psum(total, axes), nll

    rows = P(axes)
    mapped = jax.shard_map(
        shard, mesh=mesh, in_specs=(rows, P(), rows, rows), out_specs=(P(), rows)
    )
    return mapped(hidden, head, targets, weights)


def _local(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, options: LossOptions
) -> tuple[jax.Array, jax.Array]:
    """One shard: flattens to tokens, pads to whole chunks with weight 0."""
    b, t, d = hidden.shape
    size = min(options.chunk_size, b * t)
    pad = -(b * t) % size
    chunks = (
        lambda x: jnp.pad(
            x.reshape(b * t, *x.shape[2:]), ((0, pad),) + ((0, 0),) * (x.ndim - 2)
        ).reshape(  # noqa: E731
            -1, size, *x.shape[2:]
        )
    )
    total, nll = _sum(options, chunks(hidden), head, chunks(targets), chunks(weights))
    return total, nll.reshape(-1)[: b * t].reshape(b, t)


class _Chunk(NamedTuple):
    """exp(l - max) [C, vocab], its row sums, and the losses of a chunk's tokens [C]."""

    exp: jax.Array
    norm: jax.Array
    lse: jax.Array
    nll: jax.Array


def _chunk(options: LossOptions, h: jax.Array, head: jax.Array, target: jax.Array) -> _Chunk:
    logits = jnp.einsum(
        "cd,vd->cv",
        h.astype(options.operand_dtype),
        head.astype(options.operand_dtype),
        preferred_element_type=jnp.float32,
    )
    if options.vocab_size < head.shape[0]:
        logits = jnp.where(jnp.arange(head.shape[0]) < options.vocab_size, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exp = jnp.exp(logits - top)
    norm = jnp.sum(exp, axis=-1)
    lse = jnp.log(norm) + top[:, 0]
    at_target = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    return _Chunk(exp, norm, lse, lse - at_target)


def _weighted(options: LossOptions, chunk: _Chunk, weight: jax.Array) -> jax.Array:
    return jnp.sum(weight * (chunk.nll + options.z_loss * chunk.lse**2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(
    options: LossOptions, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """hidden [N, C, D], head [vocab, D], targets, weights [N, C] -> sum [], nll [N, C]."""

    def body(total: jax.Array, x: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        h, target, weight = x
        chunk = _chunk(options, h, head, target)
        return total + _weighted(options, chunk, weight), chunk.nll

    return jax.lax.scan(body, jnp.float32(0), (hidden, targets, weights))


def _sum_fwd(
    options: LossOptions, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    low = head.astype(options.operand_dtype)

    def body(carry: tuple[jax.Array, jax.Array], x: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        total, d_head = carry
        h, target, weight = x
        chunk = _chunk(options, h, head, target)
        factor = weight * (1.0 + 2.0 * options.z_loss * chunk.lse) / chunk.norm
        onehot = target[:, None] == jnp.arange(head.shape[0])
        d_logits = chunk.exp * factor[:, None] - jnp.where(onehot, weight[:, None], 0.0)
        d_logits = d_logits.astype(options.operand_dtype)
        d_h = jnp.einsum("cv,vd->cd", d_logits, low, preferred_element_type=jnp.float32)
        d_head += jnp.einsum(
            "cv,cd->vd", d_logits, h.astype(low.dtype), preferred_element_type=jnp.float32
        )
        return (total + _weighted(options, chunk, weight), d_head), (
            chunk.nll,
            d_h.astype(hidden.dtype),
        )

    zero = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (total, d_head), (nll, d_hidden) = jax.lax.scan(body, zero, (hidden, targets, weights))
    return (total, nll), (d_hidden, d_head.astype(head.dtype))


def _sum_bwd(options: LossOptions, residuals: Any, cotangents: Any) -> tuple[Any, Any, None, None]:
    d_hidden, d_head = residuals
    scale = cotangents[0]
    return (
        (d_hidden * scale).astype(d_hidden.dtype),
        (d_head * scale).astype(d_head.dtype),
        None,
        None,
    )


_sum.defvjp(_sum_fwd, _sum_bwd)
