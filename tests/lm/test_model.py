"""Patterns, layers and their options; decoding and packing equal one forward; remat; dtypes."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import layers as layer_lib
from lm import model as model_lib
from lm import params as params_lib
from lm import pattern as pattern_lib
from lm.build import Build
from lm.config import UserError
from lm.pattern import Group
from tests import jaxprs
from tests.lm import tiny

PATTERNS = ["softmax", "stickbreaking", "softmax,stickbreaking"]


@pytest.mark.parametrize(
    ("pattern", "depth", "groups"),
    [
        ("a", 3, [(3, "a")]),
        ("a,b", 4, [(2, "ab")]),
        ("a, b", 5, [(2, "ab"), (1, "a")]),
        (("a", "b", "b"), 8, [(2, "abb"), (1, "ab")]),
        ("a,b,c", 2, [(1, "ab")]),
        (((2, "a,b"), (3, ("b",))), 7, [(2, "ab"), (3, "b")]),
        (((1, ("a",)), (1, ("a",))), 2, [(1, "a"), (1, "a")]),
    ],
)
def test_patterns(pattern: Any, depth: int, groups: Any) -> None:
    expected = tuple(Group(repeat, tuple(labels)) for repeat, labels in groups)
    assert pattern_lib.parse(pattern, depth) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "write labels"),
        ("a,,b", "write labels"),
        ((), "write labels"),
        (3, "write labels"),
        (((2, ("a",)), (1, ("b",))), "has 3 layers, model.num_layers=4"),
        (((0, ("a",)), (4, ("b",))), "must be"),
        ((("a", 2), ("b", 2)), "must be"),
        ((("a",), "b"), "must be"),
    ],
)
def test_bad_patterns(pattern: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pattern_lib.parse(pattern, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.pattern": "sofmax"}, "model.pattern names 'sofmax'; did you mean 'softmax'"),
        (
            {"model.layers": {"soft": {"mixer": "softmax"}}, "model.pattern": "sooft"},
            "names 'sooft'; did you mean 'soft'",
        ),
        ({"model.layers": {"a": {"mixer": "softmx"}}}, "unknown mixer 'softmx'; did you mean"),
        (
            {"model.layers": {"a": {"mixer": "softmax", "windw": 3}}},
            "unknown option model.layers.a.windw; did you mean 'window'",
        ),
        (
            {"model.layers": {"a": {"mixer": "softmax", "window": 2.5}}},
            "model.layers.a.window=2.5 is a float; set a int",
        ),
        (
            {"model.layers": {"a": {"mixer": "softmax", "position_encoding": "sin"}}},
            "'sin' is not one of rope, alibi, none",
        ),
        (
            {"model.layers": {"a": {"mixer": "softmax", "mlp": "relu"}}},
            "model.layers.a.mlp: unknown feed-forward 'relu'; known: swiglu",
        ),
        (
            {"model.layers": {"a": {"mixer": "softmax", "num_kv_heads": 3}}},
            "num_heads=4 is not a multiple of num_kv_heads=3",
        ),
        (
            {"model.layers": {"a": {"mixer": "softmax", "num_kv_heads": 0}}},
            "model.layers.a.num_kv_heads=0 must be at least 1",
        ),
        (
            {"model.layers": {"a": {"mixer": "softmax", "head_dim": 7}}},
            "RoPE needs an even K, got head_dim=7",
        ),
        (
            {"model.layers": {"a": {"mixer": "softmax", "rope_theta": 0.0}}},
            "rope_theta=0.0 must be positive",
        ),
        (
            {"model.layers": {"a": {"mixer": "softmax", "width": 3}}},
            "unknown option model.layers.a.width",
        ),
    ],
)
def test_bad_layers_are_reported_without_a_device(changes: dict[str, Any], message: str) -> None:
    if "model.pattern" not in changes:
        changes = changes | {"model.pattern": "a"}
    with pytest.raises(UserError, match=message) as caught:
        layer_lib.check(tiny.config(changes).model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "chunkd"}, "chunkd"),
        ({"window": -1}, "window=-1"),
        ({"logits_soft_cap": -1.0}, "soft_cap=-1"),
        ({"form": "jax_nn", "logits_soft_cap": 30.0}, "jax_nn"),
    ],
)
def test_a_refusal_of_the_op_is_reported(options: dict[str, Any], message: str) -> None:
    layers = {"a": {"mixer": "softmax"} | options}
    with pytest.raises(UserError, match=rf"model\.layers\.a: .*{message}") as caught:
        tiny.create({"model.layers": layers, "model.pattern": "a"})
    assert "\n" not in str(caught.value)


def test_forms_are_resolved_and_recorded_per_layer() -> None:
    layers = {"slow": {"mixer": "stickbreaking", "form": "reference"}}
    built = tiny.create(
        {"model.layers": layers, "model.pattern": "softmax,slow", "model.num_layers": 3}
    )
    assert [(r.layer, r.label, r.mixer, r.form) for r in built.layers] == [
        (0, "softmax", "softmax", "chunked"),
        (1, "slow", "stickbreaking", "reference"),
        (2, "softmax", "softmax", "chunked"),
    ]
    assert all(record.reason for record in built.layers)
    blocks = [block for group in built.model.groups for block in group.blocks]
    assert [block.mixer.form for block in blocks] == ["chunked", "reference", "chunked"]


def test_every_layer_has_its_own_parameters() -> None:
    """Labels repeat inside a group and across groups. Flax would share the parameters of one
    module.
    """
    changes = {"model.pattern": ((2, "softmax,softmax"), (1, "softmax")), "model.num_layers": 5}
    built = tiny.create(changes | {"model.tied_embeddings": False})
    names = set(jax.tree.leaves(params_lib.names(built.infos)))
    kernels = {n: i for n, i in zip(sorted(names), range(99), strict=False) if "query" in n}
    assert list(kernels) == [
        "groups_0/blocks_0/mixer/query/kernel",
        "groups_0/blocks_1/mixer/query/kernel",
        "groups_1/blocks_0/mixer/query/kernel",
    ]
    assert built.infos["groups_0"]["blocks_1"]["mixer"]["query"]["kernel"].shape == (2, 32, 4, 8)
    assert built.infos["groups_0"]["blocks_1"]["mixer"]["query"]["kernel"].letters == "L D H K"
    assert built.infos["output"]["table"].role == "output"
    hidden = 5 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    assert params_lib.count(built.infos)["hidden"] == hidden


def test_tied_embeddings_have_no_output_matrix_and_mlp_none_no_mlp() -> None:
    layers = {"bare": {"mixer": "softmax", "mlp": "none"}}
    built = tiny.create({"model.layers": layers, "model.pattern": "bare"})
    assert set(built.infos) == {"embed", "groups_0", "final_norm"}
    assert set(built.infos["groups_0"]["blocks_0"]) == {"mixer", "mixer_norm"}


def test_vocabulary_is_padded_to_lanes() -> None:
    assert [model_lib.padded_vocab_size(n) for n in (1, 128, 129, 4096)] == [128, 128, 256, 4096]
    assert tiny.create().infos["embed"]["table"].shape == (384, 32)


def forward(built: Build) -> Any:
    def apply(params: Any, tokens: Any, segment_ids: Any, positions: Any) -> Any:
        return built.model.apply({"params": params}, tokens, segment_ids, positions)[0]

    return apply


def prefill_and_steps(built: Build, prefill: int) -> Any:
    """Hidden states of all tokens: the first `prefill` in one call, the others one by one."""
    model = built.model

    def run(params: Any, tokens: Any) -> Any:
        variables, (rows, time) = {"params": params}, tokens.shape
        index = jnp.broadcast_to(jnp.arange(prefill), (rows, prefill))
        state = model.init_state(rows, time)
        first = tokens[:, :prefill]
        hidden, state = model.apply(variables, first, jnp.ones_like(first), index, state)

        def step(state: Any, token: Any) -> Any:
            hidden, state = model.apply(variables, token, state, method="step")
            return state, hidden

        _, rest = jax.lax.scan(step, state, tokens[:, prefill:].T)
        return jnp.concatenate([hidden, rest.swapaxes(0, 1)], axis=1)

    return run


def check_decoding(changes: dict[str, Any], rows: int, time: int, prefill: int) -> None:
    built = tiny.create(changes)
    params = tiny.params(built)
    tokens = np.random.default_rng(1).integers(0, tiny.VOCAB, (rows, time)).astype(np.int32)
    positions = np.broadcast_to(np.arange(time, dtype=np.int32), tokens.shape)
    whole = tiny.jit(forward(built))(params, tokens, np.ones_like(tokens), positions)
    steps = tiny.jit(prefill_and_steps(built, prefill))(params, tokens)
    assert steps.shape == whole.shape == (rows, time, 32)
    error = np.sqrt(np.mean((steps - whole) ** 2, axis=(0, 2)))
    assert error.max() < 1e-4 * np.sqrt(np.mean(whole**2)), f"worst at token {error.argmax()}"


def test_prefill_and_steps_equal_one_forward() -> None:
    check_decoding(
        {"model.pattern": "softmax,stickbreaking", "model.num_layers": 3}, 2, time=203, prefill=97
    )


def test_steps_with_layers_apart_equal_steps_over_stacks() -> None:
    """Groups of two patterns, and a label that occurs twice in a period."""
    pattern = [[2, "softmax,gla,softmax"], [2, "s4d"]]
    built = tiny.create({"model.pattern": pattern, "model.num_layers": 8})
    params, model = tiny.params(built), built.model
    stacked = model.init_state(3, 5)
    own, apart = model.apart(params, stacked)
    assert isinstance(apart, model_lib.Apart)
    assert [len(group) for group in apart.groups] == [2, 2]

    @tiny.jit
    def step(params: Any, token: Any, state: Any) -> Any:
        return model.apply({"params": params}, token, state, method="step")

    for token in np.random.default_rng(2).integers(0, tiny.VOCAB, (4, 3)).astype(np.int32):
        hidden, stacked = step(params, token, stacked)
        found, apart = step(own, token, apart)
        np.testing.assert_allclose(found, hidden, rtol=1e-5, atol=1e-6)
    _, want = model.apart(params, stacked)
    for x, y in zip(jax.tree.leaves(apart), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("prefill", [1, 2500])
def test_4096_tokens_through_prefill_and_steps(pattern: str, prefill: int) -> None:
    check_decoding({"model.pattern": pattern, "model.num_layers": 2}, 1, time=4096, prefill=prefill)


@functools.cache
def hybrid() -> Build:
    return tiny.create({"model.pattern": "softmax,stickbreaking", "model.num_layers": 3})


@functools.cache
def hybrid_forward() -> Any:
    return tiny.jit(forward(hybrid()))


def test_packed_documents_equal_separate_ones() -> None:
    """Row 0 holds three documents and padding, rows 1 to 3 one document each."""
    rng = np.random.default_rng(2)
    lengths = [31, 1, 23]
    documents = [rng.integers(0, tiny.VOCAB, n) for n in lengths]
    tokens, segment_ids, positions = (np.zeros((4, 64), np.int32) for _ in range(3))
    begin = 0
    for i, (document, length) in enumerate(zip(documents, lengths, strict=True)):
        for row, start, segment in ((0, begin, i + 1), (i + 1, 0, 1)):
            place = slice(start, start + length)
            tokens[row, place], segment_ids[row, place] = document, segment
            positions[row, place] = np.arange(length)
        begin += length
    params = tiny.params(hybrid())
    hidden = np.asarray(hybrid_forward()(params, tokens, segment_ids, positions))
    assert np.isfinite(hidden).all()
    packed = np.split(hidden[0, :begin], np.cumsum(lengths)[:-1])
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(packed[i], hidden[i + 1, :length], rtol=1e-4, atol=1e-5)
    merged = np.where(segment_ids > 0, 1, 0).astype(np.int32)
    leaking = np.asarray(hybrid_forward()(params, tokens, merged, positions))
    assert np.abs(leaking[0, 31:begin] - hidden[0, 31:begin]).max() > 1e-2, "the test sees a leak"


def test_the_future_is_not_seen() -> None:
    params = tiny.params(hybrid())
    ones = np.ones((4, 64), np.int32)
    positions = np.broadcast_to(np.arange(64, dtype=np.int32), ones.shape)
    tokens = np.random.default_rng(3).integers(0, tiny.VOCAB, (4, 64)).astype(np.int32)
    changed = tokens.copy()
    changed[:, 40:] = (changed[:, 40:] + 1) % tiny.VOCAB
    a, b = (np.asarray(hybrid_forward()(params, x, ones, positions)) for x in (tokens, changed))
    np.testing.assert_array_equal(a[:, :40], b[:, :40])
    assert np.all(np.abs(a[:, 40:] - b[:, 40:]).max(axis=-1) > 1e-3)


REMAT = [
    {"model.remat": "named", "model.kept": {"mixer": "device"}},
    {"model.remat": "full", "model.unroll": True},
    pytest.param({"model.unroll": True}, marks=pytest.mark.slow),
    pytest.param({"model.remat": "dots"}, marks=pytest.mark.slow),
    pytest.param({"model.remat": "full"}, marks=pytest.mark.slow),
]


def gradient(changes: dict[str, Any]) -> tuple[Any, Any]:
    """The loss of a two-layer model, as a function of its parameters, and the parameters."""
    built = tiny.create({"model.pattern": "softmax", "model.num_layers": 2} | changes)
    batch = tiny.batch()

    def loss(params: Any) -> Any:
        hidden = forward(built)(params, batch.tokens, batch.segment_ids, batch.positions)
        return jnp.sum(jnp.sin(hidden))

    return loss, tiny.params(built)


@functools.cache
def plain_gradient() -> Any:
    loss, params = gradient({})
    return tiny.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("changes", REMAT, ids=lambda changes: "-".join(map(str, changes.values())))
def test_remat_and_unrolling_change_no_gradient(changes: dict[str, Any]) -> None:
    loss, params = gradient(changes)
    got = tiny.jit(jax.grad(loss))(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain_gradient()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_remat_policies_keep_less_and_less() -> None:
    """Counts the elements saved for the backward pass, without parameters and inputs."""

    def saved(remat: str) -> int:
        loss, params = gradient({"model.remat": remat, "model.kept": {"mixer": "device"}})
        size = sum(x.size for x in jax.tree.leaves(params))
        residuals = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
        return sum(x.size for x in jax.tree.leaves(residuals)) - size

    none, dots, mixer, full = (saved(name) for name in ("none", "dots", "named", "full"))
    assert none > dots > mixer > full


@pytest.mark.parametrize(
    ("precision", "activations", "operands"),
    [
        ("float32", jnp.float32, {"float32"}),
        ("bfloat16", jnp.bfloat16, {"bfloat16"}),
        ("bfloat16_operands", jnp.float32, {"bfloat16"}),
    ],
)
def test_precision_policies(precision: str, activations: Any, operands: set[str]) -> None:
    """Parameters and their gradients are always float32. Matmuls with parameters have operands of
    the policy's dtype, forward and backward.
    """
    built = tiny.create({"model.precision": precision})
    batch = tiny.batch()
    assert {x.dtype for x in jax.tree.leaves(built.abstract_state.params)} == {jnp.dtype("float32")}

    def loss(params: Any) -> Any:
        hidden = forward(built)(params, batch.tokens, batch.segment_ids, batch.positions)
        assert hidden.dtype == activations
        return jnp.sum(hidden.astype(jnp.float32))

    jaxpr = jax.make_jaxpr(jax.grad(loss))(tiny.params(built))
    outputs: Any = jaxpr.out_avals
    assert {x.dtype for x in outputs} == {jnp.dtype("float32")}
    products = list(_feed_forward_products(jaxpr.jaxpr))
    assert len(products) == 9, "gate, up and down: forward, and both gradients"
    assert {name for pair in products for name in pair} == operands


def _feed_forward_products(jaxpr: Any) -> Iterator[tuple[str, str]]:
    """Operand dtypes of each dot_general in which an operand or the result has the shape of the
    feed-forward's matrices.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            avals = [x.aval for x in (*eqn.invars, *eqn.outvars)]
            if any(sorted(aval.shape) == [32, 48] for aval in avals):
                yield avals[0].dtype.name, avals[1].dtype.name
        for inner in jaxprs.within(eqn):
            yield from _feed_forward_products(inner)
