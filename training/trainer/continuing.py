"""Find out whether an output directory holds a run to continue, a finished run, or another run's results.

Giving the same command again finishes an interrupted run. The output directory keeps the settings that decide the
result, so that continuing a run is not confused with overwriting another one.
"""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import set_seed

from exo_fast.training import files, processes
from exo_fast.training.errors import InputError, differences
from exo_fast.training.files import write_file
from exo_fast.training.reports import hub
from exo_fast.training.trainer import checkpoints
from exo_fast.training.trainer.config import TrainConfig, default_of
from exo_fast.training.trainer.finishing import finish

SETTINGS = "settings.json"
# Fields that decide where, how fast or how loud a run is, and not its result.
INCIDENTAL = {"output_dir", "resume_from_checkpoint", "reference_cache_dir", "use_cpu", "local_rank", "report_to"}
INCIDENTAL |= {
    "disable_tqdm",
    "log_level",
    "log_level_replica",
    "logging_first_step",
    "deepspeed",
    "project",
    "run_name",
    "non_finite",
    "save_total_limit",
    "long_sequence",  # it sets other fields, and they are settings themselves
    "tiled_mlp",
}
# The settings hold the product of these instead, the global batch: how it is cut does not change the result.
CUT = {"per_device_train_batch_size", "gradient_accumulation_steps", "sequence_parallel"}
INCIDENTAL_PREFIXES = ("hub_", "push_to_hub", "dataloader_", "logging_", "trackio_")
DECISIVE = {"dataloader_drop_last"}  # despite its prefix


def resume_or_start(config: TrainConfig) -> tuple[str | None, dict[str, Any] | None]:
    """Seed everything and return what `config.output_dir` holds: (checkpoint to continue from, finished summary).

    If both are None, the run starts anew. Raises InputError, before any work, if the directory holds another run's
    results.
    """
    set_seed(config.seed)
    output = Path(config.output_dir)
    files.lock_directory(output)
    if config.process_index == 0:
        hub.warn_of_logging_dir(config.report_to)
    checkpoint, summary = _found(config)
    if config.process_index == 0:
        if summary is not None:
            print(f"{config.output_dir}: this run is finished; nothing to do", flush=True)
        elif checkpoint is not None:
            print(f"continuing from {checkpoint}", flush=True)
        if config.push_to_hub and summary is None:
            hub.create_repository(config)
    processes.wait()  # before rank 0 writes files that the others look for
    if summary is not None:
        finish(config, summary, anew=False)
        files.unlock_directory(output)
    elif config.process_index == 0:
        (output / "summary.json").unlink(missing_ok=True)
        write_file(output, SETTINGS, (json.dumps(settings_of(config), indent=1) + "\n").encode())
    return checkpoint, summary


def _found(config: TrainConfig) -> tuple[str | None, dict[str, Any] | None]:
    output = Path(config.output_dir)
    wish = (config.resume_from_checkpoint or "same").lower()
    if wish in ("auto", "true"):
        last = checkpoints.newest(output)
        if wish == "true" and last is None:
            raise InputError(
                f"resume_from_checkpoint={config.resume_from_checkpoint!r}: no checkpoint in output_dir="
                f"{config.output_dir!r} can be continued from; use auto to start anew where there is none."
            )
        return _as_text(last), None
    if wish not in ("same", "false"):
        _check_named(config.resume_from_checkpoint)
        return config.resume_from_checkpoint, None
    finished, there = (output / "summary.json").is_file(), checkpoints.numbered(output)
    if not finished and not there:
        return None, None
    if wish == "same" and (output / SETTINGS).is_file():
        now = settings_of(config)
        # An earlier version behaved as the defaults of fields that it did not have.
        unknown = {field.name: default_of(field) for field in fields(config) if field.init and field.name in now}
        changed = differences({**unknown, **json.loads((output / SETTINGS).read_text())}, now)
        if not changed:
            if finished:
                return None, json.loads((output / "summary.json").read_text())
            last = checkpoints.newest(output)
            if last is None and not config.save_only_model:  # such a run begins anew
                raise InputError(
                    f"output_dir={config.output_dir!r}: not one of its {len(there)} checkpoints can be continued from "
                    "(see the warnings); remove them to start anew, or choose another output_dir."
                )
            return _as_text(last), None
        problem = f"holds an earlier run with other settings ({changed})"
    else:
        problem = "holds an earlier run"
    advice = "choose another output_dir, or remove this one"
    if there:
        advice += "; or continue from its last checkpoint with these settings: --resume_from_checkpoint auto"
    raise InputError(f"output_dir={config.output_dir!r}: {problem}; {advice}.")


def _as_text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _check_named(checkpoint: str) -> None:
    """Raises InputError if the run cannot continue from the checkpoint that the user named."""
    fix = "name a whole checkpoint-N directory, or use true or auto."
    if not Path(checkpoint).is_dir():
        raise InputError(f"resume_from_checkpoint={checkpoint!r}: no such directory; {fix}")
    try:
        facts = checkpoints.read(Path(checkpoint))
    except checkpoints.Damaged as error:
        raise InputError(f"resume_from_checkpoint={checkpoint!r}: {error}; {fix}") from error
    if not facts.resumable:
        raise InputError(f"resume_from_checkpoint={checkpoint!r}: it holds a model alone (save_only_model); {fix}")


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return the fields that decide a run's result, with values as JSON gives them back."""
    values = {
        name: value
        for name, value in config.to_dict().items()
        if name in DECISIVE or not (name in INCIDENTAL | CUT or name.startswith(INCIDENTAL_PREFIXES))
    }
    for name in ("data", "eval_data"):  # one form for all paths to a file
        if values[name] is not None and Path(values[name]).expanduser().exists():
            values[name] = str(Path(values[name]).expanduser().resolve())
    if config.engine == "torch":
        values["zero_stage"] = None  # its default depends on the number of processes
    values["global batch"] = config.global_batch
    for name in ("data", "eval_data", *config.model_fields):
        values[f"files of {name}"] = _files_digest(values[name])
    return json.loads(json.dumps(values, default=str))


def _files_digest(path: str | None) -> str | None:
    """Hash the names, sizes and times of a file or of a directory's files; None if the path is not on this machine.

    The content is not hashed: reading a model takes minutes, and the aim is to notice an input that was made anew.
    """
    if path is None or not (place := Path(path).expanduser()).exists():
        return None
    files = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
