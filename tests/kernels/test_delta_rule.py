"""The delta rule beyond the contract suite: its inverse, chunks, and extremes."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import contract, dispatch
from kernels.blocks import Chunk
from kernels.contract import Case
from kernels.delta_rule import tile
from kernels.primitives import decay_span
from kernels.primitives.products import AS_GIVEN, ROUNDED, Products
from tests.kernels.contract_problem import QUICK, error

SCALAR = {"decay": "scalar"}
DIMS = {"B": 2, "T": 150, "H": 2, "K": 9, "V": 7}


def keys(kind: str, length: int) -> np.ndarray:
    """Keys of length one: random, all nearly equal, or all equal."""
    k = np.random.default_rng(0).standard_normal((3, length, 24))
    spread = {"random": 1.0, "close": 0.1, "same": 0.0}[kind]
    k = k if kind == "random" else k[:, :1] + spread * k
    return k / np.linalg.norm(k, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("length", "base"), [(64, 16), (64, 64), (48, 16), (33, 11), (64, None), (128, None)]
)
@pytest.mark.parametrize("kind", ["random", "close", "same"])
def test_residual_of_the_inverse(kind: str, length: int, base: int | None):
    """(I + M) A = I, even where a power series would explode.

    At beta = 1 the residual is small in absolute terms. At beta = 2, the edge of the domain, I + M
    of similar keys has condition numbers of thousands; there float32 can only promise a residual
    relative to |I + M| |A|.
    """
    gram = np.einsum("bik,bjk->bij", keys(kind, length), keys(kind, length))
    for beta in (1.0, 2.0):
        m = np.float32(beta * np.tril(gram, -1))
        invert = partial(tile.unit_inverse, base=base) if base else tile.masked_inverse
        inverse = np.asarray(invert(jnp.asarray(m)), np.float64)
        matrix = np.eye(length) + m
        size = lambda x: np.linalg.norm(x, axis=(1, 2))
        residual = size(matrix @ inverse - np.eye(length))
        assert np.all(residual <= np.finfo(np.float32).eps * size(matrix) * size(inverse))
        assert beta == 2.0 or np.all(residual <= 1e-5 * np.sqrt(length))
        assert not np.any(np.triu(inverse, 1))


@pytest.mark.parametrize("how", [AS_GIVEN, ROUNDED], ids=["as given", "in parts"])
def test_decay_spans_are_the_double_loop(how: Products):
    """Spans after a token that forgets everything are right too, where a running sum
    loses digits.
    """
    g = -np.exp(np.random.default_rng(0).standard_normal((2, 20)))
    g[:, 5] = -3e5
    want = np.zeros((2, 20, 20))
    for i in range(20):
        for j in range(i):
            want[:, i, j] = g[:, j + 1 : i + 1].sum(axis=-1)
    got = np.asarray(decay_span.spans(jnp.asarray(g[:, None], jnp.float32), how))
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_cotangent_of_decay_spans():
    g = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 20)), jnp.float32)

    def sums(g: jax.Array) -> tuple[jax.Array, ...]:
        start = jnp.cumsum(jnp.swapaxes(g, 1, 2), axis=1)
        total = start[:, -1:]
        return decay_span.spans(g, AS_GIVEN), start, total - start, total

    out, pull = jax.vjp(sums, g)
    np.testing.assert_allclose(decay_span.start(g), out[1], rtol=1e-5)
    np.testing.assert_allclose(decay_span.rest(g), out[2], rtol=1e-5, atol=1e-5)
    random = np.random.default_rng(1)
    given = [jnp.asarray(random.standard_normal(x.shape), jnp.float32) for x in out]
    given[0] = jnp.tril(given[0])
    for how in (AS_GIVEN, ROUNDED):
        assert error(decay_span.cotangent(*given, products=how), pull(tuple(given))[0]) <= 1e-6


@cache
def program(form: str, decay: str, blocks: Chunk | None) -> Any:
    """problem -> output, final state, gradients of the inputs and of the initial state."""

    def loss(inputs: Any, s: jax.Array, problem: contract.Problem) -> tuple[jax.Array, Any]:
        out, state = dispatch.apply(
            "delta_rule",
            inputs,
            segment_ids=problem.segment_ids,
            state=problem.state._replace(s=s),
            form=form,
            options={"decay": decay},
            blocks=blocks,
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state.s)), (out, state.s)

    def run(problem: contract.Problem) -> Any:
        grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
        return grad(problem.inputs, problem.state.s, problem)

    return jax.jit(run, compiler_options=QUICK)


@pytest.mark.parametrize("options", [{}, SCALAR], ids=str)
def test_any_chunk_gives_the_same(options: dict[str, Any]):
    case = Case(DIMS, options, "padded", carried=True)
    problem = contract.sample(dispatch.get("delta_rule"), case)
    decay = options.get("decay", "none")
    want = program("reference", decay, None)(problem)
    for blocks in (Chunk(16, 16), Chunk(48, 16), Chunk(128, 32)):
        got = program("chunked", decay, blocks)(problem)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert error(x, y) <= 1e-5, blocks


EXTREMES = {
    "forgets all": {"log_decay": -50.0},
    "forgets all at times": {"log_decay": "mixed"},
    "writes nothing": {"beta": 0.0},
    "writes all": {"beta": 1.0},
    "reflects": {"beta": 2.0},
    "zero keys": {"k": 0.0},
    "same keys": {"k": 1.0 / 3.0, "beta": 1.0},
    "close keys": {"k": "close", "beta": 1.0},
    "close keys reflect": {"k": "close", "beta": 2.0},
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_finite_and_right(name: str):
    """Output and gradients equal those of the token-by-token form."""
    problem = contract.sample(
        dispatch.get("delta_rule"), Case(DIMS, SCALAR, "packed", carried=True)
    )
    inputs = dict(problem.inputs)
    rare = jnp.arange(DIMS["T"])[:, None] % 7 == 3
    close = inputs["k"][:, :1] + 0.1 * inputs["k"]
    drawn = {
        "mixed": jnp.where(rare, -1e4, inputs["log_decay"]),
        "close": close / jnp.linalg.norm(close, axis=-1, keepdims=True),
    }
    for key, value in EXTREMES[name].items():
        inputs[key] = drawn[value] if value in drawn else jnp.full_like(inputs[key], value)
    problem = problem._replace(inputs=inputs)
    got = program("chunked", "scalar", None)(problem)
    want = program("reference", "scalar", None)(problem)
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert bool(jnp.all(jnp.isfinite(x))), path
        assert error(x, y) <= 1e-5, path


def test_state_is_an_affine_map_of_the_first():
    """S_T = P S_0 + S_T(0), so doubling the initial state adds P S_0 once more."""
    problem = contract.sample(dispatch.get("delta_rule"), Case(DIMS, SCALAR, carried=True))

    def end(scale: float) -> jax.Array:
        scaled = problem._replace(state=problem.state._replace(s=scale * problem.state.s))
        (_, s) = program("chunked", "scalar", None)(scaled)[1]
        return s

    assert error(end(2.0) - end(1.0), end(1.0) - end(0.0)) <= 1e-5


def test_without_decay_there_are_no_exponentials():
    """Neither forward nor backward."""
    problem = contract.sample(dispatch.get("delta_rule"), Case(DIMS, {}))
    loss = lambda inputs: jnp.sum(dispatch.apply("delta_rule", inputs, form="chunked")[0])
    text = str(jax.make_jaxpr(jax.grad(loss))(problem.inputs))
    assert " exp " not in text
    gated = contract.sample(dispatch.get("delta_rule"), Case(DIMS, SCALAR)).inputs
    loss = lambda inputs: jnp.sum(
        dispatch.apply("delta_rule", inputs, form="chunked", options=SCALAR)[0]
    )
    assert " exp " in str(jax.make_jaxpr(jax.grad(loss))(gated))
