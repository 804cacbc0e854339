"""Check after every step whether the run was asked to stop, and whether its numbers are finite.

The processes of a run must agree on both, or some would go on and wait for ever for the others. That takes one small
all-reduce a step.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from exo_fast.training import processes
from exo_fast.training.errors import RunError, Stopped
from exo_fast.training.trainer import checkpoints, non_finite

if TYPE_CHECKING:
    from exo_fast.training.trainer.trainer import StageTrainer

logger = logging.get_logger(__name__)


class RunWatch(TrainerCallback):
    """Ends the run after a SIGTERM, with a checkpoint, and if a loss or gradient is not finite (with non_finite=skip
    the run goes on without the step). The run that continues first makes up for the work that a SIGTERM left out."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer
        self.asked = self.stopping = self.in_steps = False
        self.skipped = self.skipped_together = 0

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Handle SIGTERM: it ends the run after the current step, or at once before the first step."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can handle signals
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, *_: Any) -> None:
        if not self.in_steps:
            raise Stopped("stopped by SIGTERM before the first step: nothing to save; the same command starts again.")
        self.asked = True

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.take_up()  # the last moment before the first step, and the last callback
        self.in_steps = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        found = self.asked, self.trainer.lost_loss()
        if args.world_size > 1:
            flags = torch.stack([torch.as_tensor(f, dtype=torch.float32).to(args.device) for f in found])
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            found = flags.tolist()
        asked, lost = map(bool, found)
        if lost or self.trainer.left_out_step():
            self._not_finite(state.global_step, lost)
        else:
            self.skipped_together = 0
        if asked:
            self.stopping = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.stopping:  # the checkpoint is saved, and there may be little time
            control.should_save = control.should_evaluate = control.should_log = False
        return control

    def _not_finite(self, step: int, lost: bool) -> None:
        """Save the step's batches. Go on without the step if the user asked for it, else raise RunError."""
        trainer, left_out = self.trainer, self.trainer.left_out_step()
        folder = Path(trainer.args.output_dir, non_finite.FOLDER, f"step-{step}")
        non_finite.save(trainer.step_batches, folder, trainer.args.process_index)
        mine = [(row, row in batch.bad_rows()) for batch in trainer.step_batches for row in dict.fromkeys(batch.rows)]
        rows = [row for part in processes.gather(mine) for row in part]
        bad = sorted({row for row, is_bad in rows if is_bad})
        what = f"{'the loss' if bad or lost else 'the gradient'} is not finite"
        where = trainer.describe_rows(bad or sorted({row for row, _ in rows}))
        self.skipped, self.skipped_together = self.skipped + 1, self.skipped_together + 1
        story = f"step {step}: {what}, in {where}; the batch is in {folder}"
        if trainer.args.non_finite == "skip" and left_out and self.skipped_together <= non_finite.MOST_SKIPPED:
            if trainer.args.process_index == 0:
                logger.warning(f"{story}; the step was left out ({self.skipped} so far).")
            return
        advice = "lower learning_rate or max_grad_norm, or look at those rows; --non_finite skip leaves such steps out"
        if trainer.args.non_finite == "skip":
            advice = f"{self.skipped_together} steps one after another: the weights themselves may be the cause"
        whole = checkpoints.numbered(Path(trainer.args.output_dir))
        last = f"{whole[0]} is from before it" if whole else "no checkpoint was written before it"
        raise RunError(f"{story}. {last}. {advice[0].upper()}{advice[1:]}.")
