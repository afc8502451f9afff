"""The multipliers against the published table, and Adam's width invariance under them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.base import get_config
from lm import mup
from lm.config import Config, from_mapping
from lm.params import Role


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


def test_base_width_is_the_identity_but_for_attention() -> None:
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
    """RMS of (change of W) x over outputs after Adam's first step, sign(d x^T) * rate."""
    d_key, x_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (width,))
    delta = jax.random.normal(d_key, (width,))
    rate = mup.create(config(parametrization, width)).learning_rate("hidden")
    return float(jnp.sqrt(jnp.mean(jnp.square(rate * jnp.sign(jnp.outer(delta, x)) @ x))))


def test_update_of_hidden_activations_is_width_invariant() -> None:
    rms = [update_rms(width, "mup") for width in (512, 1024, 2048)]
    np.testing.assert_allclose(rms, rms[0], rtol=0.05)
    assert update_rms(2048, "standard") > 3.5 * update_rms(512, "standard")
