"""Optimizers with per-role multipliers under one schedule, and a guard against bad steps; one file
an optimizer, found by listing this folder.

Order of steps, all in float32:

    clip by global norm -> the optimizer's direction -> + weight decay of the parameters that
    declare it -> * learning-rate factor of the role -> * -schedule(step * tokens_per_step)

A file holds one frozen dataclass, named as the file in camel case, which derives from `Optimizer`;
its fields with defaults are its options, and `direction(infos)` is what it makes of a gradient. An
optax transformation becomes one by `unless_skipped`.

`step` is the train step, given to `update`: the schedule counts tokens seen, so a skipped step does
not delay it. Every role follows the same curve; only static factors differ (lm/mup.py).

The guard skips a step whose loss or gradient norm is not finite, or whose norm exceeds spike_ratio
times its running mean over accepted steps. A skipped step leaves parameters and moments bit for bit
as they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Annotated, Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from lm import params as params_lib
from lm.mapping import FREE, NOT_NEGATIVE, POSITIVE
from lm.mup import ROLES, Multipliers
from lm.params import ParamInfo, Role
from lm.schedules import Schedule, tokens_seen

SPIKE_WARMUP = 20  # accepted steps before a norm can count as a spike
SPIKE_MEMORY = 100  # steps the running mean looks back on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What every optimizer has. `weight_decay` is that of the parameters that declare it, in
    `weight_decay_mode` (lm/mup.py). `spike_ratio`: a gradient norm this many times its running mean
    is skipped (0: never); `max_skipped` skipped steps in a row stop the run. `memory`: where the
    moments live between steps.
    """

    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.1
    weight_decay_mode: Literal["coupled", "independent", "width_invariant"] = "coupled"
    clip_norm: Annotated[float, POSITIVE] = 1.0
    spike_ratio: Annotated[float, NOT_NEGATIVE] = 20.0
    max_skipped: Annotated[int, POSITIVE] = 10
    memory: Annotated[Literal["device", "host"], FREE] = "device"

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; read before any device is touched."""
        return None

    def direction(self, infos: Any) -> optax.GradientTransformationExtraArgs:
        """Clipped gradient -> direction, before weight decay and learning rate. `update` is given
        `good`, bool []: where it is False, the state stays bit for bit. `infos`: the tree of
        ParamInfo (letters, shape, role), for optimizers that treat matrices by their shape.
        """
        raise NotImplementedError


class GuardState(NamedTuple):
    """Running mean of the gradient norm over accepted steps, their number, numbers of skipped."""

    norm_mean: jax.Array
    good_steps: jax.Array
    skipped_total: jax.Array
    skipped_in_row: jax.Array


class OptState(NamedTuple):
    """State of `create`: `inner` is that of direction, weight decay and schedule."""

    inner: Any
    guard: GuardState


def create(
    config: Optimizer,
    multipliers: Multipliers,
    infos: Any,
    schedule: Schedule,
    tokens_per_step: int,
) -> optax.GradientTransformationExtraArgs:
    """`update(grads, state, params, step=int32, loss=scalar)`; `infos` is the tree of ParamInfo."""
    inner = optax.chain(
        config.direction(infos),
        _scale_groups(config, multipliers, infos, schedule.peak),
        _scale_by_schedule(schedule, tokens_per_step),
    )
    return skip_bad_steps(inner, clip_norm=config.clip_norm, spike_ratio=config.spike_ratio)


def unless_skipped(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation as a direction: its state stays where the step is skipped. (The state
    is read and written once more; lm/optimizers/adamw.py saves that by hand.)
    """
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: Any, state: Any, params: Any = None, *, good: jax.Array, **extra: Any
    ) -> tuple[Any, Any]:
        updates, after = inner.update(updates, state, params, **extra)
        return updates, jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state)

    return optax.GradientTransformationExtraArgs(inner.init, cast(Any, update))


def _scale_groups(
    config: Optimizer, multipliers: Multipliers, infos: Any, peak: float
) -> optax.GradientTransformationExtraArgs:
    """Weight decay and the static learning-rate factor, a group per role and declared decay."""
    groups: dict[Hashable, optax.GradientTransformation] = {}
    for info in _leaves(infos):
        rate = optax.scale(multipliers.learning_rate(info.role))
        decay = multipliers.weight_decay(info.role, config=config, peak=peak)
        groups[_label(info)] = (
            optax.chain(optax.add_decayed_weights(decay), rate) if info.decay else rate
        )
    return optax.partition(groups, jax.tree.map(_label, infos, is_leaf=params_lib.is_info))


def _label(info: ParamInfo) -> str:
    return f"{info.role}_decay" if info.decay else info.role


def _scale_by_schedule(
    schedule: Schedule, tokens_per_step: int
) -> optax.GradientTransformationExtraArgs:
    """Like optax's, but at the train step it is given: no count of its own could drift."""

    def update(
        updates: Any, state: Any, params: Any = None, *, step: jax.Array, **_: Any
    ) -> tuple[Any, Any]:
        rate = schedule(tokens_seen(step, tokens_per_step))
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), cast(Any, update)
    )


def skip_bad_steps(
    inner: optax.GradientTransformationExtraArgs, *, clip_norm: float, spike_ratio: float
) -> optax.GradientTransformationExtraArgs:
    """Clipping and the guard around `inner`, which is told whether the step is `good` and keeps its
    state if not. spike_ratio 0 guards against non-finite values only.
    """

    def init(params: Any) -> OptState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            assert leaf.dtype == jnp.float32, (
                f"{jax.tree_util.keystr(path)} is {leaf.dtype}; parameters are float32"
            )
        zero = jnp.zeros((), jnp.int32)
        return OptState(
            inner.init(params), GuardState(jnp.zeros((), jnp.float32), zero, zero, zero)
        )

    def update(
        updates: Any, state: OptState, params: Any = None, *, loss: jax.Array, **extra: Any
    ) -> tuple[Any, OptState]:
        norm = optax.tree.norm(updates)
        good = _is_good(norm, loss, state.guard, spike_ratio)
        factor = jnp.minimum(1.0, clip_norm / norm)
        # -0.0: x + -0.0 is x, signed zeros included. Selecting, unlike lax.cond, fuses.
        clipped = jax.tree.map(lambda g: jnp.where(good, g * factor, -0.0), updates)
        updates, inner_state = inner.update(clipped, state.inner, params, good=good, **extra)
        updates = jax.tree.map(lambda u: jnp.where(good, u, -0.0), updates)
        return updates, OptState(inner_state, _advance(state.guard, norm, good))

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def _is_good(norm: jax.Array, loss: jax.Array, guard: GuardState, spike_ratio: float) -> jax.Array:
    good = jnp.isfinite(norm) & jnp.isfinite(loss)
    if spike_ratio > 0:
        is_spike = (guard.good_steps >= SPIKE_WARMUP) & (norm > spike_ratio * guard.norm_mean)
        good = good & ~is_spike
    return good


def _advance(guard: GuardState, norm: jax.Array, good: jax.Array) -> GuardState:
    """The plain mean of the first SPIKE_MEMORY norms, then an exponential one."""
    count = guard.good_steps + 1
    weight = 1.0 / jnp.minimum(count, SPIKE_MEMORY).astype(jnp.float32)
    norm_mean = guard.norm_mean + (norm - guard.norm_mean) * weight
    bad = (~good).astype(jnp.int32)
    return GuardState(
        norm_mean=jnp.where(good, norm_mean, guard.norm_mean),
        good_steps=jnp.where(good, count, guard.good_steps),
        skipped_total=guard.skipped_total + bad,
        skipped_in_row=(guard.skipped_in_row + bad) * bad,
    )


def learning_rates(
    schedule: Schedule, multipliers: Multipliers, infos: Any, tokens: ArrayLike
) -> dict[str, jax.Array]:
    """role -> learning rate of the update made after `tokens` tokens, for the roles that occur."""
    rate = schedule(tokens)
    return {role: rate * np.float32(multipliers.learning_rate(role)) for role in _roles(infos)}


def group_norms(tree: Any, infos: Any) -> dict[str, jax.Array]:
    """role -> norm over all leaves of that role, for gradients, updates or parameters."""
    leaves = jax.tree.leaves(tree)
    roles = [info.role for info in _leaves(infos)]
    norms = {}
    for role in _roles(infos):
        norms[role] = optax.tree.norm([x for x, r in zip(leaves, roles, strict=True) if r == role])
    return norms


def _roles(infos: Any) -> list[Role]:
    present = {info.role for info in _leaves(infos)}
    return [role for role in ROLES if role in present]


def _leaves(infos: Any) -> list[ParamInfo]:
    return jax.tree.leaves(infos, is_leaf=params_lib.is_info)
