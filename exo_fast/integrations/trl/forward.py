"""The forward that a causal LM has in a TRL trainer: log-probs of labels, or the loss of groups, without logits.

TRL asks a model for `model(..., labels=labels, fused_lm_head=True)` and reads per-token numbers off the answer
(`trl.trainer.utils.add_fused_lm_head`). Here they come from `exo_fast.logprobs`, for the labelled positions alone, and
rows that have the same prompt share it (`shared_rows`). All of it is inside the model's forward, where DDP, FSDP and
DeepSpeed ZeRO-3 expect parameters to be read.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from exo_fast.head import Head, final_hidden, read_head
from exo_fast.integrations.trl.shared_rows import SharedRows, share_rows
from exo_fast.layout import MaskPlan, model_inputs
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import linear_group_loss
from exo_fast.positions import by_text, packed_lengths, padded_texts
from exo_fast.sharing import CHECKED_GROUPS, check_sharing, shortened
from exo_fast.statistics import OUTPUTS, TokenStatistics, linear_logprobs_with_statistics

logger = logging.get_logger(__name__)
SHAREABLE = frozenset({"input_ids", "attention_mask", "use_cache", "output_router_logits"})  # forward arguments
# Learned positions that count from the padding unless given: rows that begin with the prompt have others.
LEARNED_POSITIONS = frozenset({"gpt2"})
DENSE = 4  # how many times the attention of ordinary rows a dense mask may cost: a K of 4 with short prompts


@dataclass
class GroupOutput(ModelOutput):
    """The loss of a batch of groups, and the policy's sequence log-probs (G, K), detached."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # the name under which a trainer finds a model's result: here the log-probs


@dataclass
class FusedForward:
    """The settings of a model's fused forward, and the result of its check."""

    fallback: Callable[..., Any]  # TRL's own fused forward, for models and inputs that this one refuses
    output_class: type  # TRL reads the numbers from it
    plan: MaskPlan
    temperature: float = 1.0
    cast_lm_head_to_fp32: bool = False
    outputs: tuple[str, ...] = ("log_probs",)
    share_prompts: bool = True
    options: dict[str, Any] = field(default_factory=dict)  # memory_budget, backend
    checked: bool = False  # whether shared and ordinary rows have been compared on this model

    def per_token(
        self,
        model: PreTrainedModel,
        *args: Any,
        labels: Any = None,  # Tensor (B, T), to be shifted
        shift_labels: Tensor | None = None,  # (B, T), shifted already
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return TRL's answer: log-probs (B, T − 1), or (B, T) with shift_labels, and the statistics asked for."""
        kwargs["use_cache"] = False
        if getattr(model.config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        shared = self.shared_rows(model, args, kwargs, labels) if shift_labels is None else None
        router: dict[str, Any] = {}
        if shared is not None:
            hidden = self.shared_hidden(model, shared)
            wanted, places = (t.to(hidden.device, non_blocking=True) for t in (shared.targets, shared.places))
            shape = (len(labels), labels.shape[1] - 1)
            mask = labels[:, 1:].to(hidden.device) != -100
        else:
            outputs = self.ordinary(model, *args, **kwargs)
            router = {"router_logits": getattr(outputs, "router_logits", None)}
            hidden = outputs.last_hidden_state if shift_labels is not None else outputs.last_hidden_state[:, :-1]
            targets = (labels[:, 1:] if shift_labels is None else shift_labels).to(hidden.device)
            mask, shape = targets != -100, tuple(targets.shape)
            places = mask.reshape(-1).nonzero().squeeze(1)
            hidden, wanted = hidden.reshape(-1, hidden.shape[-1])[places], targets.reshape(-1)[places]
        logps, statistics = self.project(model, hidden, wanted)

        def put(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return values.new_zeros(shape).view(-1).index_copy(0, places, values.to(places.device)).view(shape)

        log_probs: Any = put(logps)
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -log_probs.sum() / count
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = load_balancing_loss(model, router["router_logits"], kwargs.get("attention_mask"))
            loss = loss + getattr(model.config, "router_aux_loss_coef", 0.0) * aux_loss
        numbers = {name: put(getattr(statistics, name)) for name in OUTPUTS}
        if numbers["entropy"] is not None and log_probs.requires_grad:
            numbers["entropy"] = EntropyWithoutGradient.apply(numbers["entropy"], log_probs)
        return self.output_class(loss=loss, log_probs=log_probs, label_mask=mask, aux_loss=aux_loss, **numbers)

    def groups(
        self,
        model: PreTrainedModel,
        *,
        host: dict[str, np.ndarray],  # labels, input_ids and attention_mask
        ref_logps: Tensor,  # (G, K)
        rewards: Tensor,  # (G, K)
        loss: dict[str, Any],  # loss_type, beta_pi, beta_r, label_smoothing
        **inputs: Tensor,  # input_ids, attention_mask
    ) -> GroupOutput:
        """Return the mean loss over groups, in one pass over the vocabulary.

        `host` has what is read on the host, (G·K, T) each, so that nothing waits for the device: `labels` are −100 on
        prompts and padding, with rows in the order of groups and candidates, and the others are the model's inputs.
        """
        on_host = {name: torch.from_numpy(value) for name, value in host.items()}
        labels = on_host.pop("labels")
        shared = self.shared_rows(model, (), {**inputs, **on_host}, labels, candidates=ref_logps.shape[1])
        if shared is not None:
            hidden, targets = self.shared_hidden(model, shared), shared.targets
            bounds = shared.packed.cu_seqlens
        else:
            # The last T positions: prompt-learning PEFT has put tokens of its own before them.
            hidden = self.ordinary(model, **inputs, use_cache=False).last_hidden_state[:, -labels.shape[1] : -1]
            mask = labels[:, 1:] != -100
            rows, columns = (index.to(hidden.device, non_blocking=True) for index in mask.nonzero(as_tuple=True))
            hidden, targets = hidden[rows, columns], labels[:, 1:][mask]
            bounds = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        head = self.head(model)
        hidden = head.multiplied(hidden.to(head.weight.device))
        mean, logps = linear_group_loss(
            hidden, head.weight, targets.to(hidden.device, non_blocking=True), bounds, ref_logps.to(hidden.device),
            rewards.to(hidden.device), **head.options(self.temperature), **loss, **self.options,
        )  # fmt: skip
        return GroupOutput(loss=mean, logits=logps)

    def shared_rows(
        self, model: PreTrainedModel, args: tuple, inputs: dict[str, Any], labels: Tensor | None, **options: Any
    ) -> SharedRows | None:
        """Return the batch in rows that share prompts, or None if it or the model does not allow sharing. The first
        batch is computed both ways and compared."""
        if not (self.share_prompts and self.plan.share) or labels is None or args or set(inputs) - SHAREABLE:
            return None
        if model.training and getattr(model.get_input_embeddings(), "neftune_noise_alpha", None):
            return None  # NEFTune's noise depends on the length of a row, and is drawn for each completion
        if inputs.get("input_ids") is None or inputs.get("output_router_logits"):
            return None
        mask = inputs.get("attention_mask")
        if self.plan.model_type in LEARNED_POSITIONS and mask is not None and not bool(mask[:, 0].all()):
            return None
        shared = share_rows(inputs["input_ids"], mask, labels, by_length=self.plan.by_length, **options)
        if shared is not None and self.too_wide(model, shared):
            shared = None
        if not self.checked and not everywhere(model, shared is not None):
            return None
        if shared is not None and not self.checked:
            several = [group for group in shared.groups if len(group.completions) > 1][:CHECKED_GROUPS]
            groups = [shortened(group, self.plan) for group in several]
            report = check_sharing(model, groups, self.plan, head=self.head(model))
            self.checked = True
            if not report.ok:
                self.share_prompts = False
                logger.warning(f"exo_fast: rows of one prompt do not share it: {report.reason}")
                return None
        return shared

    def too_wide(self, model: PreTrainedModel, shared: SharedRows) -> bool:
        """Return whether shared rows' attention would cost more than their prompts save. FlexAttention, and SDPA on a
        CPU (`exo_fast.backends.attention`), skip masked pairs; elsewhere a mask of (rows, 1, T, T) is made and read
        through."""
        implementation = model.config._attn_implementation
        device = model.get_input_embeddings().weight.device
        skips = implementation == "flex_attention" or (implementation == "sdpa" and device.type == "cpu")
        rows, length = shared.packed.input_ids.shape
        return not skips and rows * length**2 > DENSE * shared.shape[0] * shared.shape[1] ** 2

    def shared_hidden(self, model: PreTrainedModel, shared: SharedRows) -> Tensor:
        """Return (N, D): the hidden state that predicts each token."""
        device = model.get_input_embeddings().weight.device
        kind = device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
        inputs = model_inputs(
            shared.packed, self.plan, dtype=dtype, device=device, attn_implementation=model.config._attn_implementation
        )
        hidden = final_hidden(model, **inputs)
        return hidden.flatten(0, 1)[shared.packed.source.to(hidden.device, non_blocking=True)]

    def ordinary(self, model: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
        """Return the output of the model below its head for ordinary rows, each computed as if alone."""
        lengths = None
        if self.plan.by_length:
            inputs |= dict(zip(inspect.signature(model.base_model.forward).parameters, args, strict=False))
            args, (lengths, inputs) = (), texts_of_rows(inputs)
        with by_text(model.base_model, lengths):
            return model.base_model(*args, **inputs)

    def head(self, model: PreTrainedModel) -> Head:
        """Return the head as it is in this forward: engines and adapters may have replaced it since the last one."""
        return whole(read_head(model))

    def project(self, model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, TokenStatistics]:
        """Return (N,) log-probs and statistics of (N, D) hidden states."""
        head = self.head(model)
        weight, bias, hidden = head.weight, head.bias, hidden.to(head.weight.device)
        if len(hidden) == 0:  # a zero with a backward pass, in which other ranks wait
            zero = hidden.float().sum(1) + 0.0 * (weight.float().sum() + (0.0 if bias is None else bias.float().sum()))
            none = zero.detach()
            found = {name: none.bool() if name == "is_top1" else none for name in OUTPUTS if name in self.outputs}
            return zero, TokenStatistics(**found)
        options = {**head.options(self.temperature), **self.options}
        names = tuple(name for name in OUTPUTS if name in self.outputs)
        autocast = torch.is_autocast_enabled(hidden.device.type) and not self.cast_lm_head_to_fp32
        with torch.autocast(hidden.device.type, enabled=autocast):
            if self.cast_lm_head_to_fp32:
                hidden, weight = hidden.float(), weight.float()
                options["bias"] = None if bias is None else bias.float()
            else:
                hidden = head.multiplied(hidden)
            targets = targets.to(hidden.device)
            if not names:
                return linear_logprobs(hidden, weight, targets, **options), TokenStatistics()
            return linear_logprobs_with_statistics(hidden, weight, targets, outputs=names, **options)


def fuse(model: PreTrainedModel, fused: FusedForward) -> None:
    """Replace the forward of this instance, not of its class. Without TRL's keywords it is the model's own."""

    # The signature is kept: `generate` and the Trainer read it.
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, fused_groups: Any = None, **kw: Any
    ) -> Any:
        given = {name: value for name, value in kw.items() if value is not None}  # PEFT passes missing ones as None
        if fused_groups is not None:
            return fused.groups(self, **fused_groups, **given)
        if fused_lm_head and takes(self, given):
            return fused.per_token(self, *args, **given)
        return fused.fallback(*args, fused_lm_head=fused_lm_head, **kw)

    model.forward = types.MethodType(forward, model)
    model.register_forward_pre_hook(hold)


def takes(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Return whether the input is text only and `base_model` gives the final hidden states."""
    return model.base_model is not model and not any("pixel" in name or "image" in name for name in inputs)


def fusible(model: PreTrainedModel) -> str:
    """Return why a model's head cannot be fused; empty if it can."""
    if model.config.get_text_config() is not model.config:
        return "a multimodal model"
    try:
        read_head(model)
    except ValueError as error:
        return str(error)
    return ""


def texts_of_rows(inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return (B, T) long, the tokens of each token's text in an ordinary batch, and the inputs with positions that
    begin with the texts. With `position_ids` a row may hold several texts: a new one begins at each break in the
    positions."""
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is not None:
        begins = positions.diff(dim=1, prepend=positions[:, :1] - 2) != 1
        texts = begins.flatten().cumsum(0).view(begins.shape)  # every row begins one
        return packed_lengths(texts, positions), inputs
    ids = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
    if mask is None:
        return torch.full(ids.shape[:2], ids.shape[1], device=ids.device), inputs
    lengths, positions = padded_texts(mask)
    if not bool(mask[:, 0].all()):
        inputs = {**inputs, "position_ids": positions[:, -ids.shape[1] :]}
    return lengths, inputs


def whole(head: Head) -> Head:
    """Return the head gathered: under FSDP2 its parameters are sharded over ranks that hold other rows."""
    parts = {
        name: getattr(head, name).full_tensor()
        for name in ("weight", "bias")
        if hasattr(getattr(head, name), "full_tensor")
    }
    if not parts:
        return head
    bias = parts.get("bias", head.bias)
    return Head(parts.get("weight", head.weight), bias, head.scale, head.softcap, head.tied, head.process_group)


def hold(model: PreTrainedModel, _: tuple) -> None:
    """Tell ZeRO-3, before the model's forward, that this forward reads the head itself, so the weight is in one piece
    in it and in its backward. Runs before DeepSpeed's own hook, which is installed later."""
    weight = model.get_output_embeddings().weight
    if hasattr(weight, "ds_id"):
        import deepspeed

        head = read_head(model)
        for parameter in (head.weight, head.bias):
            if parameter is not None and id(parameter) not in getattr(model, "_external_params", {}):
                deepspeed.zero.register_external_parameter(model, parameter)


def everywhere(model: PreTrainedModel, found: bool) -> bool:
    """Return `found`; if all ranks gather sharded weights together (ZeRO-3, FSDP), whether all ranks found it. If
    only some ranks ran an extra forward, the others would hang."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    weight = model.get_output_embeddings().weight  # whole, and a plain tensor, inside FSDP's forward
    sharded = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    if not sharded and not hasattr(weight, "ds_id"):
        return found
    answer = torch.tensor([int(found)], device=weight.device)
    torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MIN)
    return bool(answer.item())


def load_balancing_loss(model: PreTrainedModel, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """Return the auxiliary loss of a mixture of experts, which transformers' models share."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, attention_mask)


class EntropyWithoutGradient(torch.autograd.Function):
    """The entropy, which a trainer may log but not train on: its gradient would be silently missing."""

    @staticmethod
    def forward(ctx: Any, entropy: Tensor, log_probs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None]:
        if grad is None:  # DDP that looks for unused parameters visits every output, also without a loss
            return None, None
        raise RuntimeError(
            "exo_fast gives the entropy without a gradient, and the loss asks for one (an entropy bonus: entropy_coef "
            "or use_adaptive_entropy of GRPO). Switch the bonus off, or call unpatch_trl() before the trainer is made."
        )
