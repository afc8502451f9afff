"""Each primitive against its plain form."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import segments
from kernels.blocks import Attention
from kernels.primitives import causal_tiles, kv_cache, log_space, online_softmax, rope, xla_chunks
from tests.kernels.contract_problem import error

IDS = np.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 3, 3, 3, 3]], np.int32)


def test_softplus_and_both_sigmoids():
    z = jnp.concatenate([jnp.linspace(-100.0, 100.0, 4001), jnp.array([-1e30, 1e4, 1e30])])
    softplus, u = log_space.softplus_and_exp(z)
    exact = np.logaddexp(0.0, np.asarray(z, np.float64))
    np.testing.assert_allclose(softplus, exact, rtol=5e-6, atol=2e-38)
    for sign, got in zip((1.0, -1.0), log_space.sigmoids(z, u), strict=True):
        wide = np.clip(sign * np.asarray(z, np.float64), -700.0, 700.0)
        np.testing.assert_allclose(got, 1.0 / (1.0 + np.exp(-wide)), rtol=1e-5, atol=2e-38)


@pytest.mark.parametrize(("size", "run"), [(32, 32), (96, 32), (64, 8)])
def test_sums_along_keys(size: int, run: int):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, size)), jnp.float32)
    after, total = log_space.suffix_sum(x, run)
    np.testing.assert_allclose(after, jnp.cumsum(x[..., ::-1], -1)[..., ::-1] - x, atol=1e-5)
    np.testing.assert_allclose(total, jnp.sum(x, -1), atol=1e-5)
    before, total = log_space.prefix_sum(x, run)
    np.testing.assert_allclose(before, jnp.cumsum(x, -1) - x, atol=1e-5)
    np.testing.assert_allclose(total, jnp.sum(x, -1), atol=1e-5)


def test_online_softmax_is_softmax():
    random = np.random.default_rng(0)
    logits = jnp.asarray(5.0 * random.standard_normal((4, 24)), jnp.float32)
    v = jnp.asarray(random.standard_normal((24, 3)), jnp.float32)
    masked = jnp.full((4,), online_softmax.MASKED)
    running = online_softmax.Running(masked, jnp.zeros(4), jnp.zeros((4, 3)))
    for start in (0, 8, 16):
        part = slice(start, start + 8)
        running = online_softmax.update(running, logits[:, part], v[part])
    out, lse = online_softmax.finish(running)
    np.testing.assert_allclose(out, jax.nn.softmax(logits) @ v, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(logits, axis=-1), rtol=1e-6)


def test_rope_sees_only_distance():
    q, k = (jnp.asarray(np.random.default_rng(s).standard_normal(8), jnp.float32) for s in (0, 1))

    def product(i: int, j: int) -> float:
        pair = jnp.stack([q, k])[None, :, None]
        turned = rope.rotate(pair, jnp.array([[i, j]], jnp.int32))
        return float(turned[0, 0, 0] @ turned[0, 1, 0])

    assert product(0, 0) == pytest.approx(float(q @ k), rel=1e-5)
    assert product(9, 4) == pytest.approx(product(105, 100), rel=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), rel=1e-2)


def test_rope_pairs_halves():
    turned = rope.rotate(jnp.array([[[[1.0, 0.0, 0.0, 0.0]]]]), jnp.array([[1]], jnp.int32))
    np.testing.assert_allclose(turned[0, 0, 0], [np.cos(1), 0, np.sin(1), 0], atol=1e-6)
    with pytest.raises(ValueError, match="even head width, got K=3"):
        rope.rotate(jnp.ones((1, 1, 1, 3)), jnp.zeros((1, 1), jnp.int32))


def test_segments():
    np.testing.assert_array_equal(
        segments.positions(jnp.asarray(IDS)), [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 0, 1, 2, 3]]
    )
    assert segments.resets(jnp.asarray(IDS))[0].tolist() == [
        True,
        False,
        True,
        False,
        False,
        True,
        False,
    ]
    index = jnp.arange(7)
    for strict, window in ((False, 0), (True, 0), (False, 3), (True, 3)):
        seen = segments.visible(index[:, None], index, strict=strict, window=window)
        assert int(jnp.sum(seen)) == segments.count_pairs(7, strict=strict, window=window)
    ids = IDS[0]
    seen = segments.visible(index[:, None], index, ids[:, None], ids[None])
    np.testing.assert_array_equal(jnp.sum(seen, 1), [1, 2, 1, 2, 3, 0, 0])


def test_cache_appends_all_but_padding():
    state = kv_cache.create({"G": 1, "K": 1, "V": 1}, jnp.float32, 2, 9)
    x = jnp.arange(14.0).reshape(2, 7, 1, 1)
    state, slot = kv_cache.append(state, x, -x, jnp.asarray(IDS))
    assert state.length.tolist() == [5, 7]
    assert kv_cache.current_segment(state).tolist() == [2, 3]
    state, slot = kv_cache.append(state, x[:, :1], -x[:, :1], jnp.full((2, 1), 7, jnp.int32))
    assert slot.tolist() == [[5], [7]]
    np.testing.assert_array_equal(state.k[0, :, 0, 0], [0, 1, 2, 3, 4, 0, 0, 0, 0])
    np.testing.assert_array_equal(state.v[1, :, 0, 0], [-7, -8, -9, -10, -11, -12, -13, -7, 0])
    assert state.segment_ids[0].tolist() == [1, 1, 2, 2, 2, 7, 0, 0, 0]


SIGHTS = [(False,), (True,), (False, 40), (True, 40), (False, 40, 3), (False, 40, 3, True)]


@pytest.mark.parametrize("sight", [causal_tiles.Sight(*sight) for sight in SIGHTS], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_tiles_cover_what_is_visible_and_no_more(sight: causal_tiles.Sight, packed: bool):
    """Every tile with a visible pair is listed. Without documents, no other tile is."""
    time, blocks = 160, Attention(32, 32)
    x = jnp.zeros((1, time, 1, 4))
    ids = jnp.repeat(jnp.array([[1, 2, 0]], jnp.int32), jnp.array([70, 60, 30]), axis=1)
    placed = kv_cache.place(x, x, ids if packed else None, None)
    tiles = causal_tiles.plan(placed, (time, 2), blocks, sight)
    listed = {tuple(pair) for pair in np.asarray(tiles.pairs)[: int(tiles.needed)].tolist()}
    index = jnp.arange(time)
    pair = (ids[0][:, None], ids[0][None]) if packed else ()
    seen = segments.visible(index[:, None], index, *pair, strict=sight.strict)
    near = index[:, None] - index < (sight.window or time)
    first = (segments.positions(ids)[0] if packed else index) < sight.global_tokens
    kinds = (seen & near, seen & first & ~near) if sight.apart else (seen & (near | first),)
    needed = [np.asarray(kind).reshape(5, 32, 5, 32).any(axis=(1, 3)) for kind in kinds]
    # Pairs beyond the window form the second diagonal block of a matrix twice as large.
    needed = np.block([[needed[0], np.zeros((5, 5))], [np.zeros((5, 5)), needed[-1]]])
    needed = needed if sight.apart else needed[:5]
    assert listed == {tuple(pair) for pair in np.argwhere(needed).tolist()}
    order = np.asarray(tiles.pairs)[: int(tiles.needed)]
    assert order.tolist() == sorted(order.tolist(), key=lambda pair: (pair[0], -pair[1]))


class Tokens(NamedTuple):
    q: jax.Array
    v: jax.Array


def test_a_scan_over_chunks_is_a_loop_over_them():
    """Output, state and gradients agree, for mathematics with an autodiff backward."""

    def forward(x: Tokens, documents: Any, s: jax.Array, how: float) -> tuple[jax.Array, jax.Array]:
        assert documents is None
        return jnp.sin(x.q @ s) + x.v, how * s + jnp.swapaxes(x.q, -1, -2) @ x.v

    def backward(
        x: Tokens, documents: Any, s: jax.Array, d_out: jax.Array, d_s: jax.Array, how: float
    ) -> Any:
        return jax.vjp(lambda x, s: forward(x, documents, s, how), x, s)[1]((d_out, d_s))

    def loop(x: Tokens, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        outs = []
        for n in range(x.q.shape[0]):
            here = Tokens(2.0 * x.q[n].astype(jnp.float32), x.v[n].astype(jnp.float32))
            out, s = forward(here, None, s, 0.5)
            outs.append(out)
        return jnp.stack(outs), s

    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    x, s = Tokens(draw(3, 2, 1, 4, 5).astype(jnp.bfloat16), draw(3, 2, 1, 4, 6)), draw(2, 1, 5, 6)
    mathematics = xla_chunks.Mathematics(forward, backward, 0.5, 2.0)
    got, pull = jax.vjp(lambda x, s: xla_chunks.recur(mathematics, x, None, s), x, s)
    want, plain = jax.vjp(loop, x, s)
    cotangents = draw(*want[0].shape), draw(*want[1].shape)
    for ours, theirs in zip(
        jax.tree.leaves((got, pull(cotangents))),
        jax.tree.leaves((want, plain(cotangents))),
        strict=True,
    ):
        assert ours.dtype == theirs.dtype
        assert error(ours, theirs) <= 1e-6


def test_splitting_and_merging_are_inverse():
    x = jnp.arange(2.0 * 70 * 4 * 3).reshape(2, 70, 4, 3)
    blocks = causal_tiles.split_queries(x, 2, 32)
    assert blocks.shape == (3, 4, 64, 3)
    assert error(causal_tiles.merge_queries(blocks, 2, 70, 32), x) == 0.0
    assert error(causal_tiles.merge_keys(causal_tiles.split_keys(x, 32), 2, 70), x) == 0.0
