"""Facts of a causal language model's lm_head, so that logits never have to be formed outside the loss.

The fused losses need the hidden states that a model feeds its lm_head and the numbers that turn them into
logits:

    logits = softcap(hidden @ weight.T + bias) * scale,   softcap(a) = c * tanh(a / c)

Transformers models keep these in different places (`logit_scale`, `logits_scaling`,
`final_logit_softcapping`, a biased lm_head), and a model that does something else to its logits would silently get
wrong results. So model types are listed, and the tests check each against the model's own logits. Anything else is an
error that says how to go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exo_fast.positions import by_text


@dataclass(frozen=True)
class Head:
    """An lm_head: `logits = softcap(hidden @ weight.T + bias) * scale`, V the vocabulary, D the hidden size.

    `weight` and `bias` are the model's parameters themselves, so gradients of the loss reach them. `scale`
    is the model's own; the caller applies a sampling temperature. Under tensor parallelism `weight` and `bias` are
    this rank's rows of the head: DTensors, or plain tensors with the `process_group` that the fused losses take.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    tied: bool = False  # the weight is also the input embedding
    process_group: Any = None  # its ranks hold a slice of the vocabulary each

    def multiplied(self, hidden: Tensor) -> Tensor:
        """Return `hidden` in the dtype in which the lm_head multiplies it: the weight's. Mamba's final states, for
        example, are float32 in a bf16 model. Unchanged under torch.autocast, which casts both operands, the
        fused losses' too."""
        return hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(self.weight.dtype)

    def options(self, temperature: float = 1.0) -> dict[str, Any]:
        """Return the head's keyword arguments of the fused losses: bias, scale (divided by a sampling temperature),
        softcap and process_group. Hidden states (`multiplied`), weight and targets come before them."""
        return {
            "bias": self.bias,
            "scale": self.scale / temperature,
            "softcap": self.softcap,
            "process_group": self.process_group,
        }


# The change a model makes to `lm_head(hidden)`, by model type: nothing …
# fmt: off
_PLAIN = frozenset({
    "apertus", "arcee", "bloom", "deepseek_v3", "ernie4_5", "exaone4", "falcon", "falcon_mamba", "gemma",
    "glm", "glm4", "gpt2", "gpt_neox", "gpt_oss", "hunyuan_v1_dense", "llama", "mamba", "mamba2",
    "ministral", "ministral3", "mistral", "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "olmoe",
    "opt", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
    "stablelm", "starcoder2",
})
# fmt: on
# … a factor …
_SCALE: dict[str, Callable[[Any], float]] = {
    "cohere": lambda config: config.logit_scale,
    "cohere2": lambda config: config.logit_scale,
    "granite": lambda config: 1.0 / config.logits_scaling,
    "granitemoe": lambda config: 1.0 / config.logits_scaling,
}
# … or a cap.
_SOFTCAP: dict[str, Callable[[Any], float | None]] = {
    "gemma2": lambda config: config.final_logit_softcapping,
    "gemma3_text": lambda config: config.final_logit_softcapping,
}
# Layers of DeepSpeed's AutoTP that hold some rows of an nn.Linear, and have the process group of all of them.
_AUTOTP_SLICES = ("deepspeed.module_inject.layers.LinearLayer", "deepspeed.module_inject.layers.VocabParallelLinear")
KNOWN_HEADS = tuple(sorted({*_PLAIN, *_SCALE, *_SOFTCAP}))  # the model types `read_head` can read


def read_head(model: nn.Module) -> Head:
    """Return the facts of a transformers causal LM's lm_head, or of the one inside a `PeftModel`.

    A head that PEFT trains in full (`modules_to_save`) is read as it is now: the trained copy, or the
    original inside `disable_adapter()`; read it again after switching.

    A head in slices of the vocabulary, as the tensor parallelism of PyTorch and transformers leaves it (a
    DTensor) or DeepSpeed's AutoTP (a layer of its own), is read as this rank's slice.

    Raises ValueError for a model type that is not listed, a head that is not a plain linear layer or a slice of
    one, and a head under a LoRA adapter.
    """
    causal_lm = unwrap(model)
    model_type = getattr(causal_lm.config, "model_type", None)
    if model_type not in KNOWN_HEADS:
        raise ValueError(
            f"model type {model_type!r}: how it turns lm_head outputs into logits is not known. Known types: "
            f"{', '.join(KNOWN_HEADS)}. For another, pass a Head(weight, bias, scale, softcap) of your own, "
            "after comparing softcap(hidden @ weight.T + bias) * scale with the model's logits."
        )
    linear = _output_layer(causal_lm)
    embedding = causal_lm.get_input_embeddings()
    scale, softcap = _numbers(causal_lm.config, model_type)
    return Head(
        weight=linear.weight,
        bias=linear.bias,
        scale=scale,
        softcap=softcap,
        tied=linear.weight is getattr(embedding, "weight", None),
        process_group=getattr(linear, "mp_group", None),
    )


def _numbers(config: Any, model_type: str) -> tuple[float, float | None]:
    """Return scale and softcap. Raises ValueError for a config without them, and for numbers that make no logits."""
    try:
        scale = float(_SCALE[model_type](config)) if model_type in _SCALE else 1.0
        softcap = _SOFTCAP[model_type](config) if model_type in _SOFTCAP else None
        softcap = None if softcap is None else float(softcap)
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"model type {model_type!r}: its config has no logit scale or softcap: {error}") from error
    if not 0 < abs(scale) < math.inf or not (softcap is None or 0 < softcap < math.inf):
        raise ValueError(f"model type {model_type!r}: its config has a logit scale of {scale}, a softcap of {softcap}.")
    return scale, softcap


def final_hidden(model: nn.Module, *, text_lengths: Tensor | None = None, **inputs: Any) -> Tensor:
    """Return the states that the model's lm_head reads, with no logits computed and no key-value cache kept.

    Args:
        model: a transformers causal LM, or a `PeftModel` around one (its adapters stay in effect).
        text_lengths: (B, T) long, the tokens of each token's text (`exo_fast.positions`), which
            `exo_fast.masks.model_inputs` gives where it matters.
        inputs: the other arguments of the model's forward: input_ids (B, T), attention_mask, position_ids …

    Returns:
        (B, T, D) in the dtype in which the model leaves them, which may differ from its weights' dtype (Mamba's are
        float32 in a bf16 model): `Head.multiplied` casts them for the head.

    Raises:
        ValueError: not a causal LM of transformers, a model without a base model apart from its head, a PEFT method
            that puts tokens before the input, and with `text_lengths` the errors of `exo_fast.positions.by_text`.
    """
    base = decoder(model)
    with by_text(base, text_lengths):
        return base(**inputs, use_cache=False, return_dict=True).last_hidden_state


def decoder(model: nn.Module) -> Any:
    """Return the part of a causal LM below its lm_head, whose `last_hidden_state` the lm_head reads."""
    causal_lm = unwrap(model)
    base = causal_lm.base_model
    if base is causal_lm:
        raise ValueError(
            f"{type(causal_lm).__name__} has no base model apart from its lm_head (base_model_prefix="
            f"{causal_lm.base_model_prefix!r}), so its final hidden states cannot be had without its logits."
        )
    return base


def unwrap(model: nn.Module) -> Any:
    """Return the transformers causal LM itself: `model`, or the one that a `PeftModel` adapts in place."""
    causal_lm: Any = model  # untyped, because importing this module must not need transformers
    if hasattr(causal_lm, "peft_config") and hasattr(causal_lm, "get_base_model"):
        if causal_lm.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"{causal_lm.active_peft_config.peft_type} puts learned tokens before the input, which packed "
                "rows do not carry; use an adapter inside the layers, such as LoRA."
            )
        causal_lm = causal_lm.get_base_model()
    if not hasattr(causal_lm, "config") or not hasattr(causal_lm, "get_output_embeddings"):
        raise ValueError(
            f"a transformers causal LM, or a PeftModel around one, is needed; got {type(causal_lm).__name__}. "
            "Pass the inner model of a wrapper (usually its `.module`)."
        )
    return causal_lm


def _output_layer(causal_lm: Any) -> Any:
    """Return the linear layer, or AutoTP's slice of it, behind `get_output_embeddings()`, inside PEFT's wrappers."""
    layer = causal_lm.get_output_embeddings()
    if hasattr(layer, "modules_to_save"):
        use_original = layer.disable_adapters or not layer.active_adapters
        layer = layer.original_module if use_original else layer.modules_to_save[layer.active_adapters[0]]
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if hasattr(layer, "base_layer"):
        raise ValueError(
            f"the lm_head is under an adapter ({kind}), so its weight alone does not give the logits. "
            "Take 'lm_head' out of target_modules, or train it in full with "
            "modules_to_save=['lm_head'], or merge the adapter first (merge_and_unload; a head that is tied to the "
            "input embedding has to get a weight of its own before)."
        )
    if kind.startswith("deepspeed.module_inject.") and kind not in _AUTOTP_SLICES:
        raise ValueError(
            f"the lm_head is a {kind}, not a slice of the vocabulary: DeepSpeed cuts it along the hidden size (or in "
            "a way of its own), so no rank has the logits of any token. Cut it along the vocabulary, with "
            '"vocab_parallel_lm_head": true in the tensor_parallel section of the DeepSpeed config, or keep it whole.'
        )
    if not (isinstance(layer, nn.Linear) or kind in _AUTOTP_SLICES) or not layer.weight.is_floating_point():
        raise ValueError(
            f"the lm_head is a {kind}; a linear layer with an unquantised (V, D) weight is needed. "
            "Leave the lm_head out of quantisation, or pass a Head of your own."
        )
    return layer
