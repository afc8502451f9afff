"""Triton's interpreter on numpy arrays: without a GPU, without torch, and correct in bfloat16.

The interpreter reads the addresses of tensors; `_Tensor` wraps an array so that it looks like one.
The interpreter holds bfloat16 as raw bits: it truncates where it should round, and multiplies the
bits as integers. Casts and products are replaced here by those of a GPU (rounding to nearest, ties
to even; products of bfloat16 summed in float32). A kernel must do all other arithmetic in float32,
as ours do. Where a kernel uses a hardware approximation of a function, the exact function replaces
it.
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
    """The outputs of one launch; what the kernel does not write is NaN, or -1 for integers."""
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
    del mode  # rounding to nearest, which is what kernels use unless they name another
    before, after = source.dtype.scalar, target.scalar
    if before == tl.bfloat16 and after == tl.float32:
        return _Handle(_wide(source), after)
    if before == tl.float32 and after == tl.bfloat16:
        rounded = np.ascontiguousarray(source.data).astype(jnp.bfloat16)
        return _Handle(rounded.view(np.uint16), after)
    return _cast(self, source, target)


def _dot(self: Any, a: Any, b: Any, total: Any, precision: Any, most: Any) -> Any:
    del self, precision, most  # float32 products are exact here, whatever the kernel allows
    product = np.matmul(_wide(a), _wide(b), dtype=np.float32)
    return _Handle(product + total.data, total.dtype.scalar)


def _wide(x: Any) -> np.ndarray:
    if x.dtype.scalar != tl.bfloat16:
        return x.data
    return (x.data.astype(np.uint32) << 16).view(np.float32)


def _patch_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    # numpy 2.5 refuses an array [1] as an index, and that is what a scalar is here (triton 3.6).
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


class _Tensor:
    """The part of a tensor's interface that the interpreter uses, around a numpy array."""

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
        del view  # always the whole array, which is already on the CPU

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self._array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self._array.itemsize for step in self._array.strides)

    def copy_(self, other: "_Tensor") -> None:
        del other  # the kernel has written to this memory itself
