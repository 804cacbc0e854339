"""Saving a trained model: its weights whatever happens, and what cannot be saved found before the first step.

`save_pretrained` writes config.json and generation_config.json before the weights, and refuses a generation
configuration that it took when it loaded the model. So what a model brings is settled when training begins
(`settle_generation_config`, `check_can_be_saved`), and at its end no file beside the weights can keep them from disk.
"""

import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_NAME,
    logging,
)

from exo_fast.training import checkpoints, processes
from exo_fast.training.data.records import first_line
from exo_fast.training.errors import InputError

logger = logging.get_logger(__name__)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


# Before the first step


def settle_generation_config(model: nn.Module) -> None:
    """Make `model.generation_config` one that transformers will save; a warning says what was changed.

    Sampling values without do_sample, which transformers loads and does not save, mean do_sample=True; beside
    do_sample=False they mean nothing and go. What is invalid for another reason gives way to its token ids. A valid one
    is left alone; of a PeftModel it is the base model's.
    """
    config = getattr(model, "generation_config", None)
    if not isinstance(config, GenerationConfig) or (problem := _invalid(config)) is None:
        return
    repaired = copy.deepcopy(config)
    if config.do_sample is None:
        repaired.do_sample, change = True, "its sampling values are kept with do_sample=True"
    else:
        change = "its sampling values, which do_sample=False makes meaningless, are left out"
        for name in SAMPLING:
            setattr(repaired, name, None)
    if _invalid(repaired) is not None:
        repaired, change = _token_ids_of(config), "only its token ids are kept"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.generation_config = repaired
    if processes.index() == 0:
        logger.warning(f"the model's {GENERATION_CONFIG_NAME} cannot be saved as it is: {change} ({problem})")


def _invalid(config: GenerationConfig) -> str | None:
    """Why transformers would not save a generation configuration; None where it would."""
    try:
        config.validate(strict=True)
        config.to_json_string()
    except Exception as error:  # of values of any type that stood in a file
        lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()]
        return lines[1] if len(lines) > 1 and lines[0].startswith("GenerationConfig is invalid") else first_line(error)
    return None


def _token_ids_of(config: GenerationConfig) -> GenerationConfig:
    ids = {name: getattr(config, name, None) for name in TOKEN_IDS}
    return GenerationConfig(**{name: value for name, value in ids.items() if _is_id(value)})


def _is_id(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_id, value))
    return isinstance(value, int) and value >= 0


def check_can_be_saved(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Settle the generation configuration, and try to write all that is saved beside the weights.

    Raises InputError where the model's configuration cannot be written, without which no weights can be loaded; a
    tokenizer that cannot be is a warning.
    """
    settle_generation_config(model)
    with tempfile.TemporaryDirectory(prefix="exo_fast_saving_") as folder:
        try:
            model.config.save_pretrained(folder)
        except OSError:
            pass  # of the place for temporary files, which says nothing of the model
        except Exception as error:
            raise InputError(
                f"{getattr(model.config, 'name_or_path', '')!r}: its {CONFIG_NAME} could not be saved beside the "
                f"trained weights: {first_line(error)}"
            ) from error
        if tokenizer is not None:
            _beside(Path(folder), "the tokenizer", tokenizer.save_pretrained)


# At its end, and in checkpoints


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write a model (of a PeftModel its adapter) and its tokenizer to `folder`, as save_pretrained does.

    Where a file before the weights cannot be written, the weights are all the same, and each such file is a warning; so
    is the tokenizer. Raises OSError or SafetensorError where the weights have no room.
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
    """The weights, of those that are tied the first: safetensors takes no memory twice."""
    found: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in weights.items():
        found.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
    return {name: weights[name].detach().cpu().clone().contiguous() for name in found.values()}


def _beside(folder: Path, what: str, write: Callable[[str], Any]) -> None:
    """Let `write` fill a folder, and move its files into `folder` when it is done; a failure is a warning, and leaves
    no half of a file."""
    aside = folder / ".beside"
    try:
        write(str(aside))
        checkpoints.replace_files(aside, folder)
    except Exception as error:
        logger.warning(f"{folder}: {what} was not saved: {type(error).__name__}: {first_line(error)}")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
