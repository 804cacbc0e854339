"""The error of a product on tensor cores, which cut their float32 sums off and do not round them.

A matrix instruction adds `k` products to a sum and drops the bits that float32 does not hold, so that every step moves
the sum towards 0, by half of its last bit on average: at most 2⁻²⁴ of the sum. Rounded sums err both ways, and their
errors grow with the square root of the steps; these grow with the steps, D / k.

A log-prob is z[y] − logsumexp(z). Logits of a standard deviation σ count in the logsumexp near σ², where their weight
e^z leads (the mean of a normal variable under e^z). The sums of such a logit grow evenly up to σ², half of it on
average, so that the logsumexp falls, and log-probs rise, by up to

    ½ · (D / k) · 2⁻²⁴ · σ²

and the target's own logit is off by less. `tests/library/test_tensor_cores.py` simulates it. Measure the slope on every
new kind of GPU: k is 8 at the least on those that are known (A100), and instructions of 16 lose half as much.
"""

import torch
from torch import Tensor

K = 8  # products of one step
EXPONENTIALS = 1e-5  # the error of a log-prob, root mean square, beside the product's


def drift(width: int, deviation: float = 2.0, k: int = K) -> float:
    """Return how far a log-prob drifts, root mean square, with D = `width` and logits of this standard deviation."""
    return 0.5 * (width / k) * 2**-24 * deviation**2


def logprob_limit(width: int, precision: str, deviation: float = 2.0) -> float:
    """Return the root mean square error that a log-prob may have. float32 operands are multiplied in three parts, and
    added to sums outside of the tensor cores, which round."""
    return EXPONENTIALS + (0.0 if precision == "fp32" else drift(width, deviation))


def truncated_product(a: Tensor, b: Tensor, k: int = K, bits: int = 24) -> Tensor:
    """Return a (n, D) times bᵀ (m, D) as such a tensor core does: exact products, `k` added at a time, cut off."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for start in range(0, a.shape[1], k):
        part = slice(start, start + k)
        total += a[:, part].double() @ b[:, part].double().T
        mantissa, exponent = torch.frexp(total)
        total = torch.ldexp(torch.trunc(mantissa * 2.0**bits) / 2.0**bits, exponent)
    return total
