"""`pytest benchmarks -m gpu`: the operation and the memory-bound kernels on a GPU (see benchmarks/suites/gpu_op.py)."""

import pytest
import torch

from exo_fast.benchmarks.methods import peers
from exo_fast.benchmarks.roofline.model import HEADS, TOKENS
from exo_fast.benchmarks.suites import gpu_op

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA or ROCm device is available")]

MODELS = [head.model for head in HEADS]
CASES = [(tokens, "bf16") for tokens in TOKENS] + [(TOKENS[0], "fp32")]


def needs(method: str, precision: str) -> None:
    if why := peers.unavailable(method, precision, "cuda"):
        pytest.skip(why)


@pytest.mark.parametrize("precision", gpu_op.PRECISIONS)
@pytest.mark.parametrize("method", peers.METHODS)
def test_methods_compute_the_same(method: str, precision: str) -> None:
    needs(method, precision)
    gpu_op.proven(method, precision)


@pytest.mark.parametrize("method", peers.METHODS)
@pytest.mark.parametrize("work", ["forward", "step"])
@pytest.mark.parametrize(("tokens", "precision"), CASES)
@pytest.mark.parametrize("model", MODELS)
def test_operation(method: str, work: str, tokens: int, precision: str, model: str, results: gpu_op.Results) -> None:
    needs(method, precision)
    try:
        gpu_op.proven(method, precision)
    except Exception as error:
        pytest.skip(f"not timed, for it did not compute the same: {error}")
    case = gpu_op.Case(method, model, tokens, precision, work)
    try:
        results.add(gpu_op.operation_row(case))
        return
    except torch.OutOfMemoryError:
        why = f"does not fit {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"
    results.add({**case._asdict(), "skipped": why})
    pytest.skip(why)


@pytest.mark.parametrize("precision", gpu_op.PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kernel", gpu_op.KERNELS)
def test_kernel(kernel: str, model: str, precision: str, results: gpu_op.Results) -> None:
    assert gpu_op.kernel_error(kernel, precision) <= gpu_op.KERNEL_TOLERANCE[precision]
    results.add(gpu_op.kernel_row(kernel, model, precision))
