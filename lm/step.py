"""One optimizer step, and the forward pass that evaluation uses.

    for each microbatch: gradient of the *sum* of weighted token losses, added up in float32
    divide once by the sum of all token weights
    guard, clip, optimizer, schedule (lm/optimizers) -> parameters

A token therefore counts the same whatever microbatch or device it falls on. Microbatch i of A takes
rows i, i + A, i + 2A, ..., so every device keeps working on its own rows. Losses that layers add
count per token too (lm/modules/losses.py). Modules that draw random numbers get a key for this
step, place on the data axis and microbatch. So they draw the same when a run is resumed, whatever
the sizes of the other mesh axes. The gradient is formed inside a shard_map over the data axis.
After the last microbatch it is reduced once, into the layout of the optimizer state
(lm/parallel/reduction.py).
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
    """What a step is made of, all static. `infos` is the tree of ParamInfo. `abstract_state` has
    shapes, dtypes and shardings.
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
        """The numbers of this configuration, on the host."""
        multipliers, peak = self.model.context.multipliers, self.schedule.peak
        decay = optimizers.decays(self.config.optimizer, multipliers, peak)
        start, end, _ = map(np.float32, self.schedule.phases)
        stable = (start, end) if self.config.optimizer.hypergradient else None
        return Numbers(np.uint32(self.config.seed), self.schedule.curve, decay, stable)

    @property
    def gradients(self) -> Any:
        """The layout of the gradient that updates the parameters: a tree of NamedSharding."""
        return sharding.moments(self.infos, self.mesh, self.config.mesh)

    @property
    def loss(self) -> LossOptions:
        context, config = self.model.context, self.config
        axes = {**context.rules, "D": context.weights.get("D", ())}
        vocab_size, dtype = config.data.tokenizer.vocab_size, context.numerics.operand_dtype
        return LossOptions.create(config.loss, vocab_size, dtype, axes)


class Numbers(NamedTuple):
    """What a step takes as arguments, so that runs which differ only in these share one
    compilation: `seed` uint32 [], the learning rate as a function of tokens, and the weight decay
    of every group. With a hypergradient also `stable`, the tokens at which the stable phase begins
    and ends.
    """

    seed: Any
    schedule: Curve
    decay: Mapping[str, Any]
    stable: tuple[Any, Any] | None


class Noise(NamedTuple):
    """Statistics over the parts of a batch: the microbatches on each place of the data axis.
    `squares`: sum over parts of |sum of token gradients|^2 / weight of the tokens. `count`: number
    of parts whose weight is not 0. Both float32 [].

    With W the weight of the batch, squares / W is the mean of |g_k|^2 over the parts, by weight.
    Its expectation is |G|^2 + tr(Sigma) count / W, as for parts of W / count tokens each. This is
    exact if tokens have weight 0 or 1 and their gradients are independent and identically
    distributed, however many tokens each part has. Tokens of one document are not independent, so
    longer rows change the noise that is measured per token.
    """

    squares: jax.Array
    count: jax.Array


class Sums(NamedTuple):
    """Sums over tokens, float32 []: objective, weighted nats, nats and UTF-8 bytes of text (end of
    text excluded), and the losses of layers, which `objective` includes. `noise` is None if the log
    does not ask for it.
    """

    objective: jax.Array
    nll: jax.Array
    text_nll: jax.Array
    text_bytes: jax.Array
    losses: dict[str, jax.Array]
    noise: Noise | None = None


class Given(NamedTuple):
    """What a gradient reads besides parameters and batch: UTF-8 bytes of each id, int32 [vocab]; a
    random key for modules that draw; and frozen arrays.
    """

    token_bytes: jax.Array
    key: jax.Array
    frozen: Frozen


def score(
    parts: Parts, params: Any, batch: Batch, frozen: Frozen = NOTHING
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of every target, float32 [B, T], and whether no other token was
    likelier, bool [B, T]. Padding is included: weight it by zero. Nothing is drawn at random, and
    layers add no losses.
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
    """The learning rate of a batch, which may still be growing to its full size."""
    factor = (rows / data.batch_size) ** data.batch_warmup.rate_exponent
    return rate if factor == 1.0 else rate * np.float32(factor)


def _on_device(parts: Parts, opt_state: Any) -> Any:
    if parts.config.optimizer.memory == "device":
        return opt_state
    near = lambda x, far: jax.device_put(x, far.sharding.with_memory_kind("device"))
    return jax.tree.map(near, opt_state, parts.abstract_state.opt_state)


def _objective(parts: Parts, params: Any, batch: Batch, given: Given) -> tuple[jax.Array, Found]:
    """The sum over tokens that is differentiated, including losses of layers; and its parts."""
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
    """The gradient over the rows of one place on the data axis. Each place and each microbatch has
    its own key, so what is drawn depends on the number of both.
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
    """The noise statistics of one part, from its gradient summed over tokens and their weight."""
    is_there = weight > 0
    square = optax.tree.norm(grads, squared=True) / jnp.where(is_there, weight, 1.0)
    return Noise(jnp.where(is_there, square, 0.0), is_there.astype(jnp.float32))


def _noise_metrics(noise: Noise, weight: jax.Array, norm: jax.Array) -> Metrics:
    """Estimates from one step: |G|^2 and tr(Sigma) in tokens, both unbiased and of either sign;
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
