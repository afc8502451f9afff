"""Embedding and loss give the results of one device when devices share the tokens of a row."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from lm import loss
from lm.evaluation import generate, scoring
from lm.loss import LossOptions
from lm.modules.context import Context
from lm.modules.embed import lookup
from lm.parallel import sharding
from tests.lm import tiny

B, T, D, VOCAB = 4, 8, 32, 384


MESHES = [
    {"sequence": 4},
    {"data": 2, "sequence": 2},
    {"fsdp": 2, "tensor": 2, "sequence": 2},
]


def context(split: Mesh) -> Context:
    config = tiny.config().mesh
    return dataclasses.replace(
        tiny.create().model.context,
        mesh=split,
        rules=sharding.activations(config, split),
        weights=sharding.weights(config, split, {"D": D, "vocab": VOCAB}),
    )


def same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ways", MESHES, ids=str)
def test_the_embedding(ways: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (B, T)), jnp.int32)
    table = jnp.asarray(rng.standard_normal((VOCAB, D)), jnp.float32)

    def found(split: Mesh) -> Any:
        value = lambda table: jnp.sum(jnp.sin(lookup(context(split), table, tokens)))
        return tiny.jit(jax.value_and_grad(value))(table)

    same(found(tiny.mesh(**ways)), found(tiny.mesh()))
    one = lambda split: lookup(context(split), table, tokens[:, 0])
    same(one(tiny.mesh(**ways)), one(tiny.mesh()))


@pytest.mark.parametrize("ways", MESHES, ids=str)
def test_the_loss(ways: dict[str, int]) -> None:
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((VOCAB, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB - 84, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.random((B, T)), jnp.float32)

    def found(split: Mesh) -> Any:
        rules = {**context(split).rules, "D": context(split).weights.get("D", ())}
        config = dataclasses.replace(tiny.config().loss, chunk_size=7, z_loss=1e-2)
        options = LossOptions.create(config, VOCAB - 84, jnp.float32, rules)
        value = lambda h, w: loss.objective(h, w, targets, weights, split, options)
        scored = lambda h, w: loss.score(h, w, targets, split, options)
        gradient = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
        return tiny.jit(lambda h, w: (gradient(h, w), scored(h, w)))(hidden, head)

    same(found(tiny.mesh(**ways)), found(tiny.mesh()))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_scores_and_samples_are_those_of_one_device(layout: str) -> None:
    """Rows and prompts have other lengths than in training. Results are in the order of time."""
    model = {"model.pattern": "softmax,stickbreaking", "model.num_layers": 2, "mesh.data": 1}
    split = {"mesh.sequence": 2, "mesh.tensor": 2, "mesh.sequence_layout": layout}
    one, four = tiny.create(model), tiny.create(model | split, 4)
    rng = np.random.default_rng(0)
    rows = [scoring.row(rng.integers(0, 60, n)) for n in (3, 19, 24, 30)]
    prompts = [rng.integers(0, 60, n).tolist() for n in (1, 5, 7)]
    options = generate.GenerateOptions(
        max_new_tokens=4, temperature=0.0, top_k=0, top_p=1.0, seed=0
    )
    vocabulary = generate.Vocabulary(tiny.VOCAB, tiny.VOCAB - 1)
    found = []
    for built in (one, four):
        params = tiny.params(built)
        new = generate.generate(
            built.model, params, prompts, options=options, vocabulary=vocabulary
        )
        found.append(([x.nll for x in scoring.Scorer(built, params)(rows)], new))
    same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_batch_is_laid_out_over_rows_and_time() -> None:
    split = tiny.mesh(data=2, sequence=2)
    x = jax.device_put(np.zeros((B, T)), sharding.batch(split))
    assert {shard.data.shape for shard in x.addressable_shards} == {(B // 2, T // 2)}


@pytest.mark.parametrize("ways", [{"sequence": 4}, {"data": 2, "sequence": 2}], ids=str)
def test_a_matmul_moves_no_tokens(ways: dict[str, int]) -> None:
    """Each device multiplies its own tokens of several rows, though no axis splits the weights.
    Only the gradient of the weights is summed; nothing else is sent.
    """
    split = tiny.mesh(**ways)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((D, VOCAB)), jnp.float32)

    def found(split: Mesh) -> Any:
        tokens = NamedSharding(split, sharding.batch(split).spec)
        value = lambda x, w: jnp.sum(jnp.sin(context(split).matmul(x, (w, "D F", 1))[0]))
        whole = sharding.replicated(split)
        gradient = jax.value_and_grad(value, argnums=(0, 1))
        places = {"in_shardings": (tokens, whole), "out_shardings": (whole, (tokens, whole))}
        return jax.jit(gradient, **places).lower(x, w).compile()

    text = found(split).as_text()
    assert "all-reduce" in text
    assert not re.search("all-gather|all-to-all|collective-permute", text)
    run = lambda split: found(split)(*jax.device_put((x, w), found(split).input_shardings[0]))
    same(run(split), run(tiny.mesh()))
