"""What the training stages have in common: `begin`, the loading of models, `training_scope`, and `train`.

A stage (align, sft, reward_model, classifier) reads from top to bottom as: begin, read data, load the tokenizer and the
model, build a module and a trainer, train. The same command given again finishes what was interrupted: the settings
that decide the result are kept in the output directory, so that continuing and mistaking are told apart.
"""

import datetime
import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from tabulate import tabulate
from transformers import (
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from exo_fast.data.examples import Example
from exo_fast.data.selection import LeftOut
from exo_fast.precision import matmul_precision
from exo_fast.training import files, machine
from exo_fast.training.data.groups import GroupDataset, tokenize
from exo_fast.training.data.places import Source
from exo_fast.training.data.sources import find_source
from exo_fast.training.errors import InputError, RunError, Stopped
from exo_fast.training.files import write_file
from exo_fast.training.models.loading import check_fits_model
from exo_fast.training.reports import facts
from exo_fast.training.trainer.config import CausalConfig, TrainConfig
from exo_fast.training.trainer.deepspeed import pickle_plainly, start_on_cpu
from exo_fast.training.trainer.finishing import _or_warn, finish
from exo_fast.training.trainer.trainer import StageTrainer

logger = logging.get_logger(__name__)
VERSIONS = ("exo_fast", "torch", "transformers", "accelerate", "deepspeed", "peft", "datasets")


# Starting, continuing, or having finished


# Data


def find_splits(config: TrainConfig) -> dict[str, Source]:
    """The data to train on and, where there is any, to evaluate on: {"train": …, "eval": …}."""
    sources = {"train": find_source(config.data, "train")}
    if sources["train"] is None:
        raise InputError(f"data={config.data!r}: the directory holds no train.json, train.jsonl or train.parquet.")
    if config.eval_data is not None:
        held_out = find_source(config.eval_data, "eval") or find_source(config.eval_data, "train")
        if held_out is None:
            raise InputError(f"eval_data={config.eval_data!r}: the directory holds no test.json, .jsonl or .parquet.")
        sources["eval"] = held_out
    elif not Path(config.data).expanduser().is_file():
        held_out = find_source(config.data, "eval")
        if held_out is not None:
            sources["eval"] = held_out
    if "eval" not in sources:
        for name, value in (("load_best_model_at_end", True), ("save_strategy", "best")):
            if getattr(config, name) == value:
                raise InputError(f"{name}={value!r}: needs held-out data; set eval_data, or put test.json beside.")
        config.eval_strategy, config.do_eval, config.eval_on_start = IntervalStrategy.NO, False, False
    return sources


def table(rows: list[tuple[str, list[Any]]]) -> str:
    """Aligned lines: a name, and a cell for each split. The first row names the splits."""
    (head, splits), *others = rows
    return tabulate([[name, *cells] for name, cells in others], [head, *splits], tablefmt="plain", intfmt=",")


def tokenize_splits(
    config: CausalConfig,
    examples: dict[str, list[Example]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_contrastive: int | None,
    left_out: dict[str, LeftOut] | None = None,
    **judged: Any,
) -> dict[str, GroupDataset]:
    """The rows of each split as tokenised groups (`data.groups.tokenize`, which takes `judged`). Raises InputError
    where the model cannot take them."""
    datasets = {
        name: tokenize(
            rows,
            tokenizer,
            num_contrastive=num_contrastive,
            max_seq_len=config.max_seq_len,
            max_gen_len=config.max_gen_len,
            left_out=left_out[name] if left_out else None,
            **judged,
            description=f"tokenising ({name})",
            progress=config.process_index == 0 and not config.disable_tqdm,
        )
        for name, rows in examples.items()
    }
    check_batches(config, len(datasets["train"]))
    check_fits_model(
        config,
        config.model_name_or_path,
        longest=max(data.counts.longest_sequence for data in datasets.values()),
        largest_id=max(int(max(data.prompt_ids.max(), data.completion_ids.max())) for data in datasets.values()),
    )
    return datasets


def check_batches(config: TrainConfig, rows: int) -> None:
    """Raises InputError where dataloader_drop_last leaves none of the training data's rows."""
    if config.dataloader_drop_last and rows < config.global_batch:
        parts = (
            (config.per_device_train_batch_size, "per_device_train_batch_size"),
            (config.gradient_accumulation_steps, "gradient_accumulation_steps"),
            (config.data_parallel_size, "processes"),
        )
        product = " x ".join(f"{number} {name}" for number, name in parts if number > 1)
        raise InputError(
            f"dataloader_drop_last=True: {rows} rows make no whole batch of {config.global_batch} ({product}), so "
            "nothing would be trained on; leave dataloader_drop_last out, or make the batch smaller."
        )


# Models


# Surroundings


@contextmanager
def training_scope(config: TrainConfig) -> Iterator[None]:
    """The precision of products and DeepSpeed's global configuration, for this run and no later one; at its end the
    output directory is given back."""
    precision = matmul_precision(config.matmul_precision, config.device.type)
    try:
        with precision, _deepspeed_scope(config), facts.heard_warnings() as config.warnings:
            yield
    finally:
        files.release(Path(config.output_dir))


@contextmanager
def _deepspeed_scope(config: TrainConfig) -> Iterator[None]:
    """transformers' global DeepSpeed configuration (ZeRO-3 loads weights in shards), for this run and no later one."""
    if config.engine == "deepspeed":
        set_hf_deepspeed_config(config.hf_deepspeed_config)
        pickle_plainly()
        if config.device.type == "cpu":
            start_on_cpu()
    else:
        unset_hf_deepspeed_config()
    with warnings.catch_warnings():
        # Names that torch and transformers changed and DeepSpeed and PEFT still use, in every step.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
        try:
            yield
        finally:
            unset_hf_deepspeed_config()


def train(
    trainer: StageTrainer,
    config: TrainConfig,
    checkpoint: str | None,
    *,
    about: Callable[[], dict[str, Any]],
    closing: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Train (from `checkpoint`), save, evaluate, and write summary.json; returns the summary.

    `about()` gives the stage's own entries of the summary, and `closing(summary)` a line or more for the terminal.
    Raises Stopped after a SIGTERM, when a checkpoint is saved, and RunError where training cannot go on.
    """
    trainer.check_room()
    with trainer.watch.signals():
        output = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.watch.stopping:
        step, steps = trainer.state.global_step, trainer.state.max_steps
        place = Path(config.output_dir, f"checkpoint-{step}")
        raise Stopped(f"stopped by SIGTERM after step {step} of {steps}; {place} is saved; the same command continues.")
    trainer.save_model()
    # The model that is saved, which with load_best_model_at_end is not the one that was evaluated last.
    if trainer.eval_dataset is not None and (config.load_best_model_at_end or not trainer.is_evaluated()):
        trainer.evaluate()
    _or_warn("trainer_state.json", trainer.save_state)
    summary = {
        "stage": config.stage,
        "config": config.to_dict(),
        "changed": config.changed,
        "versions": {name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
        "device": str(config.device),
        "processes": config.world_size,
        **about(),
        "resumed_from": checkpoint,
        "steps": trainer.state.global_step,
        "steps_left_out": trainer.watch.skipped,
        "metrics": _first_and_last(trainer.state.log_history),
        "train_seconds": round(output.metrics["train_runtime"], 3),
        "total_seconds": round(time.time() - config.started, 3),
        **trainer.throughput(),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": facts.command_line(),
        "warnings": config.warnings,
    }
    samples = _or_warn("samples", lambda: facts.take_samples(trainer))  # a collective call
    if config.process_index == 0:
        ran = machine.describe()
        summary |= {"machine": ran["machine"], "commit": ran["commit"]}
        summary["data_files"] = _or_warn("data_files", lambda: facts.data_files(find_splits(config))) or {}
        if samples is not None:
            _or_warn(facts.SAMPLES, lambda: facts.write_samples(Path(config.output_dir), samples))
        content = json.dumps(summary, indent=2, default=str) + "\n"
        try:
            write_file(Path(config.output_dir), "summary.json", content.encode())  # it says that the run is finished
        except OSError as error:
            raise RunError(
                f"the training is finished and the model saved in {config.output_dir}, but summary.json could not be "
                f"written there: {error.strerror or error}."
            ) from error
        seconds = summary["train_seconds"]
        print(f"{summary['steps']} steps in {seconds:.0f} s; the model is in {config.output_dir}", flush=True)
        print(closing(summary), flush=True)
    finish(config, summary, anew=True)
    return summary


def losses_line(summary: dict[str, Any], name: str) -> str:
    """ "train: loss 1.2 -> 0.9" of one split of a summary."""
    entries, key = summary["metrics"][name], "eval_loss" if name == "eval" else "loss"
    return f"{name}: loss {entries['first'][key]:.4f} -> {entries['last'][key]:.4f}"


def perplexity(loss: float) -> float:
    """exp of a mean loss per token in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _first_and_last(history: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The first and last entries of the log that hold training metrics, and evaluation metrics."""
    found = {}
    for name, key in (("train", "loss"), ("eval", "eval_loss")):
        entries = [entry for entry in history if key in entry]
        if entries:
            found[name] = {"first": entries[0], "last": entries[-1]}
    return found


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
