"""A multiplier of the learning rate that follows its own gradient (Baydin et al. 2018, arXiv
1703.04782; bounded as in FedHyper, arXiv 2310.03156), on top of any schedule:

    m_t = clip(m_{t-1} (1 + kappa cos(g_t, u_{t-1})), 1/3, 3)       m_0 = 1
    u_t = the optimizer's direction, with weight decay and the factors of the groups
    update = -m_t * schedule(tokens) * u_t

The loss after step t - 1 has the derivative -<g_t, u_{t-1}> by that step's learning rate: while a
gradient still points where the last step went, that step was too short. In one dimension and for
gradient descent the cosine is a sign, which is positive where the rate is below 1 / curvature.

The multiplier moves only in the stable phase of a schedule. It stays 1 in the warmup, and keeps its
value through a decay, even one that branches from a checkpoint: in a decay the cosine turns
positive by itself (MiniCPM, arXiv 2404.06395 [P]). Such a multiplier looks one step ahead, and the
best rate for the next step is lower than the best rate for a run (Wu et al. 2018, arXiv
1803.02021).

It costs one more array of each parameter's size, in bfloat16, laid out like a moment.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

BOUND = 3.0  # FedHyper's for the global rate, gamma_alpha [S]


class HypergradientState(NamedTuple):
    """`direction` is that of the last accepted step, a tree like the parameters, bfloat16;
    `multiplier` is float32 [].
    """

    inner: Any
    direction: Any
    multiplier: jax.Array


def adapted(
    inner: optax.GradientTransformationExtraArgs, kappa: float
) -> optax.GradientTransformationExtraArgs:
    """`inner`, which returns a direction, scaled by the learning rate and the multiplier. `update`
    is given `rate`, float32 [], and `adapts`, bool []: whether the multiplier moves.
    """

    def init(params: Any) -> HypergradientState:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params)
        return HypergradientState(inner.init(params), zeros, jnp.ones((), jnp.float32))

    def update(
        updates: Any,
        state: HypergradientState,
        params: Any = None,
        *,
        good: jax.Array,
        rate: jax.Array,
        adapts: jax.Array,
        **extra: Any,
    ) -> tuple[Any, HypergradientState]:
        direction, after = inner.update(updates, state.inner, params, good=good, **extra)
        factor = 1.0 + np.float32(kappa) * cosine(updates, state.direction)
        moved = jnp.clip(state.multiplier * factor, np.float32(1.0 / BOUND), np.float32(BOUND))
        multiplier = jnp.where(good & adapts, moved, state.multiplier)
        kept = lambda u, old: jnp.where(good, u.astype(old.dtype), old)
        left = jax.tree.map(kept, direction, state.direction)
        scale = -rate * multiplier
        scaled = jax.tree.map(lambda u: scale * u, direction)
        return scaled, HypergradientState(after, left, multiplier)

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def cosine(a: Any, b: Any) -> jax.Array:
    """The cosine of the angle between two trees of equal shapes, float32 []; 0 if one of them is
    zero. The arrays may be sharded: the sums are over whole arrays.
    """
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    wide = [(x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in pairs]
    dot = sum(jnp.sum(x * y) for x, y in wide)
    norms = optax.tree.norm([x for x, _ in wide]) * optax.tree.norm([y for _, y in wide])
    is_zero = norms == 0
    return jnp.where(is_zero, 0.0, dot / jnp.where(is_zero, 1.0, norms))
