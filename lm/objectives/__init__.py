"""Objectives: what a step minimises, one file each, found by listing this folder.

A file holds one frozen dataclass, named as the file in camel case, whose fields with defaults are
its options, with the methods of `Objective`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import jax

from lm.data.batch import Batch


class Hidden(NamedTuple):
    """What the model makes of a batch: hidden states [B, T, D], ready for the head; the head
    [vocab, D]; the losses that layers add, each a sum over tokens (lm/modules/losses.py).
    """

    states: jax.Array
    head: jax.Array
    losses: dict[str, jax.Array]


class Found(NamedTuple):
    """What an objective makes of a batch: the sum over tokens that carries the gradient, float32
    [], undivided (the step divides once by the weight of the whole batch); the negative
    log-likelihood of every target, float32 [B, T], to be logged; and losses by name, float32 [],
    that the step adds to the sum and logs: those of layers, and any of the objective's own.
    """

    total: jax.Array
    nll: jax.Array
    losses: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Forward:
    """What an objective may ask of a step.

    `hidden(params, batch)`: the forward pass. `loss(hidden, head, targets, weights)`: the sum of
    weighted token losses, float32 [], and the negative log-likelihood of every target, float32
    [B, T] (lm/loss.py). `key`: of this step, microbatch and place of the data axis, for what is
    drawn. `frozen`: arrays that are not trained, as the step was given them (lm/state.py).
    """

    hidden: Callable[[Any, Batch], Hidden]
    loss: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    key: jax.Array
    frozen: Any


class Objective(Protocol):
    """`is_causal`: it predicts tokens that a mixer must not see."""

    is_causal: ClassVar[bool]

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; read before any device is touched."""
        ...

    def __call__(self, forward: Forward, params: Any, batch: Batch) -> Found:
        """Over the rows of a microbatch on one place of the data axis."""
        ...
