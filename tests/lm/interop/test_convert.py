"""Weights are put into another pattern: what fits is copied layer by layer, the rest is listed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from lm import build as build_lib
from lm.config import UserError
from lm.interop import convert
from tests.lm import tiny

COMMON = {"model.num_layers": 4}


def block(params: Any, group: int, place: int) -> Any:
    return params[f"groups_{group}"][f"blocks_{place}"]


def test_softmax_is_converted_into_a_hybrid() -> None:
    """Four layers of one group become a group a, b, a and a group a; every layer keeps
    its place.
    """
    source = tiny.create(COMMON | {"model.pattern": "softmax"})
    groups = ((1, "softmax,gated_deltanet,softmax"), (1, "softmax"))
    target = tiny.create(COMMON | {"model.pattern": groups})
    given = tiny.params(source, seed=1)
    got, report = convert.convert(given, source, target, seed=3)
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
    assert 0.08 < fresh.std() < 0.12  # mup.init_std; the std of the source is 0.15
    assert {layer for layer, _ in report.initialized} == {1}
    assert (1, "mixer/A_log") in report.initialized
    assert report.unused == [
        (1, f"mixer/{name}/kernel") for name in ("key", "out", "query", "value")
    ]
    assert len(report.copied) == 2 + 4 * 5 + 3 * 4
    assert "mixer/key/kernel of layers 0 2 3" in report.lines()[0]


def test_the_same_pattern_is_the_identity() -> None:
    """This holds for another grouping of the same layers too."""
    source = tiny.create(COMMON | {"model.pattern": "softmax,stickbreaking"})
    groups = ((2, "softmax,stickbreaking"),)
    target = tiny.create(COMMON | {"model.pattern": groups})
    given = tiny.params(source, seed=1)
    got, report = convert.convert(given, source, target)
    assert report.lines()[1:] == [f"{x}: nothing" for x in ("initialized", "unused", "changed")]
    for place in (0, 1):
        a, b = block(given, 0, place), block(got, 0, place)
        np.testing.assert_array_equal(a["mixer"]["out"]["kernel"], b["mixer"]["out"]["kernel"])


def test_layers_and_shapes_that_differ_are_initialized() -> None:
    """The first layers of a deeper target are the source's; a wider key is initialized."""
    source = tiny.create({"model.num_layers": 2, "model.pattern": "softmax"})
    wide = {"softmax": {"num_kv_heads": 4}}
    target = tiny.create({"model.num_layers": 3, "model.pattern": "softmax", "model.layers": wide})
    given = tiny.params(source, seed=1)
    got, report = convert.convert(given, source, target)
    ours, theirs = block(got, 0, 0), block(given, 0, 0)
    np.testing.assert_array_equal(
        ours["mixer"]["out"]["kernel"][:2], theirs["mixer"]["out"]["kernel"]
    )
    assert {(0, "mixer/key/kernel"), (1, "mixer/value/kernel")} <= set(report.initialized)
    assert (2, "mlp/up/kernel") in report.initialized
    assert (0, "mixer/key/kernel") in report.unused
    assert np.std(ours["mlp"]["up"]["kernel"][2]) > 0


IMPORTED = {"softmax": {"mixer": "softmax", "rope_theta": 5e5, "scale": 0.2}}
LOCAL = {"local": {"mixer": "softmax", "window": 4}, "full": {"mixer": "softmax"}}


def converted(changes: dict[str, Any], pattern: Any, given: Any) -> tuple[Any, list[str]]:
    """The options of the converted model by label, and the report's lines on changed options."""
    source = tiny.create(COMMON | changes)
    model = convert.model_config(source.config.model, pattern, given)
    target = build_lib.local(dataclasses.replace(source.config, model=model))
    report = convert.Report([], [], [], list(convert.changed(source, target)))
    return model.layers, report.lines()[3:]


def test_new_labels_have_the_options_of_their_mixer() -> None:
    """The launcher's docstring says so. What --layer sets wins, and the report lists it."""
    changes = {"model.pattern": "softmax", "model.layers": IMPORTED}
    layers, message = converted(changes, "local,full", LOCAL)
    assert layers["full"] == IMPORTED["softmax"]
    assert layers["local"] == IMPORTED["softmax"] | {"window": 4}
    assert message == ["changed: window 0 -> 4 of layers 0 2"]
    given = {"a": {"mixer": "softmax", "rope_theta": 1e4}}
    layers, message = converted(changes, "a,gated_deltanet", given)
    assert layers["a"] == IMPORTED["softmax"] | {"rope_theta": 1e4}
    assert message == ["changed: rope_theta 500000.0 -> 10000.0 of layers 0 2"]


def test_new_layers_take_the_options_of_the_source_at_their_places() -> None:
    """The source layers at the same places decide; the report lists options that they
    disagree on.
    """
    options = {"local": IMPORTED["softmax"] | {"window": 4}, "full": IMPORTED["softmax"]}
    changes = {"model.pattern": "local,full", "model.layers": options}
    layers, message = converted(changes, "near,full", {"near": {"mixer": "softmax"}})
    assert (layers["near"], message) == (options["local"], ["changed: nothing"])
    layers, message = converted(changes, "softmax", {})
    assert layers["softmax"] == IMPORTED["softmax"]
    assert message == ["changed: window 4 -> 0 of layers 0 2"]
    layers, _ = converted(changes, "local", {"local": {"mixer": "gated_deltanet"}})
    assert layers["local"] == {"mixer": "gated_deltanet"}


def test_groups_say_how_deep_the_new_model_is() -> None:
    source = tiny.create({"model.num_layers": 2}).config.model
    depth = lambda pattern: convert.model_config(source, pattern, {}).num_layers
    assert depth(((4, "softmax"), (1, "gla,gla"))) == 6
    assert depth(("softmax", "gla", "gla")) == depth("softmax") == 2
    with pytest.raises(UserError, match=r"group \(0, 'softmax'\) must be \(repeat >= 1, labels\)"):
        depth(((0, "softmax"),))
