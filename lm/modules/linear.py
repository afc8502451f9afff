"""Matrices of the residual stream: into heads, back from heads, and plain ones.

`linear` makes the kind of matrix that the layer's context names, a file of lm/matrices. A kind
defines W as a sum of products, and `project` multiplies by it:

    dense       ((W,),)             y = x W
    low rank    ((A, B),)           y = (x A) B
    adapted     ((W,), (A, B))      y = x W + (x A) B
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import linen as nn

from lm import families
from lm.modules.context import Context
from lm.params import Role


class Factor(NamedTuple):
    """An array [*M, *N] to multiply by, its letters, and the number of dimensions M."""

    array: jax.Array
    letters: str
    contracted: int


# Dimensions that grow with the model's width at fixed widths of heads and ranks.
GROWING = frozenset("DFHG")


def role_of(letters: str, contracted: int) -> Role:
    """The role of a matrix in muP: hidden where the number of summands grows with the model, input
    where it is fixed, as on the way back from a low rank (arXiv 2203.03466, table 3).
    """
    return "hidden" if GROWING & {*letters.split()[:contracted]} else "input"


class Matrix(nn.Module):
    """One matrix without bias, between any groups of dimensions. `letters` and `shape` are those of
    W, for example "D H K". Its first `contracted` dimensions are summed over.
    """

    context: Context
    letters: str
    shape: tuple[int, ...]
    contracted: int

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; asked before any device is touched."""
        return None

    def chains(self) -> tuple[tuple[Factor, ...], ...]:
        """W is the sum over chains of the product of their factors."""
        raise NotImplementedError

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *shape[:contracted]] -> [..., *shape[contracted:]]"""
        return project(x, self)[0]

    def place(self, out: jax.Array) -> jax.Array:
        """The output laid out by its letters; output to the residual stream, like the stream."""
        outward = self.letters.split()[self.contracted :]
        if outward == ["D"]:
            return self.context.stream(out)
        return self.context.place(out, " ".join(["B T", *outward]))


def linear(
    context: Context,
    letters: str,
    shape: tuple[int, ...],
    contracted: int,
    name: str | None = None,
) -> Matrix:
    """A matrix of the kind that this layer uses; the arguments are the fields of `Matrix`."""
    kind = families.MATRICES.find(context.matrix.name, "model.matrix")
    return kind(context, letters, shape, contracted, name=name, **context.matrix.options)


def project(x: jax.Array, *matrices: Matrix) -> list[jax.Array]:
    """The outputs of several matrices for one input. Under tensor parallelism the gradient of that
    input is then summed over the devices only once.
    """
    made = [matrix.chains() for matrix in matrices]
    context = matrices[0].context
    products = iter(context.matmul(x, *(chain[0] for chains in made for chain in chains)))
    out = []
    for matrix, chains in zip(matrices, made, strict=True):
        parts = [_through(context, next(products), chain[1:]) for chain in chains]
        out.append(matrix.place(sum(parts[1:], parts[0])))
    return out


def _through(context: Context, y: jax.Array, factors: tuple[Factor, ...]) -> jax.Array:
    for factor in factors:
        (y,) = context.matmul(y, factor)
    return y
