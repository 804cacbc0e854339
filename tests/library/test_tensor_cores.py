"""The limits of tests/gpu on log-probs: from a model of tensor cores that cut sums off, simulated here."""

import pytest
import torch
from tensor_cores import EXPONENTIALS, K, drift, logprob_limit, truncated_product
from torch import Tensor

WIDTHS = (256, 576, 1024, 2048, 4096, 8192)


def errors(width: int, dtype: torch.dtype, deviation: float = 2.0, k: int = K, bits: int = 24) -> Tensor:
    """Log-probs of random targets from truncated sums, minus those in float64."""
    g = torch.Generator().manual_seed(width)
    hidden = torch.randn(24, width, generator=g).to(dtype)
    weight = (torch.randn(1500, width, generator=g) * (deviation / width**0.5)).to(dtype)
    targets = torch.randint(1500, (24,), generator=g).unsqueeze(1)

    def logps(logits: Tensor) -> Tensor:
        return (logits.gather(1, targets) - logits.logsumexp(1, keepdim=True)).squeeze(1)

    return logps(truncated_product(hidden, weight, k, bits)) - logps(hidden.double() @ weight.double().T)


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def test_sums_are_cut_off_towards_zero() -> None:
    ones, small = torch.ones(1, 16), torch.full((1, 16), 0.0)
    small[0, 0], small[0, 8] = 1.0, 2.0**-24 * 1.75
    for sign in (1.0, -1.0):
        assert truncated_product(sign * ones, small).item() == sign  # to nearest, it would be 1 + 2⁻²³
        assert truncated_product(sign * ones, small, k=16).item() == sign
        assert truncated_product(sign * ones, small, bits=25).item() == sign * (1 + 2.0**-24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_limit_grows_as_the_error_does(width: int, dtype: torch.dtype) -> None:
    for deviation in (2.0, 4.0):
        for k in (8, 16):
            found = errors(width, dtype, deviation, k)
            assert rms(found) <= drift(width, deviation, k) <= 4 * rms(found)
    assert found.mean() > 0.5 * rms(found)  # a drift: in a sequence's sum it does not average out


def test_a_limit_that_does_not_grow_fails() -> None:
    for k in (8, 16):
        assert rms(errors(4096, torch.bfloat16, k=k)) > EXPONENTIALS
        assert rms(errors(256, torch.bfloat16, k=k)) < EXPONENTIALS


@pytest.mark.parametrize("width", [1024, 4096, 8192])
def test_a_wrong_product_is_caught(width: int) -> None:
    """Sums of 21 bits: eight times the error of a tensor core."""
    assert rms(errors(width, torch.bfloat16, bits=21)) > logprob_limit(width, "bf16")


def test_float32_has_no_drift() -> None:
    assert logprob_limit(8192, "fp32") == EXPONENTIALS
