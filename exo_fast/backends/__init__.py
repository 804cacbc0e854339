"""The choice of an implementation: `reference` (full logits), `torch` (chunked) or `triton` (fused kernels).

Here `torch` and `triton` name the submodules of this package, not the libraries.
"""

import importlib
import importlib.util
import os
import warnings
from types import ModuleType

from torch import Tensor, compiler, device, float64

BACKENDS = ("auto", "reference", "torch", "triton")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
INSTALL_TRITON = "pip install triton"


def choose(backend: str, hidden: Tensor) -> str:
    """Return the backend a call runs on: reference, torch or triton. `auto` is triton on a GPU, torch elsewhere.

    The kernels compute in float32, so float64 is for `torch` and `reference`. On the CPU the kernels run in Triton's
    interpreter, for debugging, and only if asked for by name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    on_gpu = hidden.device.type == "cuda"  # ROCm too
    if backend == "auto":
        if not on_gpu or hidden.dtype == float64:
            return "torch"
        if TRITON_INSTALLED:
            return "triton"
        if not compiler.is_compiling():
            warnings.warn(f"Triton is not installed: backend='auto' runs 'torch'. {INSTALL_TRITON}", stacklevel=3)
        return "torch"
    if backend == "triton":
        if not TRITON_INSTALLED:
            raise ValueError(f"backend='triton' needs Triton, which is not installed: {INSTALL_TRITON}")
        if hidden.dtype == float64:
            raise ValueError("backend='triton' has no float64: use backend='torch' or 'reference', or another dtype")
        if not on_gpu and not interpreted():
            raise ValueError(
                f"backend='triton' needs a GPU and hidden is on {hidden.device}: move it there, use backend='torch', "
                "or set TRITON_INTERPRET=1 before Python starts to debug the kernels on the CPU"
            )
    return backend


def implementation(backend: str) -> ModuleType:
    """Return the module of a backend that `choose` has chosen; it is imported on first use."""
    return importlib.import_module(f"{__name__}.{backend}")


def interpreted() -> bool:
    """Return whether Triton runs kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def scratch_budget(memory_budget: int | None, on: device) -> int:
    """Return the bytes of vocabulary-sized scratch: `memory_budget`, or 640 MiB on the CPU and 1 GiB on a GPU (the
    `triton` backend takes a share of the card instead)."""
    if memory_budget is not None:
        return memory_budget
    return (640 if on.type == "cpu" else 1024) * 2**20
