"""The four `torch.library` operators of the library, one set for the torch and the triton backend.

A backend is a set of plain functions of tensors (`exo_fast.backends.torch`); here they get schemas, fake
implementations (the shapes, dtypes and devices of their results, for tracing) and derivatives. So torch.compile,
torch.export and make_fx see one node for each, and eager mode runs the same operators. The public functions check their
inputs; the operators trust them.

    linear_logprobs                  (N,) log-probs, and for the backward pass row statistics, or ∂ℓ_t/∂h_t itself
    linear_logprobs_with_statistics  the same, and further statistics of each row's distribution
    linear_logprobs_backward         dH, dW, db from the row statistics of either and the upstream gradient
    linear_group_loss                the mean loss and, in the same pass, its gradients, which backward only scales

An unneeded gradient or statistic is an empty tensor (0,). dW and db are sums over
rows, returned in float32 (float64 for float64 inputs) and rounded once, to the dtype of the parameter, after the
upstream gradient has been multiplied in.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exo_fast.backends import implementation
from exo_fast.head import Head
from exo_fast.reference import LossOptions, compute_dtype
from exo_fast.validate import traced


def operator(function: Callable) -> Callable:
    """Register exo_fast::NAME on every device, with the schema of the function's type hints.

    Uses define and impl, not `torch.library.custom_op`, whose first call imports torch._dynamo: 3 s and 150 MB that
    a program without compilation does not need.
    """
    name = f"exo_fast::{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", function)
    return getattr(torch.ops.exo_fast, function.__name__).default


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Head:
    """Return the head in hidden's dtype: under autocast the weight comes in its own. The cast lives as long as the
    call, so that no second copy of the weight waits for the backward pass."""
    return Head(weight.to(hidden.dtype), bias, scale, softcap)


def _without_autocast(like: Tensor) -> AbstractContextManager:
    """Switch autocast off, in backward too: the public function has cast the operands; nothing is rounded again."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _filled(like: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def _empty_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, need: Sequence[bool]) -> tuple[Tensor, ...]:
    """Return gradients without values, for tracing."""
    acc = compute_dtype(hidden)
    dh = hidden.new_empty(hidden.shape) if need[0] else None
    dw = weight.new_empty(weight.shape, dtype=acc) if need[1] else None
    db = bias.new_empty(bias.shape, dtype=acc) if need[2] and bias is not None else None
    return _filled(hidden, dh, dw, db)


@operator
def linear_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), of hidden's dtype or a wider one
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64, −1 where ignored
    scale: float,
    softcap: float | None,
    memory_budget: int | None,
    unit_hidden: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs (N,), row statistics (3, N) (shift, Σ exp(z − shift), target logit), and ∂ℓ_t/∂h_t (N, D), the
    whole derivative if only hidden needs one, or (0,)."""
    with _without_autocast(hidden):
        logps, stats, unit = implementation(backend).logprobs_forward(
            hidden, _head(hidden, weight, bias, scale, softcap), targets, memory_budget, unit_hidden
        )
    return logps, stats, *_filled(hidden, unit)


@torch.library.register_fake("exo_fast::linear_logprobs")
def _(hidden, weight, bias, targets, scale, softcap, memory_budget, unit_hidden, backend):
    acc, n = compute_dtype(hidden), hidden.shape[0]
    unit = hidden.new_empty(hidden.shape if unit_hidden else 0)
    return hidden.new_empty(n, dtype=acc), hidden.new_empty(3, n, dtype=acc), unit


@operator
def linear_logprobs_backward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), of hidden's dtype or a wider one
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64, −1 where ignored
    stats: Tensor,  # (3, N)
    grad: Tensor,  # (N,) upstream gradient of the log-probs
    scale: float,
    softcap: float | None,
    memory_budget: int | None,
    need: Sequence[bool],  # for hidden, weight and bias: whether the gradient is wanted
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dH, dW, db from recomputed logits."""
    with _without_autocast(hidden):
        gradients = implementation(backend).logprobs_backward(
            hidden, _head(hidden, weight, bias, scale, softcap), targets, stats, grad, tuple(need), memory_budget
        )
    grad_hidden, grad_weight, grad_bias = _filled(hidden, *gradients)
    return grad_hidden, grad_weight, grad_bias


@torch.library.register_fake("exo_fast::linear_logprobs_backward")
def _(hidden, weight, bias, targets, stats, grad, scale, softcap, memory_budget, need, backend):
    return _empty_gradients(hidden, weight, bias, need)


def _save_logprobs(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, stats, unit = output
    _keep_for_backward(ctx, inputs, stats, unit)
    ctx.mark_non_differentiable(stats, unit)


def _keep_for_backward(ctx: Any, inputs: tuple, stats: Tensor, unit: Tensor | None) -> None:
    hidden, weight, bias, targets, scale, softcap, memory_budget, unit_hidden, backend = inputs
    ctx.set_materialize_grads(False)
    need = ctx.needs_input_grad[:3]
    ctx.unit = unit_hidden and need[0]
    ctx.options = (scale, softcap, memory_budget, (need[0] and not ctx.unit, *need[1:]), backend)
    ctx.unit_only = ctx.unit and not any(need[1:])
    rest = () if ctx.unit_only else (hidden, weight, bias, targets, stats)
    ctx.save_for_backward(unit if ctx.unit else None, *rest)


@once_differentiable
def _backward_logprobs(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    unit, *rest = ctx.saved_tensors
    grad_hidden = (unit * grad.unsqueeze(1)).to(unit.dtype) if ctx.unit else None
    if ctx.unit_only:
        return grad_hidden, *[None] * 8
    hidden, weight, bias, targets, stats = rest
    grad = grad.contiguous()  # the gradient of a sum is one number, expanded to N
    gradients = linear_logprobs_backward(hidden, weight, bias, targets, stats, grad, *ctx.options)
    dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    needed = ctx.options[3]
    found = [g.to(d) if need else None for g, d, need in zip(gradients, dtypes, needed, strict=True)]
    return grad_hidden if ctx.unit else found[0], *found[1:], *[None] * 6


torch.library.register_autograd("exo_fast::linear_logprobs", _backward_logprobs, setup_context=_save_logprobs)


@operator
def linear_logprobs_with_statistics(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), of hidden's dtype or a wider one
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64, −1 where ignored
    scale: float,
    softcap: float | None,
    memory_budget: int | None,
    outputs: Sequence[bool],  # which of entropy, log Σ p², mean logit and is_top1 are wanted
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return log-probs (N,) and row statistics (3, N) as `linear_logprobs`, and the four `outputs`, (N,) or (0,)."""
    with _without_autocast(hidden):
        logps, stats, found = implementation(backend).statistics_forward(
            hidden, _head(hidden, weight, bias, scale, softcap), targets, memory_budget, tuple(outputs)
        )
    *numbers, top = found
    return logps, stats, *_filled(logps, *numbers), logps.new_empty(0, dtype=torch.bool) if top is None else top


@torch.library.register_fake("exo_fast::linear_logprobs_with_statistics")
def _(hidden, weight, bias, targets, scale, softcap, memory_budget, outputs, backend):
    acc, n = compute_dtype(hidden), hidden.shape[0]
    *numbers, top = (n if wanted else 0 for wanted in outputs)
    found = (hidden.new_empty(size, dtype=acc) for size in numbers)
    top1 = hidden.new_empty(top, dtype=torch.bool)
    return hidden.new_empty(n, dtype=acc), hidden.new_empty(3, n, dtype=acc), *found, top1


def _save_logprobs_with_statistics(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """Save the tensors that `linear_logprobs` saves without ∂ℓ_t/∂h_t: the statistics have no gradient."""
    *tensors_and_numbers, _, backend = inputs
    _, stats, *found = output
    _keep_for_backward(ctx, (*tensors_and_numbers, False, backend), stats, None)
    ctx.mark_non_differentiable(stats, *found)


torch.library.register_autograd(
    "exo_fast::linear_logprobs_with_statistics", _backward_logprobs, setup_context=_save_logprobs_with_statistics
)


@operator
def linear_group_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), of hidden's dtype or a wider one
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64
    cu_seqlens: Tensor,  # (G·K + 1,) int64, on the CPU or on hidden's device
    ref_logps: Tensor,  # (G, K)
    rewards: Tensor,  # (G, K)
    loss_type: str,
    beta_pi: float,
    beta_r: float,
    label_smoothing: float,
    scale: float,
    softcap: float | None,
    memory_budget: int | None,
    need: Sequence[bool],  # for hidden, weight and bias: whether the gradient is wanted
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the mean loss over groups (), the policy's sequence log-probs (G, K), and dH, dW, db of the mean loss.

    The operator takes the mean because the gradients are the mean's: one number scales them, not one per group.
    """
    loss = LossOptions(loss_type, beta_pi, beta_r, label_smoothing)
    with _without_autocast(hidden):
        losses, policy_logps, gradients = implementation(backend).group_loss_forward(
            hidden, _head(hidden, weight, bias, scale, softcap), targets, cu_seqlens, ref_logps, rewards, loss,
            tuple(need), memory_budget,
        )  # fmt: skip
    return losses.mean(), policy_logps, *_filled(hidden, *gradients)


@torch.library.register_fake("exo_fast::linear_group_loss")
def _(
    hidden, weight, bias, targets, cu_seqlens, ref_logps, rewards, loss_type, beta_pi, beta_r, label_smoothing, scale,
    softcap, memory_budget, need, backend,
):  # fmt: skip
    acc = compute_dtype(hidden)
    gradients = _empty_gradients(hidden, weight, bias, need)
    return hidden.new_empty((), dtype=acc), hidden.new_empty(ref_logps.shape, dtype=acc), *gradients


def _save_group_loss(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, policy_logps, *gradients = output
    ctx.mark_non_differentiable(policy_logps, *gradients)
    ctx.set_materialize_grads(False)  # or backward would get zeros for every output, one of them (V, D)
    tensors, numbers, formed, backend = inputs[:7], inputs[7:14], inputs[14], inputs[15]
    need = ctx.needs_input_grad[:3]
    ctx.gradients = gradients if all(f or not n for f, n in zip(formed, need, strict=True)) else None
    ctx.options = (*numbers, need, backend)
    ctx.save_for_backward(*tensors)


@once_differentiable
def _backward_group_loss(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 16
    tensors = ctx.saved_tensors
    # The buffers are handed over, so no second copy of dW ever exists; a second backward makes them again.
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        gradients = linear_group_loss(*tensors, *ctx.options)[2:]
    scaled: list[Tensor | None] = [None] * 3
    for i, parameter in enumerate(tensors[:3]):
        if ctx.needs_input_grad[i]:
            scaled[i] = _scaled(gradients[i], grad, parameter.dtype)
    return *scaled, *[None] * 13


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `gradient` times a scalar, in `dtype`: in place, and on a GPU scaled and rounded by one float32 kernel."""
    factor = factor.reshape(1)  # of one dimension, so the product of a bfloat16 gradient is float32
    if traced(factor):
        return (gradient * factor).to(dtype)  # a graph has nothing in place: the gradients are outputs of a node
    if gradient.device.type == "cpu":
        scaled = gradient if float(factor) == 1.0 else torch.mul(gradient, factor, out=gradient)
        return scaled.to(dtype)
    out = gradient if gradient.dtype == dtype else gradient.new_empty(gradient.shape, dtype=dtype)
    return torch.mul(gradient, factor, out=out)


torch.library.register_autograd("exo_fast::linear_group_loss", _backward_group_loss, setup_context=_save_group_loss)
