"""Everything between a chunk's two gradient products and the gradients: three kernels in place of twenty operations.

    kept      U in bf16, factor f = −c·scale/s:   dH = f·(U W + r·W[y]),   dW = Uᵀ·scaled + rest at y
              scaled = f·H in bf16,   rest = (U[y] + r)·f·H − U[y]·scaled
    chunked   G = ∂L/∂a in half precision:        dH = undo·(G W + r·W[y]),   dW = GᵀH + r·H at y

r (N,) is the part of the target's entry of U or G that rounding takes off, float32. That entry is half of its row by
magnitude and nearly the same number for all tokens of a sequence, so its rounding does not average out; it is put back
in float32. `merge` has stored r of U. r of G is computed here, from the statistics of the row.

`finish_hidden` writes dH, `scale_hidden` writes `scaled`. `add_targets` adds to the rows of dW at the targets. It runs
over the rows of the chunk; the program of the first row with a target adds all rows with that target, ROWS at a time in
the order of the batch, and the other programs return. So nothing is atomic, and the same input gives the same bits. The
order comes from one stable sort of all targets of a step (`TargetOrder` of `backends/triton.py`).

Bytes: `finish_hidden` 4 + 2 + 2 an element of dH, `scale_hidden` 2 + 2, `add_targets` 2, and 8 for each different
target. Grid: (n, D / BLOCK_D).
"""

import itertools

import triton
import triton.language as tl

from exo_fast.kernels.launch import TYPES, Config, Variant
from exo_fast.kernels.logits import slope
from exo_fast.kernels.targets import Target

ROWS = Config({"BLOCK_D": 1024}, num_warps=2)  # 128 bits a thread in warps of 32 and of 64
TARGETS = Config({"ROWS": 16, "BLOCK_D": 256}, num_warps=4)


@triton.jit
def rounded_off(
    coefficient, row, stats, stride_stats, real, scale, softcap, HAS_SOFTCAP: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """Return what rounding to TYPE takes off ∂L/∂a at the target of these rows; 0 where `real` is false."""
    shift = tl.load(stats + row, mask=real, other=0.0)
    total = tl.load(stats + stride_stats + row, mask=real, other=1.0)
    z = tl.load(stats + 2 * stride_stats + row, mask=real, other=0.0)
    entry = coefficient * scale * (1.0 - tl.exp(z - shift) / total)
    if HAS_SOFTCAP:
        entry *= slope(z, scale, softcap)
    return tl.where(real, entry - entry.to(TYPE).to(tl.float32), 0.0)


@triton.jit
def kept_factor(coefficient, row, stats, stride_stats, real, scale):
    """Return f = −c·scale/s of these rows."""
    total = tl.load(stats + stride_stats + row, mask=real, other=1.0)
    return coefficient * (-scale / total)


@triton.jit(
    do_not_specialize=["vocab", "stride_stats"],
    do_not_specialize_on_alignment=["targets", "stats", "coefficients", "residual"],
)
def finish_hidden(
    product,  # (n, D) float32, contiguous: U W or G W
    weight,  # (V, D)
    targets,  # (n,) int64; −1 has no target, and one past V lies in another slice of the vocabulary
    stats,  # rows shift, sum, target of (3, n) float32, `stride_stats` apart
    coefficients,  # (n,) float32: c
    residual,  # (n,) float32, read with KEPT
    undo,  # () float32, the inverse of the factor in c, read with UNDO
    out,  # (n, D), rows `stride_out` apart: dH
    vocab, width, stride_weight, stride_stats, stride_out, scale, softcap,
    KEPT: tl.constexpr, UNDO: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < width
    target = tl.load(targets + row)
    real = (target >= 0) & (target < vocab)
    c = tl.load(coefficients + row)
    value = tl.load(product + row * width + columns, mask=inside, other=0.0)
    needed = columns < tl.where(real, width, 0)  # a row without a target reads nothing
    at_target = tl.load(weight + target * stride_weight + columns, mask=needed, other=0.0).to(tl.float32)
    if KEPT:
        value += tl.load(residual + row) * at_target
        value *= kept_factor(c, row, stats, stride_stats, row >= 0, scale)
    else:
        value += (
            rounded_off(c, row, stats, stride_stats, real, scale, softcap, HAS_SOFTCAP, weight.dtype.element_ty)
            * at_target
        )
        if UNDO:
            value *= tl.load(undo)
    tl.store(out + row * stride_out + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["stride_stats"], do_not_specialize_on_alignment=["stats", "coefficients", "factors"])
def scale_hidden(
    hidden,  # (n, D) bf16, rows `stride_hidden` apart
    stats, coefficients,
    scaled,  # (n, D) bf16, contiguous: f·H
    factors,  # (n,) bf16: f, written with BIAS
    width, stride_hidden, stride_stats, scale,
    BIAS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    factor = kept_factor(tl.load(coefficients + row), row, stats, stride_stats, row >= 0, scale)
    h = tl.load(hidden + row * stride_hidden + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(scaled + row * width + columns, (h * factor).to(scaled.dtype.element_ty), mask=columns < width)
    if BIAS:
        tl.store(factors + row, factor.to(factors.dtype.element_ty))


@triton.jit(
    do_not_specialize=["n", "first", "last", "vocab", "stride_stats", "stride_kept"],
    do_not_specialize_on_alignment=["targets", "stats", "coefficients", "residual", "kept", "place", "sorted", "order"],
)
def add_targets(
    hidden,  # (last − first, D): this chunk's, rows `stride_hidden` apart
    targets, stats, coefficients, residual,  # this chunk's, as above
    kept,  # (last − first, stride_kept): U, read with KEPT
    place,  # (N,) int64: where a row of the step stands in `sorted`
    sorted,  # (N,) int64: the targets of the step in order
    order,  # (N,) int64: their rows, ascending for equal targets
    grad,  # (V, D) float32, contiguous: dW, with WEIGHT
    grad_bias,  # (V,) float32, with KEPT and BIAS
    n, first, last, vocab, width, stride_hidden, stride_stats, stride_kept, scale, softcap,
    KEPT: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target = tl.load(targets + row)
    start = tl.load(place + first + row)
    before = tl.load(sorted + start - 1, mask=start > 0, other=-1)
    row_before = tl.load(order + start - 1, mask=start > 0, other=-1)
    if (target < 0) | (target >= vocab) | ((before == target) & (row_before >= first)):
        return
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < width
    total = tl.zeros((BLOCK_D,), tl.float32)
    total_bias = tl.zeros((1,), tl.float32)
    more = start >= 0
    while more:
        at = start + tl.arange(0, ROWS)
        member = tl.load(order + at, mask=at < n, other=0)
        mine = (at < n) & (tl.load(sorted + at, mask=at < n, other=-1) == target) & (member < last)
        rows = tl.where(mine, member - first, 0)
        c = tl.load(coefficients + rows, mask=mine, other=0.0)
        h = tl.load(
            hidden + rows[:, None] * stride_hidden + columns[None, :], mask=mine[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        if KEPT:
            factor = kept_factor(c, rows, stats, stride_stats, mine, scale)
            exact = h * factor[:, None]
            scaled = exact.to(hidden.dtype.element_ty).to(tl.float32)
            u = tl.load(kept + rows * stride_kept + target, mask=mine, other=0.0).to(tl.float32)
            whole = u + tl.load(residual + rows, mask=mine, other=0.0)
            total += tl.sum(exact * whole[:, None] - scaled * u[:, None], 0)
            if BIAS:
                total_bias += tl.sum(whole * factor - u * factor.to(hidden.dtype.element_ty).to(tl.float32), 0)
        else:
            r = rounded_off(c, rows, stats, stride_stats, mine, scale, softcap, HAS_SOFTCAP, hidden.dtype.element_ty)
            total += tl.sum(h * r[:, None], 0)
        start += ROWS
        more = tl.sum(mine.to(tl.int32), 0) == ROWS
    if WEIGHT:
        at_target = grad + target * width + columns
        tl.store(at_target, tl.load(at_target, mask=inside, other=0.0) + total, mask=inside)
    if BIAS:
        if tl.program_id(1) == 0:
            entry = grad_bias + target + tl.arange(0, 1)
            tl.store(entry, tl.load(entry) + total_bias)


def configs(target: Target, dtype: str) -> list[Config]:
    """Return the tuning space: each kernel here has one configuration of its own."""
    return [ROWS]


def grid(n: int, width: int, config: Config) -> tuple[int, int]:
    return n, triton.cdiv(width, config.constants["BLOCK_D"])


def variants(target: Target, dtype: str) -> list[Variant]:
    """Return every signature the backend launches: U is kept for bf16 alone, float16 alone undoes a factor, and float32
    is not rounded."""
    if dtype == "fp32":
        return []
    pointer, made = TYPES[dtype], []
    row = {"targets": "*i64", "stats": "*fp32", "coefficients": "*fp32", "residual": "*fp32"}
    sizes = {"stride_stats": "i32", "scale": "fp32", "softcap": "fp32"}
    for kept in (False, True) if dtype == "bf16" else (False,):
        for softcap in (False,) if kept else (False, True):
            for out, undo in itertools.product((pointer, "*fp32"), (False, True) if dtype == "fp16" else (False,)):
                made.append(
                    Variant(
                        name="hidden" + " kept" * kept + " softcap" * softcap + " undone" * undo
                        + " float32" * (out == "*fp32"),
                        kernel=finish_hidden,
                        signature={
                            "product": "*fp32", "weight": pointer, **row, "undo": "*fp32", "out": out, "vocab": "i32",
                            "width": "i32", "stride_weight": "i32", "stride_out": "i32", **sizes,
                        },
                        constants={"KEPT": kept, "UNDO": undo, "HAS_SOFTCAP": softcap},
                        aligned=("product", "weight", "undo", "out", "width", "stride_weight", "stride_out"),
                        memory_bound=True,
                    )
                )  # fmt: skip
            for weight, bias in ((True, False), (True, True), (False, True)) if kept else ((True, False),):
                made.append(
                    Variant(
                        name="targets" + " kept" * kept + " softcap" * softcap + " weight" * weight + " bias" * bias,
                        kernel=add_targets,
                        signature={
                            "hidden": pointer, **row, "kept": pointer, "place": "*i64", "sorted": "*i64",
                            "order": "*i64", "grad": "*fp32", "grad_bias": "*fp32", "n": "i32", "first": "i32",
                            "last": "i32", "vocab": "i32", "width": "i32", "stride_hidden": "i32",
                            "stride_kept": "i32", **sizes,
                        },
                        constants={"KEPT": kept, "WEIGHT": weight, "BIAS": bias, "HAS_SOFTCAP": softcap},
                        aligned=("hidden", "grad", "grad_bias", "width", "stride_hidden"),
                        config=TARGETS,
                    )
                )  # fmt: skip
                if kept and weight:
                    made.append(
                        Variant(
                            name="scaled" + " bias" * bias,
                            kernel=scale_hidden,
                            signature={
                                "hidden": pointer, "stats": "*fp32", "coefficients": "*fp32", "scaled": pointer,
                                "factors": pointer, "width": "i32", "stride_hidden": "i32", "stride_stats": "i32",
                                "scale": "fp32",
                            },
                            constants={"BIAS": bias},
                            aligned=("hidden", "scaled", "width", "stride_hidden"),
                            memory_bound=True,
                        )
                    )  # fmt: skip
    return made
