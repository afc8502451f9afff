"""launch.bench --cases=skipping, on tiny layers. No test checks a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.base import get_config
from launch.benchmarks import forms, skipping
from launch.benchmarks.problem import Options
from launch.benchmarks.timing import Goal
from lm.config import UserError
from tests.lm import tiny

OVER = ("softmax", "softmax of whole rows")
SIDES = ("tolerance 0", "tolerance 0.001", "tolerance 1e-06")


def layer(time: int = 16) -> skipping.Layer:
    random = np.random.default_rng(0)
    heads = {"q": 4, "k": 2, "v": 2}
    inputs = {
        name: jnp.asarray(random.standard_normal((1, time, number, 8)), jnp.float32)
        for name, number in heads.items()
    }
    ids = jnp.asarray(np.arange(time)[None] // 10 + 1, jnp.int32)
    options = {"attend_current": False, "remainder": "bias", "scale": 0.3, "tolerance": 0.0}
    inputs["remainder_bias"] = jnp.ones((4, 8))
    return skipping.Layer(inputs, ids, "chunked", tuple(sorted(options.items())))


@pytest.mark.slow
def test_skipping_reads_what_the_layers_of_a_model_compute() -> None:
    """The op on the captured inputs equals the layer; nothing is skipped in rows of one block."""
    layers = {"stick": {"mixer": "stickbreaking", "qk_norm": True, "remainder": "bias"}}
    pattern = ((2, ("softmax", "stick")), (1, ("stick",)))
    changes = {"model.layers": layers, "model.pattern": pattern, "model.num_layers": 5}
    built = tiny.create(changes)
    params, batch = tiny.params(built), tiny.batch()
    found = skipping.capture(built.model, params, batch)
    assert [set(layer.inputs) for layer in found] == [{"q", "k", "v", "remainder_bias"}] * 3
    assert [layer.inputs["k"].shape for layer in found] == [(4, 24, 2, 8)] * 3
    first = params["groups_0"]["blocks_1"]["mixer"]
    assert np.array_equal(found[1].inputs["remainder_bias"], first["remainder_bias"][1])
    norms = np.mean(np.square(found[0].inputs["q"] / first["query_norm"]["scale"][0]), axis=-1)
    np.testing.assert_allclose(norms, 1.0, rtol=1e-3)
    results = {result.name: result for result in skipping.compare(found, 1, {"step": 3})}
    errors = results["skipping/speed-up at 0.001"].facts["errors"]
    assert results["skipping/error at 0.001"].value == max(errors.values())
    assert set(errors) == {"out", "d_q", "d_k", "d_v", "d_remainder_bias"}
    assert max(errors.values()) < 1e-5
    beside = results["skipping/tolerance 0.001/both/over softmax"]
    assert beside.facts["forms"] == {"stickbreaking": "chunked", "softmax": "chunked"}


def test_softmax_is_compared_on_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax runs on the packed rows, with the layer's scale, and on whole rows. On a CPU there is
    no goal. The reference forms and a single pass compile quickly.
    """
    monkeypatch.setattr(forms, "PASSES", ("both",))
    monkeypatch.setattr(forms, "chosen", lambda *_: forms.Chosen("reference", {}))
    monkeypatch.setattr(skipping, "TOLERANCES", {"tolerance 0.001": 1e-3})
    seen: dict[str, Any] = {}
    compiled = skipping._compiled

    def spy(layers: Any, which: str) -> Any:
        (one,) = layers
        program = compiled(layers, which)
        if one.op == "softmax":
            packed = "whole" if one.segment_ids is None else "packed"
            seen[f"{packed}/{which}"] = one, program.outputs()[0]
        return program

    monkeypatch.setattr(skipping, "_compiled", spy)
    rows = {row.name: row for row in skipping.compare([layer()._replace(form="reference")], 1, {})}
    for name in (
        f"skipping/{side}/{which}/over {other}"
        for side in SIDES[:2]
        for which in forms.PASSES
        for other in OVER
    ):
        row = rows.pop(name)
        assert row.goal is None
        assert row.value > 0
        assert row.facts["forms"] == {"stickbreaking": "reference", "softmax": "reference"}
    assert set(rows) == {"skipping/speed-up at 0.001", "skipping/error at 0.001"}
    one, out = seen["packed/both"]
    assert dict(one.options) == {"scale": 0.3}
    assert set(out) == {"out", "d_q", "d_k", "d_v"}
    # Tokens of the first document see only that document, in packed and in whole rows.
    whole = seen["whole/both"][1]["out"]
    np.testing.assert_allclose(out["out"][:, :10], whole[:, :10], rtol=1e-5)
    assert not np.allclose(out["out"][:, 10:], whole[:, 10:], rtol=1e-2)


def test_softmax_that_cannot_run_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"dtype": "bfloat16", "refused": {"softmax": "no engine"}}
    samples = {side: [1.0] for side in (*SIDES, OVER[1])}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    rows = list(skipping._beside("both", samples, facts))
    assert [row.name.endswith("/over softmax/refused") for row in rows] == [True, False] * 3
    goals = {row.name.split("/")[1]: row.goal for row in rows if row.samples}
    assert goals == dict.fromkeys(SIDES, None) | {"tolerance 0.001": Goal("<=", 1.3)}
    in_float32 = skipping._beside("both", samples, facts | {"dtype": "float32"})
    assert not any(row.goal for row in in_float32)


def test_inputs_are_rounded_before_the_op() -> None:
    found = skipping.rounded(layer())
    dtypes = {name: x.dtype.name for name, x in found.inputs.items()}
    assert dtypes == dict.fromkeys("qkv", "bfloat16") | {"remainder_bias": "float32"}
    assert found.case().dims == {"B": 1, "T": 16, "H": 4, "G": 2, "K": 8, "V": 8}


def test_the_kernel_of_the_device_is_used_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "kernel", lambda *_: "reference")
    monkeypatch.setattr(
        forms, "refusal", lambda _, case, *__: "short" if case.dims["T"] < 20 else None
    )
    assert skipping._on_this_device(layer(16)).form == "chunked"
    assert skipping._on_this_device(layer(20)).form == "reference"


def test_skipping_needs_a_run() -> None:
    options = Options(base=get_config().to_dict(), pairs=1, precision="float32")
    with pytest.raises(UserError, match="set --workdir=WORKDIR"):
        skipping.run(options)
