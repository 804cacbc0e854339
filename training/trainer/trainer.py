"""transformers.Trainer for modules whose forward is their loss: `StageTrainer`, and `AlignTrainer` for groups.

Differences from the Trainer's own loop, with their reasons:
- The model is a `TrainedModule`; saving and resuming reach through it to the model inside, so that
  checkpoints carry the model's plain names.
- The loss is a mean over the rows (groups, pairs, tokens: what the batch's `weights` count) of the *global*
  batch: each micro-batch is weighted by its share of all micro-batches and processes, so that it does not
  matter how the batch was cut. exo_fast.training.data.sampler describes which rows each process runs.
- Losses and metrics are sums and weights until they are logged: a log's means are over its rows, not over its steps.
- A checkpoint is whole or not there (exo_fast.training.trainer.checkpoints). SIGTERM saves one and ends the run. A
  loss or gradient that is not finite ends the run before it reaches the weights, or its step is skipped
  (exo_fast.training.trainer.non_finite).
- Training continues on another number of processes, with the same global batch: DeepSpeed's universal checkpoints
  then convert its optimizer shards.
- A checkpoint also holds the sums of the unfinished log entry. A run that continues makes up for the work that was
  due at the checkpoint's step after it was written (`take_up`). Only training steps draw from the global random
  states, so evaluations do not change a bit of the weights.
- In alignment, after the engine is created and before it loads a checkpoint, the policy is still the reference.
  Then the prompt-sharing layout is checked and reference log-probs are computed, through the forward (ZeRO-3,
  autocast, precision) of training.
"""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import DefaultFlowCallback, EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from exo_fast.training import processes
from exo_fast.training.data.sampler import (
    CountedCollator,
    CountedRows,
    EvaluationBatches,
    GlobalBatches,
    order_by_length,
    random_order,
)
from exo_fast.training.errors import RunError, first_line
from exo_fast.training.machine import peak_memory_mb
from exo_fast.training.models import saving
from exo_fast.training.models.modules import TrainedModule
from exo_fast.training.reports import hub
from exo_fast.training.trainer import checkpoints, compat, elastic, non_finite
from exo_fast.training.trainer.config import TrainConfig
from exo_fast.training.trainer.deepspeed import undo_first_step
from exo_fast.training.trainer.watch import RunWatch

logger = logging.get_logger(__name__)
INTERVAL = "interval_{}.json"  # in a checkpoint, one for each process: its sums since the last log entry


class StageTrainer(Trainer):
    """Trains a TrainedModule and reports its loss and metrics, averaged by the weights of their rows.

    Batches carry `index` (R,) and `weights` (R,) float32 of their R rows and `num_tokens` () long.
    """

    saves_whole_model = False  # at the end, even if adapters were trained

    def __init__(
        self,
        module: TrainedModule,
        config: TrainConfig,
        datasets: dict[str, Dataset],  # "train", and "eval" if there is held-out data
        tokenizer: PreTrainedTokenizerBase,
        collate: Callable[[list[Any]], dict[str, Any]],
    ):
        self._run_tokens = self._run_seconds = 0.0
        self._before_resume = True
        self._continued_from: Path | None = None
        self._checkpoint: tuple[int, Path] | None = None  # the last one written or read, after its step
        self._writing_to: str | None = None  # replaces the output directory while a checkpoint is written
        use_cache = getattr(module.config, "use_cache", None)
        saving.check_can_be_saved(module.model, tokenizer)
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
            module.config.use_cache = use_cache  # the Trainer turns it off, and would save it like that
        # num_items_in_batch (weights, see below) reaches compute_loss, and the loss it returns is already normalised.
        self.model_accepts_loss_kwargs = True
        self.step_batches: list[non_finite.MicroBatch] = []  # of the current optimizer step
        self._last_step: tuple[Any, float | None] = (None, None)  # its gradient norm and learning rate
        self._guard = non_finite.GradientGuard()
        hub.keep_trackers_harmless(self.callback_handler.callbacks)
        self.watch = RunWatch(self)
        self.add_callback(self.watch)
        self._reset_interval()

    # Data

    def get_train_dataloader(self) -> DataLoader:
        sampler = GlobalBatches(
            self._epoch_order,
            len(self.train_dataset),
            per_process=self.args.train_batch_size,
            process=self.args.data_parallel_rank,
            processes=self.args.data_parallel_size,
            accumulation=self.args.gradient_accumulation_steps,
            drop_last=self.args.dataloader_drop_last,
        )
        self._global_batch = sampler.global_batch
        return self._loader(self.train_dataset, sampler)

    def _epoch_order(self) -> list[int]:
        """Return the rows of the epoch that begins, in order."""
        rows, epoch = len(self.train_dataset), int(self.state.epoch)
        if self.args.train_sampling_strategy == "sequential":
            return list(range(rows))
        if self.args.train_sampling_strategy == "group_by_length":
            return order_by_length(self.train_dataset.lengths(), self._global_batch, self.args.seed, epoch)
        return random_order(rows, self.args.seed if self.args.data_seed is None else self.args.data_seed, epoch)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        sampler = EvaluationBatches(
            len(dataset),
            per_process=self.args.eval_batch_size,
            process=self.args.data_parallel_rank,
            processes=self.args.data_parallel_size,
        )
        return self._loader(dataset, sampler)

    def _loader(self, dataset: Dataset, sampler: GlobalBatches | EvaluationBatches) -> DataLoader:
        """Make a loader without accelerate, which would divide the batches over the processes once more. Its own
        generator gives the seed that PyTorch draws for workers in every iteration, even without workers."""
        return DataLoader(
            CountedRows(dataset),
            batch_sampler=sampler,
            collate_fn=CountedCollator(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            generator=torch.Generator().manual_seed(self.args.seed),
            multiprocessing_context=compat.multiprocessing_context(self.args),
        )

    # Loss and metrics

    def _prepare_input(self, data: Any) -> Any:
        # The Trainer would cast float inputs to the engine's dtype; log-probs of thousands of tokens stay float32.
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=data.is_pinned())
        return super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        weights = torch.stack([(batch["weights"] * batch["counted"]).sum() for batch in batch_samples]).sum()
        return self.accelerator.reduce(weights.to(device, non_blocking=True)) / self._copies

    @property
    def _copies(self) -> int:
        """Return the number of processes that share a micro-batch, each running a part of its tokens."""
        return self.args.world_size // self.args.data_parallel_size

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Return this micro-batch's share of the mean over the global batch's rows, times the data-parallel processes.

        (Engines average gradients over processes, and the Trainer averages logged losses over them.)
        """
        counted = inputs.pop("counted")
        loss, metrics = model(**inputs)
        self.step_batches.append(non_finite.MicroBatch(inputs, loss.detach(), metrics.detach()))
        weights = inputs["weights"] * counted
        numbers = torch.cat([loss.detach().expand(len(metrics), 1), metrics], dim=1)
        self._interval_numbers += (numbers * weights.unsqueeze(-1)).sum(0)
        self._interval_weight += weights.sum()
        self._interval_tokens += inputs["num_tokens"] * counted.amax() / self._copies
        self._interval_is_empty = False
        return loss * (weights.sum() * self.args.data_parallel_size / num_items_in_batch)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._step_start = time.perf_counter()  # an optimizer step begins with this call
        self.step_batches = []
        return super().get_batch_samples(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if self._step_start is not None:  # the first call after a step (also called at the end of an epoch)
            self._interval_seconds += time.perf_counter() - self._step_start
            self._step_start = None
            self._last_step = grad_norm, kwargs["learning_rate"]
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and not self._interval_is_empty:
            averages = self._interval_averages()
            if self.args.logging_nan_inf_filter and not math.isfinite(averages["loss"]):
                del averages["loss"]  # keep the Trainer's, a mean of the finite losses
            logs = {**logs, **averages}
        super().log(logs, start_time)

    def _reset_interval(self) -> None:
        self._interval_numbers = torch.zeros(1 + len(self.model.metric_names), device=self.args.device)
        self._interval_weight = torch.zeros((), device=self.args.device)
        self._interval_is_empty = True
        self._interval_tokens = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self._interval_seconds = 0.0
        self._step_start: float | None = None

    def _interval_averages(self) -> dict[str, float]:
        """Average over all rows of all processes since the last call. All processes must call it."""
        totals = torch.stack([self._interval_weight.double(), self._interval_tokens.double()])
        sums = self.accelerator.reduce(torch.cat([self._interval_numbers.double(), totals]))
        largest = self.accelerator.gather(
            torch.tensor([[self._interval_seconds, peak_memory_mb()]], device=self.args.device)
        ).amax(0)
        *numbers, weight, tokens = sums.tolist()
        seconds, peak = largest.tolist()
        self._run_tokens, self._run_seconds = self._run_tokens + tokens, self._run_seconds + seconds
        self._reset_interval()
        return {
            **{n: value / weight for n, value in zip(("loss", *self.model.metric_names), numbers, strict=True)},
            "tokens_per_second": tokens / seconds,
            "peak_memory_mb": peak,
        }

    def throughput(self) -> dict[str, float | None]:
        """Return `tokens_per_second` and `peak_memory_mb` (exo_fast.metrics) of the whole run. All processes must call
        it."""
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
        """Return weight, loss and metrics of each row, not a batch mean, so that the average is over rows."""
        inputs = self._prepare_inputs(inputs)
        counted = inputs.pop("counted")
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, metrics = model(**inputs)
        columns = torch.stack([inputs["weights"] * counted, losses.float()], dim=-1)
        return None, torch.cat([columns, metrics.float()], dim=-1), inputs["index"]

    def _average(self, predictions: EvalPrediction) -> dict[str, float]:
        """Return the weighted means of (R, 2 + M) rows of weight, loss and metrics."""
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
            # One process has no gradients to share, but DeepSpeed would copy them into a bucket and back in every step.
            self.deepspeed.enable_backward_allreduce = False
        optimizer = self.deepspeed.optimizer if self.is_deepspeed_enabled else self.optimizer.optimizer
        if isinstance(optimizer, torch.optim.Optimizer):  # ZeRO's are not: they check gradients themselves
            self._guard.watch(optimizer, lambda: self.step_batches)
        elif self.is_deepspeed_enabled:
            undo_first_step(optimizer)
        self.model.register_head()
        self._before_start()
        self._before_resume = False
        if resume_from_checkpoint is not None:
            self._continued_from = Path(resume_from_checkpoint)
            self._checkpoint = self.state.global_step, self._continued_from
            if self.is_deepspeed_enabled:
                elastic.load(self.deepspeed, Path(resume_from_checkpoint), strict=not self.model.is_peft)
            else:
                self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return model, train_dataloader

    def _before_start(self) -> None:
        """Compute a stage's numbers from the model as it was given, once the engine is ready. Here: nothing."""

    # Continuing

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        """Do the same as the Trainer, which would take one step too many if the last step, inside an epoch, is done."""
        trained = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else trained

    def take_up(self) -> None:
        """Continue the log from the checkpoint, and do what an undisturbed run does between writing that checkpoint
        and its next step: an entry of the log, an evaluation. All processes must call it."""
        if self._continued_from is None:
            return
        self._restore_interval(self._continued_from)
        due = self._due()
        self.control.should_log, self.control.should_evaluate, self.control.should_save = due.should_log, False, False
        grad_norm, learning_rate = self._last_step
        epoch, now = self.state.epoch, time.time()
        # It logs once a step; a checkpoint is there already.
        super()._maybe_log_save_evaluate(self._tr_loss, grad_norm, self.model, None, epoch, None, now, learning_rate)
        if due.should_evaluate and not self.is_evaluated():
            self._determine_best_metric(self._evaluate(None, None), None)

    def _due(self) -> TrainerControl:
        """Ask transformers' own flow of control what an undisturbed run does after this step."""
        due, flow = TrainerControl(), DefaultFlowCallback()
        flow.on_step_end(self.args, self.state, due)
        if due.should_training_stop or self.state.epoch == int(self.state.epoch):
            flow.on_epoch_end(self.args, self.state, due)
        return due

    def _is_scheduled(self) -> bool:
        """Check whether an undisturbed run writes a checkpoint after this step; with save_strategy=best it may."""
        due = self._due()
        return due.should_save or (self.args.save_strategy == SaveStrategy.BEST and due.should_evaluate)

    def is_evaluated(self) -> bool:
        """Check whether the log has an evaluation after this step."""
        return any("eval_loss" in entry and entry["step"] == self.state.global_step for entry in self.state.log_history)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> dict:
        if skip_scheduler and self._continued_from is not None:
            return {}  # eval_on_start: the log has the evaluation of the run's start
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self._checkpoint is not None:
            step, path = self._checkpoint
            # This checkpoint was written before it was evaluated.
            if self.state.best_global_step == step and checkpoints.is_scheduled(path):
                self.state.best_model_checkpoint = str(path)
        return is_best

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        grad_norm, learning_rate = self._last_step
        interval = {
            "logged": self._globalstep_last_logged,
            "loss": self._tr_loss.item(),
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "learning_rate": learning_rate,
            "numbers": self._interval_numbers.tolist(),
            "weight": self._interval_weight.item(),
            "copies": self._copies,
            "tokens": self._interval_tokens.item(),
            "seconds": self._interval_seconds,
            "steps_left_out": self.watch.skipped,
        }
        Path(output_dir, INTERVAL.format(self.args.process_index)).write_text(json.dumps(interval) + "\n")

    def _restore_interval(self, checkpoint: Path) -> None:
        """Add the sums of the checkpoint's processes to the sums of the present ones, which may be more or fewer. All
        processes must call it."""
        files = [checkpoint / INTERVAL.format(index) for index in range(checkpoints.facts(checkpoint).processes)]
        if not files[0].exists():  # a checkpoint of exo_fast 0.2 or older: the next entry covers fewer steps
            return
        parts = [json.loads(file.read_text()) for file in files]
        processes, copies = self.args.world_size, self._copies / parts[0]["copies"]
        for part in parts[self.args.process_index :: processes]:
            self._tr_loss += part["loss"] * (processes / len(parts))  # the Trainer logs the mean over processes
            self._interval_numbers += copies * torch.tensor(part["numbers"], device=self.args.device)
            self._interval_weight += copies * part["weight"]
            self._interval_tokens += part["tokens"]
            self._interval_seconds = max(self._interval_seconds, part["seconds"])
        self._globalstep_last_logged = parts[0]["logged"]
        self._interval_is_empty = self._globalstep_last_logged == self.state.global_step
        self._last_step = parts[0]["grad_norm"], parts[0]["learning_rate"]
        self.watch.skipped = parts[0]["steps_left_out"]
        # The Trainer's train_loss is over the steps from here on.
        self._total_loss_scalar -= self.accelerator.gather(self._tr_loss).mean().item()

    # During the run

    def left_out_step(self) -> bool:
        """Check whether the optimizer skipped the last step because gradients were not finite. All processes agree."""
        optimizer = self.deepspeed.optimizer if self.is_deepspeed_enabled else None
        return bool(getattr(optimizer, "overflow", False)) or self._guard.overflow

    def lost_loss(self) -> bool | Tensor:
        """Return whether a loss of the last step, in this process, is not finite: on the device, if it was not read."""
        if self._guard.batches is not self.step_batches:  # an optimizer that checks gradients itself
            return torch.stack([~torch.isfinite(batch.loss) for batch in self.step_batches]).any()
        return self._guard.lost

    def describe_rows(self, indices: list[int]) -> str:
        """Describe rows of the training data, for a message."""
        return f"rows {non_finite.format_rows(indices)} of the training data (counted from 0)"

    # Saving and resuming the model inside the module

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as the Trainer does, but write aside and publish in one step (exo_fast.training.trainer.checkpoints)."""
        output, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self._check_space(output)
        try:
            with checkpoints.unfinished(output, name) as folder:
                self._writing_to = str(folder)
                try:
                    super()._save_checkpoint(model, trial)
                finally:
                    self._writing_to = None
                best = self.state.best_global_step and output / f"checkpoint-{self.state.best_global_step}"
                if best and (best.name == name or (best.exists() and checkpoints.is_scheduled(best))):
                    self.state.best_model_checkpoint = str(best)  # not the path it was just written to
                if self.args.should_save:
                    self.state.save_to_json(str(folder / name / TRAINER_STATE_NAME))
                facts = checkpoints.Facts(
                    step=self.state.global_step,
                    processes=self.args.world_size,
                    engine=self.args.engine,
                    zero_stage=self.deepspeed.zero_optimization_stage() if self.is_deepspeed_enabled else None,
                    resumable=not self.args.save_only_model,
                    scheduled=not self.watch.stopping or self._is_scheduled(),
                )
                checkpoints.publish(folder / name, output / name, facts)
                self._checkpoint = self.state.global_step, output / name
                if self.args.should_save:
                    checkpoints.remove_unscheduled(output, but=output / name)
                    checkpoints.rotate(output, self.args.save_total_limit, self.state.best_model_checkpoint)
                hub.push_checkpoint(self.args, output / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(output).free
            problem = f"{str(error).splitlines()[0]}; {free / 1e6:,.1f} MB are free"
            raise RunError(self._unwritten(output, name, problem)) from error

    def _get_output_dir(self, trial: Any) -> str:
        return self._writing_to or super()._get_output_dir(trial)

    def check_room(self) -> None:
        """Raises RunError, in every process, if the disk has no room for the final model."""
        output = Path(self.args.output_dir)
        total, trained = self._bytes()
        needed = total if self.saves_whole_model or not self.model.is_peft else trained
        free = shutil.disk_usage(output).free
        if processes.from_first(free < needed):
            raise RunError(
                f"output_dir={str(output)!r}: the trained model needs about {needed / 1e6:,.1f} MB, and "
                f"{free / 1e6:,.1f} MB are free; make room, or name another directory."
            )

    def _check_space(self, output: Path) -> None:
        """Raises RunError, in every process and before anything is written, if the disk has no room for a
        checkpoint."""
        before = checkpoints.numbered(output)
        needed = checkpoints.size(before[0]) if before else self._estimated_bytes()
        free = shutil.disk_usage(output).free
        if processes.from_first(free < needed):
            problem = f"it needs about {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
            raise RunError(self._unwritten(output, f"checkpoint-{self.state.global_step}", problem))

    def _estimated_bytes(self) -> int:
        """Estimate the bytes of a checkpoint: the model, and float32 weights and two moments of the trained
        parameters."""
        total, _ = self._bytes()
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters() if p.requires_grad)
        return (0 if self.model.is_peft else total) + 12 * trained

    def _bytes(self) -> tuple[int, int]:
        """Return the bytes of all weights, and of the trained weights."""
        total = trained = 0
        for parameter in self.model.parameters():
            size = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
            total += size
            trained += size * parameter.requires_grad
        return total, trained

    def _unwritten(self, output: Path, name: str, problem: str) -> str:
        whole = checkpoints.numbered(output)
        last = f"{whole[0].name} is whole" if whole else "there is no checkpoint before it"
        return (
            f"{name} could not be written below output_dir={str(output)!r} ({problem}); {last}. Make room, or give "
            "save_total_limit, and the same command continues from the last one."
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state_dict = None  # the model's own
        if self.is_deepspeed_enabled and self.deepspeed.zero_optimization_partition_weights():
            # With LoRA, gather the adapters only, not the frozen model they sit in. None on all but the main process.
            state_dict = self.deepspeed._zero3_consolidated_16bit_state_dict(
                exclude_frozen_parameters=self.model.is_peft
            )
        if output_dir is None:  # the end of the run: replace each file that others read in one step
            self._save_at_the_end(Path(self.args.output_dir), state_dict)
        else:
            self._save(output_dir, state_dict)

    def _save_at_the_end(self, output: Path, state_dict: dict[str, Tensor] | None) -> None:
        """Save the final weights. Raises RunError, in every process, if the disk has no room."""
        problem = None
        with checkpoints.unfinished(output, "model") as folder:
            try:
                self._save(str(folder / "model"), state_dict)
                if self.args.should_save:
                    saving.replace_files(folder / "model", output)
            except (OSError, SafetensorError) as error:
                free = shutil.disk_usage(output).free
                problem = f"{first_line(error)}; {free / 1e6:,.1f} MB are free"
        if (problem := processes.from_first(problem)) is not None:
            raise RunError(self._unwritten(output, "the trained model", problem))

    # exo_fast.training.reports.hub uploads less than the Trainer would: no optimizer states, no logs.

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Do nothing: `resume_or_start` has made the repository."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: the Trainer would upload files that are still being written."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        if state_dict is not None:
            state_dict = {name.removeprefix("model."): value for name, value in state_dict.items()}
        folder = Path(output_dir or self.args.output_dir)
        saving.save_model(self.model.model, self.processing_class, folder, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._inner_model():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._before_resume:
            return  # train() calls this too early: see _prepare_for_training
        with self._inner_model():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        try:
            checkpoints.read(Path(self.state.best_model_checkpoint))
        except checkpoints.Damaged as error:
            raise RunError(f"load_best_model_at_end: {self.state.best_model_checkpoint}: {error}.") from error
        with self._inner_model():
            super()._load_best_model()

    @contextlib.contextmanager
    def _inner_model(self) -> Iterator[None]:
        """Run the Trainer's code with the model in the module's place, so that it finds a model of transformers or
        PEFT."""
        module = self.model
        self.model = module.model
        try:
            yield
        finally:
            self.model = module
