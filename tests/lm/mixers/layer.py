"""One mixer alone: random parameters, a call, decoding, and its sizes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import layers as layer_lib
from lm.build import Build
from lm.config import UserError
from lm.params import is_info, names
from tests.lm import tiny

WIDTH, HEADS, HEAD_DIM = 32, 4, 8


class Layer:
    """The only layer of a tiny model. `params` are its mixer's; their random values are large
    enough to matter.
    """

    def __init__(self, mixer: str, changes: dict[str, Any] | None = None, **options: Any) -> None:
        layers = {"layer": {"mixer": mixer} | options}
        self.built: Build = tiny.create(
            {"model.layers": layers, "model.pattern": "layer", "model.num_kv_heads": HEADS}
            | (changes or {})
        )
        self.mixer = self.built.model.groups[0].blocks[0].mixer
        self.infos = self.built.infos["groups_0"]["blocks_0"]["mixer"]
        tree = tiny.params(self.built)["groups_0"]["blocks_0"]["mixer"]
        self.params = jax.tree.map(lambda x: x[0], tree)

    def size(self) -> int:
        """The number of parameters of the mixer."""
        return sum(math.prod(i.shape) for i in jax.tree.leaves(self.infos, is_leaf=is_info))

    def declared(self) -> dict[str, tuple[str, bool]]:
        """The role of every parameter, and whether it decays."""
        infos = jax.tree.leaves(self.infos, is_leaf=is_info)
        return {
            name: (info.role, info.decay)
            for name, info in zip(jax.tree.leaves(names(self.infos)), infos, strict=True)
        }

    def state_floats(self, max_len: int = 16) -> int:
        """How many floats one row carries from token to token."""
        state = jax.eval_shape(lambda: self.mixer.init_state(1, max_len))
        leaves = jax.tree.leaves(state)
        return sum(x.size for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))

    def __call__(
        self, params: Any, x: Any, segment_ids: Any = None, positions: Any = None
    ) -> jax.Array:
        """x [B, T, D] -> [B, T, D]. Without segment ids each row is one document."""
        rows, time = x.shape[:2]
        if segment_ids is None:
            segment_ids = np.ones((rows, time), np.int32)
        if positions is None:
            positions = np.broadcast_to(np.arange(time, dtype=np.int32), (rows, time))
        return self.mixer.apply({"params": params}, x, segment_ids, positions, None)[0]

    def handed(self, params: Any, x: Any, **answers: Any) -> dict[str, dict[str, jax.Array]]:
        """The inputs of each op, by the op's name. In place of the op, `answers[name]` computes the
        output from its inputs; without one the output is v, or x.
        """
        seen: dict[str, dict[str, jax.Array]] = {}

        def run(name: str, inputs: dict[str, jax.Array]) -> Any:
            seen[name] = inputs
            return answers[name](inputs) if name in answers else inputs.get("v", inputs.get("x"))

        index = np.broadcast_to(np.arange(x.shape[1], dtype=np.int32), x.shape[:2])
        self.mixer.apply({"params": params}, x, index, run, method="mix")
        return seen

    def decode(self, params: Any, x: jax.Array, prefill: int) -> jax.Array:
        """The output for rows of one document: `prefill` tokens in one call, the others
        one by one.
        """
        rows, time = x.shape[:2]
        variables = {"params": params}
        index = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (rows, time))
        first = x[:, :prefill], jnp.ones((rows, prefill), jnp.int32), index[:, :prefill]
        out, state = self.mixer.apply(variables, *first, self.mixer.init_state(rows, time))

        def step(state: Any, token: Any) -> Any:
            y, state = self.mixer.apply(variables, *token, state, method="step")
            return state, y

        later = x[:, prefill:].swapaxes(0, 1), index[:, prefill:].T
        _, rest = jax.lax.scan(step, state, later)
        return jnp.concatenate([out, rest.swapaxes(0, 1)], axis=1)


def refusal(mixer: str, **options: Any) -> str:
    """The one line that refuses these options, before any device is used."""
    layers = {"layer": {"mixer": mixer} | options}
    changes = {"model.layers": layers, "model.pattern": "layer", "model.num_kv_heads": HEADS}
    config = tiny.config(changes)
    with pytest.raises(UserError) as caught:
        layer_lib.check(config.model)
    message = str(caught.value)
    assert message.startswith("model.layers.layer")
    assert "\n" not in message
    return message


def random_input(rows: int, time: int, seed: int = 1) -> np.ndarray:
    """[B, T, D], like the output of a norm."""
    return np.random.default_rng(seed).standard_normal((rows, time, WIDTH)).astype(np.float32)


def relative_error(got: Any, want: Any) -> float:
    """The root mean square of the difference over that of `want`."""
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert a.shape == b.shape
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))
