"""Gradient noise scale and norm test.

They are checked on synthetic gradients, and a step's readouts against gradients taken row by row.
When the option is off, a step has none of them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import build as build_lib
from lm import step as step_lib
from lm.build import Build
from lm.config import UserError
from lm.data.batch import Batch
from lm.laws import critical_batch
from lm.parallel import mesh as mesh_lib
from lm.report import figures
from lm.report.folder import Run
from tests.lm import tiny

TOKEN_BYTES = np.ones(tiny.VOCAB, np.int32)
CHANGES = {"mesh.data": 1, "log.gradient_noise": True}
RATIO = 9.237  # tr(Sigma) / |G|^2 of the synthetic gradients


def synthetic(draws: int) -> dict[str, np.ndarray]:
    """The readouts of `draws` steps.

    Each step has 512 tokens in 16 parts of unequal sizes, of which one is empty. The gradient of a
    token has 64 dimensions, each normal with mean 1 and variance RATIO.
    """
    rng = np.random.default_rng(0)
    part = np.minimum(rng.geometric(0.12, 512), 16)[None] - 1
    part = np.where(part == 5, 0, part)  # the sixth part is empty
    sums = jnp.asarray(np.eye(16)[:, part[0]], jnp.float32)

    def one(key: jax.Array) -> Any:
        tokens = 1.0 + np.sqrt(RATIO) * jax.random.normal(key, (512, 64))
        noise = jax.vmap(step_lib._noise)(sums @ tokens, sums.sum(1))
        noise = step_lib.Noise(*map(jnp.sum, noise))
        norm = jnp.linalg.norm(tokens.mean(0))
        return step_lib._noise_metrics(noise, jnp.float32(512), norm), norm

    found, norms = jax.jit(lambda keys: jax.lax.map(one, keys))(
        jax.random.split(jax.random.key(0), draws)
    )
    return {k: np.asarray(v, np.float64) for k, v in found.items()} | {"norm": np.asarray(norms)}


def test_noise_of_gaussian_gradients_in_parts_of_unequal_sizes() -> None:
    """Over 400 draws, numerator, denominator and ratio are each within 5 %."""
    found = synthetic(400)
    assert found["noise/grad_sq"].mean() == pytest.approx(64.0, rel=0.05)
    assert found["noise/trace"].mean() == pytest.approx(64.0 * RATIO, rel=0.05)
    pieces = found["noise/trace"], found["noise/grad_sq"]
    assert critical_batch.smoothed(*pieces, memory=1e6)[-1] == pytest.approx(RATIO, rel=0.05)
    np.testing.assert_allclose(found["noise/scale"], pieces[0] / pieces[1], rtol=1e-5)
    theta = critical_batch.THETA
    assert np.mean(found["noise/norm_test"]) == pytest.approx(RATIO / theta**2, rel=0.05)
    accepted = pieces[0] / 512 <= theta**2 * found["norm"] ** 2
    assert np.all(accepted == (found["noise/norm_test"] <= 512))


@pytest.mark.parametrize(("theta", "batch"), [(0.1, 924), (0.2, 231), (0.5, 37)])
def test_the_norm_test_asks_for_the_noise_scale_over_theta_squared(
    theta: float, batch: int
) -> None:
    assert critical_batch.norm_test(RATIO, 1.0, theta) == pytest.approx(batch, rel=0.01)


def test_means_are_smoothed_before_they_are_divided() -> None:
    found = critical_batch.smoothed([2.0, np.nan, 4.0, 1.0], [1.0, 1.0, -0.5, -9.0], memory=2.0)
    # The ratio at the third record, with weights 1/2 and 1/4 for records 1 and 3: (0.5 + 2) / (0.25
    # - 0.25).
    np.testing.assert_allclose(found, [2.0, 2.0, np.nan, np.nan])
    assert critical_batch.smoothed([], [], memory=2.0).shape == (0,)


@functools.cache
def batch() -> Batch:
    """Token weights are 0 or 1, most of the ones in the last rows."""
    found = tiny.batch(3)
    share = np.array([[0.2], [0.5], [0.9], [1.0]])
    kept = (np.random.default_rng(0).random((4, 24)) < share) & (found.segment_ids > 0)
    return found._replace(loss_weights=kept.astype(np.float32))


@functools.cache
def gradients() -> tuple[list[Any], np.ndarray]:
    """For every row, the gradient of the sum of its token losses, and its number of tokens."""
    one = tiny.create()

    def loss(params: Any, row: Batch) -> Any:
        nll, _ = step_lib.score(one, params, row)
        return jnp.sum(nll * row.loss_weights)

    grad = tiny.jit(jax.grad(loss))
    rows = [Batch(*(x[i : i + 1] for x in batch())) for i in range(4)]
    return [grad(tiny.params(one), row) for row in rows], batch().loss_weights.sum(1)


def by_hand(parts: list[list[int]]) -> tuple[float, float]:
    """|G|^2 and tr(Sigma) of a batch whose parts are these rows."""
    grads, counts = gradients()

    def mean_square(rows: list[int]) -> tuple[float, float]:
        total = jax.tree.map(lambda *x: sum(x), *(grads[i] for i in rows))
        number = float(sum(counts[i] for i in rows))
        return float(optax.tree.norm(total, squared=True)) / number**2, number

    pairs, (large, total) = [mean_square(rows) for rows in parts], mean_square([0, 1, 2, 3])
    small = sum(square * number / total for square, number in pairs)
    signal, noise, _ = critical_batch.noise_scale(total / len(parts), total, small, large)
    return signal, noise


def stepped(built: Build) -> dict[str, float]:
    state, data = tiny.state(built), built.put(batch())
    token_bytes, numbers = map(built.put_replicated, (TOKEN_BYTES, built.numbers))
    step = tiny.compiled(built.step, state, data, token_bytes, numbers)
    return {k: float(v) for k, v in step(state, data, token_bytes, numbers)[1].items()}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"run.accumulation": 2}, [[0, 2], [1, 3]]),
        ({"mesh.data": 2, "mesh.fsdp": 2, "mesh.zero1": True}, [[0, 1], [2, 3]]),
        ({"mesh.data": 2, "run.accumulation": 2}, [[0], [1], [2], [3]]),
    ],
    ids=["microbatches", "data and fsdp", "both"],
)
def test_a_step_reports_the_noise_of_gradients_taken_one_by_one(
    changes: dict[str, Any], parts: list[list[int]]
) -> None:
    devices = changes.get("mesh.data", 1) * changes.get("mesh.fsdp", 1)
    found = stepped(tiny.create(CHANGES | changes, devices))
    signal, noise = by_hand(parts)
    assert found["noise/grad_sq"] == pytest.approx(signal, rel=1e-4)
    assert found["noise/trace"] == pytest.approx(noise, rel=1e-4)
    assert found["noise/scale"] == pytest.approx(noise / signal, rel=1e-3)
    asked = critical_batch.norm_test(noise, found["optim/grad_norm"] ** 2)
    assert found["noise/norm_test"] == pytest.approx(asked, rel=1e-4)


def test_a_step_without_the_option_has_no_noise_metrics() -> None:
    off, on = (tiny.create({"run.accumulation": 2, "log.gradient_noise": x}) for x in (False, True))
    state = off.abstract_state
    metrics = [
        jax.eval_shape(x.step, state, x.abstract_batch, x.abstract_token_bytes, x.numbers)[1]
        for x in (off, on)
    ]
    assert not [key for key in metrics[0] if key.startswith("noise/")]
    assert metrics[1].keys() - metrics[0].keys() == {
        f"noise/{name}" for name in ("grad_sq", "trace", "scale", "norm_test")
    }
    assert not build_lib.compiles_alike(on.config, off.config, [jax.devices()[0]], off.mesh)


def test_one_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_lib, "foreseen", lambda: (1, ("cpu",)))
    for rows, message in ((4, "run.accumulation=2"), (9, "run.accumulation=3")):
        with pytest.raises(UserError, match=f"set {message}, or log.gradient_noise=False"):
            build_lib.check(tiny.config(CHANGES | {"data.batch_size": rows}))
    with pytest.raises(UserError, match=r"set data\.batch_size=2, or"):
        build_lib.check(tiny.config(CHANGES | {"data.batch_size": 1}))
    build_lib.check(tiny.config(CHANGES | {"run.accumulation": 2}))


def test_the_report_draws_ratios_of_running_means(tmp_path: Any) -> None:
    found = synthetic(400)
    records = [
        {"step": i, "tokens": 512 * i, "optim/grad_norm": float(found["norm"][i])}
        | {key: float(found[key][i]) for key in found if key.startswith("noise/")}
        for i in range(400)
    ]
    run = Run("run", tmp_path, {}, {}, [*records[:3], {"step": 3, "tokens": 3}, *records[4:]], [])
    at, scale = figures._ratio(run, "noise/scale")
    assert len(at) == len(scale) == 399
    assert scale[-1] == pytest.approx(RATIO, rel=0.2)
    theta = critical_batch.THETA
    assert figures._ratio(run, "noise/norm_test")[1][-1] == pytest.approx(RATIO / theta**2, rel=0.2)
    assert "Gradient noise" in [picture.title for picture in figures.draw([run])]
