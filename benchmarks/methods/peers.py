"""The methods that the benchmarks of the operation compare: ours, full logits, and the libraries people use today.

Every method is a function of the same inputs, hidden (N, D), weight (V, D), targets (N,), cu_seqlens (G·K + 1,) (on the
CPU or with the others), ref_logps and rewards (G, K), and the options of `exo_fast.loss.group_loss`, to the same mean
loss and the log-probs it is made of.

    full-logits           one product, log_softmax, gather
    full-logits-compiled  the same under torch.compile
    full-logits-fp32      the same on operands widened to float32, so that logits are not rounded to bf16; on a CPU the
                          products of widened bf16 operands run in bf16 with float32 sums, which loses nothing
    original              like the EXO repository: logits divided by the temperature, log_softmax of all of them in the
                          logits' dtype, its loss
    trl                   the log-probs of TRL's trainers (`selective_log_softmax`) on full logits
    checkpoint            torchtune's chunking: 8 chunks of rows, here each under activation checkpointing, so that
                          its logits are recomputed in backward
    liger                 Liger's chunked DPO. Its only loss that others here compute too is exo_pair: pairs of equal
                          length, and no reference log-probs from outside, so ref_logps must be 0. Chunks have about
                          1,024 rows, which is faster than its default of one pair
    liger-compiled        the same under torch.compile, its default
    cce                   Apple's cut_cross_entropy with its defaults: small gradients dropped, and on a machine without
                          a GPU its implementation for those (impl="torch_compile")
    cce-exact             the same with no gradient dropped, GPU only
    cce-compiled          impl="torch_compile" on a GPU
    cce-fp32              cce on operands widened to float32, as in full-logits-fp32, CPU only
    torch-chunked         PyTorch's own linear_cross_entropy with its options for chunks (2.13 and newer), log-probs of
                          tokens; it forms its logits again in backward
    liger-ce              Liger's fused linear cross entropy in Triton, GPU only; the same
    liger-cute            Liger's scaled cross entropy in CuTe, Hopper and newer; the same
    quack                 quack's cross entropy in CuTe behind a product: full logits in the operands' dtype, GPU only
    exo_fast              linear_group_loss: one pass
    exo_fast-chunked      the same on a GPU with the other schedule for bf16, logits in a chunk instead of U kept
    exo_fast-two-pass     linear_logprobs, then group_loss

`unavailable` returns why a method cannot run, such as a package that is not installed. A method's forward and backward
run in the context `settings`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import group_loss, linear_group_loss
from exo_fast.precision import matmul_precision

METHODS = (
    "full-logits", "full-logits-compiled", "full-logits-fp32", "original", "trl", "checkpoint", "torch-chunked",
    "liger", "liger-compiled", "liger-ce", "liger-cute", "cce", "cce-exact", "cce-compiled", "cce-fp32", "quack",
    "exo_fast", "exo_fast-chunked", "exo_fast-two-pass",
)  # fmt: skip
PACKAGES = {"cce": "cut_cross_entropy", "liger": "liger_kernel", "trl": "trl", "quack": "quack"}
GPU_ONLY = ("liger-ce", "liger-cute", "quack")
COMPILED = ("full-logits-compiled", "liger-compiled", "cce", "cce-fp32")  # on a CPU, where torch.compile needs C++
CHUNKS = 8  # torchtune's default
LIGER_ROWS = 1024
TEMPERATURE = 1.0
Operation = Callable[..., tuple[Tensor, Tensor]]
TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]


def unavailable(method: str, precision: str, device: str) -> str | None:
    """Return why a method cannot run; None if it can."""
    package = PACKAGES.get(method.split("-")[0])
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if method == "torch-chunked" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no linear_cross_entropy with options: 2.13 has"
    if method in GPU_ONLY and device != "cuda":
        return "its kernels are compiled for a GPU only"
    if method == "liger-cute":
        if precision != "bf16":
            return "Liger's CuTe kernels take bf16 only"
        if importlib.util.find_spec("cutlass") is None:
            return "nvidia-cutlass-dsl is not installed"
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9:
            return "Liger's CuTe kernels need Hopper or newer"
    if method in ("cce", "cce-exact") and device == "cuda" and precision == "fp32":
        return "the backward kernels of cut_cross_entropy take bf16 and fp16 only"
    if method in ("cce-exact", "cce-compiled") and device != "cuda":
        return "the same as cce where there is no GPU"
    if method == "cce-fp32" and device == "cuda":
        return "the backward kernels of cut_cross_entropy take bf16 and fp16 only"
    if method.endswith("-fp32") and precision == "fp32":
        return f"the same as {method.removesuffix('-fp32')} in fp32"
    if method == "exo_fast-chunked" and precision != "bf16":
        return "exo_fast has a choice of schedules in bf16 only"
    if method in COMPILED and device == "cpu" and not cpp_compiler():
        return "torch.compile needs a C++ compiler on a CPU: none is installed"
    return None


def cpp_compiler() -> str | None:
    """Return the C++ compiler that torch.compile would use; None if it is missing."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else ["g++", "c++", "clang++"])), None)


def float32_logits(method: str, precision: str) -> bool:
    """Check that a method's logits are never rounded to a dtype narrower than float32."""
    return precision == "fp32" or method.startswith("exo_fast") or method.endswith("-fp32")


def settings(method: str, precision: str, device: str) -> AbstractContextManager[None]:
    """Return the context of a method's forward and backward, in which a peer with float32 logits is as fast as it can
    be."""
    rounded = method.endswith("-fp32") and precision == "bf16" and device == "cpu"
    return matmul_precision("bf16" if rounded else "ieee")


def operation(method: str) -> Operation:
    """Return the method's function (hidden, weight, targets, cu_seqlens, ref_logps, rewards) -> loss, sequence
    log-probs (G, K)."""
    special = {
        "original": original,
        "trl": trl,
        "liger": functools.partial(liger, compiled=False),
        "liger-compiled": liger,
        "exo_fast": linear_group_loss,
        "exo_fast-chunked": chunked,
    }
    if method in special:
        return special[method]

    token_logps = token_logps_of(method)

    def run(hidden, weight, targets, cu_seqlens, ref_logps, rewards, **options):
        sums = sequence_logps(token_logps(hidden, weight, targets), cu_seqlens).view_as(ref_logps)
        return group_loss(sums, ref_logps, rewards, **options), sums.detach()

    return run


def sequence_logps(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Compute `reference.sequence_logps` for boundaries on either device, without making the host wait for a GPU."""
    lengths = cu_seqlens.to(token_logps.device, non_blocking=True).diff()
    sequences = torch.arange(len(lengths), device=token_logps.device)
    owner = torch.repeat_interleave(sequences, lengths, output_size=len(token_logps))
    return token_logps.new_zeros(len(lengths)).index_add(0, owner, token_logps)


def token_logps_of(method: str) -> TokenLogps:
    """Return the method's function (hidden (N, D), weight (V, D), targets (N,)) -> log-probs (N,).

    Raises KeyError for a method without log-probs of tokens.
    """
    return {
        "full-logits": full_logits,
        "full-logits-compiled": compiled_full_logits,
        "full-logits-fp32": wide_full_logits,
        "checkpoint": checkpointed,
        "cce": cut_cross_entropy,
        "cce-exact": functools.partial(cut_cross_entropy, exact=True),
        "cce-compiled": functools.partial(cut_cross_entropy, compiled=True),
        "cce-fp32": wide_cut_cross_entropy,
        "torch-chunked": torch_chunked,
        "liger-ce": liger_cross_entropy,
        "liger-cute": liger_scaled_cross_entropy,
        "quack": quack_cross_entropy,
        "exo_fast": linear_logprobs,
        "exo_fast-two-pass": linear_logprobs,
    }[method]


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets.unsqueeze(1)).squeeze(1)


def wide_full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return full_logits(hidden.float(), weight.float(), targets)


def compiled_full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return _compiled()(hidden, weight, targets)


@functools.cache
def _compiled() -> TokenLogps:
    return torch.compile(full_logits, dynamic=False)


def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    parts = zip(hidden.chunk(CHUNKS), targets.chunk(CHUNKS), strict=True)
    return torch.cat(
        [checkpoint(full_logits, h, weight, y, use_reentrant=False, preserve_rng_state=False) for h, y in parts]
    )


def cut_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, exact: bool = False, compiled: bool = False
) -> Tensor:
    from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

    options: dict = {"impl": "cce" if hidden.is_cuda and not compiled else "torch_compile"}
    if exact and hidden.is_cuda:  # later versions have a separate name for it
        options = (
            {"impl": "cce_exact"} if hasattr(LinearCrossEntropyImpl, "CCE_EXACT") else {**options, "filter_eps": None}
        )
    return -linear_cross_entropy(hidden, weight, targets, reduction="none", **options).float()


def wide_cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cut_cross_entropy(hidden.float(), weight.float(), targets)


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -torch.nn.functional.linear_cross_entropy(
        hidden, weight, targets, reduction="none", options=options
    ).float()  # fmt: skip


def liger_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    options = (None, None, -100, 0.0, 0.0, "none")  # bias, class weights, ignored, z loss, smoothing, reduction
    return -LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, *options)[0].float()


def liger_scaled_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets).float()


def quack_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return -linear_cross_entropy_func(hidden, weight, None, targets, reduction="none").float()


def original(
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
    """Compute exo-pref, with sums of log-probs in float32, which flatters it in bf16."""
    if loss_type != "exo-pref":
        raise ValueError(f"loss_type={loss_type!r}: the peer computes exo-pref")
    token_logps = ((hidden @ weight.T) / TEMPERATURE).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    sums = sequence_logps(token_logps.float(), cu_seqlens).view_as(ref_logps)
    log_q = (beta_pi * (sums - ref_logps)).log_softmax(-1)
    target = torch.full_like(log_q, label_smoothing / (log_q.shape[1] - 1))
    target = target.scatter(1, rewards.argmax(1, keepdim=True), 1 - label_smoothing)
    return (log_q.exp() * (log_q - target.log())).sum(-1).mean(), sums.detach()


def trl(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    **options,
) -> tuple[Tensor, Tensor]:
    """Compute the loss on sequences of one length, (G·K, T), the layout of TRL's trainers."""
    from trl.trainer.utils import selective_log_softmax

    sequences = ref_logps.numel()
    logits = hidden.view(sequences, -1, hidden.shape[1]) @ weight.T
    sums = selective_log_softmax(logits, targets.view(sequences, -1)).float().sum(1).view_as(ref_logps)
    return group_loss(sums, ref_logps, rewards, **options), sums.detach()


def chunked(*inputs: Tensor, **options) -> tuple[Tensor, Tensor]:
    from exo_fast.backends import triton

    before, triton.SCHEDULE = triton.SCHEDULE, "chunked"
    try:
        return linear_group_loss(*inputs, **options)
    finally:
        triton.SCHEDULE = before


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
    compiled: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute the loss of pairs whose first candidate is the preferred one, all of one length; ref_logps 0."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    groups = len(ref_logps)
    loss_of = LigerFusedLinearDPOLoss(
        beta=beta_pi,
        loss_type={"exo-pref": "exo_pair", "dpo-pref": "sigmoid"}[loss_type],
        label_smoothing=label_smoothing if loss_type == "exo-pref" else 0.0,
        use_ref_model=False,
        compiled=compiled,
        chunk_size=max(1, LIGER_ROWS * groups // len(hidden)),
    )
    # group by group -> all preferred, then all others
    rows = hidden.view(groups, 2, -1, hidden.shape[1]).transpose(0, 1).flatten(0, 1)
    loss, (chosen, rejected, *_) = loss_of(weight, rows, targets.view(groups, 2, -1).transpose(0, 1).flatten(0, 1))
    return loss, torch.stack([chosen, rejected], dim=1).detach()
