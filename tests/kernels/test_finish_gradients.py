"""dH, dW and db from U and from rounded gradients, whose entries at the targets are put back in float32: in Triton's
interpreter, against float64, for targets that few and many rows share."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from exo_fast import reference
from exo_fast.backends import interpreted
from exo_fast.head import Head

pytestmark = pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")
BF16, FP16 = torch.bfloat16, torch.float16
N = 70
TARGETS = {
    "one": torch.full((N,), 3),  # five turns of 16 rows for one program
    "seven": torch.arange(N) * 5 % 7,
    "runs": torch.arange(N) // 17,  # 17 rows: a turn and one more
    "ignored": torch.where(torch.arange(N) % 3 > 0, torch.arange(N) % 4, -1),
}


def gradients(backend, made: tuple[Tensor, Tensor, Tensor], targets: Tensor, softcap, schedule, budget):
    hidden, weight, bias = made
    head = Head(weight, bias, 0.7, softcap)
    _, stats, _ = backend.logprobs_forward(hidden, head, targets, budget, False)
    grad = torch.linspace(-1, 1, len(targets))
    backend.SCHEDULE = schedule
    return backend.logprobs_backward(hidden, head, targets, stats, grad, (True, True, True), budget)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch):
    from exo_fast.backends import triton

    monkeypatch.setattr(triton, "MIN_ROWS", 1)
    monkeypatch.setattr(triton, "SCHEDULE", None)
    return triton


@pytest.mark.parametrize("pattern", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "schedule", "width", "softcap", "budget"),
    [
        (BF16, "kept", 48, None, None),
        (BF16, "kept", 30, 5.0, 40_000),
        (BF16, "chunked", 48, 5.0, 40_000),
        (BF16, "fused", 30, None, 1),
        (FP16, "chunked", 30, None, None),
    ],
)
def test_gradients(backend, pattern: str, dtype, schedule: str, width: int, softcap, budget) -> None:
    g = torch.Generator().manual_seed(width)
    made = tuple(torch.randn(*shape, generator=g).to(dtype) for shape in ((N, width), (41, width), (41,)))
    targets = TARGETS[pattern]
    found = gradients(backend, made, targets, softcap, schedule, budget)
    again = gradients(backend, made, targets, softcap, schedule, budget)
    leaves = [tensor.double().requires_grad_() for tensor in made]
    logits = reference.logits(*leaves, scale=0.7, softcap=softcap)
    logps = torch.where(targets < 0, 0.0, logits.log_softmax(1).gather(1, targets.clamp(min=0)[:, None])[:, 0])
    (logps * torch.linspace(-1, 1, N).double()).sum().backward()
    for got, twice, leaf in zip(found, again, leaves, strict=True):
        assert torch.equal(got, twice)
        error = (got.double() - leaf.grad).norm()
        assert error <= 3e-3 * leaf.grad.norm()


def test_rows_of_a_target_keep_their_order(backend) -> None:
    """A stable order: the sum over rows of one target does not depend on the other rows of the step."""
    order = backend.TargetOrder(torch.tensor([4, -1, 4, 2, 9, 4, 2]))
    assert order.sorted.tolist() == [-1, 2, 2, 4, 4, 4, 9]
    assert order.order.tolist() == [1, 3, 6, 0, 2, 5, 4]
    assert order.place.tolist() == [3, 0, 4, 1, 6, 5, 2]
