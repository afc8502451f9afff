"""Tiny models and random batches that the tests of lm share."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.base import get_config
from kernels import segments
from lm.build import Build, build
from lm.config import Config, from_mapping
from lm.data.batch import Batch
from lm.parallel import mesh as mesh_lib
from lm.params import ParamInfo, is_info
from lm.state import TrainState

VOCAB = 300


def config(changes: dict[str, Any] | None = None) -> Config:
    """A configuration of width 32 with one layer. `changes` maps dotted keys to values."""
    values: Any = get_config()
    sizes = {"width": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    values.model.update(sizes | {"ffn_dim": 48})
    values.mup.base_width = 32
    values.data.tokenizer.update({"kind": "bytes", "vocab_size": VOCAB})
    values.data.update({"context_length": 24, "batch_size": 4})
    values.schedule.warmup = "0 steps"
    values.run.length = "20 steps"
    values.loss.chunk_size = 40  # divides neither the tokens of a batch nor those of a shard
    mapping = values.to_dict()
    for key, value in (changes or {}).items():
        *groups, leaf = key.split(".")
        node = mapping
        for group in groups:
            node = node[group]
        assert leaf in node, key
        node[leaf] = value
    return from_mapping(mapping)


def create(changes: dict[str, Any] | None = None, num_devices: int = 1) -> Build:
    return build(config(changes), jax.devices()[:num_devices])


def mesh(**ways: int) -> Mesh:
    """A mesh of just as many devices as these axes need."""
    sizes = {f"mesh.{axis}": ways.get(axis, 1) for axis in mesh_lib.AXES}
    return mesh_lib.create(config(sizes).mesh, jax.devices()[: math.prod(sizes.values())])


def batch(seed: int = 0, rows: int = 4, time: int = 24) -> Batch:
    """Packed rows of documents of unequal lengths.

    Row i ends with i places of padding. Token weights differ from each other, and some are 0.
    """
    rng = np.random.default_rng(seed)
    segment_ids = 1 + np.cumsum(rng.random((rows, time)) < 0.15, axis=1)
    segment_ids[np.arange(time) >= time - np.arange(rows)[:, None]] = 0
    tokens = rng.integers(0, VOCAB, (rows, time + 1))
    positions = np.asarray(segments.positions(jnp.asarray(segment_ids, jnp.int32)))
    weights = np.where(rng.random((rows, time)) < 0.2, 0.0, rng.random((rows, time)))
    inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
    weights = np.where(segment_ids > 0, weights, 0.0).astype(np.float32)
    segment_ids = segment_ids.astype(np.int32)
    source_ids = np.zeros((rows, time), np.int32)
    return Batch(inputs, targets, segment_ids, positions, source_ids, weights)


def params(built: Build, seed: int = 0) -> Any:
    """Random parameters of the right shapes and about the right size, without compiling `init`."""
    rng = np.random.default_rng(seed)

    def leaf(info: ParamInfo) -> np.ndarray:
        noise = rng.standard_normal(info.shape, np.float32)
        return 1 + 0.1 * noise if info.role == "vector" else 0.15 * noise

    return jax.tree.map(leaf, built.infos, is_leaf=is_info)


def state(built: Build, seed: int = 0) -> TrainState:
    """A train state before the first step, placed on the mesh, with the parameters of `params`."""
    abstract = built.abstract_state
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    placed = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.device_put(zeros._replace(params=params(built, seed)), placed)


def jit(function: Callable[..., Any]) -> Any:
    """`jax.jit` with few optimisations, so that it compiles fast."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def compiled(jitted: Any, *args: Any) -> Any:
    """A jitted function compiled for the shapes of `args`, with few optimisations."""
    return jitted.lower(*args).compile(compiler_options={"xla_backend_optimization_level": 0})
