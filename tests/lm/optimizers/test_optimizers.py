"""AdamW against optax.adamw, rates and decay per group, and steps that must change nothing."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.typing import ArrayLike

from lm import mup, optimizers, schedules
from lm.families import OPTIMIZERS, SCHEDULES
from lm.params import ParamInfo, is_info

TOKENS_PER_STEP = 100
PEAK = 0.01

OPTIMIZER = {"family": "adamw", "clip_norm": 1e9, "spike_ratio": 0.0}
INFOS = {
    "embed": ParamInfo("vocab D", (7, 4), "input", False),
    "layers": {
        "w": ParamInfo("D F", (4, 6), "hidden", True),
        "norm": ParamInfo("D", (4,), "vector", False),
    },
    "head": ParamInfo("D vocab", (4, 7), "output", True),
}


def tree(seed: int, scale: float = 1.0) -> typing.Any:
    keys = iter(jax.random.split(jax.random.key(seed), 4))
    return jax.tree.map(
        lambda i: scale * jax.random.normal(next(keys), i.shape), INFOS, is_leaf=is_info
    )


def multipliers(m: float = 1.0) -> mup.Multipliers:
    return mup.Multipliers(
        width=m,
        embedding=1.0,
        residual=1.0,
        attention_exponent=-1.0,
        base_init_std=0.1,
        width_exponent=-1.0,
        is_scale_free=True,
    )


def schedule(
    family: typing.Literal["wsd", "power"] = "wsd", warmup: float = 0.0
) -> schedules.Schedule:
    """The peak, then a linear decay to 0 over the second half of 100 steps."""
    rule = SCHEDULES.create(
        {
            "family": family,
            "peak_learning_rate": PEAK,
            "warmup": f"{warmup} steps",
            "decay": "50 percent",
            "decay_shape": "linear",
        },
        "schedule",
    )
    return rule.schedule(schedules.Run(100 * TOKENS_PER_STEP, TOKENS_PER_STEP))


def create(m: float = 1.0, **changes: typing.Any) -> optax.GradientTransformationExtraArgs:
    config = OPTIMIZERS.create(OPTIMIZER | changes, "optimizer")
    tx = optimizers.create(config, multipliers(m), INFOS)
    decay = optimizers.decays(config, multipliers(m), PEAK)

    def update(*trees: typing.Any, step: jax.Array, loss: jax.Array) -> typing.Any:
        return tx.update(*trees, loss=loss, rate=rate(step), decay=decay)

    return optax.GradientTransformationExtraArgs(tx.init, typing.cast(typing.Any, update))


def rate(step: ArrayLike) -> jax.Array:
    return schedule()(jnp.float32(step) * TOKENS_PER_STEP)


def run(
    tx: typing.Any, grads: list[typing.Any], losses: list[float] | None = None
) -> list[tuple[typing.Any, typing.Any]]:
    """(params, state) at the beginning and after each step."""

    @jax.jit
    def one(
        params: typing.Any, state: typing.Any, g: typing.Any, step: jax.Array, loss: jax.Array
    ) -> typing.Any:
        updates, state = tx.update(g, state, params, step=step, loss=loss)
        return optax.apply_updates(params, updates), state

    params = tree(0)
    history = [(params, tx.init(params))]
    for i, g in enumerate(grads):
        loss = jnp.float32(losses[i] if losses else 1.0)
        history.append(one(*history[-1], g, jnp.int32(i), loss))
    return history


def update(
    tx: typing.Any, grads: typing.Any, state: typing.Any, params: typing.Any, *, step: int
) -> tuple[typing.Any, typing.Any]:
    return tx.update(grads, state, params, step=jnp.int32(step), loss=jnp.float32(1.0))


def assert_same_bits(a: typing.Any, b: typing.Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_equals_optax_adamw_when_all_multipliers_are_one() -> None:
    grads = [tree(i) for i in range(1, 11)]
    mask = jax.tree.map(lambda i: i.decay, INFOS, is_leaf=is_info)
    reference = optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-10, weight_decay=0.1, mask=mask)
    params = tree(0)
    state = reference.init(params)
    for g in grads:
        updates, state = reference.update(g, state, params)
        params = optax.apply_updates(params, updates)
    got, _ = run(create(), grads)[-1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), got, params)


def test_first_step_is_the_rate_of_the_role() -> None:
    """Adam's first update is sign(g): without decay each parameter moves by its learning rate."""
    grads = tree(1)
    (before, _), (after, _) = run(create(m=4.0, weight_decay=0.0), [grads])
    moved = jax.tree.map(lambda a, b, g: (b - a) / -jnp.sign(g), before, after, grads)
    np.testing.assert_allclose(moved["layers"]["w"], PEAK / 4, rtol=1e-4)
    for leaf in (moved["embed"], moved["layers"]["norm"], moved["head"]):
        np.testing.assert_allclose(leaf, PEAK, rtol=1e-4)


@pytest.mark.parametrize(
    ("mode", "hidden", "output"),
    [
        ("coupled", PEAK / 4 * 0.1, PEAK * 0.1),
        ("width_invariant", PEAK * 0.1, PEAK * 0.1),
        ("independent", 0.1, 0.1),
    ],
)
@pytest.mark.parametrize("step", [0, 75])
def test_shrink_per_mode_of_declared_parameters_only(
    mode: str, hidden: float, output: float, step: int
) -> None:
    """With zero gradients only the shrink is left. Step 75 is halfway down the decay."""
    tx = create(m=4.0, weight_decay_mode=mode)
    params, zeros = tree(0), jax.tree.map(jnp.zeros_like, tree(0))
    updates, _ = update(tx, zeros, tx.init(params), params, step=step)
    factor = 0.5 if step == 75 else 1.0
    np.testing.assert_allclose(
        updates["layers"]["w"], -hidden * factor * params["layers"]["w"], rtol=1e-5
    )
    np.testing.assert_allclose(updates["head"], -output * factor * params["head"], rtol=1e-5)
    assert not np.any(updates["embed"])
    assert not np.any(updates["layers"]["norm"])


def test_clips_the_global_norm() -> None:
    """The first moment after one step is (1 - beta1) times the clipped gradient."""
    grads = tree(1, scale=100.0)
    _, (_, state) = run(create(clip_norm=1.0), [grads])
    (mu,) = (s.mu for s in state.inner if isinstance(s, optax.ScaleByAdamState))
    norm = optax.tree.norm(grads)
    assert float(norm) > 100
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, 0.1 * g / norm, rtol=1e-4), mu, grads)


@pytest.mark.parametrize("bad", ["nan grad", "inf grad", "nan loss", "inf loss"])
def test_a_non_finite_step_changes_nothing_but_the_counters(bad: str) -> None:
    value = jnp.nan if bad.startswith("nan") else jnp.inf
    poisoned = tree(3)
    if bad.endswith("grad"):
        poisoned["layers"]["w"] = poisoned["layers"]["w"].at[1, 2].set(value)
    losses = [1.0, 1.0, float(value) if bad.endswith("loss") else 1.0, 1.0]
    history = run(create(), [tree(1), tree(2), poisoned, tree(4)], losses)
    (params, state), (params_after, state_after) = history[2], history[3]
    assert_same_bits(params, params_after)
    assert_same_bits(state.inner, state_after.inner)
    assert_same_bits(state.guard[:2], state_after.guard[:2])
    assert (int(state_after.guard.skipped_total), int(state_after.guard.skipped_in_row)) == (1, 1)
    _, last = history[4]
    assert (
        int(last.guard.skipped_total),
        int(last.guard.skipped_in_row),
        int(last.guard.good_steps),
    ) == (1, 0, 3)
    assert np.isfinite(float(last.guard.norm_mean))


def test_a_skip_keeps_signed_zeros() -> None:
    tx = create()
    params = jax.tree.map(lambda p: jnp.zeros_like(p) * -1.0, tree(0))
    grads = jax.tree.map(lambda p: p * jnp.nan, tree(1))
    updates, _ = update(tx, grads, tx.init(params), params, step=0)
    assert_same_bits(params, optax.apply_updates(params, updates))


@pytest.mark.parametrize(("spike_ratio", "skipped"), [(5.0, 1), (0.0, 0), (50.0, 0)])
def test_spikes(spike_ratio: float, skipped: int) -> None:
    grads = [tree(1)] * 25 + [tree(1, scale=10.0), tree(1)]
    history = run(create(spike_ratio=spike_ratio), grads)
    guard = history[26][1].guard
    assert int(guard.skipped_total) == skipped
    assert (np.asarray(history[25][0]["head"]) == np.asarray(history[26][0]["head"])).all() == bool(
        skipped
    )
    assert int(history[27][1].guard.skipped_in_row) == 0
    if skipped:
        assert float(guard.norm_mean) == pytest.approx(float(optax.tree.norm(tree(1))), rel=1e-5)


def test_no_spike_before_the_mean_is_warm() -> None:
    grads = [tree(1)] * (optimizers.SPIKE_WARMUP - 1) + [tree(1, scale=100.0)]
    assert int(run(create(spike_ratio=5.0), grads)[-1][1].guard.skipped_total) == 0


def test_skipped_in_row_counts_up() -> None:
    nan = jax.tree.map(lambda p: p * jnp.nan, tree(1))
    rows = [
        int(s.guard.skipped_in_row) for _, s in run(create(), [nan, nan, tree(1), nan, nan, nan])
    ]
    assert rows == [0, 1, 2, 0, 1, 2, 3]


def test_the_schedule_follows_the_train_step_past_skips() -> None:
    """After 75 skipped steps the next update has the learning rate of step 75, not of step 0."""
    tx = create(weight_decay=0.0)
    params, nan = tree(0), jax.tree.map(lambda p: p * jnp.nan, tree(1))
    state = tx.init(params)
    _, state = update(tx, nan, state, params, step=74)
    updates, _ = update(tx, tree(1), state, params, step=75)
    np.testing.assert_allclose(jnp.abs(updates["embed"]), PEAK / 2, rtol=1e-4)


def test_parameters_must_be_float32() -> None:
    with pytest.raises(AssertionError, match=r"bfloat16; parameters are float32"):
        create().init(jax.tree.map(lambda p: p.astype(jnp.bfloat16), tree(0)))


def test_every_parameter_has_a_group() -> None:
    """Every leaf gets an update, and a tree that the declarations do not cover is refused."""
    _, (_, state) = run(create(), [tree(1)])
    groups = [s for s in state.inner if isinstance(s, optax.transforms.PartitionState)]
    assert [set(s.inner_states) for s in groups] == [
        {"input", "hidden_decay", "vector", "output_decay"}
    ]
    extra = {**tree(0), "extra": jnp.ones(3)}
    with pytest.raises(ValueError, match="structure error"):
        create().init(extra)


def test_learning_rates_per_role() -> None:
    rates = optimizers.learning_rates(rate(jnp.int32(75)), multipliers(4.0), INFOS)
    assert {k: float(v) for k, v in rates.items()} == pytest.approx(
        {"input": PEAK / 2, "hidden": PEAK / 8, "output": PEAK / 2, "vector": PEAK / 2}
    )


def test_group_norms() -> None:
    values = tree(1)
    values["layers"]["extra"] = jnp.full((2, 2), 3.0)
    layers = {**INFOS["layers"], "extra": ParamInfo("D F", (2, 2), "hidden", True)}
    norms = optimizers.group_norms(values, {**INFOS, "layers": layers})
    assert list(norms) == ["input", "hidden", "output", "vector"]
    hidden = np.concatenate([np.ravel(values["layers"]["w"]), np.full(4, 3.0)])
    np.testing.assert_allclose(norms["hidden"], np.linalg.norm(hidden), rtol=1e-6)
    np.testing.assert_allclose(norms["vector"], np.linalg.norm(values["layers"]["norm"]), rtol=1e-6)
