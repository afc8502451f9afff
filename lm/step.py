"""One optimizer step, and the forward pass that evaluation uses.

    for each microbatch: gradient of the *sum* of weighted token losses, added up in float32
    divide once by the sum of all token weights
    guard, clip, AdamW, schedule (lm/optimizers) -> parameters

so a token counts the same whatever microbatch or device it falls on. Microbatch i of A takes rows
i, i + A, i + 2A, ...: every device keeps working on its own rows.

The gradient is formed inside a shard_map over the data axis and reduced after the last microbatch,
once, into the layout of the optimizer state (lm/parallel/reduction.py).
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lm import loss as loss_lib
from lm import optimizers, schedules
from lm.config import Config
from lm.data.batch import Batch, byte_weights
from lm.loss import LossOptions
from lm.model import Model
from lm.objectives import Forward
from lm.parallel import reduction, sharding
from lm.schedules import Schedule
from lm.state import TrainState

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """What a step is made of, all static. `infos` is the tree of ParamInfo; `abstract_state`
    carries shapes, dtypes and shardings.
    """

    config: Config
    model: Model
    infos: Any
    schedule: Schedule
    tx: optax.GradientTransformationExtraArgs
    abstract_state: TrainState

    @property
    def mesh(self) -> Mesh:
        return self.model.context.mesh

    @property
    def gradients(self) -> Any:
        """The layout of the gradient that updates the parameters, a tree of NamedSharding."""
        return sharding.moments(self.infos, self.mesh, self.config.mesh)

    @property
    def loss(self) -> LossOptions:
        context, config = self.model.context, self.config
        axes = {**context.rules, "D": context.weights.get("D", ())}
        vocab_size, dtype = config.data.tokenizer.vocab_size, context.numerics.operand_dtype
        return LossOptions.create(config.loss, vocab_size, dtype, axes)


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

    local = functools.partial(_local_gradient, parts)
    gradient = reduction.over_data(local, parts.mesh, parts.gradients)

    def step(state: TrainState, batch: Batch, token_bytes: jax.Array) -> tuple[TrainState, Metrics]:
        weight = jnp.maximum(jnp.sum(batch.loss_weights), 1.0)
        grads, sums = gradient(state.params, batch, token_bytes)
        grads = jax.tree.map(lambda g: g / weight, grads)
        loss = sums.objective / weight
        extra = {"step": state.step, "loss": loss}
        before = _on_device(parts, state.opt_state)
        updates, opt_state = parts.tx.update(grads, before, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        guard = typing.cast(optimizers.OptState, opt_state).guard
        metrics = _metrics(parts, state, sums, weight, (grads, updates, params, guard))
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def _on_device(parts: Parts, opt_state: Any) -> Any:
    if parts.config.optimizer.memory == "device":
        return opt_state
    near = lambda x, far: jax.device_put(x, far.sharding.with_memory_kind("device"))
    return jax.tree.map(near, opt_state, parts.abstract_state.opt_state)


def _hidden(parts: Parts, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    variables = {"params": params}
    hidden, _ = parts.model.apply(variables, batch.tokens, batch.segment_ids, batch.positions)
    return hidden, typing.cast(jax.Array, parts.model.apply(variables, method="head"))


def _local_gradient(
    parts: Parts, params: Any, batch: Batch, token_bytes: jax.Array
) -> tuple[Any, Sums]:
    """Over the rows of one place of the data axis."""
    loss = functools.partial(loss_lib.objective, mesh=parts.mesh, options=parts.loss)
    forward = Forward(hidden=functools.partial(_hidden, parts), loss=loss)

    def sums(params: Any, part: Batch) -> tuple[jax.Array, Sums]:
        objective, nll = parts.config.objective(forward, params, part)
        text, size = byte_weights(part, token_bytes)
        return objective, Sums(
            objective, jnp.sum(nll * part.loss_weights), jnp.sum(nll * text), jnp.sum(size)
        )

    grad = jax.grad(sums, has_aux=True)
    count = parts.config.run.accumulation
    if count == 1:
        return grad(params, batch)

    def body(carry: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, grad(params, part)), None

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

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
    tokens = schedules.tokens_seen(state.step, parts.config.tokens_per_step)
    rates = optimizers.learning_rates(
        parts.schedule, parts.model.context.multipliers, parts.infos, tokens
    )
    groups = {
        "lr": rates,
        "update_norm": optimizers.group_norms(updates, parts.infos),
        "param_norm": optimizers.group_norms(params, parts.infos),
    }
    return metrics | {
        f"{group}/{role}": x for group, values in groups.items() for role, x in values.items()
    }
