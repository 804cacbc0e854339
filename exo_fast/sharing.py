"""Checks that a model gives shared rows, and rows beside others, the same numbers as each text alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from exo_fast.head import Head, decoder, read_head
from exo_fast.logprobs import linear_logprobs
from exo_fast.masks import MaskPlan, model_inputs
from exo_fast.packing import Group, Packed, pack
from exo_fast.positions import by_text
from exo_fast.precision import true_float32

CHECKED_GROUPS = 4  # of a run's first groups, for `check_sharing`
CHECKED_TOKENS = 1024


@dataclass(frozen=True)
class SharingReport:
    """Measurements of `check_sharing` or `check_neighbours`. Differences are of log-probs, in nats."""

    ok: bool
    reason: str = ""  # why not; empty when ok
    token_rms: float = math.nan  # over all completion tokens
    sequence_max: float = math.nan  # largest absolute difference of a sequence log-prob
    atol: float = math.nan  # the bound on token_rms


def check_sharing(
    model: nn.Module,
    groups: list[Group],
    plan: MaskPlan,
    *,
    head: Head | None = None,
    atol: float | None = None,
) -> SharingReport:
    """Run `groups` with shared and with unshared prompts, and compare the log-probs.

    Meant for the first batch of a run (use groups of two candidates or more, longer than the model's window
    if it has one): several groups go into a row, the model is in eval mode, without gradients and autocast,
    and float32 products are true float32. `head` defaults to `read_head(model)`. `atol` bounds the root
    mean square difference of a token's log-prob; the default is 1e-4 for float32 weights and 0.15 for
    half-precision ones. On a trained 135M model the right mask gave 4e-6 and 0.05, the latter just as much
    between two unshared batches; wrong ones gave 0.35 to 1.9. A model type on trial (`plan.known` False) in
    half precision is compared on float32 copies of its weights, and an exception from its forward is
    reported as a failure.
    """
    if not plan.share:
        return SharingReport(ok=False, reason=plan.reason)
    base = decoder(model)
    head = head or read_head(model)
    half = head.weight.dtype in (torch.bfloat16, torch.float16)
    partitioned = hasattr(head.weight, "ds_id")  # ZeRO-3 has only parts of weights to copy
    upcast = half and not plan.known and not partitioned
    if atol is None:
        atol = 0.15 if half and not upcast else 1e-4
    tensors = dict(chain(base.named_parameters(), base.named_buffers())) if upcast else {}
    weights = {name: t.float() for name, t in tensors.items() if t.is_floating_point()}
    if upcast:
        head = replace(head, weight=head.weight.float())

    def token_logps(packed: Packed) -> Tensor:
        inputs = model_inputs(
            packed,
            plan,
            dtype=head.weight.dtype,
            device=head.weight.device,
            attn_implementation=base.config._attn_implementation,
        )
        with by_text(base, inputs.pop("text_lengths", None)):
            hidden = torch.func.functional_call(base, weights, (), {**inputs, "use_cache": False}).last_hidden_state
        source, targets = packed.source.to(hidden.device), packed.targets.to(hidden.device)
        rows = head.multiplied(hidden.flatten(0, 1)[source])
        return linear_logprobs(rows, head.weight, targets, **head.options())

    two_to_a_row = 2 * max(group.tokens() for group in groups)
    unshared = pack(groups, share_prompt=False)
    with (
        torch.no_grad(),
        torch.autocast(head.weight.device.type, enabled=False),
        eval_mode(model),
        true_float32(),
    ):
        expected = token_logps(unshared)
        try:
            found = token_logps(pack(groups, row_length=two_to_a_row, by_length=plan.by_length))
        except Exception as error:
            if plan.known or isinstance(error, torch.OutOfMemoryError):
                raise
            return SharingReport(ok=False, reason=f"its forward does not take the mask: {error!r}", atol=atol)
    return compared(found, expected, unshared.cu_seqlens, atol, "shared and unshared prompts give different log-probs")


def check_neighbours(
    token_logps: Callable[[list[Group]], Tensor], shortest: Group, longest: Group, *, atol: float
) -> SharingReport:
    """Check that a group's log-probs do not depend on its batch: compare `shortest` alone and beside `longest`.

    Meant for models of which `exo_fast.masks.neighbours_hint` gives a reason.

    Args:
        token_logps: runs a batch of groups as a run does and gives the log-probs of their tokens that count, (N,)
            floating, group by group; in eval mode and without gradients.
        shortest, longest: groups of the run.
        atol: bounds the root mean square difference of a token's log-prob, in nats, as `check_sharing` says.

    Returns:
        The report, which is not ok if a difference is NaN.
    """
    expected = token_logps([shortest])
    found = token_logps([shortest, longest])[: len(expected)]
    bounds = pack([shortest], share_prompt=False).cu_seqlens
    return compared(found, expected, bounds, atol, "a group has other log-probs beside a longer one than alone")


def compared(found: Tensor, expected: Tensor, cu_seqlens: Tensor, atol: float, problem: str) -> SharingReport:
    """Compare two log-probs of the same tokens, (N,) floating, of one dtype and on one device, which `cu_seqlens`
    (S + 1,) int, there too or on the CPU, divides into sequences. Differences are summed in float64; with NaN among
    them the report is not ok. `problem` says what a difference means."""
    difference = (found - expected).double()
    boundaries = torch.nn.functional.pad(difference.cumsum(0), (1, 0))[cu_seqlens.long()]
    token_rms = difference.square().mean().sqrt().item()
    sequence_max = boundaries.diff().abs().max().item()
    ok = token_rms <= atol  # False for NaN
    numbers = f"rms {token_rms:.1e} nats a token where {atol:.1e} is allowed, up to {sequence_max:.1e} nats a sequence"
    return SharingReport(ok, "" if ok else f"{problem}: {numbers}", token_rms, sequence_max, atol)


def shortened(group: Group, plan: MaskPlan) -> Group:
    """Return at most CHECKED_TOKENS of each segment, or as many as the model's window has, around the start of the
    completions: a check needs no more, and long rows of several groups may not fit if one does."""
    tokens = max(CHECKED_TOKENS, plan.window or 0)
    prompt, completions = group.prompt[-tokens:], [completion[:tokens] for completion in group.completions]
    learned = None if group.learned is None else [marks[:tokens] for marks in group.learned]
    if learned is not None and not all(map(any, learned)):
        learned = None  # counted tokens come later; any tokens serve the check
    return Group(prompt, completions, learned)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Turn dropout off inside the block, and restore every module's own mode after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
