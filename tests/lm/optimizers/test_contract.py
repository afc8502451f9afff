"""What every optimizer in lm/optimizers must do."""

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
    "layers": ParamInfo("L D F", (2, 4, 6), "hidden", True, 1),
    "norm": ParamInfo("D", (4,), "vector", False),
}
MULTIPLIERS = mup.Multipliers(
    width=1.0,
    embedding=1.0,
    residual=1.0,
    attention_exponent=-1.0,
    base_init_std=0.1,
    width_exponent=-1.0,
    is_scale_free=True,
)


def params(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.standard_normal(i.shape), jnp.float32) for k, i in INFOS.items()}


def made(name: str, rates: tuple[float, ...] = (), **options: typing.Any) -> typing.Any:
    """The transformation of an optimizer. `rates` replace the schedule's in the first steps."""
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
    """The factors of a matrix's moment, one per row and one per column, do not have its shape."""
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
    """On |w|^2 / 2, whose gradient is w, thirty steps reduce the norm of every parameter."""
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
    """The second of two steps changed only the counts of skipped steps."""
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
    """The gradient is finite, but not its product with the rate (3e38 times a number above 1)."""
    tx = made(name, rates=(0.01, rate), clip_norm=1e3)
    assert_skipped(stepped(tx, [params(1), jax.tree.map(lambda x: 10.0 * x, params(1))]))


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_weight_decay_shrinks_what_declares_it(name: str) -> None:
    zeros = jax.tree.map(jnp.zeros_like, params(1))
    (before, _), (after, _) = stepped(made(name, weight_decay=0.1), [zeros])
    shrink = 1 - np.asarray(after["layers"] / before["layers"])
    if OPTIMIZERS.find(name, "optimizer").decay_inside:  # the norm decides how much
        np.testing.assert_allclose(shrink, shrink.mean(), rtol=0.02)
        assert 1e-6 < shrink.mean() < 0.1
    else:
        np.testing.assert_allclose(shrink, 0.001, rtol=1e-3)
    np.testing.assert_array_equal(after["norm"], before["norm"])


APART = {
    "q": ParamInfo("L D H K", (3, 4, 2, 3), "hidden", True, 1),
    "out": ParamInfo("L H V D", (3, 2, 3, 4), "hidden", True, 2),
    "norm": ParamInfo("L D", (3, 4), "vector", False),
    "bias": ParamInfo("L H K", (3, 2, 3), "vector", False),
}


def trained(name: str, infos: typing.Any, start: typing.Any, grads: list[typing.Any]) -> typing.Any:
    config = OPTIMIZERS.create({"family": name}, "optimizer")
    tx = optimizers.create(config, MULTIPLIERS, infos)
    extra = {"rate": jnp.float32(0.1), "decay": optimizers.decays(config, MULTIPLIERS, 0.1)}

    @jax.jit
    def step(w: typing.Any, state: typing.Any, g: typing.Any) -> typing.Any:
        updates, state = tx.update(g, state, w, loss=jnp.float32(1.0), **extra)
        return jax.tree.map(jnp.add, w, updates), state

    w, state = start, tx.init(start)
    for g in grads:
        w, state = step(w, state, g)
    return w


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_stacked_layers_are_updated_separately(name: str) -> None:
    """Three layers of one group, with scales that differ by factors of ten, are updated like three
    groups of one layer. Heads are updated like columns or rows of one matrix.
    """
    rng = np.random.default_rng(0)
    scale = np.asarray([0.01, 1.0, 30.0])

    def tree() -> typing.Any:
        sized = lambda i: scale.reshape(3, *[1] * (len(i.shape) - 1))
        draw = lambda i: jnp.asarray(rng.standard_normal(i.shape) * sized(i), jnp.float32)
        return {key: draw(info) for key, info in APART.items()}

    def flat(sizes: tuple[int, ...], contracted: int) -> tuple[int, ...]:
        if not contracted:
            return sizes
        rows = int(np.prod(sizes[:contracted]))
        return rows, int(np.prod(sizes)) // rows

    infos = {}
    for key, info in APART.items():
        shape = flat(info.shape[1:], info.contracted)
        letters = "D F" if info.contracted else " ".join(info.letters.split()[1:])
        own = info._replace(letters=letters, shape=shape, contracted=min(1, info.contracted))
        infos |= {f"{key}{i}": own for i in range(3)}

    def cut(tree: typing.Any) -> typing.Any:
        return {
            f"{key}{i}": tree[key][i].reshape(infos[f"{key}{i}"].shape)
            for key in APART
            for i in range(3)
        }

    start, grads = tree(), [tree() for _ in range(3)]
    together = cut(trained(name, APART, start, grads))
    apart = trained(name, infos, cut(start), [cut(g) for g in grads])
    for key, value in apart.items():
        np.testing.assert_allclose(together[key], value, rtol=2e-4, atol=1e-6, err_msg=key)


HEAVY = {"muon"}  # its step multiplies matrices over the devices


@pytest.mark.parametrize(
    "name",
    [n if n in HEAVY else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS.names()],
)
def test_devices_that_share_the_state_compute_the_same(name: str) -> None:
    """Three steps on eight devices with two microbatches, compared with one device."""
    options = {"optimizer": {"family": name}, "model.num_layers": 2, "data.batch_size": 8}
    axes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.zero1": True}
    found = []
    for changes, count in (({}, 1), (axes | {"run.accumulation": 2}, 8)):
        built = tiny.create(options | changes, count)
        state = tiny.state(built)
        sizes = built.put_replicated(np.ones(tiny.VOCAB, np.int32))
        batch = built.put(tiny.batch(rows=8))
        step = tiny.compiled(built.step, state, batch, sizes, built.numbers)
        for _ in range(3):
            state, _ = step(state, batch, sizes, built.numbers)
        found.append(jax.device_get(state.params))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.sqrt(np.mean((a - b) ** 2)) <= 1e-3 * np.sqrt(np.mean(a**2))
