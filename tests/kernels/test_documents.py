"""How every op treats packed documents, padding and the future, in every form but the reference.

All tests of one op and setting share one compiled program.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import contract, dispatch
from kernels.contract import Case
from tests import jaxprs
from tests.kernels.contract_problem import (
    TILED,
    a_case,
    answer,
    assert_close,
    empty_state,
    error,
    out_shape,
    over_time,
    refused,
    settings,
    shared,
    split,
    tiered,
    tolerance,
)

SETTINGS = [
    pytest.param(n, form, *options.values, marks=options.marks)
    for n, form in TILED
    for options in tiered(n, settings(n))
]


def one_document(name: str, options: Any) -> tuple[Case, contract.Problem]:
    """A problem with one document per row, for the program of packed rows."""
    case, problem = shared(name, options, carried=False)
    if not dispatch.is_causal(name, options):  # a document alone does not continue a state
        problem = problem._replace(state=None)
    return case, problem._replace(segment_ids=jnp.ones((2, case.dims["T"]), jnp.int32))


@pytest.mark.parametrize(("name", "form", "options"), SETTINGS, ids=str)
def test_causality(name: str, form: str, options: Any):
    case = a_case(documents="packed", options=options)
    if refused(name, form, options, case):
        pytest.skip("the form does not take these options")
    check_causality(name, form, options)


def check_causality(name: str, form: str, options: Any) -> None:
    """Outputs up to t have exactly zero gradient in all later tokens, and a nonzero one in t. For
    an op that is not causal the gradient in later tokens is nonzero too.
    """
    case, problem = one_document(name, options)
    t = 40
    d_out = jnp.ones(out_shape(name, case)).at[:, t + 1 :].set(0.0)
    grads = answer(name, form, case, problem, d_out).grads[0]
    for key in over_time(name, options):
        later = np.any(np.asarray(grads[key][:, t + 1 :]))
        assert later != dispatch.is_causal(name, options), key
        assert np.any(np.asarray(grads[key][:, t - 1])), key


@pytest.mark.parametrize(("name", "form", "options"), SETTINGS, ids=str)
def test_packed_documents_are_separate(name: str, form: str, options: Any):
    """A document alone in its row has the same outputs and gradients as in a packed row."""
    case, problem = shared(name, options, carried=False)
    if refused(name, form, options, case):
        pytest.skip("the form does not take these options")
    ids = np.asarray(problem.segment_ids)
    d_out = jnp.asarray(np.random.default_rng(3).standard_normal(out_shape(name, case)), "float32")
    packed = answer(name, form, case, problem, d_out)
    limit = tolerance(name, form)
    along = over_time(name, options)
    sums = dict.fromkeys(set(problem.inputs) - along, 0.0)
    for document in (1, 2, 3):
        # Moves the document to the start of its row; the rest is padding.
        order = np.argsort(ids != document, axis=1, kind="stable")
        alone = jnp.asarray(np.sort(ids == document, axis=1)[:, ::-1].astype(np.int32))

        def move(x: jax.Array, order: np.ndarray = order) -> jax.Array:
            wide = jnp.asarray(order).reshape(order.shape + (1,) * (x.ndim - 2))
            return jnp.take_along_axis(x, wide, axis=1)

        def kept(x: jax.Array, alone: jax.Array = alone) -> jax.Array:
            return jnp.where((alone != 0).reshape(alone.shape + (1,) * (x.ndim - 2)), x, 0.0)

        moved = {key: move(x) if key in along else x for key, x in problem.inputs.items()}
        one = problem._replace(inputs=moved, segment_ids=alone)
        single = answer(name, form, case, one, move(d_out))
        assert error(single.out, kept(move(packed.out))) <= limit
        for key in along:
            grad, want = single.grads[0][key], kept(move(packed.grads[0][key]))
            assert error(grad, want) <= limit, key
        sums = {key: total + single.grads[0][key] for key, total in sums.items()}
    for key, total in sums.items():
        assert error(total, packed.grads[0][key]) <= limit, key


@pytest.mark.parametrize(("name", "form"), TILED)
def test_nan_stays_in_its_document(name: str, form: str):
    """A NaN in the middle document voids the rest of that document, and nothing else."""
    op = dispatch.get(name)
    case, problem = shared(name, {}, carried=False)
    ids = np.repeat(np.array([[1, 2, 3]]), [20, 25, 20], axis=1).repeat(2, axis=0)
    problem = problem._replace(segment_ids=jnp.asarray(ids, jnp.int32))
    run = lambda problem: answer(name, form, case, problem)[:2]
    fresh = problem._replace(segment_ids=jnp.full((2, 65), 7, jnp.int32))
    out, state = run(problem)
    for key in over_time(name, {}):
        bad = problem.inputs[key].at[1, 30].set(jnp.nan)
        got, end = run(problem._replace(inputs=problem.inputs | {key: bad}))
        void = np.isnan(np.asarray(got)).any(axis=(2, 3))
        assert np.flatnonzero(void[1]).tolist() == list(range(30, 45)), key
        assert not void[0].any()
        keep = ~void
        np.testing.assert_array_equal(np.asarray(got)[keep], np.asarray(out)[keep])
        if op.state.growth == "constant":
            jax.tree.map(np.testing.assert_array_equal, state, end)
        last = problem.inputs[key].at[1, 50].set(jnp.nan)
        _, end = run(problem._replace(inputs=problem.inputs | {key: last}))
        floats = [np.asarray(x) for x in split(end)]
        assert any(np.isnan(x[1]).any() for x in floats), "a spoilt state may not be continued"
        assert not any(np.isnan(x[0]).any() for x in floats)
        # A new document may follow the spoilt one.
        if op.state.growth == "constant":
            assert np.isfinite(np.asarray(run(fresh._replace(state=end))[0])).all()


@pytest.mark.parametrize(("name", "form"), TILED)
@pytest.mark.parametrize("time", [pytest.param(1, marks=pytest.mark.slow), 65])
def test_rows_of_padding(name: str, form: str, time: int):
    """Zeros and zero gradients; the state stays empty; the other row is as it was alone."""
    op = dispatch.get(name)
    case, problem = shared(name, {}, carried=False, time=time)
    problem = problem._replace(segment_ids=jnp.zeros((2, time), jnp.int32).at[1].set(1))
    got = answer(name, form, case, problem)
    assert not np.any(np.asarray(got.out)[0])
    d_out = jnp.ones(out_shape(name, case))
    grads = answer(name, form, case, problem, d_out).grads[0]
    for key in over_time(name, {}):
        assert not np.any(np.asarray(grads[key])[0]), key
        assert np.isfinite(np.asarray(grads[key])).all(), key
    empty = empty_state(op, case, problem)
    for x, y in zip(got.state, empty, strict=True):
        np.testing.assert_array_equal(np.asarray(x)[0], np.asarray(y)[0])


RECURRENT = [(n, form) for n, form in TILED if dispatch.get(n).state.growth == "constant"]


@pytest.mark.parametrize(("name", "form"), RECURRENT)
def test_an_id_that_comes_again_is_another_document(name: str, form: str):
    """A recurrence cannot read a document that has ended. An equal id does not continue the state
    either.
    """
    case, problem = shared(name, {}, carried=True)
    state = problem.state._replace(segment=jnp.asarray([3, 9], jnp.int32))
    ids = jnp.asarray([[1] * 15 + [2] * 14 + [1] * 16 + [3] * 20] * 2, jnp.int32)
    again = problem._replace(segment_ids=ids, state=state)
    want = answer(name, "reference", case, again)
    assert_close(answer(name, form, case, again), want, tolerance(name, form), f"{name} {form}")


CACHED = [(n, form) for n, form in TILED if dispatch.get(n).state.growth == "linear"]


@pytest.mark.parametrize(("name", "form"), CACHED)
def test_tokens_that_do_not_fit_into_a_cache_are_not_seen(name: str, form: str):
    """Appends 65 tokens to rows of 80 and 105, in a cache of 105 slots."""
    case, problem = shared(name, {}, carried=True)
    length = np.array([80, 105], np.int32)
    state = problem.state._replace(
        length=jnp.asarray(length),
        segment_ids=jnp.asarray(np.where(np.arange(105) < length[:, None], 3, 0), jnp.int32),
    )
    full = problem._replace(state=state, segment_ids=jnp.full((2, 65), 3, jnp.int32))
    want = answer(name, "reference", case, full)
    assert_close(answer(name, form, case, full), want, tolerance(name, form), f"{name} {form}")


@pytest.mark.parametrize(("name", "form"), TILED)
def test_masks_are_kept_small(name: str, form: str):
    """The backward pass keeps no mask that is repeated along the channels."""
    problem = contract.sample(dispatch.get(name), a_case(documents="padded"))

    def kept(problem: contract.Problem) -> Any:
        def forward(inputs: Any) -> jax.Array:
            return dispatch.apply(name, inputs, segment_ids=problem.segment_ids, form=form)[0]

        return jax.tree.leaves(jax.vjp(forward, problem.inputs)[1])

    masks = [x.shape for x in jax.eval_shape(kept, problem) if x.dtype == bool]
    if form == "jax_nn":  # it keeps jax.nn's mask of every pair
        masks = [shape for shape in masks if shape[-1] != 65]
    assert all(len(shape) < 4 for shape in masks), masks


def loops(jaxpr: Any) -> Iterator[int]:
    """Lengths of all loops outside of kernels whose length is known."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            continue
        if eqn.primitive.name == "scan":
            yield eqn.params["length"]
        for inner in jaxprs.within(eqn):
            yield from loops(inner)


@pytest.mark.parametrize(("name", "form"), [*TILED, ("gated_linear", "reference")])
def test_only_the_reference_goes_token_by_token(name: str, form: str):
    """Every step of a loop costs kernel launches on a GPU, however small it is."""
    time = 1024
    problem = contract.sample(dispatch.get(name), a_case(time=time, documents="packed"))

    def run(problem: contract.Problem) -> Any:
        def forward(inputs: Any) -> jax.Array:
            return dispatch.apply(name, inputs, segment_ids=problem.segment_ids, form=form)[0]

        out, pull = jax.vjp(forward, problem.inputs)
        return pull(out)

    longest = max([0, *loops(jax.make_jaxpr(run)(problem).jaxpr)])
    assert (longest >= time) == (form == "reference"), longest
