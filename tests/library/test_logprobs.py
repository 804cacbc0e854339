"""linear_logprobs against the definition: shapes, ignored targets, gradients of any loss on log-probs."""

import pytest
import torch

from exo_fast import reference
from exo_fast.backends import torch as chunked
from exo_fast.logprobs import linear_logprobs


@pytest.fixture(autouse=True)
def thin_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MIN_ROWS", 1)
    monkeypatch.setattr(chunked, "BLOCK", 32)


def inputs(*shape: int, width: int = 6, vocab: int = 75) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, width, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64).requires_grad_()
    bias = torch.randn(vocab, generator=g, dtype=torch.float64).requires_grad_()
    return hidden, weight, bias, torch.randint(vocab, shape, generator=g)


@pytest.mark.parametrize("budget", [None, 3000, 1], ids=["kept", "rows", "blocks"])
@pytest.mark.parametrize("shape", [(1,), (23,), (3, 7)], ids=str)
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_against_the_definition(shape: tuple[int, ...], ignored: str, budget: int | None) -> None:
    hidden, weight, bias, targets = inputs(*shape)
    if ignored != "none":
        targets.view(-1)[:: 1 if ignored == "all" else 2] = -100
    options = {"bias": bias, "scale": 1.3, "softcap": 6.0}
    want = linear_logprobs(hidden, weight, targets, backend="reference", **options)
    got = linear_logprobs(hidden, weight, targets, memory_budget=budget, **options)
    assert got.shape == targets.shape
    assert (got[targets == -100] == 0).all()
    upstream = torch.linspace(-1, 2, targets.numel(), dtype=torch.float64).view(targets.shape)
    want_grads = torch.autograd.grad((want * upstream).sum(), (hidden, weight, bias))
    got_grads = torch.autograd.grad((got * upstream).sum(), (hidden, weight, bias))
    for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("budget", [None, 3000, 1], ids=["kept", "rows", "blocks"])
def test_gradcheck_with_ignored_targets(budget: int | None) -> None:
    hidden, weight, bias, targets = inputs(5, width=3, vocab=40)
    targets[3] = -1

    def function(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_logprobs(
            hidden, weight, targets, bias=bias, scale=0.9, softcap=5.0, ignore_index=-1, memory_budget=budget
        )

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))
    frozen = lambda h: function(h, weight.detach(), bias.detach())  # noqa: E731
    assert torch.autograd.gradcheck(frozen, (hidden,))


def test_dtype_is_float32_for_half_inputs_and_int32_targets_do() -> None:
    hidden, weight, _, targets = inputs(9)
    half = hidden.detach().bfloat16(), weight.detach().bfloat16()
    logps = linear_logprobs(*half, targets.int())
    assert logps.dtype == torch.float32
    exact = reference.linear_logprobs(half[0].double(), half[1].double(), targets)
    torch.testing.assert_close(logps.double(), exact, atol=1e-5, rtol=0)


def test_certain_token_has_log_prob_zero() -> None:
    hidden, weight = torch.tensor([[50.0, 0.0]]), torch.eye(2).repeat(40, 1)[:79]
    weight[78] = torch.tensor([10.0, 0.0])
    logps = linear_logprobs(hidden, weight, torch.tensor([78]))
    assert logps.item() == pytest.approx(0.0, abs=1e-6)
    assert logps.item() <= 0.0
