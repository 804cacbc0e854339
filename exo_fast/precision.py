"""The precision of float32 products: a setting of the whole process, changed for a block and restored.

Values are torch's: "ieee", "tf32" (CUDA) and "bf16" (CPU); the rounded ones round the operands and sum in float32.

torch has two interfaces: `set_float32_matmul_precision`, which every version has, and since 2.9 `fp32_precision` of
each library. After a value was set by the second alone, the first one's getters raise, and torch.compile,
FlexAttention and other people's code call them. So a block is set by the first one, which sets the values of the second
too, and these are put back one by one.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0  # calls of bf16_products in progress, in all threads: the setting belongs to the process
_users_setting = ""


@contextmanager
def matmul_precision(precision: str, device_type: str = "cpu") -> Iterator[None]:
    """Multiply float32 matrices in `precision` within the block; "ieee" leaves the setting as it is."""
    if precision == "ieee":  # torch's default; setting it would forbid older switches
        yield
        return
    with _set(precision, device_type):
        yield


@contextmanager
def true_float32() -> Iterator[None]:
    """Multiply float32 matrices in float32 within the block, for comparisons that bf16 or TF32 would blur."""
    with _set("ieee", "cuda"):
        yield


@contextmanager
def bf16_products(operands: torch.dtype) -> Iterator[None]:
    """Multiply float32 views of bf16 operands in bf16 on the CPU, which loses nothing: oneDNN sums in float32.

    No change for other dtypes of `operands`. Blocks may overlap in several threads.
    """
    global _inside, _users_setting
    if operands != torch.bfloat16:
        yield
        return
    setting = _setting("cpu")
    with _lock:
        if _inside == 0:
            _users_setting = setting.fp32_precision
            setting.fp32_precision = "bf16"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                setting.fp32_precision = _users_setting


def fp32_precision() -> str:
    """Return the user's setting for float32 operands on this CPU: "bf16", or "ieee" and others."""
    with _lock:
        return _users_setting if _inside else _setting("cpu").fp32_precision


_WORDS = {("ieee", "cpu"): "highest", ("ieee", "cuda"): "highest", ("tf32", "cuda"): "high", ("bf16", "cpu"): "medium"}


@contextmanager
def _set(precision: str, device_type: str) -> Iterator[None]:
    settings = [_setting(kind) for kind in ("cpu", "cuda")]
    before = [setting.fp32_precision for setting in settings]
    try:
        word = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user has set `fp32_precision` alone
        word = None
    torch.set_float32_matmul_precision(_WORDS[precision, device_type])
    try:
        yield
    finally:
        if word is not None:
            torch.set_float32_matmul_precision(word)
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def _setting(device_type: str) -> Any:
    """Return the object with torch's `fp32_precision` for products on a device."""
    # torch replaces these modules by objects, which type checkers do not see
    return torch.backends.mkldnn.matmul if device_type == "cpu" else torch.backends.cuda.matmul  # type: ignore[attr-defined]
