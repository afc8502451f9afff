"""Optimizers with per-role multipliers under one schedule, and a guard against bad steps. There is
one file per optimizer, found by listing this folder.

Order of steps, all in float32:

    clip by global norm -> the optimizer's direction -> + weight decay of the parameters that
    declare it -> * learning-rate factor of the role -> * -schedule(tokens)

With `hypergradient`, the last factor has a multiplier that adapts (_hypergradient.py).

A file holds one frozen dataclass, named like the file in camel case, which derives from
`Optimizer`. Its fields with defaults are its options, and `direction(infos)` turns a gradient into
a direction. An optax transformation becomes one by `unless_skipped`; one that takes norms of
matrices also needs `per_layer` of lm/optimizers/_layers.py.

`update` is given the learning rate at the tokens seen, so a skipped step does not delay it, and the
weight decay of each group of parameters (`Multipliers.group`: mostly the role). Every group follows
the same curve; only static factors differ (lm/mup.py).

The guard skips a step whose loss, gradient norm or update is not finite, or whose gradient norm
exceeds spike_ratio times its running mean over accepted steps. A skipped step leaves every bit of
the parameters and moments unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import params as params_lib
from lm.mapping import BELOW_ONE, FREE, NOT_NEGATIVE, POSITIVE, Later
from lm.mup import ROLES, Multipliers
from lm.optimizers._hypergradient import HypergradientState, adapted
from lm.params import ParamInfo, Role

SPIKE_WARMUP = 20  # accepted steps before a norm can count as a spike
SPIKE_MEMORY = 100  # steps of the running mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The base of every optimizer.

    Attributes:
      weight_decay: coefficient of the weight decay, for the parameters that declare it
      weight_decay_mode: what the coefficient is multiplied by (lm/mup.py)
      clip_norm: largest norm of the whole gradient; a larger gradient is scaled down to it
      spike_ratio: a step is skipped if its gradient norm is this many times the running mean; 0:
        only steps that are not finite are skipped
      max_skipped: number of skipped steps in a row that stops the run
      memory: where the moments are kept between steps
      hypergradient: how fast a multiplier of the learning rate follows its own gradient, kappa of
        _hypergradient.py, as 0.1; 0: there is no multiplier
    """

    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.1
    weight_decay_mode: Literal["coupled", "independent", "width_invariant"] = "coupled"
    clip_norm: Annotated[float, POSITIVE] = 1.0
    spike_ratio: Annotated[float, NOT_NEGATIVE] = 20.0
    max_skipped: Annotated[int, POSITIVE] = 10
    memory: Annotated[Literal["device", "host"], FREE] = "device"
    hypergradient: Annotated[float, NOT_NEGATIVE, BELOW_ONE, Later(0.0)] = 0.0

    # The direction already contains the weight decay (`add_decay`), for example to normalize it.
    decay_inside: ClassVar[bool] = False
    # Scaling the gradient does not change the direction, apart from an eps. False where a vector's
    # direction is its gradient (lm/mup.py).
    is_scale_free: ClassVar[bool] = True

    @property
    def width_exponent(self) -> float:
        """The exponent of the width in the learning rate of hidden matrices under muP. W x must
        change equally much at any width. It is -1 where the entries of the direction have one size
        and add up along x, as Adam's do (arXiv 2203.03466, table 3).
        """
        return -1.0

    def problem(self) -> str | None:
        """What is wrong with these options, in one line; asked before any device is touched."""
        return None

    def direction(self, infos: Any) -> optax.GradientTransformationExtraArgs:
        """Clipped gradient -> direction, before weight decay and learning rate. `update` is given
        `good`, bool []: where it is False, no bit of the state may change. `infos` is the tree of
        ParamInfo (letters, shape, role), for optimizers that treat matrices by their shape.
        """
        raise NotImplementedError


class GuardState(NamedTuple):
    """The running mean of the gradient norm over accepted steps, and counts of accepted and skipped
    steps."""

    norm_mean: jax.Array
    good_steps: jax.Array
    skipped_total: jax.Array
    skipped_in_row: jax.Array


class OptState(NamedTuple):
    """The state of `create`; `inner` is the state of direction, weight decay and schedule."""

    inner: Any
    guard: GuardState

    @property
    def multiplier(self) -> jax.Array | None:
        """The hypergradient's multiplier of the learning rate, float32 []; None without one."""
        return self.inner.multiplier if isinstance(self.inner, HypergradientState) else None


def create(
    config: Optimizer, multipliers: Multipliers, infos: Any
) -> optax.GradientTransformationExtraArgs:
    """`update(grads, state, params, loss=scalar, rate=float32, decay=decays(...))`; with a
    hypergradient also `adapts=bool`. `infos` is the tree of ParamInfo.
    """
    parts = [config.direction(infos), _scale_groups(config, multipliers, infos)]
    if multipliers.scales_eps and config.is_scale_free:
        parts = [_in_expected_size(multipliers, infos), *parts]
    if config.hypergradient:
        inner = adapted(optax.chain(*parts), config.hypergradient)
    else:
        inner = optax.chain(*parts, _scale())
    return skip_bad_steps(inner, clip_norm=config.clip_norm, spike_ratio=config.spike_ratio)


def decays(config: Optimizer, multipliers: Multipliers, peak: float) -> dict[str, np.float32]:
    """group -> weight-decay coefficient, before the learning rate; `peak` is the largest rate."""
    decay = functools.partial(multipliers.weight_decay, config=config, peak=peak)
    return {group: np.float32(decay(group)) for group in multipliers.groups}


def decay_mode_problem(config: Optimizer) -> str | None:
    """For `problem` of an optimizer with `decay_inside`: it cannot fix how much a step shrinks."""
    if config.weight_decay_mode == "coupled":
        return None
    return (
        f"weight_decay_mode={config.weight_decay_mode!r} says how much a step shrinks a parameter, "
        "and here the decay is within what is normalised; set optimizer.weight_decay_mode='coupled'"
    )


def unless_skipped(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation as a direction; its state is kept where the step is skipped. (That
    reads and writes the state once more, which lm/optimizers/adamw.py avoids by hand.)
    """
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: Any, state: Any, params: Any = None, *, good: jax.Array, **extra: Any
    ) -> tuple[Any, Any]:
        updates, after = inner.update(updates, state, params, **extra)
        return updates, jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state)

    return optax.GradientTransformationExtraArgs(inner.init, cast(Any, update))


def add_decay(infos: Any) -> optax.GradientTransformationExtraArgs:
    """For a direction with `decay_inside`: adds decay[role] * parameter where it is declared."""

    def update(
        updates: Any, state: Any, params: Any = None, *, decay: Mapping[str, Any], **_: Any
    ) -> tuple[Any, Any]:
        decayed = lambda info, u, p: u + decay[info.role] * p if info.decay else u
        return jax.tree.map(decayed, infos, updates, params, is_leaf=params_lib.is_info), state

    return _without_state(update)


def _scale_groups(
    config: Optimizer, multipliers: Multipliers, infos: Any
) -> optax.GradientTransformationExtraArgs:
    """Weight decay and the static learning-rate factor, by group and declared decay."""

    def label(info: ParamInfo) -> str:
        group = multipliers.group(info)
        return f"{group}_decay" if info.decay else group

    groups: dict[Hashable, optax.GradientTransformation] = {}
    for info in _leaves(infos):
        group = multipliers.group(info)
        rate = optax.scale(multipliers.learning_rate(group))
        decays = info.decay and not config.decay_inside
        groups[label(info)] = optax.chain(_add_decay(group), rate) if decays else rate
    return optax.partition(groups, jax.tree.map(label, infos, is_leaf=params_lib.is_info))


def _in_expected_size(
    multipliers: Multipliers, infos: Any
) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by their expected size relative to the base model. g / c with eps equals g
    with c eps; so every optimizer with an eps gets CompleteP's eps for each group.
    """

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        factor = lambda info: 1.0 / multipliers.gradient(multipliers.group(info))
        scaled = lambda info, g: factor(info) * g
        return jax.tree.map(scaled, infos, updates, is_leaf=params_lib.is_info), state

    return _without_state(update)


def _add_decay(group: str) -> optax.GradientTransformationExtraArgs:
    """Like optax's add_decayed_weights, with the group's coefficient taken from the arguments of
    `update`.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, decay: Mapping[str, Any], **_: Any
    ) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, p: u + decay[group] * p, updates, params), state

    return _without_state(update)


def _scale() -> optax.GradientTransformationExtraArgs:
    """Scales by the learning rate that `update` is given; no separate count that could drift."""

    def update(
        updates: Any, state: Any, params: Any = None, *, rate: jax.Array, **_: Any
    ) -> tuple[Any, Any]:
        return jax.tree.map(lambda u: -rate * u, updates), state

    return _without_state(update)


def _without_state(update: Any) -> optax.GradientTransformationExtraArgs:
    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def skip_bad_steps(
    inner: optax.GradientTransformationExtraArgs, *, clip_norm: float, spike_ratio: float
) -> optax.GradientTransformationExtraArgs:
    """Clipping and the guard around `inner`. `inner` is given whether the step is `good`, and keeps
    its state if not. spike_ratio 0 guards only against values that are not finite.
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
        # -0.0 because x + -0.0 is x, even for signed zeros. A select, unlike lax.cond, fuses.
        clipped = jax.tree.map(lambda g: jnp.where(good, g * factor, -0.0), updates)
        # The update is computed twice: a sum over all of it decides whether it is written, and
        # keeping both versions of the moments for that choice would double their memory.
        trial, _ = inner.update(clipped, state.inner, params, good=jnp.bool_(True), **extra)
        good &= jnp.isfinite(optax.tree.norm(trial))
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
    """The plain mean of the first SPIKE_MEMORY norms, then an exponential mean."""
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


def learning_rates(rate: jax.Array, multipliers: Multipliers, infos: Any) -> dict[str, jax.Array]:
    """group -> learning rate when the schedule's rate is `rate`, for the groups that occur."""
    present = {multipliers.group(info) for info in _leaves(infos)}
    factor = lambda group: np.float32(multipliers.learning_rate(group))
    return {group: rate * factor(group) for group in multipliers.groups if group in present}


def group_norms(tree: Any, infos: Any) -> dict[str, jax.Array]:
    """role -> norm over all leaves with that role; for gradients, updates or parameters."""
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
