"""Loading what stages are given by a directory or a Hub name, with errors that a user can act on (InputError)."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from exo_fast.training.errors import InputError

ADAPTER = "adapter_config.json"


def from_pretrained(auto_class: Any, name_or_path: str, *, trust_remote_code: bool, **options: Any) -> Any:
    """`auto_class.from_pretrained`. Raises InputError for what cannot be loaded."""
    try:
        return auto_class.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name_or_path!r}: cannot be loaded as {auto_class.__name__}; a directory with a model and its tokenizer, "
            f"or the name of one on the Hub, is needed. {reason}"
        ) from error


def is_adapter(name_or_path: str) -> bool:
    """Whether a directory holds a PEFT adapter and not a whole model."""
    return Path(name_or_path, ADAPTER).is_file()


def refuse_adapter(name_or_path: str) -> None:
    """Raises InputError for a PEFT adapter."""
    if is_adapter(name_or_path):
        raise InputError(
            f"{name_or_path!r}: a LoRA adapter, where a whole model is needed; merge it first: "
            "AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…)."
        )


def adapter_base(path: str) -> str:
    """The model that an adapter was trained on. Raises InputError where it names none, or one that is gone."""
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    if not base or (base.startswith(("/", ".", "~")) and not Path(base).expanduser().is_dir()):
        raise InputError(
            f"{path!r}: its base model {base!r} is not there; put it back, or correct base_model_name_or_path in "
            f"{Path(path, ADAPTER)}."
        )
    return base


def need_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of EOS. Raises InputError for a tokenizer without one."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, which ends every completion; set "
            "one with tokenizer.add_special_tokens({'eos_token': …}) and save it."
        )
    return tokenizer.eos_token_id


def check_fits_model(config: Any, name_or_path: str, *, longest: int, largest_id: int = 0) -> None:
    """Raises InputError where a sequence is longer than the model has positions for, or an id is not in its vocabulary.

    `config` is one with `max_seq_len` and `trust_remote_code`.
    """
    base = adapter_base(name_or_path) if is_adapter(name_or_path) else name_or_path
    model = from_pretrained(AutoConfig, base, trust_remote_code=config.trust_remote_code).get_text_config()
    limit = getattr(model, "max_position_embeddings", None)
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
