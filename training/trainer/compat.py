"""The versions of transformers that training knows, and where they differ.

StageTrainer overrides methods of transformers' Trainer, some of them private. Their parameters are checked when
training is imported: a version that divides its work differently is an error here, and never another number later.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import transformers
from packaging.version import Version
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

OLDEST, NEWEST = "5.9", "5.24"  # minor versions; `make matrix` tests both ends
OVERRIDDEN = {  # methods of Trainer that StageTrainer replaces or calls, with their parameters
    "_determine_best_metric": "metrics trial",
    "_evaluate": "trial ignore_keys_for_eval skip_scheduler",
    "_get_num_items_in_batch": "batch_samples device",
    "_get_output_dir": "trial",
    "_init_training_state": "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_scaler": "checkpoint",
    "_maybe_log_save_evaluate": "tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate",
    "_prepare_for_training": "max_steps train_dataloader resume_from_checkpoint",
    "_prepare_input": "data",
    "_push_from_checkpoint": "checkpoint_folder",
    "_save": "output_dir state_dict",
    "_save_checkpoint": "model trial",
    "_save_optimizer_and_scheduler": "output_dir",
    "_save_rng_state": "output_dir",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "get_batch_samples": "epoch_iterator num_batches device",
    "get_eval_dataloader": "eval_dataset",
    "get_train_dataloader": "",
    "log": "logs start_time",
    "prediction_step": "model inputs prediction_loss_only ignore_keys",
    "save_model": "output_dir _internal_call",
}
FIELDS = {field.name for field in fields(TrainingArguments)}
# transformers 5.23 renames gradient checkpointing, and version 6 takes the old name away. Goes with 5.22.
ACTIVATION_CHECKPOINTING = "activation_checkpointing" in FIELDS

logger = logging.get_logger(__name__)


def check_version() -> None:
    """Raise ImportError if training cannot work with this transformers; warn once if it is newer than tested."""
    found, tested = transformers.__version__, f"tested with transformers {OLDEST} to {NEWEST}"
    fix = f"pip install 'transformers>={OLDEST},<{after(NEWEST)}'"
    if Version(found) < Version(OLDEST):
        raise ImportError(f"transformers {found}: training with exo_fast is {tested}. {fix}")
    for name, expected in OVERRIDDEN.items():
        method = getattr(Trainer, name, None)
        given = None if method is None else " ".join(list(inspect.signature(method).parameters)[1:])
        if given != expected:
            changed = "is gone" if given is None else f"takes ({', '.join(given.split())})"
            raise ImportError(
                f"transformers {found}: its Trainer.{name} {changed}, and training with exo_fast needs "
                f"({', '.join(expected.split())}). It is {tested}. {fix}"
            )
    if Version(found) >= Version(after(NEWEST)):
        logger.warning_once(f"exo_fast is {tested}, and this is {found}. If numbers look wrong: {fix}")


def after(version: str) -> str:
    """Return the minor version that follows."""
    major, minor = version.split(".")
    return f"{major}.{int(minor) + 1}"


def multiprocessing_context(arguments: TrainingArguments) -> Any:
    """Return `dataloader_multiprocessing_context`, which transformers has from 5.15 on. Goes with 5.14."""
    return getattr(arguments, "dataloader_multiprocessing_context", None)


check_version()
