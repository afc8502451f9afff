"""Prints the bytes of a layer's temporaries, for rows of one document and for packed rows.

    python -m tests.aot.packed_layer TARGET OP OPTIONS

It needs a process of its own, since the tests' process interprets kernels.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.contract import Case
from kernels.shard import Placement
from launch.benchmarks import forms
from lm import targets


def layer_bytes(target: str, op: str, options: Any, *, packed: bool) -> int:
    """Bytes of temporaries of a layer, projections around an op, with its gradients."""
    found = targets.parse(target)
    targets.start(found)
    mesh = forms.mesh(targets.devices(found)[0])
    dims = {"B": 2, "T": 4096, "H": 8, "G": 8, "K": 128, "V": 128}
    case = Case(dims, options, dtype="bfloat16")
    form = forms.kernel(op, found.chip.platform)
    shapes, d_out = jax.eval_shape(lambda: forms.arrays(op, case))
    width = dims["H"] * dims["K"]

    def layer(x: jax.Array, weights: Any, ids: Any) -> jax.Array:
        inputs = {
            name: (x @ weights[name]).reshape(like.shape).astype(like.dtype)
            for name, like in shapes.items()
        }
        for name, spec in dispatch.get(op).needed({**dispatch.get(op).options, **options}).items():
            if spec.kind == "log_decay":
                inputs[name] = -jax.nn.softplus(inputs[name])
        placement = Placement(mesh, forms.RULES, "auto", "contiguous")
        call = {"form": form, "options": options, "placement": placement}
        out = dispatch.apply(op, inputs, segment_ids=ids if packed else None, **call)[0]
        return out.reshape(x.shape) @ weights["out"]

    def both(x: jax.Array, weights: Any, ids: Any, d_out: jax.Array) -> Any:
        out, pull = jax.vjp(lambda x, weights: layer(x, weights, ids), x, weights)
        return out, pull(d_out.reshape(out.shape))

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    columns = {name: like.size // (dims["B"] * dims["T"]) for name, like in shapes.items()}
    weights = {name: array(width, n) for name, n in columns.items()} | {"out": array(width, width)}
    ids = jax.ShapeDtypeStruct((dims["B"], dims["T"]), jnp.int32)
    given = (array(dims["B"], dims["T"], width), weights, ids, d_out)
    return forms.lower(both, given, mesh).compile().memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    target, op, options = sys.argv[1:]
    print(*(layer_bytes(target, op, json.loads(options), packed=x) for x in (False, True)))
