"""Tokens with a probability near 1 and large logits: where 1 − p comes from two products, nothing of it is left."""

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
N, VOCAB, COMMON, WIDTH = 24, 131, 48, 64
ROUNDING = {BF16: 6e-3, FP16: 1e-3, FP32: 1e-5}  # of gradients that nearly cancel, along what all tokens share
LOGITS = (30.0, 300.0, 1e4)


def limit(dtype: torch.dtype, largest: float) -> float:
    """A probability is off by the last bits of its logit, 2⁻²⁴ of it each, whatever the sums are."""
    return ROUNDING[dtype] + 8 * 2**-24 * largest


def problem(dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden, weight and targets: logits near `largest`, all of a row with the same large part. One token of a
    row has a probability of 0.9 to 0.999; it is the target, but not of every fourth row."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=g)
    weight[:, :COMMON] = weight[0, :COMMON]
    likely = torch.randint(VOCAB, (N,), generator=g)
    hidden = torch.empty(N, WIDTH)
    hidden[:, :COMMON] = weight[0, :COMMON] * torch.rand(N, COMMON, generator=g)
    hidden[:, :COMMON] *= largest / (hidden[:, :COMMON] @ weight[0, :COMMON])[:, None]
    own = weight[likely, COMMON:]
    hidden[:, COMMON:] = 18 * own / own.square().sum(1, keepdim=True)
    targets = likely.clone()
    targets[::4] = (targets[::4] + 1) % VOCAB
    return hidden.to(dtype), weight.to(dtype), targets


def exact(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, logits: Tensor | None = None
) -> list[Tensor]:
    """dH and dW in float64, of these `logits` or of the operands' own."""
    h, w = hidden.double(), weight.double()
    z = h @ w.T if logits is None else logits.double()
    g = torch.nn.functional.one_hot(targets, VOCAB) - z.softmax(1)
    g *= upstream.double()[:, None]
    return [g @ w, g.T @ h]


def likely_rows(targets: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden.double() @ weight.double().T).argmax(1) == targets
