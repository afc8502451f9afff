"""The published hybrids of experiments/hybrids have each layer where its paper puts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import cli
from lm import layers as layer_lib
from lm import pattern as pattern_lib
from lm.config import UserError, from_mapping

FILE = Path(__file__).parents[2] / "experiments/hybrids/config.py"
# One letter a layer: d deltanet, w window, f full attention, c convolution, b based, k block, n
# normed, g gated deltanet, m mamba2.
LAYERS = {
    "deltanet_window": "dwdwdw",
    "deltanet_global": "dfdfdd",  # layers 2 and L / 2 + 1, counted from 1
    "based": "cbwccc",
    "masformer": "fwwwww",
    "transnormer": "kkknnn",
    "gated_deltanet_h1": "gwgwgw",
    "gated_deltanet_h2": "mgwmgw",
}
SHORT = {
    "deltanet": "d",
    "window": "w",
    "full": "f",
    "base_conv": "c",
    "based": "b",
    "block": "k",
    "transnormer": "n",
    "gated_deltanet": "g",
    "mamba2": "m",
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_stand_where_the_paper_puts_them(name: str) -> None:
    config = from_mapping(cli.read_config_file(f"{FILE}:{name}").to_dict()).model
    layer_lib.check(config)
    groups = pattern_lib.parse(config.pattern, config.num_layers)
    labels = [label for group in groups for label in group.labels * group.repeat]
    assert "".join(SHORT[label] for label in labels) == LAYERS[name]


def test_an_unknown_hybrid_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="no hybrid 'delta'; one of deltanet_window"):
        cli.read_config_file(f"{FILE}:delta")
