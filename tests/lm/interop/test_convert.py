"""Weights put into another pattern: what fits is taken over layer by layer, the rest is listed."""

from __future__ import annotations

from typing import Any

import numpy as np

from lm.interop import convert
from tests.lm import tiny

COMMON = {"model.num_layers": 4}


def block(params: Any, group: int, place: int) -> Any:
    return params[f"groups_{group}"][f"blocks_{place}"]


def test_softmax_into_a_hybrid() -> None:
    """Four layers in one group become a, b, a and one softmax more: every layer keeps its place."""
    source = tiny.create(COMMON | {"model.pattern": "softmax"})
    groups = ((1, "softmax,gated_deltanet,softmax"), (1, "softmax"))
    target = tiny.create(COMMON | {"model.pattern": groups})
    given = tiny.params(source, seed=1)
    got, report = convert.convert(given, source.infos, target, seed=3)
    theirs = block(given, 0, 0)
    for layer, (group, place) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0)]):
        ours = block(got, group, place)
        np.testing.assert_array_equal(
            ours["mlp"]["up"]["kernel"][0], theirs["mlp"]["up"]["kernel"][layer]
        )
        np.testing.assert_array_equal(
            ours["mixer_norm"]["scale"][0], theirs["mixer_norm"]["scale"][layer]
        )
        if layer != 1:
            for name in ("query", "key", "value", "out"):
                np.testing.assert_array_equal(
                    ours["mixer"][name]["kernel"][0], theirs["mixer"][name]["kernel"][layer]
                )
    np.testing.assert_array_equal(got["embed"]["table"], given["embed"]["table"])
    np.testing.assert_array_equal(got["final_norm"]["scale"], given["final_norm"]["scale"])
    fresh = np.asarray(block(got, 0, 1)["mixer"]["query"]["kernel"])
    assert 0.08 < fresh.std() < 0.12  # mup.init_std, the source's is 0.15
    assert {layer for layer, _ in report.initialized} == {1}
    assert (1, "mixer/A_log") in report.initialized
    assert report.unused == [
        (1, f"mixer/{name}/kernel") for name in ("key", "out", "query", "value")
    ]
    assert len(report.copied) == 2 + 4 * 5 + 3 * 4
    assert "mixer/key/kernel of layers 0 2 3" in report.lines()[0]


def test_the_same_pattern_is_the_identity() -> None:
    """Also where it is grouped another way."""
    source = tiny.create(COMMON | {"model.pattern": "softmax,stickbreaking"})
    groups = ((2, "softmax,stickbreaking"),)
    target = tiny.create(COMMON | {"model.pattern": groups})
    given = tiny.params(source, seed=1)
    got, report = convert.convert(given, source.infos, target)
    assert report.lines()[1:] == ["initialized: nothing", "unused: nothing"]
    for place in (0, 1):
        a, b = block(given, 0, place), block(got, 0, place)
        np.testing.assert_array_equal(a["mixer"]["out"]["kernel"], b["mixer"]["out"]["kernel"])


def test_layers_and_shapes_that_differ() -> None:
    """A deeper target starts with the source's layers; a wider key is initialized."""
    source = tiny.create({"model.num_layers": 2, "model.pattern": "softmax"})
    wide = {"softmax": {"num_kv_heads": 4}}
    target = tiny.create({"model.num_layers": 3, "model.pattern": "softmax", "model.layers": wide})
    given = tiny.params(source, seed=1)
    got, report = convert.convert(given, source.infos, target)
    ours, theirs = block(got, 0, 0), block(given, 0, 0)
    np.testing.assert_array_equal(
        ours["mixer"]["out"]["kernel"][:2], theirs["mixer"]["out"]["kernel"]
    )
    assert {(0, "mixer/key/kernel"), (1, "mixer/value/kernel")} <= set(report.initialized)
    assert (2, "mlp/up/kernel") in report.initialized
    assert (0, "mixer/key/kernel") in report.unused
    assert np.std(ours["mlp"]["up"]["kernel"][2]) > 0
