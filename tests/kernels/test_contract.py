"""The contract of an op, checked once for every op, form and case."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import contract, dispatch
from kernels.contract import Case
from tests import jaxprs
from tests.kernels.contract_problem import (
    FORMS,
    QUICK,
    a_case,
    answer,
    asked,
    assert_close,
    cases,
    check_case,
    empty_state,
    error,
    identify,
    over_time,
    refusal,
    refused,
    settings,
    shared,
    tiered,
    tolerance,
)


@pytest.mark.parametrize(("name", "form", "case"), list(cases("fast")), ids=identify)
def test_equals_reference(name: str, form: str, case: Case):
    check_case(name, form, case)


BY_HAND = [
    pytest.param(name, case, marks=[pytest.mark.slow] if i > 1 else [])
    for name in dispatch.names()
    if dispatch.get(name).reference_vjp is not None
    for i, case in enumerate(
        c for c in dispatch.get(name).cases if c.tag == "fast" and not c.carried
    )
]


@pytest.mark.parametrize(("name", "case"), BY_HAND, ids=identify)
def test_hand_derived_backward(name: str, case: Case):
    """The hand-derived derivative, in plain jnp, equals autodiff of the reference."""
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


def variants() -> list[Any]:
    """(op, options) of the carried fast cases, once each; slow if others need equal inputs."""
    found: list[Any] = []
    for name in dispatch.names():
        carried = [c.options for c in dispatch.get(name).cases if c.tag == "fast" and c.carried]
        for options in tiered(name, carried):
            found.append(pytest.param(name, *options.values, marks=options.marks))
    return found


SPLIT = [
    pytest.param(*variant.values[:1], form, *variant.values[1:], marks=variant.marks)
    for variant in variants()
    for form in dispatch.get(variant.values[0]).forms
]


def one_row(name: str, options: Any) -> tuple[Case, contract.Problem]:
    """One document per row. The state is empty and has room for more tokens than T."""
    case, problem = shared(name, options, carried=True)
    empty = empty_state(dispatch.get(name), case, problem)
    return case, problem._replace(state=empty, segment_ids=jnp.ones((2, 65), jnp.int32))


@pytest.mark.parametrize(("name", "form", "options"), SPLIT, ids=str)
def test_split_equals_one_call(name: str, form: str, options: Any):
    """Two calls that pass on the state equal one call. Rows have unequal lengths and end in
    padding.
    """
    op = dispatch.get(name)
    case, whole = one_row(name, options)
    if refused(name, form, options, case):
        pytest.skip("the form does not take these options")
    want = np.asarray(answer(name, "reference", case, whole).out)
    along = over_time(name, options)

    def run(begin: list[int], length: list[int], state: Any) -> tuple[np.ndarray, Any]:
        """Runs these tokens of each row, followed by padding."""
        place = np.arange(65)
        index = np.minimum(np.array(begin)[:, None] + place, 64)
        moved = {
            key: jnp.asarray(
                np.stack([row[i] for row, i in zip(np.asarray(x), index, strict=True)])
            )
            for key, x in whole.inputs.items()
            if key in along
        }
        ids = jnp.asarray(place < np.array(length)[:, None], jnp.int32)
        part = contract.Problem(whole.inputs | moved, ids, state)
        out, state, _ = answer(name, form, case, part)
        if op.state.growth == "linear":
            ends = [a + b for a, b in zip(begin, length, strict=True)]
            assert [int(n) for n in state.length] == ends
        return np.asarray(out), state

    first, carried = run([0, 0], [20, 33], whole.state)
    second, _ = run([20, 33], [32, 32], carried)
    row_0 = np.concatenate([first[0, :20], second[0, :32]])
    row_1 = np.concatenate([first[1, :33], second[1, :32]])
    assert error(row_0, want[0, :52]) <= tolerance(name, form)
    assert error(row_1, want[1]) <= tolerance(name, form)


@pytest.mark.parametrize(("name", "options"), variants(), ids=str)
def test_steps_equal_one_call(name: str, options: Any):
    """65 steps from an empty state."""
    case, problem = one_row(name, options)
    want = answer(name, "reference", case, problem).out
    along = over_time(name, options)

    def one(state: Any, t: jax.Array) -> tuple[Any, jax.Array]:
        token = {k: x[:, t] if k in along else x for k, x in problem.inputs.items()}
        return dispatch.step(name, token, state, options=options)

    run = jax.jit(lambda state: jax.lax.scan(one, state, jnp.arange(65)), compiler_options=QUICK)
    end, out = run(problem.state)
    assert error(jnp.moveaxis(out, 0, 1), want) <= tolerance(name, "reference")
    assert jax.tree.structure(end) == jax.tree.structure(problem.state)
    for_steps = dispatch.get(name).for_steps
    loop = for_steps(problem.state)
    if loop is problem.state:
        return
    after, again = run(loop)
    assert error(again, out) <= tolerance(name, "reference")
    for x, y in zip(after, for_steps(end), strict=True):
        assert x.shape == y.shape
        assert error(x, y) <= tolerance(name, "reference")


PROPERTIES = [
    pytest.param(
        n,
        form,
        fact,
        id=f"{n}-{form}-{fact.name}",
        marks=[pytest.mark.slow] if form == "reference" else [],
    )
    for n, form in FORMS
    for fact in dispatch.get(n).properties
]


@pytest.mark.parametrize(("name", "form", "fact"), PROPERTIES)
def test_property(name: str, form: str, fact: contract.Property):
    def run(inputs: Any, options: Any) -> jax.Array:
        op = dispatch.get(name)
        given = [spec for spec in op.needed(defaults | options).values() if spec.name in inputs]
        dims = {
            letter: size
            for spec in given
            for letter, size in zip(spec.letters.split(), inputs[spec.name].shape, strict=True)
        }
        target = jax.default_backend()
        if dispatch.refusal(op, form, dims, jnp.dtype("float32"), defaults | options, target):
            pytest.skip("the form does not take this problem")
        call = lambda inputs: dispatch.apply(name, inputs, form=form, options=options)[0]
        return jax.jit(call, compiler_options=QUICK)(inputs)

    defaults = dict(dispatch.get(name).options)
    got, want = fact.check(run)
    assert error(got, want) <= tolerance(name, form)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_unsupported_is_honest(name: str, form: str):
    """What is accepted traces to the right shapes; what is refused raises the declared reason."""
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


@pytest.mark.parametrize(
    ("name", "options"), [(n, o) for n in dispatch.names() for o in settings(n)], ids=str
)
def test_flops_are_the_products_of_the_reference(name: str, options: Any):
    """FLOPs are those of the matrix products in the jaxpr. Attention counts only visible pairs."""
    op = dispatch.get(name)
    case = a_case(time=64, options=options)
    inputs = contract.sample(op, case).inputs
    if op.state.growth == "linear":
        # With unit vectors as values the output is the matrix of weights.
        case = dataclasses.replace(case, dims={**case.dims, "G": 4})
        inputs = contract.sample(op, case).inputs
        inputs |= {"v": jnp.broadcast_to(jnp.eye(64)[:, None], (2, 64, 4, 64))}
        plain = {k: v for k, v in options.items() if k not in ("remainder",)}
        inputs = {k: x for k, x in inputs.items() if k != "remainder_bias"}
        weights = dispatch.apply(name, inputs, form="reference", options=plain)[0]
        pairs = np.count_nonzero(np.asarray(weights[0, :, 0]))
        count = 2.0 * 2 * 4 * pairs * 32
    else:
        empty = op.init_state(asked(op, case), jnp.float32, 2, 64)
        call = lambda inputs, state: dispatch.apply(
            name, inputs, state=state, form="reference", options=options
        )
        count = products(jax.make_jaxpr(call)(inputs, empty).jaxpr)
    assert dispatch.flops(name, case.dims, options) == pytest.approx(count, rel=0.02)
    assert op.backward_flops == 2.0


def products(jaxpr: Any) -> float:
    """FLOPs of every dot_general, two per multiply-add. The body of a scan counts once per
    iteration.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(left[i] for i in contracted)
        for inner in jaxprs.within(eqn):
            total += products(inner) * eqn.params.get("length", 1)
    return total
