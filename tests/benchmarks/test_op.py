"""benchmarks/op.py: its methods compute the same loss and gradients, and its report says what it was given."""

import pytest
import torch

from exo_fast.benchmarks import op


@pytest.mark.parametrize("long", [False, True], ids=["groups", "long"])
def test_methods_agree(long: bool) -> None:
    case = op.Case("exo_fast-long" if long else "exo_fast", 8, 101, "fp32", 512)
    inputs = op.synthetic(case)
    found = {}
    for method in ("full-logits", case.method):
        loss, sums = op.operation(method)(*inputs, loss_type="exo-rw")
        found[method] = (loss, sums, *torch.autograd.grad(loss, inputs[:2]))
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_report_gives_ratio_and_share_of_the_floor() -> None:
    problem = {"width": 576, "vocab": 49152, "precision": "fp32", "tokens": 2048}
    results = {
        "floors": [{**problem, "seconds": {"2048": 1.5}}],
        "accuracy": [{"method": "cce", "precision": "bf16", "logprob_rms": 0.02, "logprob_sum": 0.5, "dH": 1, "dW": 2}],
        "rows": [
            {**problem, "method": "full-logits", "skipped": "needs 40 GB"},
            {**problem, "method": "cce", "seconds": 4.0, "scratch_mb": 700},
            {**problem, "method": "exo_fast", "seconds": 2.0, "scratch_mb": 250},
        ],
    }
    text = op.report(results)
    assert "needs 40 GB" in text
    ours = next(line for line in text.splitlines() if "exo_fast" in line).split()
    assert ours[-4:] == ["2.000", "0.75", "0.50", "250"]
