"""The multipliers equal the published tables, and what they should keep equal over widths is."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.base import get_config
from lm import mup, optimizers
from lm.config import Config, from_mapping
from lm.params import ParamInfo, Role
from tests.lm import tiny


def config(parametrization: str = "mup", width: int = 1024) -> Config:
    values = get_config().to_dict()
    values["model"]["width"] = width
    values["mup"]["parametrization"] = parametrization
    if parametrization == "standard":
        values["mup"] |= {"embedding_multiplier": 1.0, "residual_multiplier": 1.0}
    return from_mapping(values)


def test_mup_table() -> None:
    got = mup.create(config())
    assert (got.width, got.embedding, got.residual, got.logits) == (4.0, 12.0, 0.22, 0.25)
    assert got.attention_scale(64) == 1 / 64
    assert {r: got.learning_rate(r) for r in mup.ROLES} == {
        "input": 1,
        "hidden": 0.25,
        "output": 1,
        "vector": 1,
    }
    assert {r: got.init_std(r) for r in mup.ROLES} == {
        "input": 0.1,
        "hidden": 0.05,
        "output": 0.1,
        "vector": 0.1,
    }


def test_standard_table_does_not_see_the_width() -> None:
    got = mup.create(config("standard"))
    assert (got.width, got.embedding, got.residual, got.logits) == (1.0, 1.0, 1.0, 1.0)
    assert got.attention_scale(64) == 1 / 8
    assert {got.learning_rate(r) for r in mup.ROLES} == {1.0}
    assert {got.init_std(r) for r in mup.ROLES} == {0.1}
    assert got == mup.create(config("standard", width=256))


def test_base_width_is_the_identity_except_for_attention() -> None:
    got, standard = mup.create(config(width=256)), mup.create(config("standard"))
    for role in mup.ROLES:
        assert got.learning_rate(role) == standard.learning_rate(role)
        assert got.init_std(role) == standard.init_std(role)
    assert got.logits == 1.0


@pytest.mark.parametrize("width", [64, 256, 512, 4096])
def test_hidden_rate_times_m_is_the_base_rate(width: int) -> None:
    got = mup.create(config(width=width))
    assert got.learning_rate("hidden") * (width / 256) == 1.0
    assert got.init_std("hidden") ** 2 * width / 256 == pytest.approx(0.01)


@pytest.mark.parametrize("mode", ["coupled", "width_invariant", "independent"])
@pytest.mark.parametrize("role", mup.ROLES)
def test_shrink_per_step(mode: str, role: Role) -> None:
    c, peak, rate = config(), 0.02, 0.005
    got = mup.create(c)
    optimizer = dataclasses.replace(c.optimizer, weight_decay_mode=mode)
    shrink = rate * got.learning_rate(role) * got.weight_decay(role, config=optimizer, peak=peak)
    m = 4.0 if role == "hidden" else 1.0
    expected = {
        "coupled": rate * 0.1 / m,
        "width_invariant": rate * 0.1,
        "independent": rate / peak * 0.1,
    }
    assert shrink == pytest.approx(expected[mode])


def update_rms(width: int, parametrization: str) -> float:
    """RMS over outputs of (change of W) x, after Adam's first step: sign(d x^T) * rate."""
    d_key, x_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (width,))
    delta = jax.random.normal(d_key, (width,))
    rate = mup.create(config(parametrization, width)).learning_rate("hidden")
    return float(jnp.sqrt(jnp.mean(jnp.square(rate * jnp.sign(jnp.outer(delta, x)) @ x))))


def test_update_of_hidden_activations_is_width_invariant() -> None:
    rms = [update_rms(width, "mup") for width in (512, 1024, 2048)]
    np.testing.assert_allclose(rms, rms[0], rtol=0.05)
    assert update_rms(2048, "standard") > 3.5 * update_rms(512, "standard")


def completep(width: int = 1024, depth: int = 24, alpha: float = 0.5, **changes: str) -> Config:
    values = get_config().to_dict()
    values["model"] |= {"width": width, "num_layers": depth}
    values["mup"] |= {"parametrization": "completep", "base_depth": 6, "alpha": alpha}
    values["optimizer"] = {"family": "adamw"} | changes
    return from_mapping(values)


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
def test_completep_table(alpha: float) -> None:
    """Table 1 of arXiv 2505.01618, for m = 4 and m_L = 4."""
    got, plain = mup.create(completep(alpha=alpha)), mup.create(config())
    assert got.residual == pytest.approx(0.22 * 4**-alpha)
    assert (got.logits, got.embedding, got.attention_scale(64)) == (0.25, 12.0, 1 / 64)
    assert [got.init_std(role) for role in mup.ROLES] == [plain.init_std(r) for r in mup.ROLES]
    depth = 4 ** (alpha - 1)
    assert {group: got.learning_rate(group) for group in got.groups} == pytest.approx(
        {"input": 1, "hidden": depth / 4, "output": 1, "vector": 1}
        | {"layer_input": depth, "layer_output": depth, "layer_vector": depth}
    )
    eps = {"input": 1 / 4, "hidden": 4**-alpha / 4, "vector": 1 / 4, "layer_vector": 4**-alpha / 4}
    assert {group: got.gradient(group) for group in eps} == pytest.approx(eps)


def test_completep_at_the_base_is_mup() -> None:
    got, plain = mup.create(completep(256, depth=6)), mup.create(config(width=256))
    for role in mup.ROLES:
        assert got.learning_rate(role) == plain.learning_rate(role)
        assert got.init_std(role) == plain.init_std(role)
    assert {got.learning_rate(group) for group in got.groups} == {1.0}
    assert {got.gradient(group) for group in got.groups} == {1.0}
    assert (got.residual, got.logits) == (plain.residual, plain.logits)


def test_completep_shrinks_hidden_matrices_alike_at_all_widths() -> None:
    def shrink(width: int, mode: str) -> float:
        c = completep(width, weight_decay_mode=mode)
        got, peak = mup.create(c), 0.02
        decay = got.weight_decay("hidden", config=c.optimizer, peak=peak)
        return peak * got.learning_rate("hidden") * decay

    assert shrink(1024, "coupled") == pytest.approx(shrink(256, "coupled"))
    assert shrink(1024, "coupled") == pytest.approx(0.02 * 0.1 * 4**-0.5)
    assert shrink(1024, "width_invariant") == pytest.approx(0.02 * 0.1)


def test_groups_are_roles_except_under_completep() -> None:
    infos = [
        ParamInfo("vocab D", (7, 4), "input", True),
        ParamInfo("L D", (2, 4), "vector", False),
        ParamInfo("D", (4,), "vector", False),
        ParamInfo("L D F", (2, 4, 6), "hidden", True, 1),
    ]
    assert [mup.create(config()).group(info) for info in infos] == [i.role for i in infos]
    got = mup.create(completep())
    assert [got.group(i) for i in infos] == ["input", "layer_vector", "vector", "hidden"]


def stepped(c: Config, gradient: float) -> dict[str, np.ndarray]:
    """What one step subtracts from parameters whose gradient has the same value everywhere."""
    infos = {
        "w": ParamInfo("L D F", (2, 4, 6), "hidden", True, 1),
        "norm": ParamInfo("L D", (2, 4), "vector", False),
        "last": ParamInfo("D", (4,), "vector", False),
    }
    got = mup.create(c)
    tx = optimizers.create(c.optimizer, got, infos)
    zeros = {key: jnp.zeros(info.shape) for key, info in infos.items()}
    grads = {key: jnp.full(info.shape, gradient) for key, info in infos.items()}
    extra = {"rate": jnp.float32(1.0), "decay": optimizers.decays(c.optimizer, got, 1.0)}
    updates: Any
    updates, _ = tx.update(grads, tx.init(zeros), zeros, loss=jnp.float32(1.0), **extra)
    return {key: -np.unique(np.asarray(x)) for key, x in updates.items()}


def test_completep_gives_each_group_its_eps() -> None:
    """Adam's first step is g / (|g| + eps), so a gradient as large as eps gives half the rate."""
    base = completep(alpha=0.5)
    eps = 1e-3
    c = dataclasses.replace(base, optimizer=dataclasses.replace(base.optimizer, eps=eps))
    for key, rate, factor in (("w", 0.5 / 4, 8), ("norm", 0.5, 8), ("last", 1.0, 4)):
        np.testing.assert_allclose(stepped(c, eps / factor)[key], [rate / 2], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "exponent"),
    [
        ({"family": "adamw"}, -1.0),
        ({"family": "lion"}, -1.0),
        ({"family": "lamb"}, -0.5),
        ({"family": "lars"}, -0.5),
        ({"family": "muon"}, -0.5),
        ({"family": "muon", "scale": "spectral"}, 0.0),
        ({"family": "adafactor"}, -0.5),
        ({"family": "adafactor", "relative": False}, -1.0),
    ],
    ids=str,
)
def test_a_layer_changes_as_much_at_every_width(options: dict[str, Any], exponent: float) -> None:
    """The RMS of (change of W) x after one step is the same at widths 256 and 1024. With one rate
    for all widths it would not be.

    The gradient has rank one, d x^T, and W has the scale that muP gives it at the width.
    """

    def change(width: int) -> float:
        values = get_config().to_dict()
        values["model"]["width"] = width
        values["optimizer"] = options
        c = from_mapping(values)
        got = mup.create(c)
        rng = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        w, x, d = got.init_std("hidden") * draw(width, width), draw(width), draw(width) / width
        infos = {"w": ParamInfo("D F", (width, width), "hidden", False, 1)}
        tx = optimizers.create(c.optimizer, got, infos)
        state, gradient = tx.init({"w": w}), {"w": jnp.outer(x, d)}
        extra = {"rate": jnp.float32(1.0), "decay": optimizers.decays(c.optimizer, got, 1.0)}
        updates: Any
        updates, _ = tx.update(gradient, state, {"w": w}, loss=jnp.float32(1.0), **extra)
        return float(jnp.sqrt(jnp.mean((x @ updates["w"]) ** 2)))

    found = [change(width) for width in (256, 1024)]
    assert found[1] == pytest.approx(found[0], rel=0.1)
    values = get_config().to_dict()
    values["optimizer"] = options
    values["model"]["width"] = 1024
    assert mup.create(from_mapping(values)).learning_rate("hidden") == pytest.approx(4**exponent)


def test_the_rate_of_a_lars_vector_grows_as_its_gradient_falls() -> None:
    """LARS moves a vector by its gradient, which falls with the width; under CompleteP also with
    the multiplier of the branch. The rate makes up for both.
    """
    values = get_config().to_dict()
    values["model"] |= {"width": 1024, "num_layers": 24}
    values["optimizer"] = {"family": "lars"}
    assert mup.create(from_mapping(values)).learning_rate("vector") == 4.0
    values["mup"] |= {"parametrization": "completep", "base_depth": 6}
    got = mup.create(from_mapping(values))
    assert (got.learning_rate("vector"), got.learning_rate("layer_vector")) == (4.0, 16.0)


@pytest.mark.parametrize("width", [16, 64])
def test_the_first_logits_are_as_wide_as_the_guide_says(width: int) -> None:
    """docs/first_run.md says that their deviation is init_std base_width / sqrt(width), which puts
    the first loss above ln V.

    The logit of the token that was read is left out, since its embedding is a row of the head.
    """
    changes = {"model.width": width, "mup.base_width": 48.0, "model.pattern": "softmax"}
    built = tiny.create(changes)
    params = built.init(0).params
    batch = tiny.batch()
    at = batch.tokens, batch.segment_ids, batch.positions
    hidden, _ = built.model.apply({"params": params}, *at)
    logits = np.array(hidden @ params["embed"]["table"].T)[..., : tiny.VOCAB]
    np.put_along_axis(logits, batch.tokens[..., None], np.nan, axis=-1)
    spread = float(np.nanstd(logits[batch.segment_ids > 0]))
    assert spread == pytest.approx(0.1 * 48 / math.sqrt(width), rel=0.1)
