"""A configuration at other widths and depths: what grows, what stays the same, what is refused."""

from __future__ import annotations

import pytest

from lm.config import UserError, to_mapping
from lm.studies import sizes
from tests.lm import tiny


def test_heads_grow_in_number_and_the_feed_forward_in_width() -> None:
    config = tiny.config()  # width 32: 4 heads of 8, 2 of them for keys, feed-forward 48
    model = sizes.widened(config, 128).model
    assert (model.width, model.num_heads, model.num_kv_heads) == (128, 16, 8)
    assert (model.head_dim, model.ffn_dim, model.num_layers) == (8, 192, 1)


def test_options_of_layers_grow_too() -> None:
    layer = {"mixer": "softmax", "num_heads": 2, "num_kv_heads": 1, "window": 5}
    changes = {"model.layers": {"local": layer}, "model.pattern": "local"}
    wide = sizes.widened(tiny.config(changes), 64)
    assert dict(wide.model.layers["local"]) == layer | {"num_heads": 4, "num_kv_heads": 2}


def test_the_same_width_is_the_same_configuration() -> None:
    config = tiny.config()
    assert to_mapping(sizes.widened(config, 32)) == to_mapping(config)
    assert to_mapping(sizes.deepened(config, 1)) == to_mapping(config)


def test_a_width_without_whole_heads_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.num_heads=4 at model\.width=32.*width 20"):
        sizes.widened(tiny.config(), 20)


def test_depths_cycle_the_pattern() -> None:
    config = sizes.deepened(tiny.config(), 6)
    assert config.model.num_layers == 6
    fixed = tiny.config({"model.pattern": ((1, ("softmax",)),)})
    with pytest.raises(UserError, match="fixed depth"):
        sizes.deepened(fixed, 6)
