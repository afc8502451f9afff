"""One optimizer step, and the forward pass that evaluation uses.

    for each microbatch: gradient of the *sum* of weighted token losses, added up in float32
    divide once by the sum of all token weights
    guard, clip, optimizer, schedule (lm/optimizers) -> parameters

so a token counts the same whatever microbatch or device it falls on. Microbatch i of A takes rows
i, i + A, i + 2A, ...: every device keeps working on its own rows. Losses that layers add are losses
of tokens too (lm/modules/losses.py). Modules that draw have a key of this step, place of the data
axis and microbatch: the same when a run is resumed, on any devices of the other axes.

The gradient is formed inside a shard_map over the data axis and reduced after the last microbatch,
once, into the layout of the optimizer state (lm/parallel/reduction.py).
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from lm import loss as loss_lib
from lm import optimizers
from lm import state as state_lib
from lm.config import Config
from lm.data.batch import Batch, byte_weights
from lm.data.config import DataConfig
from lm.laws import critical_batch
from lm.loss import LossOptions
from lm.model import DROPOUT, FROZEN, Model
from lm.modules.losses import weighted
from lm.objectives import Forward, Found, Hidden
from lm.parallel import reduction, sharding
from lm.schedules import Curve, Schedule
from lm.state import NOTHING, Frozen, TrainState

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
    def numbers(self) -> Numbers:
        """Of this configuration, on the host."""
        multipliers, peak = self.model.context.multipliers, self.schedule.peak
        decay = optimizers.decays(self.config.optimizer, multipliers, peak)
        start, end, _ = map(np.float32, self.schedule.phases)
        stable = (start, end) if self.config.optimizer.hypergradient else None
        return Numbers(np.uint32(self.config.seed), self.schedule.curve, decay, stable)

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


class Numbers(NamedTuple):
    """What a step takes as arguments, so that runs which differ in it alone share one compilation:
    `seed` uint32 [], the learning rate as a function of tokens, the weight decay of every role, and
    with a hypergradient the tokens at which the stable phase begins and ends.
    """

    seed: Any
    schedule: Curve
    decay: Mapping[str, Any]
    stable: tuple[Any, Any] | None


class Noise(NamedTuple):
    """Of the gradients of the parts of a batch: microbatches, on each place of the data axis.
    `squares`: sum over parts of |sum of token gradients|^2 / weight of the tokens; `count`: parts
    of a weight that is not 0. float32 [].

    With W the weight of the batch, squares / W is the mean of |g_k|^2 over the parts, by weight,
    and its expectation |G|^2 + tr(Sigma) count / W: that of parts of W / count tokens. This is
    exact where tokens have weight 0 or 1, whatever number of them each part has, and their
    gradients are drawn alike and independently. Tokens of a document are not, so that the noise of
    a batch of longer rows counts as that of its tokens.
    """

    squares: jax.Array
    count: jax.Array


class Sums(NamedTuple):
    """Over tokens: objective and weighted nats; of what is text (no end of text) nats and UTF-8
    bytes; and the losses of layers, which `objective` has in it. float32 []. `noise`: None where
    the log has none.
    """

    objective: jax.Array
    nll: jax.Array
    text_nll: jax.Array
    text_bytes: jax.Array
    losses: dict[str, jax.Array]
    noise: Noise | None = None


class Given(NamedTuple):
    """What a gradient reads besides parameters and batch: UTF-8 bytes of each id, int32 [vocab];
    a key for the modules that draw; and what is frozen.
    """

    token_bytes: jax.Array
    key: jax.Array
    frozen: Frozen


def score(
    parts: Parts, params: Any, batch: Batch, frozen: Frozen = NOTHING
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of every target, float32 [B, T], and whether no other token was
    likelier, bool [B, T]; padding included, weigh it. Nothing is drawn and no layer adds a loss.
    """
    hidden, _ = parts.model.apply(_variables(params, frozen), *_inputs(batch))
    head = _head(parts, params)
    return loss_lib.score(hidden, head, batch.targets, parts.mesh, parts.loss)


def create(parts: Parts) -> Callable[..., tuple[TrainState, Metrics]]:
    """`step(state, batch, token_bytes int32 [vocab], numbers, frozen) -> state, metrics`; pure, to
    be jitted with `state` donated.
    """

    local = functools.partial(_local_gradient, parts)
    gradient = reduction.over_data(local, parts.mesh, parts.gradients)

    def step(
        state: TrainState,
        batch: Batch,
        token_bytes: jax.Array,
        numbers: Numbers,
        frozen: Frozen = NOTHING,
    ) -> tuple[TrainState, Metrics]:
        weight = jnp.maximum(jnp.sum(batch.loss_weights), 1.0)
        key = jax.random.fold_in(jax.random.key(numbers.seed), state.step)
        given = Given(token_bytes, key, frozen)
        grads, sums = gradient(state.params, batch, given)
        grads = jax.tree.map(lambda g: g / weight, grads)
        seen = state_lib.as_float(state.tokens)
        rows, time = batch.tokens.shape
        rate = _of_batch(parts.config.data, rows, numbers.schedule(seen))
        extra = {"loss": sums.objective / weight, "rate": rate, "decay": numbers.decay}
        if numbers.stable is not None:
            start, end = numbers.stable
            extra["adapts"] = (seen >= start) & (seen < end)
        before = _on_device(parts, state.opt_state)
        updates, opt_state = parts.tx.update(grads, before, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        after = typing.cast(optimizers.OptState, opt_state)
        metrics = _metrics(parts, sums, weight, rate, (grads, updates, params, after))
        tokens = state_lib.added(state.tokens, rows * time)
        counts = state.step + 1, tokens, state_lib.added(state.rows, rows)
        return TrainState(counts[0], params, opt_state, *counts[1:]), metrics

    return step


def _of_batch(data: DataConfig, rows: int, rate: jax.Array) -> jax.Array:
    """The learning rate of a batch that may not have grown to its size yet."""
    factor = (rows / data.batch_size) ** data.batch_warmup.rate_exponent
    return rate if factor == 1.0 else rate * np.float32(factor)


def _on_device(parts: Parts, opt_state: Any) -> Any:
    if parts.config.optimizer.memory == "device":
        return opt_state
    near = lambda x, far: jax.device_put(x, far.sharding.with_memory_kind("device"))
    return jax.tree.map(near, opt_state, parts.abstract_state.opt_state)


def _objective(parts: Parts, params: Any, batch: Batch, given: Given) -> tuple[jax.Array, Found]:
    """The sum over tokens that is differentiated, losses of layers included, and its parts."""
    model_key, own_key = jax.random.split(given.key)

    def hidden(params: Any, batch: Batch) -> Hidden:
        variables, rngs = _variables(params, given.frozen), {DROPOUT: model_key}
        found: Any = parts.model.apply(variables, *_inputs(batch), rngs=rngs, method="train")
        states, losses = found
        return Hidden(states, _head(parts, params), weighted(losses, batch.loss_weights))

    loss = functools.partial(loss_lib.objective, mesh=parts.mesh, options=parts.loss)
    forward = Forward(hidden=hidden, loss=loss, key=own_key, frozen=given.frozen.objective)
    found = Found(*parts.config.objective(forward, params, batch))
    return functools.reduce(jnp.add, found.losses.values(), found.total), found


def _variables(params: Any, frozen: Frozen) -> dict[str, Any]:
    return {"params": params} | ({} if frozen.model is None else {FROZEN: frozen.model})


def _inputs(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    return batch.tokens, batch.segment_ids, batch.positions


def _head(parts: Parts, params: Any) -> jax.Array:
    return typing.cast(jax.Array, parts.model.apply({"params": params}, method="head"))


def _local_gradient(parts: Parts, params: Any, batch: Batch, given: Given) -> tuple[Any, Sums]:
    """Over the rows of one place of the data axis. A key of its own goes to every place of the data
    axis and to every microbatch, so that what is drawn depends on the number of both.
    """
    place = jax.lax.axis_index("data") if parts.mesh.shape["data"] > 1 else 0
    key = jax.random.fold_in(given.key, place)

    def sums(params: Any, part: Batch, index: ArrayLike) -> tuple[jax.Array, Sums]:
        own = given._replace(key=jax.random.fold_in(key, index))
        objective, found = _objective(parts, params, part, own)
        text, size = byte_weights(part, given.token_bytes)
        nats = jnp.sum(found.nll * part.loss_weights), jnp.sum(found.nll * text)
        return objective, Sums(objective, *nats, jnp.sum(size), found.losses)

    def grad(params: Any, part: Batch, index: ArrayLike) -> tuple[Any, Sums]:
        grads, found = jax.grad(sums, has_aux=True)(params, part, index)
        if has_noise:
            found = found._replace(noise=_noise(grads, jnp.sum(part.loss_weights)))
        return grads, found

    has_noise = parts.config.log.gradient_noise
    count = parts.config.run.accumulation
    if count == 1:
        return grad(params, batch, 0)

    def body(carry: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        grads, found = grad(params, *part)
        return jax.tree.map(jnp.add, carry, (grads, found._replace(losses={}))), found.losses

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    noise = Noise(*[jnp.float32(0)] * 2) if has_noise else None
    zero = jax.tree.map(jnp.zeros_like, params), Sums(*[jnp.float32(0)] * 4, losses={}, noise=noise)
    microbatches = jax.tree.map(split, batch), jnp.arange(count)
    (grads, found), losses = jax.lax.scan(body, zero, microbatches)
    return grads, found._replace(losses={k: jnp.sum(loss) for k, loss in losses.items()})


def _noise(grads: Any, weight: jax.Array) -> Noise:
    """Of one part: its gradient, summed over tokens, and their weight."""
    is_there = weight > 0
    square = optax.tree.norm(grads, squared=True) / jnp.where(is_there, weight, 1.0)
    return Noise(jnp.where(is_there, square, 0.0), is_there.astype(jnp.float32))


def _noise_metrics(noise: Noise, weight: jax.Array, norm: jax.Array) -> Metrics:
    """Estimates from one step, |G|^2 and tr(Sigma) in tokens, both unbiased and either of any sign;
    their ratio; and the batch in tokens that the norm test asks for. Average the first two over
    steps before dividing (lm/laws/critical_batch.py: smoothed).
    """
    square = jnp.square(norm)
    sizes = weight / noise.count, weight
    signal, trace = critical_batch.signal_and_noise(*sizes, noise.squares / weight, square)
    return {
        "noise/grad_sq": signal,
        "noise/trace": trace,
        "noise/scale": trace / signal,
        "noise/norm_test": critical_batch.norm_test(trace, square),
    }


def _metrics(
    parts: Parts, sums: Sums, weight: jax.Array, rate: jax.Array, after: tuple[Any, ...]
) -> Metrics:
    grads, updates, params, opt_state = after
    guard, multiplier = opt_state.guard, opt_state.multiplier
    bits = sums.text_nll / jnp.log(2.0)
    metrics = {
        "train/loss": sums.objective / weight,
        "train/nll": sums.nll / weight,
        "train/bpb": bits / jnp.maximum(sums.text_bytes, 1.0),
        "optim/grad_norm": optax.tree.norm(grads),
        "optim/skipped_total": guard.skipped_total,
        "optim/skipped_in_row": guard.skipped_in_row,
    } | {f"aux/{name}": loss / weight for name, loss in sums.losses.items()}
    if multiplier is not None:
        metrics["optim/hypergradient"], rate = multiplier, rate * multiplier
    if sums.noise is not None:
        metrics |= _noise_metrics(sums.noise, weight, metrics["optim/grad_norm"])
    groups = {
        "lr": optimizers.learning_rates(rate, parts.model.context.multipliers, parts.infos),
        "update_norm": optimizers.group_norms(updates, parts.infos),
        "param_norm": optimizers.group_norms(params, parts.infos),
    }
    return metrics | {
        f"{group}/{role}": x for group, values in groups.items() for role, x in values.items()
    }
