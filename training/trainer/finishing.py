"""The end of a training: summary.json and the lines that stages print from it, the pages, and the upload."""

import datetime
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from exo_fast.training import machine, processes
from exo_fast.training.errors import RunError
from exo_fast.training.files import write_file
from exo_fast.training.reports import facts, html, hub, model_card
from exo_fast.training.trainer import checkpoints
from exo_fast.training.trainer.config import TrainConfig
from exo_fast.training.trainer.splits import find_training_splits
from exo_fast.training.trainer.trainer import StageTrainer

logger = logging.get_logger(__name__)
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


def try_or_warn(what: str, value: Callable[[], Any]) -> Any:
    """Return `value()`; None, after a warning, if it fails: the model is saved already."""
    try:
        return value()
    except Exception as error:
        logger.warning(f"{what}: not written, removed, or in the report: {type(error).__name__}: {error}")
        return None


def finish(config: TrainConfig, summary: dict[str, Any], *, anew: bool) -> None:
    """Write README.md (the model card) and report.html of a finished run, remove checkpoints that are not scheduled,
    and publish the model if asked to. All processes must call it.

    Existing pages are replaced if the run was made `anew`, else left alone: people edit cards. If a page cannot be
    made, that is a warning. Raises RunError, in every process, if an upload failed.
    """
    problem = None
    if config.process_index == 0:
        try_or_warn("checkpoints of stops", lambda: checkpoints.remove_unscheduled(Path(config.output_dir)))
        _write_pages(Path(config.output_dir), anew)
        if config.push_to_hub and not hub.is_done(config, summary):
            problem = _publish(config, summary)
    if (problem := processes.from_first(problem)) is not None:
        raise RunError(problem)


def _write_pages(output: Path, anew: bool) -> None:
    for name, write in ((model_card.NAME, model_card.write), (html.NAME, html.write)):
        if (output / name).exists() and not anew:
            continue
        try:
            write(output)
        except Exception as error:
            logger.warning(f"{output / name} was not written: {type(error).__name__}: {error}")
        else:
            if name == html.NAME:
                print(f"the report is {output / name}", flush=True)


def _publish(config: TrainConfig, summary: dict[str, Any]) -> str | None:
    """Upload the model and note it in the summary; return an error's text, if there was one."""
    output = Path(config.output_dir)
    try:
        summary["hub"] = hub.push(config, output, f"{config.stage}: the model after {summary['steps']} steps")
    except Exception as error:
        return (
            f"the training is finished and saved in {output}, but was not uploaded: {hub.one_line(error)}. The "
            "same command tries again."
        )
    content = json.dumps(summary, indent=2, default=str) + "\n"
    write_file(output, "summary.json", content.encode())
    print(f"published as {summary['hub']['repository']}", flush=True)
    return None
