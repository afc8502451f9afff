"""What holds for every mixer: decoding, packing, causality, gradients, training.

tests/lm/mixers tests what each layer computes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import build as build_lib
from lm import families
from tests.lm import tiny
from tests.lm.mixers.layer import Layer, random_input, relative_error

MIXERS = families.MIXERS.names()
TIME = 70  # a whole chunk and part of another
# Smaller sizes that compile faster; what is tested does not depend on them.
SMALLER: dict[str, dict[str, Any]] = {"h3": {"shift_taps": 9}, "mamba2": {"state_dim": 16}}


@functools.cache
def layer(mixer: str) -> Layer:
    return Layer(mixer, **SMALLER.get(mixer, {}))


@functools.cache
def program(mixer: str) -> Any:
    """(params, x, segment_ids, positions, cotangent) -> output, gradients of params and x."""
    module = layer(mixer)

    def run(params: Any, x: Any, segment_ids: Any, positions: Any, cotangent: Any) -> Any:
        call = lambda params, x: module(params, x, segment_ids, positions)
        out, pull = jax.vjp(call, params, x)
        return out, *pull(cotangent)

    return tiny.jit(run)


def packed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row 0 holds documents of 31, 1 and 33 tokens, then padding. Rows 1 to 3 hold one of them
    each.
    """
    x, segment_ids = random_input(4, TIME), np.zeros((4, TIME), np.int32)
    positions = np.zeros((4, TIME), np.int32)
    for i, (begin, length) in enumerate([(0, 31), (31, 1), (32, 33)]):
        for row, start, segment in ((0, begin, i + 1), (i + 1, 0, 1)):
            place = slice(start, start + length)
            x[row, place] = x[0, begin : begin + length]
            segment_ids[row, place], positions[row, place] = segment, np.arange(length)
    return x, segment_ids, positions


@pytest.mark.parametrize("mixer", MIXERS)
def test_packed_documents_equal_separate_ones(mixer: str) -> None:
    """Outputs and gradients of the input are equal. Every parameter has a gradient, and all of them
    are finite.
    """
    x, segment_ids, positions = packed()
    cotangent = random_input(4, TIME, seed=2)
    for i, (begin, length) in enumerate([(0, 31), (31, 1), (32, 33)]):
        cotangent[i + 1, :length] = cotangent[0, begin : begin + length]
    out, d_params, d_x = program(mixer)(layer(mixer).params, x, segment_ids, positions, cotangent)
    for whole in (out, d_x):
        assert np.isfinite(whole).all()
        for i, (begin, length) in enumerate([(0, 31), (31, 1), (32, 33)]):
            got, want = whole[0, begin : begin + length], whole[i + 1, :length]
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * np.abs(whole).max())
    for path, leaf in jax.tree.leaves_with_path(d_params):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_future_is_not_seen(mixer: str) -> None:
    """Outputs and input gradients of a causal mixer do not depend on later tokens; those of another
    mixer do. Both depend on earlier tokens.
    """
    x = random_input(4, TIME)
    changed = x.copy()
    changed[:, 40:] += 1.0
    ones = np.ones((4, TIME), np.int32)
    positions = np.broadcast_to(np.arange(TIME, dtype=np.int32), (4, TIME))
    run = functools.partial(program(mixer), layer(mixer).params)
    cotangent = np.zeros_like(x)
    cotangent[:, 66] = random_input(4, 1)[:, 0]
    (a, _, d_x), (b, _, _) = (run(value, ones, positions, cotangent) for value in (x, changed))
    causal = layer(mixer).mixer.is_causal()
    assert np.array_equal(a[:, :40], b[:, :40]) == causal
    assert np.any(d_x[:, 67:]) != causal
    assert np.abs(d_x[:, :66]).max() > 1e-6 * np.abs(d_x).max()


@pytest.mark.parametrize("mixer", MIXERS)
def test_prefill_and_steps_equal_one_call(mixer: str) -> None:
    module, x = layer(mixer), random_input(4, TIME)
    ones = np.ones((4, TIME), np.int32)
    positions = np.broadcast_to(np.arange(TIME, dtype=np.int32), (4, TIME))
    want = program(mixer)(module.params, x, ones, positions, x)[0]
    got = tiny.jit(functools.partial(module.decode, prefill=66))(module.params, x)
    assert relative_error(got, want) < 2e-5
    assert relative_error(got[:, 66:], want[:, 66:]) < 2e-5


@pytest.mark.parametrize("mixer", MIXERS)
def test_sizes_and_costs_are_counted(mixer: str) -> None:
    """Every call has FLOPs. A state grows no faster than the length, if at all."""
    module = layer(mixer)
    assert module.size() > 0
    assert build_lib.flops_per_token(module.built) > 6.0 * module.size() * 0.5
    assert {record.op for record in module.built.layers} == {
        call.op for call in module.mixer.calls().values()
    }
    sizes = [module.state_floats(max_len) for max_len in (8, 16)]
    assert sizes[0] <= sizes[1] <= 2 * sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("parametrization", ["mup", "standard"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_trains(mixer: str, parametrization: str) -> None:
    """Thirty steps on one batch lower the loss of a model twice as wide as the base width."""
    changes: dict[str, Any] = {
        "model.pattern": mixer,
        "model.num_kv_heads": 4,
        "mup.base_width": 16,
        "mup.parametrization": parametrization,
        "run.length": "30 steps",
    }
    if parametrization == "standard":
        changes |= {"mup.embedding_multiplier": 1.0, "mup.residual_multiplier": 1.0}
    built = tiny.create(changes)
    batch = built.put(tiny.batch())
    state = built.init(0)
    token_bytes = built.put_replicated(jnp.ones(tiny.VOCAB, jnp.int32))
    losses = []
    for _ in range(30):
        state, metrics = built.step(state, batch, token_bytes, built.numbers)
        losses.append(float(metrics["train/loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.5, losses
