"""The train step compiled for an absent TPU v5e slice of 2 x 2 chips.

By the compiler's account, the new state reuses the old one's buffers, and no buffer is as large as
all logits.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from typing import Any

import jax
import pytest

from lm import extras, targets
from lm.build import Build, build
from tests.lm import tiny

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason=f"libtpu is not installed: {extras.command('aot')}",
    ),
]

BATCH, TIME, VOCAB = 8, 512, 4096
CHANGES: dict[str, Any] = {
    "model.width": 256,
    "model.num_layers": 4,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 64,
    "model.ffn_dim": 512,
    "model.precision": "bfloat16",
    "mup.base_width": 256,
    "data.tokenizer.vocab_size": VOCAB,
    "data.context_length": TIME,
    "data.batch_size": BATCH,
    "loss.chunk_size": 256,
    "mesh.data": 2,
    "mesh.fsdp": 2,
}


@functools.cache
def compiled(pattern: str) -> tuple[Build, Any]:
    devices = targets.devices(targets.parse("v5e-4"))
    built = build(tiny.config(CHANGES | {"model.pattern": pattern}), devices)
    return built, built.lowered().compile()


@pytest.fixture(params=["softmax", "stickbreaking"])
def program(request: pytest.FixtureRequest) -> tuple[Build, Any]:
    return compiled(request.param)


def test_the_state_is_updated_in_place(program: tuple[Build, Any]) -> None:
    built, executable = program
    state = jax.tree.leaves(built.abstract_state)
    shard = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    memory = executable.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(map(shard, state))
    # The only other arguments are the batch and the byte count of each token id.
    rest = (5 * 4 + 4) * BATCH * TIME // 4 + 4 * VOCAB
    assert memory.argument_size_in_bytes < 1.1 * (memory.alias_size_in_bytes + rest)


def test_parameters_are_sharded(program: tuple[Build, Any]) -> None:
    built, executable = program
    whole = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(built.abstract_state))
    assert executable.memory_analysis().argument_size_in_bytes < 0.6 * whole


def test_no_buffer_holds_every_logit(program: tuple[Build, Any]) -> None:
    """A device has 1,024 tokens, and the largest buffer holds the logits of a chunk of 256."""
    _, executable = program
    text = executable.as_text()
    found = re.findall(r"\b(?:f32|bf16|pred|s32|u32)\[([\d,]+)\]", text)
    sizes = {math.prod(int(n) for n in shape.split(",")) for shape in found}
    assert 256 * VOCAB in sizes, "the search sees a chunk's logits"
    logits = BATCH * TIME // 4 * VOCAB
    assert max(sizes) < logits


def test_gradients_are_reduced_and_parameters_gathered(program: tuple[Build, Any]) -> None:
    _, executable = program
    text = executable.as_text()
    assert re.search(r"all-gather(-start)?\(", text)
    assert re.search(r"(reduce-scatter|all-reduce)(-start)?\(", text)
    assert "bf16[" in text
