"""One step on meshes of four CPU devices against one device; test_build.py runs it as a process.

    python -m tests.lm.sharded_step '[{"mesh.data": 2, ...}, ...]'

Prints a JSON list: per mesh the differences from the single device, or the message of a UserError.
"""

import json
import sys
from typing import Any

import jax
import numpy as np

from lm.build import Build
from lm.config import UserError
from tests.lm import tiny

MODEL = {"model.pattern": "softmax,stickbreaking", "model.num_layers": 2}
MODEL |= {"model.tied_embeddings": False, "loss.z_loss": 1e-3, "mesh.data": 1}
MODEL |= {"optimizer.eps": 1e-3}  # a rounding error of a gradient near 0 must not become a sign
MODEL |= {"model.layers": {"stickbreaking": {"mixer": "stickbreaking", "remainder": "bias"}}}


def step(built: Build) -> tuple[Any, dict[str, float], np.ndarray]:
    """Updates of the parameters, metrics, and the per-token losses before the step."""
    state, batch = tiny.state(built), built.put(tiny.batch())
    token_bytes = built.put_replicated(np.arange(tiny.VOCAB, dtype=np.int32) % 5)
    nll = np.asarray(tiny.compiled(built.score, state.params, batch)(state.params, batch)[0])
    before = jax.device_get(state.params)
    run = tiny.compiled(built.step, state, batch, token_bytes)
    after, metrics = run(state, batch, token_bytes)
    for leaf, abstract in zip(
        jax.tree.leaves(after), jax.tree.leaves(built.abstract_state), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
    updates = jax.tree.map(lambda a, b: np.asarray(a) - b, after.params, before)
    return updates, {k: float(v) for k, v in metrics.items()}, nll


def compare(changes: dict[str, Any], one: Any) -> dict[str, Any]:
    try:
        built = tiny.create(MODEL | changes, num_devices=4)
    except UserError as error:
        return {"error": str(error)}
    updates, metrics, nll = step(built)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(one[0]), strict=True):
        worst = max(worst, float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    moved = {k: abs(metrics[k] / v - 1.0) for k, v in one[1].items() if v}
    weighted = tiny.batch().loss_weights > 0
    return {
        "updates": worst,
        "metrics": max(moved.values()),
        "nll": float(np.abs(nll - one[2])[weighted].max()),
        "sharded": sum(not x.sharding.is_fully_replicated for x in _leaves(built)),
    }


def _leaves(built: Build) -> list[Any]:
    return jax.tree.leaves(built.abstract_state.params)


def main() -> None:
    one = step(tiny.create(MODEL))
    print(json.dumps([compare(changes, one) for changes in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
