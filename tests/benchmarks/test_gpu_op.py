"""benchmarks/suites/gpu_op.py where there is no GPU: what methods and launches compute, and the report."""

import json
from pathlib import Path

import pytest
import torch

from exo_fast.benchmarks.suites import gpu_op


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "method",
    [
        "full-logits", "full-logits-compiled", "cce", "cce-exact", "liger",
        "exo_fast", "exo_fast-chunked", "exo_fast-two-pass",
    ],
)  # fmt: skip
def test_methods_compute_the_same(method: str, precision: str) -> None:
    """The same proof as on a GPU; what is compiled there runs eagerly here, and CCE in its version for the CPU."""
    if why := gpu_op.peers.unavailable(method, precision, "cpu"):
        pytest.skip(why)
    with torch.compiler.set_stance("force_eager"):
        gpu_op.proven(method, precision, device="cpu")


def test_another_loss_is_not_taken_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_op.peers.operation("full-logits")

    def wrong(*inputs: torch.Tensor, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
        return right(*inputs, **{**options, "beta_pi": 0.2})

    monkeypatch.setattr(gpu_op.peers, "operation", lambda method: wrong)
    with pytest.raises(AssertionError, match=r"wrong in fp32: relative error .* of loss"):
        gpu_op.proven("wrong", "fp32", device="cpu")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernel", ["logsumexp_gather", "logits_to_grad"])
def test_kernels_are_launched_right(kernel: str, precision: str) -> None:
    assert gpu_op.kernel_error(kernel, precision, device="cpu") <= gpu_op.KERNEL_TOLERANCE[precision]


def test_results_keep_the_rows_of_the_same_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_op, "copy_rate", lambda: 3e12)
    case = gpu_op.Case("exo_fast", "Gemma-3-270m", 2048, "bf16", "step")
    timed = {"ms": 4.0, "tflops": 300.0, "of_product": 0.8, "of_copy": 0.1, "scratch_mb": 1024.0}
    kernel = {"kernel": "logits_to_grad", "model": "Gemma-3-270m", "rows": 2048, "precision": "bf16", "ms": 1.0}
    path = tmp_path / "gpu_op.json"

    def run(*rows: dict) -> dict:
        results = gpu_op.Results(path)
        for row in rows:
            results.add(row)
        return results.save()

    run({**case._asdict(), **timed}, {**kernel, "of_copy": 0.91})
    peer = {**case._replace(method="full-logits")._asdict(), "skipped": "does not fit 80 GB"}
    saved = run(peer, {**case._asdict(), **timed, "ms": 5.0})
    assert saved == json.loads(path.read_text())
    assert [(row["method"], row.get("ms")) for row in saved["rows"]] == [("exo_fast", 5.0), ("full-logits", None)]
    text = gpu_op.report(saved)
    assert "does not fit 80 GB" in text
    assert next(line for line in text.splitlines() if "exo_fast" in line).split()[-5:] == [
        "5.000", "300.0", "0.80", "0.10", "1024",
    ]  # fmt: skip
    assert next(line for line in text.splitlines() if "logits_to_grad" in line).split()[-2:] == ["1.000", "0.91"]

    path.write_text(json.dumps({**saved, "machine": {**saved["machine"], "device": "another"}}))
    assert [row["method"] for row in run(peer)["rows"]] == ["full-logits"]
