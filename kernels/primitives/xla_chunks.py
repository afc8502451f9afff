"""Any chunked recurrence in plain XLA; the op supplies the mathematics. A scan carries the memory S
from chunk to chunk. Its backward pass scans from the last chunk and carries the cotangent of S.

Everything about a chunk is computed inside the scan, so the working set is one chunk of every head.
Saved: the inputs, and S at the entry of every chunk (T K V / C floats per head).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.primitives import chunks
from kernels.primitives.chunks import Marks


class Mathematics(NamedTuple):
    """One chunk of all heads, in float32. The arrays x are a named tuple with a field q, which
    arrives multiplied by `scale`. `how` is passed on to the functions. All is known at trace time.

    forward(x, documents, s, how) -> out, s
    backward(x, documents, s, d_out, d_s, how) -> d_x, d_s
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Any, Array]]
    how: Any
    scale: float


class Saved(NamedTuple):
    """What the backward pass needs; the first axis of every array is the chunk."""

    x: Any
    marks: Marks | None
    entered: Float[Array, "N B H K V"]


def _recur(
    mathematics: Mathematics, x: Any, marks: Marks | None, s: Float[Array, "B H K V"]
) -> tuple[Float[Array, "N B H C V"], Float[Array, "B H K V"]]:
    """The output of all chunks, and S after the last; arrays of x are [N, B, H, C, ...]."""
    return _forward(mathematics, x, marks, s)[0]


def _forward(
    mathematics: Mathematics, x: Any, marks: Marks | None, s: Array
) -> tuple[tuple[Array, Array], Saved]:
    def advance(s: Array, chunk: tuple[Any, Marks | None]) -> tuple[Array, tuple[Array, Array]]:
        here, documents = _widen(chunk[0], mathematics.scale), chunks.documents(chunk[1])
        out, left = mathematics.forward(here, documents, s, mathematics.how)
        return left, (out, s)

    s, (out, entered) = lax.scan(advance, s, (x, marks))
    return (out, s), Saved(x, marks, entered)


def _backward(
    mathematics: Mathematics, saved: Saved, cotangents: tuple[Array, Array]
) -> tuple[Any, None, Array]:
    d_out, d_s = cotangents

    def retreat(d_s: Array, chunk: tuple[Saved, Array]) -> tuple[Array, Any]:
        (x, marks, s), d_out = chunk
        here, documents = _widen(x, mathematics.scale), chunks.documents(marks)
        d_x, d_s = mathematics.backward(here, documents, s, d_out, d_s, mathematics.how)
        d_x = d_x._replace(q=mathematics.scale * d_x.q)
        return d_s, jax.tree.map(lambda grad, primal: grad.astype(primal.dtype), d_x, x)

    d_s, d_x = lax.scan(retreat, d_s, (saved, d_out), reverse=True)
    return d_x, None, d_s


def _widen(x: Any, scale: float) -> Any:
    """One chunk in float32, with scaled queries."""
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), x)
    return wide._replace(q=scale * wide.q)


recur = jax.custom_vjp(_recur, nondiff_argnums=(0,))
recur.defvjp(_forward, _backward)
