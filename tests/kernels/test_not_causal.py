"""An op that sees the whole document: its mean, with an option that makes it causal.

Tests what the contract suite, steps, states and a split T do with such an op.
"""

import dataclasses
import sys
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch, segments
from kernels.contract import Case, InputSpec, Op, StateSpec, Tolerance, everywhere
from kernels.shard import Placement
from tests.kernels import test_documents

NAME = "document_mean"


class Nothing(NamedTuple):
    """A state that is never read; an op must have one."""

    sum: jax.Array
    segment: jax.Array


def empty(dims: Any, dtype: Any, batch: int, max_len: int) -> Nothing:
    del dtype, max_len
    return Nothing(jnp.zeros((batch, dims["H"], dims["K"])), jnp.zeros((batch,), jnp.int32))


def mean(inputs: Any, segment_ids: Any, state: Any, *, options: Any) -> Any:
    """The mean of x over each token's document, or over the part of it so far."""
    x = inputs["x"]
    batch, time = x.shape[:2]
    ids = jnp.ones((batch, time), jnp.int32) if segment_ids is None else segment_ids
    index = jnp.arange(time)
    seen = (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, None]
    if options["past"]:
        seen &= index[:, None] >= index
    weights = seen / jnp.maximum(seen.sum(-1, keepdims=True), 1)
    out = jnp.einsum("bts,bshk->bthk", weights, x)
    return segments.blank_padding(out, segment_ids), state


def flops(dims: Any, options: Any) -> float:
    pairs = segments.count_pairs(dims["T"]) if options["past"] else dims["T"] ** 2
    return 2.0 * dims["B"] * dims["H"] * dims["K"] * pairs


OP = Op(
    name=NAME,
    inputs=(InputSpec("x", "B T H K"),),
    out="B T H K",
    options={"past": False},
    forms={"reference": f"kernels.{NAME}.reference"},
    unsupported=lambda *_: None,
    prefer=everywhere("reference", "the only one"),
    state=StateSpec((("sum", "B H K"), ("segment", "B")), "constant"),
    init_state=empty,
    step=lambda state, inputs, options: (state, inputs["x"]),
    sequence=(),
    flops=flops,
    bytes=lambda dims, options, itemsize: 0.0,
    cases=(Case({"B": 2, "T": 65, "H": 4, "K": 16}, tag="fast"),),
    tolerances={("reference", "float32"): Tolerance(1e-5, "sums in another order")},
    causal=lambda options: options["past"],
)


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers an op for dispatch under a name of its own, since programs are cached by name."""

    def put(name: str, **changes: Any) -> str:
        package, form = ModuleType(f"kernels.{name}"), ModuleType(f"kernels.{name}.reference")
        forms = {"reference": form.__name__}
        vars(package)["OP"] = dataclasses.replace(OP, name=name, forms=forms, **changes)
        vars(form)["apply"] = mean
        for module in (package, form):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        known = (*dispatch.names(), name)
        monkeypatch.setattr(dispatch, "names", lambda: known)
        return name

    return put


@pytest.mark.parametrize("past", [False, True])
def test_the_suite_reads_what_an_op_declares(declared: Any, past: bool):
    test_documents.check_causality(declared(NAME), "reference", {"past": past})


def test_a_false_declaration_fails(declared: Any):
    with pytest.raises(AssertionError):
        test_documents.check_causality(declared("mean_said_causal", causal=True), "reference", {})
    wrong = declared("mean_said_not", causal=False)
    with pytest.raises(AssertionError):
        test_documents.check_causality(wrong, "reference", {"past": True})


def test_it_takes_whole_rows_only(declared: Any):
    name, x = declared(NAME), jnp.ones((2, 16, 4, 8))
    state = empty({"H": 4, "K": 8}, jnp.float32, 2, 16)
    with pytest.raises(
        ValueError, match=f"{NAME} is not causal .* cannot take one token at a time"
    ):
        dispatch.step(name, {"x": x[:, 0]}, state)
    with pytest.raises(ValueError, match="cannot continue a state; call it on whole rows"):
        dispatch.apply(name, {"x": x}, state=state, form="reference")
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    place = Placement(mesh, {"T": ("sequence",)}, "auto", "contiguous")
    with pytest.raises(ValueError, match="is not causal with these options and cannot split T"):
        dispatch.apply(name, {"x": x}, form="reference", placement=place)
    _, token = dispatch.step(name, {"x": x[:, 0]}, state, options={"past": True})
    assert token.shape == (2, 4, 8)


def test_flops_count_the_pairs_that_are_seen(declared: Any):
    name, dims = declared(NAME), {"B": 1, "T": 4, "H": 1, "K": 1}
    both, past = (dispatch.flops(name, dims, {"past": past}) for past in (False, True))
    assert (both, past) == (32.0, 20.0)


def test_nan_voids_all_of_its_document_and_no_other(declared: Any):
    """NaN also reaches the tokens before it, and those after padding that splits the document."""
    ids = jnp.array([[1, 1, 2, 2, 0, 2, 3, 0]], jnp.int32)
    x = jnp.ones((1, 8, 4, 8)).at[0, 5, 2, 0].set(jnp.nan)
    for past, void in ((False, [2, 3, 5]), (True, [5])):
        out, _ = dispatch.apply(
            declared(NAME), {"x": x}, segment_ids=ids, form="reference", options={"past": past}
        )
        bad = np.isnan(np.asarray(out))
        assert np.flatnonzero(bad.any(axis=(0, 2, 3))).tolist() == void
        assert not bad[:, :, [0, 1, 3]].any(), "other heads are not affected"
