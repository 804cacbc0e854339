"""Row statistics of a chunk of logits: the sums of a softmax and the target's logit, in one read.

    z = softcap(a + b)·scale,   shift = max_v z_v,   sum = Σ_v exp(z_v − shift),   target = z[y]

so that log p[y] = target − shift − log(sum). The chunk holds the vocabulary [start, start + columns) of n rows.
Launches over the chunks of a row, one after another in any order, update the same statistics. FIRST starts them; so
does shift = −inf, sum = 0.

`stats` are three float32 rows, `stride_stats` apart, the layout that `logits_to_grad` reads. A row with target −1 is
ignored: it is not read, and its statistics 0, 1, 0 say log p = 0. Targets are numbered over the whole vocabulary; a
target in another chunk changes nothing here. −inf is a logit like any other (a token that cannot be drawn).

Bytes: the chunk once (n·columns of its dtype), 20·n for targets and statistics, 12·n more when they are updated; the
bias once a row, out of the L2 cache. Flops: 4·n·columns and 1.25 exponentials an element, so float32 logits are bound
by memory. A softcap adds two operations of the special-function units, and these then bound sm_100: a prediction from
its rates is 0.7 of the bandwidth.
Grid: (n,), one program a row. The chunks of the backend have hundreds of rows; fewer rows than multiprocessors leave
some of these idle.

The loop has no reduction across threads: each keeps a maximum and a sum for every LANE neighbouring columns, LANE
being the width of one 128-bit load of float32, and they meet once, in a fixed tree, after the last block. Only the last
block of a row looks at its edge.

128-bit loads need rows that start at multiples of 16 elements and may be read up to one: `stride` and `width` ≥
`columns` are multiples of 16, and the padding is masked off by value. Otherwise (V = 50257 unpadded, width = columns)
Triton compiles narrower loads, with the same results. Narrow in either case, once a row: the target's logit, the
statistics, and the bias in the last block.
"""

import triton
import triton.language as tl

from exo_fast.kernels.launch import HEADS, TYPES, Config, Variant
from exo_fast.kernels.logits import finish
from exo_fast.kernels.targets import Target

LANE = tl.constexpr(4)  # columns that share a maximum and a sum
FLOOR = tl.constexpr(-3.4028234663852886e38)  # a finite start, since −inf − (−inf) would be nan


@triton.jit
def fold(
    logits, bias, begin, columns, width, scale, softcap,
    shift,  # (BLOCK / LANE,)
    total,  # (BLOCK / LANE,)
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EDGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return maxima and sums with the BLOCK columns of a row from `begin` added."""
    column = begin + tl.arange(0, BLOCK)
    a = tl.load(logits + column, mask=column < width, other=0.0) if EDGE else tl.load(logits + column)
    a = a.to(tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + column, mask=column < columns, other=0.0) if EDGE else tl.load(bias + column)
        a += b.to(tl.float32)
    z = finish(a, scale, softcap, HAS_SOFTCAP)
    if EDGE:
        z = tl.where(column < columns, z, float("-inf"))
    z = tl.reshape(z, (BLOCK // LANE, LANE))
    above = tl.maximum(shift, tl.max(z, 1))
    return above, total * tl.exp(shift - above) + tl.sum(tl.exp(z - above[:, None]), 1)


@triton.jit(do_not_specialize=["columns", "start", "stride_stats"], do_not_specialize_on_alignment=["targets", "stats"])
def logsumexp_gather(
    logits,  # (n, width) bf16, fp16 or float32: raw products a, rows `stride` apart
    targets,  # (n,) int64; −1 is ignored
    bias,  # (columns,), this chunk's; None without HAS_BIAS
    stats,  # rows shift, sum, target of (3, n) float32, `stride_stats` apart: written with FIRST, else updated
    columns, width, start, stride, stride_stats, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    shift_at = stats + row
    sum_at = shift_at + stride_stats
    target_at = sum_at + stride_stats
    target = tl.load(targets + row)
    if target < 0:
        if FIRST:
            tl.store(shift_at, 0.0)
            tl.store(sum_at, 1.0)
            tl.store(target_at, 0.0)
        return

    shifts = tl.full((BLOCK // LANE,), FLOOR, tl.float32)
    totals = tl.zeros((BLOCK // LANE,), tl.float32)
    whole = columns // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        shifts, totals = fold(
            logits, bias, begin, columns, width, scale, softcap, shifts, totals, HAS_BIAS, HAS_SOFTCAP, False, BLOCK
        )
    if whole < columns:
        shifts, totals = fold(
            logits, bias, whole, columns, width, scale, softcap, shifts, totals, HAS_BIAS, HAS_SOFTCAP, True, BLOCK
        )
    shift = tl.max(shifts, 0)
    total = tl.sum(totals * tl.exp(shifts - shift), 0)
    if not FIRST:
        before = tl.load(shift_at)
        above = tl.maximum(before, shift)
        total = tl.load(sum_at) * tl.exp(before - above) + total * tl.exp(shift - above)
        shift = above
    tl.store(shift_at, shift)
    tl.store(sum_at, total)

    place = target - start
    if (place >= 0) & (place < columns):
        a = tl.load(logits + place).to(tl.float32)
        if HAS_BIAS:
            a += tl.load(bias + place).to(tl.float32)
        tl.store(target_at, finish(a, scale, softcap, HAS_SOFTCAP))
    elif FIRST:
        tl.store(target_at, 0.0)


def grid(n: int) -> tuple[int]:
    """Return the programs for a chunk of n rows."""
    return (n,)


def configs(target: Target, dtype: str) -> list[Config]:
    """The tuning space: 8 elements a thread, then 16: enough loads in flight, no register short. Default first."""
    return [
        Config({"BLOCK": block}, threads // target.warp_size)
        for block, threads in ((2048, 256), (2048, 128), (4096, 512))
    ]


def variants(target: Target, dtype: str) -> list[Variant]:
    """Return every signature; `dtype` is the operands'. A first chunk of float32 logits, with all options of a head
    (without a bias, whose dtype is the head's, it is the same for all, and listed once); a first and a later one
    in that dtype."""
    signature = {
        "logits": TYPES[dtype], "targets": "*i64", "bias": "constexpr", "stats": "*fp32",
        "columns": "i32", "width": "i32", "start": "i32", "stride": "i32", "stride_stats": "i32",
        "scale": "fp32", "softcap": "fp32",
        "HAS_BIAS": "constexpr", "HAS_SOFTCAP": "constexpr", "FIRST": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    aligned = ("logits", "width", "stride")

    def variant(name: str, logits: str, bias: bool, softcap: bool, first: bool = True) -> Variant:
        types = {"logits": logits} | ({"bias": TYPES[dtype]} if bias else {})
        flags = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "FIRST": first} | ({} if bias else {"bias": None})
        given = (*aligned, "bias") if bias else aligned
        return Variant(name, logsumexp_gather, signature | types, flags, given, memory_bound=True)

    found = [
        variant("float32 logits" + extras, "*fp32", bias, softcap)
        for extras, bias, softcap in HEADS
        if bias or dtype == "fp32"
    ]
    if dtype != "fp32":
        found.append(variant("first", TYPES[dtype], False, False))
    return [*found, variant("later", TYPES[dtype], False, False, first=False)]
