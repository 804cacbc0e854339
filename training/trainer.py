"""transformers.Trainer for groups of candidates.

What differs from the Trainer's own loop, and why:
- The model is an `AlignModule`, whose forward is the loss; saving and resuming reach through it to the
  policy, so that checkpoints carry the policy's plain names.
- The loss is a mean over the groups of the *global* batch: each micro-batch is weighted by its groups over
  those of all micro-batches and processes, so that it does not matter how the batch was cut.
- Once the engine stands, and before it loads a checkpoint, the policy is still the reference: there the
  prompt-sharing layout is checked and reference log-probs are computed, through the forward (ZeRO-3,
  autocast, precision) of training.
- Metrics are sums and counts until they are logged.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.utils import logging

from exo_fast.training.config import AlignConfig
from exo_fast.training.data.groups import GroupCollator, GroupDataset
from exo_fast.training.metrics import GROUP_METRICS, peak_memory_mb
from exo_fast.training.module import AlignModule, settle_layout
from exo_fast.training.reference_logps import fill_reference_logps

logger = logging.get_logger(__name__)


class AlignTrainer(Trainer):
    """Trains an AlignModule on a GroupDataset and reports the loss and metrics of exo_fast.training.metrics.

    Data sets without reference log-probs get them from the policy, before its first step.
    """

    def __init__(
        self,
        module: AlignModule,
        config: AlignConfig,
        datasets: dict[str, GroupDataset],  # "train", and "eval" where there is held-out data
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.reference_cache_hits: dict[str, bool] = {}
        self.layout: dict[str, Any] = {}
        self._policy_is_reference = True
        self._run_tokens = self._run_seconds = 0.0
        use_cache = module.config.use_cache
        super().__init__(
            module,
            config,
            data_collator=GroupCollator(tokenizer.eos_token_id),
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("eval"),
            processing_class=tokenizer,
            compute_metrics=_average,
        )
        module.config.use_cache = use_cache  # the Trainer turns it off, and it would be saved so
        # num_items_in_batch (groups, see below) reaches compute_loss, and the loss it returns is already normalised.
        self.model_accepts_loss_kwargs = True
        self._reset_interval()

    # Loss and metrics

    def _prepare_input(self, data: Any) -> Any:
        # The Trainer would cast float inputs to the engine's dtype; log-probs of thousands of tokens stay float32.
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        groups = torch.tensor(sum(len(batch["rewards"]) for batch in batch_samples), device=device)
        return self.accelerator.reduce(groups)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """This micro-batch's share of the mean over the global batch's groups, times the number of processes.

        (Engines average gradients over processes, and the Trainer averages logged losses over them.)
        """
        loss, metrics = model(**inputs)
        self._interval_metrics += metrics.sum(0)
        self._interval_groups += len(metrics)
        self._interval_tokens += inputs["num_tokens"]
        return loss * (len(metrics) * self.accelerator.num_processes / num_items_in_batch)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._step_start = time.perf_counter()  # the first thing of an optimizer step
        return super().get_batch_samples(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._step_start is not None:  # the first thing after one (but also called at the end of an epoch)
            self._interval_seconds += time.perf_counter() - self._step_start
            self._step_start = None
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._interval_groups:
            logs = {**logs, **self._interval_averages()}
        super().log(logs, start_time)

    def _reset_interval(self) -> None:
        self._interval_metrics = torch.zeros(len(GROUP_METRICS), device=self.args.device)
        self._interval_groups = 0
        self._interval_tokens = torch.zeros((), dtype=torch.long, device=self.args.device)
        self._interval_seconds = 0.0
        self._step_start: float | None = None

    def _interval_averages(self) -> dict[str, float]:
        """Averages over all groups of all processes since the last call; a collective call."""
        sums = torch.cat(
            [
                self._interval_metrics.double(),
                torch.tensor([self._interval_groups, self._interval_tokens]).to(self.args.device),
            ]
        )
        sums = self.accelerator.reduce(sums)
        largest = self.accelerator.gather(
            torch.tensor([[self._interval_seconds, peak_memory_mb()]], device=self.args.device)
        ).amax(0)
        *metrics, groups, tokens = sums.tolist()
        seconds, peak = largest.tolist()
        self._run_tokens, self._run_seconds = self._run_tokens + tokens, self._run_seconds + seconds
        self._reset_interval()
        return {
            **{name: value / groups for name, value in zip(GROUP_METRICS, metrics, strict=True)},
            "tokens_per_second": tokens / seconds,
            "peak_memory_mb": peak,
        }

    def throughput(self) -> dict[str, float | None]:
        """`tokens_per_second` and `peak_memory_mb` (exo_fast.training.metrics) of the whole run; a collective call."""
        if self._interval_groups:
            self._interval_averages()
        peak = self.accelerator.gather(torch.tensor([peak_memory_mb()], device=self.args.device)).max().item()
        speed = self._run_tokens / self._run_seconds if self._run_seconds else None
        return {"tokens_per_second": speed, "peak_memory_mb": peak}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """No batch mean: one row of loss and metrics per group, so that the average is over groups."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, metrics = model(**inputs)
        return None, torch.cat([losses.float().unsqueeze(-1), metrics], dim=-1), inputs["index"]

    # Before the first step

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.model.register_head()
        self.layout = settle_layout(
            self.model, self.train_dataset, self.data_collator, share_prompt=self.args.share_prompt == "auto"
        )
        datasets = {"train": self.train_dataset, "eval": self.eval_dataset}
        missing = {name: data for name, data in datasets.items() if data is not None and data.ref_logps is None}
        self.reference_cache_hits |= fill_reference_logps(
            self.args, self.model, self.args.model_name_or_path, missing, self.data_collator
        )
        self._policy_is_reference = False
        if resume_from_checkpoint is not None:
            if self.is_deepspeed_enabled:
                deepspeed_load_checkpoint(
                    self.model_wrapped, resume_from_checkpoint, load_module_strict=not self.model.is_peft
                )
            else:
                self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return model, train_dataloader

    # Saving and resuming the policy inside the module

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state_dict = None  # the policy's own
        if self.is_deepspeed_enabled and self.deepspeed.zero_optimization_partition_weights():
            # With LoRA, gather the adapters only, not the frozen model they sit in. None on all but the main process.
            state_dict = self.deepspeed._zero3_consolidated_16bit_state_dict(
                exclude_frozen_parameters=self.model.is_peft
            )
        self._save(output_dir, state_dict)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is not None:
            state_dict = {name.removeprefix("policy."): value for name, value in state_dict.items()}
        with self._policy_as_model():
            super()._save(output_dir, state_dict)
        # The Trainer's pickle of its arguments; the configuration is in summary.json.
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._policy_as_model():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._policy_is_reference:
            return  # train() calls this too early: see _prepare_for_training
        with self._policy_as_model():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._policy_as_model():
            super()._load_best_model()

    @contextlib.contextmanager
    def _policy_as_model(self) -> Iterator[None]:
        """The Trainer's code with the policy in the module's place, so that it finds a model of its own or PEFT's."""
        module = self.model
        self.model = module.policy
        try:
            yield
        finally:
            self.model = module


def _average(predictions: EvalPrediction) -> dict[str, float]:
    """(groups, 1 + M) rows of loss and metrics -> their means."""
    means = predictions.predictions.astype("float64").mean(0)
    return dict(zip(("loss", *GROUP_METRICS), means.tolist(), strict=True))
