"""One optimizer step, and the forward pass that evaluation uses.

    for each microbatch: gradient of the *sum* of weighted token losses, added up in float32
    divide once by the sum of all token weights
    guard, clip, AdamW, schedule (lm/optim.py) -> parameters

so a token counts the same whatever microbatch or device it falls on. Microbatch i of A takes rows
i, i + A, i + 2A, ...: every device keeps working on its own rows.

The gradient is formed inside a shard_map over the data axis and reduced after the last microbatch,
once, into the layout of the optimizer state: an all-reduce, under ZeRO-1 a reduce-scatter.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import shard
from lm import loss as loss_lib
from lm import optim, schedules
from lm.data.batch import Batch, byte_weights
from lm.model import Model
from lm.mup import Multipliers
from lm.schedules import Schedule
from lm.state import TrainState

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a step is made of; all static. `infos` is the tree of ParamInfo, `gradients` one of
    NamedSharding; `host_state` that of the optimizer state, if it waits in host memory.
    """

    model: Model
    tx: optax.GradientTransformationExtraArgs
    infos: Any
    schedule: Schedule
    multipliers: Multipliers
    tokens_per_step: int
    accumulation: int
    mesh: Mesh
    loss: loss_lib.LossOptions
    gradients: Any
    host_state: Any


class Sums(NamedTuple):
    """Over tokens: objective and weights; and of what is text (no end of text): nats and UTF-8
    bytes. float32 [].
    """

    objective: jax.Array
    nll: jax.Array
    text_nll: jax.Array
    text_bytes: jax.Array


def score(parts: Parts, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of every target, float32 [B, T], and whether no other token was
    likelier, bool [B, T]; padding included, weigh it.
    """
    hidden, head = _hidden(parts, params, batch)
    return loss_lib.score(hidden, head, batch.targets, parts.mesh, parts.loss)


def create(parts: Parts) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """`step(state, batch, token_bytes int32 [vocab]) -> state, metrics`; pure, to be jitted with
    `state` donated.
    """

    def step(state: TrainState, batch: Batch, token_bytes: jax.Array) -> tuple[TrainState, Metrics]:
        weight = jnp.maximum(jnp.sum(batch.loss_weights), 1.0)
        grads, sums = _gradient(parts, state.params, batch, token_bytes)
        grads = jax.tree.map(lambda g: g / weight, grads)
        loss = sums.objective / weight
        extra = {"step": state.step, "loss": loss}
        before = _on_device(parts, state.opt_state)
        updates, opt_state = parts.tx.update(grads, before, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        guard = typing.cast(optim.OptState, opt_state).guard
        metrics = _metrics(parts, state, sums, weight, (grads, updates, params, guard))
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def _on_device(parts: Parts, opt_state: Any) -> Any:
    if parts.host_state is None:
        return opt_state
    near = lambda x, far: jax.device_put(x, far.with_memory_kind("device"))
    return jax.tree.map(near, opt_state, parts.host_state)


def _objective(parts: Parts, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    hidden, head = _hidden(parts, params, batch)
    return loss_lib.objective(
        hidden, head, batch.targets, batch.loss_weights, parts.mesh, parts.loss
    )


def _hidden(parts: Parts, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    variables = {"params": params}
    hidden, _ = parts.model.apply(variables, batch.tokens, batch.segment_ids, batch.positions)
    return hidden, typing.cast(jax.Array, parts.model.apply(variables, method="head"))


def _gradient(parts: Parts, params: Any, batch: Batch, token_bytes: jax.Array) -> tuple[Any, Sums]:
    """Over the whole batch, laid out as `parts.gradients`."""
    local = functools.partial(_local_gradient, parts)
    if parts.mesh.shape["data"] == 1:
        return local(params, batch, token_bytes)
    places = jax.tree.map(_place, parts.gradients)
    is_place = lambda leaf: isinstance(leaf, _Place)
    specs = lambda name: jax.tree.map(lambda p: getattr(p, name), places, is_leaf=is_place)

    def reduced(grads: Any) -> Any:
        return jax.tree.map(lambda place, x: place.reduce(x), places, grads, is_leaf=is_place)

    def summed(params: Any, batch: Batch, token_bytes: jax.Array) -> tuple[Any, Sums]:
        grads, sums = local(params, batch, token_bytes)
        # Over every axis: where some are left to the compiler it gathers what it should scatter.
        mesh, _ = shard.here(parts.mesh, {})
        inner = shard.wrap(reduced, mesh, (specs("held"),), specs("scattered"))
        return inner(grads), jax.lax.psum(sums, "data")

    grads, sums = jax.shard_map(
        summed,
        mesh=parts.mesh,
        in_specs=(P(), P("data"), P()),
        out_specs=(specs("over_data"), P()),
        # An axis of one device splits nothing, and a kernel wants no axis left to the compiler.
        axis_names={"data"} | {axis for axis, size in parts.mesh.shape.items() if size == 1},
        check_vma=False,
    )(params, batch, token_bytes)
    whole = jax.tree.map(lambda x, like: x.reshape(like.shape), grads, params)
    return jax.lax.with_sharding_constraint(whole, parts.gradients), sums


class _Place(NamedTuple):
    """How a gradient, laid out as `held` over the other axes, is summed over the data axis: whole
    where `axis` is None; else scattered along that dimension, which then is two, what the other
    axes make of it and what the data axis makes of that: `scattered`, `over_data`.
    """

    axis: int | None
    held: P
    scattered: P
    over_data: P

    def reduce(self, x: jax.Array) -> jax.Array:
        """Of what a device holds."""
        if self.axis is None:
            return jax.lax.psum(x, "data")
        lead, rest = x.shape[: self.axis], x.shape[self.axis + 1 :]
        # What follows as one dimension: the TPU compiler makes an all-reduce of more.
        rows = x.reshape(*lead, x.shape[self.axis], math.prod(rest))
        part = jax.lax.psum_scatter(rows, "data", scatter_dimension=self.axis, tiled=True)
        return part.reshape(*lead, 1, -1, *rest)


def _place(sharding: NamedSharding) -> _Place:
    """From a layout with the data axis at most once, as the inner axis of a dimension."""
    entries = [shard.axes(sharding.spec, i) for i in range(len(sharding.spec))]
    axis = next((i for i, names in enumerate(entries) if "data" in names), None)
    held = [tuple(name for name in names if name != "data") or None for names in entries]
    if axis is None:
        return _Place(None, P(*held), P(*held), P())
    split = P(*held[: axis + 1], None, *held[axis + 1 :])
    return _Place(axis, P(*held), split, P(*(None for _ in held[: axis + 1]), "data"))


def _local_gradient(
    parts: Parts, params: Any, batch: Batch, token_bytes: jax.Array
) -> tuple[Any, Sums]:
    """Over the rows of one place of the data axis."""

    def sums(params: Any, part: Batch) -> tuple[jax.Array, Sums]:
        objective, nll = _objective(parts, params, part)
        text, size = byte_weights(part, token_bytes)
        return objective, Sums(
            objective, jnp.sum(nll * part.loss_weights), jnp.sum(nll * text), jnp.sum(size)
        )

    grad = jax.grad(sums, has_aux=True)
    if parts.accumulation == 1:
        return grad(params, batch)

    def body(carry: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, grad(params, part)), None

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(
            x.shape[0] // parts.accumulation, parts.accumulation, *x.shape[1:]
        ).swapaxes(0, 1)

    zero = jax.tree.map(jnp.zeros_like, params), Sums(*[jnp.float32(0)] * 4)
    return jax.lax.scan(body, zero, jax.tree.map(split, batch))[0]


def _metrics(
    parts: Parts, state: TrainState, sums: Sums, weight: jax.Array, after: tuple[Any, ...]
) -> Metrics:
    grads, updates, params, guard = after
    bits = sums.text_nll / jnp.log(2.0)
    metrics = {
        "train/loss": sums.objective / weight,
        "train/nll": sums.nll / weight,
        "train/bpb": bits / jnp.maximum(sums.text_bytes, 1.0),
        "optim/grad_norm": optax.tree.norm(grads),
        "optim/skipped_total": guard.skipped_total,
        "optim/skipped_in_row": guard.skipped_in_row,
    }
    tokens = schedules.tokens_seen(state.step, parts.tokens_per_step)
    rates = optim.learning_rates(parts.schedule, parts.multipliers, parts.infos, tokens)
    groups = {
        "lr": rates,
        "update_norm": optim.group_norms(updates, parts.infos),
        "param_norm": optim.group_norms(params, parts.infos),
    }
    return metrics | {
        f"{group}/{role}": x for group, values in groups.items() for role, x in values.items()
    }
