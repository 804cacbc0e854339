"""`logsumexp_gather` in Triton's interpreter against float64; it reads its inputs and nothing else."""

import itertools

import pytest
import torch
from torch import Tensor

from exo_fast.kernels.launch import Config
from exo_fast.kernels.logsumexp_gather import configs, grid, logsumexp_gather
from exo_fast.kernels.targets import TARGETS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DEFAULT = configs(TARGETS["sm_90"], "fp32")[0]
HEADS = {  # bias, scale, softcap
    "plain": (False, 1.0, None),
    "bias": (True, 1.0, None),
    "scale": (False, 0.3, None),
    "softcap": (False, 1.0, 5.0),
    "all": (True, 1.7, 30.0),
}


def update(
    stats: Tensor,
    logits: Tensor,  # (n, columns), possibly inside wider rows
    targets: Tensor,
    *,
    start: int = 0,
    width: int | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    first: bool = True,
    config: Config = DEFAULT,
) -> None:
    n, columns = logits.shape
    logsumexp_gather[grid(n)](
        logits, targets, bias, stats, columns, width or columns, start, logits.stride(0), stats.stride(0),
        scale, softcap or 1.0,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, FIRST=first,
        **config.constants, num_warps=config.num_warps,
    )  # fmt: skip


def statistics(logits: Tensor, targets: Tensor, **arguments) -> Tensor:
    stats = torch.full((3, len(logits)), torch.nan)
    update(stats, logits, targets, **arguments)
    return stats


def logps(stats: Tensor) -> Tensor:
    shift, total, target = stats
    return target - shift - total.log()


def padded(logits: Tensor) -> Tensor:
    """The same rows, each padded with nan to a multiple of 16 columns."""
    n, columns = logits.shape
    rows = torch.full((n, -(-columns // 16) * 16), torch.nan, dtype=logits.dtype)
    rows[:, :columns] = logits
    return rows[:, :columns]


def expected(logits: Tensor, targets: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    z = logits.double()
    if bias is not None:
        z = z + bias.double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z * scale, dim=1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1)


def problem(n: int, columns: int, dtype: torch.dtype, bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1000 * n + columns)
    logits = (4 * torch.randn(n, columns, generator=generator)).to(dtype)
    targets = torch.randint(columns, (n,), generator=generator)
    return logits, targets, torch.randn(columns, generator=generator).to(dtype) if bias else None


SHAPES = [*itertools.product((1, 7, 64, 129), (2, 131, 1000)), (7, 50257)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "columns"), SHAPES)
def test_statistics_are_those_of_float64(n: int, columns: int, dtype: torch.dtype) -> None:
    logits, targets, _ = problem(n, columns, dtype)
    chunk = padded(logits)
    stats = statistics(chunk, targets, width=chunk.stride(0))
    assert torch.equal(stats[0], logits.float().amax(dim=1))
    assert torch.equal(stats[2], logits.float().gather(1, targets[:, None]).squeeze(1))
    torch.testing.assert_close(logps(stats).double(), expected(logits, targets, None, 1.0, None), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_applied_on_the_fly(head: str, dtype: torch.dtype) -> None:
    has_bias, scale, softcap = HEADS[head]
    logits, targets, bias = problem(7, 2131, dtype, has_bias)
    chunk = padded(logits)
    stats = statistics(chunk, targets, width=chunk.stride(0), bias=bias, scale=scale, softcap=softcap)
    want = expected(logits, targets, bias, scale, softcap)
    torch.testing.assert_close(logps(stats).double(), want, rtol=0, atol=1e-5)


def test_a_bias_of_another_dtype_is_widened() -> None:
    logits, targets, bias = problem(7, 131, torch.float32, bias=True)
    bias = bias.to(torch.bfloat16)
    stats = statistics(logits, targets, bias=bias)
    torch.testing.assert_close(logps(stats).double(), expected(logits, targets, bias, 1, None), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cuts", [(1,), (16,), (2048,), (2049, 2050), (7, 2100, 4096)], ids=str)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_row_may_be_cut_over_the_vocabulary(cuts: tuple[int, ...], backwards: bool) -> None:
    logits, targets, bias = problem(7, 4200, torch.float32, bias=True)
    targets[:4] = torch.tensor([0, cuts[0] - 1, cuts[0], 4199])
    head = {"scale": 0.7, "softcap": 20.0}
    pieces = list(itertools.pairwise((0, *cuts, 4200)))
    stats = torch.full((3, 7), torch.nan)
    for index, (start, stop) in enumerate(reversed(pieces) if backwards else pieces):
        chunk = torch.full((7, stop - start + 16), torch.nan)[:, : stop - start].copy_(logits[:, start:stop])
        update(stats, chunk, targets, start=start, bias=bias[start:stop], first=index == 0, **head)
    whole = statistics(logits, targets, bias=bias, **head)
    assert torch.equal(stats[0], whole[0])
    assert torch.equal(stats[2], whole[2])
    torch.testing.assert_close(stats[1], whole[1], rtol=2e-6, atol=0)


def test_first_is_the_same_as_starting_from_minus_infinity() -> None:
    logits, targets, _ = problem(7, 1000, torch.float32)
    stats = torch.tensor([[-torch.inf], [0.0], [0.0]]).repeat(1, 7)
    update(stats, logits, targets, first=False)
    assert torch.equal(stats, statistics(logits, targets))


def test_a_chunk_of_a_wider_matrix_and_of_more_rows_reads_nothing_else() -> None:
    matrix = torch.full((9, 300), torch.nan)
    logits, targets, _ = problem(7, 131, torch.float32)
    matrix[1:8, 50:181] = logits
    stats = torch.full((3, 9), -7.0)
    update(stats[:, 1:8], matrix[1:8, 50:181], targets)
    assert torch.equal(stats[:, 1:8], statistics(logits, targets))
    assert (stats[:, [0, 8]] == -7.0).all()


def test_logits_of_minus_infinity_have_probability_zero() -> None:
    logits, targets, _ = problem(4, 6000, torch.float32)
    targets[:] = 5999
    logits[0, ::2] = -torch.inf
    logits[1, :4096] = -torch.inf  # whole blocks
    logits[2, :5999] = -torch.inf
    logits[3, 5999] = -torch.inf
    logits[:, 5999].nan_to_num_(neginf=-torch.inf)
    for cut in (6000, 4096, 3000):
        stats = torch.full((3, 4), torch.nan)
        update(stats, logits[:, :cut], targets)
        if cut < 6000:
            update(stats, logits[:, cut:], targets, start=cut, first=False)
        torch.testing.assert_close(logps(stats).double(), expected(logits, targets, None, 1.0, None), rtol=0, atol=1e-5)
        assert logps(stats)[2] == 0.0
        assert logps(stats)[3] == -torch.inf


def test_a_nan_is_not_hidden() -> None:
    logits, targets, _ = problem(2, 131, torch.float32)
    logits[0, 77] = torch.nan
    assert logps(statistics(logits, targets)).isnan().tolist() == [True, False]


def test_logits_of_ten_thousand_and_a_certain_target_are_exact() -> None:
    logits = torch.full((4, 1000), -1e4)
    logits[torch.arange(4), torch.arange(4)] = 1e4
    logits[2, 500] = 1e4
    targets = torch.tensor([0, 7, 2, 3])
    want = torch.tensor([0.0, -2e4, -torch.tensor(2.0).log(), 0.0])
    assert torch.equal(logps(statistics(logits, targets)), want)
    close = (1e4 + torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))).float()
    torch.testing.assert_close(
        logps(statistics(close, targets)).double(), expected(close, targets, None, 1.0, None), rtol=0, atol=1e-5
    )


def test_ignored_rows_are_not_read_and_say_a_log_prob_of_zero() -> None:
    logits, targets, _ = problem(7, 131, torch.float32)
    logits[2], targets[2] = torch.nan, -1
    stats = statistics(logits, targets)
    assert stats[:, 2].tolist() == [0.0, 1.0, 0.0]
    before = stats.clone()
    update(stats, logits, targets, start=131, first=False)
    assert torch.equal(stats[:, 2], before[:, 2])
    assert stats[:, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_gives_the_same_to_rounding(target: str) -> None:
    logits, targets, _ = problem(3, 5003, torch.float32)
    want = statistics(logits, targets)
    for dtype in ("bf16", "fp16", "fp32"):
        for config in configs(TARGETS[target], dtype):
            torch.testing.assert_close(statistics(logits, targets, config=config), want, rtol=2e-6, atol=0)


def test_two_runs_are_bit_equal() -> None:
    logits, targets, bias = problem(7, 1000, torch.bfloat16, bias=True)
    runs = [statistics(logits, targets, bias=bias, softcap=30.0) for _ in range(2)]
    assert torch.equal(*runs)


def test_rows_beyond_two_to_the_31_elements_are_found() -> None:
    stride = 2**30  # as an int32, 2 · stride is negative
    memory = torch.empty(2 * stride + 160, dtype=torch.bfloat16)  # pages that are not touched cost nothing
    rows = memory.as_strided((3, 131), (stride, 1))
    logits, targets, _ = problem(3, 131, torch.bfloat16)
    rows.copy_(logits)
    assert torch.equal(statistics(rows, targets, width=144), statistics(logits, targets))
