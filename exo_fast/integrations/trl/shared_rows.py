"""Ordinary padded batches, in which rows of the same prompt become one row that shares it.

Trainers of preferences and of sampled groups (TRL's DPO and GRPO, for two) pad every candidate to a row of its own,
with the prompt in each. They want a number back for each of those positions. So this module reads the rows, packs
rows of equal prompts (`exo_fast.layout`), and puts the results where the trainer looks for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exo_fast.packing import Group, Packed, pack
from exo_fast.positions import LengthRules


@dataclass(frozen=True)
class SharedRows:
    """A padded batch of B rows of T tokens, packed. N tokens are predicted: the tokens with a label."""

    shape: tuple[int, int]  # (B, T) of the padded batch
    groups: list[Group]
    packed: Packed
    targets: Tensor  # (N,) the labels of those tokens
    places: Tensor  # (N,) where each lies in the flat (B, T − 1) positions that predict


def share_rows(
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None,  # (B, T), 1 on tokens, padding on one side or both
    labels: Tensor,  # (B, T), −100 on tokens that are not learned
    *,
    candidates: int | None = None,
    by_length: LengthRules = (),
) -> SharedRows | None:
    """Pack rows of equal prompts in one row each; return None if no two rows share one, or if rows cannot be read so.

    A row's prompt is the tokens before its first label. With `candidates` each K consecutive rows are
    a group, and `packed` has the sequences in the order of the batch. Without, rows of one prompt anywhere in the batch
    are a group. With `by_length` (of a MaskPlan) only rows of like lengths share, and rows are packed whole: the tokens
    after their last label count for their length. Reads the batch on the host: if it is on a GPU, it waits for it once.
    """
    given = [input_ids, labels, *([] if attention_mask is None else [attention_mask.bool()])]
    if input_ids.dim() != 2 or any(tensor.shape != input_ids.shape for tensor in given):
        return None
    ids, wanted, *masks = torch.stack([tensor.to(input_ids.device, torch.long) for tensor in given]).cpu()  # one wait
    mask = masks[0].bool() if masks else torch.ones_like(ids, dtype=torch.bool)
    rows, length = ids.shape
    labelled = wanted != -100
    if not bool(labelled.any(1).all()) or bool((labelled & ~mask).any()):
        return None
    position = torch.arange(length)
    begin = torch.where(mask, position, length).amin(1)
    end = torch.where(mask, position, -1).amax(1) + 1
    first = torch.where(labelled, position, length).amin(1)
    stop = end if by_length else torch.where(labelled, position, -1).amax(1) + 1
    if bool((mask.sum(1) != end - begin).any()) or bool((first <= begin).any()):  # a hole, or no prompt
        return None
    begins, firsts, stops, tokens = begin.tolist(), first.tolist(), stop.tolist(), ids.tolist()

    members: dict[tuple, list[int]] = {}
    for row in range(rows):
        prompt = tuple(tokens[row][begins[row] : firsts[row]])
        members.setdefault((prompt,) if candidates is None else (row // candidates, prompt), []).append(row)
    if len(members) == rows:
        return None

    def learned(row: int) -> list[bool]:
        return labelled[row, firsts[row] : stops[row]].tolist()

    groups = [
        Group(list(key[-1]), [tokens[row][firsts[row] : stops[row]] for row in found], [learned(row) for row in found])
        for key, found in members.items()
    ]
    order = [row for found in members.values() for row in found]
    if candidates is not None and order != list(range(rows)):  # prompts cut to different lengths, A B A in a group
        return None
    at = torch.cat([labelled[row].nonzero().squeeze(1) + row * length for row in order])
    return SharedRows(
        shape=(rows, length),
        groups=groups,
        packed=pack(groups, by_length=by_length),
        targets=wanted.reshape(-1)[at],
        places=at - at // length - 1,  # rows of T − 1, and the position before
    )
