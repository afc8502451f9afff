"""On a GPU or TPU, training with the device's kernels gives the model that the chunked forms give,
in bfloat16 and with packed rows. `espalier tune` takes its measurements.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from kernels import dispatch
from launch.benchmarks import forms, tuning
from tests.lm import tiny

STEPS, TIME = 5, 256
SIZES = {
    "model.width": 128,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_dim": 64,
    "model.precision": "bfloat16",
    "data.context_length": TIME,
}
# The tolerance in bfloat16, for a loss of about 6 after a few steps (when interpreted on a CPU the
# difference is below 2e-4). A wrong gradient changes the loss by tenths.
NOISE = 2e-3


def losses(mixer: str, form: str) -> list[float]:
    layers = {"layer": {"mixer": mixer, "form": form}}
    built = tiny.create(SIZES | {"model.layers": layers, "model.pattern": "layer"})
    state, found = tiny.state(built), list[float]()
    step = jax.jit(built.step)
    for seed in range(STEPS):
        state, metrics = step(
            state, tiny.batch(seed, time=TIME), np.ones(tiny.VOCAB, np.int32), built.numbers
        )
        found.append(float(metrics["train/nll"]))
    return found


ON = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("gpu", "tpu")]


@pytest.mark.parametrize("target", ON)
@pytest.mark.parametrize(
    ("mixer", "op"),
    [
        ("stickbreaking", "stickbreaking"),
        ("gla", "gated_linear"),
        ("mamba2", "gated_linear"),
        ("deltanet", "delta_rule"),
        ("gated_deltanet", "delta_rule"),
    ],
)
def test_trains_as_chunked_does(mixer: str, op: str, target: str) -> None:
    form = forms.kernel(op, target)
    assert form is not None
    chunked, kernel = losses(mixer, "chunked"), losses(mixer, form)
    assert len(set(chunked)) == STEPS
    np.testing.assert_allclose(kernel, chunked, rtol=NOISE)


@pytest.mark.parametrize("target", ON)
def test_tunes(target: str) -> None:
    place = tuning.here(1)
    assert place.platform == target
    row: dict[str, Any] = next(tuning.rows(place, ["gated_linear"], lambda message: None))
    assert row["tried"]
    candidates = dispatch.get("gated_linear").candidate_blocks(row["form"])
    assert row["blocks"] in [dataclasses.asdict(blocks) for blocks in candidates]
    assert all(x > 0 for x in row["ratio"].values())
