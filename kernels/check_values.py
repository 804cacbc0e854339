"""The checks of the values of a call's arguments, in one launch: targets, boundaries, and the numbers of groups.

The host does not know values on a GPU, and reading them would wait for it. So this kernel reads them, and writes one
number, which `torch._assert_async` reads on the device. The same checks with torch's operators, and the words of the
errors: `exo_fast.validate`.

    targets      each in [0, V), or ignore_index. With WRITE the kernel also writes them as the backends take them:
                 int64, −1 where ignored.
    boundaries   from 0 to N, and each sequence has a token
    groups       each log-prob and reward is finite; with RATIOS reward / beta_r too; with UNTIED each group has one
                 highest reward

Grid: (1,). One program reads everything, so that no second launch has to join the answers of several. Bytes: 8·N, and
8·N written with WRITE; 16·G·K. Some microseconds of latency beside a vocabulary product.
"""

import triton
import triton.language as tl

from exo_fast.kernels.launch import Config, Variant
from exo_fast.kernels.targets import Target

CONFIG = Config({"BLOCK": 4096}, 8)
FAULT = "a value of targets, cu_seqlens, ref_logps or rewards is wrong"


@triton.jit
def infinite(x):
    """Return where x is not a finite number."""
    return ~(tl.abs(x) < float("inf"))  # false for nan too


@triton.jit(
    do_not_specialize=["n", "vocab", "ignore_index", "groups"],
    do_not_specialize_on_alignment=["targets", "cu_seqlens", "ref_logps", "rewards"],
)
def check_values(
    targets,  # (N,) int32 or int64
    wanted,  # (N,) int64, written with WRITE
    cu_seqlens,  # (G·K + 1,) int32 or int64
    ref_logps,  # (G, K) float32, bf16 or float16
    rewards,  # (G, K) float32, bf16 or float16
    good,  # () int32, written: 1 if every value is right, else 0
    n,
    vocab,
    ignore_index,
    groups,
    beta_r,
    CANDIDATES: tl.constexpr,  # K
    BLOCK_K: tl.constexpr,  # K rounded up to a power of two
    IGNORES: tl.constexpr,  # ignore_index is allowed
    WRITE: tl.constexpr,
    HAS_BOUNDARIES: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    RATIOS: tl.constexpr,
    UNTIED: tl.constexpr,
    BLOCK: tl.constexpr,  # lanes
):
    lane = tl.arange(0, BLOCK)
    wrong = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, n, BLOCK):
        row = first + lane
        valid = row < n
        y = tl.load(targets + row, mask=valid, other=0).to(tl.int64)
        inside = (y >= 0) & (y < vocab)
        if IGNORES:
            ignored = y == ignore_index
            inside |= ignored
            y = tl.where(ignored, -1, y)
        if WRITE:
            tl.store(wanted + row, y, mask=valid)
        wrong |= (valid & ~inside).to(tl.int32)
    if HAS_BOUNDARIES:
        sequences = groups * CANDIDATES
        for first in range(0, sequences, BLOCK):
            sequence = first + lane
            valid = sequence < sequences
            start = tl.load(cu_seqlens + sequence, mask=valid, other=0).to(tl.int64)
            stop = tl.load(cu_seqlens + sequence + 1, mask=valid, other=1).to(tl.int64)
            off = ((sequence == 0) & (start != 0)) | ((sequence == sequences - 1) & (stop != n))
            wrong |= (valid & (off | (start >= stop))).to(tl.int32)  # compared, because a difference can wrap around
    found = tl.max(wrong, axis=0)
    if HAS_GROUPS:
        ROWS: tl.constexpr = BLOCK // BLOCK_K if BLOCK_K < BLOCK else 1
        k = tl.arange(0, BLOCK_K)[None, :]
        for first in range(0, groups, ROWS):
            group = (first + tl.arange(0, ROWS))[:, None]
            valid = (group < groups) & (k < CANDIDATES)
            place = group * CANDIDATES + k
            ref = tl.load(ref_logps + place, mask=valid, other=0.0).to(tl.float32)
            reward = tl.load(rewards + place, mask=valid, other=0.0).to(tl.float32)
            off = infinite(ref) | infinite(reward)
            if RATIOS:
                off |= infinite(reward / beta_r)
            if UNTIED:
                shown = tl.where(valid, reward, float("-inf"))
                best = valid & (shown == tl.max(shown, axis=1)[:, None])
                off |= (tl.sum(best.to(tl.int32), axis=1) > 1)[:, None]
            found |= tl.max(tl.max((valid & off).to(tl.int32), axis=1), axis=0)
    tl.store(good, 1 - found)


def configs(target: Target, dtype: str) -> list[Config]:
    """Return the one configuration, for one program of small inputs."""
    return [CONFIG]


def variants(target: Target, dtype: str) -> list[Variant]:
    """Return signatures of every public function. Only log-probs and rewards have a floating dtype, which is not the
    head's: all are listed under fp32."""
    if dtype != "fp32":
        return []
    found = []
    for name, targets, boundaries, groups, ratios, candidates in (
        ("logprobs", "*i64", None, None, False, 1),
        ("logprobs int32", "*i32", None, None, False, 1),
        ("loss", "*i64", "*i64", "*fp32", False, 2),
        ("loss int32", "*i32", "*i32", "*fp32", True, 64),
        ("loss, boundaries on the host", "*i64", None, "*bf16", False, 3),
    ):
        ignores = groups is None
        write = ignores or targets == "*i32"
        constants = {
            "CANDIDATES": candidates, "BLOCK_K": triton.next_power_of_2(candidates),
            "IGNORES": ignores, "WRITE": write, "HAS_BOUNDARIES": boundaries is not None,
            "HAS_GROUPS": groups is not None, "RATIOS": ratios, "UNTIED": groups is not None and not ratios,
        }  # fmt: skip
        pointers = {
            "targets": targets, "wanted": "*i64" if write else None, "cu_seqlens": boundaries, "ref_logps": groups,
            "rewards": groups, "good": "*i32",
        }  # fmt: skip
        numbers = {**dict.fromkeys(("n", "vocab", "ignore_index", "groups"), "i32"), "beta_r": "fp32"}
        missing = {pointer: None for pointer, kind in pointers.items() if kind is None}
        signature = {pointer: kind for pointer, kind in pointers.items() if kind is not None} | numbers
        made = ("good", "wanted") if write else ("good",)
        found.append(Variant(name, check_values, signature, constants | missing, aligned=made))
    return found
