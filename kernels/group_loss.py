"""The losses of groups and the coefficients of their gradients from per-token log-probs, in one launch.

    s_k = Σ_t ℓ_t over candidate k's tokens              sequence log-prob
    r_k = beta_pi · (s_k − s_k^ref),   log q = log_softmax_k(r)
    p   = softmax(reward / beta_r), or (PREF) (1 − ε) / m for each of m that share the highest reward and
          ε / (K − m) for each other, 1 / K if m = K
    EXO L = Σ q (log q − log p),   ∂L/∂s_k = beta_pi · q_k (log q_k − log p_k − L)
    DPO L = −Σ p log q,            ∂L/∂s_k = beta_pi · (q_k − p_k)

Definitions: `exo_fast.reference`; the closed forms: `exo_fast.closed_form`. Everything is float32. DPO reads p and EXO
log p, never the other, so that ε = 0 (plain DPO, log p = −inf) meets no 0 · ∞.

Sums: each lane of a (BLOCK_K, BLOCK_T) tile adds every BLOCK_T-th token of its candidate and keeps the rounding
error (Knuth's TwoSum); lanes then meet in one fixed tree. So the relative error of a sum is at most about
log2(BLOCK_T) · 2⁻²⁴ < 1e-6 whatever its length, and the same input gives the same bits.

Grid: (groups,), one program a group; no program needs another's numbers. A chunk of groups is finished on its own by
`first_group` and a grid of its size: the pointers are the whole batch's, and cu_seqlens holds offsets into the whole
of `logps`. K is a constexpr from 2 to 64.

Bytes: 4·N read and, with WRITE_TOKENS, 4·N written; 24·G·K for the rest. Flops: 7·N. Some microseconds of latency
beside a vocabulary product of 2·N·D·V flops, so it is neither memory nor compute bound and its tuning space is small.
"""

import triton
import triton.language as tl

from exo_fast.kernels.launch import Config, Variant
from exo_fast.kernels.targets import Target


@triton.jit
def log_softmax(x, valid):
    """Return log_softmax of the valid lanes of a vector; −inf in the others."""
    x = tl.where(valid, x, float("-inf"))
    x -= tl.max(x, axis=0)
    return x - tl.log(tl.sum(tl.exp(x), axis=0))


@triton.jit(do_not_specialize=["first_group"], do_not_specialize_on_alignment=["cu_seqlens", "ref_logps", "rewards"])
def group_loss(
    logps,  # (N,) float32
    cu_seqlens,  # (G·K + 1,) int32 or int64
    ref_logps,  # (G, K) float32
    rewards,  # (G, K) float32
    losses,  # (G,) float32, written
    policy_logps,  # (G, K) float32, written: s
    coefficients,  # (G, K) float32, written: upstream · ∂L/∂s
    token_coefficients,  # (N,) float32, written with WRITE_TOKENS: the coefficient of each token's candidate
    first_group,
    beta_pi,
    beta_r,
    label_smoothing,
    upstream,  # float32 factor on the coefficients: 1 / G for the mean over groups
    CANDIDATES: tl.constexpr,  # K
    BLOCK_K: tl.constexpr,  # K rounded up to a power of two
    EXO: tl.constexpr,
    PREF: tl.constexpr,
    WRITE_TOKENS: tl.constexpr,
    TILE: tl.constexpr,  # lanes, BLOCK_K · BLOCK_T
):
    BLOCK_T: tl.constexpr = TILE // BLOCK_K
    group = (first_group + tl.program_id(0)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    t = tl.arange(0, BLOCK_T)
    valid = k < CANDIDATES
    sequence = group * CANDIDATES + k

    start = tl.load(cu_seqlens + sequence, mask=valid, other=0).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1, mask=valid, other=0) - start).to(tl.int32)
    longest = tl.max(length, axis=0)
    ref = tl.load(ref_logps + sequence, mask=valid, other=0.0)
    reward = tl.load(rewards + sequence, mask=valid, other=float("-inf"))

    high = tl.zeros([BLOCK_K, BLOCK_T], dtype=tl.float32)
    low = tl.zeros([BLOCK_K, BLOCK_T], dtype=tl.float32)
    for first in range(0, longest, BLOCK_T):
        inside = (first + t)[None, :] < length[:, None]
        x = tl.load(logps + start[:, None] + (first + t)[None, :], mask=inside, other=0.0)
        total = high + x
        added = total - high
        low += (high - (total - added)) + (x - added)
        high = total
    s = tl.sum(high, axis=1) + tl.sum(low, axis=1)

    log_q = log_softmax(beta_pi * (s - ref), valid)
    q = tl.exp(log_q)
    log_q = tl.where(valid, log_q, 0.0)
    if PREF:
        best = reward == tl.max(reward, axis=0)  # lanes beyond K have reward −inf, so are not best
        tied = tl.sum(best.to(tl.float32), axis=0)
        others = CANDIDATES - tied
        mass = tl.where(others > 0, 1.0 - label_smoothing, 1.0)
        p = tl.where(best, mass / tied, label_smoothing / tl.maximum(others, 1.0))  # beyond K: finite, and q is 0
        one = tl.where(best, 1.0 - label_smoothing, label_smoothing / (CANDIDATES - 1))
        p = tl.where(tied == 1, one, p)  # exact, however `/` rounds
    else:
        log_p = log_softmax(reward / beta_r, valid)
        p = tl.exp(log_p)
        log_p = tl.where(valid, log_p, 0.0)
    if EXO:
        if PREF:
            log_p = tl.log(p)
        gap = log_q - log_p
        loss = tl.sum(q * gap, axis=0)
        slope = q * (gap - loss)
    else:
        loss = -tl.sum(p * log_q, axis=0)
        slope = q - p
    coefficient = upstream * beta_pi * slope

    tl.store(losses + group, loss)
    tl.store(policy_logps + sequence, s, mask=valid)
    tl.store(coefficients + sequence, coefficient, mask=valid)
    if WRITE_TOKENS:
        values = tl.broadcast_to(coefficient[:, None], [BLOCK_K, BLOCK_T])
        for first in range(0, longest, BLOCK_T):
            inside = (first + t)[None, :] < length[:, None]
            tl.store(token_coefficients + start[:, None] + (first + t)[None, :], values, mask=inside)


def configs(target: Target, dtype: str) -> list[Config]:
    """Return the tuning space, default first. At most 16 lanes a thread: with more, the masks of K = 64 spill."""
    wide = 8 if target.warp_size == 64 else 16
    return [Config({"TILE": 2048}, 4), Config({"TILE": 1024}, 4), Config({"TILE": 4096}, wide)]


def variants(target: Target, dtype: str) -> list[Variant]:
    """Return every signature the backend launches. Tensors are float32 whatever the head's dtype: listed under fp32."""
    if dtype != "fp32":
        return []
    found = []
    for candidates, write_tokens in ((2, True), (2, False), (3, False), (64, True)):
        for loss_type in ("exo-pref", "exo-rw", "dpo-pref", "dpo-rw"):
            constants = {
                "CANDIDATES": candidates,
                "BLOCK_K": triton.next_power_of_2(candidates),
                "EXO": loss_type.startswith("exo"),
                "PREF": loss_type.endswith("-pref"),
                "WRITE_TOKENS": write_tokens,
            }
            made = ("logps", "losses", "policy_logps", "coefficients", "token_coefficients")  # the backend's: aligned
            signature = {
                **dict.fromkeys((*made, "ref_logps", "rewards"), "*fp32"),
                "cu_seqlens": "*i32" if candidates == 3 else "*i64",
                "first_group": "i32",
                **dict.fromkeys(("beta_pi", "beta_r", "label_smoothing", "upstream"), "fp32"),
                **dict.fromkeys((*constants, "TILE"), "constexpr"),
            }
            order = {name: signature[name] for name in group_loss.arg_names}
            found.append(
                Variant(
                    f"{loss_type} K{candidates}" + " tokens" * write_tokens, group_loss, order, constants, aligned=made
                )
            )
    return found
