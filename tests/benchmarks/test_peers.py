"""benchmarks/methods/peers.py, problems.py: every method computes the loss, log-probs and gradients of float64, and a
method that does not is found out."""

import importlib.util
import shutil

import pytest
import torch

from exo_fast import reference
from exo_fast.benchmarks.methods import peers, problems

SMALL = problems.Problem(width=48, vocab=1003, precision="fp32", candidates=2, completion=16, tokens=128)
WITHOUT_TOKEN_LOGPS = ("original", "trl", "liger", "liger-compiled", "exo_fast-chunked")


def needs(method: str, precision: str) -> None:
    if why := peers.unavailable(method, precision, "cpu"):
        pytest.skip(why)


def small(precision: str = "fp32", candidates: int = 2) -> problems.Inputs:
    completion = SMALL.completion * 2 // candidates
    return problems.make(problems.Problem(SMALL.width, SMALL.vocab, precision, candidates, completion, SMALL.tokens))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", peers.METHODS)
def test_group_loss_and_its_gradients(method: str, precision: str) -> None:
    needs(method, precision)
    with torch.compiler.set_stance("force_eager"), peers.settings(method, precision, "cpu"):
        found = problems.errors(method, "group_loss", "both", small(precision))
    assert set(found) == {"loss", "logps", "dH", "dW"}
    problems.prove(method, precision, found)


@pytest.mark.parametrize("work", ["forward", "frozen"])
@pytest.mark.parametrize("method", [m for m in peers.METHODS if not m.startswith("liger")])
def test_four_candidates_with_less_work(method: str, work: str) -> None:
    needs(method, "fp32")
    with torch.compiler.set_stance("force_eager"):
        found = problems.errors(method, "group_loss", work, small(candidates=4))
    assert set(found) == {"loss", "logps"} | ({"dH"} if work == "frozen" else set())
    problems.prove(method, "fp32", found)


@pytest.mark.parametrize("method", [m for m in peers.METHODS if m not in WITHOUT_TOKEN_LOGPS])
def test_token_logprobs(method: str) -> None:
    needs(method, "fp32")
    with torch.compiler.set_stance("force_eager"):
        problems.prove(method, "fp32", problems.errors(method, "logprobs", "both", small()))


@pytest.mark.parametrize("method", WITHOUT_TOKEN_LOGPS)
def test_a_method_without_token_logprobs_has_none(method: str) -> None:
    with pytest.raises(KeyError):
        peers.token_logps_of(method)


@pytest.mark.parametrize("method", peers.METHODS)
def test_float32_logits_are_told_from_rounded_ones(method: str) -> None:
    """Methods with "float32 logits" in their table give log-probs a hundred times as exact from bf16 operands."""
    needs(method, "bf16")
    with torch.compiler.set_stance("force_eager"), peers.settings(method, "bf16", "cpu"):
        error = problems.errors(method, "group_loss", "forward", small("bf16"))["logps"]
    assert (error < 5e-5) == peers.float32_logits(method, "bf16")


def test_settings_are_put_back() -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with peers.settings("full-logits-fp32", "bf16", "cpu"):
        assert matmul.fp32_precision == "bf16"
    with peers.settings("full-logits", "bf16", "cpu"):
        assert matmul.fp32_precision == before
    assert matmul.fp32_precision == before


def test_why_a_peer_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.unavailable("liger-compiled", "fp32", "cpu") == "liger_kernel is not installed"
    assert peers.unavailable("cce-fp32", "bf16", "cpu") == "cut_cross_entropy is not installed"
    assert peers.unavailable("full-logits", "fp32", "cpu") is None
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C++ compiler" in peers.unavailable("full-logits-compiled", "fp32", "cpu")
    assert peers.unavailable("full-logits-compiled", "fp32", "cuda") is None


def test_errors_are_those_of_plain_autograd_in_float64() -> None:
    inputs = small()
    found = problems.errors("full-logits", "group_loss", "both", inputs)
    exact = [t.double().requires_grad_() for t in (inputs.hidden, inputs.weight)]
    loss, sums = reference.linear_group_loss(
        *exact, inputs.targets, inputs.cu_seqlens, inputs.ref_logps, inputs.rewards, **problems.LOSS
    )
    grads = torch.autograd.grad(loss, exact)
    inputs = inputs.require("both")
    ours, our_sums = problems.run("full-logits", "group_loss", inputs)
    want = {
        "loss": ((ours - loss) / loss).abs().item(),
        "logps": ((our_sums - sums).square().mean().sqrt() / SMALL.completion**0.5).item(),
    }
    for name, got, true in zip(("dH", "dW"), torch.autograd.grad(ours, inputs.leaves), grads, strict=True):
        want[name] = ((got - true).norm() / true.norm()).item()
    assert found == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda run: lambda *a, **o: run(*a, **{**o, "beta_pi": 0.11}), "loss"),
        (lambda run: lambda hidden, *a, **o: run(hidden.detach() + (hidden - hidden.detach()) * 1.01, *a, **o), "dH"),
        (lambda run: lambda h, w, *a, **o: run(h, w + 0.01 * (w - w.detach()), *a, **o), "dW"),
    ],
    ids=["another loss", "another dH", "another dW"],
)
def test_another_computation_is_not_taken_for_the_same(wrong, what, monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers.operation("full-logits")
    monkeypatch.setattr(peers, "operation", lambda method: wrong(right))
    with pytest.raises(AssertionError, match=rf"wrong in fp32: error .* of {what}"):
        problems.prove("wrong", "fp32", problems.errors("wrong", "group_loss", "both", small()))


def test_a_problem_is_the_same_every_time_and_whole() -> None:
    first, second = small(), small()
    for a, b in zip(vars(first).values(), vars(second).values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="no multiple"):
        problems.make(problems.Problem(8, 16, "fp32", 2, 16, 100))
