"""`token_statistics` in Triton's interpreter against float64; it reads its inputs and nothing else."""

import pytest
import torch
from torch import Tensor

from exo_fast.kernels.launch import Config
from exo_fast.kernels.targets import TARGETS
from exo_fast.kernels.token_statistics import configs, grid, token_statistics

DEFAULT = configs(TARGETS["sm_90"], "fp32")[0]
NAMES = ("logps", "entropy", "log_sum_sq_probs", "mean_logits")
HEADS = {  # bias, scale, softcap
    "plain": (False, 1.0, None),
    "bias": (True, 1.0, None),
    "scale": (False, -0.3, None),
    "softcap": (False, 1.0, 5.0),
    "all": (True, 1.7, 30.0),
}
SHAPES = [(1, 1), (7, 2), (7, 131), (64, 1000), (3, 2048), (3, 4097), (2, 50257)]


def found(
    logits: Tensor,  # (n, columns), possibly inside wider rows
    targets: Tensor,
    *,
    width: int | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    config: Config = DEFAULT,
) -> dict[str, Tensor]:
    """All the kernel leaves, by name; starting from values that it must write over."""
    n, columns = logits.shape
    stats, values = torch.full((3, n), torch.nan), torch.full((4, n), torch.nan)
    top = torch.full((n,), 7, dtype=torch.int8)
    token_statistics[grid(n)](
        logits, targets, bias, stats, values, top, columns, width or columns, logits.stride(0), stats.stride(0),
        values.stride(0), scale, softcap or 1.0,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, **config.constants, num_warps=config.num_warps,
    )  # fmt: skip
    assert set(top.tolist()) <= {0, 1}
    return dict(zip(NAMES, values, strict=True)) | {"stats": stats, "is_top1": top.bool()}


def expected(
    logits: Tensor, targets: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> dict[str, Tensor]:
    """The definitions in float64; is_top1 in float32, where the kernel's equal logits are equal."""
    z = logits.double() if bias is None else logits.double() + bias.double()
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) * scale
    log_p = torch.log_softmax(z, dim=1)
    at = targets.clamp(min=0)[:, None]
    return {
        "logps": log_p.gather(1, at).squeeze(1),
        "entropy": torch.special.entr(log_p.exp()).sum(1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, dim=1),
        "mean_logits": z.mean(1),
        "is_top1": z.float().argmax(1) == targets,
    }


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    numbers = ({name: values[name].double() for name in NAMES} for values in (got, want))
    torch.testing.assert_close(*numbers, rtol=1e-6, atol=1e-5)
    assert torch.equal(got["is_top1"], want["is_top1"])


def problem(n: int, columns: int, bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random logits, and targets of which every second is the argmax."""
    g = torch.Generator().manual_seed(1000 * n + columns)
    logits = 4 * torch.randn(n, columns, generator=g)
    targets = torch.randint(columns, (n,), generator=g)
    added = torch.randn(columns, generator=g) if bias else None
    targets[::2] = (logits if added is None else logits + added)[::2].argmax(1)
    return logits, targets, added


def padded(logits: Tensor) -> Tensor:
    """The same rows, each padded with nan to a multiple of 16 columns."""
    n, columns = logits.shape
    rows = torch.full((n, -(-columns // 16) * 16), torch.nan)
    rows[:, :columns] = logits
    return rows[:, :columns]


@pytest.mark.parametrize(("n", "columns"), SHAPES)
def test_all_is_that_of_float64(n: int, columns: int) -> None:
    logits, targets, _ = problem(n, columns)
    chunk = padded(logits)
    got = found(chunk, targets, width=chunk.stride(0))
    assert_close(got, expected(logits, targets))
    assert torch.equal(got["stats"][0], logits.amax(1))
    assert torch.equal(got["stats"][2], logits.gather(1, targets[:, None]).squeeze(1))
    total = (logits.double() - logits.double().amax(1, keepdim=True)).exp().sum(1)
    torch.testing.assert_close(got["stats"][1].double(), total, rtol=1e-6, atol=0)
    assert got["is_top1"][::2].all()


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_applied_on_the_fly(head: str, bias_dtype: torch.dtype) -> None:
    has_bias, scale, softcap = HEADS[head]
    logits, targets, bias = problem(5, 2131, has_bias)
    bias = None if bias is None else bias.to(bias_dtype)
    chunk = padded(logits)
    got = found(chunk, targets, width=chunk.stride(0), bias=bias, scale=scale, softcap=softcap)
    assert_close(got, expected(logits, targets, bias, scale, softcap))


@pytest.mark.parametrize("distance", [1, 3, 4, 2000, 2048, 4500], ids="{} apart".format)
def test_of_equal_logits_the_first_is_top(distance: int) -> None:
    """Neighbours in one lane, in another, in another block, and in the last one."""
    logits, _, _ = problem(2, 6001)
    logits[:, [900, 900 + distance]] = 50.0
    assert found(logits, torch.tensor([900, 900 + distance]))["is_top1"].tolist() == [True, False]


def test_logits_of_minus_infinity_add_nothing() -> None:
    logits, targets, _ = problem(5, 6000)
    targets[:] = 5999
    logits[0, ::2] = -torch.inf
    logits[1, :4096] = -torch.inf  # whole blocks
    logits[2, :5999] = -torch.inf  # the target is certain
    logits[3, 5999] = -torch.inf
    got, want = found(logits, targets), expected(logits, targets)
    assert_close(got, want)
    assert (got["mean_logits"][:4] == -torch.inf).all()
    assert got["entropy"][2] == got["log_sum_sq_probs"][2] == 0.0
    assert got["logps"][3] == -torch.inf


def test_logits_of_ten_thousand_are_exact() -> None:
    logits = torch.full((4, 5000), -1e4)
    logits[torch.arange(4), torch.tensor([0, 2500, 4999, 7])] = 1e4  # the maximum comes first, in between, last
    logits[3, 4000] = 1e4
    targets = torch.tensor([0, 2500, 1, 7])
    got = found(logits, targets)
    half = torch.tensor(0.5).log()
    assert got["logps"].tolist() == [0.0, 0.0, -2e4, half]
    assert got["entropy"].tolist() == [0.0, 0.0, 0.0, -half]
    assert got["log_sum_sq_probs"].tolist() == [0.0, 0.0, 0.0, half]
    assert got["is_top1"].tolist() == [True, True, False, True]
    close = 1e4 + torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    assert_close(found(close, targets), expected(close, targets))


def test_a_nan_is_not_hidden() -> None:
    logits, targets, _ = problem(2, 131)
    logits[0, 77] = torch.nan
    got = found(logits, targets)
    assert all(got[name].isnan().tolist() == [True, False] for name in NAMES)


def test_ignored_rows_are_not_read_and_say_nothing() -> None:
    logits, targets, _ = problem(7, 131)
    logits[2], targets[2] = torch.nan, -1
    got = found(logits, targets)
    assert got["stats"][:, 2].tolist() == [0.0, 1.0, 0.0]
    assert [float(got[name][2]) for name in (*NAMES, "is_top1")] == [0.0] * 5
    kept = [0, 1, 3, 4, 5, 6]
    want = expected(logits[kept], targets[kept])
    assert_close({name: value[..., kept] for name, value in got.items()}, want)


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_gives_the_same_to_rounding(target: str) -> None:
    logits, targets, _ = problem(3, 5003)
    want = expected(logits, targets)
    for config in configs(TARGETS[target], "fp32"):
        assert_close(found(logits, targets, config=config), want)


def test_two_runs_are_bit_equal() -> None:
    logits, targets, bias = problem(7, 5000, bias=True)
    first, again = (found(logits, targets, bias=bias, softcap=30.0) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_rows_beyond_two_to_the_31_elements_are_found() -> None:
    stride = 2**30  # as an int32, 2 · stride is negative
    memory = torch.empty(2 * stride + 144)  # pages that are not touched cost nothing
    rows = memory.as_strided((3, 131), (stride, 1))
    logits, targets, _ = problem(3, 131)
    rows.copy_(logits)
    got, want = found(rows, targets, width=144), found(logits, targets)
    assert all(torch.equal(got[name], want[name]) for name in want)
