"""The chunked loss equals a plain log-softmax in float32, in values and gradients. Its compiled
program has no buffer for all logits.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from lm import loss
from lm.loss import LossOptions
from tests.kernels.contract_problem import error
from tests.lm import tiny

B, T, D, VOCAB, PADDED = 2, 37, 16, 90, 128


def mesh() -> Mesh:
    grid = np.array(jax.devices()[:1]).reshape(1)
    return Mesh(grid, ("data",), axis_types=(AxisType.Auto,))


def options(**changes: Any) -> LossOptions:
    plain = LossOptions(
        z_loss=0.0, chunk_size=16, vocab_size=VOCAB, operand_dtype=jnp.float32, axes=()
    )
    return plain._replace(**changes)


def problem(seed: int = 0) -> tuple[jax.Array, ...]:
    """hidden, head, targets, weights. Weights lie in [0, 2], and some are 0."""
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (B, T, D))
    head = jax.random.normal(keys[1], (PADDED, D))
    targets = jax.random.randint(keys[2], (B, T), 0, VOCAB)
    weights = jnp.round(2 * jax.random.uniform(keys[3], (B, T)), 1)
    return hidden, head, targets, weights


def plain(hidden: Any, head: Any, targets: Any, weights: Any, z_loss: Any) -> Any:
    """The definition, which computes all logits at once."""
    logits = jnp.einsum("btd,vd->btv", hidden, head[:VOCAB])
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    z = jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(weights * (nll + z_loss * z)), nll


@functools.cache
def chunked(opts: LossOptions, scale: float = 1.0) -> Any:
    def value(hidden: Any, head: Any, targets: Any, weights: Any) -> Any:
        total, nll = loss.objective(hidden, head, targets, weights, mesh(), opts)
        return scale * total, nll

    return tiny.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))


@functools.cache
def plain_gradient() -> Any:
    return tiny.jit(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True))


# The 74 tokens are not a multiple of 16.
@pytest.mark.parametrize(("z_loss", "chunk_size"), [(0.0, 16), (1e-2, 16), (1e-2, 1000)])
def test_value_and_gradients(z_loss: float, chunk_size: int) -> None:
    inputs = problem()
    got = chunked(options(z_loss=z_loss, chunk_size=chunk_size))(*inputs)
    expected = plain_gradient()(*inputs, z_loss)
    (total, nll), (d_hidden, d_head) = got
    np.testing.assert_allclose(total, expected[0][0], rtol=1e-6)
    np.testing.assert_allclose(nll, expected[0][1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_hidden, expected[1][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_head, expected[1][1], rtol=1e-4, atol=1e-5)
    assert not np.any(d_head[VOCAB:]), "a padded id got a gradient"


def test_forward_alone_gives_the_same_values() -> None:
    inputs = problem()
    opts = options(z_loss=1e-2)
    (total, nll), _ = chunked(opts)(*inputs)
    total_and_nll = lambda h, w, t, weights: loss.objective(h, w, t, weights, mesh(), opts)
    forward = tiny.jit(total_and_nll)(*inputs)
    np.testing.assert_allclose(forward[1], nll, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(forward[0], total, rtol=1e-6)


def test_the_cotangent_scales_the_gradient() -> None:
    inputs = problem()
    once, thrice = (chunked(options(), scale)(*inputs)[1] for scale in (1.0, 3.0))
    for a, b in zip(once, thrice, strict=True):
        np.testing.assert_allclose(3.0 * a, b, rtol=1e-6)


def test_tokens_of_weight_zero_change_nothing() -> None:
    hidden, head, targets, weights = problem()
    weights = weights.at[:, ::2].set(0.0)
    moved = hidden.at[:, ::2].add(100.0)
    (a, _), (d_a, head_a) = chunked(options())(hidden, head, targets, weights)
    (b, _), (d_b, head_b) = chunked(options())(moved, head, targets, weights)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(head_a, head_b, rtol=1e-5, atol=1e-6)
    assert not np.any(d_a[:, ::2])
    assert not np.any(d_b[:, ::2])


def test_bfloat16_operands_round_once() -> None:
    """The value is that of the float32 definition on rounded inputs. The gradients differ from its
    gradients by the rounding of d logits, 2^-9.
    """
    hidden, head, targets, weights = problem()
    (total, _), (d_hidden, d_head) = chunked(options(operand_dtype=jnp.bfloat16))(
        hidden, head, targets, weights
    )
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, head)]
    (expected, _), grads = plain_gradient()(*rounded, targets, weights, 0.0)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert d_hidden.dtype == d_head.dtype == jnp.float32
    for got, grad in zip((d_hidden, d_head), grads, strict=True):
        error = np.linalg.norm(got - grad) / np.linalg.norm(grad)
        assert 0 < error < 4e-3


def test_bfloat16_hidden_states_keep_their_dtype() -> None:
    hidden, head, targets, weights = problem()
    low = options(operand_dtype=jnp.bfloat16)
    (total, nll), (d_hidden, d_head) = chunked(low)(
        hidden.astype(jnp.bfloat16), head, targets, weights
    )
    assert (total.dtype, nll.dtype, d_head.dtype) == (jnp.float32,) * 3
    assert d_hidden.dtype == jnp.bfloat16


def test_huge_logits_stay_finite() -> None:
    hidden, head, targets, weights = problem()
    (total, nll), grads = chunked(options(z_loss=1e-4))(1e4 * hidden, head, targets, weights)
    assert np.isfinite(total)
    assert all(np.all(np.isfinite(x)) for x in (nll, *grads))


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("height", [20.0, -20.0])
def test_the_gradient_has_its_digits_where_every_target_is_certain(
    z_loss: float, height: float
) -> None:
    """Compared with float64, where every target's logit is far above all others, or far below."""
    hidden, head, targets, weights = (np.array(x) for x in problem())
    targets %= D
    head[:D], head[D:] = 4.0 * np.eye(D), 0.1 * head[D:]
    hidden = 0.05 * hidden + height / 4.0 * np.eye(D, dtype=np.float32)[targets]
    _, found = chunked(options(z_loss=z_loss))(hidden, head, targets, weights)

    h, w = hidden.reshape(-1, D).astype(np.float64), head[:VOCAB].astype(np.float64)
    logits, weight = h @ w.T, weights.reshape(-1, 1).astype(np.float64)
    lse = np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    onehot = np.eye(VOCAB)[targets.reshape(-1)]
    d_logits = weight * (np.exp(logits - lse) * (1.0 + 2.0 * z_loss * lse) - onehot)
    d_head = np.zeros(head.shape)
    d_head[:VOCAB] = d_logits.T @ h
    assert error(found[0], (d_logits @ w).reshape(hidden.shape), 0.0) < 1e-5
    assert error(found[1], d_head, 0.0) < 1e-5


def test_no_buffer_holds_every_logit() -> None:
    compiled = chunked(options(chunk_size=8)).lower(*problem()).compile()
    sizes = {
        int(np.prod([int(n) for n in shape.split(",")]))
        for shape in re.findall(r"(?:f32|bf16|pred|s32)\[([\d,]+)\]", compiled.as_text())
    }
    assert 8 * PADDED in sizes, "the search sees a chunk's logits"
    assert max(sizes) < B * T * VOCAB
