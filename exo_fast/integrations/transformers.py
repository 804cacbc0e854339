"""The fused head inside a transformers causal LM: `model(input_ids, labels=labels).loss` without logits.

    from exo_fast.integrations.transformers import apply_exo_fast

    model = apply_exo_fast(AutoModelForCausalLM.from_pretrained(...))

Supervised fine-tuning then runs as before, under transformers.Trainer, accelerate or your own loop. The model's
own forward still does everything but the loss: a hook on the decoder keeps the final hidden states and gives the
lm_head zero rows, and the loss is computed from the kept states. So masks, caches, router losses and outputs are
the model's by construction, and no model file is copied.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from exo_fast.backends import BACKENDS
from exo_fast.head import Head, read_head, unwrap
from exo_fast.logprobs import linear_logprobs
from exo_fast.validate import check_budget

Model = TypeVar("Model", bound=nn.Module)


def apply_exo_fast(
    model: Model, *, memory_budget: int | None = None, backend: str = "auto", eval_logits: bool = False
) -> Model:
    """Let `model` compute its loss on `labels` through `linear_logprobs`, and return it.

    Only this instance changes, not its class, and nothing that is saved: `state_dict()` and `save_pretrained` give the
    same as before. A call with `labels` returns `loss` as before and `logits` None (with `return_dict=False` a tuple
    without them), like Liger's in training. A call without `labels`, as in `generate`, runs the model's own forward.
    The loss is transformers' own: labels are shifted unless `shift_labels` comes beside them, −100 is ignored,
    `num_items_in_batch` replaces the mean by a sum over it, `logits_to_keep` selects the states that the labels belong
    to, and a mixture of experts adds its router loss if `output_router_logits` asks for it. It is float32, like the
    logits inside, also if the model is bf16 and would have rounded its own logits to that.

    The model's forward is not changed. A model with LongRoPE or dynamic NTK chooses the rotary frequencies of all rows
    by the longest row of the batch, padding counted. A text's loss then depends on the texts it is batched with, as it
    does without exo_fast; the stages and the TRL integration keep texts apart (`exo_fast.positions`).

    The head is read at every call, so adapters may be added, switched and trained in full (`modules_to_save`) later.
    Gradient checkpointing, autocast, torch.compile, DDP and DeepSpeed (ZeRO-3 too) work as usual: the loss is part of
    the model's forward. FSDP2 works too, with the lm_head in the group of the whole model; in a group of its own it is
    in pieces when the loss reads it, and the call is refused. nn.DataParallel copies modules without their methods and
    cannot run it: launch one process for each GPU. A deep copy is patched too; a model that was pickled whole comes
    back unpatched.

    Args:
        model: a transformers causal LM, or a PeftModel around one. Applying it again sets the options anew.
        memory_budget: bytes of vocabulary-sized scratch, see `exo_fast.logprobs.linear_logprobs`.
        backend: see there.
        eval_logits: in evaluation mode (`model.eval()`) leave calls with labels to the model too; its output then
            has the logits that a `compute_metrics` needs, at the cost of their memory.

    Raises:
        ValueError: for a model type or head that `read_head` refuses, a loss that is not ForCausalLMLoss, an unknown
            option, or a model whose forward was wrapped since it was applied before; the model is then unchanged.
    """
    causal_lm = unwrap(model)
    read_head(causal_lm)
    check_budget(memory_budget)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    if causal_lm.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"the loss of this {type(causal_lm).__name__} is {causal_lm.loss_function!r}, which exo_fast would replace "
            "by the cross-entropy of ForCausalLMLoss. Leave loss_function and config.loss_type unset to use exo_fast."
        )
    remove_exo_fast(model)
    fused = _Fused(vars(causal_lm).get("forward"), memory_budget, backend, eval_logits)
    fused.handle = causal_lm.get_decoder().register_forward_hook(fused.keep_hidden)
    causal_lm._exo_fast = fused
    causal_lm.forward = MethodType(_fused_forward(type(causal_lm).forward), causal_lm)
    return model


def remove_exo_fast(model: Model) -> Model:
    """Undo `apply_exo_fast`, and return the model; a model without it is left alone.

    Raises ValueError when something else has wrapped the model's forward since, as accelerate does for mixed precision.
    """
    causal_lm = unwrap(model)
    fused = vars(causal_lm).get("_exo_fast")
    if fused is None:
        return model
    forward = getattr(vars(causal_lm)["forward"], "__func__", None)
    # A pickle keeps a method by its name; loading finds the class's own method.
    if not _is_fused(forward) and forward is not type(causal_lm).forward:
        raise ValueError(
            f"the forward of this {type(causal_lm).__name__} was wrapped after apply_exo_fast, so that it cannot be "
            "restored. Take the wrapper off first; accelerate's with "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
        )
    fused.handle.remove()
    del causal_lm._exo_fast, causal_lm.forward
    if fused.instance_forward is not None:
        causal_lm.forward = fused.instance_forward
    return model


class _Fused:
    """The state of a patched model. No function here is a closure over the model, so a deep copy of the model is a
    model of its own."""

    def __init__(
        self, instance_forward: Callable[..., Any] | None, memory_budget: int | None, backend: str, eval_logits: bool
    ):
        self.instance_forward = instance_forward  # another library's replacement of the class's forward
        self.options = {"memory_budget": memory_budget, "backend": backend}
        self.eval_logits = eval_logits
        self.handle: Any = None
        self.keeping: Head | None = None  # the model's, while a forward with labels runs
        self.hidden: Tensor | None = None  # (B, T, D), between the decoder's end and the loss

    def keep_hidden(self, decoder: nn.Module, args: Any, output: Any) -> None:
        """Keep the final hidden states, as the decoder's forward hook, and leave the lm_head (B, 0, D), of a dtype that
        it takes."""
        if self.keeping is not None:
            self.hidden = output.last_hidden_state
            output.last_hidden_state = self.keeping.multiplied(self.hidden[:, :0])


def _fused_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method that replaces `own`, a causal LM's forward, with the same signature."""
    signature = inspect.signature(own)
    names = tuple(signature.parameters)[1:]

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        fused = self._exo_fast
        own_forward = fused.instance_forward or functools.partial(own, self)
        if kwargs.get("labels") is None or (fused.eval_logits and not self.training):
            return own_forward(**kwargs)
        return _forward_with_loss(self, fused, own_forward, **kwargs)

    # transformers reads from the signature which columns and keywords the model takes. `__wrapped__` has to go, because
    # accelerate takes its own wrappers off by following it to the end, and would arrive at the forward without us.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    del forward.__wrapped__
    forward._exo_fast = forward  # type: ignore[attr-defined]
    return forward


def _is_fused(forward: Any) -> bool:
    """Return whether it is the method itself: a wrapper by functools.wraps has the wrapped method's attribute."""
    return forward is not None and getattr(forward, "_exo_fast", None) is forward


def _forward_with_loss(
    model: Any,
    fused: _Fused,
    own_forward: Callable[..., Any],
    *,
    labels: Tensor,
    return_dict: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    **kwargs: Any,
) -> Any:
    """Run the model's own forward with zero rows for the lm_head, and compute the loss on all rows."""
    fused.keeping = read_head(model)  # for its dtype; ZeRO-3 gathers its weight only after the forward
    try:
        output = own_forward(**kwargs, return_dict=True)
        hidden = fused.hidden
    finally:
        fused.keeping, fused.hidden = None, None
    assert hidden is not None  # the decoder has run
    hidden = kept(hidden, logits_to_keep)
    loss = _causal_lm_loss(model, hidden, labels, fused.options, **kwargs)
    aux_loss = getattr(output, "aux_loss", None)
    if isinstance(aux_loss, Tensor):  # the number 0 from a model that has no router logits to give
        loss = loss + model.router_aux_loss_coef * aux_loss.to(loss.device)
    output = type(output)(**{**output, "loss": loss, "logits": None})
    if return_dict is None:
        return_dict = model.config.return_dict
    return output if return_dict else output.to_tuple()


def kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Return the states of `hidden` (B, T, D) whose logits transformers would compute: the last ones by number, the
    same places in every row (1-D), each row's own places (2-D, integers), or the True ones, flattened (2-D, bool; as
    transformers 5.23 and later)."""
    if isinstance(logits_to_keep, int):
        return hidden[:, slice(-logits_to_keep, None)]
    if logits_to_keep.ndim == 1:
        return hidden[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]
    return torch.take_along_dim(hidden, logits_to_keep[..., None], dim=1)


def _causal_lm_loss(
    model: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    options: dict[str, Any],
    *,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **_: Any,
) -> Tensor:
    """Return transformers' ForCausalLMLoss of the logits that `hidden` (…, D) would give; scalar, float32."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden.device)
    head = read_head(model)
    rows = head.multiplied(hidden.flatten(0, -2))
    logps = linear_logprobs(rows, head.weight, targets, ignore_index=ignore_index, **head.options(), **options)
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return -logps.sum() / (count.to(logps.device) if isinstance(count, torch.Tensor) else count)
