"""Patches of Triton's interpreter, so that it computes in bf16 what a GPU computes.

As of Triton 3.9 it holds bf16 as raw bits, multiplies these bits as integers in `tl.dot`, and cuts float32 off where
GPUs round to nearest even. With TRITON_INTERPRET=1 the backend patches both, so kernels can be debugged and tested in
every dtype on a machine without a GPU. Compiled kernels never come here.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _narrow(x: np.ndarray) -> np.ndarray:
    """Round float32 to the bits of the nearest bf16, ties to even; nan stays nan."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _widen(bits: np.ndarray) -> np.ndarray:
    """Widen the bits of bf16 to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def repair() -> None:
    """Install the patches; a second call changes nothing."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    if getattr(convert, "repaired", False):
        return

    def convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return _narrow(data)
        if source == tl.bfloat16 and target == tl.float32:
            return _widen(data)
        return convert(data, source, target, mode)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(_widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    convert_float.repaired = True  # type: ignore[attr-defined]  # the mark that `repair` looks for
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
