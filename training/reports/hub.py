"""Trackers and the Hub: checks before a run starts, and the upload at its end.

Only the files that from_pretrained reads (the policy or its adapters, and the tokenizer) and the model card go to the
Hub. Nothing else of the output directory does: not the optimizer's state, not checkpoints, not logs, not report.html,
which shows the machine and its paths. An upload that fails loses nothing, because it comes last.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.utils import logging

from exo_fast.training.errors import InputError, RunError, Stopped, nearest
from exo_fast.training.files import why_not_writable

if TYPE_CHECKING:
    from exo_fast.training.trainer.config import TrainConfig

logger = logging.get_logger(__name__)

# Packages of trackers that have another name in transformers.
PACKAGES = {"comet_ml": "comet-ml", "flyte": "flytekit", "azure_ml": "azureml-core"}
STRATEGIES = ("end", "every_save")
# The files that from_pretrained reads. The list names what to upload, so that an unforeseen file stays here.
PUBLISHED = (
    "README.md",
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
)


# Before work starts


def check_trackers(report_to: list[str]) -> None:
    """Raises InputError if transformers does not know a tracker, or its package is not installed."""
    # transformers never lists flyte as available; its callback reports a missing flytekit.
    for name in report_to:
        if name in ("all", "none", "flyte"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(f"report_to={name!r}: nothing that logs can go to{nearest(name, INTEGRATION_TO_CALLBACK)}")
        if name not in get_available_reporting_integrations():  # which imports trackers: a second for W&B alone
            package = PACKAGES.get(name, name)
            raise InputError(f"report_to={name!r}: needs {package}: pip install {package} (or --report_to none).")


def warn_of_logging_dir(report_to: list[str]) -> None:
    """Warn before work starts if the directory named for TensorBoard's files cannot be written."""
    folder = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if folder and "tensorboard" in report_to and (reason := why_not_writable(folder)) is not None:
        logger.warning(f"TENSORBOARD_LOGGING_DIR={folder!r}: cannot be written ({reason}); the run goes on without it")


def keep_trackers_harmless(callbacks: Iterable[TrainerCallback]) -> None:
    """Turn a tracker's failure into a warning, and do not call the tracker again. (Trackers are called at the end of
    the training before the model is saved.)"""
    for callback in callbacks:
        if type(callback).__module__.startswith("transformers.integrations"):
            failed: list[Exception] = []
            for event in dir(TrainerCallback):
                if event.startswith("on_"):
                    setattr(callback, event, _harmless(getattr(callback, event), type(callback).__name__, failed))


def _harmless(tell: Callable[..., Any], name: str, failed: list[Exception]) -> Callable[..., Any]:
    @functools.wraps(tell)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if failed:
            return None
        try:
            return tell(*args, **kwargs)
        except (InputError, RunError, Stopped):
            raise
        except Exception as error:
            failed.append(error)
            logger.warning(f"{name}: {type(error).__name__}: {one_line(error)}; the run goes on without it")
            return None

    return guarded


def check_hub(config: TrainConfig) -> None:
    """Raises InputError if `push_to_hub` is set and cannot work, as far as can be seen without the network."""
    if not config.push_to_hub:
        return
    strategy = getattr(config.hub_strategy, "value", config.hub_strategy)
    if strategy not in STRATEGIES:
        raise InputError(
            f"hub_strategy={strategy!r}: would publish the optimizer's state; one of {', '.join(STRATEGIES)} is needed."
        )
    if constants.is_offline_mode():
        raise InputError("push_to_hub=True: HF_HUB_OFFLINE is set; unset it, or leave push_to_hub out.")
    if config.hub_token is None and get_token() is None:
        raise InputError("push_to_hub=True: there is no token for the Hub; run `hf auth login`, or set HF_TOKEN.")
    try:
        validate_repo_id(repo_name(config))
    except HFValidationError as error:
        raise InputError(f"hub_model_id={repo_name(config)!r}: no name of a repository: {error}") from error


def repo_name(config: TrainConfig) -> str:
    """Return the repository to use: hub_model_id, or the output directory's name under the token's owner."""
    return config.hub_model_id or Path(config.output_dir).absolute().name


def create_repository(config: TrainConfig) -> str:
    """Make the repository if it is not there; return its full name. Raises InputError if the Hub refuses."""
    try:
        url = _api(config).create_repo(repo_name(config), private=config.hub_private_repo, exist_ok=True)
    except Exception as error:  # no network, a token without the right, another owner's name
        raise InputError(
            f"push_to_hub=True: {repo_name(config)!r} cannot be made or reached: {one_line(error)}"
        ) from error
    return url.repo_id


# The upload


def published_files(folder: Path) -> list[str]:
    """Return the names of the files in `folder` to publish; files in its subfolders are never published."""
    return sorted({path.name for pattern in PUBLISHED for path in folder.glob(pattern) if path.is_file()})


def push(config: TrainConfig, folder: Path, message: str) -> dict[str, Any]:
    """Upload `published_files(folder)` in one commit; return {"repository": …, "commit": …}. Errors of the Hub's client
    are passed on."""
    repository = create_repository(config)
    commit = _api(config).upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message=message,
        allow_patterns=published_files(folder),
        revision=config.hub_revision,
    )
    return {"repository": repository, "commit": commit.oid}


def is_done(config: TrainConfig, summary: dict[str, Any]) -> bool:
    """Check whether a finished run was uploaded to the repository that `config` names."""
    there = summary.get("hub", {}).get("repository", "")
    return there == repo_name(config) or there.endswith(f"/{repo_name(config)}")


def push_checkpoint(config: TrainConfig, checkpoint: Path) -> None:
    """Upload a checkpoint's model for hub_strategy=every_save. A failure is a warning: training goes on."""
    strategy = getattr(config.hub_strategy, "value", config.hub_strategy)
    if not config.push_to_hub or strategy != "every_save" or config.process_index > 0:
        return
    try:
        push(config, checkpoint, f"Training in progress, {checkpoint.name}")
    except Exception as error:
        logger.warning(f"{checkpoint.name} was not uploaded to {repo_name(config)}: {one_line(error)}")


def _api(config: TrainConfig) -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=config.hub_token, library_name="exo_fast")


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
