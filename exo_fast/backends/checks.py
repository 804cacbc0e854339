"""The checks of values in tensors, where each kind of device has them cheapest.

On the CPU, and in a graph, the functions of `exo_fast.validate` check one thing after another, each with its own words.
On a GPU that would be some 30 launches before a step. There one kernel reads all values, and one assertion reads its
answer on the device (`kernels/check_values.py`): nothing waits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from exo_fast.reference import LossOptions
from exo_fast.validate import check_boundary_values, check_group_values, check_target_values, readable, traced


class Groups(NamedTuple):
    """The numbers of G groups of K candidates, with the options that say which numbers are right."""

    ref_logps: Tensor  # (G, K)
    rewards: Tensor  # (G, K)
    options: LossOptions
    ties: str

    @property
    def ratios(self) -> bool:
        """Return whether rewards are divided by beta_r."""
        return self.options.loss_type.endswith("-rw")

    @property
    def untied(self) -> bool:
        return not self.ratios and self.ties == "error"


def checked_targets(
    backend: str,
    targets: Tensor,
    vocab: int | Tensor,
    *,
    ignore_index: int | None = None,
    cu_seqlens: Tensor | None = None,
    groups: Groups | None = None,
) -> Tensor:
    """Check the values of targets (...), boundaries (G·K + 1,) and groups, of right shapes and dtypes. Return the
    targets as the operators take them: (N,) int64, −1 where ignored.

    A fault raises ValueError, or fails as an assertion (`exo_fast.validate`). The boundaries may be on the host.
    """
    flat = targets.reshape(-1)
    if not isinstance(vocab, Tensor) and _fused(backend, flat, groups):
        if cu_seqlens is not None and cu_seqlens.device != flat.device:
            check_boundary_values(cu_seqlens, len(flat))
            cu_seqlens = None
        renumbered = flat.dtype != torch.int64 or ignore_index is not None
        wanted = torch.empty_like(flat, dtype=torch.int64) if renumbered else None
        _launch(flat, wanted, vocab, ignore_index, cu_seqlens, groups)
        return flat if wanted is None else wanted
    if groups is not None:
        check_group_values(*groups)
    check_target_values(targets, vocab, ignore_index)
    if cu_seqlens is not None:
        check_boundary_values(cu_seqlens, len(flat))
    wanted = flat.long()
    return wanted if ignore_index is None else wanted.masked_fill(wanted == ignore_index, -1)


def _fused(backend: str, value: Tensor, groups: Groups | None) -> bool:
    """Return whether the kernel checks: on a GPU, in eager mode, but for float64, which it does not read."""
    values = [value] if groups is None else [value, groups.ref_logps, groups.rewards]
    return backend == "triton" and not any(readable(v) or traced(v) or v.dtype == torch.float64 for v in values)


def _launch(
    targets: Tensor,
    wanted: Tensor | None,
    vocab: int,
    ignore_index: int | None,
    cu_seqlens: Tensor | None,
    groups: Groups | None,
) -> None:
    """Launch the kernel and the assertion; `wanted` is written if given."""
    # Imported here, because this module must work without Triton.
    import triton

    from exo_fast.backends.triton import on
    from exo_fast.kernels import check_values as kernel
    from exo_fast.kernels.launch import launch

    given = (None, None) if groups is None else groups[:2]
    ref_logps, rewards = (None if value is None else value.contiguous() for value in given)
    count, candidates = (0, 1) if ref_logps is None else ref_logps.shape
    good = torch.empty((), dtype=torch.int32, device=targets.device)
    with on(targets.device):
        launch(
            kernel.check_values, (1,), kernel.CONFIG,
            targets=targets.contiguous(), wanted=wanted,
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(), ref_logps=ref_logps, rewards=rewards,
            good=good, n=len(targets), vocab=vocab, ignore_index=ignore_index or 0, groups=count,
            beta_r=1.0 if groups is None else float(groups.options.beta_r), CANDIDATES=candidates,
            BLOCK_K=triton.next_power_of_2(candidates), IGNORES=ignore_index is not None, WRITE=wanted is not None,
            HAS_BOUNDARIES=cu_seqlens is not None, HAS_GROUPS=groups is not None,
            RATIOS=groups is not None and groups.ratios, UNTIED=groups is not None and groups.untied,
        )  # fmt: skip
        torch._assert_async(good, f"{kernel.FAULT} (the same call with tensors on the CPU names it)")
