"""A training from top to bottom. Read this page first.

A stage (`stages/align.py`, say) reads its data, loads a tokenizer and a model, builds a module and a trainer, and gives
them to `train` inside `training_scope`. `train` makes five calls in order.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from exo_fast.precision import matmul_precision
from exo_fast.training import files
from exo_fast.training.errors import Stopped
from exo_fast.training.reports import facts
from exo_fast.training.trainer.config import TrainConfig
from exo_fast.training.trainer.deepspeed import pickle_plainly, start_on_cpu
from exo_fast.training.trainer.finishing import finish, summarize, try_or_warn, write_summary
from exo_fast.training.trainer.trainer import StageTrainer


def train(
    trainer: StageTrainer,
    config: TrainConfig,
    checkpoint: str | None,
    *,
    about: Callable[[], dict[str, Any]],
    closing: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Train (from `checkpoint`), save, evaluate, and write summary.json and the pages; return the summary.

    `about()` returns the stage's own entries of the summary, and `closing(summary)` a line or more for the terminal.
    All processes must call it. Raises Stopped after a SIGTERM, once a checkpoint is saved, and RunError if training
    cannot go on.
    """
    seconds = take_steps(trainer, config, checkpoint)
    save_and_evaluate(trainer, config)
    summary = summarize(trainer, config, {**about(), "resumed_from": checkpoint, "train_seconds": seconds})
    write_summary(config, summary, closing)
    finish(config, summary, anew=True)
    return summary


def take_steps(trainer: StageTrainer, config: TrainConfig, checkpoint: str | None) -> float:
    """Take the steps that are left, with checkpoints and evaluations between them; return the seconds they took."""
    trainer.check_room()
    with trainer.watch.signals():
        output = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.watch.stopping:
        step, steps = trainer.state.global_step, trainer.state.max_steps
        place = Path(config.output_dir, f"checkpoint-{step}")
        raise Stopped(f"stopped by SIGTERM after step {step} of {steps}; {place} is saved; the same command continues.")
    return round(output.metrics["train_runtime"], 3)


def save_and_evaluate(trainer: StageTrainer, config: TrainConfig) -> None:
    """Save the model. Evaluate it unless the last evaluation was of this model (with load_best_model_at_end it may
    have been of a later one)."""
    trainer.save_model()
    if trainer.eval_dataset is not None and (config.load_best_model_at_end or not trainer.is_evaluated()):
        trainer.evaluate()
    try_or_warn("trainer_state.json", trainer.save_state)


@contextmanager
def training_scope(config: TrainConfig) -> Iterator[None]:
    """Set the precision of products and DeepSpeed's global configuration for this run only; release the output
    directory at its end."""
    precision = matmul_precision(config.matmul_precision, config.device.type)
    try:
        with precision, _deepspeed_scope(config), facts.heard_warnings() as config.warnings:
            yield
    finally:
        files.unlock_directory(Path(config.output_dir))


@contextmanager
def _deepspeed_scope(config: TrainConfig) -> Iterator[None]:
    """Set transformers' global DeepSpeed configuration (ZeRO-3 loads weights in shards) for this run only."""
    if config.engine == "deepspeed":
        set_hf_deepspeed_config(config.hf_deepspeed_config)
        pickle_plainly()
        if config.device.type == "cpu":
            start_on_cpu()
    else:
        unset_hf_deepspeed_config()
    with warnings.catch_warnings():
        # DeepSpeed and PEFT use names that torch and transformers have changed, in every step.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
