"""Which candidates make groups, and which groups teach nothing."""

from typing import Any

import pytest

from exo_fast.data.fields import BadField
from exo_fast.data.selection import (
    ALIKE,
    CONTRADICTION,
    DUPLICATES,
    FEW,
    TIE,
    TIES,
    UNLEARNED,
    LeftOut,
    enough,
    faults,
    groups_of,
    verdict,
)

A, B, C = [5, 2], [6, 7, 2], [8, 2]
FAULTS: dict[str, tuple[list[list[int]], list[float], str, tuple[str, ...]]] = {
    "nothing": ([A, B, C], [1.0, 0.5, 0.0], "exo-pref", ()),
    "all alike": ([A, A, A], [1.0, 0.5, 0.0], "exo-rw", (ALIKE,)),
    "a pair of one": ([B, B], [1.0, 0.0], "dpo-pref", (ALIKE,)),
    "the same text, other rewards": ([A, B, A], [1.0, 0.5, 0.0], "exo-rw", (CONTRADICTION,)),
    "sampled twice, scored alike": ([A, B, A], [0.0, 0.5, 0.0], "exo-pref", ()),
    "the best sampled twice": ([A, B, A], [1.0, 0.5, 1.0], "exo-pref", ()),
    "the best sampled twice, and another": ([A, B, A], [1.0, 1.0, 1.0], "exo-pref", (TIE,)),
    "the best, scored twice, and another": ([A, A, B], [1.0, 0.0, 1.0], "exo-pref", (CONTRADICTION, TIE)),
    "the best, scored twice, where all count": ([A, A, B], [1.0, 0.0, 1.0], "exo-rw", (CONTRADICTION,)),
    "another, scored twice, and a tie": ([A, A, B, C], [1.0, 0.0, 2.0, 2.0], "dpo-pref", (CONTRADICTION, TIE)),
    "a tie": ([A, B, C], [8.0, 8.0, 6.0], "dpo-pref", (TIE,)),
    "a tie where all rewards count": ([A, B, C], [8.0, 8.0, 6.0], "exo-rw", ()),
    "a tie of others": ([A, B, C], [8.0, 6.0, 6.0], "exo-pref", ()),
    "a tie in float32": ([A, B, C], [2.0, 2.0 + 1e-9, 0.0], "exo-pref", (TIE,)),
    "other rewards in float64 alone": ([A, B, A], [2.0, 0.0, 2.0 + 1e-9], "exo-rw", ()),
}


@pytest.mark.parametrize(("candidates", "rewards", "loss_type", "expected"), FAULTS.values(), ids=FAULTS.keys())
def test_faults(candidates: Any, rewards: Any, loss_type: str, expected: tuple[str, ...]) -> None:
    assert faults(candidates, rewards, loss_type=loss_type) == expected


def test_a_candidate_of_which_nothing_counts() -> None:
    marks = [[True, True], [False, False, False]]
    assert faults([A, B], [1.0, 0.0], loss_type="exo-rw", learned=marks) == (UNLEARNED,)
    assert faults([A, B], [1.0, 0.0], loss_type="exo-rw", learned=[[True, True], [False, True, True]]) == ()
    assert faults([A], [0.0], loss_type=None, learned=[[False, False]]) == (UNLEARNED,)
    assert faults([A, A], [0.0, 1.0], loss_type=None) == ()


def test_verdicts() -> None:
    for reason in (ALIKE, CONTRADICTION):
        found = [verdict((reason,), choice, "error") for choice in DUPLICATES]
        assert dict(zip(DUPLICATES, found, strict=True)) == {
            "error": ("error", reason),
            "drop": ("drop", reason),
            "keep": ("keep", None),
        }
    found = [verdict((TIE,), "drop", choice) for choice in ("error", "drop", "share")]
    assert found == [("error", TIE), ("drop", TIE), ("keep", None)]
    assert verdict((), "error", "error") == ("keep", None)
    assert verdict((UNLEARNED,), "keep", "share") == ("drop", UNLEARNED)


TWO_FAULTS = {  # duplicates, ties: what becomes of a group with both faults
    ("keep", "error"): ("error", TIE),
    ("keep", "drop"): ("drop", TIE),
    ("keep", "share"): ("keep", None),
    ("drop", "error"): ("error", TIE),
    ("drop", "drop"): ("drop", CONTRADICTION),
    ("drop", "share"): ("drop", CONTRADICTION),
    ("error", "error"): ("error", CONTRADICTION),
    ("error", "drop"): ("error", CONTRADICTION),
    ("error", "share"): ("error", CONTRADICTION),
}


@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("ties", TIES)
def test_no_option_switches_another_off(duplicates: Any, ties: Any) -> None:
    assert verdict((CONTRADICTION, TIE), duplicates, ties) == TWO_FAULTS[duplicates, ties]


def test_the_number_of_candidates_of_a_row() -> None:
    assert enough([A, B, C], 3, None)
    assert enough([A, B, C], 2, 2)
    assert not enough([A], 2, 2)
    for candidates, size, message in (
        ([A], 2, r"field `here`, value \[\[5, 2\]\]: at least 2 candidates are needed, not 1; .* set num_contrastive"),
        ([A, B], 3, "2 candidates where the rows before have 3; .* with 2 each of these rows"),
        ([A, B, C], 2, "3 candidates where the rows before have 2; .* with 2 each of these rows"),
        ([A] * 5000, 5000, "groups of 5000 candidates are too large, at most 4096"),
    ):
        with pytest.raises(BadField, match=message):
            enough(candidates, size, None, field="here")
    with pytest.raises(BadField, match=r"groups of 4097 candidates are too large.* set num_contrastive to a smaller"):
        enough([A], 4097, 4097)


def test_groups_of_a_row() -> None:
    assert groups_of(6, 3, 0) == [[0, 1, 2], [3, 4, 5]]
    assert groups_of(4, 4, 9) == [[0, 1, 2, 3]]
    drawn = [groups_of(8, 3, seed) for seed in range(200)]
    assert groups_of(8, 3, 5) == drawn[5]  # a function of its arguments
    for groups in drawn:
        assert [len(group) for group in groups] == [3, 3]
        flat = [place for group in groups for place in group]
        assert flat == sorted(set(flat))
    # Every candidate is left out as often as any other: 2 of 8.
    left_out = [sum(all(place not in group for group in groups) for groups in drawn) for place in range(8)]
    assert all(25 <= count <= 75 for count in left_out)


def test_what_is_left_out_is_counted_and_named() -> None:
    left_out = LeftOut()
    for row in range(12):
        left_out.add(FEW, f"row {row}")
    left_out.add(TIE, "row 3")
    left_out.add(TIE, "row 3")  # two groups of one row
    assert left_out.total == 14
    few, tie = left_out.lines("train")
    assert few.startswith("train: 12 groups left out: fewer candidates than a group needs (row 0; row 1;")
    assert few.endswith("row 9, …)")
    assert tie.endswith("(row 3, …)")
