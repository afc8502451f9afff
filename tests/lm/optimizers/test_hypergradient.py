"""The multiplier of the learning rate: its direction, its bounds, the phases in which it moves, and
that it leaves no trace when it is off.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import build as build_lib
from lm import optimizers
from lm.config import UserError
from lm.families import OPTIMIZERS
from lm.optimizers import _hypergradient
from lm.parallel import mesh as mesh_lib
from lm.run import checkpoint
from tests.lm import lab as lab_lib
from tests.lm import tiny
from tests.lm.lab import Lab
from tests.lm.optimizers.test_contract import INFOS, MULTIPLIERS, params

KAPPA = 0.05
TOKEN_BYTES = np.ones(tiny.VOCAB, np.int32)
DIRECTION = optax.with_extra_args_support(optax.identity())  # plain gradient descent


def multipliers(
    gradient: Callable[[jax.Array, jax.Array], jax.Array],
    start: typing.Any,
    rate: float,
    steps: int,
    adapts: typing.Any = True,
) -> np.ndarray:
    """The multiplier after each step of gradient descent on `gradient(w, step)`."""
    tx: typing.Any = _hypergradient.adapted(DIRECTION, KAPPA)
    w = jnp.asarray(start, jnp.float32)

    def step(carry: typing.Any, x: typing.Any) -> typing.Any:
        w, state = carry
        i, moves = x
        extra = {"good": jnp.bool_(True), "rate": jnp.float32(rate), "adapts": moves}
        updates, state = tx.update(gradient(w, i), state, w, **extra)
        return (w + updates, state), state.multiplier

    moves = jnp.broadcast_to(jnp.asarray(adapts), (steps,))
    return np.asarray(jax.lax.scan(step, (w, tx.init(w)), (jnp.arange(steps), moves))[1])


@pytest.mark.parametrize(
    ("rate", "sign"), [(0.3, 1), (0.9, 1), (1.1, -1), (1.9, -1), (2.1, -1), (3.0, -1)]
)
def test_on_a_parabola_it_rises_below_one_over_the_curvature(rate: float, sign: int) -> None:
    """The curvature is 4; `rate` is in units of 1/4. The second step is the first that can compare
    two gradients, and moves the multiplier by kappa.
    """
    found = multipliers(lambda w, _: 4.0 * w, 1.0, rate / 4.0, 2)
    np.testing.assert_allclose(found, [1.0, 1.0 + sign * KAPPA], rtol=1e-6)


@pytest.mark.parametrize(("rate", "end"), [(0.01, 3.0), (2.9, 1.0 / 3.0)])
def test_it_stays_within_its_bounds(rate: float, end: float) -> None:
    """Far below the best rate it ends at 3. Far above it ends at 1/3, or where the cosine changes
    sign.
    """
    found = multipliers(lambda w, _: w, 1.0, rate, 200)
    assert np.all((found >= np.float32(1 / 3)) & (found <= 3.0))
    if rate < 1:
        assert found[-1] == np.float32(end)
    else:  # 2.9 m = 1: the sign changes at m = 0.345
        assert found[-1] == pytest.approx(1 / 2.9, rel=2 * KAPPA)


def test_noise_alone_does_not_move_it() -> None:
    """With independent gradients of mean zero, the mean of what is added to it, cos per step, is 0
    within four standard errors: 400 runs of 50 steps in 8 dimensions.
    """
    rng = np.random.default_rng(0)
    draws = jnp.asarray(rng.standard_normal((400, 50, 8)), jnp.float32)

    def run(noise: jax.Array) -> jax.Array:
        pairs = jax.vmap(_hypergradient.cosine)(noise[1:], noise[:-1].astype(jnp.bfloat16))
        return pairs.mean()

    found = np.asarray(jax.jit(jax.vmap(run))(draws))
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(400)
    assert found.std() / np.sqrt(400) < 0.005, "a bias of 0.02 would show"


def test_it_moves_only_in_its_phases() -> None:
    adapts = np.array([False] * 4 + [True] * 4 + [False] * 4)
    found = multipliers(lambda w, _: w, 1.0, 0.1, 12, adapts)
    assert np.all(found[:4] == 1.0)
    np.testing.assert_allclose(found[4:8], (1 + KAPPA) ** np.arange(1, 5), rtol=1e-6)
    assert np.all(found[8:] == found[7])


def test_its_direction_has_decay_and_factors_of_the_groups() -> None:
    """The derivative with respect to the rate is that of the whole update, here computed by hand
    for AdamW.
    """
    config = OPTIMIZERS.create({"family": "adamw", "hypergradient": KAPPA}, "optimizer")
    tx: typing.Any = optimizers.create(config, MULTIPLIERS, INFOS)
    decay = optimizers.decays(config, MULTIPLIERS, 0.01)
    extra = {"loss": jnp.float32(1), "rate": jnp.float32(0.01), "decay": decay}
    w, state = params(0), tx.init(params(0))
    updates, state = tx.update(params(1), state, w, adapts=jnp.bool_(True), **extra)
    np.testing.assert_allclose(state.multiplier, 1.0)
    kept = state.inner.direction["layers"].astype(jnp.float32)
    np.testing.assert_allclose(kept, -updates["layers"] / 0.01, rtol=2**-8)
    grads = params(2)
    _, state = tx.update(grads, state, w, adapts=jnp.bool_(True), **extra)
    flat = lambda tree: np.concatenate([np.asarray(x, np.float64).ravel() for x in tree.values()])
    g, u = flat(grads), flat(updates) / -0.01
    wanted = 1 + KAPPA * (g @ u) / np.linalg.norm(g) / np.linalg.norm(u)
    assert abs(wanted - 1) > 1e-4
    np.testing.assert_allclose(state.multiplier, wanted, rtol=2**-8 * KAPPA)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_a_skipped_step_leaves_it(name: str) -> None:
    config = OPTIMIZERS.create({"family": name, "hypergradient": KAPPA}, "optimizer")
    tx: typing.Any = optimizers.create(config, MULTIPLIERS, INFOS)
    decay = optimizers.decays(config, MULTIPLIERS, 0.01)
    extra = {"loss": jnp.float32(1), "rate": jnp.float32(0.01), "decay": decay}
    update = jax.jit(lambda g, state: tx.update(g, state, params(0), adapts=True, **extra))
    state = tx.init(params(0))
    for seed in (1, 2):
        _, state = update(params(seed), state)
    assert float(state.multiplier) != 1.0
    updates, after = update(jax.tree.map(lambda x: x * jnp.nan, params(3)), state)
    assert all(np.all(x == 0) for x in jax.tree.leaves(updates))
    for a, b in zip(jax.tree.leaves(state.inner), jax.tree.leaves(after.inner), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_without_the_option_there_is_no_state() -> None:
    config = OPTIMIZERS.create({"family": "adamw", "hypergradient": 0.0}, "optimizer")
    state: typing.Any = jax.eval_shape(
        optimizers.create(config, MULTIPLIERS, INFOS).init, params(0)
    )
    assert state.multiplier is None
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not any("direction" in name or "multiplier" in name for name in names)
    assert tiny.create().numbers.stable is None


MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.zero1": True}


def test_sharding_does_not_change_it() -> None:
    changes = {
        "optimizer": {"family": "adamw", "eps": 1e-2, "hypergradient": KAPPA},
        "schedule.peak_learning_rate": 1e-3,
        "mesh.data": 1,
    }
    found = []
    for mesh, devices in (({}, 1), (MESH, 4)):
        built = tiny.create(changes | mesh, devices)
        state: typing.Any = tiny.state(built)
        token_bytes, numbers = map(built.put_replicated, (TOKEN_BYTES, built.numbers))
        batches = [built.put(tiny.batch(seed)) for seed in range(3)]
        step = tiny.compiled(built.step, state, batches[0], token_bytes, numbers)
        state = state._replace(opt_state=_with_multiplier(built, state.opt_state))
        for batch in batches:
            state, metrics = step(state, batch, token_bytes, numbers)
        kept = jax.tree.leaves(state.opt_state.inner.direction)
        wanted = jax.tree.leaves(built.gradients)
        for leaf, place in zip(kept, wanted, strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        found.append({k: float(v) for k, v in metrics.items()})
    one, many = found
    assert abs(one["optim/hypergradient"] - 1.0) > 1e-3
    assert many["optim/hypergradient"] == pytest.approx(one["optim/hypergradient"], rel=1e-5)
    assert one["lr/hidden"] == pytest.approx(1e-3 * one["optim/hypergradient"], rel=1e-5)


def _with_multiplier(built: build_lib.Build, opt_state: typing.Any) -> typing.Any:
    """Sets the multiplier to 1, as in a run; tiny.state has zeros everywhere."""
    inner = opt_state.inner
    one = built.put_replicated(np.float32(1.0))
    return opt_state._replace(inner=inner._replace(multiplier=one))


def test_a_run_adapts_between_warmup_and_decay_and_a_branch_goes_on_with_it(tmp_path: Path) -> None:
    """The run has 12 steps of 128 tokens: 2 of warmup, and the last 3 of decay.

    Resumed, it is the same run. A decay from the trunk's last checkpoint continues with the
    multiplier saved there.
    """
    lab = Lab(tmp_path)
    wsd = {"family": "wsd", "warmup": "256 tokens", "decay": "3 steps"}
    changes = {
        "optimizer": {"family": "adamw", "hypergradient": 0.5},
        "schedule": wsd | {"peak_learning_rate": 0.01},
    }
    assert lab.run(tmp_path / "run", changes).finished
    found = np.array([r["optim/hypergradient"] for r in lab_lib.records(tmp_path / "run")])
    assert np.all(found[:2] == 1.0)
    assert len(set(found[2:9])) == 7
    assert np.all(found[9:] == found[8])
    lab_lib.copy(tmp_path / "run", tmp_path / "again", last=6)
    assert lab.run(tmp_path / "again", changes).finished
    lab_lib.assert_equal_runs(tmp_path / "run", tmp_path / "again")
    trunk = tmp_path / "run" / checkpoint.FOLDER / "9"
    assert lab.run(tmp_path / "branch", changes | {"decay_from": str(trunk)}).finished
    branch = lab_lib.records(tmp_path / "branch")
    assert branch == lab_lib.records(tmp_path / "run")[9:]


def test_a_schedule_without_a_stable_phase_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_lib, "foreseen", lambda: (1, ("cpu",)))
    for family in ("cosine", "rewarm", "one_cycle"):
        changes: typing.Any = {"schedule": {"family": family, "warmup": "1 steps"}}
        if family == "one_cycle":
            changes["schedule"].pop("warmup")
        config = tiny.config(changes | {"optimizer": {"family": "lion", "hypergradient": 0.1}})
        with pytest.raises(UserError, match=r"nothing there; set optimizer.hypergradient=0\.0"):
            build_lib.check(config)
