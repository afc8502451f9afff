"""Train and decode steps with a mixer of every op, compiled for absent devices.

    python -m tests.aot.matrix            compiles all cases and prints their bytes per device
    python -m tests.aot.matrix --write    also writes the bytes to golden.json
    python -m tests.aot.matrix decode     compiles only cases with "decode" in their name

Where devices share the tokens of rows, each op uses the first strategy that it declares. For rows
this short "auto" would choose an exchange for heads for every op.

Needs the compiler of the target (the extra `aot`).
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels import dispatch
from lm import targets
from lm.build import Build, build
from lm.config import UserError
from lm.parallel import sharding
from tests.lm import tiny

GOLDEN = Path(__file__).with_name("golden.json")
# One mixer for every op.
FAMILIES = ("softmax", "stickbreaking", "gla", "gated_deltanet", "s4d", "base_conv")
PROGRAMS = ("train", "decode")


class Mesh(NamedTuple):
    """A target, changes to the configuration for it, and the programs that are compiled."""

    target: str
    changes: dict[str, Any]
    programs: tuple[str, ...] = PROGRAMS


_TENSOR = {"mesh.tensor": 2, "mesh.stream_over_tensor": True}
MESHES = {
    "v5e-8": Mesh("v5e-8", {"mesh.data": 2, "mesh.fsdp": 2} | _TENSOR),
    "v5p-8": Mesh("v5p-8", {"mesh.data": 2, "mesh.tensor": 2, "mesh.zero1": True}),
    "h100-8": Mesh("h100-8", {"mesh.fsdp": 8}),
    "v5e-8, sequence": Mesh("v5e-8", {"mesh.data": 2, "mesh.sequence": 4}, ("train",)),
    "h100-8, sequence": Mesh("h100-8", {"mesh.fsdp": 2, "mesh.sequence": 4}, ("train",)),
}
CASES = [
    (mesh, family, program)
    for mesh, found in MESHES.items()
    for family in FAMILIES
    for program in found.programs
]
CHANGES: dict[str, Any] = {
    "model.width": 256,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 64,
    "model.ffn_dim": 512,
    "model.precision": "bfloat16",
    "mup.base_width": 256,
    "data.tokenizer.vocab_size": 4096,
    "data.context_length": 512,
    "data.batch_size": 16,
    "loss.chunk_size": 256,
}
FIELDS = ("argument", "output", "alias", "temp")


def compiled(mesh: str, family: str, program: str) -> Any:
    """The executable. A TPU's own compiler accepts or refuses it."""
    target, changes, _ = MESHES[mesh]
    changes = CHANGES | changes | {"model.pattern": family}
    changes["mesh.sequence_strategy"] = _own_strategy(family)
    built = build(tiny.config(changes), targets.devices(targets.parse(target)))
    if program == "train":
        return built.lowered().compile()
    return _decode(built)


def _own_strategy(family: str) -> str:
    (record, *_) = tiny.create({"model.pattern": family}).layers
    return dispatch.get(record.op).sequence[0].name


def _decode(built: Build) -> Any:
    """One token for each of 16 rows with at most 1,024, with the state updated in place."""
    of_tokens = sharding.batch(built.mesh)
    rows = jax.sharding.NamedSharding(of_tokens.mesh, jax.sharding.PartitionSpec(of_tokens.spec[0]))
    place = functools.partial(_placed, rows=rows)
    state = jax.tree.map(place, jax.eval_shape(lambda: built.model.init_state(16, 1024)))
    tokens = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=rows)

    places = jax.tree.map(lambda leaf: leaf.sharding, state)

    @functools.partial(jax.jit, donate_argnums=2, out_shardings=(rows, places))
    def step(params: Any, tokens: jax.Array, state: Any) -> Any:
        return built.model.apply({"params": params}, tokens, state, method="step")

    return step.lower(built.abstract_state.params, tokens, state).compile()


def _placed(leaf: jax.ShapeDtypeStruct, rows: Any) -> jax.ShapeDtypeStruct:
    """Places rows on devices: states are [L, B, ...], the next positions [B]."""
    spec = rows.spec if leaf.ndim == 1 else jax.sharding.PartitionSpec(None, *rows.spec)
    where = jax.sharding.NamedSharding(rows.mesh, spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def measured(mesh: str, family: str, program: str) -> dict[str, int]:
    """Bytes on one device, as the compiler counts them."""
    memory = compiled(mesh, family, program).memory_analysis()
    return {field: int(getattr(memory, f"{field}_size_in_bytes")) for field in FIELDS}


def main() -> None:
    """Arguments select the cases whose name contains one of them, e.g. "v5e-8/softmax decode".
    Without arguments all are compiled.
    """
    wanted = [argument for argument in sys.argv[1:] if argument != "--write"]
    found: dict[str, dict[str, int]] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for case in CASES:
        name = "/".join(case)
        if wanted and not any(part in name for part in wanted):
            continue
        machine = targets.parse(MESHES[case[0]].target)
        targets.start(machine)
        try:
            targets.devices(machine)
        except UserError as missing:
            print(missing)
            continue
        found[name] = measured(*case)
        print(name, found[name], flush=True)
    if "--write" in sys.argv[1:]:
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
