"""What the Triton backend starts on a device for a chunk of a step: at N = 512 the host is slower than the GPU.

In Triton's interpreter. A launch is a kernel of this library, a product of the library, or any other operation of
PyTorch that computes or copies; views and allocations start nothing.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_work import Launches
from torch.utils._python_dispatch import _disable_current_modes

from exo_fast.backends import interpreted
from exo_fast.head import Head
from exo_fast.reference import LossOptions

pytestmark = pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
N, D, V = 192, 32, 64


def step(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunks: int, schedule: str, targets=None):
    """Return the launches of one group loss with its gradients in this number of chunks, and the gradients."""
    from exo_fast.backends import triton as backend

    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, D, generator=g).to(dtype) for rows in (N, V))
    targets = torch.randint(V, (N,), generator=g) if targets is None else targets
    bounds, numbers = torch.arange(0, N + 1, 8), torch.randn(2, N // 16, 2, generator=g)
    launches = Launches()

    def counted(function: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
        """Return the function, each call of which is one launch, whatever it does in the interpreter."""

        def call(*args: Any, **kwargs: Any) -> Any:
            launches.counts[name or args[0].__name__] += 1
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(backend, "MIN_ROWS", 1)
        patch.setattr(backend, "SCHEDULE", schedule)
        patch.setattr(backend, "TILE", 1)
        for name in ("matmul", "add_matmul"):
            patch.setattr(backend, name, counted(getattr(backend, name), "product"))
        patch.setattr(backend, "launch", counted(backend.launch))
        kind = backend.Kept if schedule == "kept" else backend.Chunked
        row = kind.row_bytes(backend.Rows(hidden, Head(weight, None, 1.0, None), targets))
        with launches:
            _, _, gradients = backend.group_loss_forward(
                hidden, Head(weight, None, 1.0, None), targets, bounds, numbers[0], numbers[1], LossOptions("exo-rw"),
                (True, True, False), N // chunks * row,
            )  # fmt: skip
    return launches.counts, gradients


@pytest.mark.parametrize(("dtype", "schedule"), [(BF16, "kept"), (BF16, "chunked"), (FP32, "chunked")])
def test_a_chunk_starts_at_most_twelve_launches(monkeypatch: pytest.MonkeyPatch, dtype, schedule: str) -> None:
    few, many = (step(monkeypatch, dtype, chunks, schedule)[0] for chunks in (3, 6))
    assert few["group_loss"] * 2 == many["group_loss"] == 6
    for_a_chunk = {name: (many[name] - few[name]) / 3 for name in many}
    assert sum(for_a_chunk.values()) <= 12, for_a_chunk
    assert (many - few).total() == 3 * sum(for_a_chunk.values())
    once = few.total() - 3 * sum(for_a_chunk.values())
    assert once <= 12, {name: few[name] - 3 * for_a_chunk[name] for name in few}


def test_launches_of_a_chunk_that_keeps_u(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (step(monkeypatch, BF16, chunks, "kept")[0] for chunks in (3, 6))
    assert {name: (many[name] - few[name]) // 3 for name in many if many[name] > few[name]} == {
        "target_shift": 1, "linear_logsumexp": 3, "merge": 2, "group_loss": 1, "product": 2, "finish_hidden": 1,
        "scale_hidden": 1, "add_targets": 1,
    }  # fmt: skip
