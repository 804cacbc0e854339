"""Load models, by a directory or a Hub name, with errors that a user can act on (InputError).

A model is other people's data. Weights are read from safetensors alone, because a pickle (pytorch_model.bin) can run
any code. The claims of a directory are checked before they are used: its shards must lie inside it, and nobody waits
for a billion layers to be built.

An adapter is merged by `merge_adapter` alone, which shows by numbers that merging changed nothing.
"""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from exo_fast.data.fields import shorten
from exo_fast.positions import longest_text
from exo_fast.training.data.json_rows import read_json
from exo_fast.training.errors import InputError, first_line
from exo_fast.training.files import is_plain_name, user_path

TO_SAFETENSORS = "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) writes safetensors"
# Limits of the counts and sizes in a configuration: larger ones would be built, or filled, until the memory is full.
LIMITS = {re.compile(r"(num|n)_.*(layer|expert|head|label)"): 4096, re.compile(r".*_(size|dim|embd|inner)$"): 2**24}
ADAPTER = "adapter_config.json"
SCALAR_TASK = "SEQ_CLS"  # PEFT's name for the task of reward models and classifiers


def from_pretrained(auto_class: Any, name_or_path: str, *, trust_remote_code: bool, **options: Any) -> Any:
    """Call `auto_class.from_pretrained`, for models with weights from safetensors alone. Raises InputError if loading
    fails."""
    check_counts(name_or_path)
    if auto_class not in (AutoConfig, AutoTokenizer):
        check_weights(name_or_path)
        options["use_safetensors"] = True
    try:
        return auto_class.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # a wrong value in a file may fail anywhere
        reason = _broken_json(name_or_path) or first_line(error)
        raise InputError(
            f"{name_or_path!r}: cannot be loaded as {auto_class.__name__}; a directory with a model and its tokenizer, "
            f"or the name of one on the Hub, is needed. {reason}"
        ) from error


def check_counts(name_or_path: str) -> None:
    """Raise InputError if the configuration in a directory counts more layers, say, than any model has."""
    path = Path(name_or_path, CONFIG_NAME)
    if not path.is_file():
        return
    try:
        parts = [read_json(path)]
    except InputError:
        return  # transformers has a better message
    while parts:
        part = parts.pop()
        for key, value in part.items() if isinstance(part, dict) else ():
            if isinstance(value, dict):
                parts.append(value)
            for pattern, limit in LIMITS.items():
                if isinstance(value, int) and value > limit and pattern.match(key):
                    raise InputError(f"{path}: {key} is {shorten(value)}; no model has more than {limit:,}.")


def check_weights(name_or_path: str) -> None:
    """Raise InputError for a directory without weights that can be read as safetensors, or with an index that names
    files elsewhere. (From a Hub name, transformers loads safetensors or nothing.)"""
    directory = Path(name_or_path)
    if not directory.is_dir():
        return
    if (directory / SAFE_WEIGHTS_NAME).is_file():
        names = [SAFE_WEIGHTS_NAME]
    elif (index := directory / SAFE_WEIGHTS_INDEX_NAME).is_file():
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"{index}: has no `weight_map`, which says which file holds which weight.")
        for name in shards.values():
            if not isinstance(name, str) or not is_plain_name(name):
                raise InputError(f"{index}: names {name!r}, which is no file of the directory; a plain name is needed.")
        names = sorted(set(shards.values()))
    else:
        raise InputError(f"{name_or_path!r}: holds no {SAFE_WEIGHTS_NAME}{_instead(directory)}.")
    for name in names:
        _check_safetensors(directory / name)


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):  # reads the header, and compares it with the size of the file
            pass
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {first_line(error)}") from error


def _instead(directory: Path) -> str:
    """Return the end of an error's text: the pickle that a directory without safetensors holds, if any."""
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern))
    return f"; {pickles[0]} is a pickle, which could run anything and is not read ({TO_SAFETENSORS})" if pickles else ""


def _broken_json(name_or_path: str) -> str | None:
    """Return the error of a directory's first .json file that is not valid JSON."""
    for path in sorted(Path(name_or_path).glob("*.json")):
        try:
            read_json(path)
        except InputError as error:
            return str(error)
    return None


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, or of an adapter's base if the adapter's directory has no tokenizer."""
    if is_adapter(name_or_path) and not any(Path(name_or_path).glob("tokenizer*")):
        name_or_path = adapter_base(name_or_path)
    return from_pretrained(AutoTokenizer, name_or_path, trust_remote_code=trust_remote_code)


# Fitting data


def model_config(config: Any, name_or_path: str) -> Any:
    """Return the transformers config of a language model, or of an adapter's base. `config` has the field
    `trust_remote_code`."""
    base = adapter_base(name_or_path) if is_adapter(name_or_path) else name_or_path
    return from_pretrained(AutoConfig, base, trust_remote_code=config.trust_remote_code).get_text_config()


def check_fits_model(config: Any, name_or_path: str, *, longest: int, largest_id: int = 0) -> None:
    """Raise InputError if a sequence is longer than the model has positions for, or an id is not in its vocabulary.

    `config` has the fields `max_seq_len` and `trust_remote_code`.
    """
    model = model_config(config, name_or_path)
    limit = longest_text(model)
    if limit is not None and longest > limit:
        raise InputError(
            f"max_seq_len={config.max_seq_len}: the longest sequence has {longest} tokens, and the model has positions "
            f"for {limit}; set max_seq_len to at most {limit}."
        )
    if largest_id >= model.vocab_size:
        raise InputError(
            f"{name_or_path!r}: its tokenizer, or the data, gives id {largest_id} and its vocabulary has "
            f"{model.vocab_size}; the tokenizer belongs to another model, or the embeddings were not resized."
        )


def is_adapter(name_or_path: str) -> bool:
    """Check whether a directory holds a PEFT adapter and not a whole model."""
    return Path(name_or_path, ADAPTER).is_file()


def refuse_adapter(name_or_path: str) -> None:
    """Raise InputError for a PEFT adapter."""
    if is_adapter(name_or_path):
        raise InputError(
            f"{name_or_path!r}: a LoRA adapter, where a whole model is needed; merge it first: "
            f"{merge_advice(name_or_path)}"
        )


def merge_advice(adapter: str) -> str:
    """Return the command that merges an adapter, for an error's text."""
    call = f"save_merged({adapter!r}, {Path(adapter).name + '-merged'!r})"
    return f'python -c "from exo_fast.training.models.merging import save_merged; {call}"'


def refuse_scalar_adapter(name_or_path: str) -> None:
    """Raise InputError for an adapter of a reward model or a classifier, which is not a language model."""
    if adapter_task(name_or_path) == SCALAR_TASK:
        raise InputError(
            f"{name_or_path!r}: an adapter of a reward model or a classifier, where one of a language model is needed."
        )


def adapter_base(path: str) -> str:
    """Return the model that an adapter was trained on. Raises InputError if it names no model, or a missing one, and
    for an adapter whose weights are not safetensors."""
    from peft import PeftConfig

    try:
        base = PeftConfig.from_pretrained(path).base_model_name_or_path
    except Exception as error:  # as above
        raise InputError(f"{Path(path, ADAPTER)}: not a readable PEFT adapter: {first_line(error)}") from error
    field = f"{Path(path, ADAPTER)}: base_model_name_or_path"
    is_name = isinstance(base, str) and base
    if not is_name or (base.startswith(("/", ".", "~")) and not user_path(base, field).is_dir()):
        raise InputError(
            f"{path!r}: its base model {base!r} is not there; put it back, or correct base_model_name_or_path in "
            f"{Path(path, ADAPTER)}."
        )
    if not Path(path, ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        raise InputError(f"{path!r}: holds no {ADAPTER_SAFE_WEIGHTS_NAME}{_instead(Path(path))}.")
    _check_safetensors(Path(path, ADAPTER_SAFE_WEIGHTS_NAME))
    return base


def adapter_task(path: str) -> str | None:
    """Return PEFT's name for the task of the adapter in a directory; None if the adapter has no task."""
    content = read_json(Path(path, ADAPTER))
    task = content.get("task_type") if isinstance(content, dict) else None
    return task if isinstance(task, str) else None
