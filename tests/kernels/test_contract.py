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
    empty_state,
    error,
    expected,
    identify,
    over_time,
    refusal,
    refused,
    settings,
    tiered,
    tolerance,
)


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
    declared = empty_state(op, case, problem)
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
    pytest.param(name, case, marks=[pytest.mark.slow] if i > 1 else [])
    for name in dispatch.names()
    if dispatch.get(name).reference_vjp is not None
    for i, case in enumerate(
        c for c in dispatch.get(name).cases if c.tag == "fast" and not c.carried
    )
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


def variants() -> list[Any]:
    """(op, options) of the carried fast cases, once each; slow if others ask for equal inputs."""
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


@pytest.mark.parametrize(("name", "form", "options"), SPLIT, ids=str)
def test_split_equals_one_call(name: str, form: str, options: Any):
    """33 + 33 tokens with carried state, with padding in between, equal one call."""
    op = dispatch.get(name)
    half, whole = (a_case(time=time, options=options) for time in (33, 66))
    if refused(name, form, options, half):
        pytest.skip("the form does not take these options")
    problem = contract.sample(op, whole)
    want = answer(name, "reference", whole, problem).out
    state = op.init_state(asked(op, half), jnp.float32, 2, 70)
    along = over_time(name, options)

    def cut(start: int, stop: int) -> dict[str, jax.Array]:
        return problem.inputs | {k: problem.inputs[k][:, start:stop] for k in along}

    def check_length(state: Any, *lengths: int) -> None:
        if op.state.growth == "linear":
            assert [int(n) for n in state.length] == list(lengths)

    run = jax.jit(
        lambda inputs, ids, state: dispatch.apply(
            name, inputs, segment_ids=ids, state=state, form=form, options=options
        ),
        compiler_options=QUICK,
    )
    # Row 0 holds 20 tokens of the first call, row 1 all 33; the rest of row 0 is padding.
    ids = jnp.asarray(np.arange(33) < np.array([[20], [33]]), jnp.int32)
    first, carried = run(cut(0, 33), ids, state)
    check_length(carried, 20, 33)
    later = {
        k: jnp.stack([x[0, 20:53], x[1, 33:]]) for k, x in problem.inputs.items() if k in along
    }
    second, carried = run({**problem.inputs, **later}, jnp.ones((2, 33), jnp.int32), carried)
    row_0 = jnp.concatenate([first[0, :20], second[0]])
    row_1 = jnp.concatenate([first[1], second[1]])
    assert error(row_0, want[0, :53]) <= tolerance(name, form)
    assert error(row_1, want[1]) <= tolerance(name, form)
    check_length(carried, 53, 66)


@pytest.mark.parametrize(("name", "options"), variants(), ids=str)
def test_steps_equal_one_call(name: str, options: Any):
    """66 steps from an empty state."""
    op = dispatch.get(name)
    case = a_case(time=66, options=options)
    problem = contract.sample(op, case)
    want = answer(name, "reference", case, problem).out
    state = op.init_state(asked(op, case), jnp.float32, 2, 70)
    along = over_time(name, options)

    def one(state: Any, t: jax.Array) -> tuple[Any, jax.Array]:
        token = {k: x[:, t] if k in along else x for k, x in problem.inputs.items()}
        return dispatch.step(name, token, state, options=options)

    end, out = jax.jit(
        lambda state: jax.lax.scan(one, state, jnp.arange(66)), compiler_options=QUICK
    )(state)
    assert error(jnp.moveaxis(out, 0, 1), want) <= tolerance(name, "reference")
    assert jax.tree.structure(end) == jax.tree.structure(state)


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


@pytest.mark.parametrize(
    ("name", "options"), [(n, o) for n in dispatch.names() for o in settings(n)], ids=str
)
def test_flops_are_the_products_of_the_reference(name: str, options: Any):
    """Counted in its jaxpr; of attention, only pairs that somebody sees."""
    op = dispatch.get(name)
    case = a_case(time=64, options=options)
    inputs = contract.sample(op, case).inputs
    if op.state.growth == "linear":
        # With values that are unit vectors the output is the matrix of weights.
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
    """Two per multiply-add of every dot_general, bodies of scans times their length."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(left[i] for i in contracted)
        for inner in jaxprs.within(eqn):
            total += products(inner) * eqn.params.get("length", 1)
    return total
