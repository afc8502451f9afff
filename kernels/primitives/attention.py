"""What ops on a cache of keys and values have in common: inputs, costs, and test problems.

A pair of query and key costs one product of width K and one of width V:

    FLOPs = 2 B H pairs (K + V)        bytes moved = those of q, k, v and the output
"""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from kernels.contract import Case, Dims, Drawn, Extreme, InputSpec, Options, thinned
from kernels.letters import Inputs

QKV = (InputSpec("q", "B T H K"), InputSpec("k", "B T G K"), InputSpec("v", "B T G V"))

BENCH = (
    Case({"B": 1, "T": 2048, "H": 8, "G": 8, "K": 64, "V": 64}, tag="bench"),
    Case({"B": 4, "T": 512, "H": 4, "G": 4, "K": 64, "V": 64}, tag="bench"),
)


def count_flops(dims: Dims, pairs: int) -> float:
    """FLOPs of the forward pass; `pairs` is the number of visible pairs in one sequence."""
    return 2.0 * dims["B"] * dims["H"] * pairs * (dims["K"] + dims["V"])


def count_bytes(dims: Dims, options: Options, itemsize: int) -> float:
    """Bytes of the inputs and of the output."""
    del options
    queries = dims["H"] * (dims["K"] + dims["V"])
    keys = dims["G"] * (dims["K"] + dims["V"])
    return float(dims["B"] * dims["T"] * (queries + keys) * itemsize)


def dims(time: int, groups: int, key: int, value: int) -> dict[str, int]:
    """Dims of a small problem: two rows, four heads."""
    return {"B": 2, "T": time, "H": 4, "G": groups, "K": key, "V": value}


def every_case(settings: Sequence[Options]) -> tuple[Case, ...]:
    """The slow cases: these options with all lengths, groups, documents and states, thinned."""
    return tuple(
        Case(dims(time, groups, 17, 9 if groups == 1 else 17), options, documents, carried)
        for time, groups, options, documents, carried in thinned(
            (1, 63, 64, 65, 257), (4, 2, 1), settings, ("none", "padded"), (False, True)
        )
    )


def near(side: Literal["q", "k"], *logits: float) -> Extreme:
    """All logits within a few of these values at scale K^-1/2; queries or keys alternate."""

    def change(drawn: Drawn) -> Drawn:
        found = {name: 0.5 * drawn[name] for name in ("q", "k")}
        time, width = found[side].shape[1], found[side].shape[-1]
        for name, x in found.items():
            x[..., 0] = np.resize(logits, time)[:, None] * width**0.5 if name == side else 1.0
        return found

    return Extreme(f"near{'and'.join(f'{z:g}' for z in logits)}", change)


def wave(time: int, width: int = 8) -> Inputs:
    """q, k and v of one head, without randomness, for properties."""
    x = jnp.sin(jnp.arange(time * width, dtype=jnp.float32) ** 1.5).reshape(1, time, 1, width)
    return {"q": 2.0 * x, "k": x[..., ::-1], "v": x}
