"""Load a causal language model to train, and add LoRA adapters to it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from exo_fast.head import read_head
from exo_fast.training.errors import InputError, nearest
from exo_fast.training.models.loading import SCALAR_TASK, from_pretrained

if TYPE_CHECKING:
    from exo_fast.training.trainer.config import TrainConfig


def load_causal_lm(config: TrainConfig, name_or_path: str) -> nn.Module:
    """Load a causal LM in the dtype the engine trains, with a head that the fused losses can read."""
    model = from_pretrained(AutoModelForCausalLM, name_or_path, **model_options(config))
    try:
        read_head(model)
    except ValueError as error:
        raise InputError(f"{name_or_path}: {error}") from error
    if config.disable_dropout:
        switch_off_dropout(model)
    return model


def model_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options of from_pretrained. DeepSpeed keeps float32 copies of bf16 weights; autocast does not."""
    attention = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    bf16 = config.bf16 and config.engine == "deepspeed"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return {"dtype": dtype, "trust_remote_code": config.trust_remote_code, **attention}


def switch_off_dropout(model: nn.Module) -> None:
    """Set dropout layers, and the rates that attention modules pass to a function, to 0. The config stays as it is."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def check_lora(config: TrainConfig, task_type: str) -> None:
    """Raise InputError if `add_lora` would fail, or would not do what `config` says; reads no weights."""
    if config.lora_r == 0:
        return
    shape = from_pretrained(AutoConfig, config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    options = {"trust_remote_code": config.trust_remote_code}
    kind = AutoModelForCausalLM
    if task_type == SCALAR_TASK:
        kind, shape.num_labels = AutoModelForSequenceClassification, 1
    try:
        with torch.device("meta"):
            model = kind.from_config(shape, **options)
    except Exception:  # loading the model reports the problem
        return
    names = [name for name, _ in model.named_modules()]
    for target in [] if adapts_all_linear(config) else config.lora_target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            last = {name.rpartition(".")[2] for name in names} - {""}
            raise InputError(
                f"lora_target_modules={config.lora_target_modules!r}: no module of {config.model_name_or_path!r} is "
                f"called {target!r} (names are taken as they are, not as patterns)"
                f"{nearest(target, sorted(name for name in last if not name.isdigit()))}"
            )
    with torch.random.fork_rng(devices=[]):  # so that the trained adapters start as if this had not run
        adapted = add_lora(config, model, task_type)
    head = adapted.get_base_model().get_output_embeddings()
    if task_type != SCALAR_TASK and hasattr(head, "base_layer"):
        raise InputError(
            f"lora_target_modules={config.lora_target_modules!r}: one of them is the head, whose weight the fused loss "
            "reads without adapters; leave it out (without lora_target_modules every linear layer but the head is "
            "adapted)."
        )


def adapts_all_linear(config: TrainConfig) -> bool:
    """Check whether every linear layer but the head gets adapters."""
    return config.lora_target_modules in (None, [], ["all-linear"])


def add_lora(config: TrainConfig, model: nn.Module, task_type: str) -> nn.Module:
    """Return `model` with the adapters that `config` asks for; `task_type` is one of PEFT's (CAUSAL_LM, SEQ_CLS)."""
    if config.lora_r == 0:
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if adapts_all_linear(config) else config.lora_target_modules,
        task_type=task_type,
    )
    try:
        with warnings.catch_warnings():
            # An adapter on the embedding of a tied model is merged without the head (`loading.merge_adapter`).
            warnings.filterwarnings("ignore", message=r"Model (has|with) `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
            return get_peft_model(model, lora)
    except ValueError as error:
        raise InputError(f"lora_target_modules={config.lora_target_modules!r}: {error}") from error
