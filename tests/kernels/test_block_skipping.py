"""Stick-breaking with a tolerance: how far it is from exact, and which gradient it has."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.blocks import Attention
from tests.kernels.contract_problem import QUICK, assert_close

HIGHEST = jax.lax.Precision.HIGHEST
BLOCK = 32
BLOCKS = Attention(BLOCK, BLOCK, 16)
B, T, H, G, K = 2, 192, 4, 2, 8


def draw(documents: bool, remainder: str = "none") -> tuple[dict[str, Any], Any]:
    """In one group of heads a key takes about a twentieth of the stick, in the other half of it."""
    random = np.random.default_rng(0)
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, K), "remainder_bias": (H, K)}
    arrays = {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    arrays["q"][..., 0], arrays["k"][..., 0] = K**0.5, np.array([-3.0, 0.0])
    if remainder != "bias":
        del arrays["remainder_bias"]
    ids = None
    if documents:
        lengths = np.array([[150, 42, 0], [20, 132, 40]])
        ids = [np.repeat([1, 2, 0], row) for row in lengths]
        ids = jnp.asarray(np.stack(ids), jnp.int32)
    return {name: jnp.asarray(x) for name, x in arrays.items()}, ids


def forward(inputs: Any, ids: Any, options: dict[str, Any]) -> jax.Array:
    """The output of the chunked form."""
    kept = {"segment_ids": ids, "form": "chunked", "options": options, "blocks": BLOCKS}
    return dispatch.apply("stickbreaking", inputs, **kept)[0]


def with_gradients(function: Any, inputs: Any) -> Any:
    """The output, and the gradients for one random cotangent."""

    def both(inputs: Any) -> Any:
        out, pull = jax.vjp(function, inputs)
        random = np.random.default_rng(1).standard_normal(out.shape)
        return out, pull(jnp.asarray(random, out.dtype))[0]

    return jax.jit(both, compiler_options=QUICK)(inputs)


@pytest.mark.parametrize(
    ("remainder", "tolerance", "documents"),
    [("none", 0.3, False), ("value", 0.05, True), ("bias", 1e-3, False)],
)
def test_error_is_at_most_the_tolerance(remainder: str, tolerance: float, documents: bool):
    """|out - exact| <= tolerance (max |v| + max |value of the remainder|), and the error is not
    zero."""
    inputs, ids = draw(documents, remainder)

    def run(tolerance: float) -> jax.Array:
        options = {"remainder": remainder, "tolerance": tolerance}
        return jax.jit(lambda x: forward(x, ids, options), compiler_options=QUICK)(inputs)

    exact, found = run(0.0), run(tolerance)
    largest = float(jnp.max(jnp.abs(inputs["v"])))
    bias = float(jnp.max(jnp.abs(inputs.get("remainder_bias", jnp.zeros(1)))))
    rest = {"none": 0.0, "value": largest, "bias": bias}[remainder]
    error = float(jnp.max(jnp.abs(found - exact)))
    # Float32 sums are themselves exact only to a few units in the seventh place.
    assert 0.0 < error <= tolerance * (largest + rest) + 1e-6 * largest


def visible_blocks(inputs: Any, seen: Any, ids: Any, tolerance: float) -> Any:
    """What a block of queries visits, from the definition: Bool [B, G, T, T]."""
    q, k = (np.asarray(inputs[name], np.float64) for name in "qk")
    logits = np.einsum("btghk,bsgk->bghts", q.reshape(B, T, G, H // G, K), k) / K**0.5
    broken = np.where(seen[:, None, None], np.logaddexp(0.0, logits), 0.0)
    first = np.zeros((B, T), int)
    if ids is not None:
        ids = np.asarray(ids)
        first = np.argmax(ids[:, :, None] == ids[:, None], axis=-1)
        first = np.where(ids == 0, T, first)
    visited = np.zeros((B, G, T, T), bool)
    for b, g, i in np.ndindex(B, G, T // BLOCK):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        for j in reversed(range(i + 1)):
            visited[b, g, rows, j * BLOCK : (j + 1) * BLOCK] = True
            left = np.exp(-broken[b, g, :, rows, j * BLOCK :].sum(axis=-1))
            if not np.any((left > tolerance) & (first[b, rows] // BLOCK < j)):
                break
    return visited


@pytest.mark.parametrize(
    ("remainder", "tolerance", "documents"),
    [("none", 1e-3, True), ("value", 0.02, True), ("bias", 1e-6, False)],
)
def test_gradient_is_that_of_the_function_computed(
    remainder: str, tolerance: float, documents: bool
):
    """Compared with autodiff of the definition, with the skipped keys masked."""
    inputs, ids = draw(documents, remainder)
    seen = np.broadcast_to(np.tril(np.ones((T, T), bool), -1), (B, T, T))
    if ids is not None:
        seen = seen & (np.asarray(ids)[:, :, None] == np.asarray(ids)[:, None])
        seen = seen & (np.asarray(ids) != 0)[:, :, None]
    mask = visible_blocks(inputs, seen, ids, tolerance) & seen[:, None]
    # The group whose keys take half of the stick stops long before the other.
    assert mask[:, 1].sum() < 0.9 * mask[:, 0].sum()
    mask = jnp.asarray(np.repeat(mask, H // G, axis=1))

    def definition(inputs: Any) -> jax.Array:
        k, v = (jnp.repeat(inputs[name], H // G, axis=2) for name in "kv")
        logits = jnp.einsum("bthk,bshk->bhts", inputs["q"], k, precision=HIGHEST) / K**0.5
        broken = jnp.where(mask, jax.nn.softplus(logits), 0.0)
        upto = jnp.cumsum(broken[..., ::-1], axis=-1)[..., ::-1]
        weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - upto, 0.0)), 0.0)
        out = jnp.einsum("bhts,bshv->bthv", weights, v, precision=HIGHEST)
        rest = jnp.exp(-upto[..., 0]).swapaxes(1, 2)[..., None]
        taker = {"none": 0.0, "value": v, "bias": inputs.get("remainder_bias")}[remainder]
        out = out + rest * taker
        return out if ids is None else jnp.where((ids != 0)[..., None, None], out, 0.0)

    options = {"remainder": remainder, "tolerance": tolerance}
    found = with_gradients(lambda inputs: forward(inputs, ids, options), inputs)
    assert_close(found, with_gradients(definition, inputs), 1e-5, remainder)


def test_carried_keys_are_passed_over_too():
    """Calls that continue a cache equal one call without a cache, within the tolerance."""
    inputs, _ = draw(False)
    options = {"tolerance": 1e-3, "remainder": "value"}
    exact = dispatch.apply("stickbreaking", inputs, form="reference", options=options)[0]
    dims = {"B": B, "H": H, "G": G, "K": K, "V": K}
    state = dispatch.init_state("stickbreaking", dims=dims, dtype="float32", batch=B, max_len=T)
    call = jax.jit(
        lambda inputs, state: dispatch.apply(
            "stickbreaking", inputs, state=state, form="chunked", options=options, blocks=BLOCKS
        ),
        compiler_options=QUICK,
    )
    outs = []
    for part in (slice(0, 100), slice(100, T)):
        taken = {name: x[:, part] for name, x in inputs.items()}
        out, state = call(taken, state)
        outs.append(out)
    error = float(jnp.max(jnp.abs(jnp.concatenate(outs, axis=1) - exact)))
    assert 0.0 < error <= 2e-3 * float(jnp.max(jnp.abs(inputs["v"])))


@pytest.mark.parametrize("tolerance", [-1e-3, 1.0, float("nan")])
def test_other_tolerances_are_refused(tolerance: float):
    inputs, _ = draw(False)
    options = {"tolerance": tolerance}
    with pytest.raises(ValueError, match="must lie in"):
        dispatch.apply("stickbreaking", inputs, form="chunked", options=options)
