"""`logits_to_grad` in Triton's interpreter against float64 autograd; it writes its output and no more."""

import itertools

import pytest
import torch
from torch import Tensor

from exo_fast.kernels.launch import Config
from exo_fast.kernels.logits_to_grad import configs, grid, logits_to_grad, row_blocks
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


def to_grad(
    logits: Tensor,  # (n, columns), possibly inside wider rows
    targets: Tensor,
    coefficients: Tensor,
    stats: Tensor,
    *,
    out: Tensor | None = None,  # in place without it
    start: int = 0,
    width: int | None = None,
    bias: Tensor | None = None,
    bias_grad: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    config: Config = DEFAULT,
) -> Tensor | None:
    """Turn logits into their gradient; return the bias gradient if asked."""
    n, columns = logits.shape
    width = width or columns
    out = logits if out is None else out
    partial = torch.full((row_blocks(n, config), width), torch.nan) if bias_grad else None
    logits_to_grad[grid(n, width, config)](
        logits, out, targets, coefficients, bias, stats, partial,
        n, columns, width, start, logits.stride(0), out.stride(0), stats.stride(0), width, scale, softcap or 1.0,
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, HAS_BIAS_GRAD=bias_grad,
        **config.constants, num_warps=config.num_warps,
    )  # fmt: skip
    return partial.sum(0)[:columns] if bias_grad else None


def padded(logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same rows, each padded with nan to a multiple of 16 columns."""
    n, columns = logits.shape
    rows = torch.full((n, -(-columns // 16) * 16), torch.nan, dtype=dtype or logits.dtype)
    rows[:, :columns] = logits
    return rows[:, :columns]


def problem(
    n: int, columns: int, dtype: torch.dtype, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Logits, targets, coefficients and, when asked, a bias."""
    generator = torch.Generator().manual_seed(1000 * n + columns)
    logits = (4 * torch.randn(n, columns, generator=generator)).to(dtype)
    targets = torch.randint(columns, (n,), generator=generator)
    coefficients = torch.randn(n, generator=generator)
    return logits, targets, coefficients, torch.randn(columns, generator=generator).to(dtype) if bias else None


def expected(
    logits: Tensor, targets: Tensor, coefficients: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the raw products and of the bias by autograd in float64, and the statistics of the rows."""
    a = logits.double().requires_grad_()
    b = (torch.zeros(logits.shape[1]) if bias is None else bias).double().requires_grad_()
    z = a + b
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z * scale
    logps = torch.log_softmax(z, dim=1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    (torch.where(targets < 0, 0, coefficients.double()) * logps).sum().backward()
    shift = z.detach().amax(dim=1)
    stats = torch.stack([shift, (z.detach() - shift[:, None]).exp().sum(dim=1), torch.full_like(shift, torch.nan)])
    return a.grad, b.grad, stats.float()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


SHAPES = [*itertools.product((1, 7, 64, 129), (2, 131, 1000)), (7, 50257)]
TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 3e-6}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "columns"), SHAPES)
def test_gradient_in_place_is_that_of_float64(n: int, columns: int, dtype: torch.dtype) -> None:
    logits, targets, c, _ = problem(n, columns, dtype)
    want, _, stats = expected(logits, targets, c, None, 1.0, None)
    chunk = padded(logits)
    to_grad(chunk, targets, c, stats, width=chunk.stride(0))
    assert relative(chunk, want) < TOLERANCES[dtype]
    assert (chunk.as_strided((n, chunk.stride(0)), chunk.stride())[:, columns:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_float32_logits_of_any_head_give_gradients_in_the_dtype_of_the_operands(head: str, dtype: torch.dtype) -> None:
    has_bias, scale, softcap = HEADS[head]
    logits, targets, c, bias = problem(19, 2131, torch.float32, has_bias)
    bias = bias.to(dtype) if has_bias else None
    want, want_bias, stats = expected(logits, targets, c, bias, scale, softcap)
    out = padded(torch.full_like(logits, torch.nan), dtype)
    got_bias = to_grad(
        padded(logits), targets, c, stats, out=out, width=out.stride(0),
        bias=bias, bias_grad=has_bias, scale=scale, softcap=softcap,
    )  # fmt: skip
    assert relative(out, want) < TOLERANCES[dtype]
    if has_bias:  # summed before the gradient is rounded
        assert relative(got_bias, want_bias) < 3e-6


@pytest.mark.parametrize("n", [1, 15, 16, 17, 129])
def test_bias_gradient_of_any_number_of_row_blocks(n: int) -> None:
    logits, targets, c, bias = problem(n, 131, torch.float32, bias=True)
    _, want, stats = expected(logits, targets, c, bias, 1.0, None)
    assert relative(to_grad(logits, targets, c, stats, bias=bias, bias_grad=True), want) < 1e-6


def test_another_buffer_leaves_the_logits_alone_and_equals_in_place() -> None:
    logits, targets, c, _ = problem(7, 1000, torch.bfloat16)
    _, _, stats = expected(logits, targets, c, None, 1.0, None)
    before, out = logits.clone(), torch.empty(7, 1100, dtype=logits.dtype)[:, :1000]
    to_grad(logits, targets, c, stats, out=out)
    assert torch.equal(logits, before)
    to_grad(logits, targets, c, stats)
    assert torch.equal(logits, out)


@pytest.mark.parametrize("cuts", [(1,), (16,), (2048,), (7, 2049, 2050)], ids=str)
def test_chunks_of_a_vocabulary_equal_the_whole(cuts: tuple[int, ...]) -> None:
    logits, targets, c, bias = problem(7, 2200, torch.float32, bias=True)
    targets[:4] = torch.tensor([0, cuts[0] - 1, cuts[0], 2199])
    head = {"scale": 0.7, "softcap": 20.0}
    _, _, stats = expected(logits, targets, c, bias, **head)
    whole = logits.clone()
    want = to_grad(whole, targets, c, stats, bias=bias, bias_grad=True, **head)
    got = [
        to_grad(logits[:, a:b], targets, c, stats, start=a, bias=bias[a:b], bias_grad=True, **head)
        for a, b in itertools.pairwise((0, *cuts, 2200))
    ]
    assert torch.equal(logits, whole)
    assert torch.equal(torch.cat(got), want)


def test_a_chunk_of_a_wider_matrix_writes_nothing_else() -> None:
    matrix = torch.full((9, 300), torch.nan)
    logits, targets, c, _ = problem(7, 131, torch.float32)
    want, _, stats = expected(logits, targets, c, None, 1.0, None)
    matrix[1:8, 50:181] = logits
    to_grad(matrix[1:8, 50:181], targets, c, stats)
    assert relative(matrix[1:8, 50:181], want) < 1e-6
    matrix[1:8, 50:181] = torch.nan
    assert matrix.isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy meets the garbage, too
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_ignored_rows_become_zeros_whatever_they_hold(softcap: float | None) -> None:
    logits, targets, c, bias = problem(7, 131, torch.float32, bias=True)
    targets[2], c[4] = -1, 0.0
    want, want_bias, stats = expected(logits, targets, c, bias, 1.0, softcap)
    for garbage in (torch.nan, torch.inf, 3e38):
        chunk, statistics = logits.clone(), stats.clone()
        chunk[[2, 4]], statistics[:, [2, 4]] = garbage, garbage
        got_bias = to_grad(chunk, targets, c, statistics, bias=bias, bias_grad=True, softcap=softcap)
        assert (chunk[[2, 4]] == 0).all()
        assert relative(chunk, want) < 1e-6
        assert relative(got_bias, want_bias) < 1e-6


def test_logits_of_ten_thousand_and_a_certain_target_are_exact() -> None:
    logits = torch.full((3, 1000), -1e4)
    logits[torch.arange(3), torch.arange(3)] = 1e4
    targets, c = torch.tensor([0, 7, 2]), torch.tensor([0.5, -3.0, 2.0])
    _, _, stats = expected(logits, targets, c, None, 1.0, None)
    to_grad(logits, targets, c, stats)
    want = torch.zeros(3, 1000)
    want[1, 7], want[1, 1] = -3.0, 3.0
    assert torch.equal(logits, want)

    close, targets, c, _ = problem(7, 1000, torch.float32)
    close += 1e4
    want, _, stats = expected(close, targets, c, None, 1.0, None)
    to_grad(close, targets, c, stats)
    assert relative(close, want) < 1e-6


def test_logits_of_minus_infinity_have_no_gradient() -> None:
    logits, targets, c, _ = problem(3, 131, torch.float32)
    targets[:] = 4
    logits[:, 10:100] = -torch.inf
    want, _, stats = expected(logits, targets, c, None, 1.0, None)
    to_grad(logits, targets, c, stats)
    assert (logits[:, 10:100] == 0).all()
    assert relative(logits, want) < 1e-6


@pytest.mark.parametrize(("factor", "good"), [(1.0, False), (2.0**13, True)])
def test_a_float16_gradient_needs_scaled_coefficients(factor: float, good: bool) -> None:
    """c·p is near 1e-7 at V = 50257, where float16 has one digit: c is scaled up, and the products down."""
    generator = torch.Generator().manual_seed(0)
    n, width, vocab = 7, 64, 50257
    hidden = torch.randn(n, width, generator=generator, dtype=torch.float64)
    weight = (1 + torch.randn(vocab, width, generator=generator, dtype=torch.float64)) / width**0.5
    logits = (hidden @ weight.T).float()
    targets = torch.randint(vocab, (n,), generator=generator)
    c = torch.randn(n, generator=generator) * 0.1 / 8
    want, _, stats = expected(logits, targets, c, None, 1.0, None)
    out = torch.empty_like(logits, dtype=torch.float16)
    to_grad(logits, targets, factor * c, stats, out=out)
    assert (relative(out.double() @ weight / factor, want @ weight) < 1e-3) == good


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_gives_the_same_to_rounding(target: str) -> None:
    logits, targets, c, bias = problem(35, 2500, torch.float32, bias=True)
    want, want_bias, stats = expected(logits, targets, c, bias, 1.0, None)
    for config in configs(TARGETS[target], "bf16"):
        chunk = logits.clone()
        got_bias = to_grad(chunk, targets, c, stats, bias=bias, bias_grad=True, config=config)
        assert relative(chunk, want) < 1e-6
        assert relative(got_bias, want_bias) < 1e-6


def test_two_runs_are_bit_equal() -> None:
    logits, targets, c, bias = problem(64, 1000, torch.bfloat16, bias=True)
    _, _, stats = expected(logits, targets, c, bias, 1.0, 30.0)
    runs = []
    for _ in range(2):
        chunk = logits.clone()
        runs.append((chunk, to_grad(chunk, targets, c, stats, bias=bias, bias_grad=True, softcap=30.0)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_rows_beyond_two_to_the_31_elements_are_found() -> None:
    stride = 2**30  # as an int32, 2 · stride is negative
    memory = torch.empty(2 * stride + 16384, dtype=torch.bfloat16)  # pages that are not touched cost nothing
    rows = memory.as_strided((3, 131), (stride, 1))
    logits, targets, c, _ = problem(3, 131, torch.bfloat16)
    _, _, stats = expected(logits, targets, c, None, 1.0, None)
    rows.copy_(logits)
    out = memory.as_strided((3, 131), (stride, 1), 8192)  # beside the logits
    to_grad(rows, targets, c, stats, out=out)
    assert torch.equal(rows, logits)
    to_grad(logits, targets, c, stats)
    assert torch.equal(out, logits)
