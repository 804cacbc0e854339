"""The pages and the upload of a finished run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from exo_fast.training import processes
from exo_fast.training.errors import RunError
from exo_fast.training.files import write_file
from exo_fast.training.reports import html, hub, model_card
from exo_fast.training.trainer import checkpoints
from exo_fast.training.trainer.config import TrainConfig

logger = logging.get_logger(__name__)


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
