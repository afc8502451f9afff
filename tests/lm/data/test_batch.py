from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import TokenizerConfig
from lm.data import tokenizers
from lm.data.batch import Batch, byte_weights, stack


def row(targets: list[int], weights: list[float]) -> Batch:
    zeros = np.zeros(len(targets), np.int32)
    return Batch(
        zeros, np.array(targets, np.int32), zeros, zeros, zeros, np.array(weights, np.float32)
    )


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_eight() -> None:
    """Neither sum counts end of text or padding: the result is 8.0 and not 8.0 * 6 / 5."""
    tokenizer = tokenizers.create(
        TokenizerConfig(
            kind="bytes", path="", vocab_size=257, pattern="gpt2", end_of_text="", bos=""
        )
    )
    batch = stack([row([*b"hello", 256, 0, 0], [1.0] * 6 + [0.0, 0.0])])
    for arrays, token_bytes in (
        (batch, tokenizer.token_bytes),
        (Batch(*map(jnp.asarray, batch)), jnp.asarray(tokenizer.token_bytes)),
    ):
        weights, num_bytes = byte_weights(arrays, token_bytes)
        assert num_bytes.sum() == 5
        nll = np.full((1, 8), math.log(256))
        bits = float((nll * weights).sum()) / math.log(2) / float(num_bytes.sum())
        assert bits == pytest.approx(8.0)


def test_stack_joins_rows() -> None:
    batch = stack([row([1, 2], [1, 1]), row([3, 4], [1, 0])])
    assert batch.targets.tolist() == [[1, 2], [3, 4]]
    assert batch.loss_weights.dtype == np.float32
    assert all(field.shape == (2, 2) for field in batch)
