"""transformers.Trainer for modules whose forward is their loss: `StageTrainer`, and `AlignTrainer` for groups.

What differs from the Trainer's own loop, and why:
- The model is a `TrainedModule`; saving and resuming reach through it to the model inside, so that
  checkpoints carry the model's plain names.
- The loss is a mean over the rows (groups, pairs, tokens: what the batch's `weights` count) of the *global*
  batch: each micro-batch is weighted by its share of all micro-batches and processes, so that it does not
  matter how the batch was cut. (Several processes fill an epoch's last batch up with rows of its first.)
- Metrics are sums and weights until they are logged.
- In alignment, once the engine stands and before it loads a checkpoint, the policy is still the reference:
  there the prompt-sharing layout is checked and reference log-probs are computed, through the forward
  (ZeRO-3, autocast, precision) of training.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.utils import logging

from exo_fast.training.config import AlignConfig, TrainConfig
from exo_fast.training.data.groups import GroupCollator, GroupDataset
from exo_fast.training.data.sampler import GroupedByLength
from exo_fast.training.metrics import peak_memory_mb
from exo_fast.training.module import AlignModule, TrainedModule, settle_layout
from exo_fast.training.reference_logps import fill_reference_logps

logger = logging.get_logger(__name__)


class StageTrainer(Trainer):
    """Trains a TrainedModule and reports its loss and metrics, averaged by the weights of their rows.

    Batches carry `index` (R,) and `weights` (R,) float32 of their R rows and `num_tokens` () long.
    """

    def __init__(
        self,
        module: TrainedModule,
        config: TrainConfig,
        datasets: dict[str, Dataset],  # "train", and "eval" where there is held-out data
        tokenizer: PreTrainedTokenizerBase,
        collate: Callable[[list[Any]], dict[str, Any]],
    ):
        self._run_tokens = self._run_seconds = 0.0
        self._before_resume = True
        use_cache = getattr(module.config, "use_cache", None)
        super().__init__(
            module,
            config,
            data_collator=collate,
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("eval"),
            processing_class=tokenizer,
            compute_metrics=self._average,
        )
        if use_cache is not None:
            module.config.use_cache = use_cache  # the Trainer turns it off, and it would be saved so
        # num_items_in_batch (weights, see below) reaches compute_loss, and the loss it returns is already normalised.
        self.model_accepts_loss_kwargs = True
        self._reset_interval()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths, epoch = self.train_dataset.lengths(), lambda: int(self.state.epoch)
        return GroupedByLength(lengths, self.args.train_batch_size, self.args.seed, epoch)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        return SequentialSampler(eval_dataset)  # the Trainer would group these by length too, in random order

    # Loss and metrics

    def _prepare_input(self, data: Any) -> Any:
        # The Trainer would cast float inputs to the engine's dtype; log-probs of thousands of tokens stay float32.
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        weights = torch.stack([batch["weights"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.reduce(weights)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """This micro-batch's share of the mean over the global batch's rows, times the number of processes.

        (Engines average gradients over processes, and the Trainer averages logged losses over them.)
        """
        loss, metrics = model(**inputs)
        weights = inputs["weights"]
        self._interval_metrics += (metrics * weights.unsqueeze(-1)).sum(0)
        self._interval_weight += weights.sum()
        self._interval_tokens += inputs["num_tokens"]
        self._interval_is_empty = False
        return loss * (weights.sum() * self.accelerator.num_processes / num_items_in_batch)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._step_start = time.perf_counter()  # the first thing of an optimizer step
        return super().get_batch_samples(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._step_start is not None:  # the first thing after one (but also called at the end of an epoch)
            self._interval_seconds += time.perf_counter() - self._step_start
            self._step_start = None
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and not self._interval_is_empty:
            logs = {**logs, **self._interval_averages()}
        super().log(logs, start_time)

    def _reset_interval(self) -> None:
        self._interval_metrics = torch.zeros(len(self.model.metric_names), device=self.args.device)
        self._interval_weight = torch.zeros((), device=self.args.device)
        self._interval_is_empty = True
        self._interval_tokens = torch.zeros((), dtype=torch.long, device=self.args.device)
        self._interval_seconds = 0.0
        self._step_start: float | None = None

    def _interval_averages(self) -> dict[str, float]:
        """Averages over all rows of all processes since the last call; a collective call."""
        totals = torch.stack([self._interval_weight.double(), self._interval_tokens.double()])
        sums = self.accelerator.reduce(torch.cat([self._interval_metrics.double(), totals]))
        largest = self.accelerator.gather(
            torch.tensor([[self._interval_seconds, peak_memory_mb()]], device=self.args.device)
        ).amax(0)
        *metrics, weight, tokens = sums.tolist()
        seconds, peak = largest.tolist()
        self._run_tokens, self._run_seconds = self._run_tokens + tokens, self._run_seconds + seconds
        self._reset_interval()
        return {
            **{name: value / weight for name, value in zip(self.model.metric_names, metrics, strict=True)},
            "tokens_per_second": tokens / seconds,
            "peak_memory_mb": peak,
        }

    def throughput(self) -> dict[str, float | None]:
        """`tokens_per_second` and `peak_memory_mb` (exo_fast.training.metrics) of the whole run; a collective call."""
        if not self._interval_is_empty:
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
        """No batch mean: weight, loss and metrics of each row, so that the average is over rows."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, metrics = model(**inputs)
        columns = torch.stack([inputs["weights"], losses.float()], dim=-1)
        return None, torch.cat([columns, metrics.float()], dim=-1), inputs["index"]

    def _average(self, predictions: EvalPrediction) -> dict[str, float]:
        """(R, 2 + M) rows of weight, loss and metrics -> the weighted means."""
        weights, *columns = predictions.predictions.astype("float64").T
        names = ("loss", *self.model.metric_names)
        means = [(weights * column).sum() / weights.sum() for column in columns]
        return dict(zip(names, map(float, means), strict=True))

    # Before the first step

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.is_deepspeed_enabled and self.args.world_size == 1 and not self.deepspeed.zero_optimization():
            # Nobody to share gradients with, and DeepSpeed would copy them all into one bucket and back in every step.
            self.deepspeed.enable_backward_allreduce = False
        self.model.register_head()
        self._before_start()
        self._before_resume = False
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

    def _before_start(self) -> None:
        """What a stage computes with the engine that stands and the model as it was given; here nothing."""

    # Saving and resuming the model inside the module

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state_dict = None  # the model's own
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
            state_dict = {name.removeprefix("model."): value for name, value in state_dict.items()}
        with self._inner_model():
            super()._save(output_dir, state_dict)
        # The Trainer's pickle of its arguments; the configuration is in summary.json.
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._inner_model():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._before_resume:
            return  # train() calls this too early: see _prepare_for_training
        with self._inner_model():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._inner_model():
            super()._load_best_model()

    @contextlib.contextmanager
    def _inner_model(self) -> Iterator[None]:
        """The Trainer's code with the model in the module's place, so that it finds one of its own or PEFT's."""
        module = self.model
        self.model = module.model
        try:
            yield
        finally:
            self.model = module


class AlignTrainer(StageTrainer):
    """Trains an AlignModule on a GroupDataset and reports the loss and metrics of exo_fast.training.metrics.

    Data sets without reference log-probs get them from the policy, before its first step.
    """

    def __init__(
        self,
        module: AlignModule,
        config: AlignConfig,
        datasets: dict[str, GroupDataset],
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.reference_cache_hits: dict[str, bool] = {}
        self.layout: dict[str, Any] = {}
        super().__init__(module, config, datasets, tokenizer, GroupCollator(tokenizer.eos_token_id))

    def _before_start(self) -> None:
        self.layout = settle_layout(
            self.model, self.train_dataset, self.data_collator, share_prompt=self.args.share_prompt == "auto"
        )
        datasets = {"train": self.train_dataset, "eval": self.eval_dataset}
        missing = {name: data for name, data in datasets.items() if data is not None and data.ref_logps is None}
        self.reference_cache_hits |= fill_reference_logps(
            self.args, self.model, self.args.model_name_or_path, missing, self.data_collator
        )
