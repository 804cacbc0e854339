"""Tiny random models of every family the library reads, with the numbers that a wrong reading would trip
over.

Two layers, hidden 32, vocabulary 61; 24 positions, fewer than the tokens of a packed row; windows of 5
tokens, shorter than most sequences. Logit scales and caps are far from 1 and from infinity, biases and
norms far from 0 and 1, and weights are large enough that attending to one wrong token changes every
log-prob after it.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from exo_fast import reference
from exo_fast.head import final_hidden, read_head
from exo_fast.layout import MaskPlan, Packed, model_inputs

VOCAB = 61
WINDOW = 5

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
_NO_GQA = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
_HEAD_DIM = {"head_dim": 8}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# Rotary embeddings that change beyond 12 positions, which some sequences have and some have not.
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 12,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

_STATE = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}

# name -> (model type, config entries); several names may share a model type.
SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", LLAMA),
    "arcee": ("arcee", LLAMA),
    "cohere": ("cohere", {**LLAMA, "logit_scale": 0.3}),
    "cohere2": ("cohere2", {**LLAMA, **_HEAD_DIM, **_MIXED, "logit_scale": 0.3}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_NO_GQA,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 24,
        },
    ),
    "ernie4_5": ("ernie4_5", {**LLAMA, **_HEAD_DIM}),
    "exaone4": ("exaone4", {**LLAMA, **_MIXED}),
    "falcon": ("falcon", {**_NO_GQA, "bias": True}),
    "falcon-new": ("falcon", {**_NO_GQA, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma": ("gemma", {**LLAMA, **_HEAD_DIM}),
    "gemma2": ("gemma2", {**LLAMA, **_HEAD_DIM, **_MIXED, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**LLAMA, **_HEAD_DIM, **_MIXED}),
    "gemma3-softcap": ("gemma3_text", {**LLAMA, **_HEAD_DIM, **_MIXED, "final_logit_softcapping": 3.0}),
    "gemma3-dynamic": (
        "gemma3_text",
        {
            **LLAMA,
            **_HEAD_DIM,
            **_MIXED,
            "max_position_embeddings": 12,
            "rope_parameters": {
                "full_attention": _DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "glm": ("glm", {**LLAMA, **_HEAD_DIM}),
    "glm4": ("glm4", {**LLAMA, **_HEAD_DIM}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _NO_GQA),
    "gpt_oss": ("gpt_oss", {**LLAMA, **_HEAD_DIM, **_MIXED, **_LOCAL_EXPERTS}),
    "granite": ("granite", {**LLAMA, "logits_scaling": 4.0}),
    "granitemoe": ("granitemoe", {**LLAMA, **_LOCAL_EXPERTS, "logits_scaling": 4.0}),
    "hunyuan": ("hunyuan_v1_dense", {**LLAMA, **_HEAD_DIM}),
    "llama": ("llama", LLAMA),
    "llama-dynamic": ("llama", {**LLAMA, "max_position_embeddings": 12, "rope_parameters": _DYNAMIC}),
    "llama-tied": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    "ministral": ("ministral", {**LLAMA, **_HEAD_DIM, **_MIXED}),
    "ministral3": ("ministral3", {**LLAMA, **_HEAD_DIM, "sliding_window": WINDOW}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": None}),
    "mistral-window": ("mistral", {**LLAMA, "sliding_window": WINDOW}),
    "mixtral": ("mixtral", {**LLAMA, **_LOCAL_EXPERTS}),
    "mixtral-window": ("mixtral", {**LLAMA, **_LOCAL_EXPERTS, "sliding_window": WINDOW}),
    "nemotron": ("nemotron", LLAMA),
    "olmo": ("olmo", LLAMA),
    "olmo2": ("olmo2", LLAMA),
    "olmo3": ("olmo3", {**LLAMA, **_MIXED}),
    "olmoe": ("olmoe", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("opt", {**_NO_GQA, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "phi": ("phi", LLAMA),
    "phi3": ("phi3", {**LLAMA, "sliding_window": WINDOW}),
    "phi3-longrope": (
        "phi3",
        {
            **LLAMA,
            "sliding_window": WINDOW,
            "original_max_position_embeddings": 12,
            "rope_parameters": {**_LONG, "partial_rotary_factor": 1.0},
        },
    ),
    "phimoe-longrope": (
        "phimoe",
        {
            **LLAMA,
            **_LOCAL_EXPERTS,
            "rope_parameters": {**_LONG, "short_mscale": 1.3, "long_mscale": 0.6},
            "original_max_position_embeddings": 12,
        },
    ),
    "phimoe": ("phimoe", {**LLAMA, **_LOCAL_EXPERTS, "sliding_window": WINDOW, "lm_head_bias": True}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-window": (
        "qwen2",
        {**LLAMA, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen2_moe": ("qwen2_moe", {**LLAMA, **_EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen2_moe-window": (
        "qwen2_moe",
        {
            **LLAMA,
            **_EXPERTS,
            "shared_expert_intermediate_size": 24,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
        },
    ),
    "qwen3": ("qwen3", {**LLAMA, **_HEAD_DIM}),
    "qwen3-window": (
        "qwen3",
        {**LLAMA, **_HEAD_DIM, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3_moe": ("qwen3_moe", {**LLAMA, **_HEAD_DIM, **_EXPERTS}),
    "qwen3_moe-window": (
        "qwen3_moe",
        {**LLAMA, **_HEAD_DIM, **_EXPERTS, "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "seed_oss": ("seed_oss", {**LLAMA, **_HEAD_DIM}),
    "smollm3": ("smollm3", {**LLAMA, "no_rope_layers": [1, 0]}),
    "smollm3-window": (
        "smollm3",
        {**LLAMA, "no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "stablelm": ("stablelm", LLAMA),
    "starcoder2": ("starcoder2", {**LLAMA, "sliding_window": WINDOW}),
}
REFUSING: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon-alibi": ("falcon", {**_NO_GQA, "alibi": True}),
    "falcon-mamba": ("falcon_mamba", _STATE),
    "mamba": ("mamba", _STATE),
    "mamba2": ("mamba2", {**_STATE, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 24}),
}
FAMILIES = {**SHARING, **REFUSING}

_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_model(name: str, *, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A random model of the family `name` in eval mode, the same on every call; `config` entries override."""
    model_type, entries = FAMILIES[name]
    return random_model(model_type, dtype=dtype, **{**entries, **config})


def random_model(model_type: str, *, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A random model of any type, in eval mode."""
    # A config may change its entries, so it gets a copy.
    config = CONFIG_MAPPING[model_type](**{"vocab_size": VOCAB, **_SPECIAL_TOKENS, **copy.deepcopy(config)})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3, generator=generator)
            else:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return model.to(dtype)


def token_logps(model: nn.Module, packed: Packed, plan: MaskPlan, **changed: Any) -> Tensor:
    """(N,) log-probs of the packed rows' tokens by the definition, so that autograd gives the gradients to compare.
    The model takes `changed` inputs in place of the plan's."""
    head = read_head(model)
    attention = model.config._attn_implementation
    inputs = model_inputs(packed, plan, dtype=model.dtype, device="cpu", attn_implementation=attention)
    hidden = final_hidden(model, **{**inputs, **changed})
    assert hidden.isfinite().all(), "padding must not be NaN either: it would spread through gradients"
    return reference.linear_logprobs(
        hidden.flatten(0, 1)[packed.source],
        head.weight,
        packed.targets,
        bias=head.bias,
        scale=head.scale,
        softcap=head.softcap,
    )


def logps_and_gradients(model: nn.Module, packed: Packed, plan: MaskPlan) -> tuple[Tensor, dict[str, Tensor]]:
    """Token log-probs, and the gradient of a sum that weighs every sequence differently."""
    model.zero_grad()
    logps = token_logps(model, packed, plan)
    sequences = reference.sequence_logps(logps, packed.cu_seqlens)
    (sequences * torch.linspace(-1, 1, len(sequences))).sum().backward()
    return logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Largest difference, relative to the largest expected value."""
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    assert error <= tolerance, f"{name} differs by {error:.1e} of its largest value"
