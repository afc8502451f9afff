"""What every optimizer must do, over all files of lm/optimizers."""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import mup, optimizers, schedules
from lm.families import OPTIMIZERS, SCHEDULES
from lm.parallel import sharding
from lm.params import ParamInfo, is_info
from tests.lm import tiny

INFOS = {
    "layers": ParamInfo("L D F", (2, 4, 6), "hidden", True),
    "norm": ParamInfo("D", (4,), "vector", False),
}
MULTIPLIERS = mup.Multipliers(
    width=1.0, embedding=1.0, residual=1.0, attention_exponent=-1.0, base_init_std=0.1
)


def params(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.standard_normal(i.shape), jnp.float32) for k, i in INFOS.items()}


def made(name: str, rates: tuple[float, ...] = (), **options: typing.Any) -> typing.Any:
    """`rates` are those of the first steps, instead of the schedule's."""
    config = OPTIMIZERS.create({"family": name, "weight_decay": 0.0} | options, "optimizer")
    rule = {"family": "wsd", "peak_learning_rate": 0.01, "warmup": "0 steps"}
    schedule = SCHEDULES.create(rule, "schedule").schedule(schedules.Run(1e6, 10))
    tx = optimizers.create(config, MULTIPLIERS, INFOS)
    decay = optimizers.decays(config, MULTIPLIERS, schedule.peak)

    def update(*trees: typing.Any, step: jax.Array, loss: jax.Array) -> typing.Any:
        rate = jnp.asarray(rates, jnp.float32)[step] if rates else schedule(step * 10)
        return tx.update(*trees, loss=loss, rate=rate, decay=decay)

    return optax.GradientTransformationExtraArgs(tx.init, typing.cast(typing.Any, update))


def stepped(tx: typing.Any, grads: list[typing.Any]) -> list[tuple[typing.Any, typing.Any]]:
    update = jax.jit(tx.update)
    found = [(params(0), tx.init(params(0)))]
    for i, g in enumerate(grads):
        before, state = found[-1]
        updates, state = update(g, state, before, step=jnp.int32(i), loss=jnp.float32(1.0))
        found.append((jax.tree.map(jnp.add, before, updates), state))
    return found


@pytest.mark.parametrize("name", OPTIMIZERS.names())
@pytest.mark.parametrize(
    "mesh", [{}, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.zero1": True}], ids=str
)
def test_its_state_has_a_place_on_every_mesh(name: str, mesh: dict[str, typing.Any]) -> None:
    options = {"family": name, "memory": "host"}
    built = tiny.create({"optimizer": options} | mesh, 4 if mesh else 1)
    for leaf in jax.tree.leaves(built.abstract_state.opt_state):
        assert len(leaf.sharding.spec) <= leaf.ndim
        assert not leaf.ndim or leaf.sharding.memory_kind == "pinned_host"


def test_factored_moments_have_a_place() -> None:
    """Rows and columns of a matrix are no moments of its shape."""
    infos = tiny.create({"mesh.fsdp": 2, "mesh.data": 1}, 2).infos
    state = jax.eval_shape(
        optax.scale_by_factored_rms(min_dim_size_to_factor=4).init,
        jax.tree.map(lambda i: jnp.zeros(i.shape), infos, is_leaf=is_info),
    )
    built = tiny.create({"mesh.fsdp": 2, "mesh.data": 1}, 2)
    moments = sharding.moments(infos, built.mesh, built.config.mesh)
    placed = sharding.like_params(state, infos, moments, built.mesh)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
    assert all(len(place.spec) <= leaf.ndim for leaf, place in pairs)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_it_descends(name: str) -> None:
    """On |w|^2 / 2, whose gradient is w, thirty steps bring every parameter nearer to zero."""
    tx = made(name)
    update = jax.jit(tx.update)
    w, state = params(0), tx.init(params(0))
    for i in range(30):
        updates, state = update(w, state, w, step=jnp.int32(i), loss=jnp.float32(1.0))
        w = jax.tree.map(jnp.add, w, updates)
    for key, start in params(0).items():
        assert w[key].dtype == jnp.float32
        assert float(jnp.linalg.norm(w[key])) < float(jnp.linalg.norm(start)), key


def assert_skipped(history: list[typing.Any]) -> None:
    """The second of two steps has changed nothing but the count of skipped steps."""
    (before, state), (after, left) = history[1:]
    for a, b in zip(
        jax.tree.leaves((before, state.inner)), jax.tree.leaves((after, left.inner)), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert int(left.guard.skipped_total) == 1
    assert int(left.guard.good_steps) == 1


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_a_skipped_step_leaves_every_bit(name: str) -> None:
    nan = jax.tree.map(lambda x: x * jnp.nan, params(1))
    assert_skipped(stepped(made(name), [params(1), nan]))


@pytest.mark.parametrize("rate", [np.nan, np.inf, 3e38], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_an_update_that_is_not_finite_is_skipped(name: str, rate: float) -> None:
    """The gradient is finite, its product with the rate is not (3e38 times more than 1)."""
    tx = made(name, rates=(0.01, rate), clip_norm=1e3)
    assert_skipped(stepped(tx, [params(1), jax.tree.map(lambda x: 10.0 * x, params(1))]))


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_weight_decay_shrinks_what_declares_it(name: str) -> None:
    zeros = jax.tree.map(jnp.zeros_like, params(1))
    (before, _), (after, _) = stepped(made(name, weight_decay=0.1), [zeros])
    np.testing.assert_allclose(after["layers"], before["layers"] * (1 - 0.001), rtol=1e-5)
    np.testing.assert_array_equal(after["norm"], before["norm"])
