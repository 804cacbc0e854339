"""Attention masks for candidates that share their prompt, and the models that can use them.

In a packed row (see `exo_fast.layout`) token i sees token j iff both are of one group, j is not after i,
and j is in the prompt or in i's own candidate. No model is patched: a transformers model takes its
attention mask ready-made, as a 4-D additive tensor (eager, SDPA) or as a FlexAttention `BlockMask`, next to
`position_ids` that restart with every candidate; `exo_fast.backends.attention` makes SDPA on CPU skip masked
pairs. A sliding window is cut on positions, pos_i − pos_j < window: indices in a row of several candidates
are not distances in the text.

A layer that carries a state along the row, or derives distances from a 2-D mask or from indices, cannot use
such a mask. `plan_mask` therefore accepts the model types whose shared and unshared results the tests
compare, accepts others only as a trial (full softmax attention, and nothing in the configuration that hints at
anything else), and refuses the rest. Known or on trial, `exo_fast.sharing.check_sharing` decides by comparing
numbers.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from exo_fast.backends.attention import SharedPromptMask, spans, worthwhile
from exo_fast.packing import Packed, in_one_row
from exo_fast.positions import LengthRules, check_classes, length_rules, packed_lengths, rope_hint
from exo_fast.validate import readable

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# fmt: off
# Every layer sees all earlier tokens.
_PLAIN = frozenset({
    "apertus", "arcee", "cohere", "deepseek_v3", "ernie4_5", "falcon", "gemma", "glm", "glm4", "gpt2",
    "gpt_neox", "granite", "granitemoe", "hunyuan_v1_dense", "llama", "nemotron", "olmo", "olmo2",
    "olmoe", "opt", "phi", "seed_oss", "stablelm",
})
# Every layer has the window of `config.sliding_window`, if it is set. These refuse a dict of masks.
_ONE_WINDOW = frozenset({"ministral3", "mistral", "mixtral", "phi3", "phimoe", "qwen3_moe", "starcoder2"})
# A dict of masks by the names in `config.layer_types`.
_BY_LAYER = frozenset({
    "cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "ministral", "olmo3", "qwen2", "qwen2_moe",
    "qwen3", "smollm3",
})
# fmt: on
KNOWN_SHARING = tuple(sorted(_PLAIN | _ONE_WINDOW | _BY_LAYER))  # the model types whose masks the tests compare

_INDEX_ALIBI = "its ALiBi biases are distances along the row, which cannot restart with each candidate"

# A configuration entry of such a name means attention (or a mixer) that this module does not know how to cut.
_UNKNOWN_MIXER = re.compile(
    r"window|chunk|alibi|conv|mamba|ssm|local_att|linear_att|block_size|index_(topk|n_heads|block)|lsh|hash|cross_att"
)

MASKED_ATTENTION = ("sdpa", "eager", "flex_attention")  # implementations that read a ready-made mask
FLEX_BLOCK = 128  # tokens of a block of FlexAttention
NO_WINDOW = 2**31 - 1
ALIGNED = 8  # elements: what memory-efficient attention of a GPU asks of a mask's strides


@dataclass(frozen=True)
class MaskPlan:
    """The masks of a model's packed rows, or the reason why its prompts cannot be shared.

    `kind`: "plain", every layer sees all earlier tokens; "windowed", every layer sees the `window` nearest
    positions, its own included; "by_layer", a dict of masks by layer type, in which "sliding_attention" has
    the window. `by_length`: how the model's rotary embedding depends on a text's length (`exo_fast.positions`), empty
    if it does not; `pack` takes it, so that only candidates of the same frequencies share a prompt.
    """

    model_type: str
    share: bool
    reason: str = ""  # why not; empty when share is True
    kind: Literal["plain", "windowed", "by_layer"] = "plain"
    window: int | None = None
    layer_types: tuple[str, ...] = ()
    known: bool = True  # False: a model type on trial
    by_length: LengthRules = ()


def plan_mask(config: Any) -> MaskPlan:
    """Return whether a model of this transformers config can share prompts between candidates, and with which masks.

    Never raises for a model that it refuses: the plan then says why (`share=False`, `reason`), and
    callers pack with `share_prompt=False`. A plan with `known=False` must pass `check_sharing` before it is
    used.
    """
    return replace(_plan(config), by_length=length_rules(config))


def _plan(config: Any) -> MaskPlan:
    model_type = config.model_type
    known = model_type in KNOWN_SHARING
    reason = _refusal(config) or ("" if known else _untried(config))
    if reason:
        return MaskPlan(model_type, share=False, reason=f"model type {model_type!r}: {reason}", known=known)
    window = getattr(config, "sliding_window", None)
    if model_type in _ONE_WINDOW and window is not None:
        return MaskPlan(model_type, share=True, kind="windowed", window=window)
    if model_type in _BY_LAYER:
        names = tuple(sorted(set(config.layer_types)))
        return MaskPlan(
            model_type,
            share=True,
            kind="by_layer",
            window=window if "sliding_attention" in names else None,
            layer_types=names,
        )
    return MaskPlan(model_type, share=True, known=known)


def neighbours_hint(config: Any) -> str:
    """Return why a text's numbers in a model of this config might depend on the other texts of its batch, so that a
    check is needed (`exo_fast.sharing.check_neighbours`); empty if nothing hints at it."""
    if getattr(config, "auto_map", None):
        return "code of its own"
    if config.model_type not in KNOWN_SHARING:
        return f"a model type, {config.model_type!r}, whose rows are not among those that are tested"
    return rope_hint(config)


def _refusal(config: Any) -> str:
    """Return why a model of this config cannot share prompts, whatever its type; empty if nothing forbids it."""
    if config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False):
        return _INDEX_ALIBI
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return "encoder-decoder attention has no packed row"
    parts = [name for name in ("vision_config", "audio_config", "text_config") if getattr(config, name, None)]
    if parts:
        return f"a multimodal model ({', '.join(parts)}): masks and positions also depend on the other inputs"
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if "chunked_attention" in other:
        return "chunked attention cuts its chunks on token indices, not on positions"
    if other:
        return (
            f"layers of type {', '.join(other)}: a state-space, linear-attention or otherwise special layer "
            "reads the row as one text, so one candidate would see the one before it"
        )
    implementation = getattr(config, "_attn_implementation", None)
    if implementation is not None and implementation not in MASKED_ATTENTION:
        return (
            f"attn_implementation {implementation!r} takes no ready-made mask; load the model with one of "
            f"{', '.join(MASKED_ATTENTION)}"
        )
    return ""


def _untried(config: Any) -> str:
    """Return why a model type that is not listed may not even be tried; empty if it may."""
    hints = [
        f"{name}={value!r}"
        for name, value in config.to_dict().items()
        if _UNKNOWN_MIXER.search(name) and value not in (None, False, 0, [], {})
    ]
    if hints:
        return f"not among the tested types, and {hints[0]} hints at more than attention over all earlier tokens"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "not among the tested types, and it has layers with a sliding window"
    model_class = _causal_lm_class(config)
    if model_class is None:
        return "not among the tested types, and no causal LM class of transformers goes with its config"
    if getattr(model_class, "_is_stateful", False):
        return "it carries a recurrent state along the row, so one candidate would see the one before it"
    accepted = inspect.signature(model_class.forward).parameters
    if "position_ids" not in accepted or "attention_mask" not in accepted:
        return "not among the tested types, and its forward takes no position_ids with an attention_mask"
    if not getattr(model_class, "_supports_attention_backend", False):
        return "not among the tested types, and its attention is not the standard one of transformers"
    return ""


def _causal_lm_class(config: Any) -> Any:
    """Return the class that transformers gives a model of this config, or None."""
    # Imported here: the losses must work without transformers, and a known model type never needs its class.
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def model_inputs(
    packed: Packed,
    plan: MaskPlan,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    attn_implementation: str,
) -> dict[str, Any]:
    """Return the keyword arguments for the model's forward on these rows (for `exo_fast.head.final_hidden`).

    Unshared rows are ordinary right-padded ones: input_ids and a 2-D attention_mask (B, T). Rows with
    shared prompts come with position_ids (B, T) and the plan's mask: (B, 1, T, T) of `dtype`, the model's
    compute dtype, 0 where a token is seen and the lowest finite value where not, or a BlockMask when
    `attn_implementation` is "flex_attention", or a dict of either by layer type. With a BlockMask the rows lie end to
    end in one, (1, T') with T' a multiple of 128: it skips what groups do not see of each other, and is compiled for
    any T' at once. `packed.source` counts through either form. For "sdpa" on CPU the mask
    may be a `exo_fast.backends.attention.SharedPromptMask`, which makes its values only on demand.
    If the plan says that length matters, `text_lengths` (B, T) comes too, for `final_hidden` alone.

    Raises ValueError for shared rows when the plan refuses sharing or the attention implementation reads no
    such mask, and when candidates share a prompt that the model gives different positions.
    """
    flex = packed.share_prompt and plan.share and attn_implementation == "flex_attention"
    if flex:
        packed = in_one_row(packed, FLEX_BLOCK)
    input_ids = packed.input_ids.to(device, non_blocking=True)
    lengths: dict[str, Any] = {}
    if plan.by_length:
        lengths = {"text_lengths": packed_lengths(packed.group_ids, packed.position_ids).to(device)}
    if not packed.share_prompt:
        # No position_ids: a right-padded row starts at position 0, and Mamba and Bloom do not take them.
        return {
            "input_ids": input_ids,
            "attention_mask": (packed.group_ids.to(device, non_blocking=True) >= 0).long(),
            **lengths,
        }
    if not plan.share:
        raise ValueError(
            f"these rows share prompts, which this model cannot: {plan.reason}. Pack with share_prompt=False."
        )
    if attn_implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation={attn_implementation!r} reads no ready-made mask, which shared prompts need. "
            f"Load the model with one of {', '.join(MASKED_ATTENTION)}, or pack with share_prompt=False."
        )
    if plan.by_length:
        check_classes(plan.by_length, packed.group_ids, packed.candidate_ids, packed.position_ids)
    position_ids = packed.position_ids.to(device, non_blocking=True)
    group_ids, candidate_ids = (ids.to(device, non_blocking=True) for ids in (packed.group_ids, packed.candidate_ids))
    segments = (group_ids, candidate_ids, position_ids)

    in_parts = attn_implementation == "sdpa" and readable(input_ids)
    rows = spans(*segments[:2]) if in_parts else None
    if rows is not None and not worthwhile(rows, input_ids.shape):
        rows = None
    longest = int(position_ids.max()) + 1 if in_parts else 0

    def mask(window: int | None) -> Tensor | BlockMask:
        if flex:
            return _block_mask(segments, window)
        mask_mod = sees(*segments, window)
        dense = partial(additive_mask, mask_mod, input_ids.shape, dtype, input_ids.device)
        if rows is None or (window is not None and window < longest):
            return dense()
        return SharedPromptMask(rows, input_ids.shape, dtype, dense)

    attention_mask: Any
    if plan.kind == "by_layer":
        attention_mask = {name: mask(plan.window if name == "sliding_attention" else None) for name in plan.layer_types}
    else:
        attention_mask = mask(plan.window)
    return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask, **lengths}


def sees(
    group_ids: Tensor,  # (B, T) int, -1 for padding
    candidate_ids: Tensor,  # (B, T) int, 0 for prompt tokens, -1 for padding
    position_ids: Tensor,  # (B, T) int
    window: int | Tensor | None = None,
) -> Callable[[Any, Any, Any, Any], Tensor]:
    """Return `mask_mod(b, h, q, kv)`: whether the token at index q of row b sees the one at index kv.

    Works on scalar index tensors, as FlexAttention calls it, and on broadcastable ones. Padding is a group
    of its own, so no row of the mask is empty, and no softmax gets only excluded entries, which would be
    NaN.
    """

    def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Tensor:
        candidate = candidate_ids[b, kv]
        same_text = (group_ids[b, q] == group_ids[b, kv]) & ((candidate == 0) | (candidate == candidate_ids[b, q]))
        seen = same_text & (kv <= q)
        if window is not None:
            seen = seen & (position_ids[b, q] - position_ids[b, kv] < window)
        return seen

    return mask_mod


def additive_mask(
    mask_mod: Callable[[Any, Any, Any, Any], Tensor],
    shape: torch.Size,  # (B, T)
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Return (B, 1, T, T) of `dtype`: 0 where seen, the lowest finite value elsewhere. Its rows begin at multiples of
    ALIGNED elements: SDPA on a GPU would copy another mask into such rows, in every layer."""
    rows = torch.arange(shape[0], device=device)
    index = torch.arange(shape[1], device=device)
    seen = mask_mod(rows[:, None, None, None], 0, index[:, None], index)
    room = torch.zeros(*seen.shape[:-1], -(-shape[1] // ALIGNED) * ALIGNED, dtype=dtype, device=device)
    return room[..., : shape[1]].masked_fill_(~seen, torch.finfo(dtype).min)


def _block_mask(segments: tuple[Tensor, Tensor, Tensor], window: int | None) -> BlockMask:
    """Return the mask of one row (1, T) for FlexAttention.

    The window is a tensor, and there is one if no layer has a window: another number, or another mask, would be another
    program to compile, and after eight of these FlexAttention runs with all scores in memory.
    """
    group_ids, candidate_ids, position_ids = segments
    limit = torch.tensor(NO_WINDOW if window is None else window, device=group_ids.device)
    seen = sees(group_ids, candidate_ids, position_ids, limit)

    def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Tensor:
        # Padding lies between the groups of several rows: if it saw itself as a text does, no block would be empty.
        return seen(b, h, q, kv) & ((group_ids[b, q] >= 0) | (q == kv))

    (_, length), device = group_ids.shape, group_ids.device
    return block_mask_maker(device.type == "cuda")(mask_mod, 1, None, length, length, device)


@functools.cache
def block_mask_maker(compiled: bool) -> Callable[..., BlockMask]:
    """Return torch's `create_block_mask`. Compiled, once for all lengths, it never stores the (T, T) values; on CPU
    compiling costs more than they do."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=True) if compiled else create_block_mask
