"""Objectives: what a step minimizes. There is one file for each, found by listing this folder.

A file holds one frozen dataclass, named like the file in camel case, with the methods of
`Objective`. Its fields with defaults are its options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import jax

from lm.data.batch import Batch


class Hidden(NamedTuple):
    """The model's output for a batch: hidden `states` [B, T, D], ready for the head; the `head`
    [vocab, D]; and the `losses` that layers add, each a sum over tokens (lm/modules/losses.py).
    """

    states: jax.Array
    head: jax.Array
    losses: dict[str, jax.Array]


class Found(NamedTuple):
    """The value of an objective for a batch.

    `total`, float32 [], is the sum over tokens that carries the gradient. It is not divided: the
    step divides once by the weight of the whole batch. `nll`, float32 [B, T], is the negative
    log-likelihood of every target, and is only logged. `losses`, float32 [] by name, are added to
    the sum and logged: those of layers, and any of the objective's own.
    """

    total: jax.Array
    nll: jax.Array
    losses: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Forward:
    """What an objective may ask of a step.

    `hidden(params, batch)`: the forward pass. `loss(hidden, head, targets, weights)`: the sum of
    weighted token losses, float32 [], and the negative log-likelihood of every target, float32
    [B, T] (lm/loss.py). `key`: the key for random numbers, which differs by step, microbatch and
    place on the data axis. `frozen`: the step's arrays that are not trained (lm/state.py).
    """

    hidden: Callable[[Any, Batch], Hidden]
    loss: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    key: jax.Array
    frozen: Any


class Objective(Protocol):
    """`is_causal`: the objective predicts tokens that a mixer must not see."""

    is_causal: ClassVar[bool]

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; asked before any device is touched."""
        ...

    def __call__(self, forward: Forward, params: Any, batch: Batch) -> Found:
        """The value for the rows of one microbatch on one place of the data axis."""
        ...
