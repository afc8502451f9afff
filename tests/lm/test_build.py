"""What `build` puts together: shardings, initial parameters, FLOPs."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from lm import build as build_lib
from lm import params as params_lib
from lm.config import UserError
from lm.parallel import mesh as mesh_lib
from tests.lm import tiny


@functools.cache
def initial(parametrization: str, tied: bool) -> tuple[Any, Any]:
    """(parameters, infos) of a model twice as wide as the base width."""
    one = {"mup.embedding_multiplier": 1.0, "mup.residual_multiplier": 1.0}
    built = tiny.create(
        {
            "model.width": 128,
            "model.ffn_dim": 256,
            "mup.base_width": 64,
            "model.tied_embeddings": tied,
            "mup.parametrization": parametrization,
        }
        | (one if parametrization == "standard" else {})
    )
    return jax.device_get(built.init(3).params), built.infos


def deviations(params: Any, infos: Any) -> dict[str, list[float]]:
    """role -> standard deviation of each matrix with at least 8,192 elements."""
    found: dict[str, list[float]] = {}
    leaves = jax.tree.leaves(infos, is_leaf=params_lib.is_info)
    for x, info in zip(jax.tree.leaves(params), leaves, strict=True):
        if x.size >= 8192:
            found.setdefault(info.role, []).append(float(np.std(x)))
            assert abs(np.mean(x)) < 4 * np.std(x) / np.sqrt(x.size)
    return found


@pytest.mark.parametrize(
    ("parametrization", "hidden"), [("mup", 0.1 / np.sqrt(2)), ("standard", 0.1)]
)
def test_initial_standard_deviations_by_role(parametrization: str, hidden: float) -> None:
    """Within 2 %: at 32,768 elements the standard error is 0.4 %."""
    params, infos = initial(parametrization, False)
    found = deviations(params, infos)
    assert set(found) == {"input", "hidden", "output"}
    large = [
        float(np.std(params["groups_0"]["blocks_0"]["mlp"][n]["kernel"])) for n in ("up", "down")
    ]
    for std, expected in [(s, hidden) for s in large] + [
        (s, 0.1) for role in ("input", "output") for s in found[role]
    ]:
        assert std == pytest.approx(expected, rel=0.02)
    assert np.all(params["final_norm"]["scale"] == 1)


def test_initial_matrices_differ_from_each_other() -> None:
    params, _ = initial("mup", False)
    mlp = params["groups_0"]["blocks_0"]["mlp"]
    assert (
        np.abs(np.corrcoef(mlp["up"]["kernel"].ravel(), mlp["gate"]["kernel"].ravel())[0, 1]) < 0.03
    )
    assert not np.array_equal(params["embed"]["table"], params["output"]["table"])


def test_state_is_float32_and_starts_at_step_0() -> None:
    built = tiny.create({"model.precision": "bfloat16"})
    abstract = built.abstract_state
    assert {x.dtype for x in jax.tree.leaves(abstract.params)} == {np.dtype("float32")}
    assert abstract.step.dtype == np.dtype("int32")
    assert built.abstract_batch.tokens.shape == (4, 24)
    assert built.abstract_token_bytes.shape == (tiny.VOCAB,)


@pytest.mark.parametrize(("tied", "pattern"), [(True, "softmax"), (False, "stickbreaking")])
def test_flops_per_token(tied: bool, pattern: str) -> None:
    """Six FLOPs for each parameter of a matmul (the head counts once, tied or not), plus those of
    the causal pairs of attention.
    """
    built = tiny.create({"model.tied_embeddings": tied, "model.pattern": pattern})
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    pairs = 24 * 25 / 2 if pattern == "softmax" else 24 * 23 / 2
    attention = 2 * 4 * (8 + 8) * pairs / 24
    expected = 3 * (2 * (layer + 384 * 32) + attention)
    assert build_lib.flops_per_token(built) == pytest.approx(expected)


def test_parameter_table_and_counts() -> None:
    infos = tiny.create().infos
    text = params_lib.table(infos)
    assert "embed/table" in text
    assert f"{params_lib.count(infos)['total']:,}" in text.splitlines()[-1]


def test_batch_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"is not a multiple of run\.accumulation=3"):
        tiny.config({"run.accumulation": 3})


# Reported before JAX looks for devices. The number is that of the devices that are foreseen; `None`
# means that it is not known.
LATER: list[tuple[dict[str, Any], int | None, str]] = [
    (
        {"mesh.data": 1, "mesh.sequence": 4},
        2,
        "set sizes that multiply to 2, or the variable JAX_NUM_CPU_DEVICES to 4",
    ),
    ({"mesh.data": 3}, 8, "mesh data=3, fsdp=1, tensor=1, sequence=1 needs 3 devices, found 8"),
    ({"mesh.tensor": 3}, 8, "needs a multiple of 3 devices, found 8"),
    (
        {"mesh.sequence": 5},
        None,
        "data.context_length=24 does not divide into 5 pieces (mesh.sequence=5, ",
    ),
    (
        {"mesh.sequence": 3, "mesh.sequence_strategy": "all_to_all"},
        None,
        "heads must be a multiple of 3 ranks; set mesh.sequence_strategy=auto",
    ),
    (
        {"mesh.sequence": 8, "mesh.sequence_layout": "zigzag"},
        None,
        "does not divide into 16 pieces (mesh.sequence=8, mesh.sequence_layout='zigzag'); set",
    ),
    (
        {"mesh.sequence": 2, "mesh.sequence_layout": "zigzag", "model.pattern": "gla"}
        | {"mesh.sequence_strategy": "states"},
        None,
        "not zigzag; set mesh.sequence_strategy=auto, or mesh.sequence_layout=contiguous",
    ),
    (
        {"mesh.sequence": 2, "mesh.tensor": 2, "mesh.stream_over_tensor": True}
        | {"data.context_length": 26},
        None,
        "=26, each of mesh.sequence=2 parts of it, over mesh.tensor=2; set data.context_length=28",
    ),
    (
        {"mesh.sequence_strategy": "gathers"},
        None,
        "='gathers': no layer has such a strategy; set mesh.sequence_strategy=gather",
    ),
    (
        {"mesh.sequence": 2, "mesh.sequence_strategy": "states"}
        | {"model.pattern": "softmax,gla", "model.num_layers": 2},
        None,
        "softmax has no strategy 'states' for a split T; known: all_to_all, auto, gather, ring; "
        "set mesh.sequence_strategy='gla=states'",
    ),
    (
        {"mesh.sequence": 2, "mesh.sequence_strategy": "gla=ring"}
        | {"model.pattern": "softmax,gla", "model.num_layers": 2},
        None,
        "gated_linear has no strategy 'ring' for a split T; known: all_to_all, auto, scan, states; "
        "set mesh.sequence_strategy='gla=states'",
    ),
    (
        {"mesh.sequence": 2, "mesh.tensor": 2, "mesh.sequence_strategy": "all_to_all"}
        | {"model.num_heads": 2, "model.num_kv_heads": 2},
        None,
        "(its share of mesh.tensor=2), mesh.sequence=2, mesh.sequence_strategy='all_to_all': "
        "stickbreaking cannot split T over 2 ranks: all_to_all: H=1 heads must be a multiple of 2",
    ),
    (
        {"mesh.sequence_strategy": "a=b,a=c"},
        None,
        "names 'a' twice; set mesh.sequence_strategy='a=b', or the other",
    ),
    ({"mesh.sequence_strategy": "a=b,c"}, None, "; set mesh.sequence_strategy='a=b'"),
    ({"mesh.sequence_strategy": ""}, None, "; set mesh.sequence_strategy=auto"),
    (
        {"mesh.sequence_strategy": "{'a': 'b', 'c': 'd'}"},
        None,
        "; set mesh.sequence_strategy='a=b,c=d'",
    ),
    (
        {"mesh.sequence_strategy": "softmx=gather", "model.pattern": "softmax"},
        None,
        "no layer is labelled 'softmx'; set mesh.sequence_strategy='softmax=gather'",
    ),
    ({"mesh.tensor": 8}, None, "H=4 heads are not divisible by 8"),
    ({"mesh.tensor": 4}, 8, "G=2 heads are not divisible by 4"),
    ({"mesh.tensor": 2, "mesh.replicate": ["H"]}, None, "names 'H' and not 'G'; name both, or 'G'"),
    ({"mesh.data": 3, "mesh.fsdp": 2}, None, "4 rows do not divide over data*fsdp = 6 devices"),
    ({}, 8, "4 rows do not divide over data*fsdp = 8 devices"),
    ({"mesh.fsdp": 4, "model.width": 30}, None, "the model has D=30, not divisible by 4"),
    (
        {"mesh.tensor": 2, "mesh.stream_over_tensor": True, "data.context_length": 25},
        None,
        "splits data.context_length=25 over mesh.tensor=2",
    ),
    ({"model.pattern": "softmax,soft"}, 1, "model.pattern names 'soft'; did you mean 'softmax'?"),
    ({"model.pattern": ["softmax", "gla", "x"]}, 1, "model.pattern names 'x'"),
    ({"model.pattern": [[1, ["softmax", 3]]]}, 1, "must be (repeat >= 1, labels)"),
    ({"model.pattern": [[1, "softmax,"]]}, 1, "must be (repeat >= 1, labels)"),
    (
        {"model.layers": {"a": {"mixer": "gla", "form": "fast"}}, "model.pattern": "a"},
        1,
        "model.layers.a: unknown form 'fast'",
    ),
    (
        {"model.layers": {"a": {"mixer": "h3", "shift_taps": 1 << 20}}, "model.pattern": "a"},
        1,
        "W=1048576 of the op gated_conv must be at most 1024; lower the sizes",
    ),
    ({"model.layers": {"a": {"mixer": "softmax", "head_dim": 1 << 21}}}, 1, ""),
    (
        {"model.layers": {"a": {"mixer": "gla", "expand_k": 1e9}}, "model.pattern": "a"},
        1,
        "of the op gated_linear must be at most 1048576",
    ),
]


@pytest.mark.parametrize(("changes", "count", "message"), LATER, ids=lambda x: str(x)[:50])
def test_what_is_reported_before_there_are_devices(
    changes: dict[str, Any], count: int | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check` reports what `build` would report with that many devices."""
    foreseen = (count, ("cpu",) if count else ("cpu", "gpu", "tpu"))
    monkeypatch.setattr(mesh_lib, "foreseen", lambda: foreseen)
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("a device is looked for"))
    config = tiny.config(changes)
    if not message:
        return build_lib.check(config)
    with pytest.raises(UserError) as caught:
        build_lib.check(config)
    assert message in str(caught.value)
    return None


def test_devices_of_the_cpu_are_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number is known if JAX_PLATFORMS names only the CPU, as it does for these tests."""
    assert mesh_lib.foreseen() == (jax.device_count(), ("cpu",))
    with jax.numpy_dtype_promotion("standard"):  # JAX's own context managers cannot set a platform
        monkeypatch.setattr(type(jax.config), "jax_platforms", None, raising=False)
    assert mesh_lib.foreseen() == (None, ("cpu", "gpu", "tpu"))
