"""Cross-entropy from hidden states, one chunk of tokens at a time. No [B, T, vocab] array exists.

Per token, with logits l = W h and lse = log sum exp l:

    nll = lse - l[target]
    objective = sum over tokens of weight * (nll + z * lse^2)      (z-loss: PaLM, sec. 5)

The gradient is computed while the chunk's logits exist: with p = softmax(l),

    dl = weight * (p (1 + 2 z lse) - onehot(target))        dh = dl W        dW += dl^T h

For the target, p - 1 is computed as minus the sum of the other p. As a difference it would have no
correct digits when the target is nearly certain. The backward pass only multiplies by the scalar
cotangent, which is valid because the result is linear in it. So the logits matmul runs once, at the
price of holding dW in float32.

On a mesh every device does this for its own tokens and its own part of the vocabulary (Shoeybi et
al. 2019, arXiv 1909.08053, sec. 3). Devices exchange only maxima, sums and target entries of
logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels import shard
from kernels.shard import Rules
from lm.config import LossConfig


class LossOptions(NamedTuple):
    """Static options. `vocab_size` masks the padded rows of the head. `operand_dtype` is the dtype
    of the logits matmul's operands. `axes` maps what is split to mesh axes: "B" the rows and "T"
    the time of the tokens, "vocab" and "D" the head.
    """

    z_loss: float
    chunk_size: int
    vocab_size: int
    operand_dtype: Any
    axes: tuple[tuple[str, tuple[str, ...]], ...]

    @staticmethod
    def create(
        config: LossConfig, vocab_size: int, operand_dtype: Any, rules: Rules
    ) -> LossOptions:
        axes = tuple((letter, tuple(rules.get(letter, ()))) for letter in ("B", "T", "vocab", "D"))
        return LossOptions(config.z_loss, config.chunk_size, vocab_size, operand_dtype, axes)


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
    float32 [B, T]. The sum is over the whole batch and not divided. Only the sum carries a
    gradient, to hidden and head.
    """
    return _sum(mesh, options, hidden, head, targets, weights)


def score(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, mesh: Mesh, options: LossOptions
) -> tuple[jax.Array, jax.Array]:
    """The negative log-likelihood of every target, float32 [B, T], and whether the target is the
    likeliest token, bool [B, T]. If several are equally likely, the first counts as the likeliest.

    hidden [B, T, D], head [vocab, D], targets int32 [B, T].
    """

    def part(
        vocab: _Vocab, hidden: jax.Array, head: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, ...]:
        def body(x: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            logits = _logits(options, vocab, x[0], head)
            return _chunk(vocab, logits, x[1]).nll, vocab.first_best(logits) == x[1]

        chunks = tuple(_split(x, options.chunk_size) for x in (hidden, targets))
        return tuple(_join(x, targets.shape) for x in jax.lax.map(body, chunks))

    nll, hit = _over_parts(part, "rr", mesh, options)(hidden, head, targets)
    return nll, hit


class _Vocab(NamedTuple):
    """The part of the vocabulary on this device: the mesh axes that split it (none: it is whole),
    its first id, and its size.
    """

    axes: tuple[str, ...]
    first: jax.Array | int
    size: int

    def ids(self) -> jax.Array:
        return self.first + jnp.arange(self.size)

    def sum(self, x: jax.Array) -> jax.Array:
        return shard.total(x, self.axes)

    def max(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmax(x, self.axes) if self.axes else x

    def at(self, x: jax.Array, target: jax.Array) -> jax.Array:
        """x [C, size] at the targets [C], which may lie in any part."""
        if not self.axes:
            return jnp.take_along_axis(x, target[:, None], axis=1)[:, 0]
        place, is_here = shard.local_index(target, self.axes, self.size)
        found = jnp.take_along_axis(x, place[:, None], axis=1)[:, 0]
        return self.sum(jnp.where(is_here, found, 0.0))

    def first_best(self, logits: jax.Array) -> jax.Array:
        """The likeliest id [C]; the first one if several are equally likely."""
        best = self.first + jnp.argmax(logits, axis=-1)
        if not self.axes:
            return best
        top = jnp.max(logits, axis=-1)
        never = jnp.iinfo(jnp.int32).max
        return jax.lax.pmin(jnp.where(top == self.max(top), best, never), self.axes)


class _Chunk(NamedTuple):
    """For one chunk of tokens: exp(l - max) [C, part of vocab], and over the whole vocabulary its
    sum, the log-sum-exp and the nll [C].
    """

    exp: jax.Array
    norm: jax.Array
    lse: jax.Array
    nll: jax.Array


def _logits(options: LossOptions, vocab: _Vocab, h: jax.Array, head: jax.Array) -> jax.Array:
    """h [C, D], head [vocab, D] -> float32 [C, vocab], for the part of the vocabulary on this
    device, with -inf at the vocabulary's padding.
    """
    logits = jnp.einsum(
        "cd,vd->cv",
        h.astype(options.operand_dtype),
        head.astype(options.operand_dtype),
        preferred_element_type=jnp.float32,
    )
    if vocab.axes or options.vocab_size < head.shape[0]:
        logits = jnp.where(vocab.ids() < options.vocab_size, logits, -jnp.inf)
    return logits


def _chunk(vocab: _Vocab, logits: jax.Array, target: jax.Array) -> _Chunk:
    top = vocab.max(jnp.max(logits, axis=-1, keepdims=True))
    exp = jnp.exp(logits - top)
    norm = vocab.sum(jnp.sum(exp, axis=-1))
    lse = jnp.log(norm) + top[:, 0]
    return _Chunk(exp, norm, lse, lse - vocab.at(logits, target))


def _weighted(options: LossOptions, chunk: _Chunk, weight: jax.Array) -> jax.Array:
    return jnp.sum(weight * (chunk.nll + options.z_loss * chunk.lse**2))


def _forward(
    options: LossOptions, vocab: _Vocab, hidden: jax.Array, head: jax.Array, *rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """On one part; `rows` are targets and weights. Returns the sum [] and nll [b, T]."""

    def body(total: jax.Array, x: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        h, target, weight = x
        chunk = _chunk(vocab, _logits(options, vocab, h, head), target)
        return total + _weighted(options, chunk, weight), chunk.nll

    chunks = tuple(_split(x, options.chunk_size) for x in (hidden, *rows))
    total, nll = jax.lax.scan(body, jnp.float32(0), chunks)
    return total, _join(nll, rows[0].shape)


def _forward_and_gradient(
    options: LossOptions, vocab: _Vocab, hidden: jax.Array, head: jax.Array, *rows: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """On one part: the sum [], nll [b, T], and the gradient of the sum, d_hidden [b, T, D] and
    d_head float32 [vocab, D].
    """
    low = head.astype(options.operand_dtype)

    def body(carry: tuple[jax.Array, jax.Array], x: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        total, d_head = carry
        h, target, weight = x
        chunk = _chunk(vocab, _logits(options, vocab, h, low), target)
        onehot = target[:, None] == vocab.ids()
        others = vocab.sum(jnp.sum(jnp.where(onehot, 0.0, chunk.exp), axis=-1))
        weight_z = weight * 2.0 * options.z_loss * chunk.lse
        own, other = ((x / chunk.norm)[:, None] for x in (weight_z, weight + weight_z))
        left = (weight * others / chunk.norm)[:, None]
        d_logits = jnp.where(onehot, chunk.exp * own - left, chunk.exp * other)
        d_logits = d_logits.astype(low.dtype)
        d_h = jnp.einsum("cv,vd->cd", d_logits, low, preferred_element_type=jnp.float32)
        d_head += jnp.einsum(
            "cv,cd->vd", d_logits, h.astype(low.dtype), preferred_element_type=jnp.float32
        )
        total += _weighted(options, chunk, weight)
        return (total, d_head), (chunk.nll, d_h.astype(h.dtype))

    zero = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    chunks = tuple(_split(x, options.chunk_size) for x in (hidden, *rows))
    (total, d_head), (nll, d_hidden) = jax.lax.scan(body, zero, chunks)
    d_hidden = vocab.sum(_join(d_hidden, hidden.shape))
    return total, _join(nll, rows[0].shape), d_hidden, d_head


def _split(x: jax.Array, chunk_size: int) -> jax.Array:
    """[b, T, ...] -> [N, C, ...]: flattened to tokens and padded with zeros to whole chunks."""
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
    mapped = _over_parts(function, "+r", mesh, options)
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
    mapped = _over_parts(function, "+rrh", mesh, options)
    total, nll, d_hidden, d_head = mapped(hidden, head, targets, weights)
    return (total, nll), (d_hidden, d_head.astype(head.dtype))


def _sum_bwd(
    mesh: Mesh, options: LossOptions, residuals: Any, cotangents: Any
) -> tuple[jax.Array, jax.Array, None, None]:
    scale = cotangents[0]
    d_hidden, d_head = ((scale * x).astype(x.dtype) for x in residuals)
    return d_hidden, d_head, None, None


_sum.defvjp(_sum_fwd, _sum_bwd)


def _over_parts(
    function: Callable[..., tuple[jax.Array, ...]], outputs: str, mesh: Mesh, options: LossOptions
) -> Callable[..., tuple[jax.Array, ...]]:
    """Runs `function(vocab, hidden, head, *rows)` on the parts of batch, time and vocabulary.
    `outputs` has one letter per output: "r" is laid out like the rows, "+" is summed over the
    parts, and "h" is summed over tokens and laid out like the head.
    """
    here, axes = shard.here(mesh, dict(options.axes))
    rows, time, split, features = (axes.get(letter, ()) for letter in ("B", "T", "vocab", "D"))
    tokens = rows + time  # axes over which the tokens are spread
    if not (tokens or split or features):
        return lambda hidden, head, *rows: function(_Vocab((), 0, len(head)), hidden, head, *rows)

    def reduced(x: jax.Array, kind: str) -> jax.Array:
        return x if kind == "r" else shard.total(x, tokens, features if kind == "h" else (), 1)

    def part(hidden: jax.Array, head: jax.Array, *rows: jax.Array) -> tuple[jax.Array, ...]:
        if features:
            # Rounded before the gather, so that half as many bytes are sent.
            low = head.astype(options.operand_dtype)
            head = jax.lax.all_gather(low, features, axis=1, tiled=True)
        first = jax.lax.axis_index(split) * len(head) if split else 0
        found = function(_Vocab(split, first, len(head)), hidden, head, *rows)
        return tuple(reduced(x, kind) for x, kind in zip(found, outputs, strict=True))

    specs = {"r": P(rows or None, time or None), "+": P(), "h": P(split or None, features or None)}

    def mapped(hidden: jax.Array, head: jax.Array, *rows: jax.Array) -> tuple[jax.Array, ...]:
        inputs = (specs["r"], specs["h"], *(specs["r"] for _ in rows))
        placed = shard.wrap(part, here, inputs, tuple(specs[kind] for kind in outputs))
        return placed(hidden, head, *rows)

    return mapped
