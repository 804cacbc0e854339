"""The gradient of a chunk of logits, in place: one read, one write.

    z = softcap(a + b)·scale,   p = exp(z − shift) / sum,   ∂L/∂a = c·(1[v = y] − p)·scale·softcap′(a + b)
    ∂L/∂b = Σ_t ∂L/∂a

a are raw products, read by `logsumexp_gather` or recomputed; shift and sum are its finished statistics;
c_t = ∂L/∂ℓ_t is the coefficient of a row. Rows with target −1 or c = 0 become zeros, whatever they and their statistics
hold. p comes from shift and sum, not from the logsumexp, whose rounding would cost 1e-3 of p at logits of 1e4.

Bytes: n·columns read in the logits' dtype and written in the gradient's; a row's statistics (20 bytes) once
for every BLOCK columns, out of the L2 cache; with the bias gradient 8·columns more for every ROWS rows, written here
and read by the caller's sum. Flops: 5·n·columns and one exponential an element: bound by memory.
Grid: (row blocks · column blocks,), neighbours along a row. A program owns ROWS rows × BLOCK columns, one row after
another.

The bias gradient is an ordered reduction. A program adds its rows column by column in registers and writes one row of
`partial`, (row blocks, width) float32; the caller adds these, `partial.sum(0)`, in one fixed order. So the same input
gives the same bits.

128-bit accesses need rows that start at multiples of 16 elements and end at one: strides and `width` ≥ `columns` are
multiples of 16, and the padding is written as zeros, whatever it held. Otherwise (V = 50257 unpadded, width = columns)
Triton compiles narrower accesses, with the same results.

`out` is the chunk itself, or another buffer of any dtype. It must not be the chunk's memory in a narrower dtype, in
which one program would write over values that the next has to read.

A float16 gradient needs larger coefficients: at V = 50257 and c near 0.1 / 8, c·p is near 1e-7, where float16 has one
digit, and ∂L/∂h comes out 1e-2 off. The caller multiplies c by a power of two S that brings the largest |c·S·scale|
to between 1 and 4096, and divides the products and the bias gradient by it: 4e-4.
"""

import triton
import triton.language as tl

from exo_fast.kernels.launch import HEADS, TYPES, Config, Variant
from exo_fast.kernels.logits import finish, slope
from exo_fast.kernels.targets import Target


@triton.jit(
    do_not_specialize=["n", "columns", "start", "stride_stats"],
    do_not_specialize_on_alignment=["targets", "coefficients", "stats"],
)
def logits_to_grad(
    logits,  # (n, width) bf16, fp16 or float32: raw products a, rows `stride` apart
    out,  # (n, width), rows `stride_out` apart: ∂L/∂a
    targets,  # (n,) int64; −1 is ignored
    coefficients,  # (n,) float32: c
    bias,  # (columns,), this chunk's; None without HAS_BIAS
    stats,  # rows shift, sum of (3, n) float32, `stride_stats` apart
    partial,  # (row blocks, width) float32, rows `stride_partial` apart; None without HAS_BIAS_GRAD
    n, columns, width, start, stride, stride_out, stride_stats, stride_partial, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_BIAS_GRAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(width, BLOCK)
    row_block = (tl.program_id(0) // column_blocks).to(tl.int64)
    column = tl.program_id(0) % column_blocks * BLOCK + tl.arange(0, BLOCK)
    stored, valid = column < width, column < columns
    if HAS_BIAS:
        b = tl.load(bias + column, mask=valid, other=0.0).to(tl.float32)
    if HAS_BIAS_GRAD:
        added = tl.zeros((BLOCK,), tl.float32)

    first = row_block * ROWS
    for step in range(0, tl.minimum(n - first, ROWS).to(tl.int32)):
        row = first + step
        # Unconditional, so that this load does not wait for the loads that decide whether it is needed.
        a = tl.load(logits + row * stride + column, mask=stored, other=0.0).to(tl.float32)
        target = tl.load(targets + row)
        c = tl.load(coefficients + row)
        shift = tl.load(stats + row)
        total = tl.load(stats + stride_stats + row)
        active = (target >= 0) & (c != 0.0)
        c *= scale
        if HAS_BIAS:
            a += b
        z = finish(a, scale, softcap, HAS_SOFTCAP)
        place = (target - start).to(tl.int32)
        gradient = tl.where(column == place, c, 0.0) - (c / total) * tl.exp(z - shift)
        if HAS_SOFTCAP:
            gradient *= slope(z, scale, softcap)
        gradient = tl.where(valid & active, gradient, 0.0)
        if HAS_BIAS_GRAD:
            added += gradient
        tl.store(out + row * stride_out + column, gradient.to(out.dtype.element_ty), mask=stored)

    if HAS_BIAS_GRAD:
        tl.store(partial + row_block * stride_partial + column, added, mask=stored)


def row_blocks(n: int, config: Config) -> int:
    """Return the row blocks of a chunk of n rows: the rows of `partial`."""
    return triton.cdiv(n, config.constants["ROWS"])


def grid(n: int, width: int, config: Config) -> tuple[int]:
    """Return the programs for a chunk of n rows and `width` columns."""
    return (row_blocks(n, config) * triton.cdiv(width, config.constants["BLOCK"]),)


def configs(target: Target, dtype: str) -> list[Config]:
    """Return the tuning space, eight elements a thread: enough loads in flight, no register short. Default first."""
    return [
        Config({"ROWS": rows, "BLOCK": block}, threads // target.warp_size)
        for rows, block, threads in ((16, 2048, 256), (16, 1024, 128), (16, 4096, 512))
    ]


def variants(target: Target, dtype: str) -> list[Variant]:
    """Return every signature; `dtype` is the operands' and the gradient's. From float32 logits, for all options of a
    head, with and without the gradient of its bias; in place for operands of 16 bits."""
    signature = {
        "logits": TYPES[dtype], "out": TYPES[dtype], "targets": "*i64", "coefficients": "*fp32", "bias": "constexpr",
        "stats": "*fp32", "partial": "constexpr", "n": "i32", "columns": "i32", "width": "i32", "start": "i32",
        "stride": "i32", "stride_out": "i32", "stride_stats": "i32", "stride_partial": "i32",
        "scale": "fp32", "softcap": "fp32",
        "HAS_BIAS": "constexpr", "HAS_SOFTCAP": "constexpr", "HAS_BIAS_GRAD": "constexpr",
        "ROWS": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    aligned = ("logits", "out", "width", "stride", "stride_out", "stride_partial")

    def variant(name: str, logits: str, bias: bool, softcap: bool, bias_grad: bool) -> Variant:
        types = (
            {"logits": logits} | ({"bias": TYPES[dtype]} if bias else {}) | ({"partial": "*fp32"} if bias_grad else {})
        )
        flags = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "HAS_BIAS_GRAD": bias_grad}
        absent = ({} if bias else {"bias": None}) | ({} if bias_grad else {"partial": None})
        given = tuple(name for name in (*aligned, "bias", "partial") if name not in absent)
        return Variant(name, logits_to_grad, signature | types, flags | absent, given, memory_bound=True)

    found = [variant("float32 logits" + extras, "*fp32", bias, softcap, False) for extras, bias, softcap in HEADS]
    found += [
        variant("bias gradient" + extras, "*fp32", bias, softcap, True) for extras, bias, softcap in HEADS if bias
    ]
    return found + ([variant("in place", TYPES[dtype], False, False, False)] if dtype != "fp32" else [])
