"""Cross-entropy from hidden states, a chunk of tokens at a time: no [B, T, vocab] array exists.

Per token, with logits l = W h and lse = log sum exp l:

    nll = lse - l[target]
    objective = sum over tokens of weight * (nll + z * lse^2)      (z-loss: PaLM, sec. 5)

The gradient is formed while the chunk's logits are at hand: dl = weight * (softmax(l) (1 + 2 z lse)
- onehot(target)), dh = dl W, dW += dl^T h; the backward pass only multiplies by the scalar
cotangent. So the logits matmul runs once, at the price of holding dW in float32, which is valid
because a sum is linear in its terms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    return _sum(mesh, options, hidden, head, targets, weights)


def score(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, mesh: Mesh, options: LossOptions
) -> tuple[jax.Array, jax.Array]:
    """The negative log-likelihood of every target, float32 [B, T], and whether the target is the
    likeliest token (of equals the first), bool [B, T].

    hidden [B, T, D], head [vocab, D], targets int32 [B, T].
    """

    def shard(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
        def body(x: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            logits = _logits(options, x[0], head)
            return _chunk(logits, x[1]).nll, jnp.argmax(logits, axis=-1) == x[1]

        chunks = tuple(_split(x, options.chunk_size) for x in (hidden, targets))
        return tuple(_join(x, targets.shape) for x in jax.lax.map(body, chunks))

    nll, hit = _over_shards(shard, "rr", mesh, options.batch_axes)(hidden, head, targets)
    return nll, hit


class _Chunk(NamedTuple):
    """exp(l - max) [C, vocab], its row sums, and the losses of a chunk's tokens [C]."""

    exp: jax.Array
    norm: jax.Array
    lse: jax.Array
    nll: jax.Array


def _logits(options: LossOptions, h: jax.Array, head: jax.Array) -> jax.Array:
    """h [C, D], head [vocab, D] -> float32 [C, vocab], -inf at the padding of the vocabulary."""
    logits = jnp.einsum(
        "cd,vd->cv",
        h.astype(options.operand_dtype),
        head.astype(options.operand_dtype),
        preferred_element_type=jnp.float32,
    )
    if options.vocab_size < head.shape[0]:
        logits = jnp.where(jnp.arange(head.shape[0]) < options.vocab_size, logits, -jnp.inf)
    return logits


def _chunk(logits: jax.Array, target: jax.Array) -> _Chunk:
    top = jnp.max(logits, axis=-1, keepdims=True)
    exp = jnp.exp(logits - top)
    norm = jnp.sum(exp, axis=-1)
    lse = jnp.log(norm) + top[:, 0]
    at_target = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    return _Chunk(exp, norm, lse, lse - at_target)


def _weighted(options: LossOptions, chunk: _Chunk, weight: jax.Array) -> jax.Array:
    return jnp.sum(weight * (chunk.nll + options.z_loss * chunk.lse**2))


def _forward(
    options: LossOptions, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One shard: sum [], nll [b, T]."""

    def body(total: jax.Array, x: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        h, target, weight = x
        chunk = _chunk(_logits(options, h, head), target)
        return total + _weighted(options, chunk, weight), chunk.nll

    chunks = tuple(_split(x, options.chunk_size) for x in (hidden, targets, weights))
    total, nll = jax.lax.scan(body, jnp.float32(0), chunks)
    return total, _join(nll, targets.shape)


def _forward_and_gradient(
    options: LossOptions, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One shard: sum [], nll [b, T], and the sum's gradient: d_hidden [b, T, D], d_head float32
    [vocab, D].
    """
    low = head.astype(options.operand_dtype)

    def body(carry: tuple[jax.Array, jax.Array], x: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        total, d_head = carry
        h, target, weight = x
        chunk = _chunk(_logits(options, h, low), target)
        factor = weight * (1.0 + 2.0 * options.z_loss * chunk.lse) / chunk.norm
        onehot = target[:, None] == jnp.arange(head.shape[0])
        d_logits = chunk.exp * factor[:, None] - jnp.where(onehot, weight[:, None], 0.0)
        d_logits = d_logits.astype(low.dtype)
        d_h = jnp.einsum("cv,vd->cd", d_logits, low, preferred_element_type=jnp.float32)
        d_head += jnp.einsum(
            "cv,cd->vd", d_logits, h.astype(low.dtype), preferred_element_type=jnp.float32
        )
        total += _weighted(options, chunk, weight)
        return (total, d_head), (chunk.nll, d_h.astype(h.dtype))

    zero = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    chunks = tuple(_split(x, options.chunk_size) for x in (hidden, targets, weights))
    (total, d_head), (nll, d_hidden) = jax.lax.scan(body, zero, chunks)
    return total, _join(nll, targets.shape), _join(d_hidden, hidden.shape), d_head


def _split(x: jax.Array, chunk_size: int) -> jax.Array:
    """[b, T, ...] -> [N, C, ...]: flattened to tokens, padded with zeros to whole chunks."""
    tokens = x.reshape(-1, *x.shape[2:])
    size = min(chunk_size, len(tokens))
    pad = [(0, -len(tokens) % size)] + [(0, 0)] * (tokens.ndim - 1)
    return jnp.pad(tokens, pad).reshape(-1, size, *tokens.shape[1:])


def _join(chunks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_split`."""
    return chunks.reshape(-1, *shape[2:])[: shape[0] * shape[1]].reshape(shape)


# The derivative rule encloses shard_map: each shard's gradient is formed in its forward pass and
# reduced there, so nothing is differentiated through a collective.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(
    mesh: Mesh,
    options: LossOptions,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    function = functools.partial(_forward, options)
    mapped = _over_shards(function, "+r", mesh, options.batch_axes)
    total, nll = mapped(hidden, head, targets, weights)
    return total, nll


def _sum_fwd(
    mesh: Mesh,
    options: LossOptions,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    function = functools.partial(_forward_and_gradient, options)
    mapped = _over_shards(function, "+rr+", mesh, options.batch_axes)
    total, nll, d_hidden, d_head = mapped(hidden, head, targets, weights)
    return (total, nll), (d_hidden, d_head.astype(head.dtype))


def _sum_bwd(
    mesh: Mesh, options: LossOptions, residuals: Any, cotangents: Any
) -> tuple[jax.Array, jax.Array, None, None]:
    scale = cotangents[0]
    d_hidden, d_head = ((scale * x).astype(x.dtype) for x in residuals)
    return d_hidden, d_head, None, None


_sum.defvjp(_sum_fwd, _sum_bwd)


def _over_shards(
    function: Callable[..., tuple[jax.Array, ...]], outputs: str, mesh: Mesh, axes: tuple[str, ...]
) -> Callable[..., tuple[jax.Array, ...]]:
    """`function(hidden, head, *rows)` over the shards of the batch; of its outputs, "r"
    are rows and "+" are summed. Axes that do not split the batch stay with the compiler, so that a
    head whose vocabulary is sharded gives sharded logits.
    """
    if not axes:
        return function

    def shard(*args: jax.Array) -> tuple[jax.Array, ...]:
        results = zip(outputs, function(*args), strict=True)
        return tuple(jax.lax.psum(x, axes) if kind == "+" else x for kind, x in results)

    rows = P(axes)

    def mapped(hidden: jax.Array, head: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
        return jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(rows, P(), *(rows for _ in others)),
            out_specs=tuple(P() if kind == "+" else rows for kind in outputs),
            axis_names=set(axes),
            check_vma=False,
        )(hidden, head, *others)

    return mapped
