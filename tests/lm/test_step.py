"""One step: every token counts equally in any microbatch, metrics have their stated values, and no
buffer is as large as all logits.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import optimizers
from lm import state as state_lib
from lm.build import Build
from lm.data.batch import Batch
from lm.state import TrainState
from tests.lm import tiny

TOKEN_BYTES = np.arange(tiny.VOCAB, dtype=np.int32) % 5  # a fifth of the ids have no bytes
CHANGES = {"loss.z_loss": 1e-2, "optimizer.eps": 1e-3}


@functools.cache
def built(accumulation: int) -> Build:
    return tiny.create(CHANGES | {"run.accumulation": accumulation})


@functools.cache
def compiled(accumulation: int) -> Any:
    one = built(accumulation)
    return tiny.compiled(one.step, tiny.state(one), tiny.batch(), TOKEN_BYTES, one.numbers)


def step(accumulation: int, batch: Batch) -> tuple[TrainState, dict[str, float]]:
    one = built(accumulation)
    state, metrics = compiled(accumulation)(tiny.state(one), batch, TOKEN_BYTES, one.numbers)
    return state, {k: float(v) for k, v in metrics.items()}


@functools.cache
def score() -> Any:
    one = built(1)
    return tiny.compiled(one.score, tiny.params(one), tiny.batch())


def test_microbatches_of_unequal_weight_add_up_to_the_whole() -> None:
    """One of two microbatches has a tenth of the other's weight, so averaging their losses would
    give another result.
    """
    batch = tiny.batch()
    unequal = batch.loss_weights * np.array([[1.0], [0.1], [1.0], [0.1]], np.float32)
    batch = batch._replace(loss_weights=unequal)
    (whole, metrics), (parts, others) = (step(accumulation, batch) for accumulation in (1, 2))
    assert metrics.keys() == others.keys()
    for name, value in metrics.items():
        assert others[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    before = tiny.params(built(1))
    for a, b, start in zip(
        *map(jax.tree.leaves, (whole.params, parts.params, before)), strict=True
    ):
        change = np.linalg.norm(a - start)
        assert change > 0
        assert np.linalg.norm(a - b) < 1e-4 * change


def test_metrics_are_sums_over_tokens() -> None:
    batch = tiny.batch()
    state, metrics = step(1, batch)
    nll = np.asarray(score()(tiny.params(built(1)), batch)[0], np.float64)
    weights = batch.loss_weights.astype(np.float64)
    num_bytes = TOKEN_BYTES[batch.targets]
    assert metrics["train/nll"] == pytest.approx(np.sum(nll * weights) / weights.sum(), rel=1e-5)
    bits = np.sum(nll * weights * (num_bytes > 0)) / np.log(2)
    assert metrics["train/bpb"] == pytest.approx(bits / np.sum(weights * num_bytes), rel=1e-5)
    assert metrics["train/loss"] > metrics["train/nll"], "z-loss counts in the objective alone"
    assert int(state.step) == 1
    assert (state_lib.as_int(state.tokens), state_lib.as_int(state.rows)) == (4 * 24, 4)
    rates = {role: metrics[f"lr/{role}"] for role in ("input", "hidden", "vector")}
    assert rates == {role: pytest.approx(0.02) for role in rates}
    norms = optimizers.group_norms(state.params, built(1).infos)
    for role, norm in norms.items():
        assert metrics[f"param_norm/{role}"] == pytest.approx(float(norm), rel=1e-5)
        assert metrics[f"update_norm/{role}"] > 0
    assert metrics["optim/grad_norm"] > 0


def test_gradient_norm_is_that_of_the_mean_loss() -> None:
    """Compared with autodiff of a plain log-softmax of the same model."""
    batch, one = tiny.batch(), built(1)

    def mean_loss(params: Any) -> Any:
        variables = {"params": params}
        hidden, _ = one.model.apply(variables, batch.tokens, batch.segment_ids, batch.positions)
        logits = jnp.einsum("btd,vd->btv", hidden, params["embed"]["table"][: tiny.VOCAB])
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        weights = batch.loss_weights
        return jnp.sum(weights * (nll + 1e-2 * lse**2)) / jnp.sum(weights)

    loss, grads = tiny.jit(jax.value_and_grad(mean_loss))(tiny.params(one))
    _, metrics = step(1, batch)
    assert metrics["train/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["optim/grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)


def test_padding_and_masked_targets_do_not_count() -> None:
    batch = tiny.batch()
    dead = batch.loss_weights == 0
    other = batch._replace(targets=np.where(dead, 7, batch.targets))
    assert np.any(other.targets != batch.targets)
    a, b = (step(1, x) for x in (batch, other))
    assert a[1] == b[1]
    for x, y in zip(jax.tree.leaves(a[0].params), jax.tree.leaves(b[0].params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_batch_without_weight_gives_finite_results() -> None:
    batch = tiny.batch()
    state, metrics = step(1, batch._replace(loss_weights=np.zeros_like(batch.loss_weights)))
    assert all(np.isfinite(v) for v in metrics.values())
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))


def test_a_bad_step_counts_and_changes_no_parameter() -> None:
    one = built(1)
    state = tiny.state(one)
    state.params["final_norm"]["scale"] = state.params["final_norm"]["scale"].at[0].set(jnp.nan)
    before = jax.device_get(state.params)
    after, metrics = compiled(1)(state, tiny.batch(), TOKEN_BYTES, one.numbers)
    assert float(metrics["optim/skipped_total"]) == float(metrics["optim/skipped_in_row"]) == 1
    assert int(after.step) == 1
    for x, y in zip(jax.tree.leaves(after.params), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_repeated_step_is_bit_equal() -> None:
    runs = [step(2, tiny.batch()) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    for x, y in zip(*(jax.tree.leaves(state) for state, _ in runs), strict=True):
        np.testing.assert_array_equal(x, y)


def test_rates_seeds_and_decays_share_one_program() -> None:
    """Two configurations lower to the same text. The step of one, called with the numbers of the
    other, takes the other's step.
    """
    rule = {"family": "power", "peak_learning_rate": 0.003, "b": -0.4, "warmup": "0 steps"}
    changes: dict[str, Any] = {"schedule": rule, "seed": 7, "optimizer.weight_decay": 0.3}
    one, other = built(1), tiny.create(CHANGES | changes)
    assert one.lowered().as_text() == other.lowered().as_text()
    args = tiny.state(other), tiny.batch(), TOKEN_BYTES, other.numbers
    own = tiny.compiled(other.step, *args)(*args)
    args = tiny.state(one), tiny.batch(), TOKEN_BYTES
    shared = compiled(1)(*args, other.numbers)
    for x, y in zip(*map(jax.tree.leaves, (own, shared)), strict=True):
        np.testing.assert_array_equal(x, y)
    args = tiny.state(one), tiny.batch(), TOKEN_BYTES
    assert float(compiled(1)(*args, one.numbers)[1]["lr/hidden"]) == pytest.approx(0.02)
    assert float(own[1]["lr/hidden"]) == pytest.approx(0.003)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_buffer_holds_every_logit(accumulation: int) -> None:
    """The batch has 96 tokens, and a loss chunk 40."""
    text = compiled(accumulation).as_text()
    found = re.findall(r"\b(?:f32|bf16|pred|s32|u32)\[([\d,]+)\]", text)
    sizes = {int(np.prod([int(n) for n in shape.split(",")])) for shape in found}
    assert 40 * 384 in sizes, "the search sees a chunk's logits"
    assert max(sizes) < 4 * 24 * tiny.VOCAB


def coordinate_growth(parametrization: str) -> dict[str, float]:
    """The slope of the log RMS change after four steps against log width.

    It is measured on the final hidden states and on the targets' logits. The change of other logits
    is mostly noise of the initial head, which falls with width.
    """
    widths = (64, 128, 256)
    found: dict[str, list[float]] = {"hidden": [], "logits": []}
    for width in widths:
        sizes = {"width": width, "num_layers": 2, "num_heads": width // 16, "head_dim": 16}
        sizes |= {"num_kv_heads": width // 16, "ffn_dim": 2 * width, "tied_embeddings": False}
        changes: dict[str, Any] = {f"model.{key}": value for key, value in sizes.items()}
        changes |= {"mup.base_width": 64, "mup.parametrization": parametrization}
        changes |= {"mup.embedding_multiplier": 1.0, "mup.residual_multiplier": 1.0}
        wsd = {"family": "wsd", "peak_learning_rate": 0.01, "warmup": "0 steps"}
        changes |= {"schedule": wsd}
        changes |= {"model.pattern": "softmax", "optimizer.weight_decay": 0.0}
        before, after = before_and_after_four_steps(tiny.create(changes))
        for name, values in found.items():
            values.append(float(np.sqrt(np.mean((after[name] - before[name]) ** 2))))
    slope = lambda values: float(np.polyfit(np.log(widths), np.log(values), 1)[0])
    return {name: slope(values) for name, values in found.items()}


def before_and_after_four_steps(built: Build) -> tuple[Any, Any]:
    batch = tiny.batch()

    @tiny.jit
    def look(params: Any) -> Any:
        variables = {"params": params}
        hidden, _ = built.model.apply(variables, batch.tokens, batch.segment_ids, batch.positions)
        logits = jnp.einsum("btd,btd->bt", hidden, params["output"]["table"][batch.targets])
        weighted = batch.loss_weights > 0
        # The hidden states include the multiplier of the logits.
        hidden = hidden / built.model.context.multipliers.logits
        return {"hidden": hidden[weighted], "logits": logits[weighted]}

    state = built.init(0)
    run = tiny.compiled(built.step, state, batch, TOKEN_BYTES, built.numbers)
    before = jax.device_get(look(state.params))
    for _ in range(4):
        state, _ = run(state, batch, TOKEN_BYTES, built.numbers)
    return before, jax.device_get(look(state.params))


@pytest.mark.slow
def test_coordinate_check() -> None:
    """Changes do not grow with width under muP. Under the standard parametrization those of logits
    do.
    """
    mup, standard = coordinate_growth("mup"), coordinate_growth("standard")
    assert max(abs(slope) for slope in mup.values()) < 0.1, mup
    assert standard["logits"] > 0.3, standard
