"""The logarithm of a running sum of exponentials, restarted at every document.

    y_t = log(e^(y_{t-1}) + e^(x_t))        y_{t-1} = -inf where a document starts
    dx_t = sigmoid(x_t - y_{t-1}) e_t        e_t = dy_t + sigmoid(y_t - x_{t+1}) e_{t+1}

Each sigmoid compares the two terms of one sum. Written as e^(x_t - y_t) and e^(y_t - y_{t+1}), the
derivatives would contain the rounding error of y, which is 6e-5 at y = 1000. The plain form is
`jax.lax.cumlogsumexp`, which does not know documents.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

# A finite stand-in for -inf: differences stay numbers.
EMPTY = -1e30

type Marks = tuple[Bool[Array, "B T"], Bool[Array, "B T"]]


def _value(
    x: Float[Array, "B T *channels"], before: Float[Array, "*batch"], marks: Marks
) -> Float[Array, "B T *channels"]:
    """y after every token, starting from y = `before`. `marks` are where documents start, and which
    tokens are not padding (padding leaves y unchanged).
    """
    starts, is_token = (_wide(mark, x) for mark in marks)
    tokens = jnp.concatenate([before[:, None], jnp.where(is_token, x, EMPTY)], axis=1)
    starts = jnp.concatenate([jnp.zeros_like(starts[:, :1]), starts], axis=1)
    starts = jnp.broadcast_to(starts, tokens.shape)

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        (fresh, y), (starts, later) = left, right
        return fresh | starts, jnp.where(starts, later, jnp.logaddexp(y, later))

    return lax.associative_scan(join, (starts, tokens), axis=1)[1][:, 1:]


def _forward(x: Array, before: Array, marks: Marks) -> tuple[Array, tuple[Array, ...]]:
    y = _value(x, before, marks)
    return y, (x, before, y, *marks)


def _backward(saved: tuple[Array, ...], d_y: Array) -> tuple[Array, Array, None]:
    x, before, y, starts, is_token = saved
    starts, is_token = _wide(starts, x), _wide(is_token, x)
    earlier = jnp.concatenate([before[:, None], y[:, :-1]], axis=1)
    # The shares of the cotangent of y_t that go to y_{t-1} and to x_t.
    kept = jnp.where(starts, 0.0, jnp.where(is_token, jax.nn.sigmoid(earlier - x), 1.0))
    taken = jnp.where(is_token, jnp.where(starts, 1.0, jax.nn.sigmoid(x - earlier)), 0.0)
    after = jnp.concatenate([kept[:, 1:], jnp.zeros_like(kept[:, :1])], axis=1)

    def join(later: tuple[Array, Array], sooner: tuple[Array, Array]) -> tuple[Array, Array]:
        return later[0] * sooner[0], sooner[0] * later[1] + sooner[1]

    flow = lax.associative_scan(join, (after, d_y), reverse=True, axis=1)[1]
    return taken * flow, kept[:, 0] * flow[:, 0], None


def _wide(mark: Bool[Array, "B T"], x: Array) -> Array:
    return mark.reshape(mark.shape + (1,) * (x.ndim - 2))


running_lse = jax.custom_vjp(_value)
running_lse.defvjp(_forward, _backward)
