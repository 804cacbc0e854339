"""Products with float32 results from operands of any dtype, by the vendor's library.

torch.mm takes `out_dtype` for half-precision operands on CUDA (and addmm an accumulator of that dtype in newer
versions of torch), which is the fast way. If a build has neither, and on the CPU, columns of the operands are
widened in blocks: the same numbers, more slowly.
"""

import functools

import torch
from torch import Tensor

BLOCK = 8192  # columns widened at a time


def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Compute out = a b; a (n, k) and b (k, m) of one dtype, out (n, m) float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if _mixed(a.device, a.dtype, "mm"):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    out.zero_()
    for start in range(0, a.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        out.addmm_(a[:, part].float(), b[part].float())
    return out


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a b to `total`, in place; a (n, k) and b (k, m) of one dtype, total (n, m) float32."""
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    if _mixed(a.device, a.dtype, "addmm"):
        return torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    for start in range(0, len(a), BLOCK):
        part = slice(start, start + BLOCK)
        if _mixed(a.device, a.dtype, "mm"):
            total[part] += torch.mm(a[part], b, out_dtype=torch.float32)
        else:
            total[part].addmm_(a[part].float(), b.float())
    return total


@functools.cache
def _mixed(device: torch.device, dtype: torch.dtype, operation: str) -> bool:
    """Return whether this build of torch multiplies `dtype` into float32 on `device`; one 8 × 8 product tells."""
    if device.type != "cuda":
        return False
    a, out = torch.zeros(8, 8, dtype=dtype, device=device), torch.zeros(8, 8, device=device)
    try:
        if operation == "mm":
            torch.mm(a, a, out_dtype=torch.float32, out=out)
        else:
            torch.ops.aten.addmm.dtype_out(out, a, a, torch.float32, out=out)
    except RuntimeError:
        return False
    return True
