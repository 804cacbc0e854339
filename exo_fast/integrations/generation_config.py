"""Make a model's generation configuration one that transformers will save.

transformers loads generation configurations that it refuses to save, which would end a training at its last step.
"""

import copy
from typing import Any

from torch import distributed
from transformers import GenerationConfig
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    logging,
)

logger = logging.get_logger(__name__)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def settle_generation_config(model: Any) -> None:
    """Make `model.generation_config` one that transformers will save; a warning names the change.

    Sampling values without do_sample, which transformers loads and does not save, mean do_sample=True; beside
    do_sample=False they mean nothing and are removed. A configuration that is invalid for another reason is replaced by
    its token ids. A valid one is left alone. For a PeftModel this is the base model's configuration.
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
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.generation_config = repaired
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        logger.warning(f"the model's {GENERATION_CONFIG_NAME} cannot be saved as it is: {change} ({problem})")


def _invalid(config: GenerationConfig) -> str | None:
    """Return why transformers would not save a generation configuration; None if it would."""
    try:
        config.validate(strict=True)
        config.to_json_string()
    except Exception as error:  # a file may hold values of any type
        lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return lines[1] if len(lines) > 1 and lines[0].startswith("GenerationConfig is invalid") else lines[0]
    return None


def _token_ids_of(config: GenerationConfig) -> GenerationConfig:
    ids = {name: getattr(config, name, None) for name in TOKEN_IDS}
    return GenerationConfig(**{name: value for name, value in ids.items() if _is_id(value)})


def _is_id(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_id, value))
    return isinstance(value, int) and value >= 0
