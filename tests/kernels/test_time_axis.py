"""A split time axis: with each strategy an op returns what one device returns, or refuses."""

import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from kernels import contract, dispatch, shard
from kernels.contract import Case, Layout
from kernels.primitives import kv_cache
from kernels.primitives.time_shards import Shards
from kernels.shard import Placement
from launch.benchmarks.programs import collectives
from tests.kernels.contract_problem import (
    FORMS,
    QUICK,
    Answer,
    a_case,
    asked,
    assert_close,
    merge,
    out_shape,
    over_time,
    refused,
    settings,
    sizes,
    split,
    tolerance,
)

# Shards have six tokens, and the stretches of a zigzag layout three. The convolution's eight taps
# reach over a whole shard, and over a shard of padding to the tokens before it.
TIME, TAPS, HEADS = 48, 8, 8
# Row 0: each document crosses borders, and one shard, tokens 12 to 17, is padding. Row 1: document
# 2 starts at a border, 3 and 4 inside a shard; the last shard is padding.
IDS = np.array(
    [
        np.repeat([1, 0, 2, 3], [8, 10, 11, 19]),
        np.repeat([1, 2, 3, 4, 0], [24, 7, 1, 9, 7]),
    ],
    np.int32,
)
# For a recurrence padding may split a document: the first document of row 0 continues after it.
PARTED = np.array([np.repeat([1, 0, 1, 2], [8, 10, 11, 19]), IDS[1]], np.int32)
SPLITS: dict[str, tuple[dict[str, int], dict[str, tuple[str, ...]]]] = {
    "eight": ({"sequence": 2, "tensor": 4}, {"T": ("sequence", "tensor")}),
    "rows and heads": (
        {"data": 2, "tensor": 2, "sequence": 2},
        {"B": ("data",), "H": ("tensor",), "G": ("tensor",), "T": ("sequence",)},
    ),
    "shared heads": ({"tensor": 4, "sequence": 2}, {"H": ("tensor",), "T": ("sequence",)}),
}
# (op, strategy, layout of time)
STRATEGIES = [
    (n, s.name, x) for n in dispatch.names() for s in dispatch.get(n).sequence for x in s.layouts
]


def params(*others: tuple[Any, ...]) -> list[Any]:
    """(op, strategy, layout, *other). Slow if two earlier ops have the same strategy and layout."""
    found: list[Any] = []
    seen: list[Any] = []
    for name, *how in STRATEGIES:
        marks = [pytest.mark.slow] if seen.count(how) > 1 else []
        found += [pytest.param(name, *how, *x, marks=marks) for x in others or ((),)]
        seen.append(how)
    return found


FIRST = {name: settings(name)[0] for name in dispatch.names()}


def placement(split: str, strategy: str, layout: Layout = "contiguous") -> Placement:
    sizes, rules = SPLITS[split]
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    return Placement(mesh, rules, strategy, layout)


def a_problem(name: str, kind: str, options: Any) -> tuple[Case, contract.Problem]:
    """`kind` says what rows hold.

    - whole: each row is one document
    - packed: documents and padding
    - carried: packed, with a state whose document continues in row 0 and ends in row 1
    """
    case = a_case(
        options=options, carried=kind == "carried", dims=sizes(TIME) | {"W": TAPS, "H": HEADS}
    )
    op = dispatch.get(name)
    case = dataclasses.replace(case, dims=asked(op, case))
    problem = contract.sample(op, case)
    if kind == "whole":
        return case, problem
    ids = PARTED if op.state.growth == "constant" else IDS
    if (state := problem.state) is not None:
        is_cache = op.state.growth == "linear"
        entry = kv_cache.current_segment(state) if is_cache else state.segment
        ids = np.where(ids, ids + np.asarray(entry)[:, None] - np.array([[1], [0]]), 0)
    return case, problem._replace(segment_ids=jnp.asarray(ids, jnp.int32))


@cache
def program(name: str, form: str, options: tuple[tuple[str, Any], ...], where: Any) -> Any:
    """(problem, d_out, d_state) -> Answer, for tokens in time order. `where` is (split, strategy,
    layout), or None for one device.
    """
    place = None if where is None else placement(*where)
    shards = Shards((), 8, "contiguous")
    if place is not None:
        shards = shard.time_shards(place.rules, place.mesh, place.layout) or shards
    along = over_time(name, dict(options))

    def run(problem: contract.Problem, d_out: jax.Array, d_state: Any) -> Answer:
        def forward(inputs: Any, floats: Any) -> tuple[Any, Any]:
            ids = problem.segment_ids
            out, state = dispatch.apply(
                name,
                inputs | {key: shards.by_rank(inputs[key], 1) for key in along},
                segment_ids=None if ids is None else shards.by_rank(ids, 1),
                state=merge(floats, problem.state),
                form=form,
                options=dict(options),
                placement=place,
            )
            return (shards.in_order(out, 1), split(state)), state

        primals = problem.inputs, split(problem.state)
        (out, _), pull, state = jax.vjp(forward, *primals, has_aux=True)
        return Answer(out, state, pull((d_out, d_state)))

    return jax.jit(run, compiler_options=QUICK)


def answers(name: str, form: str, options: Any, kind: str, where: Any) -> tuple[Answer, Answer]:
    """The answers with the time axis split, and on one device."""
    case, problem = a_problem(name, kind, options)
    random = np.random.default_rng(1)
    d_out = jnp.asarray(random.standard_normal(out_shape(name, case)), jnp.float32)
    d_state = [
        jnp.asarray(random.standard_normal(x.shape), x.dtype) for x in _zeros(name, case, problem)
    ]
    key = name, form, tuple(options.items())
    got, want = (program(*key, place)(problem, d_out, d_state) for place in (where, None))
    return got, want


def _zeros(name: str, case: Case, problem: contract.Problem) -> list[jax.Array]:
    if problem.state is not None:
        return [jnp.zeros_like(x) for x in split(problem.state)]
    op = dispatch.get(name)
    return split(op.init_state(asked(op, case), case.dtype, case.dims["B"], case.dims["T"]))


def split_cases() -> Iterator[Any]:
    """(op, strategy, layout, options, kind). The cases of an op's first setting are fast, with two
    exceptions: if one earlier op has the strategy, only carried cases are; if two have it, none.
    """
    seen: list[Any] = []
    for name, *how in STRATEGIES:
        for i, options in enumerate(settings(name)):
            for kind in ("carried", "packed", "whole"):
                is_seen = how in seen if kind != "carried" else seen.count(how) > 1
                marks = [pytest.mark.slow] if i > 0 or is_seen else []
                yield pytest.param(name, *how, options, kind, marks=marks)
        seen.append(how)


@pytest.mark.parametrize(
    ("name", "strategy", "layout", "options", "kind"), list(split_cases()), ids=str
)
def test_split_time_equals_one_device(
    name: str, strategy: str, layout: str, options: Any, kind: str
):
    """Output, state, and gradients of all inputs and of the initial state are equal. Documents
    cross borders, and one shard is all padding.
    """
    got, want = answers(name, "chunked", options, kind, ("eight", strategy, layout))
    assert_close(got, want, tolerance(name, "chunked"), f"{name} by {strategy}")


BESIDE = [
    x
    for x in params(("rows and heads",), ("shared heads",))
    if x.values[3] == "rows and heads"
    or any("G" in s.letters for s in dispatch.get(x.values[0]).inputs)
]


@pytest.mark.parametrize(("name", "strategy", "layout", "beside"), BESIDE)
def test_time_is_split_beside_rows_and_heads(name: str, strategy: str, layout: str, beside: str):
    """Key/value heads may be whole while the query heads that read them are split."""
    got, want = answers(name, "chunked", FIRST[name], "carried", (beside, strategy, layout))
    assert_close(got, want, tolerance(name, "chunked"), f"{name} by {strategy}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "packed", "carried"])
@pytest.mark.parametrize(
    ("name", "form", "strategy", "layout"),
    [(n, f, *how) for n, *how in STRATEGIES for m, f in FORMS if m == n and f != "chunked"],
)
def test_split_time_in_every_form(name: str, form: str, strategy: str, layout: str, kind: str):
    if refused(name, form, {}, a_case(TIME)):
        pytest.skip("the form does not take these options")
    got, want = answers(name, form, {}, kind, ("eight", strategy, layout))
    assert_close(got, want, tolerance(name, form), f"{name} {form} by {strategy}")


@pytest.mark.parametrize(("name", "strategy", "layout"), params())
def test_nan_stays_in_its_document_across_borders(name: str, strategy: str, layout: str):
    """NaN appears exactly where it does on one device. It is put in one of four documents: one that
    continues after a shard of padding or ends there, one that ends at a border, the last one, and
    one that came in with the state.
    """
    case, problem = a_problem(name, "carried", FIRST[name])
    d_out = jnp.zeros(out_shape(name, case), jnp.float32)
    d_state = _zeros(name, case, problem)
    key = sorted(over_time(name, FIRST[name]))[-1]
    x, first = problem.inputs[key], 8 if dispatch.get(name).state.growth == "linear" else 19
    state = merge([y.at[0].set(jnp.nan) for y in split(problem.state)], problem.state)
    broken = {
        (first - 3, 0): problem._replace(inputs=problem.inputs | {key: x.at[0, 3].set(jnp.nan)}),
        (0, 3): problem._replace(inputs=problem.inputs | {key: x.at[1, 21].set(jnp.inf)}),
        (10, 0): problem._replace(inputs=problem.inputs | {key: x.at[0, 38].set(jnp.nan)}),
        (first, 0): problem._replace(state=state),
    }
    for counts, bad in broken.items():
        got, want = (
            program(name, "chunked", tuple(FIRST[name].items()), where)(bad, d_out, d_state)
            for where in (("eight", strategy, layout), None)
        )
        arrays = [(got.out, want.out), *zip(split(got.state), split(want.state), strict=True)]
        for ours, theirs in arrays:
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
        void = np.isnan(np.asarray(got.out)).any(axis=(2, 3)).sum(axis=1)
        assert tuple(void.tolist()) == counts


def test_an_op_without_strategy_is_refused(monkeypatch: pytest.MonkeyPatch):
    op = dataclasses.replace(dispatch.get("gated_linear"), sequence=())
    monkeypatch.setattr(dispatch, "get", lambda name: op)
    _, problem = a_problem("gated_linear", "packed", {})
    with pytest.raises(
        ValueError, match=r"gated_linear cannot split T over 8 ranks: it has no strategy"
    ):
        dispatch.apply(
            "gated_linear", problem.inputs, form="chunked", placement=placement("eight", "auto")
        )


def test_a_strategy_is_added_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("op_with", "op_without"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "op_with" / "sequence.py").write_text("STRATEGIES = (1, 2)\n")
    assert contract.strategies("op_with") == (1, 2)
    assert contract.strategies("op_without") == ()


@pytest.mark.parametrize("name", dispatch.names())
def test_time_must_divide(name: str):
    problem = contract.sample(dispatch.get(name), a_case(TIME + 1))
    with pytest.raises(ValueError, match="T=49 must be a multiple of 8"):
        jax.eval_shape(program(name, "chunked", (), ("eight", "auto")), problem, None, None)


def test_strategies_are_called_by_name():
    _, problem = a_problem("softmax", "whole", {})
    with pytest.raises(
        ValueError, match="softmax has no strategy 'gathers' for a split T; did you mean 'gather'"
    ):
        jax.eval_shape(program("softmax", "chunked", (), ("eight", "gathers")), problem, None, None)


@pytest.mark.parametrize(
    ("name", "letter"), [("softmax", "S"), ("gated_conv", "W"), ("softmax", "K")]
)
def test_no_other_letter_is_split(name: str, letter: str):
    _, problem = a_problem(name, "carried", {})
    place = Placement(placement("eight", "auto").mesh, {letter: ("tensor",)}, "auto", "contiguous")
    with pytest.raises(ValueError, match=f"{name} cannot split {letter} over"):
        dispatch.apply(name, problem.inputs, state=problem.state, form="chunked", placement=place)


def test_time_that_is_split_around_the_call_is_refused():
    """Inside that shard_map the op would take a shard for a whole row."""
    _, problem = a_problem("softmax", "whole", {})
    place = placement("eight", "auto")
    spec = jax.sharding.PartitionSpec(None, place.rules["T"])

    def inner(inputs: Any) -> jax.Array:
        return dispatch.apply("softmax", inputs, form="chunked", placement=place)[0]

    call = jax.shard_map(inner, mesh=place.mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match=r"around softmax splits T over \['sequence', 'tensor'\]"):
        jax.eval_shape(call, problem.inputs)


def test_axes_of_time_stand_in_the_order_of_the_mesh():
    _, problem = a_problem("softmax", "whole", {})
    mesh = placement("eight", "auto").mesh
    place = Placement(mesh, {"T": ("tensor", "sequence")}, "auto", "contiguous")
    with pytest.raises(ValueError, match=r"the mesh's order, \['sequence', 'tensor'\]"):
        dispatch.apply("softmax", problem.inputs, form="chunked", placement=place)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "strategy", "layout"), params())
def test_bytes_sent_are_those_of_the_program(name: str, strategy: str, layout: Layout, dtype: str):
    """The bytes of floats sent forward, those sent with the gradients of the inputs with one entry
    per token, and the number of collectives.
    """
    case, problem = a_problem(name, "packed", {})
    place = placement("eight", strategy, layout)
    along = over_time(name, {})
    fixed = {key: x for key, x in problem.inputs.items() if key not in along}
    inputs = {key: problem.inputs[key].astype(dtype) for key in along}

    def forward(inputs: Any) -> jax.Array:
        given = {"segment_ids": problem.segment_ids, "form": "chunked", "placement": place}
        return dispatch.apply(name, inputs | fixed, **given)[0]

    both = jax.grad(lambda inputs: jnp.sum(jnp.sin(forward(inputs).astype(jnp.float32))))
    (found,) = [s for s in dispatch.get(name).sequence if s.name == strategy]
    options = dispatch.bind_options(dispatch.get(name), {}, case.dims)
    want = found.sent(dispatch.get(name), case.dims, options, jnp.dtype(dtype).itemsize, 8)
    sent = lambda found: sum(x.sent(8) for x in found)
    assert sent(collectives(forward, inputs)) == pytest.approx(want.forward)
    in_both = collectives(both, inputs)
    assert sent(in_both) == pytest.approx(want.forward + want.backward)
    calls = {
        kind: sum(x.times for x in in_both if x.kind == kind) for kind in {x.kind for x in in_both}
    }
    assert calls == want.calls


def test_the_document_at_entry_is_that_of_the_token_before():
    """Compared with a loop over tokens. Rows begin inside a document, without one, and in
    padding.
    """
    ids = np.concatenate([IDS, np.roll(IDS, 7, axis=1)])
    first = np.array([3, 0, 0, 9], np.int32)
    belongs, want = first.copy(), []
    for t in range(TIME):
        if t % 6 == 0:
            want.append(belongs)
        belongs = np.where(ids[:, t], ids[:, t], belongs)
    place = placement("eight", "auto")
    spec, axes = jax.sharding.PartitionSpec, place.rules["T"]
    found = jax.shard_map(
        lambda ids, first: Shards(axes, 8, "contiguous").entry(ids, first)[None],
        mesh=place.mesh,
        in_specs=(spec(None, axes), spec()),
        out_specs=spec(axes),
        check_vma=False,
    )(jnp.asarray(ids), jnp.asarray(first))
    np.testing.assert_array_equal(found, np.stack(want))
