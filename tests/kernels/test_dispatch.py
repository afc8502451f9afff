"""The public surface: names, resolution of forms, and errors that say what to do."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import blocks, dispatch, segments
from kernels.letters import Inputs

DIMS = {"B": 2, "T": 8, "H": 4, "G": 2, "K": 8, "V": 8}


def inputs(**shapes: tuple[int, ...]):
    usual = {"q": (2, 8, 4, 8), "k": (2, 8, 2, 8), "v": (2, 8, 2, 8)}
    return {name: jnp.ones(shape) for name, shape in (usual | shapes).items()}


def test_names_are_folders():
    assert {"softmax", "stickbreaking"} <= set(dispatch.names())
    assert all(dispatch.get(name).name == name for name in dispatch.names())


@pytest.mark.parametrize("name", dispatch.names())
@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
def test_auto_resolves_with_a_reason(name: str, target: str):
    found = dispatch.resolve(name, "auto", target=target, dims=DIMS, dtype=jnp.float32)
    assert found.form in dispatch.get(name).forms
    assert found.reason


def test_auto_says_what_it_passed_over():
    options = {"logits_soft_cap": 30.0}
    found = dispatch.resolve(
        "softmax", "auto", target="gpu", dims=DIMS, dtype=jnp.bfloat16, options=options
    )
    assert found.form == "chunked"
    assert "not jax_nn" in found.reason


@pytest.mark.parametrize(
    ("name", "form", "options", "message"),
    [
        ("sofmax", "auto", {}, "unknown op 'sofmax'; did you mean 'softmax'"),
        ("softmax", "chunky", {}, "did you mean 'chunked'"),
        ("softmax", "chunked", {"windw": 3}, "did you mean 'window'"),
        ("softmax", "jax_nn", {"logits_soft_cap": 3.0}, "has no logits_soft_cap=3.0"),
        ("softmax", "chunked", {"window": -1}, "must not be negative"),
        ("stickbreaking", "auto", {"remainder": "rest"}, "must be one of none, value, bias"),
    ],
)
def test_errors_name_the_cause(name: str, form: str, options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        dispatch.resolve(name, form, target="cpu", dims=DIMS, dtype=jnp.float32, options=options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        (inputs(k=(2, 7, 2, 8)), {}, "k has T=7, another input 8"),
        (inputs(k=(2, 8, 3, 8), v=(2, 8, 3, 8)), {}, "H=4 must be a multiple of G=3"),
        (inputs(q=(2, 8, 32)), {}, "wants"),
        (inputs(), {"remainder": "bias"}, "needs the input 'remainder_bias'"),
        (inputs(remainder_bias=(4, 8)), {}, "only with remainder=bias"),
        (inputs(bias=(4, 8)), {}, "unknown input"),
    ],
)
def test_inputs_are_checked(arrays: Inputs, options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        dispatch.apply("stickbreaking", arrays, form="chunked", options=options)


def test_dtypes_and_empty_sizes_are_refused_by_name():
    whole = {name: x.astype(jnp.int32) for name, x in inputs().items()}
    with pytest.raises(ValueError, match="is int32; set a floating dtype"):
        dispatch.apply("softmax", whole, form="chunked")
    part = inputs() | {"k": whole["k"]}
    with pytest.raises(ValueError, match="softmax: k is int32"):
        dispatch.apply("softmax", part, form="chunked")
    with jax.enable_x64(True), pytest.raises(ValueError, match="unset JAX_ENABLE_X64"):
        dispatch.apply("softmax", inputs(), form="chunked")
    with pytest.raises(ValueError, match="K=0 must be at least 1"):
        dispatch.resolve("softmax", "auto", target="cpu", dims=DIMS | {"K": 0}, dtype=jnp.float32)


@pytest.mark.parametrize("ids", [np.ones((2, 8)), np.ones((2, 7), np.int32)])
def test_documents_are_integers_of_every_token(ids: Any):
    with pytest.raises(ValueError, match=r"segment_ids are .*; give integers \(2, 8\)"):
        dispatch.apply("softmax", inputs(), segment_ids=jnp.asarray(ids), form="chunked")


PARTED = np.array([[1, 1, 2, 0, 0, 2, 2, 3], [1, 1, 0, 2, 0, 0, 0, 0]], np.int32)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 3},
        {"alibi": True},
        {"block": 3},
        {"window": 3, "global_tokens": 1},
        {"window": 3, "global_tokens": 1, "distance_ceiling": 3, "rope_theta": 10.0},
    ],
    ids=str,
)
def test_padding_inside_a_document_is_refused_where_places_count(options: dict[str, Any]):
    call = partial(dispatch.apply, "softmax", form="chunked", options=options)
    arrays = {name: jnp.ones((2, 8, 1, 4)) for name in "qkv"}
    given: list[Any] = [PARTED, jnp.asarray(PARTED)]
    for ids in given:
        with pytest.raises(ValueError, match=r"inside a document \(row 0, token 3\)"):
            call(arrays, segment_ids=ids)
    short = {name: x[:, :3] for name, x in arrays.items()}
    ids = jnp.asarray(PARTED[:, :3])  # padding after a document
    assert jax.eval_shape(lambda x: call(x, segment_ids=ids)[0], short).shape == (2, 3, 1, 4)


def test_padding_inside_a_document_is_skipped_where_places_do_not_count():
    random = np.random.default_rng(0)
    arrays = {name: jnp.asarray(random.standard_normal((2, 8, 1, 4)), "float32") for name in "qkv"}
    for name in ("softmax", "stickbreaking"):
        a, b = (
            dispatch.apply(name, arrays, segment_ids=jnp.asarray(PARTED), form=form)[0]
            for form in ("reference", "chunked")
        )
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ([0, 1, 1, 0], None),
        ([1, 0, 2, 0], None),
        ([0, 0, 0, 0], None),
        ([1, 0, 1, 0], 1),
        ([2, 2, 0, 2], 2),
        ([1, 0, 2, 0, 0, 2], 3),
    ],
)
def test_where_padding_parts_a_document(row: list[int], place: int | None):
    ids = np.array([[1] * len(row), row], np.int32)
    assert segments.parted(ids) == (None if place is None else (1, place))


def test_state_too_small_is_an_error():
    state = dispatch.init_state("softmax", dims=DIMS, dtype=jnp.float32, batch=2, max_len=7)
    with pytest.raises(ValueError, match="room for S=7 tokens, the call has 8"):
        dispatch.apply("softmax", inputs(), state=state, form="chunked")


def test_blocks_are_validated():
    with pytest.raises(ValueError, match="block_kv=48 must be a multiple of run=32"):
        blocks.Attention(64, 48)
    assert blocks.Attention(256, 256).fit(70, 300) == blocks.Attention(96, 256)


def test_a_window_costs_less():
    full, near = (dispatch.flops("softmax", DIMS, {"window": w}) for w in (0, 2))
    assert full == 2.0 * 2 * 4 * 36 * 16
    assert near == 2.0 * 2 * 4 * 15 * 16
