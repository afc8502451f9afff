"""The exact collectives of a step, in the StableHLO that JAX hands to any compiler.

This program does not hold those that the partitioner adds for array layouts (the gathers of
ZeRO-3's weights and of the residual stream). For these, tests/aot looks at the output of the TPU
and GPU compilers.
"""

from __future__ import annotations

import collections
import re
from typing import Any

import jax
import pytest

from tests.lm import tiny

CHANGES = {"data.batch_size": 8, "model.num_heads": 8, "model.num_kv_heads": 8, "mesh.data": 1}
LEAVES = 11  # parameters of one softmax layer with tied embeddings
KINDS = "all_reduce|all_gather|reduce_scatter|all_to_all|collective_permute"
SUMS = 4  # objective, nats, nats of text, bytes of text
TENSOR = {"mesh.tensor": 8}


def collectives(changes: dict[str, Any], leaves: int | None = LEAVES) -> dict[str, int]:
    """Kind -> number of collectives in the program text between more than one device."""
    built = tiny.create(CHANGES | changes, num_devices=8)
    assert leaves in (None, len(jax.tree.leaves(built.abstract_state.params)))
    text = built.lowered().as_text()
    found: collections.Counter[str] = collections.Counter()
    for kind, axes in re.findall(rf'"stablehlo.({KINDS})".*?axes = \[(.*?)\]', text):
        names = re.findall(r'name = "(\w+)"', axes)
        found[kind] += any(built.mesh.shape[name] > 1 for name in names)
    return {kind: count for kind, count in found.items() if count}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_data_parallel_reduces_once_a_step(accumulation: int) -> None:
    """Every gradient and every sum is reduced once, for any number of microbatches."""
    mesh = {"mesh.data": 8, "data.batch_size": 8 * accumulation, "run.accumulation": accumulation}
    assert collectives(mesh) == {"all_reduce": LEAVES + SUMS}
    zero1 = collectives(mesh | {"mesh.zero1": True})
    assert zero1 == {"reduce_scatter": LEAVES, "all_reduce": SUMS}


def test_sharded_parameters() -> None:
    """The embedding table is gathered for the lookup and for the logits, and its two gradients are
    scattered. The objective is summed.
    """
    expected = {"all_gather": 2, "reduce_scatter": 2, "all_reduce": 1}
    assert collectives({"mesh.fsdp": 8}) == expected


def test_tensor_parallel() -> None:
    """Sums over devices, counted as below.

    - Each layer has two forward and two backward (mixer and feed-forward).
    - The lookup has one.
    - A chunk of logits has four: the maximum, the sum, the sum without the target, the target's.
    - The gradient of the hidden states has one.
    """
    assert collectives(TENSOR) == {"all_reduce": 4 + 1 + 4 + 1}
    # The forward sums of a layer are scattered over T.
    streamed = collectives(TENSOR | {"mesh.stream_over_tensor": True})
    assert streamed == {"reduce_scatter": 2, "all_reduce": 2 + 1 + 4 + 1}


@pytest.mark.parametrize(("pattern", "rest"), [("gla", 1), ("gated_deltanet", 0)])
def test_the_gradient_of_a_mixers_input_is_summed_once(pattern: str, rest: int) -> None:
    """The gradient of the input is summed once for all projections that read it. `rest` counts the
    additional sum of GLA's low-rank gate.
    """
    assert collectives(TENSOR | {"model.pattern": pattern}, None) == {"all_reduce": 10 + rest}


def test_remat_can_keep_what_ranks_of_a_recurrence_sent() -> None:
    """If remat keeps the states, they are gathered once forward and once backward, and not a third
    time when the layer is recomputed.
    """
    split = {"mesh.sequence": 8, "mesh.sequence_strategy": "states", "model.pattern": "gla"}
    anew, kept = (
        collectives(split | {"model.remat": "named", "model.kept": names}, None)
        for names in ({}, {"states": "device"})
    )
    assert kept == anew | {"all_gather": anew["all_gather"] - 1}
