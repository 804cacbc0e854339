"""`merge` of any number of splits, in Triton's interpreter, against float64; and how many splits there are."""

import math

import pytest
import torch

pytest.importorskip("triton")

from exo_fast.backends import interpreted
from exo_fast.kernels import linear_logsumexp as kernel
from exo_fast.kernels.launch import launch
from exo_fast.kernels.targets import TARGETS

ROWS = 37


def merged(partial: torch.Tensor, targets: torch.Tensor, **stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return statistics (3, N) and log-probs (N,) from the partial results (3, splits, N)."""
    splits, n = partial.shape[1:]
    stats, logps = stored.pop("stats", torch.full((3, n), torch.nan)), torch.full((n,), torch.nan)
    launch(
        kernel.merge, (-(-n // kernel.MERGE_ROWS),), kernel.MERGE, partial=partial, targets=targets, stats=stats,
        logps=logps, flags=stored.get("flags"), kept=stored.get("kept"), residual=stored.get("residual"), n=n,
        splits=splits, stride_stats=n, stride_kept=stored["kept"].stride(0) if stored else 0, scale=1.0, softcap=0.0,
        STORE=bool(stored), FLAGGED="again" in stored, HAS_SOFTCAP=False, OVERFLOW=kernel.OVERFLOW,
    )  # fmt: skip
    return stats, logps


def parts(splits: int, vocab: int = 600) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits (N, vocab) in float64, targets (N,) and the logits' partial results (3, splits, N)."""
    g = torch.Generator().manual_seed(splits)
    logits = torch.randn(ROWS, vocab, generator=g) * 30
    logits[3] = 1e4 * torch.randn(vocab, generator=g)
    targets = torch.randint(vocab, (ROWS,), generator=g)
    targets[5] = -1
    partial = torch.zeros(3, splits, ROWS)
    for split in range(splits):
        first, last = split * vocab // splits, (split + 1) * vocab // splits
        top = logits[:, first:last].amax(1)
        partial[0, split], partial[1, split] = top, (logits[:, first:last] - top[:, None]).exp().sum(1)
        here = (targets >= first) & (targets < last)
        partial[2, split] = torch.where(here, logits.gather(1, targets.clamp(min=0)[:, None])[:, 0], 0.0)
    return logits.double(), targets, partial


@pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")
@pytest.mark.parametrize("splits", [1, 2, 7, 31, 32, 33, 264])
def test_splits_are_merged(splits: int) -> None:
    logits, targets, partial = parts(splits)
    stats, logps = merged(partial, targets)
    again = merged(partial, targets)
    want = torch.where(targets < 0, 0.0, logits.log_softmax(1).gather(1, targets.clamp(min=0)[:, None])[:, 0])
    torch.testing.assert_close(logps.double(), want, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(stats[0].double(), logits.amax(1), rtol=0, atol=0)
    total = (logits - logits.amax(1, keepdim=True)).exp().sum(1)
    torch.testing.assert_close(stats[1].double(), total, rtol=2e-6, atol=0)
    assert torch.equal(stats, again[0])
    assert torch.equal(logps, again[1])


@pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")
@pytest.mark.parametrize("place", [0, 6, 263])
def test_a_logit_that_is_not_a_number_stays_one(place: int) -> None:
    _, targets, partial = parts(264)
    partial[1, place, 11] = torch.nan
    stats, logps = merged(partial, targets)
    assert logps.isnan().nonzero().tolist() == [[11]]
    assert stats[1].isnan().nonzero().tolist() == [[11]]


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("vocab", [32000, 50257, 128256, 151936, 262144])
def test_splits_fill_the_multiprocessors(target, vocab: int) -> None:
    """At most an eighth of the time of the multiprocessors is lost, from 512 rows to 65,536."""
    for config in kernel.configs(target, "bf16"):
        columns = math.ceil(vocab / config.constants["BLOCK_V"])
        for n in (512, 1000, 2731, 4096, 8192, 16384, 65536):
            rows = math.ceil(n / config.constants["BLOCK_N"])
            splits = kernel.splits(target, n, vocab, config)
            assert 1 <= splits <= columns
            turns = math.ceil(rows * splits / target.multiprocessors) * math.ceil(columns / splits)
            assert turns <= 1.125 * rows * columns / target.multiprocessors + 1, (config, n, splits)


def test_splits_by_hand() -> None:
    h100 = TARGETS["sm_90"]
    wide = kernel.configs(h100, "bf16")[0]  # 128 × 256
    # 4 blocks of rows on 132 multiprocessors: 33 ranges of 18 of the 594 blocks of columns, one program each.
    assert kernel.splits(h100, 512, 151936, wide) == 33
    assert kernel.splits(h100, 1, 256, wide) == 1
    assert kernel.splits(h100, 1, 151936, wide) == 119  # 5 blocks a program; 132 programs would have 5 too
