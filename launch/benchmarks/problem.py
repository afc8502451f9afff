"""The training problem that the cases share: sizes, configuration, a batch and a compiled step.

8.4 M parameters: 6 layers of width 256, SwiGLU of width 1,024, and a tied embedding of 8,192 ids:
6 (4 256^2 + 3 256 1,024) + 8,192 256 = 8,388,608 parameters, and 3,328 norm scales.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kernels.contract import Case
from lm.build import Build, build
from lm.config import Config, from_mapping
from lm.data.batch import Batch
from lm.evaluation import generate

MIXERS = ("stickbreaking", "softmax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the model and its batch; `depths`: numbers of layers whose compile times are
    compared; `squares`: sides of the square matrices that matmul_fraction multiplies.
    """

    num_layers: int = 6
    width: int = 256
    num_heads: int = 4
    ffn_dim: int = 1024
    vocab_size: int = 8192
    batch_size: int = 4
    context_length: int = 512
    depths: tuple[int, int] = (2, 24)
    squares: tuple[int, ...] = (1024, 2048)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """`base` is a whole configuration, in which `config` sets the sizes. `cases` are problems of
    single ops; None means those that the ops tag as bench. `compiler_options` are passed to XLA.
    `workdir` is a trained run, for the cases that read one. `peer_python` is the Python that runs
    peers; "" means this one.
    """

    base: Mapping[str, Any]
    pairs: int
    precision: str
    sizes: Sizes = Sizes()
    cases: tuple[Case, ...] | None = None
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    workdir: str = ""
    peer_python: str = ""


def config(options: Options, mixer: str, num_layers: int | None = None) -> Config:
    """A run at its base width, so that muP's multipliers are 1 and only Granite's constants remain,
    with a constant learning rate.
    """
    sizes, values = options.sizes, copy.deepcopy(dict(options.base))
    values["model"] |= {
        "width": sizes.width,
        "num_layers": num_layers or sizes.num_layers,
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_heads,
        "head_dim": sizes.width // sizes.num_heads,
        "ffn_dim": sizes.ffn_dim,
        "layers": {},
        "pattern": mixer,
        "tied_embeddings": True,
        "precision": options.precision,
    }
    values["mup"]["base_width"] = sizes.width
    values["data"]["tokenizer"]["vocab_size"] = sizes.vocab_size
    values["data"] |= {"context_length": sizes.context_length, "batch_size": sizes.batch_size}
    values["schedule"] = {"family": "wsd", "warmup": "0 steps", "decay": "0 steps"}
    values["mesh"]["data"] = 1
    return from_mapping(values)


def built(options: Options, mixer: str, num_layers: int | None = None) -> Build:
    """The build for the first device alone."""
    return build(config(options, mixer, num_layers), jax.devices()[:1])


def batch(sizes: Sizes) -> Batch:
    """Random tokens; every row is one document, so that all causal pairs count."""
    shape = (sizes.batch_size, sizes.context_length)
    tokens = np.random.default_rng(0).integers(0, sizes.vocab_size, (shape[0], shape[1] + 1))
    tokens = tokens.astype(np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        source_ids=np.zeros(shape, np.int32),
        loss_weights=np.ones(shape, np.float32),
    )


def token_bytes(sizes: Sizes) -> np.ndarray:
    return np.full(sizes.vocab_size, 4, np.int32)


def compiled_generation(options: Options, built: Build, rows: int) -> Any:
    """The compiled program that adds a context of new tokens to `rows` prompts of 16 tokens."""
    sizes = options.sizes
    traced = generate.trace(
        built.model,
        built.abstract_state.params,
        generate.Vocabulary(sizes.vocab_size, 0),
        rows=rows,
        prompt_len=16,
        max_new_tokens=sizes.context_length,
    )
    return traced.lower().compile(dict(options.compiler_options))


def compiled_step(options: Options, built: Build) -> Any:
    """The train step, compiled ahead of time."""
    return built.lowered().compile(dict(options.compiler_options))
