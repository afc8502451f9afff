"""The stick-breaking kernels for GPUs: what they skip, with and without a tolerance."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.blocks import Attention, TritonAttention
from kernels.primitives import device
from tests.kernels.contract_problem import QUICK, assert_close

pytestmark = pytest.mark.skipif(
    device.refusal("triton_gpu", "cpu") is not None, reason="triton is not installed"
)

T, H, K = 160, 2, 8
TILES = Attention(32, 32, 16)
BLOCKS = TritonAttention(32, 32, num_warps=4, num_stages=1, span=1)


def draw(documents: bool) -> tuple[dict[str, Any], Any]:
    """For one head a key takes about a twentieth of the stick, for the other half of it."""
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal((1, T, H, K)).astype("f4") for name in "qkv"}
    arrays["q"][..., 0] = K**0.5
    arrays["k"][..., 0] = np.linspace(-3.0, 0.0, H)
    ids = jnp.asarray(np.repeat([[1, 2, 0]], [110, 30, 20], axis=1), jnp.int32)
    return {name: jnp.asarray(x) for name, x in arrays.items()}, ids if documents else None


def answer(form: str, problem: Any, options: dict[str, Any], blocks: Any) -> Any:
    """The output and the gradients."""
    inputs, ids = problem

    def both(inputs: Any) -> Any:
        call = {"segment_ids": ids, "form": form, "options": options, "blocks": blocks}
        run = lambda inputs: dispatch.apply("stickbreaking", inputs, **call)[0]
        out, pull = jax.vjp(run, inputs)
        return out, pull(jnp.cos(out))[0]

    return jax.jit(both, compiler_options=QUICK)(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True])
def test_passes_over_the_blocks_that_chunked_passes_over(documents: bool):
    """With one query head per key head and equal tiles, both stop at the same block."""
    problem, options = draw(documents), {"tolerance": 0.05, "remainder": "value"}
    want = answer("chunked", problem, options, TILES)
    exact = answer("chunked", problem, {"remainder": "value"}, TILES)
    assert float(jnp.max(jnp.abs(want[0] - exact[0]))) > 1e-4
    assert_close(answer("triton_gpu", problem, options, BLOCKS), want, 1e-5, f"{documents=}")


def test_without_tolerance_it_stops_where_float32_does(monkeypatch: pytest.MonkeyPatch):
    """Weights below 2^-150 are 0 in float32, so skipping them changes no bit."""
    triton_gpu = pytest.importorskip("kernels.stickbreaking.triton_gpu")
    inputs, _ = draw(False)
    # Every key takes all but 2^-10 of the stick, so after 15 keys nothing is left.
    problem = (
        inputs | {"q": jnp.full_like(inputs["q"], 7.0 / K**0.5), "k": inputs["q"] * 0 + 1},
        None,
    )
    options = {"remainder": "value"}
    visited = []
    forward = triton_gpu._forward

    def watch(*args: Any) -> Any:
        outs, saved = forward(*args)
        jax.debug.callback(lambda ends: visited.append(np.asarray(ends)), saved.ends)
        return outs, saved

    monkeypatch.setattr(triton_gpu.attend, "fwd", watch)
    stopped = answer("triton_gpu", problem, options, BLOCKS)
    monkeypatch.setattr(triton_gpu, "USED_UP", 1e9)
    whole = answer("triton_gpu", problem, options, BLOCKS)
    jax.effects_barrier()
    few, all_of_them = (int(np.sum(ends[..., 1] - ends[..., 0])) for ends in visited)
    assert few < 0.7 * all_of_them
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), stopped, whole))
