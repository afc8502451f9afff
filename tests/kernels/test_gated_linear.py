"""Gated linear attention beyond the contract suite: chunk sizes, strong gates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.blocks import Chunk
from tests.kernels.contract_problem import QUICK, assert_close

DECAYS = ["none", "scalar", "vector"]


def problem(decay: str, time: int = 130) -> tuple[dict[str, Any], jax.Array]:
    """Inputs and a cotangent. Decays range from none to total, with strong ones among mild ones."""
    random = np.random.default_rng(0)
    q, k, d_out = (random.standard_normal((2, time, 2, 12)) for _ in range(3))
    inputs = {"q": q, "k": k, "v": random.standard_normal((2, time, 2, 12))}
    if decay != "none":
        shape = (2, time, 2) + ((12,) if decay == "vector" else ())
        kinds = np.array([0.0, -1e-3, -0.1, -1.0, -50.0, -1e4])
        inputs["log_decay"] = random.choice(kinds, shape, p=[0.2, 0.3, 0.2, 0.1, 0.1, 0.1])
    return {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}, jnp.asarray(
        d_out, jnp.float32
    )


def gradients(decay: str, form: str, blocks: Chunk | None = None) -> Any:
    inputs, d_out = problem(decay)

    def run(inputs: Any) -> Any:
        call = lambda inputs: dispatch.apply(
            "gated_linear", inputs, form=form, options={"decay": decay}, blocks=blocks
        )
        (out, state), pull = jax.vjp(call, inputs)
        d_state = jax.tree.map(jnp.ones_like, state.s)
        zero = np.zeros(state.segment.shape, jax.dtypes.float0)
        return out, state, pull((d_out, type(state)(d_state, zero)))

    return jax.jit(run, compiler_options=QUICK)(inputs)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("sizes", [(16, 4), (32, 1), (64, 64), (128, 16)], ids=str)
def test_chunk_size_does_not_matter(decay: str, sizes: tuple[int, int]):
    """With log decays of 0, -1e4 and between, output, state and gradients equal the reference."""
    got = gradients(decay, "chunked", Chunk(*sizes))
    assert_close(got, gradients(decay, "reference"), 1e-5, f"{decay} {sizes}")


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_gradient_of_decay_keeps_its_digits(decay: str):
    """Where each token forgets all but e^-30 of the past, its gradient is that small, not noise."""
    inputs, d_out = problem(decay)
    inputs["log_decay"] = jnp.full_like(inputs["log_decay"], -30.0)

    def grad(form: str) -> jax.Array:
        def loss(log_decay: jax.Array) -> jax.Array:
            call = inputs | {"log_decay": log_decay}
            out = dispatch.apply("gated_linear", call, form=form, options={"decay": decay})[0]
            return jnp.sum(out * d_out)

        return jax.jit(jax.grad(loss), compiler_options=QUICK)(inputs["log_decay"])

    assert float(jnp.max(jnp.abs(grad("reference")))) < 1e-9
    # Scaled up, because the squares of the error would underflow.
    assert_close(1e12 * grad("chunked"), 1e12 * grad("reference"), 1e-5, decay)


def test_halving_needs_a_power_of_two():
    with pytest.raises(ValueError, match="set length=64"):
        gradients("vector", "chunked", Chunk(48, 16))
    assert_close(
        gradients("scalar", "chunked", Chunk(48, 16)), gradients("scalar", "reference"), 1e-5, "48"
    )


def test_unknown_decay():
    inputs, _ = problem("none", 3)
    with pytest.raises(ValueError, match="must be one of none, scalar, vector"):
        dispatch.apply("gated_linear", inputs, form="chunked", options={"decay": "diagonal"})
