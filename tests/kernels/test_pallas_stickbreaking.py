"""The stick-breaking kernels for TPUs: what they skip, tiles of any shape, sums over keys."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.blocks import Attention
from kernels.primitives import interleaved, products
from tests.kernels.contract_problem import QUICK, assert_close

B, T, H, K = 1, 384, 2, 8


def draw(documents: str, groups: int = H) -> tuple[dict[str, Any], Any]:
    """For one head a key takes about a twentieth of the stick, for the other half of it."""
    random = np.random.default_rng(0)
    shapes = {"q": (B, T, H, K), "k": (B, T, groups, K), "v": (B, T, groups, K)}
    arrays = {name: random.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    arrays["q"][..., 0] = K**0.5
    arrays["k"][..., 0] = np.linspace(-3.0, 0.0, groups)
    ids = None
    if documents == "packed":
        ids = jnp.asarray(np.repeat([[1, 2, 0]], [330, 30, 24], axis=1), jnp.int32)
    return {name: jnp.asarray(x) for name, x in arrays.items()}, ids


def answer(form: str, problem: Any, options: dict[str, Any], blocks: Any) -> Any:
    """The output and the gradients."""
    inputs, ids = problem

    def both(inputs: Any) -> Any:
        call = {"segment_ids": ids, "form": form, "options": options, "blocks": blocks}
        run = lambda inputs: dispatch.apply("stickbreaking", inputs, **call)[0]
        out, pull = jax.vjp(run, inputs)
        return out, pull(jnp.cos(out))[0]

    return jax.jit(both, compiler_options=QUICK)(inputs)


@pytest.mark.parametrize("documents", [pytest.param("none", marks=pytest.mark.slow), "packed"])
def test_passes_over_the_blocks_that_chunked_passes_over(documents: str):
    """With one query head per key head and equal tiles, both stop at the same block."""
    problem, options = draw(documents), {"tolerance": 0.02, "remainder": "value"}
    want = answer("chunked", problem, options, Attention(128, 128, 32))
    exact = answer("chunked", problem, {"remainder": "value"}, Attention(128, 128, 32))
    assert float(jnp.max(jnp.abs(want[0] - exact[0]))) > 1e-4
    got = answer("pallas_tpu", problem, options, Attention(128, 128, 128))
    assert_close(got, want, 1e-5, documents)


@pytest.mark.slow
@pytest.mark.parametrize(("block_q", "block_kv"), [(128, 256), (256, 128)])
def test_tiles_of_any_shape(block_q: int, block_kv: int):
    problem = draw("packed", groups=1)
    want = answer("reference", problem, {}, None)
    got = answer("pallas_tpu", problem, {}, Attention(block_q, block_kv, 128))
    assert_close(got, want, 1e-5, f"{block_q} x {block_kv}")


def test_exact_stops_where_weights_are_zero():
    """With all logits 0, e^-104 of the stick is left after 151 keys. Farther keys are not read, so
    they may be NaN.
    """
    zeros, ones = jnp.zeros((1, 512, 1, 8)), jnp.ones((1, 512, 1, 8))
    inputs = {"q": zeros, "k": zeros, "v": ones.at[:, :128].set(jnp.nan)}
    call = {"form": "pallas_tpu", "blocks": Attention(128, 128, 128)}
    out = dispatch.apply("stickbreaking", inputs, **call)[0]
    np.testing.assert_allclose(np.asarray(out[:, 384:]), 1.0, rtol=1e-6)
    assert np.isnan(np.asarray(out[:, 255])).all()


def test_other_tiles_are_refused():
    with pytest.raises(ValueError, match="block_kv=64 must be a multiple of 128"):
        answer("pallas_tpu", draw("none"), {}, Attention(128, 64, 32))


def test_sums_of_keys_in_order():
    """Rows are in register order; the sums run in key order."""
    random = np.random.default_rng(0)
    keys = random.standard_normal((5, 256)).astype("f4")
    ordered = interleaved.order(jnp.asarray(keys), products.EXACT)
    number = np.asarray(interleaved.keys(256, 5))
    np.testing.assert_array_equal(np.asarray(ordered), keys[:, number[:, 0]])
    ids = jnp.arange(256, dtype=jnp.int32)
    np.testing.assert_array_equal(np.asarray(interleaved.order_ids(ids)), number[:, 0])
    restored = interleaved.restore(ordered, products.EXACT)
    np.testing.assert_array_equal(np.asarray(restored), keys)

    start = jnp.full((1, 5), 2.0)
    later, total = interleaved.suffix_sum(ordered.T, start)
    want = 2.0 + np.cumsum(keys[:, ::-1], axis=1)[:, ::-1] - keys
    np.testing.assert_allclose(np.asarray(later).T, want[:, number[:, 0]], atol=2e-5)
    np.testing.assert_allclose(np.asarray(total)[0], 2.0 + keys.sum(axis=1), atol=2e-5)
    before, total = interleaved.prefix_sum(ordered.T, start)
    want = 2.0 + np.cumsum(keys, axis=1) - keys
    np.testing.assert_allclose(np.asarray(before).T, want[:, number[:, 0]], atol=2e-5)
    np.testing.assert_allclose(np.asarray(total)[0], 2.0 + keys.sum(axis=1), atol=2e-5)
