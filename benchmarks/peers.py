"""The methods that the benchmarks of the operation compare: ours, full logits, and the libraries people use today.

Every method is a function of the same inputs, hidden (N, D), weight (V, D), targets (N,), cu_seqlens (G·K + 1,) (on the
CPU or with the others), ref_logps and rewards (G, K), and the options of `exo_fast.loss.group_loss`, to the same mean
loss.

    full-logits           one product, log_softmax, gather
    full-logits-compiled  the same under torch.compile
    cce                   Apple's cut_cross_entropy with its defaults: small gradients dropped, and on a machine without
                          a GPU its implementation for those (impl="torch_compile")
    cce-exact             the same with no gradient dropped
    liger                 Liger's chunked DPO. Its one loss that others here compute too is exo_pair: pairs of equal
                          length, and no reference log-probs from outside, so ref_logps must be 0. It forms
                          gradients in forward, under no_grad too
    exo_fast              linear_group_loss: one pass
    exo_fast-chunked      the same on a GPU with the other schedule for bf16, logits in a chunk instead of U kept
    exo_fast-two-pass     linear_logprobs, then group_loss

`unavailable` says why a method cannot run, such as a package that is not installed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import group_loss, linear_group_loss

METHODS = (
    "full-logits", "full-logits-compiled", "cce", "cce-exact", "liger",
    "exo_fast", "exo_fast-chunked", "exo_fast-two-pass",
)  # fmt: skip
PACKAGES = {"cce": "cut_cross_entropy", "cce-exact": "cut_cross_entropy", "liger": "liger_kernel"}
Operation = Callable[..., tuple[Tensor, Tensor]]
TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]


def unavailable(method: str, precision: str, device: str) -> str | None:
    """Why a method cannot run, None when it can."""
    package = PACKAGES.get(method)
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if method.startswith("cce") and device == "cuda" and precision == "fp32":
        return "the backward kernels of cut_cross_entropy take bf16 and fp16 only"
    if method == "exo_fast-chunked" and precision != "bf16":
        return "exo_fast has a choice of schedules in bf16 only"
    return None


def operation(method: str) -> Operation:
    """hidden, weight, targets, cu_seqlens, ref_logps, rewards -> loss, token or sequence log-probs."""
    if method in ("liger", "exo_fast-chunked"):
        return {"liger": liger, "exo_fast-chunked": chunked}[method]
    if method.startswith("exo_fast") and method != "exo_fast-two-pass":
        return linear_group_loss

    token_logps = token_logps_of(method)

    def run(hidden, weight, targets, cu_seqlens, ref_logps, rewards, **options):
        sums = sequence_logps(token_logps(hidden, weight, targets), cu_seqlens).view_as(ref_logps)
        return group_loss(sums, ref_logps, rewards, **options), sums.detach()

    return run


def sequence_logps(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`reference.sequence_logps` of boundaries on either device, with nothing that makes the host wait for a GPU."""
    lengths = cu_seqlens.to(token_logps.device, non_blocking=True).diff()
    sequences = torch.arange(len(lengths), device=token_logps.device)
    owner = torch.repeat_interleave(sequences, lengths, output_size=len(token_logps))
    return token_logps.new_zeros(len(lengths)).index_add(0, owner, token_logps)


def token_logps_of(method: str) -> TokenLogps:
    """hidden (N, D), weight (V, D), targets (N,) -> log-probs (N,), as the method computes them."""
    return {
        "full-logits": full_logits,
        "full-logits-compiled": compiled_full_logits,
        "cce": cut_cross_entropy,
        "cce-exact": functools.partial(cut_cross_entropy, exact=True),
    }.get(method, linear_logprobs)


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets.unsqueeze(1)).squeeze(1)


def compiled_full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return _compiled()(hidden, weight, targets)


@functools.cache
def _compiled() -> TokenLogps:
    return torch.compile(full_logits, dynamic=False)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, exact: bool = False) -> Tensor:
    from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

    options: dict = {"impl": "cce" if hidden.is_cuda else "torch_compile"}
    if exact and hidden.is_cuda:  # a name of its own in later versions
        options = (
            {"impl": "cce_exact"} if hasattr(LinearCrossEntropyImpl, "CCE_EXACT") else {**options, "filter_eps": None}
        )
    return -linear_cross_entropy(hidden, weight, targets, reduction="none", **options).float()


def chunked(*inputs: Tensor, **options) -> tuple[Tensor, Tensor]:
    from exo_fast.backends import triton

    kept, triton.KEPT = triton.KEPT, ()
    try:
        return linear_group_loss(*inputs, **options)
    finally:
        triton.KEPT = kept


def liger(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    loss_type: str,
    beta_pi: float = 0.1,
    label_smoothing: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Pairs whose first candidate is the preferred one, all of one length; ref_logps 0."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    groups = len(ref_logps)
    loss_of = LigerFusedLinearDPOLoss(
        beta=beta_pi,
        loss_type={"exo-pref": "exo_pair", "dpo-pref": "sigmoid"}[loss_type],
        label_smoothing=label_smoothing if loss_type == "exo-pref" else 0.0,
        use_ref_model=False,
    )
    # group by group -> all preferred, then all others
    rows = hidden.view(groups, 2, -1, hidden.shape[1]).transpose(0, 1).flatten(0, 1)
    loss, (chosen, rejected, *_) = loss_of(weight, rows, targets.view(groups, 2, -1).transpose(0, 1).flatten(0, 1))
    return loss, torch.stack([chosen, rejected], dim=1).detach()
