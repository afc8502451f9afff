"""The same train step written by hand: dicts of arrays and functions, no Flax, guard or metrics.

It shares with lm what does not belong to the framework's overhead: the op in its form, the loss,
and the rounding of matmul operands. It scans over stacked layers and uses AdamW with clipping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.primitives import rope
from lm import loss, mup
from lm.build import Build
from lm.data.batch import Batch
from lm.parallel.matmul import Numerics

Params = dict[str, Any]


class State(NamedTuple):
    """Parameters, both moments of AdamW, and the number of steps taken."""

    params: Params
    first: Params
    second: Params
    count: jax.Array


def init(built: Build, params: Any) -> State:
    """The state before the first step, from the parameters of an lm model."""
    block = params["groups_0"]["blocks_0"]
    layers, width = built.config.model.num_layers, built.config.model.width
    square = (layers, width, width)
    values = {
        "table": params["embed"]["table"],
        "final_norm": params["final_norm"]["scale"],
        "layers": {
            **{n: block["mixer"][n]["kernel"].reshape(square) for n in ("query", "key", "value")},
            "out": block["mixer"]["out"]["kernel"].reshape(square),
            **{n: block["mlp"][n]["kernel"] for n in ("gate", "up", "down")},
            **{n: block[n]["scale"] for n in ("mixer_norm", "mlp_norm")},
        },
    }
    first, second = (jax.tree.map(jnp.zeros_like, values) for _ in range(2))
    # Copies, since the step donates its state and `params` may be donated elsewhere.
    return State(jax.tree.map(jnp.copy, values), first, second, jnp.zeros((), jnp.int32))


def create(built: Build) -> Callable[[State, Batch], tuple[State, jax.Array]]:
    """`step(state, batch) -> state, mean loss`, for a model whose layers are all of one kind."""
    config = built.config
    numerics = Numerics.create(config.model.precision)
    vocab_size = config.data.tokenizer.vocab_size
    options = loss.LossOptions.create(config.loss, vocab_size, numerics.operand_dtype, {})

    def objective(params: Params, batch: Batch) -> jax.Array:
        hidden = _hidden(built, numerics, params, batch)
        return loss.objective(
            hidden, params["table"], batch.targets, batch.loss_weights, built.mesh, options
        )[0]

    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        weight = jnp.maximum(jnp.sum(batch.loss_weights), 1.0)
        total, grads = jax.value_and_grad(objective)(state.params, batch)
        grads = jax.tree.map(lambda g: g / weight, grads)
        return _adamw(built, state, grads), total / weight

    return step


def _hidden(built: Build, numerics: Numerics, params: Params, batch: Batch) -> jax.Array:
    config, layer = built.config.model, built.layers[0]
    constants = mup.create(built.config)
    scale = constants.attention_scale(config.head_dim)
    heads = (*batch.tokens.shape, config.num_heads, config.head_dim)

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(mean_square + config.norm_eps) * scale
        return x.astype(numerics.compute_dtype)

    def body(x: jax.Array, w: Params) -> tuple[jax.Array, None]:
        y = norm(x, w["mixer_norm"])
        q, k, v = (numerics.matmul(y, w[name]).reshape(heads) for name in ("query", "key", "value"))
        if layer.mixer == "softmax":
            q, k = rope.rotate(q, batch.positions), rope.rotate(k, batch.positions)
        mixed, _ = dispatch.apply(
            layer.mixer,
            {"q": q, "k": k, "v": v},
            segment_ids=batch.segment_ids,
            form=layer.form,
            options={"scale": scale},
        )
        x = x + constants.residual * numerics.matmul(mixed.reshape(x.shape), w["out"])
        y = norm(x, w["mlp_norm"])
        y = numerics.matmul(
            jax.nn.silu(numerics.matmul(y, w["gate"])) * numerics.matmul(y, w["up"]), w["down"]
        )
        return x + constants.residual * y, None

    x = params["table"][batch.tokens] * constants.embedding
    x, _ = jax.lax.scan(body, x.astype(numerics.compute_dtype), params["layers"])
    return norm(x, params["final_norm"]) * constants.logits


def _adamw(built: Build, state: State, grads: Params) -> State:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) after clipping; norm scales do not decay."""
    config, rate = built.config.optimizer, built.schedule.peak
    leaves = jax.tree.leaves(grads)
    norm = jnp.sqrt(sum((jnp.sum(g * g) for g in leaves), jnp.float32(0)))
    clip = jnp.minimum(1.0, config.clip_norm / norm)
    count = state.count + 1
    unbias = [1.0 / (1.0 - beta**count) for beta in (config.beta1, config.beta2)]

    def moment(beta: float, power: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda old, g: beta * old + (1.0 - beta) * (g * clip) ** power

    first = jax.tree.map(moment(config.beta1, 1), state.first, grads)
    second = jax.tree.map(moment(config.beta2, 2), state.second, grads)

    def update(path: tuple[Any, ...], p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        change = m * unbias[0] / (jnp.sqrt(v * unbias[1]) + config.eps)
        decay = 0.0 if path[-1].key.endswith("norm") else config.weight_decay
        return p - rate * (change + decay * p)

    params = jax.tree_util.tree_map_with_path(update, state.params, first, second)
    return State(params, first, second, count)
