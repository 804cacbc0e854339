"""The vocabulary projection as attention (bf16 products on a CPU) against float64: every gradient, odd and extreme
inputs, chunks of every kind."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from exo_fast import reference
from exo_fast.backends import head_attention
from exo_fast.backends import torch as chunked
from exo_fast.head import Head
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import group_loss, linear_group_loss


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow few rows and any CPU; make slices and chunks so small that test sizes cross their boundaries."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for name, value in {"MIN_ROWS": 1, "ROWS": 24, "COLUMNS": 300, "QUERIES": 16}.items():
        monkeypatch.setattr(head_attention, name, value)


@pytest.fixture
def many_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


def problem(lengths: list[int], candidates: int, width: int, vocab: int, dtype: torch.dtype = torch.bfloat16) -> dict:
    g = torch.Generator().manual_seed(0)
    n, shape = sum(lengths), (len(lengths) // candidates, candidates)
    return {
        "hidden": torch.randn(n, width, generator=g).to(dtype).requires_grad_(),
        "weight": (torch.randn(vocab, width, generator=g) * 0.4).to(dtype).requires_grad_(),
        "targets": torch.randint(vocab, (n,), generator=g),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "ref_logps": torch.randn(shape, generator=g) - 10,
        "rewards": torch.randn(shape, generator=g),
    }


def exactly(made: dict) -> dict:
    return {k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in made.items()}


def two_pass(made: dict, **options: float) -> tuple[Tensor, Tensor]:
    token_logps = linear_logprobs(made["hidden"], made["weight"], made["targets"], **options)
    logps = reference.sequence_logps(token_logps, made["cu_seqlens"]).view_as(made["rewards"])
    return group_loss(logps, made["ref_logps"], made["rewards"], loss_type="exo-rw", beta_r=1.0), logps.detach()


def one_pass(made: dict, **options: float) -> tuple[Tensor, Tensor]:
    return linear_group_loss(**made, loss_type="exo-rw", beta_r=1.0, **options)


# One-token completions, primes, groups shorter and longer than a chunk, V below and above a slice, a last slice of one.
SHAPES = {
    "one-token": ([1, 1], 2, 3, 7),
    "one-word-vocabulary": ([2, 3], 2, 3, 1),
    "one-dimension": ([3, 1, 2, 5], 2, 1, 33),
    "prime": ([7, 31, 2, 5], 2, 37, 1009),
    "long-group": ([60, 41, 3, 3], 2, 16, 601),
    "k16": ([1, 3] * 8, 16, 64, 512),
}


@pytest.mark.parametrize("schedule", [one_pass, two_pass])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64_of_the_same_inputs(shape: str, schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    made = problem(*SHAPES[shape])
    exact = exactly(made)
    for product in ("unit_hidden", "add_head", "add_by_blocks"):  # the other schedule's products
        monkeypatch.delattr(chunked.Gradients, product)
    loss, logps = schedule(made, scale=0.7)
    want, want_logps = linear_group_loss(**exact, loss_type="exo-rw", beta_r=1.0, scale=0.7, backend="reference")
    torch.testing.assert_close(logps.double(), want_logps, atol=2e-4, rtol=0)
    torch.testing.assert_close(loss.double(), want, atol=1e-5, rtol=1e-4)
    got = torch.autograd.grad(loss, [made["hidden"], made["weight"]])
    for a, b in zip(got, torch.autograd.grad(want, [exact["hidden"], exact["weight"]]), strict=True):
        assert (a.double() - b).norm() <= 3e-3 * b.norm() + 5e-4  # 0 where V = 1: the halves of dW cancel


@pytest.mark.parametrize("loss_type", ["exo-pref", "dpo-pref"])
def test_tied_best_candidates_share_the_target(loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(chunked.Gradients, "add_head")  # of the other schedule
    made = problem([7, 3, 2, 5, 4, 6], 3, 16, 601)
    made["rewards"] = torch.tensor([[2.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    exact = exactly(made)
    loss, _ = linear_group_loss(**made, loss_type=loss_type, ties="share")
    want, _ = linear_group_loss(**exact, loss_type=loss_type, ties="share", backend="reference")
    torch.testing.assert_close(loss.double(), want, atol=1e-5, rtol=1e-4)
    got = torch.autograd.grad(loss, [made["hidden"], made["weight"]])
    for a, b in zip(got, torch.autograd.grad(want, [exact["hidden"], exact["weight"]]), strict=True):
        assert (a.double() - b).norm() <= 3e-3 * b.norm()


@pytest.mark.usefixtures("many_threads")
def test_parts_of_a_slice_for_idle_threads() -> None:
    made = problem([7, 31, 2, 5], 2, 32, 1000)
    sizes = head_attention.Sizes(45, 32, None, made["hidden"].device)
    assert (sizes.parts, sizes.columns) == (2, 288)
    exact = exactly(made)
    lse, mean = head_attention.softmax_mean(made["hidden"].detach(), Head(made["weight"].detach()), sizes)
    logits = exact["hidden"] @ exact["weight"].T
    torch.testing.assert_close(lse.double(), logits.logsumexp(1), atol=1e-5, rtol=0)
    want = logits.softmax(1) @ exact["weight"]
    assert (mean - want).norm() < 2e-3 * want.norm()


def test_sizes_of_real_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cpu = torch.device("cpu")
    for threads in (2, 24, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for width in (576, 1024, 4096):
            for n in (1024, 2048, 100_000):
                sizes = head_attention.Sizes(n, width, None, cpu)
                assert sizes.columns % (sizes.parts * 256) == 0
                blocks = -(-min(n, 4096) // 256)
                assert sizes.parts * blocks * 2 > threads or sizes.parts == 8
                row, kernel = (16 + 4 * sizes.parts) * width, 4 * threads * 256 * (512 + width)
                assert sizes.rows == 256 or sizes.rows * row + kernel <= 320 * 2**20
                assert sizes.columns * 12 * width <= 320 * 2**20


@pytest.mark.parametrize("budget", [1, 60_000], ids=["least", "some"])
@pytest.mark.parametrize("schedule", [one_pass, two_pass])
def test_budget_cuts_rows_and_columns(schedule, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_attention, "COLUMNS", 8192)
    monkeypatch.setattr(head_attention, "ROWS", 8192)
    made = problem([60, 41, 3, 3], 2, 16, 601)
    exact = exactly(made)
    sizes = head_attention.Sizes(107, 16, budget, made["hidden"].device)
    assert (sizes.rows, sizes.columns) == ((16, 16) if budget == 1 else (84, 144))
    loss, _ = schedule(made, memory_budget=budget)
    want, _ = linear_group_loss(**exact, loss_type="exo-rw", beta_r=1.0, backend="reference")
    got = torch.autograd.grad(loss, [made["hidden"], made["weight"]])
    for a, b in zip(got, torch.autograd.grad(want, [exact["hidden"], exact["weight"]]), strict=True):
        assert (a.double() - b).norm() < 4e-3 * b.norm()


@pytest.mark.parametrize("need", ["hidden", "weight"])
def test_one_gradient_alone(need: str) -> None:
    made = problem([7, 31, 2, 5], 2, 37, 1009)
    other = "weight" if need == "hidden" else "hidden"
    made[other] = made[other].detach()
    exact = exactly(made)
    want, _ = linear_group_loss(**exact, loss_type="exo-rw", beta_r=1.0, backend="reference")
    (b,) = torch.autograd.grad(want, exact[need])
    for schedule in (one_pass, two_pass):
        (a,) = torch.autograd.grad(schedule(made)[0], made[need])
        assert (a.double() - b).norm() < 4e-3 * b.norm()


def test_operands_of_any_layout() -> None:
    made = problem([20, 11, 9, 30], 2, 24, 700)
    odd = dict(made)
    for name in ("hidden", "weight"):
        odd[name] = made[name].detach().T.contiguous().T.requires_grad_()
        assert odd[name].stride(0) == 1
    for schedule in (one_pass, two_pass):
        grads = [torch.autograd.grad(schedule(m)[0], [m["hidden"], m["weight"]]) for m in (made, odd)]
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)


def test_all_ignored() -> None:
    made = problem([20, 11, 9, 30], 2, 24, 700)
    for frozen in (False, True):
        weight = made["weight"].detach().requires_grad_(not frozen)
        logps = linear_logprobs(made["hidden"], weight, torch.full((70,), -100))
        assert not logps.any()
        for gradient in torch.autograd.grad(logps.sum(), [made["hidden"]] if frozen else [made["hidden"], weight]):
            assert not gradient.any()


@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="without AMX float32 attention takes float32 products all the same"
)
def test_certain_tokens_have_log_prob_zero_and_no_gradient() -> None:
    """Weights that bf16 does not hold, in float32 with bf16 products: W[y] is rounded as the mean is."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 32, generator=g).requires_grad_()
    hidden = (weight.detach()[:64] * 8).requires_grad_()
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        logps = linear_logprobs(hidden, weight.detach(), torch.arange(64))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert (logps <= 0).all()
    assert (logps > -1e-4).all()
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    assert gradient.norm() < 1e-4 * weight.norm()


def test_float32_whatever_the_default_dtype() -> None:
    made = problem([20, 11, 9, 30], 2, 24, 700)
    want = [one_pass(made)[1], linear_logprobs(made["hidden"], made["weight"], made["targets"])]
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = [one_pass(made)[1], linear_logprobs(made["hidden"], made["weight"], made["targets"])]
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_ignored_rows_and_a_frozen_head() -> None:
    made = problem([20, 11, 9, 30], 2, 24, 700)
    made["targets"][::3] = -100
    exact = exactly(made)
    for frozen in (False, True):
        weight = made["weight"].detach().requires_grad_(not frozen)
        logps = linear_logprobs(made["hidden"], weight, made["targets"])
        want = reference.linear_logprobs(exact["hidden"], exact["weight"], made["targets"])
        torch.testing.assert_close(logps.double(), want, atol=2e-5, rtol=1e-6)
        upstream = torch.linspace(-1, 1, 70)
        wrt = [made["hidden"]] if frozen else [made["hidden"], weight]
        exact_wrt = [exact["hidden"]] if frozen else [exact["hidden"], exact["weight"]]
        got = torch.autograd.grad(logps, wrt, upstream)
        assert not got[0][::3].any()
        for a, b in zip(got, torch.autograd.grad(want, exact_wrt, upstream.double()), strict=True):
            assert (a.double() - b).norm() < 4e-3 * b.norm()


@pytest.mark.parametrize("columns", [300, 32], ids=["one-slice", "slices"])
def test_extreme_logits(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of ±1e4: certain, certain, impossible and ordinary tokens."""
    monkeypatch.setattr(head_attention, "COLUMNS", columns)
    weight, hidden = torch.zeros(101, 4, dtype=torch.bfloat16), torch.zeros(4, 4, dtype=torch.bfloat16)
    weight[:, 0] = torch.linspace(-100, 100, 101)
    hidden[:, 0] = torch.tensor([100.0, -100.0, 100.0, 1.0])
    made = {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "targets": torch.tensor([100, 0, 0, 50]),
        "cu_seqlens": torch.tensor([0, 1, 2, 3, 4]),
        "ref_logps": torch.tensor([[0.0, -1.0], [-2e4, -100.0]]),
        "rewards": torch.tensor([[0.0, 1.0], [0.5, 1.0]]),
    }
    exact = exactly(made)
    loss, logps = linear_group_loss(**made, loss_type="exo-rw")
    want, want_logps = linear_group_loss(**exact, loss_type="exo-rw", backend="reference")
    torch.testing.assert_close(logps.double(), want_logps, atol=2e-3, rtol=1e-6)
    torch.testing.assert_close(loss.double(), want, rtol=1e-3, atol=1e-4)
    got = torch.autograd.grad(loss, [made["hidden"], made["weight"]])
    for a, b in zip(got, torch.autograd.grad(want, [exact["hidden"], exact["weight"]]), strict=True):
        assert torch.isfinite(a).all()
        assert (a.double() - b).norm() <= 1e-2 * b.norm()  # hidden states of ±100, whose parts of dW nearly cancel


def test_float32_where_the_user_allows_bf16_products() -> None:
    made = problem([7, 31, 2, 5], 2, 37, 1009, torch.float32)
    with torch.no_grad():  # operands that bf16 holds, so that only what comes after them is rounded
        made["hidden"].copy_(made["hidden"].bfloat16())
        made["weight"].copy_(made["weight"].bfloat16())
    exact, head = exactly(made), Head(made["weight"])
    assert not head_attention.applies(45, made["hidden"], head)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert head_attention.applies(45, made["hidden"], head)
        loss, logps = one_pass(made)
        got = torch.autograd.grad(loss, [made["hidden"], made["weight"]])
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    want, want_logps = linear_group_loss(**exact, loss_type="exo-rw", beta_r=1.0, backend="reference")
    torch.testing.assert_close(logps.double(), want_logps, atol=2e-4, rtol=0)
    for a, b in zip(got, torch.autograd.grad(want, [exact["hidden"], exact["weight"]]), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 3e-3 * b.norm()


@pytest.mark.usefixtures("many_threads")
def test_same_input_same_bits() -> None:
    made = problem([60, 41, 3, 3], 2, 16, 601)
    runs = []
    for _ in range(2):
        loss, logps = one_pass(made)
        runs.append([loss.detach(), logps, *torch.autograd.grad(loss, [made["hidden"], made["weight"]])])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_not_a_number_is_passed_on() -> None:
    made = problem([2, 2], 2, 3, 50)
    with torch.no_grad():
        made["hidden"][1, 0] = float("nan")
    loss, logps = one_pass(made)
    assert torch.isnan(loss)
    assert torch.isnan(logps[0, 0])
    assert torch.isfinite(logps[0, 1])


def test_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.zeros(8, 4, dtype=torch.bfloat16), torch.zeros(9, 4, dtype=torch.bfloat16)
    assert head_attention.applies(8, hidden, Head(weight))
    assert not head_attention.applies(8, hidden, Head(weight, bias=weight[:, 0]))
    assert not head_attention.applies(8, hidden, Head(weight, softcap=3.0))
    assert not head_attention.applies(8, hidden.half(), Head(weight.half()))
    monkeypatch.setattr(head_attention, "MAX_WIDTH", 3)
    assert not head_attention.applies(8, hidden, Head(weight))
    monkeypatch.setattr(head_attention, "MAX_WIDTH", 4)
    monkeypatch.setattr(head_attention, "MIN_ROWS", 9)
    assert not head_attention.applies(8, hidden, Head(weight))
    monkeypatch.setattr(head_attention, "MIN_ROWS", 1)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not head_attention.applies(8, hidden, Head(weight))
