"""Calls a Triton kernel from JAX: on a GPU through jax-triton, else with Triton's interpreter.

A kernel takes pointers to the inputs, then to the outputs, then its constants by name:

    call(kernel, q, k, out_shape=[...], grid=(B * H, tiles), num_warps=4, num_stages=2, T=64)

Arrays are contiguous and start where their pointer points.
"""

from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np

H100 = 90  # its compute capability; no other GPU is compiled for without being attached


def call(
    kernel: Any,
    *inputs: jax.Array,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> list[jax.Array]:
    """The outputs of one launch. Memory that the kernel does not write is uninitialized (NaN under
    the interpreter).
    """
    if type(kernel).__name__ == "InterpretedFunction":  # the process has TRITON_INTERPRET=1
        from kernels.primitives import triton_interpreter  # needs triton

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            return triton_interpreter.run(kernel, arrays, out_shape, grid, constants)

        return jax.pure_callback(run, list(out_shape), *inputs)
    import jax_triton  # needs JAX's GPU plugin, so it is imported only here

    attached = jax.default_backend() == "gpu"
    return jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        out_shape=list(out_shape),
        grid=cast(Any, grid),
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=None if attached else H100,
        **constants,
    )
