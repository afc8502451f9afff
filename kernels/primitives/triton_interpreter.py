"""Triton's interpreter on arrays of numpy: without a GPU, without torch, and right in bfloat16.

The interpreter reads the addresses of tensors; arrays are dressed as such. Of bfloat16 it knows
only the bits: it would round by cutting them off, and multiply them as integers. Casts and products
are replaced here by those of a GPU (to the nearest, ties to even; products of bfloat16 summed in
float32); a kernel must do all other arithmetic in float32, as ours do. Where a kernel takes a
hardware's approximation of a function, the function itself stands for it.
"""

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import triton.language as tl
from triton.language.extra.cuda import libdevice
from triton.runtime import interpreter

_ONE_AT_A_TIME = threading.Lock()  # the interpreter patches triton.language while it runs
_DTYPES = {"float32": "fp32", "int32": "i32", "bfloat16": "bf16"}

_patch_tensor = interpreter._patch_lang_tensor  # pyright: ignore[reportPrivateUsage]
_Builder: Any = interpreter.InterpreterBuilder
_Handle: Any = interpreter.TensorHandle
_cast = _Builder.cast_impl


def run(
    kernel: Any,
    inputs: Sequence[np.ndarray],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    constants: dict[str, Any],
) -> list[np.ndarray]:
    """The outputs of one launch; what the kernel does not write is NaN, or -1."""
    arrays = [np.ascontiguousarray(x) for x in inputs]
    outputs = [np.full(x.shape, -1 if x.dtype == np.int32 else np.nan, x.dtype) for x in out_shape]
    with _ONE_AT_A_TIME, ExitStack() as stack:
        patched = {"cast_impl": _cast_to, "create_fp_to_fp": _cast_to, "create_dot": _dot}
        for name, method in patched.items():
            stack.enter_context(mock.patch.object(_Builder, name, method))
        stack.enter_context(mock.patch.object(interpreter, "_patch_lang_tensor", _patch_index))
        stack.enter_context(mock.patch.object(libdevice, "fast_log2f", lambda x: tl.log2(x)))
        kernel[grid](*(_Tensor(x) for x in [*arrays, *outputs]), **constants)
    return outputs


def _cast_to(self: Any, source: Any, target: Any, mode: Any = None) -> Any:
    del mode  # to the nearest, as it is where a kernel names no other
    before, after = source.dtype.scalar, target.scalar
    if before == tl.bfloat16 and after == tl.float32:
        return _Handle(_wide(source), after)
    if before == tl.float32 and after == tl.bfloat16:
        rounded = np.ascontiguousarray(source.data).astype(jnp.bfloat16)
        return _Handle(rounded.view(np.uint16), after)
    return _cast(self, source, target)


def _dot(self: Any, a: Any, b: Any, total: Any, precision: Any, most: Any) -> Any:
    del self, precision, most  # float32 products are whole here, whatever a kernel allows
    product = np.matmul(_wide(a), _wide(b), dtype=np.float32)
    return _Handle(product + total.data, total.dtype.scalar)


def _wide(x: Any) -> np.ndarray:
    if x.dtype.scalar != tl.bfloat16:
        return x.data
    return (x.data.astype(np.uint32) << 16).view(np.float32)


def _patch_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    # numpy 2.5 makes no index of an array [1], which is what a scalar is there (triton 3.6).
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


class _Tensor:
    """As much of a tensor as the interpreter asks for, around a numpy array."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.dtype = _DTYPES[str(array.dtype)]

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
