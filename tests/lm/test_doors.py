"""What a layer may ask of a step: losses that join the objective, keys for random numbers, and
frozen arrays.

Each is shown by a feed-forward defined here, which replaces the one of every layer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm import build as build_lib
from lm import layers as layer_lib
from lm.build import Build
from lm.config import UserError
from lm.data.batch import Batch
from lm.evaluation import generate
from lm.evaluation.generate import GenerateOptions, Vocabulary
from lm.modules.context import Context
from lm.modules.feed_forward import FeedForward
from lm.modules.mixer import Mixer
from lm.params import declare
from lm.state import Frozen, TrainState
from tests.lm import tiny

TOKEN_BYTES = np.ones(tiny.VOCAB, np.int32)
LAYERS = {"model.num_layers": 2, "model.pattern": "softmax", "optimizer.eps": 1e-3}


def scale(module: nn.Module, width: int) -> jax.Array:
    init = declare(nn.initializers.ones, "D", "vector", decay=False)
    return module.param("scale", init, (width,))


class Routed(nn.Module):
    """Returns two losses, one for every token and one of its weights."""

    context: Context
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        w = scale(self, self.width)
        y = jnp.tanh(x * w)
        losses = {"token": 0.3 * jnp.sum(y**2, axis=-1), "weights": 0.7 * jnp.sum(w**3)}
        return y, losses


class Drawing(nn.Module):
    """Drops half of its output, if it is given a key."""

    context: Context
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.tanh(x * scale(self, self.width))
        if not self.has_rng("dropout"):
            return y
        return 2 * y * jax.random.bernoulli(self.make_rng("dropout"), 0.5, y.shape)


class Adapted(nn.Module):
    """A frozen matrix and a trained scale."""

    context: Context
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        base = self.variable("frozen", "base", jnp.zeros, (self.width, self.width))
        return (x @ base.value) * scale(self, self.width)


BUILDS: dict[str, Build] = {}


def create(module: Any, changes: dict[str, Any] | None = None) -> Build:
    """A build whose layers use this feed-forward."""
    key = f"{module.__name__} {changes}"
    changes = LAYERS | (changes or {})
    num_devices = changes.get("mesh.data", 1) * changes.get("mesh.fsdp", 1)
    real = layer_lib.block

    def block(label: str, config: Any, context: Context, strategy: str) -> Any:
        found, records = real(label, config, context, strategy)
        return found.clone(mlp=module(context, config.width)), records

    if key not in BUILDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer_lib, "block", block)
            BUILDS[key] = tiny.create(changes, num_devices)
    return BUILDS[key]


@functools.cache
def compiled(built: Build) -> Any:
    return tiny.compiled(built.step, *arguments(built, tiny.batch()))


def arguments(built: Build, batch: Batch) -> tuple[Any, ...]:
    same = built.put_replicated((TOKEN_BYTES, built.numbers))
    return tiny.state(built), built.put(batch), *same


def step(built: Build, *, at: int = 0, batch: Any = None) -> tuple[TrainState, dict[str, float]]:
    state, *rest = arguments(built, batch or tiny.batch())
    state = state._replace(step=jax.device_put(np.int32(at), state.step.sharding))
    state, metrics = compiled(built)(state, *rest)
    return state, {name: float(x) for name, x in metrics.items()}


def gradients(state: TrainState, norm: float, clip: float) -> list[np.ndarray]:
    """The gradients of the first step, from the first moments, which hold a tenth of the clipped
    gradients.
    """
    flat = jax.tree_util.tree_leaves_with_path(state.opt_state)
    moments = [x for path, x in flat if "mu" in jax.tree_util.keystr(path)]
    return [np.asarray(x) * 10 / min(1.0, clip / norm) for x in moments]


def test_losses_of_layers_join_the_objective() -> None:
    """Compared with autodiff of sums over tokens that are written here, from what Flax captures of
    each layer.
    """
    built, batch = create(Routed), tiny.batch()
    weights = batch.loss_weights

    def mean_loss(params: Any) -> Any:
        inputs = batch.tokens, batch.segment_ids, batch.positions
        found: Any = built.model.apply(
            {"params": params},
            *inputs,
            capture_intermediates=lambda module, _: isinstance(module, Routed),
            mutable=["intermediates"],
        )
        (hidden, _), kept = found
        _, losses = kept["intermediates"]["groups_0"]["blocks_0"]["mlp"]["__call__"][0]
        logits = jnp.einsum("btd,vd->btv", hidden, params["embed"]["table"][: tiny.VOCAB])
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        z = built.config.loss.z_loss * lse**2
        token = losses["token"][0] + losses["token"][1]
        penalty = losses["weights"][0] + losses["weights"][1]
        means = {"token": jnp.sum(weights * token) / jnp.sum(weights), "weights": penalty}
        return jnp.sum(weights * (nll + z)) / jnp.sum(weights) + sum(means.values()), means

    graded = tiny.jit(jax.value_and_grad(mean_loss, has_aux=True))
    (loss, means), expected = graded(tiny.params(built))
    state, metrics = step(built)
    assert metrics["train/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["train/loss"] > metrics["train/nll"] + 1
    assert metrics["aux/token"] == pytest.approx(float(means["token"]), rel=1e-5)
    assert metrics["aux/weights"] == pytest.approx(float(means["weights"]), rel=1e-5)
    clip = built.config.optimizer.clip_norm
    found = gradients(state, metrics["optim/grad_norm"], clip)
    for a, b in zip(found, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"run.accumulation": 2, "model.remat": "full"}, {"mesh.data": 2, "model.unroll": True}],
)
def test_losses_count_the_same_however_a_batch_is_cut(changes: dict[str, Any]) -> None:
    """The weights of the rows are unequal, so a mean of means would give another value."""
    _, whole = step(create(Routed))
    _, parts = step(create(Routed, changes))
    assert whole.keys() == parts.keys() >= {"aux/token", "aux/weights"}
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_scoring_and_decoding_ignore_losses_of_layers() -> None:
    built, batch = create(Routed), tiny.batch()
    params = tiny.params(built)
    nll, _ = built.score(params, built.put(batch))
    state = built.model.init_state(4, 8)
    token = batch.tokens[:, 0]
    hidden: Any = built.model.apply({"params": params}, token, state, method="step")[0]
    logits = np.asarray(hidden) @ params["embed"]["table"][: tiny.VOCAB].T
    lse = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
    first = lse - np.take_along_axis(logits, batch.targets[:, :1], axis=1)[:, 0]
    np.testing.assert_allclose(nll[:, 0], first, rtol=1e-4)


def test_a_model_that_adds_and_draws_nothing_pays_nothing() -> None:
    built = tiny.create(LAYERS | {"run.accumulation": 2, "model.remat": "full"})
    text = built.lowered().as_text()
    assert "stablehlo.dot_general" in text
    assert "threefry" not in text


def test_each_step_draws_with_its_own_key() -> None:
    built = create(Drawing)
    (first, a), (again, b), (_, later) = (step(built, at=at) for at in (3, 3, 4))
    assert a == b, "a resumed run draws the same"
    for x, y in zip(jax.tree.leaves(first.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(x, y)
    assert a["train/loss"] != later["train/loss"]
    remade = create(Drawing, {"model.remat": "full"})
    assert step(remade, at=3)[1] == pytest.approx(a, rel=1e-5), "remat draws the same again"
    fsdp = create(Drawing, {"mesh.fsdp": 2})
    assert step(fsdp, at=3)[1] == pytest.approx(a, rel=1e-4), "nor does fsdp change what is drawn"


def test_layers_draw_independently() -> None:
    built, batch = create(Drawing), tiny.batch()
    inputs = batch.tokens, batch.segment_ids, batch.positions
    found: Any = built.model.apply(
        {"params": tiny.params(built)},
        *inputs,
        method="train",
        rngs={"dropout": jax.random.key(0)},
        capture_intermediates=lambda module, _: isinstance(module, Drawing),
        mutable=["intermediates"],
    )
    (out,) = found[1]["intermediates"]["groups_0"]["blocks_0"]["mlp"]["__call__"]
    dropped = np.asarray(out == 0)
    assert 0.4 < np.mean(dropped) < 0.6
    assert 0.4 < np.mean(dropped[0] == dropped[1]) < 0.6


@pytest.mark.parametrize("changes", [{"run.accumulation": 2}, {"mesh.data": 2}])
def test_parts_of_a_batch_draw_independently(changes: dict[str, Any]) -> None:
    """The batch holds two rows, each twice, and each of its two parts holds both. If both parts
    drew with one key, the loss of the batch would equal that of the two rows alone.
    """
    pair = tiny.batch(rows=2)
    order = [0, 0, 1, 1] if "run.accumulation" in changes else [0, 1, 0, 1]
    twice = jax.tree.map(lambda x: x[np.array(order)], pair)
    _, whole = step(create(Drawing, changes), batch=twice)
    _, rows = step(create(Drawing), batch=twice)
    alone = create(Drawing, {"data.batch_size": 2})
    args = arguments(alone, pair)
    _, one = tiny.compiled(alone.step, *args)(*args)
    assert abs(whole["train/loss"] - float(one["train/loss"])) > 1e-4
    assert abs(rows["train/loss"] - float(one["train/loss"])) > 1e-4


def test_scoring_draws_nothing() -> None:
    built, batch = create(Drawing), tiny.batch()
    params = tiny.params(built)
    a, b = (np.asarray(built.score(params, built.put(batch))[0]) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    inputs = batch.tokens, batch.segment_ids, batch.positions
    hidden: Any = built.model.apply({"params": params}, *inputs)[0]
    logits = np.asarray(hidden @ params["embed"]["table"][: tiny.VOCAB].T, np.float64)
    nll = np.log(np.exp(logits).sum(-1))
    nll -= np.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(a, nll, rtol=1e-4)


def test_flops_are_what_a_layer_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed-forward says that a token passes through a third of its weights."""
    built = tiny.create(LAYERS)
    whole, matrices = build_lib.forward_flops(built, 24), 3 * 32 * 48
    monkeypatch.setattr(FeedForward, "flops", lambda self, matrices, length: matrices * length / 3)
    fewer = 2 * 24 * (2 - 1 / 3) * matrices
    assert whole - build_lib.forward_flops(built, 24) == pytest.approx(fewer)
    saved = build_lib.saved_flops(built, 24)
    assert saved["mlp_up"] == 2 * 2 * 24 * 32 * 48
    assert saved["op"] == 2 * 2 * 4 * (8 + 8) * 24 * 25 / 2


def test_a_mixer_that_sees_later_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    built = tiny.create(LAYERS)
    monkeypatch.setattr(Mixer, "is_causal", lambda self: False)
    with pytest.raises(UserError, match=r"sees later tokens, but objective 'next_token' predicts"):
        tiny.create(LAYERS)
    options = GenerateOptions(max_new_tokens=1, temperature=0.0, top_k=0, top_p=1.0, seed=0)
    with pytest.raises(UserError, match="nothing can be continued"):
        generate.generate(
            built.model, {}, [[1]], options=options, vocabulary=Vocabulary(tiny.VOCAB, 0)
        )


def test_frozen_arrays_are_read_and_neither_trained_nor_saved() -> None:
    built = create(Adapted)
    assert not [
        name
        for name in jax.tree_util.tree_leaves_with_path(built.abstract_state)
        if "base" in jax.tree_util.keystr(name[0])
    ]
    rng = np.random.default_rng(0)

    def frozen(size: float) -> Frozen:
        base = size * rng.standard_normal((2, 32, 32), np.float32)
        return Frozen(model={"groups_0": {"blocks_0": {"mlp": {"base": base}}}})

    nothing, some = frozen(0.0), frozen(0.3)
    run = tiny.compiled(built.step, *arguments(built, tiny.batch()), nothing)
    losses = {}
    for name, tree in (("nothing", nothing), ("some", some)):
        state, metrics = run(*arguments(built, tiny.batch()), tree)
        losses[name] = float(metrics["train/loss"])
        moved = state.params["groups_0"]["blocks_0"]["mlp"]["scale"]
        before = tiny.params(built)["groups_0"]["blocks_0"]["mlp"]["scale"]
        assert bool(np.any(np.asarray(moved) != before)) == (name == "some")
    assert losses["nothing"] != losses["some"]
    score = tiny.jit(built.score.__wrapped__)  # pyright: ignore[reportFunctionMemberAccess]
    a, b = (score(tiny.params(built), tiny.batch(), tree)[0] for tree in (nothing, some))
    assert np.any(np.asarray(a) != np.asarray(b))
