"""Hidden states × head, fused with the logsumexp and the target's logit: logits never reach memory.

    a = H Wᵀ + b,  z = softcap(a)·scale,  shift = max_v z_v,  sum = Σ_v exp(z_v − shift),  target = z[y]

H is (N, D), W (V, D). A program owns BLOCK_N rows and one of `splits` ranges of the vocabulary. It walks its range
in blocks of BLOCK_V columns: a product over D on the tensor cores leaves a tile of logits in float32 registers (tensor
memory on sm_100), and only its row maxima, sums and targets outlive it. `merge` then adds the splits in order, so that
few rows still fill the chip and the same input gives the same bits.

With STORE the tile also leaves a trace: U = exp(z − shift)·softcap′ in the dtype of the head, the operand of both
gradient products (`backends/triton.py`). Its shift must then be known beforehand: `target_shift` takes the target's own
logit, which makes sum = 1/p_y. `merge` flags a row whose sum passes OVERFLOW (p_y < 1e-26), and two further launches
find its exact maximum and make it again. They return at once if no row is flagged, so the host never has to look.

The loop over the vocabulary and the loop over D are one loop for the compiler (`flatten`): the copies of the next block
are under way while a block is in its exponentials.

Flops: 2·N·D·V. Bytes: the operands; through L2 every program reads BLOCK_N + BLOCK_V rows of D for a tile, and GROUP
row blocks walk the vocabulary side by side, so W comes from memory N / (GROUP·BLOCK_N) times and H once. Bytes of
logits: 0, or 2·N·V written with STORE. Partial results: 12·N·splits.
Grid: (row blocks · splits,). `merge`: (N / 16,). `target_shift`: (N,), 4·N·D bytes.

Operands come through tensor descriptors (TMA) if the target has them and rows are multiples of 16 bytes. Other rows
(D = 30) come through pointers without alignment, in one small configuration, POINTERS, on such a target. float32
operands are multiplied at `Target.float32_product`.
"""

import functools

import triton
import triton.language as tl

from exo_fast.kernels import tuned
from exo_fast.kernels.launch import HEADS, TYPES, Config, Variant
from exo_fast.kernels.logits import finish, slope
from exo_fast.kernels.targets import Target

OVERFLOW = 1e26  # sums of U·W stay far below float32's largest number
FLOOR = tl.constexpr(-3.4028234663852886e38)  # a finite start, since −inf − (−inf) would be nan
GROUP = 16  # row blocks that share a walk over the vocabulary
MERGE_ROWS = 16
MERGE = Config({"ROWS": MERGE_ROWS, "SPLITS": 32}, num_warps=4)
TARGET_SHIFT = Config({"BLOCK_D": 1024}, num_warps=2)  # 128 bits a thread in warps of 32 and of 64
POINTERS = Config({"BLOCK_N": 64, "BLOCK_V": 32, "BLOCK_D": 32, "PIECE": 32}, num_warps=4, num_stages=2)
WAVES = 32  # at most this many programs for each multiprocessor


@triton.jit
def operand(
    matrix, first, length, start, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr
):  # fmt: skip
    """Load rows [first, first + ROWS), columns [start, start + COLUMNS) of a (length, width) matrix; 0 past `width`."""
    if DESCRIPTORS:
        return matrix.load([first, start])
    else:
        rows = tl.minimum(first + tl.arange(0, ROWS), length - 1).to(tl.int64)
        columns = start + tl.arange(0, COLUMNS)
        return tl.load(matrix + rows[:, None] * stride + columns[None, :], mask=columns[None, :] < width, other=0.0)


@triton.jit
def raw_tile(
    left, right, first_left, first_right, n_left, n_right, width, stride_left, stride_right,
    BLOCK_LEFT: tl.constexpr, BLOCK_RIGHT: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Return (BLOCK_LEFT, BLOCK_RIGHT) of left · rightᵀ in float32."""
    tile = tl.zeros((BLOCK_LEFT, BLOCK_RIGHT), tl.float32)
    for start in tl.range(0, width, BLOCK_D):
        a = operand(left, first_left, n_left, start, width, stride_left, BLOCK_LEFT, BLOCK_D, DESCRIPTORS)
        b = operand(right, first_right, n_right, start, width, stride_right, BLOCK_RIGHT, BLOCK_D, DESCRIPTORS)
        tile = tl.dot(a, b.T, tile, input_precision=PRECISION)
    return tile


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def absorb(
    z, start, first, n, target, bias, kept, vocab, stride_kept, scale, softcap, top, total, picked,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    STORE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add raw products of some columns to the statistics of their rows, and store U."""
    columns = start + tl.arange(0, COLUMNS)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=columns < vocab, other=0.0).to(tl.float32)[None, :]
    z = finish(z, scale, softcap, HAS_SOFTCAP)
    # Few blocks hold a target of the rows: only these pay for the comparison.
    if tl.max(((target >= start) & (target < start + COLUMNS)).to(tl.int32), 0) > 0:
        picked += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
    z = tl.where((columns < vocab)[None, :], z, float("-inf"))
    if STORE:
        e = tl.exp(z - top[:, None])
        total += tl.sum(e, 1)
        if HAS_SOFTCAP:
            e *= tl.where((columns < vocab)[None, :], slope(z, scale, softcap), 0.0)
        # Columns of the padding are written too, as zeros: whole 128-bit stores.
        if DESCRIPTORS:
            kept.store([first, start], e.to(kept.dtype))
        else:
            rows = first + tl.arange(0, ROWS)
            places = kept + rows.to(tl.int64)[:, None] * stride_kept + columns[None, :]
            tl.store(places, e.to(kept.dtype.element_ty), mask=(rows < n)[:, None] & (columns < stride_kept)[None, :])
    else:
        above = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - above) + tl.sum(tl.exp(z - above[:, None]), 1)
        top = above
    return top, total, picked


@triton.jit
def exact_shift(shift, partial, flags, n, splits, rows, inside):
    """Return the shift, but the row's maximum if the row is flagged: the launch before left that of each split."""
    top = tl.full(rows.shape, FLOOR, tl.float32)
    for split in range(splits):
        part = tl.load(partial + tl.cast(split, tl.int64) * n + rows, mask=inside, other=0.0)
        top = tl.maximum(top, part)
    return tl.where(tl.load(flags + rows, mask=inside, other=0) > 0, top, shift)


# One binary for any number of rows and any start of a chunk: nothing else is compiled during training.
@triton.jit(do_not_specialize=["n", "vocab", "splits"], do_not_specialize_on_alignment=["targets", "shift", "flags"])
def linear_logsumexp(
    hidden,  # (N, D), or its descriptor
    weight,  # (V, D), or its descriptor
    bias,  # (V,)
    targets,  # (N,) int64; −1 has no target
    shift,  # (N,) float32, read with STORE
    flags,  # (N,) int32, read with FLAGGED
    partial,  # (3, splits, N) float32: maxima (written without STORE, read with STORE and FLAGGED), sums, target logits
    kept,  # (N, stride_kept), written with STORE
    n, vocab, width, stride_hidden, stride_weight, stride_kept, splits, scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PIECE: tl.constexpr,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, STORE: tl.constexpr, FLAGGED: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    # GROUP row blocks × all splits are neighbours in the launch order.
    row_blocks = tl.cdiv(n, BLOCK_N)
    group = tl.program_id(0) // (GROUP * splits)
    members = tl.minimum(row_blocks - group * GROUP, GROUP)
    member = tl.program_id(0) % (GROUP * splits)
    first = (group * GROUP + member % members) * BLOCK_N
    split = member // members

    rows = first + tl.arange(0, BLOCK_N)
    inside = rows < n
    if FLAGGED:
        if tl.max(tl.load(flags + rows, mask=inside, other=0), 0) == 0:
            return
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    picked = tl.zeros((BLOCK_N,), tl.float32)
    if STORE:
        # U of a row without a target is 0, whatever its shift: one that lies far below the row would make it infinite.
        top = tl.where(target >= 0, tl.load(shift + rows, mask=inside, other=0.0), -FLOOR)
    else:
        top = tl.full((BLOCK_N,), FLOOR, tl.float32)
    if STORE and FLAGGED:
        top = exact_shift(top, partial, flags, n, splits, rows, inside)

    blocks = tl.cdiv(vocab, BLOCK_V)
    tl.assume(width > 0)  # else a block without products would have an epilogue of its own
    for block in tl.range(split * blocks // splits, (split + 1) * blocks // splits, flatten=FLATTEN):
        start = block * BLOCK_V
        z = raw_tile(
            hidden, weight, first, start, n, vocab, width, stride_hidden, stride_weight,
            BLOCK_N, BLOCK_V, BLOCK_D, PRECISION, DESCRIPTORS,
        )  # fmt: skip
        # In pieces, so that only a piece's exponentials are live beside the tile, not the whole tile's.
        if PIECE == BLOCK_V:
            top, total, picked = absorb(
                z, start, first, n, target, bias, kept, vocab, stride_kept, scale, softcap, top, total, picked,
                BLOCK_N, PIECE, HAS_BIAS, HAS_SOFTCAP, STORE, DESCRIPTORS,
            )  # fmt: skip
        else:
            parts = halves(z, BLOCK_N, BLOCK_V)
            for side in tl.static_range(2):
                half_start = start + side * (BLOCK_V // 2)
                if PIECE == BLOCK_V // 2:
                    top, total, picked = absorb(
                        parts[side], half_start, first, n, target, bias, kept, vocab, stride_kept, scale, softcap,
                        top, total, picked, BLOCK_N, PIECE, HAS_BIAS, HAS_SOFTCAP, STORE, DESCRIPTORS,
                    )  # fmt: skip
                else:
                    quarters = halves(parts[side], BLOCK_N, BLOCK_V // 2)
                    for place in tl.static_range(2):
                        top, total, picked = absorb(
                            quarters[place], half_start + place * PIECE, first, n, target, bias, kept, vocab,
                            stride_kept, scale, softcap, top, total, picked,
                            BLOCK_N, PIECE, HAS_BIAS, HAS_SOFTCAP, STORE, DESCRIPTORS,
                        )  # fmt: skip

    partial += split.to(tl.int64) * n + rows
    plane = tl.cast(splits, tl.int64) * n
    if not STORE:
        tl.store(partial, top, mask=inside)
    tl.store(partial + plane, total, mask=inside)
    tl.store(partial + 2 * plane, picked, mask=inside)


@triton.jit(
    do_not_specialize=["n", "splits", "stride_stats", "stride_kept"],
    do_not_specialize_on_alignment=["targets", "stats", "logps", "flags", "residual"],
)
def merge(
    partial,  # (3, splits, N)
    targets,  # (N,)
    stats,  # rows shift, sum, target of (3, ·) float32, `stride_stats` apart
    logps,  # (N,), log-prob of the target, 0 where it is −1
    flags,  # (N,) int32, written with STORE, read with FLAGGED
    kept,  # (N, stride_kept), receives U at the target with STORE
    residual,  # (N,) float32, written with STORE: the rounding error of U at the target
    n, splits, stride_stats, stride_kept, scale, softcap,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, STORE: tl.constexpr, FLAGGED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    OVERFLOW: tl.constexpr,
):  # fmt: skip
    """Add the splits of a row, SPLITS at a time: always in the same order. With FLAGGED, the shift of a flagged row
    becomes its maximum. All rows are merged again: others in its block lost the entry at their target."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    plane = tl.cast(splits, tl.int64) * n
    total = tl.zeros((ROWS,), tl.float32)
    picked = tl.zeros((ROWS,), tl.float32)
    if STORE:
        top = tl.load(stats + rows, mask=inside, other=0.0)
        if FLAGGED:
            top = exact_shift(top, partial, flags, n, splits, rows, inside)
    else:
        top = tl.full((ROWS,), FLOOR, tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        some = (split < splits)[:, None] & inside[None, :]
        place = partial + split.to(tl.int64)[:, None] * n + rows[None, :]
        part = tl.load(place + plane, mask=some, other=0.0)
        picked += tl.sum(tl.load(place + 2 * plane, mask=some, other=0.0), 0)
        if STORE:
            total += tl.sum(part, 0)
        else:
            part_top = tl.load(place, mask=some, other=FLOOR)
            above = tl.maximum(top, tl.max(part_top, 0))
            total = total * tl.exp(top - above) + tl.sum(part * tl.exp(part_top - above[None, :]), 0)
            top = above
    target = tl.load(targets + rows, mask=inside, other=-1)
    real = inside & (target >= 0)
    if STORE:
        total = tl.where(target >= 0, total, 1.0)
    tl.store(stats + rows, top, mask=inside)
    tl.store(stats + stride_stats + rows, total, mask=inside)
    tl.store(stats + 2 * stride_stats + rows, picked, mask=inside)
    # A log-prob is never positive; rounding of the shift could make it positive by one part in 10⁷.
    logp = tl.minimum(picked - top - tl.log(total), 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(logps + rows, tl.where(target >= 0, logp, 0.0), mask=inside)
    if STORE:
        tl.store(flags + rows, tl.where(total < OVERFLOW, 0, 1), mask=inside)
        entry = tl.exp(picked - top) - total
        if HAS_SOFTCAP:
            entry *= slope(picked, scale, softcap)
        rounded = entry.to(kept.dtype.element_ty)
        tl.store(kept + rows.to(tl.int64) * stride_kept + target, rounded, mask=real)
        tl.store(residual + rows, tl.where(real, entry - rounded.to(tl.float32), 0.0), mask=inside)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["targets", "stats"])
def target_shift(
    hidden, weight, bias, targets, stats, n, width, stride_hidden, stride_weight, scale, softcap,
    BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Set stats[0, row] = z[y], one dot product of D a row: the shift of U. A row with target −1 takes token 0's."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.maximum(tl.load(targets + row), 0)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, width, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + row * stride_hidden + columns, mask=columns < width, other=0.0)
        w = tl.load(weight + target * stride_weight + columns, mask=columns < width, other=0.0)
        total += h.to(tl.float32) * w.to(tl.float32)
    z = tl.sum(total, 0)
    if HAS_BIAS:
        z += tl.load(bias + target).to(tl.float32)
    tl.store(stats + row, finish(z, scale, softcap, HAS_SOFTCAP))


def config(target: Target, dtype: str, width: int, store: bool = False) -> Config:
    """Return the configuration of the target's table (`kernels/tuned/`), or else the static default."""
    found = tuned.config(target, "linear_logsumexp", dtype, width, configs(target, dtype), store)
    return rule(target, dtype, width) if found is None else found


def rule(target: Target, dtype: str, width: int) -> Config:
    """Return the static default: large tiles if the product dominates; if D is short, two smaller programs on a
    multiprocessor, one in its product while the other is in its exponentials. On sm_100 tensor memory holds the tile
    and leaves registers for two programs at any D."""
    return configs(target, dtype)[0 if width >= 2048 or target.name == "sm_100" else 1]


def configs(target: Target, dtype: str) -> list[Config]:
    """Return the tuning space: the first entry is the default for wide heads, the second for narrow ones."""
    space = _FLOAT32 if dtype == "fp32" else _HALF
    made = [
        Config({"BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d, "PIECE": piece}, warps, stages)
        for n, v, d, piece, warps, stages in space[target.name]
    ]
    # Configurations that do not fit are pruned here, not found by a failing launch.
    return [c for c in made if shared_memory(c, target, 4 if dtype == "fp32" else 2) <= target.shared_memory]


def splits(target: Target, n: int, vocab: int, config: Config) -> int:
    """Return the number of ranges of the vocabulary with which n rows take the least time."""
    row_blocks, column_blocks = -(-n // config.constants["BLOCK_N"]), -(-vocab // config.constants["BLOCK_V"])
    return fastest_splits(target.multiprocessors, row_blocks, column_blocks)


@functools.lru_cache(4096)  # a step asks for the same sizes again and again
def fastest_splits(multiprocessors: int, row_blocks: int, column_blocks: int) -> int:
    """Count the time in blocks that one multiprocessor computes after another. A program costs a block more, for its
    start and its last exponentials. Of equal times the smallest number is taken."""

    def time(number: int) -> int:
        return -(-row_blocks * number // multiprocessors) * (-(-column_blocks // number) + 1)

    most = max(1, WAVES * multiprocessors // row_blocks)
    return min(range(1, min(column_blocks, most) + 1), key=time)


def shared_memory(config: Config, target: Target, itemsize: int) -> int:
    """Return the bytes of the operand tiles in flight and, with descriptors, of the piece being stored."""
    c = config.constants
    # Without asynchronous products the stage being multiplied is already in registers.
    stages = config.num_stages if target.descriptors else max(config.num_stages - 1, 1)
    out = c["BLOCK_N"] * c["PIECE"] if target.descriptors else 0
    return ((c["BLOCK_N"] + c["BLOCK_V"]) * c["BLOCK_D"] * stages + out) * itemsize


# BLOCK_N, BLOCK_V, BLOCK_D, PIECE, warps, stages
_HALF = {
    "sm_80": [(128, 128, 64, 64, 8, 3), (64, 128, 64, 64, 4, 3), (128, 128, 32, 64, 8, 4)],
    "sm_90": [(128, 256, 64, 64, 8, 4), (128, 128, 64, 32, 4, 3), (256, 128, 64, 32, 8, 4), (128, 128, 64, 64, 8, 4)],
    "sm_100": [(128, 128, 64, 32, 4, 3), (128, 128, 64, 32, 4, 4)],
    "sm_120": [(128, 128, 64, 64, 8, 2), (128, 128, 32, 32, 4, 3), (64, 128, 64, 64, 4, 2)],
    "gfx942": [(128, 256, 32, 128, 8, 2), (64, 128, 64, 64, 4, 2), (128, 128, 64, 64, 8, 2)],
    "gfx1100": [(128, 128, 16, 64, 8, 2), (128, 64, 32, 64, 8, 2)],
}
_FLOAT32 = {
    "sm_80": [(128, 64, 32, 64, 8, 3), (64, 64, 32, 64, 4, 3)],
    "sm_90": [(128, 128, 32, 32, 8, 3), (128, 64, 32, 32, 4, 3), (64, 64, 32, 64, 4, 3)],
    "sm_100": [(128, 64, 16, 32, 4, 4), (64, 64, 32, 32, 4, 3)],
    "sm_120": [(64, 64, 32, 32, 4, 3), (64, 64, 32, 32, 4, 2)],
    "gfx942": [(128, 128, 32, 64, 8, 2), (64, 64, 32, 64, 4, 2)],
    "gfx1100": [(64, 64, 16, 64, 8, 1), (32, 32, 32, 32, 4, 1)],
}


def variants(target: Target, dtype: str) -> list[Variant]:
    """Return every signature the backend launches; U is stored for bf16 only."""
    pointer = TYPES[dtype]
    product = {
        "hidden": pointer, "weight": pointer, "bias": pointer, "targets": "*i64", "shift": "*fp32", "flags": "*i32",
        "partial": "*fp32", "kept": pointer, "n": "i32", "vocab": "i32", "width": "i32", "stride_hidden": "i32",
        "stride_weight": "i32", "stride_kept": "i32", "splits": "i32", "scale": "fp32", "softcap": "fp32",
    }  # fmt: skip
    aligned = ("hidden", "weight", "bias", "partial", "kept", "width", "stride_hidden", "stride_weight", "stride_kept")
    made = []
    for store, flagged in [(False, False)] + ([(True, False), (False, True), (True, True)] if dtype == "bf16" else []):
        for extras, bias, softcap in HEADS:
            flags = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "STORE": store, "FLAGGED": flagged}
            words = ("store" if store else "logsumexp") + " flagged" * flagged
            constants = {**flags, "GROUP": GROUP, "PRECISION": precision(target, dtype), "FLATTEN": flatten(target)}
            signature = dict(product)
            if target.descriptors:
                made.append(
                    Variant(
                        name=words + " unaligned" + extras,
                        kernel=linear_logsumexp,
                        signature=product,
                        constants={**constants, "DESCRIPTORS": False},
                        aligned=("partial", "kept", "stride_kept"),
                        products=True,
                        config=POINTERS,
                    )
                )
                signature["hidden"] = f"tensordesc<{dtype}[BLOCK_N,BLOCK_D]>"
                signature["weight"] = f"tensordesc<{dtype}[BLOCK_V,BLOCK_D]>"
                signature["kept"] = f"tensordesc<{dtype}[BLOCK_N,PIECE]>" if store else pointer
            made.append(
                Variant(
                    name=words + extras,
                    kernel=linear_logsumexp,
                    signature=signature,
                    constants={**constants, "DESCRIPTORS": target.descriptors},
                    aligned=aligned,
                    products=True,
                    descriptors=target.descriptors,
                    # On sm_100 the three products of a float32 one wait for one another at barriers of their own.
                    flattened=target.descriptors and (dtype, target.name) != ("fp32", "sm_100"),
                )
            )
    made += [
        Variant(
            name="merge" + " store" * store + " flagged" * flagged + " softcap" * softcap,
            kernel=merge,
            signature={
                "partial": "*fp32", "targets": "*i64", "stats": "*fp32", "logps": "*fp32", "flags": "*i32",
                "kept": pointer, "residual": "*fp32", "n": "i32", "splits": "i32", "stride_stats": "i32",
                "stride_kept": "i32", "scale": "fp32", "softcap": "fp32",
            },
            constants={
                "STORE": store, "FLAGGED": flagged, "HAS_SOFTCAP": softcap, "OVERFLOW": OVERFLOW,
            },
            aligned=("partial", "kept"),
            config=MERGE,
        )
        for store, flagged in [(False, False)] + ([(True, False), (True, True)] if dtype == "bf16" else [])
        for softcap in (False, True)
    ]  # fmt: skip
    if dtype == "bf16":
        made += [
            Variant(
                name="target shift" + extras,
                kernel=target_shift,
                signature={
                    "hidden": pointer, "weight": pointer, "bias": pointer, "targets": "*i64", "stats": "*fp32",
                    "n": "i32", "width": "i32", "stride_hidden": "i32", "stride_weight": "i32", "scale": "fp32",
                    "softcap": "fp32",
                },
                constants={"HAS_BIAS": bias, "HAS_SOFTCAP": softcap},
                aligned=("hidden", "weight", "bias", "width", "stride_hidden", "stride_weight"),
                memory_bound=True,
                config=TARGET_SHIFT,
            )
            for extras, bias, softcap in HEADS
        ]  # fmt: skip
    return made


def flatten(target: Target) -> bool:
    """Return whether the loops over the vocabulary and D become one. AMD's compiler would take a third more shared
    memory for it, which does not fit."""
    return target.backend == "cuda"


def precision(target: Target, dtype: str) -> str:
    """Return `input_precision` of the products."""
    return target.float32_product if dtype == "fp32" else "ieee"
