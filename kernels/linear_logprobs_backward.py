"""dH, or dW and db, from hidden states and head alone: nothing of the vocabulary's size is ever held.

    p = exp(z − shift)/sum,  g = ∂L/∂a = c·(1[v = y] − p)·scale·softcap′,  dH = g W,  dW = gᵀ H,  db = Σ_n g

One kernel, launched twice with the operands exchanged: a program owns BLOCK_OWN rows of one operand (of H for dH, of W
for dW) and walks all rows of the other. A tile of logits is recomputed on the tensor cores, becomes g in registers, and
is multiplied with the other operand's rows at once. The owned rows of the gradient are float32, live in L2 between two
tiles, and only one thread touches each of them: no atomics, one order, the same bits every run.

Why two launches: dH adds over the vocabulary and dW over the rows, so one launch would need locks (two runs would then
differ) or a partial dH for every vocabulary block. Making logits twice costs 2·N·D·V flops more instead, and with the
read–modify–write of the gradient (8·D bytes a row and tile, in L2) it is why the backend prefers a chunk of the memory
budget (`backends/triton.py`), and uses this kernel if the budget holds no chunk.

Flops: 4·N·D·V a launch. Bytes: the operands, (n_own / BLOCK_OWN) times the other one, mostly from L2. Bytes of logits:
0. Grid: (n_own / BLOCK_OWN,).
"""

import triton
import triton.language as tl

from exo_fast.kernels import tuned
from exo_fast.kernels.launch import HEADS, TYPES, Config, Variant
from exo_fast.kernels.linear_logsumexp import precision, raw_tile
from exo_fast.kernels.logits import finish, slope
from exo_fast.kernels.targets import Target


@triton.jit(
    do_not_specialize=["n_own", "n_other", "stride_stats"],
    do_not_specialize_on_alignment=["targets", "stats", "coefficients"],
)
def linear_logprobs_backward(
    own,  # (n_own, D): hidden states for dH, head for dW
    other,  # (n_other, D): the other one
    bias,  # (V,)
    targets,  # (N,) int64; −1 has no gradient
    stats,  # rows shift, sum, target of (3, ·) float32, `stride_stats` apart
    coefficients,  # (N,) float32, c = ∂L/∂(log-prob)
    grad,  # (n_own, D) float32, zeros at the start
    grad_bias,  # (V,) float32, written with BIAS_GRAD
    n_own, n_other, width, stride_own, stride_other, stride_stats, scale, softcap,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr,
    OWNS_ROWS: tl.constexpr,  # own is the hidden states
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BIAS_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_OWN
    mine = first + tl.arange(0, BLOCK_OWN)
    inside = mine < n_own
    sums = tl.zeros((BLOCK_OWN,), tl.float32)
    for start in tl.range(0, n_other, BLOCK_OTHER):
        theirs = start + tl.arange(0, BLOCK_OTHER)
        z = raw_tile(
            own, other, first, start, n_own, n_other, width, stride_own, stride_other,
            BLOCK_OWN, BLOCK_OTHER, BLOCK_D, PRECISION, False,
        )  # fmt: skip
        # Rows of the batch lie along the owned axis or across it; everything else is the same.
        if OWNS_ROWS:
            g = gradient(
                z, mine[:, None], theirs[None, :], n_own, n_other, bias, targets, stats, coefficients, stride_stats,
                scale, softcap, HAS_BIAS, HAS_SOFTCAP,
            )  # fmt: skip
        else:
            g = gradient(
                z, theirs[None, :], mine[:, None], n_other, n_own, bias, targets, stats, coefficients, stride_stats,
                scale, softcap, HAS_BIAS, HAS_SOFTCAP,
            )  # fmt: skip
        if BIAS_GRAD:
            sums += tl.sum(g, 1)
        g = g.to(other.dtype.element_ty)
        rows = tl.minimum(theirs, n_other - 1).to(tl.int64)
        for place in tl.range(0, width, BLOCK_D):
            columns = place + tl.arange(0, BLOCK_D)
            real = (columns < width)[None, :]
            x = tl.load(other + rows[:, None] * stride_other + columns[None, :], mask=real, other=0.0)
            part = tl.dot(g, x, input_precision=PRECISION)
            # In one dimension, so that a thread adds to the values that it stored itself: nothing orders a store to
            # memory before another thread's load. In two, compilers load in one layout and store in the product's.
            held = grad + tl.reshape(mine.to(tl.int64)[:, None] * width + columns[None, :], (BLOCK_OWN * BLOCK_D,))
            wanted = tl.reshape(inside[:, None] & real, (BLOCK_OWN * BLOCK_D,))
            part = tl.reshape(part, (BLOCK_OWN * BLOCK_D,)) + tl.load(held, mask=wanted, other=0.0)
            tl.store(held, part, mask=wanted)
    if BIAS_GRAD:
        tl.store(grad_bias + mine, sums, mask=inside)


@triton.jit
def gradient(
    a, row, column, n, vocab, bias, targets, stats, coefficients, stride_stats, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Return ∂L/∂a of a tile of raw products; `row` and `column` are its indices, broadcast along one axis each."""
    real = row < n
    target = tl.load(targets + row, mask=real, other=-1).to(tl.int32)
    c = tl.load(coefficients + row, mask=real & (target >= 0), other=0.0)
    shift = tl.load(stats + row, mask=real, other=0.0)
    total = tl.load(stats + stride_stats + row, mask=real, other=1.0)
    picked = tl.load(stats + 2 * stride_stats + row, mask=real, other=0.0)
    if HAS_BIAS:
        a += tl.load(bias + column, mask=column < vocab, other=0.0).to(tl.float32)
    # The target's logit is the one that the sum holds: where its probability is near 1, the difference from 1 counts,
    # and this product may round otherwise.
    z = tl.where(column == target, picked, finish(a, scale, softcap, HAS_SOFTCAP))
    # No probability passes 1: this also bounds rows past the edge, whose statistics are meaningless.
    p = tl.exp(tl.minimum(z - shift - tl.log(total), 0.0, propagate_nan=tl.PropagateNan.ALL))
    g = (c * scale) * (tl.where(column == target, 1.0, 0.0) - p)
    if HAS_SOFTCAP:
        g *= slope(z, scale, softcap)
    return tl.where(real & (column < vocab), g, 0.0)


def config(target: Target, dtype: str, width: int) -> Config:
    """Return the configuration of the target's table (`kernels/tuned/`), or else the static default."""
    space = configs(target, dtype)
    return tuned.config(target, "linear_logprobs_backward", dtype, width, space) or space[0]


def configs(target: Target, dtype: str) -> list[Config]:
    """Return the tuning space, default first."""
    space = _FLOAT32 if dtype == "fp32" else _HALF
    return [
        Config({"BLOCK_OWN": own, "BLOCK_OTHER": other, "BLOCK_D": d}, warps, stages)
        for own, other, d, warps, stages in space[target.name]
    ]


# BLOCK_OWN, BLOCK_OTHER, BLOCK_D, warps, stages
_HALF = {
    "sm_80": [(128, 64, 64, 8, 3), (64, 64, 64, 4, 3)],
    "sm_90": [(128, 64, 64, 8, 3), (64, 64, 64, 4, 3)],
    "sm_100": [(128, 32, 64, 8, 3), (128, 32, 32, 8, 3), (128, 64, 32, 8, 2)],
    "sm_120": [(128, 64, 64, 8, 2), (64, 64, 64, 4, 2)],
    "gfx942": [(128, 64, 64, 8, 2), (64, 64, 64, 4, 2)],
    "gfx1100": [(64, 64, 32, 8, 2), (32, 64, 32, 4, 2)],
}
_FLOAT32 = {
    "sm_80": [(64, 32, 32, 8, 2), (32, 32, 16, 4, 2)],
    "sm_90": [(64, 64, 32, 8, 2), (64, 32, 32, 4, 2)],
    "sm_100": [(64, 32, 32, 8, 2), (64, 32, 32, 4, 2)],
    "sm_120": [(64, 32, 32, 8, 2), (32, 32, 32, 4, 2)],
    "gfx942": [(64, 64, 32, 8, 2), (64, 32, 32, 4, 2)],
    "gfx1100": [(32, 32, 16, 4, 1), (64, 32, 16, 8, 1)],
}


def variants(target: Target, dtype: str) -> list[Variant]:
    """Return both launches, the second with and without the gradient of a bias, for all options of a head."""
    pointer = TYPES[dtype]
    signature = {
        "own": pointer, "other": pointer, "bias": pointer, "targets": "*i64", "stats": "*fp32",
        "coefficients": "*fp32", "grad": "*fp32", "grad_bias": "*fp32", "n_own": "i32", "n_other": "i32",
        "width": "i32", "stride_own": "i32", "stride_other": "i32", "stride_stats": "i32", "scale": "fp32",
        "softcap": "fp32",
    }  # fmt: skip
    return [
        Variant(
            name=name + extras,
            kernel=linear_logprobs_backward,
            signature=signature,
            constants={
                "OWNS_ROWS": owns_rows,
                "HAS_BIAS": bias,
                "HAS_SOFTCAP": softcap,
                "BIAS_GRAD": bias_grad,
                "PRECISION": precision(target, dtype),
            },
            aligned=("own", "other", "bias", "grad", "grad_bias", "width", "stride_own", "stride_other"),
            products=True,
        )
        for name, owns_rows, bias_grad in (("hidden", True, False), ("weight", False, False), ("both", False, True))
        for extras, bias, softcap in HEADS
        if bias or not bias_grad
    ]  # fmt: skip
