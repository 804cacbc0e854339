"""Save a trained model: always its weights. Files that cannot be saved are found before the first step.

`save_pretrained` writes config.json and generation_config.json before the weights, and refuses a generation
configuration that it accepted when it loaded the model. So these files are settled when training begins
(`settle_generation_config`, `check_can_be_saved`), and at its end no other file can keep the weights from disk.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_NAME,
    logging,
)

from exo_fast.integrations.generation_config import settle_generation_config
from exo_fast.training.errors import InputError, first_line

logger = logging.get_logger(__name__)
WEIGHTS_SUFFIX = ".safetensors"


# Before the first step


def check_can_be_saved(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Settle the generation configuration, and try to write all files that are saved beside the weights.

    Raises InputError if the model's configuration cannot be written: without it no weights can be loaded. Warns if the
    tokenizer cannot be written.
    """
    settle_generation_config(model)
    with tempfile.TemporaryDirectory(prefix="exo_fast_saving_") as folder:
        try:
            model.config.save_pretrained(folder)
        except OSError:
            pass  # of the folder for temporary files; the model may be fine
        except Exception as error:
            raise InputError(
                f"{getattr(model.config, 'name_or_path', '')!r}: its {CONFIG_NAME} could not be saved beside the "
                f"trained weights: {first_line(error)}"
            ) from error
        if tokenizer is not None:
            _beside(Path(folder), "the tokenizer", tokenizer.save_pretrained)


# At the end of training, and in checkpoints


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write a model (or the adapter of a PeftModel) and its tokenizer to `folder`, as save_pretrained does.

    If a file before the weights cannot be written, the weights are written all the same. Each such file is a warning,
    and so is the tokenizer. Raises OSError or SafetensorError if the weights have no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(folder, state_dict=state_dict)
    except (OSError, SafetensorError):
        raise
    except Exception as error:
        logger.warning(f"{folder}: not all of the model could be saved: {type(error).__name__}: {first_line(error)}")
        _save_weights_alone(model, folder, state_dict)
    if tokenizer is not None:
        _beside(folder, "the tokenizer", tokenizer.save_pretrained)


def _save_weights_alone(model: nn.Module, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        weights, name = get_peft_model_state_dict(model, state_dict=state_dict), ADAPTER_SAFE_WEIGHTS_NAME
        files = {"adapter_config.json": model.active_peft_config.save_pretrained}
    else:
        weights, name = model.state_dict() if state_dict is None else state_dict, SAFE_WEIGHTS_NAME
        files = {CONFIG_NAME: model.config.save_pretrained}
        if getattr(model, "generation_config", None) is not None:
            files[GENERATION_CONFIG_NAME] = model.generation_config.save_pretrained
    if not list(folder.glob("*.safetensors")):
        save_file(_once_each(weights), folder / name, metadata={"format": "pt"})
    for what, write in files.items():
        _beside(folder, what, write)


def _once_each(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights, and of tied ones only the first: safetensors takes no memory twice."""
    found: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in weights.items():
        found.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
    return {name: weights[name].detach().cpu().clone().contiguous() for name in found.values()}


def _beside(folder: Path, what: str, write: Callable[[str], Any]) -> None:
    """Let `write` fill a folder, and move its files into `folder` when it is done. A failure is a warning, and leaves
    no incomplete file."""
    aside = folder / ".beside"
    try:
        write(str(aside))
        replace_files(aside, folder)
    except Exception as error:
        logger.warning(f"{folder}: {what} was not saved: {type(error).__name__}: {first_line(error)}")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_files(source: Path, target: Path) -> None:
    """Move the files of `source` into `target`, each in one step and forced to disk, over files of the same names; the
    weights first. Raises OSError if the weights cannot be moved, and warns if another file cannot."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: (path.suffix != WEIGHTS_SUFFIX, path.name)):
        try:
            if path.is_dir():
                replace_files(path, target / path.name)
            else:
                force_to_disk(path)
                os.replace(path, target / path.name)
        except OSError as error:
            if path.suffix == WEIGHTS_SUFFIX:
                raise
            logger.warning(f"{target / path.name} was not written: {error.strerror or error}")
    force_to_disk(target)


def force_to_disk(path: Path) -> None:
    """Write a file or a folder through to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
