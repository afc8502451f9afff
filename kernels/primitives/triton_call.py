"""One call of a Triton kernel from JAX: on a GPU through jax-triton, else by Triton's interpreter.

A kernel takes pointers to the inputs, then to the outputs, then its constants by name:

    call(kernel, q, k, out_shape=[...], grid=(B * H, tiles), num_warps=4, num_stages=2, T=64)

Arrays are contiguous and start where their pointer points. The interpreter needs neither a GPU nor
torch: it reads the addresses of numpy arrays that are dressed as tensors. It is right for float32
inputs; bfloat16 it takes for 16-bit integers, so those are refused.
"""

import threading
from collections.abc import Sequence
from typing import Any, cast
from unittest import mock

import jax
import numpy as np

_ONE_AT_A_TIME = threading.Lock()  # the interpreter patches triton.language while it runs

H100 = 90  # compute capability of the only GPU that is compiled for without being attached


def call(
    kernel: Any,
    *inputs: jax.Array,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> list[jax.Array]:
    """The outputs of one launch; what a kernel does not write holds whatever was in memory (NaN
    under the interpreter).
    """
    if type(kernel).__name__ == "InterpretedFunction":  # the process has TRITON_INTERPRET=1

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            return _interpret(kernel, arrays, out_shape, grid, constants)

        return jax.pure_callback(run, list(out_shape), *inputs)
    import jax_triton  # needs JAX's GPU plugin, so only where one is

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


class _Tensor:
    """As much of a tensor as the interpreter asks for, around a numpy array."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.dtype = {"float32": "fp32", "int32": "i32"}[str(array.dtype)]

    def data_ptr(self) -> int:
        return self._array.ctypes.data

    def untyped_storage(self) -> "_Tensor":
        return self

    def cpu(self) -> "_Tensor":
        return self

    def new_empty(self, *shape: Any, **how: Any) -> "_Tensor":
        del shape, how
        return self

    def set_(self, *view: Any) -> None:
        del view  # always the whole array, which is on the CPU already

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self._array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self._array.itemsize for step in self._array.strides)

    def copy_(self, other: "_Tensor") -> None:
        del other  # the kernel has written to this memory itself


def _interpret(
    kernel: Any,
    inputs: Sequence[np.ndarray],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    constants: dict[str, Any],
) -> list[np.ndarray]:
    arrays = [np.ascontiguousarray(x) for x in inputs]
    outputs = [
        np.full(x.shape, np.nan if x.dtype == np.float32 else -1, x.dtype) for x in out_shape
    ]
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor  # pyright: ignore[reportPrivateUsage]

    def patch_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # numpy 2.5 makes no index of an array [1], which is what a scalar is there (triton 3.6).
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with _ONE_AT_A_TIME, mock.patch.object(interpreter, "_patch_lang_tensor", patch_index):
        kernel[grid](*(_Tensor(x) for x in [*arrays, *outputs]), **constants)
    return outputs
