"""One chunk of C tokens of a diagonal recurrence.

Modes. With the powers lambda^l in a table, a chunk is four products for each of D = H K channels.
Their small matrices are shared by all rows and chunks. h is [re, im], 2 N numbers; l, i, j count
from 0:

    Y   = X toeplitz + h read             toeplitz_ji = K_{i-j},  K_l = sum_n Re(c_n lambda_n^l)
    h'  = lambda^C h + X write            read_ni = c_n lambda_n^{i+1},  write_jn = lambda_n^{C-1-j}

Cotangents are multiplied by the transposed matrices. Gradients of lambda and c follow from those of
the matrices.

Gate. h_t = a_t h_{t-1} + x_t for all chunks side by side, in C sequential steps (`walk`).
`summarize` computes what a chunk does to any h at its entry: h' = (product of a) h + h'(0). The
factor a_t is 0 where a document starts and 1 on padding, so there are only products, and never a
logarithm of zero. Everything is float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


class Modes(NamedTuple):
    """The state: both parts of h, and the row's document."""

    re: Float[Array, "B H K N"]
    im: Float[Array, "B H K N"]
    segment: Int[Array, " B"]


FIELDS = (("re", "B H K N"), ("im", "B H K N"), ("segment", "B"))


class Maps(NamedTuple):
    """The matrices of a chunk, for each channel."""

    toeplitz: Float[Array, "D C C"]
    read: Float[Array, "D 2N C"]
    write: Float[Array, "D C 2N"]
    jump: Float[Array, "D 2N"]


def _powers(
    number: Int[Array, " l"],
    most: int,
    log_magnitude: Float[Array, "*channels N"],
    angle: Float[Array, "*channels N"],
) -> tuple[Float[Array, "l *channels N"], Float[Array, "l *channels N"]]:
    """lambda^n for each `number` n from 0 to `most`, as real and imaginary parts.

    The powers 1, 2, 4, ... come from exp, cos and sin: multiplying the angle by 2^k has no rounding
    error, while multiplying it by n has one that grows with n. The others are products of at most
    log2(n) of these powers.
    """
    bits = most.bit_length()
    sizes = 2.0 ** _column(jnp.arange(bits, dtype=jnp.float32), angle)
    magnitude = jnp.exp(sizes * log_magnitude)
    step_re, step_im = magnitude * jnp.cos(sizes * angle), magnitude * jnp.sin(sizes * angle)
    column = _column(number, angle)
    re = jnp.ones((number.size, *angle.shape), jnp.float32)
    im = jnp.zeros_like(re)
    # One elementwise pass; concatenating longer and longer tables takes XLA seconds to compile.
    for bit in range(bits):
        is_set = (column >> bit) & 1 == 1
        far_re, far_im = turn(re, im, step_re[bit], step_im[bit])
        re, im = jnp.where(is_set, far_re, re), jnp.where(is_set, far_im, im)
    return re, im


def _column(numbers: Array, like: Array) -> Array:
    """[l] -> [l, 1, ...], to broadcast against `like`."""
    return numbers.reshape(-1, *(1,) * like.ndim)


def _powers_forward(
    number: Array, most: int, log_magnitude: Array, angle: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    re, im = _powers(number, most, log_magnitude, angle)
    return (re, im), (number, re, im)


def _powers_backward(
    most: int, saved: tuple[Array, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[None, Array, Array]:
    """d lambda^n / d log lambda = n lambda^n."""
    del most
    (number, re, im), (d_re, d_im) = saved, cotangents
    count = _column(number, re[0]).astype(jnp.float32)
    return (
        None,
        jnp.sum(count * (re * d_re + im * d_im), axis=0),
        jnp.sum(count * (re * d_im - im * d_re), axis=0),
    )


powers = jax.custom_vjp(_powers, nondiff_argnums=(1,))
powers.defvjp(_powers_forward, _powers_backward)


def turn(re: Array, im: Array, by_re: Array, by_im: Array) -> tuple[Array, Array]:
    """The product of two complex numbers."""
    return re * by_re - im * by_im, re * by_im + im * by_re


def maps(
    re: Float[Array, "C+1 D N"],
    im: Float[Array, "C+1 D N"],
    c_re: Float[Array, "D N"],
    c_im: Float[Array, "D N"],
) -> Maps:
    """The matrices of a chunk, from the table of powers."""
    length = re.shape[0] - 1
    read_re, read_im = turn(re, im, c_re, c_im)
    taps = jnp.sum(read_re[:length], axis=-1)
    read = jnp.concatenate([read_re[1:], -read_im[1:]], axis=-1)
    write = jnp.concatenate([re, im], axis=-1)[:length][::-1]
    jump = jnp.concatenate([re[length], im[length]], axis=-1)
    return Maps(_toeplitz(taps.T), jnp.moveaxis(read, 0, -1), jnp.moveaxis(write, 0, 1), jump)


def _toeplitz(taps: Float[Array, "D C"]) -> Float[Array, "D C C"]:
    """An upper triangular matrix; from column j on, row j holds the taps.

    A vector of 2 C numbers, repeated and read with a stride of 2 C - 1, gives rows that are each
    shifted by one. The derivative of that is not a scatter.
    """
    channels, length = taps.shape
    row = jnp.concatenate([taps, jnp.zeros_like(taps)], axis=1)
    flat = jnp.tile(row, (1, length))[:, : length * (2 * length - 1)]
    return flat.reshape(channels, length, 2 * length - 1)[:, :, :length]


def jump(h: Float[Array, "*batch 2N"], by: Float[Array, "*batch 2N"]) -> Float[Array, "*batch 2N"]:
    """h one chunk later, without new tokens."""
    return jnp.concatenate(turn(*jnp.split(h, 2, axis=-1), *jnp.split(by, 2, axis=-1)), axis=-1)


def conjugate(h: Float[Array, "*batch 2N"]) -> Float[Array, "*batch 2N"]:
    """The cotangent of a product with z is a product with the conjugate of z."""
    re, im = jnp.split(h, 2, axis=-1)
    return jnp.concatenate([re, -im], axis=-1)


def walk(
    factor: Float[Array, "C N B H K"],
    x: Float[Array, "C N B H K"],
    h: Float[Array, "N B H K"],
    *,
    reverse: bool = False,
) -> Float[Array, "C N B H K"]:
    """h after every token, from h at the entry; `reverse` goes from the last token to the first."""

    def advance(h: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
        h = token[0] * h + token[1]
        return h, h

    return lax.scan(advance, h, (factor, x), reverse=reverse)[1]


def summarize(
    factor: Float[Array, "C N B H K"], x: Float[Array, "C N B H K"], *, reverse: bool = False
) -> tuple[Float[Array, "N B H K"], Float[Array, "N B H K"]]:
    """The product of all factors, and h at the end if it is zero at the entry."""

    def advance(
        carry: tuple[Array, Array], token: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        left, h = carry
        return (token[0] * left, token[0] * h + token[1]), None

    start = jnp.ones_like(x[0]), jnp.zeros_like(x[0])
    return lax.scan(advance, start, (factor, x), reverse=reverse)[0]
