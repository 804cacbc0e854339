"""How float32 matrices are multiplied: a choice of every stage, made for a device and undone afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from exo_fast.training.errors import InputError

PRECISION_HELP = (
    "How float32 matrices are multiplied: ieee, or with rounded operands and float32 sums: tf32 on CUDA, bf16 on CPU "
    "(about twice as fast there); fast takes the one of these two that the device has."
)


def resolve(precision: str, *, on_cpu: bool) -> str:
    """ "ieee", or what "fast" means on the device. Raises InputError for what the device does not have."""
    rounded = "bf16" if on_cpu else "tf32"
    if precision == "fast":
        return rounded
    if precision not in ("ieee", rounded):
        raise InputError(
            f"matmul_precision={precision!r}: ieee or bf16 is needed on CPU, ieee or tf32 on CUDA; this run is on "
            f"{'CPU' if on_cpu else 'CUDA'} (fast fits both)."
        )
    return precision


@contextmanager
def matmul_precision(precision: str, device_type: str = "cpu") -> Iterator[None]:
    """Products of float32 matrices in `precision` (ieee, tf32 or bf16) within the block."""
    if precision == "ieee":  # torch's default, and setting it would forbid older switches
        yield
        return
    backend = torch.backends.mkldnn.matmul if device_type == "cpu" else torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before
