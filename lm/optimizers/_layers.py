"""Transformations of one matrix or vector, applied to each layer of a stacked parameter.

The layers of a group are stacked along a leading dimension L, and the heads of a matrix are
dimensions of their own. A plain norm of such an array would be the norm of all layers together, and
a factored moment would take any two of its dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import optax

from lm.params import ParamInfo, is_info


def per_layer(
    choose: Callable[[ParamInfo], optax.GradientTransformation], infos: Any
) -> optax.GradientTransformation:
    """Applies the transformation that `choose` returns for a parameter to every layer's matrix
    [rows, columns] separately. The state is a tree like `infos` of that transformation's states,
    whose arrays have the layers as first dimension. `update` needs the parameters.
    """
    leaves, structure = jax.tree.flatten(infos, is_leaf=is_info)
    inner = [choose(info) for info in leaves]

    def apart(tree: Any) -> list[jax.Array]:
        found = structure.flatten_up_to(tree)
        return [x.reshape(info.matrices) for info, x in zip(leaves, found, strict=True)]

    def init(params: Any) -> Any:
        each = [jax.vmap(tx.init)(x) for tx, x in zip(inner, apart(params), strict=True)]
        return jax.tree.unflatten(structure, each)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        states, found, after = structure.flatten_up_to(state), [], []
        given = zip(leaves, inner, states, apart(updates), apart(params), strict=True)
        for info, tx, before, u, p in given:
            u, own = jax.vmap(cast(Any, tx.update))(u, before, p)
            found.append(u.reshape(info.shape))
            after.append(own)
        return jax.tree.unflatten(structure, found), jax.tree.unflatten(structure, after)

    return optax.GradientTransformation(init, cast(Any, update))


def trust_ratio(
    infos: Any, *, coefficient: float = 1.0, eps: float = 0.0
) -> optax.GradientTransformation:
    """Updates scaled to `coefficient` times the norm of their parameter, for each layer's matrix
    separately (optax's scale_by_trust_ratio). Vectors (norms, biases) pass unchanged.
    """
    scale = optax.scale_by_trust_ratio(trust_coefficient=coefficient, eps=eps)
    return per_layer(lambda info: optax.identity() if info.role == "vector" else scale, infos)
