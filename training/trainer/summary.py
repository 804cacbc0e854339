"""summary.json of a training: its entries, and the lines that stages print from it."""

import datetime
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exo_fast.training import machine
from exo_fast.training.errors import RunError
from exo_fast.training.files import write_file
from exo_fast.training.reports import facts
from exo_fast.training.trainer.config import TrainConfig
from exo_fast.training.trainer.finishing import try_or_warn
from exo_fast.training.trainer.splits import find_training_splits
from exo_fast.training.trainer.trainer import StageTrainer

VERSIONS = ("exo_fast", "torch", "transformers", "accelerate", "deepspeed", "peft", "datasets")


def losses_line(summary: dict[str, Any], name: str) -> str:
    """Return "train: loss 1.2 -> 0.9" for one split of a summary."""
    entries, key = summary["metrics"][name], "eval_loss" if name == "eval" else "loss"
    return f"{name}: loss {entries['first'][key]:.4f} -> {entries['last'][key]:.4f}"


def perplexity(loss: float) -> float:
    """Return exp of a mean loss per token in nats; infinity if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _first_and_last(history: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the first and last entries of the log with training metrics, and with evaluation metrics."""
    found = {}
    for name, key in (("train", "loss"), ("eval", "eval_loss")):
        entries = [entry for entry in history if key in entry]
        if entries:
            found[name] = {"first": entries[0], "last": entries[-1]}
    return found


def summarize(trainer: StageTrainer, config: TrainConfig, of_stage: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of summary.json, including `of_stage`. All processes must call it."""
    summary = {
        "stage": config.stage,
        "config": config.to_dict(),
        "changed": config.changed,
        "versions": {name: machine.version(name) for name in VERSIONS} | {"python": platform.python_version()},
        "device": str(config.device),
        "processes": config.world_size,
        **of_stage,
        "steps": trainer.state.global_step,
        "steps_left_out": trainer.watch.skipped,
        "metrics": _first_and_last(trainer.state.log_history),
        "total_seconds": round(time.time() - config.started, 3),
        **trainer.throughput(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": facts.command_line(),
        "warnings": config.warnings,
    }
    samples = try_or_warn("samples", lambda: facts.take_samples(trainer))  # all processes must call it
    if config.process_index == 0:
        ran = machine.describe()
        summary |= {"machine": ran["machine"], "commit": ran["commit"]}
        summary["data_files"] = try_or_warn("data_files", lambda: facts.data_files(find_training_splits(config))) or {}
        if samples is not None:
            try_or_warn(facts.SAMPLES, lambda: facts.write_samples(Path(config.output_dir), samples))
    return summary


def write_summary(config: TrainConfig, summary: dict[str, Any], closing: Callable[[dict[str, Any]], str]) -> None:
    """Write summary.json, which marks the run as finished, and print where the model is. Only rank 0 does."""
    if config.process_index != 0:
        return
    content = json.dumps(summary, indent=2, default=str) + "\n"
    try:
        write_file(Path(config.output_dir), "summary.json", content.encode())
    except OSError as error:
        raise RunError(
            f"the training is finished and the model saved in {config.output_dir}, but summary.json could not be "
            f"written there: {error.strerror or error}."
        ) from error
    print(
        f"{summary['steps']} steps in {summary['train_seconds']:.0f} s; the model is in {config.output_dir}", flush=True
    )
    print(closing(summary), flush=True)
