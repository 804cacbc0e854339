"""Positions in models whose rotary embedding depends on how long a text is.

For the rope types "longrope" and "dynamic" transformers chooses the frequencies by the longest position of the whole
batch, and keeps the frequencies of "dynamic" for later batches. A text's numbers would then depend on its neighbours:
an untrained policy would differ from its own reference wherever the two were batched differently. The library wants
the numbers that the model gives for the text alone, as in use. So lengths fall into classes of the same frequencies
(`LengthRule`), candidates share a prompt only inside their class (`exo_fast.packing.pack`), and inside `by_text`
each rotary embedding of the model runs once for each class in the batch, from a fresh state and with positions that end
where the class's longest text ends. Each token takes the result of its text's class. No other model is touched.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Rope types of transformers whose frequencies do not depend on the length.
STATIC = frozenset({"default", "linear", "llama3", "mrope", "proportional", "yarn"})
TWO_SETS = frozenset({"longrope", "su"})  # one set of frequencies up to a length, another beyond it


@dataclass(frozen=True, order=True)
class LengthRule:
    """Texts of up to `limit` tokens have the same frequencies; all longer ones have others (LongRoPE), or, with
    `each`, every longer length has its own (dynamic NTK)."""

    limit: int
    each: bool

    def of(self, length: Any) -> Any:
        """Return the class of a length, or of each length in a tensor; it never falls as lengths rise."""
        if not self.each:
            return length > self.limit
        return length.clamp(min=self.limit) if isinstance(length, Tensor) else max(length, self.limit)


LengthRules = tuple[LengthRule, ...]  # of a model; empty if length does not matter


def length_rules(config: Any) -> LengthRules:
    """Return how the rotary embeddings of a model of this transformers config depend on a text's length."""
    config = _text_config(config)
    whole = getattr(config, "max_position_embeddings", None) or 0
    rules = set()
    for entry in _rope_entries(config):
        rope_type = _rope_type(entry)
        if "dynamic" in rope_type:
            rules.add(LengthRule(whole, each=True))
        if rope_type in TWO_SETS or "long_mscale" in entry:  # PhiMoE scales by length whatever the type
            own = entry.get("original_max_position_embeddings")
            rules.add(LengthRule(own or getattr(config, "original_max_position_embeddings", None) or whole, each=False))
    return tuple(sorted(rules))


def longest_text(config: Any) -> int | None:
    """Return how many positions a model of this config has, or None if it sets no limit: `max_position_embeddings`,
    which dynamic NTK extends by its factor."""
    config = _text_config(config)
    whole = getattr(config, "max_position_embeddings", None)
    factors = [entry.get("factor") or 1 for entry in _rope_entries(config) if "dynamic" in _rope_type(entry)]
    return whole if whole is None or not factors else int(whole * max(1, *factors))


def rope_hint(config: Any) -> str:
    """Return the rotary parameters of a config that say, or may say, that length matters; empty if no entry does."""
    for entry in _rope_entries(_text_config(config)):
        if _rope_type(entry) not in STATIC or "long_mscale" in entry:
            return f"a rotary embedding of type {_rope_type(entry)!r}"
    return ""


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _rope_entries(config: Any) -> list[dict[str, Any]]:
    """Return the rotary parameters of a config: one dict, or one for each kind of layer. Older configs, and code
    outside of transformers, name them `rope_scaling`."""
    found: list[dict[str, Any]] = []
    waiting = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            found += [value] if "rope_type" in value or "type" in value else []
            waiting += value.values()
    return found


def _rope_type(entry: dict[str, Any]) -> str:
    return str(entry.get("rope_type", entry.get("type")))


def length_class(rules: LengthRules, length: int) -> tuple[int, ...]:
    """Return the class of a length: equal for two lengths that have the same frequencies."""
    return tuple(int(rule.of(length)) for rule in rules)


def packed_lengths(packed_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return (B, T) long: for each token the tokens of its text, or of the longest text that shares it.
    `packed_ids` (B, T) tell texts, or groups of them, apart (−1 on padding); positions begin at 0."""
    text = packed_ids.long() + 1
    longest = text.new_zeros(int(text.max()) + 1)
    return longest.scatter_reduce(0, text.flatten(), position_ids.flatten() + 1, "amax")[text]


def check_classes(rules: LengthRules, group_ids: Tensor, candidate_ids: Tensor, position_ids: Tensor) -> None:
    """Raise ValueError if candidates of different frequencies share a prompt."""
    candidates = group_ids * (int(candidate_ids.max()) + 1) + candidate_ids
    own = packed_lengths(torch.where(candidate_ids > 0, candidates, -1), position_ids)
    longest = packed_lengths(group_ids, position_ids)
    for rule in rules:
        if bool(((rule.of(own) != rule.of(longest)) & (candidate_ids > 0)).any()):
            raise ValueError(
                f"candidates of one prompt share it in these rows, some with it up to {rule.limit} tokens long and "
                "some longer, to which this model's rotary embedding gives other positions. Pack with "
                "by_length=plan.by_length."
            )


def padded_texts(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, T) long, the tokens of each row's text, and the positions of its tokens, which begin at 0 with the
    text. The batch has one text a row, and padding on one side or both."""
    index = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    mask = attention_mask.bool()
    begin = torch.where(mask, index, len(index)).amin(1, keepdim=True)
    end = torch.where(mask, index, -1).amax(1, keepdim=True) + 1
    return (end - begin).clamp(min=0).expand(mask.shape), (index - begin).clamp(min=0)


@contextmanager
def by_text(model: nn.Module, lengths: Tensor | None) -> Iterator[None]:
    """Let the model's rotary embeddings give each token the values of its text alone, inside the block.

    `lengths` (B, T): for each token of the batch the tokens of its text; positions begin at 0 with the text. Nothing
    happens if they are None or the model's config (`length_rules`) says that length does not matter.

    Raises ValueError if the config says that length matters and the rotary embedding is not found, and if it is
    inside a layer that gradient checkpointing runs again in the backward pass, which is outside this block.
    """
    rules = () if lengths is None else length_rules(model.config)
    if lengths is None or not rules:
        yield
        return
    modules = _rotary_modules(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__}: its config has {rope_hint(model.config)}, which depends on the longest text of a "
            "batch, and the module that computes it is not known, so texts cannot be kept apart."
        )
    inside = [name for name in modules if any(part.isdigit() for part in name.split("."))]
    # transformers before 5.23 has the second name alone, and later versions warn of it.
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    checkpointed = next((getattr(model, name) for name in names if hasattr(model, name)), False)
    if inside and torch.is_grad_enabled() and checkpointed:
        raise ValueError(
            f"{type(model).__name__}: its rotary embedding ({inside[0]}) depends on the longest text of a batch and "
            "lies inside a layer, which gradient checkpointing runs again without knowing the texts. Switch gradient "
            "checkpointing off."
        )
    classes = _classes(rules, lengths)
    before = {module: vars(module).get("forward") for module in modules.values()}
    for module in before:
        module.forward = _by_class(module, classes)
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _rotary_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if "rotary" in type(module).__name__.lower()
        and "position_ids" in inspect.signature(type(module).forward).parameters
    }


def _classes(rules: LengthRules, lengths: Tensor) -> list[tuple[int, Tensor]]:
    """Return for each class of lengths in the batch its longest, and which tokens (B, T) are in it."""
    members: dict[tuple[int, ...], list[int]] = {}
    for length in lengths.unique().tolist():  # sorted, so a class is a run of them
        members.setdefault(length_class(rules, length), []).append(length)
    return [(run[-1], (lengths >= run[0]) & (lengths <= run[-1])) for run in members.values()]


def _by_class(module: nn.Module, classes: list[tuple[int, Tensor]]) -> Callable[..., Any]:
    """Return a forward of `module` for the texts of `classes`."""

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        length = position_ids.shape[-1]
        found: tuple[Tensor, ...] = ()
        for longest, tokens in classes:
            # The module takes the length from the largest position: an extra column gives it, whatever the batch holds.
            last = position_ids.new_full((*position_ids.shape[:-1], 1), longest - 1)
            positions = torch.cat([position_ids.clamp(max=longest - 1), last], -1)
            alone = copy.copy(module)
            alone._buffers = dict(module._buffers)
            start_anew(alone)
            output = type(module).forward(alone, x, positions, *args, **kwargs)
            parts = output if isinstance(output, tuple) else (output,)
            if any(part.shape[-2] != length + 1 for part in parts):
                raise ValueError(f"{type(module).__name__}: its output is not (…, T, d), a row for each position.")
            parts = tuple(part[..., :-1, :] for part in parts)
            mine = tokens[..., -length:, None].to(x.device)
            found = tuple(torch.where(mine, *pair) for pair in zip(parts, found, strict=True)) if found else parts
        return found if isinstance(output, tuple) else found[0]

    return forward


def start_anew(model: nn.Module) -> None:
    """Reset what a model's rotary embeddings, or one of them, have stored about earlier lengths."""
    for module in _rotary_modules(model).values():
        original = vars(module).get("original_max_seq_len")
        holders: tuple[dict[str, Any], ...] = (module._buffers, vars(module))
        for holder in holders:
            for name in list(holder):
                if name.endswith("original_inv_freq"):
                    holder[name.replace("original_", "")] = holder[name].clone()
                elif name.endswith("max_seq_len_cached") and original is not None:
                    holder[name] = original
