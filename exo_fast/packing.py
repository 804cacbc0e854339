"""Groups as packed rows, in which the candidates share their prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from exo_fast.positions import LengthRules, length_class
from exo_fast.validate import INTEGERS, check_devices, check_tensor


@dataclass(frozen=True)
class Group:
    """A prompt and its K candidates, as token ids. `learned`, if given, says of each token of each candidate
    whether it counts; the model only reads the others (a user's or a tool's words between a candidate's turns)."""

    prompt: list[int]
    completions: list[list[int]]
    learned: list[list[bool]] | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "completions"):
            if not hasattr(getattr(self, name), "__len__"):
                raise ValueError(f"Group.{name} must be a list, got {type(getattr(self, name)).__name__}.")
        if len(self.prompt) == 0:
            raise ValueError(
                "Group.prompt is empty: the first token of a completion is predicted from the last prompt "
                "token, so at least one is needed; begin with the tokenizer's BOS or EOS token."
            )
        if len(self.completions) == 0:
            raise ValueError("Group.completions is empty: at least one completion is needed.")
        for k, completion in enumerate(self.completions):
            if not hasattr(completion, "__len__"):
                raise ValueError(f"Group.completions[{k}] must be a list, got {type(completion).__name__}.")
            if len(completion) == 0:
                raise ValueError(f"Group.completions[{k}] is empty: at least one token is needed, such as EOS.")
        if self.learned is not None:
            listed = hasattr(self.learned, "__len__")
            lengths = [len(m) if hasattr(m, "__len__") else None for m in (self.learned if listed else [self.learned])]
            if lengths != [len(completion) for completion in self.completions]:
                raise ValueError(f"Group.learned must have one mark for each token of each completion, got {lengths}.")
            for k, marks in enumerate(self.learned):
                if not any(marks):
                    raise ValueError(f"Group.learned[{k}] marks no token: at least one must count.")

    def some(self, which: Sequence[int]) -> Group:
        """Return a group of these candidates."""
        learned = None if self.learned is None else [self.learned[k] for k in which]
        return Group(self.prompt, [self.completions[k] for k in which], learned)

    def tokens(self) -> int:
        """The number of tokens of the group in a row that shares the prompt."""
        return len(self.prompt) + sum(map(len, self.completions))


@dataclass(frozen=True)
class Packed:
    """A batch of B rows of T tokens, with N completion tokens that count, of S sequences."""

    input_ids: Tensor  # (B, T) long
    position_ids: Tensor  # (B, T) long, 0 on padding
    group_ids: Tensor  # (B, T) int32, -1 on padding
    candidate_ids: Tensor  # (B, T) int32: 0 prompt, 1…K candidates, -1 padding
    source: Tensor  # (N,) long: index into hidden.view(-1, D) of the state that predicts targets[i]
    targets: Tensor  # (N,) long
    cu_seqlens: Tensor  # (S + 1,) int32, sequences in the order of groups and candidates given
    share_prompt: bool


def pack(
    groups: list[Group],
    *,
    share_prompt: bool = True,
    row_length: int | None = None,
    pad_token_id: int = 0,
    by_length: LengthRules = (),
) -> Packed:
    """Lay groups out in rows.

    share_prompt=True: a group is `[prompt][candidate 1]…[candidate K]`, and groups fill rows of at most
    `row_length` tokens by first-fit decreasing. `row_length` defaults to the longest group: a dense mask
    and attention cost T² a row, so longer rows pay only if FlexAttention skips masked pairs.
    share_prompt=False: one right-padded row `[prompt][candidate]` for each sequence. `source`,
    `targets` and `cu_seqlens` keep the input's order. `by_length` (of a `MaskPlan`): candidates to whose lengths the
    model's rotary embedding gives other positions do not share; each run of like ones has the prompt before it.

    Raises ValueError if there is no group, if one does not fit into `row_length`, or if a token id is invalid.
    """
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Group) for group in groups):
        raise ValueError("groups must be a list of Group.")
    for name, number in (("row_length", row_length), ("pad_token_id", pad_token_id)):
        if not (isinstance(number, int) and abs(number) < 2**63) and not (name == "row_length" and number is None):
            raise ValueError(f"{name} must be a whole number of 64 bits, got a {type(number).__name__}.")
    if len(groups) == 0:
        raise ValueError("groups is empty: at least one group is needed.")
    # An unshared batch is the same thing with one candidate a group and one group a row.
    blocks: list[Group] | tuple[Group, ...] = groups
    if not share_prompt:
        blocks = [group.some([k]) for group in groups for k in range(len(group.completions))]
    elif by_length:
        blocks = [block for group in groups for block in _of_like_length(group, by_length)]
    sizes = [block.tokens() for block in blocks]
    longest = max(sizes)
    if row_length is None:
        row_length = longest
    if longest > row_length:
        what = "group" if share_prompt else "sequence"
        raise ValueError(
            f"{what} {sizes.index(longest)} has {longest} tokens, more than row_length={row_length}. "
            f"Set row_length to at least {longest}, or cut the {what}."
        )
    if share_prompt:
        block_row, block_start = _first_fit_decreasing(sizes, row_length)
    else:
        block_row, block_start = list(range(len(blocks))), [0] * len(blocks)
    shape = (max(block_row) + 1, max(start + size for start, size in zip(block_start, sizes, strict=True)))

    # Segments are the prompts and completions in input order; every tensor below is filled by whole segments.
    segments = [segment for block in blocks for segment in (block.prompt, *block.completions)]
    lengths = torch.tensor([len(segment) for segment in segments])
    num_segments = torch.tensor([1 + len(block.completions) for block in blocks])
    block_of = torch.repeat_interleave(torch.arange(len(blocks)), num_segments)  # (segments,)
    candidate = torch.arange(len(segments)) - _starts(num_segments)[block_of]
    prompt_length = lengths[_starts(num_segments)][block_of]
    # (blocks,) start of each when the rows are laid end to end
    block_at = torch.tensor(block_row) * shape[1] + torch.tensor(block_start)
    segment_at = block_at[block_of] + _starts(lengths) - _starts(torch.tensor(sizes))[block_of]

    segment_of = torch.repeat_interleave(torch.arange(len(segments)), lengths)  # (tokens,)
    within = torch.arange(len(segment_of)) - _starts(lengths)[segment_of]
    at = segment_at[segment_of] + within
    tokens = _as_ids(list(chain.from_iterable(segments)))
    in_completion = candidate[segment_of] > 0
    counts = in_completion
    if any(block.learned is not None for block in blocks):
        counts = torch.tensor([mark for block in blocks for mark in _marks(block)])

    def rows(values: Tensor, fill: int, dtype: torch.dtype) -> Tensor:
        flat = torch.full((shape[0] * shape[1],), fill, dtype=dtype)
        flat[at] = values.to(dtype)
        return flat.view(shape)

    last_prompt_at = (block_at[block_of] + prompt_length - 1)[segment_of]
    return Packed(
        input_ids=rows(tokens, pad_token_id, torch.long),
        position_ids=rows(within + in_completion * prompt_length[segment_of], 0, torch.long),
        group_ids=rows(block_of[segment_of], -1, torch.int32),
        candidate_ids=rows(candidate[segment_of], -1, torch.int32),
        source=torch.where(within == 0, last_prompt_at, at - 1)[counts],
        targets=tokens[counts],
        cu_seqlens=_boundaries(torch.bincount(segment_of[counts], minlength=len(segments))[candidate > 0]),
        share_prompt=share_prompt,
    )


def in_one_row(packed: Packed, multiple: int) -> Packed:
    """Return the rows laid end to end as one, (1, B·T) padded to at least two times `multiple` and to one of it.
    `source` counts through the rows anyway, and stays."""
    count = packed.input_ids.numel()
    more = max(2 * multiple, -(-count // multiple) * multiple) - count
    fill = {"input_ids": 0, "position_ids": 0, "group_ids": -1, "candidate_ids": -1}
    row: dict[str, Any] = {
        name: torch.nn.functional.pad(getattr(packed, name).reshape(1, -1), (0, more), value=value)
        for name, value in fill.items()
    }
    return replace(packed, **row)


def _marks(group: Group) -> Iterator[bool]:
    """Yield for each token of the prompt (always False) and of the candidates whether it counts."""
    yield from [False] * len(group.prompt)
    if group.learned is None:
        yield from [True] * (group.tokens() - len(group.prompt))
    else:
        yield from (bool(mark) for marks in group.learned for mark in marks)


def _of_like_length(group: Group, rules: LengthRules) -> list[Group]:
    """Return the group in runs of candidates that can share the prompt."""
    classes = [length_class(rules, len(group.prompt) + len(ids)) for ids in group.completions]
    runs = groupby(range(len(classes)), key=classes.__getitem__)
    return [group.some(list(run)) for _, run in runs]


def _as_ids(tokens: list[int]) -> Tensor:
    """Return (tokens,) long. Raises ValueError for an invalid token id."""
    try:
        ids = torch.tensor(tokens)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"groups: token ids must be whole numbers of 64 bits; {error}.") from error
    if ids.dtype not in INTEGERS or ids.dim() != 1 or bool((ids < 0).any()):
        raise ValueError("groups: token ids must be whole numbers of at least 0, in flat lists.")
    return ids.long()


def _first_fit_decreasing(sizes: list[int], row_length: int) -> tuple[list[int], list[int]]:
    """Return row and start column of each block: longest blocks first, each into the first row with room for it."""
    row, start = [0] * len(sizes), [0] * len(sizes)
    smallest = min(sizes)
    used: list[int] = []
    open_rows: list[int] = []  # with room for the smallest block, so that full rows are not searched again
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fit = next((r for r in open_rows if used[r] + sizes[i] <= row_length), len(used))
        if fit == len(used):
            used.append(0)
            open_rows.append(fit)
        row[i], start[i] = fit, used[fit]
        used[fit] += sizes[i]
        if used[fit] + smallest > row_length:
            open_rows.remove(fit)
    return row, start


def _starts(counts: Tensor) -> Tensor:
    """Return where each of (n,) counts begins when laid end to end: (n,)."""
    return counts.cumsum(0) - counts


def _boundaries(counts: Tensor) -> Tensor:
    """Return the (n + 1,) int32 boundaries of (n,) counts, the form of `cu_seqlens`."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def from_padded(
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor,  # (B, T), 1 on tokens, padding on one side or both
    prompt_lens: Tensor,  # (B,) prompt tokens in each row, padding not counted
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `source` (N,), `targets` (N,) and `cu_seqlens` (B + 1,) int32 of an ordinary batch, one sequence a row.

    Put the K candidates of a group in K rows one after another; `hidden.view(-1, D)[source]` then goes to
    the losses.

    Raises ValueError on dtypes, devices and shapes that do not fit, a mask with a hole, and a row without a prompt
    or completion token.
    """
    for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask), ("prompt_lens", prompt_lens)):
        check_tensor(name, value)
        if value.dtype not in INTEGERS and (name != "attention_mask" or value.is_complex()):
            raise ValueError(f"{name} must be int64 or int32 (attention_mask also bool or float), got {value.dtype}.")
    check_devices("input_ids", input_ids.device, attention_mask=attention_mask)
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids and attention_mask must be (B, T) of one shape, each at least 1; got {tuple(input_ids.shape)} "
            f"and {tuple(attention_mask.shape)}."
        )
    if prompt_lens.shape != input_ids.shape[:1]:
        raise ValueError(
            f"prompt_lens must be ({len(input_ids)},), one for each row of input_ids; got {tuple(prompt_lens.shape)}."
        )
    mask = attention_mask.bool()
    lengths = mask.sum(1)
    prompt_lens = prompt_lens.to(lengths.device)
    holes = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0] > 1
    if holes.any():
        raise ValueError(
            f"attention_mask row {int(holes.nonzero()[0])} has a hole: tokens must be one run, padded at the ends."
        )
    bad = (prompt_lens < 1) | (prompt_lens >= lengths)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"attention_mask row {row} has {int(lengths[row])} tokens and prompt_lens[{row}]={int(prompt_lens[row])}: "
            "at least one prompt token and one completion token are needed."
        )
    in_completion = mask & (mask.cumsum(1) > prompt_lens[:, None])
    at = in_completion.reshape(-1).nonzero().squeeze(1)
    return at - 1, input_ids.reshape(-1)[at], _boundaries(lengths - prompt_lens)
