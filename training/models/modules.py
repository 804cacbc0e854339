"""The modules that the engine trains: a model and its loss in one forward.

The fused losses read the lm_head's weight without calling the lm_head, and DeepSpeed ZeRO-3 has a parameter in
one piece only inside the forward of a module it belongs to. So the loss is part of a module that owns the model
and registers the head as its own (`register_head`); engines that work through a module's forward (DDP's
reducer, autocast, gradient hooks) then see nothing unusual. Other packages broke because a trainer's
compute_loss read `lm_head.weight` instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from exo_fast.head import final_hidden, read_head, unwrap
from exo_fast.layout import Group, MaskPlan, Packed, SharingReport, check_neighbours, check_sharing, model_inputs, pack
from exo_fast.logprobs import linear_logprobs
from exo_fast.loss import group_loss, linear_group_loss
from exo_fast.metrics import GROUP_METRICS, group_metrics
from exo_fast.precision import true_float32
from exo_fast.reference import sequence_logps
from exo_fast.sharing import compared, eval_mode
from exo_fast.training.models.sequence_parallel import SequenceParallel

logger = logging.get_logger(__name__)


class TrainedModule(nn.Module):
    """A transformers model (or a PeftModel around one) inside a module whose forward is a loss.

    `forward(**batch)` returns (loss, metrics (R, M)) in training, where the loss is the mean over the batch's R rows
    by the batch's `weights` (R,), and (losses (R,), metrics (R, M)) in evaluation. Only `model` is saved and
    resumed, under its own names.
    """

    metric_names: tuple[str, ...] = ()  # of the M columns

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype attention runs in: autocast's if it is on, else the weights'."""
        device = self.model.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.model.dtype

    @property
    def is_peft(self) -> bool:
        return hasattr(self.model, "peft_config") and hasattr(self.model, "disable_adapter")

    def packed_hidden(self, packed: Packed, plan: MaskPlan) -> Tensor:
        """Return (B·T, D): the final hidden states of packed rows; with FlexAttention some of padding come after them."""
        inputs = model_inputs(
            packed,
            plan,
            dtype=self.compute_dtype,
            device=packed.input_ids.device,
            attn_implementation=self.config._attn_implementation,
        )
        return final_hidden(self.model, **inputs).flatten(0, 1)

    def register_head(self) -> None:
        """Name to ZeRO-3 the parameters that this module's own forward reads beside the model's; here nothing."""

    # The interface that transformers.Trainer needs.

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def generation_config(self) -> Any:
        return self.model.generation_config

    def activation_checkpointing_enable(self, **options: Any) -> None:
        unwrap(self.model).activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        unwrap(self.model).gradient_checkpointing_enable(**options)

    def num_parameters(self, **options: Any) -> int:
        return unwrap(self.model).num_parameters(**options)


class CausalModule(TrainedModule):
    """A causal LM that is run on packed batches, and whose head is read by the fused losses."""

    def __init__(self, model: nn.Module, plan: MaskPlan, *, memory_budget: int | None, backend: str):
        super().__init__(model)
        self.plan = plan
        self.temperature = 1.0  # divides the logits
        self.kernel_options = {"memory_budget": memory_budget, "backend": backend}

    def predicting_hidden(self, packed: Packed) -> Tensor:
        """Return (N, D): the hidden state that predicts each completion token."""
        return self.packed_hidden(packed, self.plan)[packed.source.to(self.model.device)]

    def token_logps(self, packed: Packed) -> Tensor:
        """Return (N,) float32, the log-prob of each completion token."""
        return self.projected(self.predicting_hidden(packed), packed.targets)

    def projected(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return (N,) float32, the log-prob of each target under the hidden state that predicts it."""
        head = read_head(self.model)
        options = {**head.options(self.temperature), **self.kernel_options}
        return linear_logprobs(head.multiplied(hidden), head.weight, targets.to(hidden.device), **options)

    def check_neighbours(self, shortest: Group, longest: Group, *, shared: bool) -> SharingReport:
        """Check whether the log-probs of a group are its own, in rows as the run will have them. Call it in a forward
        of the module: only there does ZeRO-3 have the head in one piece. The tolerances are `check_sharing`'s."""

        def token_logps(groups: list[Group]) -> Tensor:
            return self.token_logps(self.packed(groups, shared=shared))

        with self.as_it_is():
            return check_neighbours(token_logps, shortest, longest, atol=self.atol)

    def packed(self, groups: list[Group], *, shared: bool, **options: Any) -> Packed:
        """Pack `groups` in rows, on the model's device."""
        rows = pack(groups, share_prompt=shared, by_length=self.plan.by_length, **options)
        tensors = {field.name: getattr(rows, field.name) for field in fields(Packed)}
        device = self.model.device
        return Packed(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in tensors.items()})

    @property
    def atol(self) -> float:
        """Largest difference allowed between two computations of a token's log-prob, as in `check_sharing`."""
        return 0.15 if self.model.dtype in (torch.bfloat16, torch.float16) else 1e-4

    @contextmanager
    def as_it_is(self) -> Iterator[None]:
        """Run the model without dropout, gradients and rounded products, to compare its numbers."""
        device = self.model.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False), eval_mode(self.model), true_float32():
            yield

    def register_head(self) -> None:
        """Register with ZeRO-3 that this module's forward needs the head. Does nothing for whole parameters."""
        head = read_head(self.model)
        for parameter in (head.weight, head.bias):
            if hasattr(parameter, "ds_id"):
                import deepspeed

                deepspeed.zero.register_external_parameter(self, parameter)


def packed_batch(batch: dict[str, Any]) -> Packed:
    """Return the packed rows among a collator's tensors."""
    return Packed(**{field.name: torch.as_tensor(batch[field.name]) for field in fields(Packed)})


class AlignModule(CausalModule):
    """A policy (a transformers causal LM, or a PeftModel around one) whose forward is the loss of a packed batch.

    With `sequence` (made for this policy) each rank of its group gets the same batches and runs its part of their
    rows. The forward returns results of the whole batch, the same in all of these ranks.
    """

    metric_names = GROUP_METRICS

    def __init__(
        self,
        policy: nn.Module,
        plan: MaskPlan,
        *,
        loss_type: str,
        beta_pi: float,
        beta_r: float,
        label_smoothing: float,
        temperature: float,
        ties: str = "error",
        memory_budget: int | None,
        backend: str,
        sequence: SequenceParallel | None = None,
    ):
        super().__init__(policy, plan, memory_budget=memory_budget, backend=backend)
        self.sequence = sequence
        self.beta_pi = beta_pi
        self.temperature = temperature
        self.loss_options = {
            "loss_type": loss_type,
            "beta_pi": beta_pi,
            "beta_r": beta_r,
            "label_smoothing": label_smoothing,
            "ties": ties,
        }

    @property
    def policy(self) -> nn.Module:
        return self.model

    def forward(
        self,
        *,
        check: list[Group] | None = None,
        check_shared: bool = True,
        neighbours: tuple[Group, Group] | None = None,
        reference: bool = False,
        only_logps: bool = False,
        **batch: Tensor,
    ) -> tuple[Tensor, ...] | tuple[SharingReport]:
        """Run on `batch` as GroupCollator makes it, G groups of K candidates.

        Returns (mean loss over the G groups, group metrics (G, M)) in training, (losses (G,), group metrics
        (G, M)) in evaluation, and (sequence log-probs (G, K) float32,) with `only_logps`; with `reference`, they are
        of the policy with its adapters off. With `check`, and no batch, it returns the report of `check_sharing` on
        those groups, or with `sequence` of `check_parts`, which gets `check_shared`. It is a forward because only
        there does ZeRO-3 have the head in one piece. With `neighbours`, a short group and a long one, it returns the
        report of `check_neighbours`.
        """
        if neighbours is not None:
            return (self.check_neighbours(*neighbours, shared=check_shared),)
        if check is not None:
            if self.sequence is None:
                return (check_sharing(self.policy, check, self.plan),)
            return (self.check_parts(check, check_shared),)
        packed = packed_batch(batch)
        ref_logps, rewards = batch.get("ref_logps"), batch["rewards"]  # missing in the reference's own pass
        if self.training and not (reference or only_logps) and self.sequence is None:
            head = read_head(self.policy)
            loss, policy_logps = linear_group_loss(
                head.multiplied(self.predicting_hidden(packed)),
                head.weight,
                packed.targets,
                packed.cu_seqlens,
                ref_logps,
                rewards,
                **self.loss_options,
                **head.options(self.temperature),
                **self.kernel_options,
            )
            return loss, group_metrics(policy_logps, ref_logps, rewards, self.beta_pi)
        with self.adapters_off() if reference else nullcontext():
            token_logps = self.token_logps(packed)
        policy_logps = sequence_logps(token_logps, packed.cu_seqlens.to(token_logps.device)).view_as(rewards)
        if reference or only_logps:
            return (policy_logps,)
        reduction = "mean" if self.training else "none"
        loss = group_loss(policy_logps, ref_logps, rewards, **self.loss_options, reduction=reduction)
        return loss, group_metrics(policy_logps.detach(), ref_logps, rewards, self.beta_pi)

    def token_logps(self, packed: Packed, *, whole_rows: bool = False) -> Tensor:
        """Return (N,) float32, the log-prob of each completion token. With `whole_rows` this rank runs all of them,
        even with `sequence`."""
        if self.sequence is None:
            return super().token_logps(packed)
        device = self.model.device
        options = {"dtype": self.compute_dtype, "device": device}
        targets = packed.targets.to(device)
        if whole_rows:
            hidden = final_hidden(self.model, **self.sequence.whole(packed, self.plan, **options))
            return self.projected(hidden.flatten(0, 1)[packed.source.to(device)], targets)
        inputs, rows, tokens = self.sequence.part(packed, self.plan, **options)
        hidden = final_hidden(self.model, **inputs).flatten(0, 1)
        return self.sequence.gather(self.projected(hidden[rows], targets[tokens]), tokens, len(targets))

    def check_parts(self, groups: list[Group], shared: bool) -> SharingReport:
        """Run `groups` in rows of which each rank has a part, and in unshared rows that each rank runs alone, and
        compare the log-probs. With `shared` it checks what `check_sharing` does, and always whether the parts make
        the row. The tolerances are `check_sharing`'s."""
        unshared = self.packed(groups, shared=False)
        longest = max(group.tokens() for group in groups)
        rows = self.packed(groups, shared=True, row_length=2 * longest) if shared else unshared
        with self.as_it_is():
            expected = self.token_logps(unshared, whole_rows=True)
            found = self.token_logps(rows)
        problem = f"rows in {self.sequence.size} parts give other log-probs than whole, unshared ones"
        return compared(found, expected, unshared.cu_seqlens, self.atol, problem)

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Run the policy as it was before PEFT. Changes nothing for a policy that is trained in full."""
        with self.policy.disable_adapter() if self.is_peft else nullcontext():
            yield


class SftModule(CausalModule):
    """A causal LM whose forward is the mean negative log-prob of completion tokens, in nats."""

    def forward(
        self, *, neighbours: tuple[Group, Group] | None = None, check_shared: bool = False, **batch: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[SharingReport]:
        """Run on `batch` as SftCollator makes it, R sequences: (mean over tokens, (R, 0)); evaluation: ((R,), (R, 0)).
        With `neighbours`, and no batch, return the report of `check_neighbours`."""
        if neighbours is not None:
            return (self.check_neighbours(*neighbours, shared=check_shared),)
        packed = packed_batch(batch)
        token_logps = self.token_logps(packed)
        no_metrics = token_logps.new_empty(len(batch["weights"]), 0)
        if self.training:
            return -token_logps.mean(), no_metrics
        sums = sequence_logps(token_logps, packed.cu_seqlens.to(token_logps.device))
        return -sums / batch["weights"], no_metrics
