"""Objectives: what a step minimises, one file each, found by listing this folder.

A file holds one frozen dataclass, named as the file in camel case, whose fields with defaults are
its options, with the methods of `Objective`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax

from lm.data.batch import Batch


@dataclasses.dataclass(frozen=True)
class Forward:
    """What an objective may ask of the model.

    `hidden(params, batch)`: hidden states [B, T, D], ready for the head, and the head [vocab, D].
    `loss(hidden, head, targets, weights)`: the sum of weighted token losses, float32 [], and the
    negative log-likelihood of every target, float32 [B, T] (lm/loss.py).
    """

    hidden: Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
    loss: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Objective(Protocol):
    def problem(self) -> str | None:
        """What is wrong with these options, in one line; read before any device is touched."""
        ...

    def __call__(self, forward: Forward, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Over the rows of a microbatch on one place of the data axis: the sum over tokens that
        carries the gradient, float32 [], undivided (the step divides once by the weight of the
        whole batch); and the negative log-likelihood of every target, float32 [B, T], to be logged.
        """
        ...
