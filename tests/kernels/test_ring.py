"""The ring of softmax and stick-breaking.

Beyond what test_time_axis tests of every strategy: rings of several sizes, what is sent and kept,
extreme logits, and sticks with nothing left.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval as pe
from jax.sharding import AxisType

from kernels import contract, dispatch
from kernels.contract import Case, Layout
from kernels.primitives.attention import near
from kernels.primitives.time_shards import Shards
from kernels.shard import Placement
from launch.benchmarks.programs import collectives, within
from tests.kernels.contract_problem import QUICK, TINY, assert_close, error, tolerance

WAYS: list[tuple[str, Layout]] = [
    ("softmax", "zigzag"),
    ("stickbreaking", "contiguous"),
    ("softmax", "contiguous"),
]
SIZES = {"B": 2, "H": 4, "G": 2, "K": 16, "V": 8}


def placement(ranks: int, layout: Layout) -> Placement:
    mesh = jax.make_mesh((ranks,), ("sequence",), axis_types=(AxisType.Auto,))
    return Placement(mesh, {"T": ("sequence",)}, "ring", layout)


@cache
def program(name: str, form: str, options: tuple[tuple[str, Any], ...], where: Any) -> Any:
    """`function`, compiled."""
    return jax.jit(function(name, form, options, where), compiler_options=QUICK)


def function(name: str, form: str, options: tuple[tuple[str, Any], ...], where: Any) -> Any:
    """(inputs, segment_ids, d_out) -> output and gradients, for rows in time order. `where` is
    (ranks, layout), or None for one device.
    """
    place = None if where is None else placement(*where)
    shards = Shards((), 1, "contiguous") if where is None else Shards((), *where)

    def run(inputs: Any, segment_ids: Any, d_out: Any) -> Any:
        def forward(inputs: Any) -> jax.Array:
            laid = {n: shards.by_rank(x, 1) if n in "qkv" else x for n, x in inputs.items()}
            ids = None if segment_ids is None else shards.by_rank(segment_ids, 1)
            given = {"segment_ids": ids, "options": dict(options), "placement": place}
            return shards.in_order(dispatch.apply(name, laid, form=form, **given)[0], 1)

        out, pull = jax.vjp(forward, inputs)
        return out, *pull(d_out)

    return run


def draw(name: str, time: int, options: Any, extreme: contract.Extreme | None = None) -> Any:
    """Inputs, and a cotangent of the output."""
    case = Case(SIZES | {"T": time}, options, extreme=extreme)
    inputs = contract.sample(dispatch.get(name), case).inputs
    shape = [case.dims[letter] for letter in "BTHV"]
    return inputs, jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def documents(time: int) -> jax.Array:
    """In row 0 the second document spans half of the row, and the last quarter is padding, so some
    ranks hold only padding. Row 1 is one document.
    """
    lengths = np.array([time // 10, time // 2 + 1])
    ids = np.repeat([1, 2, 3], [*lengths, 3 * time // 4 - lengths.sum()])
    rows = np.stack([np.pad(ids, (0, time - ids.size)), np.ones(time, int)])
    return jnp.asarray(rows, jnp.int32)


@pytest.mark.parametrize(
    ("ranks", "share", "packed"),
    [
        (4, 38, True),
        pytest.param(2, 150, True, marks=pytest.mark.slow),
        pytest.param(4, 38, False, marks=pytest.mark.slow),
        pytest.param(8, 18, False, marks=pytest.mark.slow),
        pytest.param(8, 258, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("name", "layout"), WAYS[:2])
def test_every_rank_equals_one_device(
    name: str, layout: Layout, ranks: int, share: int, packed: bool
):
    """Output and gradients of each rank's tokens are right. `share`, the tokens of a rank, is not a
    multiple of a tile.
    """
    time = ranks * share
    inputs, d_out = draw(name, time, {})
    ids = documents(time) if packed else None
    got, want = (
        program(name, "chunked", (), where)(inputs, ids, d_out) for where in ((ranks, layout), None)
    )
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        for rank in range(ranks):
            part = slice(rank * share, (rank + 1) * share)
            assert error(ours[:, part], theirs[:, part]) <= tolerance(name, "chunked"), rank


@pytest.mark.parametrize(("name", "layout"), WAYS)
def test_floats_go_only_to_the_next_rank(name: str, layout: Layout):
    """Also with all gradients. No rank holds as many floats as the row has keys or pairs."""
    time = 2048
    inputs, d_out = draw(name, time, {})
    run = function(name, "chunked", (), (8, layout))
    args = inputs, documents(time), d_out
    assert {(x.kind, x.times) for x in collectives(run, *args)} == {
        ("ppermute", 7),
        ("ppermute", 1),
    }
    closed = jax.make_jaxpr(run)(*args)
    used, _ = pe.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals))
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    size = SIZES["B"] * time * SIZES["G"] * SIZES["V"]
    largest = max(x.size for x in _on_a_rank(used, False) if is_float(x))
    tile = SIZES["B"] * SIZES["H"] * 128 * 128
    assert largest <= max(tile, size // 2)


def _on_a_rank(jaxpr: Any, inside: bool) -> Iterator[Any]:
    """The arrays that equations inside shard_map compute."""
    for eqn in jaxpr.eqns:
        if inside:
            yield from (x.aval for x in eqn.outvars if hasattr(x.aval, "dtype"))
        for inner in within(eqn):
            yield from _on_a_rank(inner, inside or eqn.primitive.name == "shard_map")


EXTREMES = [
    ("softmax", "zigzag", {"logits_soft_cap": 3.0, "sink": True}, near("q", 24.0, -24.0)),
    ("stickbreaking", "contiguous", {"remainder": "value"}, near("k", 30.0, -30.0)),
    ("stickbreaking", "contiguous", {"remainder": "value"}, near("k", 16.0)),
]


@pytest.mark.parametrize(("name", "layout", "options", "extreme"), EXTREMES)
def test_extreme_logits(name: str, layout: Layout, options: Any, extreme: contract.Extreme):
    """Compared with the reference in float64, relative to each gradient's own size."""
    inputs, d_out = draw(name, 64, options, extreme)
    key = name, tuple(options.items())
    got = program(key[0], "chunked", key[1], (4, layout))(inputs, None, d_out)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (inputs, d_out))
        want = program(key[0], "reference", key[1], None)(wide[0], None, wide[1])
        assert_close(got, want, tolerance(name, "chunked"), name, TINY)


@pytest.mark.parametrize("tolerance_", [0.0, 1e-6])
def test_ranks_beyond_a_stick_that_is_used_up_are_not_read(tolerance_: float):
    """If every key takes nearly everything, the first token of a rank needs only the rank before
    it.

    So NaN in the values of rank 0 reaches only rank 1, although NaN times the smallest weight is
    NaN.
    """
    ranks, share = 4, 32
    inputs, d_out = draw("stickbreaking", ranks * share, {})
    ones = jnp.ones_like(inputs["q"])
    inputs = inputs | {"q": 20.0 * ones, "k": jnp.ones_like(inputs["k"])}
    broken = inputs | {"v": inputs["v"].at[:, : share - 1].set(jnp.nan)}
    run = program("stickbreaking", "chunked", (("tolerance", tolerance_),), (ranks, "contiguous"))
    d_out = d_out.at[:, : 2 * share].set(0.0)
    (got, d_got), (want, d_want) = (run(x, None, d_out) for x in (broken, inputs))
    assert np.isnan(got[:, share:]).any()
    np.testing.assert_array_equal(got[:, 2 * share :], want[:, 2 * share :])
    np.testing.assert_array_equal(d_got["q"][:, 2 * share :], d_want["q"][:, 2 * share :])


def test_stickbreaking_rows_must_be_contiguous():
    inputs, _ = draw("stickbreaking", 64, {})
    with pytest.raises(ValueError, match="ring: its tokens must be contiguous, not zigzag"):
        dispatch.apply("stickbreaking", inputs, form="chunked", placement=placement(4, "zigzag"))
