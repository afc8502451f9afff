"""What the contract tests share.

For each op, form, options and shapes there is one compiled program with its gradients. Documents
and the state are its arguments, so tests that change only these share it; see `shared`.
"""

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import contract, dispatch
from kernels.contract import Case, Op


class Answer(NamedTuple):
    """Output, state, and the cotangents of the inputs and of the initial state's float arrays."""

    out: jax.Array
    state: Any
    grads: Any


def cases(tag: str, *, reference: bool = False) -> Iterator[tuple[str, str, Case]]:
    """(op, form, case) for every case with this tag."""
    for name in dispatch.names():
        op = dispatch.get(name)
        for form in op.forms:
            for case in op.cases:
                if case.extreme is not None and form in case.extreme.beyond:
                    continue
                if case.tag == tag and (reference or form != "reference"):
                    yield name, form, case


def identify(value: Any) -> str:
    """The name of a parameter in a test's id."""
    return value.name if isinstance(value, Case) else str(value)


def refusal(name: str, form: str, case: Case) -> str | None:
    """The reason for which this form declares that it refuses the case, or None."""
    op = dispatch.get(name)
    options = {**op.options, **case.options}
    target = jax.default_backend()
    return dispatch.refusal(op, form, case.dims, jnp.dtype(case.dtype), options, target)


# Compilation takes most of the time of these tests on a CPU; this halves it.
QUICK = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


@cache
def program(name: str, form: str, options: tuple[tuple[str, Any], ...], long: bool) -> Any:
    """(problem, d_out, d_state) -> Answer, compiled once per shape. With `long` XLA optimises
    fully.
    """

    def run(problem: contract.Problem, d_out: jax.Array, d_state: Any) -> Answer:
        def forward(inputs: Any, floats: Any) -> tuple[Any, Any]:
            state = merge(floats, problem.state)
            out, state = dispatch.apply(
                name,
                inputs,
                segment_ids=problem.segment_ids,
                state=state,
                form=form,
                options=dict(options),
            )
            return (out, split(state)), state

        primals = problem.inputs, split(problem.state)
        (out, _), pull, state = jax.vjp(forward, *primals, has_aux=True)
        return Answer(out, state, pull((d_out, d_state)))

    return jax.jit(run, compiler_options=None if long else QUICK)


def split(state: Any) -> list[jax.Array]:
    """The float arrays of a state."""
    leaves = jax.tree.leaves(state)
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


def merge(floats: list[jax.Array], state: Any) -> Any:
    """The state with its float arrays replaced."""
    if state is None:
        return None
    others = iter(floats)
    return jax.tree.map(
        lambda x: next(others) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )


def empty_state(op: Op, case: Case, problem: contract.Problem) -> Any:
    """An empty state of the same shapes as the problem's final state."""
    capacity = case.dims["T"]
    if problem.state is not None and op.state.growth == "linear":
        capacity = problem.state.segment_ids.shape[1]
    return op.init_state(asked(op, case), case.dtype, case.dims["B"], capacity)


def asked(op: Op, case: Case) -> dict[str, int]:
    """The dims of the inputs that the options need, as dispatch sees them."""
    needed = op.needed({**op.options, **case.options}).values()
    letters = {letter for spec in needed for letter in spec.letters.split()}
    return {letter: size for letter, size in case.dims.items() if letter in letters}


def answer(
    name: str,
    form: str,
    case: Case,
    problem: contract.Problem,
    d_out: jax.Array | None = None,
    *,
    wide: bool = False,
) -> Answer:
    """One run. The cotangents of the output and the final state are random; with `d_out` that is
    the output's and the state's are 0. `wide` converts the same numbers to float64.
    """
    random = np.random.default_rng(1)
    dims = case.dims
    shape = [dims[letter] for letter in dispatch.get(name).out.split()]
    drawn = jnp.asarray(random.standard_normal(shape), case.dtype)
    op = dispatch.get(name)
    like = empty_state(op, case, problem)
    d_state = [jnp.asarray(random.standard_normal(x.shape), x.dtype) for x in split(like)]
    if d_out is not None:
        drawn, d_state = d_out, [jnp.asarray(np.zeros(x.shape), x.dtype) for x in d_state]
    if wide:
        drawn, d_state = _wide(drawn), _wide(d_state)
    long = case.tag == "slow" and dims["T"] > 200
    return program(name, form, tuple(case.options.items()), long)(problem, drawn, d_state)


def shared(
    name: str, options: Any, *, carried: bool, time: int = 65
) -> tuple[Case, contract.Problem]:
    """A packed problem for one compiled program of the op with these options, which tests fill with
    different data.

    With `carried` it has a random state whose rows have different lengths. Without it a recurrence
    gets an empty matrix, which means the same as None but keeps the program the same. A cache is
    None, since a call with an empty cache would be another program.

    A test may replace the segment ids and the state (by one with capacity for T + 40 tokens), or
    use shorter rows that end in padding.
    """
    case = a_case(time=time, documents="packed", carried=True, options=options)
    op = dispatch.get(name)
    problem = contract.sample(op, case)
    problem = problem._replace(segment_ids=_from_one(problem.segment_ids))
    if carried:
        return case, problem
    empty = empty_state(op, case, problem) if op.state.growth == "constant" else None
    return case, problem._replace(state=empty)


def _from_one(segment_ids: Any) -> jax.Array:
    """Ids of documents that do not continue the state's: 1, 2 and 3 instead of 3, 4 and 5."""
    return jnp.asarray(np.asarray(segment_ids) - 2)


@cache
def expected(name: str, case: Case) -> Answer:
    """The reference's answer to the sampled case; for an extreme case in float64."""
    problem = contract.sample(dispatch.get(name), case)
    if case.extreme is None:
        return answer(name, "reference", case, problem)
    with jax.enable_x64(True):
        return answer(name, "reference", case, _wide(problem), wide=True)


def _wide(tree: Any) -> Any:
    """The tree with its floats in float64."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(jnp.float64) if is_float(x) else x, tree)


# The rounding error of a value that should be 0, for example the gradient of a softmax over one
# key: it is a difference of equal numbers.
NOISE = 2.0**-22
# The smallest normal float32: the error allowed in extreme cases where the right value is 0.
TINY = 2.0**-126


def error(got: jax.Array | np.ndarray, want: jax.Array | np.ndarray, noise: float = NOISE) -> float:
    """The relative root mean square error, or 0 if the absolute one is below `noise` (by default
    the rounding error of sums of order one).
    """
    x, y = np.asarray(got, np.float64), np.asarray(want, np.float64)
    distance, scale = (float(np.sqrt(np.mean(np.square(z)))) for z in (x - y, y))
    return 0.0 if distance <= noise else distance / max(scale, noise)


def assert_close(got: Any, want: Any, tolerance: float, what: str, noise: float = NOISE) -> None:
    """Every float array is finite and within the relative error, and every integer array is equal.
    The wanted arrays may be float64.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want), what
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        where = f"{what}{jax.tree_util.keystr(path)}"
        assert x.shape == y.shape, where
        assert x.dtype == y.dtype or y.dtype.itemsize == 8, where
        if jnp.issubdtype(x.dtype, jnp.floating):
            assert np.isfinite(np.asarray(x, np.float64)).all(), f"{where} is not finite"
            found = error(x, y, noise)
            assert found <= tolerance, f"{where}: relative error {found:.2e} above {tolerance:g}"
        else:
            np.testing.assert_array_equal(x, y, where)


def check_case(name: str, form: str, case: Case) -> None:
    """Output, state and all gradients are right, two runs agree in every bit, and padding gives
    zeros.
    """
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
    noise = TINY if case.extreme else NOISE
    assert_close(got, want, tolerance(name, form, case.dtype), f"{name} {form}", noise)
    jax.tree.map(np.testing.assert_array_equal, got, again)
    if problem.segment_ids is not None:
        assert not np.any(np.asarray(got.out)[np.asarray(problem.segment_ids) == 0])
    declared = empty_state(op, case, problem)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (declared, got.state))
    assert shapes[0] == shapes[1]


FORMS = [(n, form) for n in dispatch.names() for form in dispatch.get(n).forms]
TILED = [(n, form) for n, form in FORMS if form != "reference"]


def tolerance(name: str, form: str, dtype: str = "float32") -> float:
    return dispatch.get(name).tolerances[form, dtype].value


def sizes(time: int) -> dict[str, int]:
    """Every letter that an op may use; K and V are equal, for forms that need that."""
    return {"B": 2, "T": time, "H": 4, "G": 2, "K": 16, "V": 16, "N": 3, "W": 5}


def a_case(time: int = 65, **changes: Any) -> Case:
    return dataclasses.replace(Case(sizes(time)), **changes)


def out_shape(name: str, case: Case) -> tuple[int, ...]:
    return tuple(case.dims[letter] for letter in dispatch.get(name).out.split())


def over_time(name: str, options: Any) -> set[str]:
    """Names of the inputs that have one entry per token."""
    op = dispatch.get(name)
    needed = op.needed({**op.options, **options})
    return {key for key, spec in needed.items() if "T" in spec.letters.split()}


def settings(name: str) -> list[Any]:
    """The options of the op's fast cases, each once."""
    fast = [case.options for case in dispatch.get(name).cases if case.tag == "fast"]
    return [options for i, options in enumerate(fast) if options not in fast[:i]]


def tiered(name: str, all_options: list[Any]) -> list[Any]:
    """Every setting once; a setting that needs the same inputs as an earlier one is slow."""
    seen: list[Any] = []
    found: list[Any] = []
    for i, options in enumerate(all_options):
        if options in all_options[:i]:
            continue
        inputs = dispatch.get(name).needed({**dispatch.get(name).options, **options})
        marks = [pytest.mark.slow] if inputs in seen else []
        seen.append(inputs)
        found.append(pytest.param(options, marks=marks))
    return found


def refused(name: str, form: str, options: Any, case: Case) -> bool:
    return refusal(name, form, dataclasses.replace(case, options=options)) is not None
