"""Products with float32 results from operands of any dtype: by the vendor's library, or by a kernel if it lacks them.

torch.mm takes `out_dtype` for half-precision operands on a GPU, and addmm an accumulator of that dtype. Not every build
has both: some refuse (addmm of torch 2.9 takes no float32 sums), and one returned numbers of another dtype. So both are
asked by numbers, once for a device and a dtype, with a product that half precision cannot hold. Where an answer is
wrong, the kernel `kernels/product.py` multiplies: the same numbers, and no scratch.
"""

from typing import Any

import torch
from torch import Tensor

NONE: frozenset[str] = frozenset()
_answers: dict[tuple[torch.device, torch.dtype], frozenset[str]] = {}  # the library's products that are right


def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Compute out = a b; a (n, k) and b (k, m) of one dtype, out (n, m) float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # Triton's interpreter, for debugging
        return torch.mm(a.float(), b.float(), out=out)
    if "mm" in library_products(a.device, a.dtype):
        return _mm(a, b, out)
    return multiply(a, b, out, add=False)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a b to `total`, in place; a (n, k) and b (k, m) of one dtype, total (n, m) float32."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        return total.addmm_(a.float(), b.float())
    if "addmm" in library_products(a.device, a.dtype):
        return _addmm(total, a, b)
    return multiply(a, b, total, add=True)


def library_products(device: torch.device, dtype: torch.dtype) -> frozenset[str]:
    """Return which of "mm" and "addmm" of this build give float32 results of `dtype` on `device`, where a GPU is.

    The answer needs the host to wait, so nothing is asked while a CUDA graph is captured: the kernel is right anyway.
    """
    if device.type == "cpu":
        return NONE
    key = (device, dtype)
    if key not in _answers:
        if torch.cuda.is_current_stream_capturing():
            return NONE
        _answers[key] = _ask(device, dtype)
    return _answers[key]


def _ask(device: torch.device, dtype: torch.dtype) -> frozenset[str]:
    """Multiply small matrices whose product needs more digits than half precision has, and look at the numbers."""
    size, small = 16, 2.0**-6
    host: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults of the process
    whole = torch.arange(1, size + 1, **host)
    left, right = (torch.full((size, size), small, **host) for _ in range(2))
    left[:, 0], right[0] = whole, whole
    exact = torch.outer(whole, whole) + (size - 1) * small**2
    a, b = left.to(device, dtype), right.to(device, dtype)
    found = []
    for name, want in (("mm", exact), ("addmm", exact + 0.5)):
        out = torch.full((size, size), 0.5, dtype=torch.float32, device=device)
        try:
            got = _mm(a, b, out) if name == "mm" else _addmm(out, a, b)
        except (RuntimeError, TypeError, AttributeError):  # refused, or not in this version of torch
            continue
        if got.dtype == out.dtype == torch.float32 and torch.equal(out.cpu(), want) and torch.equal(got.cpu(), want):
            found.append(name)
    return frozenset(found)


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _addmm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> Tensor:
    """Compute out = a b, or out += a b, by the kernel; a (n, k) and b (k, m) bf16 or float16, out (n, m) float32."""
    # Imported here, because the torch backend, which asks this module too, must work without Triton.
    from exo_fast.kernels import product as kernel
    from exo_fast.kernels.launch import launch
    from exo_fast.kernels.targets import of_device

    (n, k), m = a.shape, b.shape[1]
    a, stride_a, strided_a, room_a = _lines(a)
    b, stride_b, strided_b, room_b = _lines(b.T)
    stride_out = out.stride(0) if n > 1 else 16
    aligned = room_a and room_b and out.data_ptr() % 16 == 0 and stride_out % 16 == 0
    config = kernel.config(of_device(out.device), aligned)
    launch(
        kernel.product, kernel.grid(n, m, config), config,
        a=a, b=b, out=out, n=n, m=m, k=k, stride_a=stride_a, stride_b=stride_b, stride_out=stride_out,
        GROUP=kernel.GROUP, STRIDED_A=strided_a, STRIDED_B=strided_b, ADD=add, ALIGNED=aligned,
    )  # fmt: skip
    return out


def _lines(matrix: Tensor) -> tuple[Tensor, int, bool, bool]:
    """Return a matrix (lines, k) whose rows or columns are contiguous, the stride of the other dimension (16 if it has
    one entry, so that any will do), whether the columns are the contiguous ones, and whether all of it is aligned, with
    room to read whole 16 lines (`product`)."""
    number, depth = matrix.shape
    along, across = matrix.stride(1) == 1 or depth == 1, matrix.stride(0) == 1 or number == 1
    if not along and not across:
        matrix, along = matrix.contiguous(), True
    strided = not along or (depth == 1 and across and number > 1)
    others = depth if strided else number
    stride = matrix.stride(int(strided)) if others > 1 else 16
    aligned = matrix.data_ptr() % 16 == 0 and stride % 16 == 0
    if strided and aligned:
        last = matrix.storage_offset() + (depth - 1) * stride + -(-number // 16) * 16
        aligned = last * matrix.itemsize <= matrix.untyped_storage().nbytes()
    return matrix, stride, strided, aligned
