"""Log-probs of a chunk of logits and the statistics trainers log beside them, in one read.

    z = softcap(a + b)·scale,   shift = max_v z_v,   e_v = exp(z_v − shift),   sum = Σ e_v

    log p[y]      z[y] − shift − log(sum)
    entropy       log(sum) − Σ e_v (z_v − shift) / sum
    log Σ p²      log(Σ e_v²) − 2 log(sum)
    mean logit    Σ z_v / columns
    is_top1       y is the first v of z_v = shift

The chunk holds n rows of the whole vocabulary. `stats` are the three float32 rows shift, sum, target, `stride_stats`
apart, that a backward pass reads (`logits_to_grad`); `values` are log p[y], entropy, log Σ p² and mean logit,
`stride_values` apart. All are written, whichever are wanted: the bytes are the same. A row with target −1 is ignored:
it is not read, its statistics are 0, 1, 0 and its values 0. −inf is a logit like any other (a token that cannot be
drawn): it adds nothing to the entropy, and makes the mean −inf. A nan makes all numbers of its row nan.

Bytes: the chunk once (4·n·columns), 37·n for targets and results; the bias once a row, out of the L2 cache. Flops:
about 12·n·columns and 1.25 exponentials an element, at 4 bytes an element still bound by memory (a softcap: as of
`logsumexp_gather`).
Grid: (n,), one program a row.

As in `logsumexp_gather` the loop has no reduction across threads: each keeps its sums for every LANE neighbouring
columns, LANE being the width of one 128-bit load, and they meet once, in a fixed tree, after the last block. Only the
last block of a row looks at its edge. 128-bit loads need rows that start at multiples of 16 elements and may be read up
to one: `stride` and `width` ≥ `columns` are multiples of 16. Otherwise Triton compiles narrower loads, with the same
results. Narrow in either case, once a row: the target's logit, the results, and the bias in the last block.
"""

import triton
import triton.language as tl

from exo_fast.kernels.launch import HEADS, TYPES, Config, Variant
from exo_fast.kernels.logits import finish
from exo_fast.kernels.targets import Target

LANE = tl.constexpr(4)  # columns that share a maximum and its sums
FLOOR = tl.constexpr(-3.4028234663852886e38)  # a finite start, since −inf − (−inf) would be nan
FAR = tl.constexpr(-1000.0)  # exp(FAR) is 0, and 0·FAR is 0, while 0·−inf is nan
NOWHERE = tl.constexpr(2147483647)  # no column has this number


@triton.jit
def fold(
    logits, bias, begin, columns, width, scale, softcap,
    shift, total, weighted, squares, plain,  # (BLOCK / LANE,) float32: max z, Σ e, Σ e·(z − shift), Σ e², Σ z
    place,  # (BLOCK / LANE,) int32: the first column of the maximum
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EDGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return all sums with the BLOCK columns of a row from `begin` added."""
    column = begin + tl.arange(0, BLOCK)
    a = tl.load(logits + column, mask=column < width, other=0.0) if EDGE else tl.load(logits + column)
    if HAS_BIAS:
        b = tl.load(bias + column, mask=column < columns, other=0.0) if EDGE else tl.load(bias + column)
        a += b.to(tl.float32)
    z = finish(a, scale, softcap, HAS_SOFTCAP)
    added = tl.where(column < columns, z, 0.0) if EDGE else z
    plain += tl.sum(tl.reshape(added, (BLOCK // LANE, LANE)), 1)
    if EDGE:
        z = tl.where(column < columns, z, float("-inf"))
    z = tl.reshape(z, (BLOCK // LANE, LANE))
    highest = tl.max(z, 1)
    where = tl.where(z == highest[:, None], tl.reshape(column, (BLOCK // LANE, LANE)), NOWHERE)
    place = tl.where(highest > shift, tl.min(where, 1), place)
    above = tl.maximum(shift, highest)
    drop = tl.maximum(shift - above, FAR)
    factor = tl.exp(drop)
    far = z - above[:, None]
    e = tl.exp(far)
    weighted = (weighted + drop * total) * factor + tl.sum(e * tl.maximum(far, FAR), 1)
    total = total * factor + tl.sum(e, 1)
    squares = squares * (factor * factor) + tl.sum(e * e, 1)
    return above, total, weighted, squares, plain, place


@triton.jit(
    do_not_specialize=["columns", "stride_stats", "stride_values"],
    do_not_specialize_on_alignment=["targets", "stats", "values", "top"],
)
def token_statistics(
    logits,  # (n, width) float32: raw products a, rows `stride` apart
    targets,  # (n,) int64; −1 is ignored
    bias,  # (columns,); None without HAS_BIAS
    stats,  # rows shift, sum, target of (3, n) float32, `stride_stats` apart
    values,  # rows log p[y], entropy, log Σ p², mean logit of (4, n) float32, `stride_values` apart
    top,  # (n,) int8: is_top1
    columns, width, stride, stride_stats, stride_values, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    shift_at = stats + row
    sum_at = shift_at + stride_stats
    target_at = sum_at + stride_stats
    logp_at = values + row
    entropy_at = logp_at + stride_values
    squares_at = entropy_at + stride_values
    mean_at = squares_at + stride_values
    target = tl.load(targets + row)
    if target < 0:
        tl.store(shift_at, 0.0)
        tl.store(sum_at, 1.0)
        tl.store(target_at, 0.0)
        tl.store(logp_at, 0.0)
        tl.store(entropy_at, 0.0)
        tl.store(squares_at, 0.0)
        tl.store(mean_at, 0.0)
        tl.store(top + row, 0)
        return

    shifts = tl.full((BLOCK // LANE,), FLOOR, tl.float32)
    totals = tl.zeros((BLOCK // LANE,), tl.float32)
    weighteds = tl.zeros((BLOCK // LANE,), tl.float32)
    squares = tl.zeros((BLOCK // LANE,), tl.float32)
    plains = tl.zeros((BLOCK // LANE,), tl.float32)
    places = tl.full((BLOCK // LANE,), NOWHERE, tl.int32)
    whole = columns // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        shifts, totals, weighteds, squares, plains, places = fold(
            logits, bias, begin, columns, width, scale, softcap, shifts, totals, weighteds, squares, plains, places,
            HAS_BIAS, HAS_SOFTCAP, False, BLOCK,
        )  # fmt: skip
    if whole < columns:
        shifts, totals, weighteds, squares, plains, places = fold(
            logits, bias, whole, columns, width, scale, softcap, shifts, totals, weighteds, squares, plains, places,
            HAS_BIAS, HAS_SOFTCAP, True, BLOCK,
        )  # fmt: skip

    shift = tl.max(shifts, 0)
    drops = tl.maximum(shifts - shift, FAR)
    factors = tl.exp(drops)
    total = tl.sum(totals * factors, 0)
    weighted = tl.sum((weighteds + drops * totals) * factors, 0)
    square = tl.sum(squares * (factors * factors), 0)
    first = tl.min(tl.where(shifts == shift, places, NOWHERE), 0)
    a = tl.load(logits + target)
    if HAS_BIAS:
        a += tl.load(bias + target).to(tl.float32)
    z = finish(a, scale, softcap, HAS_SOFTCAP)
    log_total = tl.log(total)
    tl.store(shift_at, shift)
    tl.store(sum_at, total)
    tl.store(target_at, z)
    tl.store(logp_at, z - shift - log_total)
    tl.store(entropy_at, log_total - weighted / total)
    tl.store(squares_at, tl.log(square) - 2.0 * log_total)
    tl.store(mean_at, tl.sum(plains, 0) / columns)
    tl.store(top + row, (first == target).to(tl.int8))


def grid(n: int) -> tuple[int]:
    """Return the programs for a chunk of n rows."""
    return (n,)


def configs(target: Target, dtype: str) -> list[Config]:
    """Return the tuning space, default first. Eight elements a thread: fewer make loads of a bias narrow, more spill on
    sm_120."""
    return [
        Config({"BLOCK": block}, threads // target.warp_size)
        for block, threads in ((2048, 256), (1024, 128), (512, 64))
    ]


def variants(target: Target, dtype: str) -> list[Variant]:
    """Return every signature; `dtype` is the bias's alone, as logits are float32: without a bias, listed once."""
    signature = {
        "logits": "*fp32", "targets": "*i64", "bias": "constexpr", "stats": "*fp32", "values": "*fp32", "top": "*i8",
        "columns": "i32", "width": "i32", "stride": "i32", "stride_stats": "i32", "stride_values": "i32",
        "scale": "fp32", "softcap": "fp32",
        "HAS_BIAS": "constexpr", "HAS_SOFTCAP": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    aligned = ("logits", "width", "stride")

    def variant(name: str, bias: bool, softcap: bool) -> Variant:
        types = {"bias": TYPES[dtype]} if bias else {}
        flags = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap} | ({} if bias else {"bias": None})
        given = (*aligned, "bias") if bias else aligned
        return Variant(name, token_statistics, signature | types, flags, given, memory_bound=True)

    return [
        variant("float32 logits" + extras, bias, softcap) for extras, bias, softcap in HEADS if bias or dtype == "fp32"
    ]
