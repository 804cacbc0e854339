"""Kernels planted for certification to judge: clean ones, and one fault for each claim.

Not collected by pytest and not part of the package: `test_certify.py` gives this file's path to the command.
"""

import os
from dataclasses import replace

import triton
import triton.language as tl

from exo_fast.kernels.launch import Config, Variant
from exo_fast.kernels.targets import Target


@triton.jit
def copy(source, out, n, step: tl.constexpr, LENGTH: tl.constexpr):
    """out[i] = source[i·step]"""
    place = tl.program_id(0).to(tl.int64) * LENGTH + tl.arange(0, LENGTH)
    tl.store(out + place, tl.load(source + place * step, mask=place < n), mask=place < n)


@triton.jit
def product(
    a, b, out, width, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """One (BLOCK, BLOCK) tile of a · bᵀ; a and b have BLOCK rows."""
    rows, depth = tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    tile = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, width, DEPTH):
        if DESCRIPTORS:
            x, y = a.load([0, start]), b.load([0, start])
        else:
            x = tl.load(a + rows[:, None] * width + start + depth[None, :])
            y = tl.load(b + rows[:, None] * width + start + depth[None, :])
        tile = tl.dot(x, y.T, tile, input_precision=PRECISION)
    tl.store(out + rows[:, None] * BLOCK + rows[None, :], tile)


@triton.jit
def walk(a, b, out, width, blocks, BLOCK: tl.constexpr, DEPTH: tl.constexpr, FLATTEN: tl.constexpr):
    """Row sums of exponentials over blocks of a · bᵀ: the loop over D lies in the loop over blocks, or they are one."""
    total = tl.zeros((BLOCK,), tl.float32)
    tl.assume(width > 0)
    for block in tl.range(0, blocks, flatten=FLATTEN):
        tile = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in tl.range(0, width, DEPTH):
            tile = tl.dot(a.load([0, start]), b.load([block * BLOCK, start]).T, tile)
        total += tl.sum(tl.exp(tile), 1)
    tl.store(out + tl.arange(0, BLOCK), total)


@triton.jit
def total(source, out, BLOCK: tl.constexpr):
    """Adds source to out[0] in whatever order programs run."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out, tl.sum(tl.load(source + place), 0))


@triton.jit
def handed_over(source, out, length, ACROSS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds tiles in memory: each time along its rows, or stored along its columns and loaded along its rows."""
    rows = tl.arange(0, BLOCK)
    along = rows[:, None] * BLOCK + rows[None, :]
    across = rows[None, :] * BLOCK + rows[:, None]
    for _ in range(0, length):
        tile = tl.load(out + along) + tl.load(source + along)
        if ACROSS:
            tl.store(out + across, tile)
        else:
            tl.store(out + along, tile)


@triton.jit
def refused(out, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 0, "no block is that small")
    tl.store(out, BLOCK)


class Crash:
    """In the place of a kernel: ends the process that wants to compile it, as an abort inside the compiler does."""

    @property
    def arg_names(self) -> list[str]:
        os._exit(1)


def configs(target: Target, dtype: str) -> list[Config]:
    """The default is clean. The other, given for sm_120 only, holds 512 sums in the registers of each thread, and five
    stages of 32 KiB in 99 KiB of shared memory."""
    good = Config({"BLOCK": 64, "DEPTH": 32}, num_warps=4, num_stages=2)
    bad = Config({"BLOCK": 128, "DEPTH": 64}, num_warps=1, num_stages=5)
    return [good, bad] if target.name == "sm_120" else [good]


def copied(name: str, source: str, *aligned: str, step: int = 1, n: str = "i32") -> Variant:
    signature = {"source": source, "out": source, "n": n, "step": "constexpr", "LENGTH": "constexpr"}
    return Variant(name, copy, signature, {"step": step, "LENGTH": 2048}, aligned, memory_bound=True)


def added(name: str, *, across: bool) -> Variant:
    signature = {"source": "*fp32", "out": "*fp32", "length": "i32"}
    return Variant(name, handed_over, signature, {"ACROSS": across}, ("source", "out"))


def multiplied(name: str, operand: str, precision: str = "ieee", *, loads: bool, claims: bool) -> Variant:
    if loads:
        operand = f"tensordesc<{operand[1:]}[BLOCK,DEPTH]>"
    return Variant(
        name,
        product,
        {"a": operand, "b": operand, "out": "*fp32", "width": "i32"},
        {"PRECISION": precision, "DESCRIPTORS": loads},
        ("a", "b", "out", "width"),
        products=True,
        descriptors=claims,
    )


def walked(name: str, *, flatten: bool) -> Variant:
    loaded = "tensordesc<bf16[BLOCK,DEPTH]>"
    signature = {"a": loaded, "b": loaded, "out": "*fp32", "width": "i32", "blocks": "i32"}
    return Variant(name, walk, signature, {"FLATTEN": flatten}, ("out", "width"), products=True, flattened=True)


def variants(target: Target, dtype: str) -> list[Variant]:
    clean = multiplied("product", "*bf16", loads=target.descriptors, claims=target.descriptors)
    whole = copied("copy", "*bf16", "source", "out", "n")
    if dtype == "fp16" or (dtype == "fp32" and target.name != "sm_80"):
        return []
    if dtype == "fp32":
        fallback = multiplied("product without tensor cores", "*fp32", loads=False, claims=False)
        return [Variant("crash", Crash(), {}, {}), fallback]
    return {
        "sm_80": [
            clean,
            whole,
            copied("copy of every second", "*bf16", "source", "out", "n", step=2),
            replace(whole, name="copy by many", config=Config({}, num_warps=32)),
            copied("copy of any address", "*bf16"),
            copied("copy of a length of 64 bits", "*bf16", "source", "out", "n", n="i64"),
            Variant("sum by atomics", total, {"source": "*fp32", "out": "*fp32"}, {}),
            added("sum in one layout", across=False),
            added("sum in two layouts", across=True),
            Variant("refused", refused, {"out": "*fp32"}, {}),
        ],
        "sm_90": [
            clean,
            multiplied("product by pointers", "*bf16", loads=False, claims=True),
            walked("walk in one loop", flatten=True),
            walked("walk in two loops", flatten=False),
        ],
        "sm_100": [clean],
        "sm_120": [clean],
        "gfx942": [clean, whole, copied("copy of every second", "*bf16", "source", "out", "n", step=2)],
        "gfx1100": [clean],
    }[target.name]
