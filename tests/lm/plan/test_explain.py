"""Out of memory: what the compiler's message says, the largest buffers, and what changes would
save.
"""

from __future__ import annotations

from typing import Any

import jax
import pytest

from lm.plan import changes, explain, memory, program
from tests.lm import tiny

WIDE = {
    "mesh.data": 4,
    "data.batch_size": 64,
    "model.num_layers": 3,
    "data.context_length": 64,
}
MESSAGE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space
hbm. Used 18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G.

Largest program allocations in hbm:

  1. Size: 1.50G
     Operator: op_name="jit(step)/jvp(Model)/groups_0.layer/groups_0/blocks_0/mlp/up/dot_general"
     Shape: bf16[40,1,4096,9216]{3,2,1,0:T(8,128)(2,1)}
     ==========================

  2. Size: 768.00M
     Operator: op_name="jit(step)/jvp()/shard_map/while/body/dot_general"
     Shape: f32[4096,49152]{1,0:T(8,128)}
     ==========================
"""


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("memory required for HLO temporaries (2.00G) exceeds available HBM (15.75G)", 2 << 30),
        (MESSAGE, 37 << 29),
        ("E1000 CompileTimeHbmOom ... 16.00G exceeds 15.75G", 16 << 30),
        ("Out of memory while trying to allocate 3.50GiB.", 7 << 29),
        ("Out of memory while trying to allocate 1048576 bytes.", 1 << 20),
        ("RESOURCE_EXHAUSTED", None),
    ],
)
def test_messages_say_what_is_needed(message: str, size: int | None) -> None:
    assert program.needed_bytes(message) == size


def test_allocations_a_compiler_lists_are_read() -> None:
    first, second = explain.from_message(MESSAGE)
    assert first == (3 << 29, "program", "groups_0/blocks_0/mlp/up", "bf16[40,1,4096,9216]")
    assert (second.bytes, second.module) == (768 << 20, "loss")


def total(config: Any) -> int:
    return changes.estimate(config, jax.devices()[:4])[1].total


@pytest.mark.slow
def test_changes_save_what_is_predicted() -> None:
    config = tiny.config(WIDE)
    found = changes.proposed(config, jax.devices()[:4])
    assert len(found) == 3
    assert [c.saved for c in found] == sorted((c.saved for c in found), reverse=True)
    before = total(config)
    for change in found:
        assert total(changes.apply(config, change.values)) == before - change.saved
        assert change.flags.startswith("--config.")


@pytest.mark.slow
def test_the_explanation_names_buffers_and_changes() -> None:
    text = explain.explain(tiny.config(WIDE), jax.devices()[:4], "RESOURCE_EXHAUSTED: 20.00G")
    assert "out of memory: RESOURCE_EXHAUSTED: 20.00G" in text
    assert "groups_0/blocks_0/mlp" in text
    assert "activations" in text
    assert "--config.model.remat=full" in text
    assert sum(line.startswith("--config.") for line in text.splitlines()) == 3
    listed = explain.explain(tiny.config(WIDE), jax.devices()[:4], MESSAGE)
    assert "named by the compiler" in listed
    assert "the error names 18.50 GiB" in listed


def test_buffers_are_those_of_a_device() -> None:
    config = tiny.config(WIDE | {"mesh.data": 1, "mesh.fsdp": 4})
    built, needs = changes.estimate(config, jax.devices()[:4])
    found = explain.buffers(built, memory.measure(config, jax.devices()[:4]))
    assert found == sorted(found, key=lambda b: -b.bytes)
    for what, size in (("parameters", needs.parameters), ("activations", needs.activations)):
        assert sum(b.bytes for b in found if b.what == what) == pytest.approx(size, rel=0.01)


@pytest.mark.slow
def test_a_remedy_is_found_or_said_not_to_be() -> None:
    config = tiny.config(WIDE)
    before = total(config)
    values, suffices = changes.remedy(config, jax.devices()[:4], 0.5 * before)
    assert suffices
    assert total(changes.apply(config, values)) <= 0.5 * before
    values, suffices = changes.remedy(config, jax.devices()[:4], before)
    assert not suffices
    assert values


def test_a_module_of_a_name() -> None:
    name = "groups_0/blocks_1/mixer/query"
    assert memory.module_of(f"{name}/kernel") == name
    assert memory.module_of(f"jit(step)/jvp(M)/while/body/{name}/dot_general") == name
    assert memory.module_of("embed/table") == "embed"
    assert memory.module_of("jit(step)/jvp()/shard_map/while/body/dot_general") == "loss"
    assert memory.module_of("jit(step)/add") == "other"
