"""The time of a product by NVIDIA's own model: the package `nvidia-matmul-heuristics`, which needs no GPU.

For a card and a family of kernels the package names the fastest kernel and its time: the larger of its loads and its
arithmetic, then its stores. It counts at the boost clock, which a card under load does not keep, so its rates can lie
above the data sheet's. A kernel's stages and an epilogue other than a store are unknown to it. GENERIC is any kernel
that the card can run: our stand-in for the vendor's library. TRITON is the package's idea of Triton; on Hopper and
Blackwell that has the instructions of Ampere (mma.sync), not the ones that Triton compiles to.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

PACKAGE = "nvidia-matmul-heuristics"
PRECISION = "TSS"  # bf16 operands, float32 sums and results
LAYOUTS = {"logits": "NT_ROW_MAJOR", "dH": "NN_ROW_MAJOR", "dW": "TN_ROW_MAJOR"}  # H Wᵀ, U W, Uᵀ H


@dataclass(frozen=True)
class Product:
    """The kernel that the package names, and its time."""

    seconds: float
    tile: tuple[int, int, int]  # rows, columns, depth
    stages: int
    splits: int  # of the reduction


def source() -> str:
    """Return the package and its version."""
    return f"{PACKAGE} {version(PACKAGE)}"


@functools.cache
def product(gpu: str, layout: str, m: int, n: int, depth: int, family: str = "GENERIC") -> Product:
    """Return the fastest kernel for (m, depth) · (depth, n) on a card, by its name in the package (H100_SXM)."""
    interface = _interface(gpu, family)
    order = _package().NvMatmulHeuristicsMatmulLayout[LAYOUTS[layout]]
    problem = interface.makeNvMatmulHeuristicsProblem(m, n, depth, order)
    (best,) = interface.get(problem, 1, precision=PRECISION)
    kernel = best["kernel"]
    tile = (kernel.cta_tile_m, kernel.cta_tile_n, kernel.cta_tile_k)
    return Product(best["runtime"], tile, kernel.stages, kernel.split_k)


def _package() -> Any:
    try:
        from nvMatmulHeuristics import nvMatmulHeuristics
    except ImportError as error:
        raise ImportError(f"predictions need NVIDIA's model of products: pip install {PACKAGE}") from error
    return nvMatmulHeuristics


@functools.cache
def _interface(gpu: str, family: str) -> Any:
    package = _package()
    return package.NvMatmulHeuristicsInterfaceEx(
        backend=package.NvMatmulHeuristicsTarget[family],
        flags=package.NvMatmulHeuristicsFlags.PERF_MODEL_BASED_AUTO_TUNING,
        gpu=package.NvMatmulHeuristicsNvidiaGpu[gpu],
    )
