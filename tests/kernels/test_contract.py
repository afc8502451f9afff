"""The contract of an op, checked once for every op, form and case."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import contract, dispatch
from kernels.contract import Case
from tests.kernels.contract_problem import (
    QUICK,
    answer,
    assert_close,
    cases,
    error,
    expected,
    identify,
    refusal,
)

FORMS = [(n, form) for n in dispatch.names() for form in dispatch.get(n).forms]
TILED = [(n, form) for n, form in FORMS if form != "reference"]


def tolerance(name: str, form: str, dtype: str = "float32") -> float:
    return dispatch.get(name).tolerances[form, dtype].value


def check_case(name: str, form: str, case: Case) -> None:
    """Output, state and all gradients; twice the same bits; zeros on padding."""
    op = dispatch.get(name)
    problem = contract.sample(op, case)
    reason = refusal(name, form, case)
    if reason is not None:
        with pytest.raises(ValueError, match="cannot run") as caught:
            answer(name, form, case, problem)
        assert reason in str(caught.value)
        return
    got, again = (answer(name, form, case, problem) for _ in range(2))
    want = expected(name, case)
    assert_close(got, want, tolerance(name, form, case.dtype), f"{name} {form}")
    same = jax.tree.map(lambda x, y: bool(jnp.all(x == y)), got, again)
    assert all(jax.tree.leaves(same))
    if problem.segment_ids is not None:
        assert not np.any(np.asarray(got.out)[np.asarray(problem.segment_ids) == 0])
    capacity = case.dims["T"] if problem.state is None else problem.state[2].shape[1]
    declared = op.init_state(case.dims, case.dtype, case.dims["B"], capacity)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (declared, got.state))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("name", "form", "case"), list(cases("fast")), ids=identify)
def test_equals_reference(name: str, form: str, case: Case):
    check_case(name, form, case)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form", "case"), list(cases("slow")), ids=identify)
def test_equals_reference_product(name: str, form: str, case: Case):
    check_case(name, form, case)


BY_HAND = [
    (name, case)
    for name in dispatch.names()
    for case in dispatch.get(name).cases
    if case.tag == "fast" and not case.carried and dispatch.get(name).reference_vjp is not None
]


@pytest.mark.parametrize(("name", "case"), BY_HAND, ids=identify)
def test_hand_derived_backward(name: str, case: Case):
    """The derivative worked out by hand, in plain jnp, against autodiff of the reference."""
    op = dispatch.get(name)
    problem = contract.sample(op, case)
    shape = [case.dims[letter] for letter in op.out.split()]
    d_out = jnp.asarray(np.random.default_rng(2).standard_normal(shape), case.dtype)
    autodiff = answer(name, "reference", case, problem, d_out).grads[0]
    options = dispatch.bind_options(op, case.options, case.dims)
    constants = dispatch.complete_inputs(op, problem.inputs, options, case.dims)
    assert op.reference_vjp is not None
    by_hand = op.reference_vjp(constants, problem.segment_ids, d_out, options=options)
    assert_close(by_hand, autodiff, tolerance(name, "reference", case.dtype), f"{name} by hand")


def a_case(name: str, **changes: Any) -> Case:
    dims = {"B": 2, "T": 65, "H": 4, "G": 2, "K": 16, "V": 16}
    return dataclasses.replace(Case(dims), **changes)


@pytest.mark.parametrize(("name", "form"), TILED)
def test_causality(name: str, form: str):
    """Outputs up to t have exactly zero gradient in all that comes later, and some in t."""
    case = a_case(name)
    problem = contract.sample(dispatch.get(name), case)
    t = 40
    d_out = jnp.ones((2, 65, 4, 16)).at[:, t + 1 :].set(0.0)
    grads = answer(name, form, case, problem, d_out).grads[0]
    for key, grad in grads.items():
        assert not np.any(np.asarray(grad[:, t + 1 :])), key
        assert np.any(np.asarray(grad[:, t - 1])), key


@pytest.mark.parametrize(("name", "form"), TILED)
def test_packed_documents_are_separate(name: str, form: str):
    """Each document alone in its row gives the same outputs and gradients as packed."""
    case = a_case(name, documents="packed")
    problem = contract.sample(dispatch.get(name), case)
    assert problem.segment_ids is not None
    ids = np.asarray(problem.segment_ids)
    random = np.random.default_rng(3)
    d_out = jnp.asarray(random.standard_normal((2, 65, 4, 16)), jnp.float32)
    packed = answer(name, form, case, problem, d_out)
    limit = tolerance(name, form)
    for document in (1, 2, 3):
        # Moved to the start of its row, the rest is padding.
        order = np.argsort(ids != document, axis=1, kind="stable")
        alone = jnp.asarray(np.sort(ids == document, axis=1)[:, ::-1].astype(np.int32))

        def move(x: jax.Array, order: np.ndarray = order) -> jax.Array:
            return jnp.take_along_axis(x, jnp.asarray(order)[:, :, None, None], axis=1)

        moved = contract.Problem(jax.tree.map(move, problem.inputs), alone, None)
        single = answer(name, form, case, moved, move(d_out))
        keep = (alone != 0)[:, :, None, None]
        assert error(single.out, jnp.where(keep, move(packed.out), 0.0)) <= limit
        for key, grad in single.grads[0].items():
            assert error(grad, jnp.where(keep, move(packed.grads[0][key]), 0.0)) <= limit, key


def variants() -> list[Any]:
    """(op, options) of the fast cases, once each."""
    found: dict[str, Any] = {}
    for name in dispatch.names():
        for case in dispatch.get(name).cases:
            if case.tag == "fast" and case.carried:
                found[f"{name} {case.options}"] = (name, case.options)
    return list(found.values())


@pytest.mark.parametrize(("name", "options"), variants(), ids=str)
def test_split_and_steps_equal_one_call(name: str, options: Any):
    """33 + 33 tokens with carried state, with padding in between, and 66 steps, equal one call."""
    op = dispatch.get(name)
    half = a_case(name, options=options, dims={"B": 2, "T": 33, "H": 4, "G": 2, "K": 16, "V": 16})
    whole = a_case(name, options=options, dims={**half.dims, "T": 66})
    problem = contract.sample(op, whole)
    want = answer(name, "reference", whole, problem).out
    state = op.init_state(half.dims, jnp.float32, 2, 70)
    over_time = {spec.name for spec in op.inputs if "T" in spec.letters}

    def cut(start: int, stop: int) -> dict[str, jax.Array]:
        parts = {k: x[:, start:stop] for k, x in problem.inputs.items() if k in over_time}
        return {**problem.inputs, **parts}

    for form in op.forms:
        run = jax.jit(
            lambda inputs, ids, state, form=form: dispatch.apply(
                name, inputs, segment_ids=ids, state=state, form=form, options=options
            ),
            compiler_options=QUICK,
        )
        # Row 0 holds 20 tokens of the first call, row 1 all 33; the rest of row 0 is padding.
        ids = jnp.asarray(np.arange(33) < np.array([[20], [33]]), jnp.int32)
        first, carried = run(cut(0, 33), ids, state)
        assert [int(n) for n in carried.length] == [20, 33]
        later = {
            k: jnp.stack([x[0, 20:53], x[1, 33:]])
            for k, x in problem.inputs.items()
            if k in over_time
        }
        second, carried = run({**problem.inputs, **later}, jnp.ones((2, 33), jnp.int32), carried)
        row_0 = jnp.concatenate([first[0, :20], second[0]])
        row_1 = jnp.concatenate([first[1], second[1]])
        assert error(row_0, want[0, :53]) <= tolerance(name, form), form
        assert error(row_1, want[1]) <= tolerance(name, form), form
        assert [int(n) for n in carried.length] == [53, 66]

    def one(state: Any, t: jax.Array) -> tuple[Any, jax.Array]:
        token = {k: x[:, t] if k in over_time else x for k, x in problem.inputs.items()}
        return dispatch.step(name, token, state, options=options)

    end, out = jax.jit(
        lambda state: jax.lax.scan(one, state, jnp.arange(66)), compiler_options=QUICK
    )(state)
    assert error(jnp.moveaxis(out, 0, 1), want) <= tolerance(name, "reference")
    assert jax.tree.structure(end) == jax.tree.structure(state)


PROPERTIES = [(n, form, p) for n, form in FORMS for p in dispatch.get(n).properties]


@pytest.mark.parametrize(
    ("name", "form", "fact"), PROPERTIES, ids=[f"{n}-{form}-{p.name}" for n, form, p in PROPERTIES]
)
def test_property(name: str, form: str, fact: contract.Property):
    def run(inputs: Any, options: Any) -> jax.Array:
        dims = {"K": inputs["k"].shape[-1], "V": inputs["v"].shape[-1]}
        if dispatch.get(name).unsupported(form, dims, jnp.float32, defaults | options, "cpu"):
            pytest.skip("the form does not take this problem")
        call = lambda inputs: dispatch.apply(name, inputs, form=form, options=options)[0]
        return jax.jit(call, compiler_options=QUICK)(inputs)

    defaults = dict(dispatch.get(name).options)
    got, want = fact.check(run)
    assert error(got, want) <= tolerance(name, form)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_unsupported_is_honest(name: str, form: str):
    """What is accepted traces to the right shapes; what is refused raises that very reason."""
    op = dispatch.get(name)
    accepted = 0
    for case in [case for case in op.cases if case.tag == "slow"][::29]:
        problem = contract.sample(op, case)

        def run(problem: contract.Problem, case: Case = case) -> Any:
            inputs, ids, state = problem
            return dispatch.apply(
                name, inputs, segment_ids=ids, state=state, form=form, options=case.options
            )

        reason = refusal(name, form, case)
        if reason is None:
            out, _ = jax.eval_shape(run, problem)
            assert out.shape == tuple(case.dims[letter] for letter in op.out.split())
            accepted += 1
        else:
            with pytest.raises(ValueError, match="cannot run") as caught:
                jax.eval_shape(run, problem)
            assert reason in str(caught.value)
    assert accepted


@pytest.mark.parametrize("name", dispatch.names())
def test_flops_of_one_chunk(name: str):
    """XLA's count of both dense products, less the pairs nobody sees."""
    op = dispatch.get(name)
    dims = {"B": 1, "T": 64, "H": 2, "G": 2, "K": 16, "V": 16}

    def dense(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.einsum("bhts,bshv->bthv", jnp.einsum("bthk,bshk->bhts", q, k), v)

    x = jnp.ones((1, 64, 2, 16))
    cost = jax.jit(dense).lower(x, x, x).compile().cost_analysis()
    assert cost is not None
    inputs = {
        "q": jnp.zeros_like(x),
        "k": x,
        "v": jnp.broadcast_to(jnp.eye(64)[:, None], (1, 64, 2, 64)),
    }
    weights = dispatch.apply(name, inputs, form="reference")[0]
    pairs = np.count_nonzero(np.asarray(weights[0, :, 0]) > 0.0)
    assert dispatch.flops(name, dims) == pytest.approx(cost["flops"] * pairs / 64**2, rel=0.02)
    assert op.backward_flops == 2.0
