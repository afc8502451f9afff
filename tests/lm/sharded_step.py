"""Three steps on meshes of eight CPU devices, compared with one device.

    python -m tests.lm.sharded_step '[{"mesh.data": 2, ...}, ...]' '{"model.num_layers": 2, ...}'

test_meshes.py starts it as a process. It prints a JSON list that holds, for each mesh, the
differences from the single device, or the message of a UserError. Rows have unequal numbers of
valid tokens, so a mean of means would give another result.
"""

import json
import sys
from typing import Any

import jax
import numpy as np

from lm.build import Build
from lm.config import UserError
from lm.parallel import placement
from tests.lm import tiny

STEPS = 3
ROWS = 8
CHANGES: dict[str, Any] = {
    "model.pattern": "softmax,stickbreaking,gla,gated_deltanet",
    "model.num_layers": 4,
    "model.num_heads": 8,
    "model.num_kv_heads": 4,
    "model.tied_embeddings": False,
    "model.layers": {"stickbreaking": {"mixer": "stickbreaking", "remainder": "bias"}},
    "data.batch_size": ROWS,
    "loss.z_loss": 1e-3,
    "mesh.data": 1,
    # These values keep rounding errors small: at the start of a document a norm divides the op's
    # output by a number near 0, and Adam turns a gradient near 0 into its sign.
    "model.norm_eps": 1e-2,
    "optimizer.eps": 1e-2,
    "schedule.peak_learning_rate": 1e-3,
}


def run(built: Build) -> list[dict[str, Any]]:
    """For every step: its loss and gradient norm, the gradient of each tensor as the optimizer saw
    it, and the loss of each token before the update.
    """
    state, found = tiny.state(built), []
    token_bytes = built.put_replicated(np.arange(tiny.VOCAB, dtype=np.int32) % 5)
    batches = [built.put(tiny.batch(seed, rows=ROWS)) for seed in range(STEPS)]
    score = tiny.compiled(built.score, state.params, batches[0])
    numbers = built.put_replicated(built.numbers)
    step = tiny.compiled(built.step, state, batches[0], token_bytes, numbers)
    for batch in batches:
        nll = np.asarray(score(state.params, batch)[0])
        places = placement.columns(nll.shape[1], built.mesh, built.model.context.layout)
        nll = nll[:, np.argsort(places)]
        before = _moments(state)
        state, metrics = step(state, batch, token_bytes, numbers)
        _check_layout(built, state)
        gradient = [(b - 0.9 * a) / 0.1 for a, b in zip(before, _moments(state), strict=True)]
        values = {key: float(metrics[key]) for key in ("train/loss", "optim/grad_norm")}
        found.append({"nll": nll, "gradient": gradient, **values})
    return found


def _moments(state: Any) -> list[np.ndarray]:
    """The optimizer's running means of the gradients; their decay is 0.9."""
    flat = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return [np.asarray(x, np.float64) for path, x in flat if "mu" in jax.tree_util.keystr(path)]


def _check_layout(built: Build, state: Any) -> None:
    abstract = jax.tree.leaves(built.abstract_state)
    for leaf, expected in zip(jax.tree.leaves(state), abstract, strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


def compare(changes: dict[str, Any], one: list[dict[str, Any]]) -> dict[str, Any]:
    try:
        built = tiny.create(CHANGES | changes, num_devices=8)
    except UserError as error:
        return {"error": str(error)}
    worst: dict[str, float] = {}
    steps = run(built)
    weights = [tiny.batch(seed, rows=ROWS).loss_weights > 0 for seed in range(STEPS)]
    for got, want, valid in zip(steps, one, weights, strict=True):
        gradients = zip(got["gradient"], want["gradient"], strict=True)
        errors = {
            "loss": abs(got["train/loss"] / want["train/loss"] - 1.0),
            "norm": abs(got["optim/grad_norm"] / want["optim/grad_norm"] - 1.0),
            "gradient": max(_rms(a - b) / _rms(b) for a, b in gradients),
            "nll": float(np.abs(got["nll"] - want["nll"])[valid].max()),
        }
        worst = {key: max(worst.get(key, 0.0), error) for key, error in errors.items()}
    norms = [got["optim/grad_norm"] for got in steps]
    return worst | {"norms": norms} | {f"bytes/{k}": v for k, v in _bytes(built).items()}


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def _bytes(built: Build) -> dict[str, float]:
    """The share of the parameters, and of the optimizer state, that one device holds."""

    def share(tree: Any) -> float:
        sizes = [(x.size, np.prod(x.sharding.shard_shape(x.shape))) for x in jax.tree.leaves(tree)]
        return float(sum(part for _, part in sizes) / sum(whole for whole, _ in sizes))

    state = built.abstract_state
    return {"params": share(state.params), "optimizer": share(state.opt_state)}


def main() -> None:
    changes, shared = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    CHANGES.update(shared)
    one = run(tiny.create(CHANGES))
    print(json.dumps([compare(mesh, one) for mesh in changes]))


if __name__ == "__main__":
    main()
