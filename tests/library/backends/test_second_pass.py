"""The second pass of the Triton backend, where the library's product is not the kernel's to the last bit.

The first pass takes statistics from the kernel's product, the second may take logits from the library's. Both are right
to about 1e-7 of a logit, and a library that adds in another order, or in TF32, is simulated here. With logits of L the
difference is 1e-7·L of every probability, so that 1 − p of a likely token is lost unless both come from one product.
"""

from collections.abc import Callable

import pytest
import torch
from likely_tokens import LOGITS, VOCAB, WIDTH, N, exact, likely_rows, limit, problem
from torch import Tensor

pytest.importorskip("triton")

from exo_fast import reference
from exo_fast.backends import interpreted
from exo_fast.head import Head
from exo_fast.kernels.launch import Config
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import linear_group_loss
from exo_fast.statistics import linear_logprobs_with_statistics

pytestmark = pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def in_another_order(a: Tensor, b: Tensor) -> Tensor:
    """Add from the last column to the first, a few at a time, in float32."""
    total = torch.zeros(len(a), b.shape[1])
    for start in reversed(range(0, a.shape[1], 4)):
        total += a[:, start : start + 4].float() @ b[start : start + 4].float()
    return total


def tf32(values: Tensor) -> Tensor:
    """Round float32 to 10 bits of mantissa, to nearest even."""
    bits = values.float().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def in_tf32(a: Tensor, b: Tensor) -> Tensor:
    return (tf32(a).double() @ tf32(b).double()).float()


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch):
    """The backend's module with chunks of any number of rows, and one block of the vocabulary or of the rows."""
    from exo_fast.backends import triton

    linear = Config({"BLOCK_N": 32, "BLOCK_V": 256, "BLOCK_D": 16, "PIECE": 256}, 4)
    fused = Config({"BLOCK_OWN": 64, "BLOCK_OTHER": 64, "BLOCK_D": 32}, 4)
    found = {
        (name, "sm_90", word, WIDTH): config
        for name, config in (("linear_logsumexp", linear), ("linear_logprobs_backward", fused))
        for word in ("bf16", "fp16", "fp32")
    }
    monkeypatch.setattr(triton, "MIN_ROWS", 1)
    monkeypatch.setattr(triton, "configured", found)
    return triton


@pytest.fixture
def library(backend, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Replace the library's product of the logits; the products of the gradients stay."""

    def install(product: Callable[[Tensor, Tensor], Tensor]) -> None:
        def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
            logits = out.shape[1] == VOCAB and a.shape[1] == WIDTH
            return out.copy_(product(a, b)) if logits else original(a, b, out=out)

        monkeypatch.setattr(backend, "matmul", matmul)

    original = backend.matmul
    return install


def assert_near(got: tuple[Tensor, ...], want: list[Tensor], allowed: float) -> None:
    for name, a, b in zip(("dH", "dW"), got, want, strict=True):
        error = float((a.double() - b).norm() / b.norm())
        assert error <= allowed, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("only_likely", [True, False], ids=["likely", "all"])
@pytest.mark.parametrize("largest", LOGITS)
@pytest.mark.parametrize("schedule", ["kept", "chunked", "chunks", "fused"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_logprobs(
    backend, library, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, schedule: str, largest: float,
    only_likely: bool,
) -> None:  # fmt: skip
    if schedule == "kept" and dtype != BF16:
        pytest.skip("bf16 alone keeps U")
    monkeypatch.setattr(backend, "SCHEDULE", "kept" if schedule == "kept" else "chunked")
    library(in_another_order)
    hidden, weight, targets = problem(dtype, largest)
    if only_likely:  # their gradients alone: other rows' gradients would hide them
        targets = torch.where(likely_rows(targets, hidden, weight), targets, -100)
    upstream = torch.linspace(0.5, 2, N) * (targets >= 0)
    made = [t.requires_grad_() for t in (hidden, weight)]
    budget = {"kept": None, "chunked": None, "chunks": 9000, "fused": 1}[schedule]
    logps = linear_logprobs(*made, targets, memory_budget=budget, backend="triton")
    got = torch.autograd.grad(logps, made, upstream)
    want = exact(hidden.detach(), weight.detach(), targets.clamp(min=0), upstream)
    assert_near(got, want, limit(dtype, largest))


@pytest.mark.parametrize("largest", LOGITS)
@pytest.mark.parametrize("own", [False, True], ids=["whole", "slice"])
def test_gradients_are_those_of_the_logits_that_made_them(backend, library, own: bool, largest: float) -> None:
    """In TF32 logits of 300 are off by 0.1, and their softmax is as exact as any."""
    library(in_tf32)
    hidden, weight, targets = problem(FP32, largest)
    upstream = torch.linspace(0.5, 2, N)
    _, stats, _ = backend.logprobs_forward(hidden, Head(weight), targets, None, False)
    # A slice that is the whole vocabulary, whose statistics are its own.
    *got, _ = backend.logprobs_backward(
        hidden, Head(weight), targets, stats, upstream, (True, True, False), None, stats if own else None
    )
    assert_near(tuple(got), exact(hidden, weight, targets, upstream, in_tf32(hidden, weight.T)), 1e-5)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("largest", LOGITS)
@pytest.mark.parametrize("budget", [None, 1], ids=["chunked", "fused"])
def test_a_slice_of_the_vocabulary(
    backend, monkeypatch, budget: int | None, largest: float, dtype: torch.dtype
) -> None:
    """Two slices, whose likely tokens lie in either: their shares of dH, and their dW."""

    def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return out.copy_(in_another_order(a, b)) if a.shape[1] == WIDTH else original(a, b, out=out)

    original = backend.matmul
    monkeypatch.setattr(backend, "matmul", matmul)
    hidden, weight, targets = problem(dtype, largest)
    targets = torch.where(likely_rows(targets, hidden, weight), targets, -1)
    upstream = torch.linspace(0.5, 2, N) * (targets >= 0)
    cut, elsewhere = 60, 2**31 - 1
    parts = [(weight[:cut], targets), (weight[cut:], torch.where(targets >= 0, targets - cut, -1))]
    parts = [(part, torch.where((y >= 0) & (y < len(part)) | (targets < 0), y, elsewhere)) for part, y in parts]
    found = [backend.logprobs_forward(hidden, Head(part), y, budget, False)[1] for part, y in parts]
    shift = torch.stack([own[0] for own in found]).amax(0)
    stats = torch.stack([
        shift, sum(own[1] * (own[0] - shift).exp() for own in found), found[0][2] + found[1][2],
    ])  # fmt: skip
    shares = [
        backend.logprobs_backward(hidden, Head(part), y, stats, upstream, (True, True, False), budget, own)
        for (part, y), own in zip(parts, found, strict=True)
    ]
    got = shares[0][0] + shares[1][0], torch.cat([shares[0][1], shares[1][1]])
    assert_near(got, exact(hidden, weight, targets.clamp(min=0), upstream), limit(dtype, largest))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("largest", LOGITS)
@pytest.mark.parametrize("budget", [None, 1], ids=["chunk", "fused"])
def test_after_token_statistics(backend, library, dtype: torch.dtype, largest: float, budget: int | None) -> None:
    """Their logits are the library's, and the second pass may be the kernel's. Ignored rows have no statistics."""
    library(in_another_order)
    hidden, weight, targets = problem(dtype, largest)
    targets = torch.where(likely_rows(targets, hidden, weight), targets, -100)
    upstream = torch.linspace(0.5, 2, N) * (targets >= 0)
    made = [t.requires_grad_() for t in (hidden, weight)]
    logps, _ = linear_logprobs_with_statistics(*made, targets, memory_budget=budget, backend="triton")
    got = torch.autograd.grad(logps, made, upstream)
    want = exact(hidden.detach(), weight.detach(), targets.clamp(min=0), upstream)
    assert_near(got, want, limit(dtype, largest))


@pytest.mark.parametrize("largest", LOGITS)
@pytest.mark.parametrize("schedule", ["one pass", "two passes", "long group", "fused"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_group_loss(
    backend, library, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, schedule: str, largest: float
) -> None:
    library(in_another_order)
    hidden, weight, targets = problem(dtype, largest)
    made = [t.requires_grad_() for t in (hidden, weight)]
    wide = [t.detach().double().requires_grad_() for t in made]
    targets = (hidden.detach().double() @ weight.detach().double().T).argmax(1)
    bounds = torch.tensor([0, 2, 3, 5, 8, 17, N])
    with torch.no_grad():
        sums = reference.sequence_logps(reference.linear_logprobs(*wide, targets), bounds).view(3, 2)
    batch = {"cu_seqlens": bounds, "rewards": torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.3, 0.9]])}
    batch["ref_logps"] = (sums + torch.tensor([[0.7, -0.4], [0.2, 1.0], [-0.5, 0.1]])).float()
    if schedule == "two passes":
        monkeypatch.setattr(backend, "group_bounds", lambda cu_seqlens, candidates: None)
    budget = {"one pass": None, "two passes": 9000, "long group": 9000, "fused": 1}[schedule]
    loss, _ = linear_group_loss(*made, targets, **batch, loss_type="exo-rw", memory_budget=budget, backend="triton")
    got = torch.autograd.grad(loss, made)
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    want = torch.autograd.grad(reference.linear_group_loss(*wide, targets, **batch, loss_type="exo-rw")[0], wide)
    # A log-prob of the first pass is off too, and with it each coefficient.
    assert_near(got, list(want), 4 * limit(dtype, largest))
