"""The choice of candidates for groups of K, and of groups that are left out, with the reason.

Real rows tie, repeat themselves and differ in how many candidates they have. Such rows may neither stop a run nor be
learned silently: left-out groups are counted by reason, with the first rows of each.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from exo_fast.data.fields import BadField

Duplicates = Literal["error", "drop", "keep"]
Ties = Literal["error", "drop", "share"]
Fate = Literal["keep", "drop", "error"]  # the strictest last
DUPLICATES, TIES, FATES = get_args(Duplicates), get_args(Ties), get_args(Fate)
SHOWN = 10  # rows of each reason
MAX_CANDIDATES = 4096  # of a group, one row of a batch

ALIKE = "all candidates of the group are the same tokens, so there is nothing to learn"
CONTRADICTION = "two candidates are the same tokens and have different rewards"
EQUAL = "the rewards of all candidates are equal, so none is preferred"
TIE = "different candidates share the highest reward, so none is preferred"
FEW = "fewer candidates than a group needs"
UNLEARNED = "none of a candidate's tokens count within the longest completion"
FIX = {  # the fix instead of leaving a group out, by reason
    ALIKE: "duplicates=drop leaves such groups out, duplicates=keep takes them as they are",
    CONTRADICTION: "duplicates=drop leaves such groups out, duplicates=keep takes them as they are",
    TIE: "ties=drop leaves such groups out, ties=share gives the best ones equal shares of the target, and a *-rw loss "
    "weighs all candidates by their rewards",
}


def need_two(candidates: Sequence[Any], fix: str, *, field: str = "completions") -> None:
    """Raise BadField for fewer than two candidates."""
    if (count := len(candidates)) < 2:
        raise BadField(field, candidates, f"at least 2 candidates are needed, not {count}; {fix}.")


def enough(candidates: Sequence[Any], size: int, num_contrastive: int | None, *, field: str = "completions") -> bool:
    """Return whether a row has candidates for groups of `size`: `num_contrastive`, or if that is None the number of
    candidates in the rows before. `field` names the row's field that holds them. Raises BadField for a number that no
    group can have."""
    count = len(candidates)
    if num_contrastive is None:
        need_two(candidates, "remove the row, or set num_contrastive, which leaves such rows out", field=field)
    if num_contrastive is None and count != size:
        raise BadField(
            field,
            candidates,
            f"{count} candidates where the rows before have {size}; give every prompt the same, or set "
            f"num_contrastive: with {min(count, size)} each of these rows gives groups of so many of its candidates.",
        )
    if size > MAX_CANDIDATES:
        raise BadField(
            field,
            candidates,
            f"groups of {size} candidates are too large, at most {MAX_CANDIDATES} can be compared at once; set "
            "num_contrastive to a smaller number.",
        )
    return count >= size


def groups_of(count: int, size: int, seed: Any) -> list[list[int]]:
    """Return the candidates of each group of `size`, from a row that has `count`: consecutive ones if `size` divides
    `count`, else `count // size` groups drawn by `seed` without repetition, in the row's order."""
    places = list(range(count))
    if count % size:
        places = sorted(random.Random(repr(seed)).sample(places, count - count % size))
    return [places[start : start + size] for start in range(0, len(places), size)]


def faults(
    candidates: Sequence[Sequence[int]],
    rewards: Sequence[float],
    *,
    loss_type: str | None,
    learned: Sequence[Sequence[bool]] | None = None,
) -> tuple[str, ...]:
    """Return all reasons why a group, as token ids after all cutting, teaches nothing or the wrong thing.

    Candidates with the same tokens and the same reward, beside others, are no fault: a candidate sampled twice counts
    twice, as the best too. Nothing is compared without a `loss_type`, if a candidate has no token that counts, or if
    all candidates are the same tokens.
    """
    if learned is not None and not all(map(any, learned)):
        return (UNLEARNED,)
    if loss_type is None:
        return ()
    texts = [tuple(ids) for ids in candidates]
    used = [float(np.float32(reward)) for reward in rewards]  # as the loss computes with them
    by_text: dict[tuple[int, ...], set[float]] = {}
    for ids, reward in zip(texts, used, strict=True):
        by_text.setdefault(ids, set()).add(reward)
    if len(by_text) == 1:
        return (ALIKE,)
    contradiction = any(len(found) > 1 for found in by_text.values())
    tie = loss_type.endswith("-pref") and sum(max(used) in found for found in by_text.values()) > 1
    return (CONTRADICTION,) * contradiction + (TIE,) * tie


def verdict(reasons: Sequence[str], duplicates: Duplicates, ties: Ties) -> tuple[Fate, str | None]:
    """Return the fate of a group with these faults, and the deciding fault: each option rules on its own faults, and
    the strictest wins, an error before leaving out."""
    fates: list[tuple[Fate, str | None]] = [("keep", None)]
    for reason in reasons:
        if reason == TIE:
            fates.append(("keep" if ties == "share" else ties, reason))
        else:
            fates.append((duplicates if reason in (ALIKE, CONTRADICTION) else "drop", reason))
    return max(fates, key=lambda found: FATES.index(found[0]))


@dataclass
class LeftOut:
    """The groups left out of a data set: their number by reason, and the places of the first."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: Any) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        shown = self.places.setdefault(reason, [])
        if len(shown) < SHOWN and (not shown or shown[-1] != str(place)):
            shown.append(str(place))

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def lines(self, what: str) -> list[str]:
        """Return a line for each reason, for the terminal and a report."""
        return [
            f"{what}: {count:,} group{'s' * (count > 1)} left out: {reason} ({_listed(self.places[reason], count)})"
            for reason, count in self.counts.items()
        ]


def left_out_lines(splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of each split of a summary, whose counts have `left_out` and `left_out_rows`."""
    return [
        line
        for name, counts in splits.items()
        if counts.get("left_out")
        for line in LeftOut(counts["left_out"], counts["left_out_rows"]).lines(name)
    ]


def _listed(places: list[str], count: int) -> str:
    return "; ".join(places) + (", …" if count > len(places) else "")
