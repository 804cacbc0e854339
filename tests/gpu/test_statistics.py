"""Log-probs with token statistics on a GPU: numbers against float64, bits, graphs, and every configuration."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensor_cores import drift, logprob_limit

from exo_fast import reference
from exo_fast.precision import true_float32
from exo_fast.statistics import OUTPUTS, linear_logprobs_with_statistics

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA or ROCm device is available")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS: dict[str, dict[str, Any]] = {"plain": {}, "bias": {"bias": True}, "all": {"bias": True, "softcap": 30.0}}


@pytest.fixture(autouse=True)
def float32_products_of_float32() -> Iterator[None]:
    with true_float32():
        yield


def problem(precision: str, *, n: int = 300, width: int = 576, vocab: int = 50257, bias: bool = False, **head) -> dict:
    """Every second target is the argmax, every seventh is ignored."""
    g = torch.Generator().manual_seed(vocab)
    made = {"hidden": torch.randn(n, width, generator=g), "weight": torch.randn(vocab, width, generator=g) / width**0.5}
    if bias:
        made["bias"] = torch.randn(vocab, generator=g)
    made = {name: (2 * value).to("cuda", DTYPES[precision]) for name, value in made.items()}
    targets = torch.randint(vocab, (n,), generator=g).cuda()
    targets[::2] = reference.logits(**{name: v.double() for name, v in made.items()}, **head)[::2].argmax(1)
    targets[::7] = -100
    return {**made, "targets": targets, **head}


def exact(made: dict) -> dict:
    return {name: made[name].double() if name in ("hidden", "weight", "bias") else made[name] for name in made}


def assert_right(made: dict, precision: str = "bf16", **options) -> None:
    """Log Σ p² drifts twice as far as a log-prob, and entropies less; logits have a standard deviation of 4."""
    logps, got = linear_logprobs_with_statistics(**made, backend="triton", **options)
    want = reference.token_statistics(**exact(made))
    width = made["hidden"].shape[1]
    error = (logps - reference.linear_logprobs(**exact(made))).square().mean().sqrt()
    assert error <= logprob_limit(width, precision, 4.0)
    drifted = 0.0 if precision == "fp32" else 4 * drift(width, 4.0)
    for name in OUTPUTS[:3]:
        torch.testing.assert_close(getattr(got, name).double(), want[name], rtol=1e-5, atol=1e-5 + drifted)
    assert torch.equal(got.is_top1, want["is_top1"])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("precision", DTYPES)
def test_against_float64(precision: str, head: str) -> None:
    assert_right(problem(precision, **HEADS[head]), precision)


@pytest.mark.parametrize("budget", [1, 2**22])
def test_small_budgets(budget: int) -> None:
    assert_right(problem("bf16", **HEADS["all"]), memory_budget=budget)


@pytest.mark.parametrize("index", range(3))
def test_every_configuration(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = importlib.import_module("exo_fast.backends.triton")
    made = problem("bf16", **HEADS["all"])
    target = backend.of_device(made["hidden"].device)
    config = backend.statistics_kernel.configs(target, "bf16")[index]
    monkeypatch.setitem(backend.configured, ("token_statistics", target.name, "bf16", 576), config)
    assert_right(made)


def test_the_same_input_gives_the_same_bits_and_a_graph_replays_them() -> None:
    made = problem("bf16", **HEADS["all"])

    def run() -> tuple[torch.Tensor, ...]:
        logps, got = linear_logprobs_with_statistics(**made, backend="triton", memory_budget=2**24)
        return logps, *(getattr(got, name) for name in OUTPUTS)

    first, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))
