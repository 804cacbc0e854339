"""A product of half-precision matrices with a float32 result, for builds whose library lacks it.

    out = a b  or  out += a b;   a (n, k), b (k, m) bf16 or float16, contiguous one way or the other;   out float32

A program owns a tile of `out` and walks k in blocks, so that sums stay in float32 registers and have one order. The
operands are read as they are: nothing is widened in memory, and no scratch is needed. `exo_fast.backends.products` says
when the backend takes this kernel and not the library.

Both operands are matrices of lines of k numbers: the rows of a, the columns of b. STRIDED_A and STRIDED_B say that the
numbers of a line lie `stride` apart and the lines beside each other, as in Uᵀ; otherwise a line is contiguous, and
lines are `stride` apart. With ALIGNED, bases and strides are multiples of 16 elements, and so many strided lines may be
read that their number is one too: whole 128-bit loads at the edge, whose results are not stored.

Flops: 2·n·m·k. Bytes: out once (twice with ADD); a m / BLOCK_M times and b n / BLOCK_N times, mostly from L2, because
GROUP row blocks walk the column blocks side by side. Grid: (row blocks · column blocks,).
"""

import triton
import triton.language as tl

from exo_fast.kernels.launch import TYPES, Config, Variant
from exo_fast.kernels.targets import Target

GROUP = 8  # row blocks that share a walk over the columns
UNALIGNED = Config({"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_K": 32}, num_warps=4, num_stages=2)


@triton.jit
def lines(
    matrix, first, number, start, depth, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Load (BLOCK, BLOCK_K): numbers [start, start + BLOCK_K) of the lines from `first`; with EDGE, 0 past `depth`."""
    line = first + tl.arange(0, BLOCK)
    place = start + tl.arange(0, BLOCK_K)
    if STRIDED:
        places = matrix + place.to(tl.int64)[None, :] * stride + line[:, None]
        readable = tl.cdiv(number, 16) * 16 if ALIGNED else number
        wanted = (line < readable)[:, None]
        if EDGE:
            wanted = wanted & (place < depth)[None, :]
        return tl.load(places, mask=wanted, other=0.0)
    else:
        line = tl.minimum(line, number - 1).to(tl.int64)
        places = matrix + line[:, None] * stride + place[None, :]
        if EDGE:
            return tl.load(places, mask=(place < depth)[None, :], other=0.0)
        return tl.load(places)


@triton.jit(do_not_specialize=["n", "m", "k"])
def product(
    a,  # (n, k)
    b,  # (k, m)
    out,  # (n, m) float32, rows `stride_out` apart
    n, m, k, stride_a, stride_b, stride_out,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    STRIDED_A: tl.constexpr, STRIDED_B: tl.constexpr, ADD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row_blocks, column_blocks = tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M)
    group = tl.program_id(0) // (GROUP * column_blocks)
    members = tl.minimum(row_blocks - group * GROUP, GROUP)
    member = tl.program_id(0) % (GROUP * column_blocks)
    first_row = (group * GROUP + member % members) * BLOCK_N
    first_column = member // members * BLOCK_M

    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    whole = k // BLOCK_K * BLOCK_K
    for start in tl.range(0, whole, BLOCK_K):
        x = lines(a, first_row, n, start, k, stride_a, BLOCK_N, BLOCK_K, STRIDED_A, ALIGNED, False)
        y = lines(b, first_column, m, start, k, stride_b, BLOCK_M, BLOCK_K, STRIDED_B, ALIGNED, False)
        sums = tl.dot(x, y.T, sums)
    if whole < k:
        x = lines(a, first_row, n, whole, k, stride_a, BLOCK_N, BLOCK_K, STRIDED_A, ALIGNED, True)
        y = lines(b, first_column, m, whole, k, stride_b, BLOCK_M, BLOCK_K, STRIDED_B, ALIGNED, True)
        sums = tl.dot(x, y.T, sums)

    row, column = first_row + tl.arange(0, BLOCK_N), first_column + tl.arange(0, BLOCK_M)
    held = out + row.to(tl.int64)[:, None] * stride_out + column[None, :]
    inside = (row < n)[:, None] & (column < m)[None, :]
    if ADD:
        sums += tl.load(held, mask=inside, other=0.0)
    tl.store(held, sums, mask=inside)


def grid(n: int, m: int, config: Config) -> tuple[int]:
    """Return the programs for an (n, m) result."""
    return (triton.cdiv(n, config.constants["BLOCK_N"]) * triton.cdiv(m, config.constants["BLOCK_M"]),)


def config(target: Target, aligned: bool = True) -> Config:
    """Return the one configuration of a target: a fallback is not tuned. Narrow loads leave registers for less."""
    if not aligned:
        return UNALIGNED
    n, m, k, warps, stages = _CONFIGS[target.name]
    return Config({"BLOCK_N": n, "BLOCK_M": m, "BLOCK_K": k}, warps, stages)


def configs(target: Target, dtype: str) -> list[Config]:
    """Return the tuning space."""
    return [config(target)]


# BLOCK_N, BLOCK_M, BLOCK_K, warps, stages
_CONFIGS = {
    "sm_80": (128, 128, 64, 8, 3),
    "sm_90": (128, 128, 64, 8, 3),
    "sm_100": (128, 128, 64, 8, 3),
    "sm_120": (128, 128, 32, 8, 3),
    "gfx942": (128, 128, 64, 8, 2),
    "gfx1100": (128, 64, 32, 8, 2),
}


def variants(target: Target, dtype: str) -> list[Variant]:
    """Return the three products of a step (logits, dH, dW), the last with and without what `out` holds, in two forms:
    for aligned operands and for any others. float32 operands are the library's."""
    if dtype == "fp32":
        return []
    signature = {
        "a": TYPES[dtype], "b": TYPES[dtype], "out": "*fp32", "n": "i32", "m": "i32", "k": "i32",
        "stride_a": "i32", "stride_b": "i32", "stride_out": "i32",
    }  # fmt: skip
    return [
        Variant(
            name=name + " unaligned" * (not aligned),
            kernel=product,
            signature=signature,
            constants={
                "GROUP": GROUP, "STRIDED_A": strided_a, "STRIDED_B": strided_b, "ADD": add, "ALIGNED": aligned,
            },
            aligned=("a", "b", "out", "stride_a", "stride_b", "stride_out") if aligned else (),
            products=True,
            config=None if aligned else UNALIGNED,
        )
        for name, strided_a, strided_b, add in (
            ("logits", False, False, False),
            ("hidden", False, True, False),
            ("weight", True, True, False),
            ("weight added", True, True, True),
        )
        for aligned in (True, False)
    ]  # fmt: skip
