"""`ExoDPOTrainer`: TRL's DPOTrainer with the losses of this library beside TRL's, over K candidates."""

from __future__ import annotations

import copy
import hashlib
import math
import textwrap
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from exo_fast import reference
from exo_fast.data.selection import DUPLICATES, TIES
from exo_fast.integrations.generation_config import settle_generation_config
from exo_fast.integrations.trl.candidates import REFERENCE, CandidateCollator, CandidateRows, first_row, host_rows
from exo_fast.integrations.trl.forward import GroupOutput, fusible
from exo_fast.integrations.trl.patch import check_options, fused_heads
from exo_fast.loss import group_loss
from exo_fast.metrics import GROUP_METRICS, group_metrics
from exo_fast.reference import LOSS_TYPES, default_label_smoothing
from exo_fast.validate import check_groups

AS_GROUPS = {"sigmoid": "dpo-pref", "exo_pair": "exo-pref"}  # TRL's losses of pairs that equal ours for K = 2

logger = logging.get_logger(__name__)


@dataclass
class ExoDPOConfig(DPOConfig):
    """DPOConfig, with the losses over K candidates. `beta` is beta_pi of the paper."""

    loss_type: list[str] = field(
        default_factory=lambda: ["exo-pref"],
        metadata={
            "help": "'exo-pref', 'exo-rw', 'dpo-pref', 'dpo-rw' (K candidates with rewards, or pairs), or any of TRL's "
            "own losses of pairs; of these 'sigmoid' and 'exo_pair' take K candidates too (as 'dpo-pref', 'exo-pref')."
        },
    )
    beta_r: float = field(
        default=0.1, metadata={"help": "Temperature of the rewards in '*-rw': the target is softmax(reward / beta_r)."}
    )
    label_smoothing: float | None = field(
        default=None,
        metadata={
            "help": "ε of '*-pref' and of TRL's losses that have one. Default: 1e-3 for exo-pref and exo_pair, which "
            "need one, else 0."
        },
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Default: yes, unless the data is streamed, has images, or the reference follows the policy."
        },
    )
    num_contrastive: int | None = field(
        default=None,
        metadata={
            "help": "Candidates per group: a row with more gives several groups, one with fewer is left out. Default: "
            "all, the same number in every row."
        },
    )
    duplicates: Literal["drop", "error", "keep"] = field(
        default="drop",
        metadata={
            "help": "Groups of candidates that are all the same tokens, or that hold the same tokens with different "
            "rewards: leave them out with a warning, raise, or learn from them."
        },
    )
    ties: Literal["error", "drop", "share"] = field(
        default="error",
        metadata={
            "help": "Groups in which several candidates have the highest reward, in '*-pref': raise, leave them out "
            "with a warning, or give the best ones equal shares of the target."
        },
    )
    share_prompts: bool = field(
        default=True, metadata={"help": "Run a prompt once for all its candidates, where the model allows it."}
    )
    memory_budget: int | None = field(default=None, metadata={"help": "Bytes of vocabulary-sized scratch."})
    backend: str = field(default="auto", metadata={"help": "auto, triton, torch or reference."})

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.label_smoothing is None:  # 0 if targets come from rewards
            exo = any(name.startswith("exo") and name != "exo-rw" for name in self.loss_type)
            self.label_smoothing = default_label_smoothing("exo-pref") if exo else 0.0
        if self.accelerator_config is None and torch.cuda.is_available():  # type: ignore[has-type]
            # Or the copy of each tensor of a batch would wait for the GPU.
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory}
        super().__post_init__()
        check_options(self.memory_budget, self.backend)
        for name, known in (("duplicates", DUPLICATES), ("ties", TIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: one of {', '.join(known)} is needed.")
        if self.num_contrastive is not None and self.num_contrastive < 2:
            raise ValueError(f"num_contrastive={self.num_contrastive}: at least 2 candidates are compared.")
        ours = [name for name in self.loss_type if name in LOSS_TYPES]
        if ours and len(self.loss_type) > 1:
            raise ValueError(f"loss_type={self.loss_type}: {ours[0]!r} is a loss by itself; give it alone.")


class ExoDPOTrainer(DPOTrainer):
    """DPOTrainer on the fused path, with EXO and DPO over K candidates (Ji et al., ICML 2024).

    Takes DPOTrainer's arguments. `args` is an ExoDPOConfig, or a DPOConfig for TRL's own losses. A batch of
    `per_device_train_batch_size` G holds G prompts with all their candidates; all rows have the same number K of
    candidates. Logged beside TRL's names: group_accuracy, kl and group_entropy (`exo_fast.metrics`).

    Rows, token ids and left-out rows are the same as in the pipeline (`exo_fast.data`): see `duplicates`, `ties` and
    `num_contrastive` of ExoDPOConfig.

    For the losses over candidates, a step learns from the mean over the groups of its global batch, whatever
    micro-batches and processes they are cut into. The log has the mean over the groups since the last log, and an
    evaluation the mean over its data. `compute_metrics` gets the policy's sequence log-probs (N, K) as
    predictions, and the rewards (N, K) as labels.

    Raises ValueError for data without `rewards`, another number of candidates, rewards that are not finite, ties for
    the highest reward under '*-pref', and options that are not for the loss over candidates (`_not_for_groups`).
    """

    _tag_names = ["trl", "dpo", "exo", "exo_fast"]  # noqa: RUF012  a class attribute of TRL's
    _name = "EXO"
    _paper = {  # noqa: RUF012
        "title": "Towards Efficient Exact Optimization of Language Model Alignment",
        "id": "2402.00856",
        "citation": textwrap.dedent("""\
            @inproceedings{ji2024towards,
                title     = {{Towards Efficient Exact Optimization of Language Model Alignment}},
                author    = {Haozhe Ji and Cheng Lu and Yilin Niu and Pei Ke and Hongning Wang and Jun Zhu and Jie Tang and Minlie Huang},
                booktitle = {International Conference on Machine Learning},
                year      = 2024
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model: Any,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *positional: Any,
        **named: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = ExoDPOConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-EXO")
        first = None if train_dataset is None else first_row(train_dataset, "train")
        if args.precompute_ref_log_probs is None:
            eval_dataset = positional[0] if positional else named.get("eval_dataset")
            args.precompute_ref_log_probs = _can_precompute(args, train_dataset, eval_dataset, first)
        self.group_loss = _group_loss(args, first)
        self._candidates = CandidateCollator()
        if self.group_loss is not None and data_collator is None:
            data_collator = self._candidates
            data_collator.max_length, data_collator.truncation_mode = args.max_length, args.truncation_mode
            data_collator.pad_to_multiple_of = args.pad_to_multiple_of
        options = {"memory_budget": getattr(args, "memory_budget", None), "backend": getattr(args, "backend", "auto")}
        with fused_heads(share_prompts=getattr(args, "share_prompts", True), options=options):
            super().__init__(model, ref_model, args, data_collator, train_dataset, *positional, **named)
        causal_lm = self.accelerator.unwrap_model(self.model)
        settle_generation_config(causal_lm)  # or the model's own settings could prevent saving at the end
        if hasattr(causal_lm, "get_base_model"):
            causal_lm = causal_lm.get_base_model()
        # Otherwise TRL's head, or one with a router loss, gives log-probs, and the loss is computed from them.
        self.one_pass = not fusible(causal_lm) and not self.aux_loss_enabled
        if self.group_loss is not None:
            self.loss_is_scaled_for_ga = True  # by compute_loss
        self._averages = {"train": Averages(), "eval": Averages()}

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # TRL names its cache after the data and the weights. The cuts of rows change the log-probs too, and so do the
        # model's other numbers (rotary scale, softcap, logit scale …) and the precision of its arithmetic.
        config = self.accelerator.unwrap_model(self.ref_model or self.model).config
        facts = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        computed = (config._attn_implementation, self.accelerator.mixed_precision, sorted(facts.items()))
        cut = (self.args.max_length, self.args.truncation_mode, self.args.ld_alpha)
        known = [name for name in REFERENCE if name in (dataset.column_names or ())]
        if self.group_loss is not None and known:  # for an unknown model
            dataset = dataset.remove_columns(known)
        if hasattr(dataset, "_fingerprint"):
            dataset = copy.copy(dataset)
            dataset._fingerprint = hashlib.sha256(repr((dataset._fingerprint, cut, computed)).encode()).hexdigest()[:16]
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Any:
        if self.group_loss is None:
            first_row(dataset, dataset_name)
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        self._candidates.pad_token_id = self._tokenizer.pad_token_id
        rows = CandidateRows(
            self._tokenizer,
            dataset_name,
            self.group_loss["loss_type"],
            num_contrastive=getattr(args, "num_contrastive", None),
            duplicates=getattr(args, "duplicates", "drop"),
            ties=getattr(args, "ties", "error"),
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
        )
        return rows.prepared(dataset, num_proc=args.dataset_num_proc)

    def _get_dataloader(self, dataset: Any, *args: Any, **options: Any) -> Any:
        # Accelerate reads a stream in the first process, joins batches for the others, and joins nothing but tensors.
        if self.args.world_size > 1 and _streamed(dataset):
            self._candidates.host_copy = False
        return super()._get_dataloader(dataset, *args, **options)

    _signature_columns: list[str]
    _total_train_tokens: Any  # int, in several processes a tensor

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.group_loss is not None and "candidate_ids" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "candidate_ids", "candidate_masks", "rewards"]

    # The rows in the mean of a step

    @property
    def _copies(self) -> int:
        """Return the number of processes that get the same batch."""
        return self.get_tp_size() * self.get_cp_size() * self.get_sp_size()

    def _counted(self, groups: int) -> int:
        """Return how many of the `groups` of the batch read last count. In several processes accelerate fills the last
        batch of an epoch with earlier rows; for data without a length it does not say which.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return groups
        before = self.accelerator.process_index // self._copies * groups
        return min(max(state.remainder - before, 0), groups)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Return the groups of the global batch. Those that do not count are removed except one, which weighs nothing:
        a process without any must still run a forward if the others wait for it."""
        if self.group_loss is None or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        batch_samples[:] = [{**batch, "counted": len(batch["rewards"])} for batch in batch_samples]
        last = batch_samples[-1]
        groups, counted = last["counted"], self._counted(last["counted"])
        if counted < groups:
            kept = {k: v[: len(v) * max(counted, 1) // groups] for k, v in last.items() if k != "counted"}
            batch_samples[-1] = {**kept, "counted": counted}
        groups = sum(batch["counted"] for batch in batch_samples)
        tokens = sum(int(host_rows(batch)[1].sum()) for batch in batch_samples if batch["counted"])
        if self.accelerator.num_processes > 1:  # numbers on the device, which only the log reads
            own = torch.tensor([groups, tokens]).to(device, non_blocking=True)
            groups, tokens = self.accelerator.reduce(own) // self._copies
        self._total_train_tokens += tokens
        return groups

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss: in a training step this micro-batch's share of the mean over the groups of the global batch,
        times the processes, over which engines average gradients and the Trainer averages the logged losses."""
        found = super().compute_loss(model, inputs, return_outputs)
        if self.group_loss is None or num_items_in_batch is None:
            return found
        share = inputs["counted"] * (self.accelerator.num_processes // self._copies) / num_items_in_batch
        return (found[0] * share, found[1]) if return_outputs else found * share

    # The loss and the log

    def _prepare_input(self, data: Any) -> Any:
        # The Trainer would cast rewards and reference log-probs, which may be thousands of nats, to DeepSpeed's dtype.
        if isinstance(data, Tensor) and not self._is_vision_dataset:
            return data.to(self.args.device, non_blocking=data.is_pinned())
        return super()._prepare_input(data)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the two columns of reference log-probs that TRL keeps: here for the first candidate (G,), and for the
        others (G, K − 1)."""
        if self.group_loss is None:
            return super().compute_ref_log_probs(model, inputs)
        training = model.training
        model.eval()  # also for a policy without its adapters: the reference has no dropout or embedding noise
        try:
            names = ("input_ids", "attention_mask", "completion_mask")
            halves = super().compute_ref_log_probs(model, {name: inputs[name] for name in names})
        finally:
            model.train(training)
        logps = torch.cat(halves).view(inputs["rewards"].shape)
        return logps[:, 0], logps[:, 1:]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.group_loss is None:
            return super()._compute_loss(model, inputs, return_outputs)
        rewards = inputs["rewards"]
        if self.precompute_ref_logps:
            first, others = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            first, others = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        ref_logps = torch.cat([first.unsqueeze(1), others], dim=1)
        rewards = rewards.to(ref_logps.device)
        batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        numbers = {}
        if self.one_pass:
            ids, mask, completion = host_rows(inputs)
            read = {"labels": ids.masked_fill(completion == 0, -100), "input_ids": ids, "attention_mask": mask}
            groups = {
                "host": {name: value.numpy() for name, value in read.items()},  # arrays, which no engine moves
                "ref_logps": ref_logps,
                "rewards": rewards,
                "loss": self.group_loss,
            }
            outputs = model(**batch, fused_groups=groups)
            loss, policy_logps = outputs.loss, outputs.logits
            checked = {name: value for name, value in self.group_loss.items() if name != "ties"}
            losses = reference.group_loss(policy_logps, ref_logps, rewards, **checked)
        else:
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
            found = model(**batch, **routed, labels=labels, use_cache=False, fused_lm_head=True)
            logps = found.log_probs.sum(1).view_as(ref_logps)
            losses = group_loss(logps, ref_logps, rewards, **self.group_loss, reduction="none")
            if self.aux_loss_enabled:  # over the tokens of this micro-batch, so one number for all its groups
                losses = losses + self.router_aux_loss_coef * found.aux_loss
                numbers["aux_loss"] = found.aux_loss.detach().expand(len(losses))
            loss, policy_logps = losses.mean(), logps.detach()
            outputs = GroupOutput(loss=loss, logits=policy_logps)
        columns = group_metrics(policy_logps, ref_logps, rewards, self.beta).T
        numbers |= {"group_entropy" if n == "entropy" else n: c for n, c in zip(GROUP_METRICS, columns, strict=True)}
        mode = "train" if self.model.training else "eval"
        self._averages[mode].add({"loss": losses.detach(), **numbers}, inputs.get("counted", len(losses)))
        return (loss, outputs) if return_outputs else loss

    def _logged(self, mode: str, logs: dict[str, float], prefix: str = "") -> None:
        """Put into `logs` the means over the groups of all processes since the last time; a collective call."""
        means = self._averages[mode].take(self.accelerator)
        if self.args.logging_nan_inf_filter and not math.isfinite(means["loss"]):
            del means["loss"]  # the Trainer's own value stays
        logs.update({prefix + name: value for name, value in means.items()})
        logs[prefix + "num_tokens"] = int(self._total_train_tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._averages["train"].sums is not None:
            self._logged("train", logs)
        super().log(logs, start_time)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        if self.group_loss is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        rewards = inputs["rewards"]
        inputs = {**inputs, "counted": self._counted(len(rewards))}
        loss, logps, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, logps, None if prediction_loss_only else rewards

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """Run the Trainer's evaluation loop with means over the rows: the Trainer counts a batch's mean as often as
        a whole batch has rows, in each process."""
        self._averages["eval"] = Averages()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        if self._averages["eval"].sums is not None:
            self._logged("eval", output.metrics, prefix=f"{metric_key_prefix}_")
        return output


@dataclass
class Averages:
    """Sums of numbers of groups, until their means are taken."""

    names: tuple[str, ...] = ()
    sums: Tensor | None = None  # (M,) float64
    count: int = 0  # groups in the sums

    def add(self, numbers: dict[str, Tensor], counted: int) -> None:
        """Add the first `counted` of numbers (G,) by name, the same names in every call."""
        found = torch.stack([value.double() for value in numbers.values()])[:, :counted].sum(1)
        self.names, self.sums = tuple(numbers), found if self.sums is None else self.sums + found
        self.count += counted

    def take(self, accelerator: Any) -> dict[str, float]:
        """Return the means over all processes, and clear the sums. All processes must call it."""
        assert self.sums is not None  # for the type checker: `add` has been called
        *sums, count = accelerator.reduce(torch.cat([self.sums, self.sums.new_tensor([self.count])])).tolist()
        self.sums, self.count = None, 0
        return {name: value / count for name, value in zip(self.names, sums, strict=True)}


def _streamed(data: Any) -> bool:
    """Return whether data, or any split of it, can only be read in order."""
    if isinstance(data, dict):
        return any(map(_streamed, data.values()))
    return data is not None and not hasattr(data, "__len__")


def _can_precompute(args: DPOConfig, dataset: Any, eval_dataset: Any, first: dict[str, Any] | None) -> bool:
    """Return whether TRL can compute the reference's log-probs beforehand: only from data that it can read twice and
    that, with several processes, is on a disk on which all find the first process's files."""
    streamed = _streamed(dataset) or _streamed(eval_dataset)
    images = first is not None and ("image" in first or "images" in first)
    evals = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    parts = [dataset, *(part for part in evals if part is not None)]
    apart = args.world_size > 1 and not all(getattr(part, "cache_files", None) for part in parts)
    return not (streamed or images or apart or args.sync_ref_model)


def _group_loss(args: DPOConfig, first: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the options of `exo_fast.loss` for this configuration and data; None if TRL computes the loss of pairs."""
    (name,) = args.loss_type if len(args.loss_type) == 1 else (None,)
    candidates = first is not None and bool({"completions", "candidate_ids"} & first.keys())
    if name not in LOSS_TYPES and not candidates:
        return None
    if name not in LOSS_TYPES and name not in AS_GROUPS:
        raise ValueError(
            f"loss_type={args.loss_type} is a loss of pairs, and train_dataset has candidates. Choose one "
            f"of {', '.join((*LOSS_TYPES, *AS_GROUPS))}."
        )
    for option, is_wrong, problem in _not_for_groups(args, AS_GROUPS.get(name, name)):
        if is_wrong:
            raise ValueError(f"{option} is not for loss_type={args.loss_type} over candidates: {problem}.")
    options = {
        "loss_type": AS_GROUPS.get(name, name),
        "beta_pi": args.beta,
        "beta_r": getattr(args, "beta_r", 0.1),
        "label_smoothing": args.label_smoothing,
        "ties": "share",  # the data set's check has decided which may
    }
    check_groups(None, torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), **options)  # before the reference runs
    return options


def _not_for_groups(args: DPOConfig, loss_type: str) -> list[tuple[str, bool, str]]:
    """Return the options that the loss over candidates would ignore or get wrong: the option as given, whether it is
    such a one, and the fix."""
    pairs = "leave it out, or choose one of TRL's losses of pairs, such as 'sigmoid'"
    parallel = args.parallelism_config
    parts = max(getattr(parallel, "cp_size", 1), getattr(parallel, "sp_size", 1))
    return [
        (f"ld_alpha={args.ld_alpha}", args.ld_alpha is not None, pairs),
        (f"use_weighting={args.use_weighting}", args.use_weighting, pairs),
        (f"f_divergence_type={args.f_divergence_type!r}", args.f_divergence_type != "reverse_kl", pairs),
        (f"loss_weights={args.loss_weights}", args.loss_weights is not None, "it is one loss; leave them out"),
        (
            f"label_smoothing={args.label_smoothing}",
            loss_type.endswith("-rw") and args.label_smoothing != 0,
            "its targets come from rewards; leave it out, or choose exo-pref or dpo-pref",
        ),
        (
            f"label_smoothing_factor={args.label_smoothing_factor}",
            args.label_smoothing_factor != 0,
            "it smooths over the vocabulary; label_smoothing smooths the targets of exo-pref and dpo-pref",
        ),
        (
            f"truncation_mode={args.truncation_mode!r}",
            args.truncation_mode not in ("keep_start", "keep_end"),
            "choose keep_start or keep_end",
        ),
        (f"pad_token={args.pad_token!r}", args.pad_token is not None, "set the tokenizer's pad_token"),
        (
            f"include_for_metrics={args.include_for_metrics}",
            "inputs" in args.include_for_metrics,
            "a group has K rows of inputs; leave out 'inputs' (labels are the rewards)",
        ),
        (
            "dispatch_batches=True",
            bool(args.accelerator_config.dispatch_batches),
            "it divides batches by rows, of which a group has K; leave it out",
        ),
        (
            "parallelism_config: sequences in parts",
            parts > 1,
            "leave it out; `exo-fast align --sequence_parallel` trains on parts of sequences",
        ),
    ]
