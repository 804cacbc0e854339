"""Rows of a data set as groups: what is left out, what is an error, and how both are named."""

from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from exo_fast.integrations.candidates import CandidateRows

ROW = {"prompt": "the film ", "completions": ["was good", "was bad", "was long"], "rewards": [1.0, 0.0, 0.5]}


def prepared(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], **options: Any) -> Dataset:
    how = {"loss_type": "exo-pref", **options}
    names = list(dict.fromkeys(name for row in rows for name in row))
    data = Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    return CandidateRows(tokenizer, "train", **how).prepared(data)


def test_a_tie_beside_a_contradiction(tokenizer: PreTrainedTokenizerFast) -> None:
    """What one option keeps, the other still judges."""
    rows = [ROW, {**ROW, "completions": ["was good", "was good", "was bad"], "rewards": [1.0, 0.0, 1.0]}]
    with pytest.raises(ValueError, match=r"row 1: field `rewards`.*different candidates share the highest reward"):
        prepared(tokenizer, rows, duplicates="keep")
    assert len(prepared(tokenizer, rows, duplicates="keep", ties="drop")) == 1
    assert len(prepared(tokenizer, rows, duplicates="keep", ties="share")) == 2
    assert len(prepared(tokenizer, rows, ties="share")) == 1


def test_a_fault_in_the_first_row_has_its_place(tokenizer: PreTrainedTokenizerFast) -> None:
    """Also where the row is looked at before all others, for how many candidates a group has."""
    row = {"conversations": [{"from": "nobody", "value": "hello"}], "chosen": "good", "rejected": "bad"}
    with pytest.raises(ValueError, match=r"^train dataset, row 0: field `conversations\[0\]`.*`from` must be one of"):
        prepared(tokenizer, [row])
    with pytest.raises(ValueError, match=r"^train dataset, row 0: field `rewards`.*Rows have: prompt, completions"):
        prepared(tokenizer, [{"prompt": "the", "completions": ["good", "bad"]}])


def test_no_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"^train dataset: no rows; at least one is needed"):
        prepared(tokenizer, [])


def test_the_number_of_candidates(tokenizer: PreTrainedTokenizerFast) -> None:
    pair = {"prompt": "the ", "chosen": "good", "rejected": "bad"}
    with pytest.raises(ValueError, match=r"row 1: field `completions`, value \['good', 'bad'\]: 2 candidates where"):
        prepared(tokenizer, [ROW, pair])
    one = {"prompt": "the ", "completions": ["good"], "rewards": [1.0]}
    with pytest.raises(
        ValueError, match=r"row 0: .*at least 2 candidates are needed, not 1; .* or set num_contrastive"
    ):
        prepared(tokenizer, [one, ROW])
    assert len(prepared(tokenizer, [one, ROW], num_contrastive=3)) == 1
    many = {"prompt": "the ", "completions": ["good"] * 5000, "rewards": list(range(5000))}
    with pytest.raises(ValueError, match=r"row 0: .*groups of 5000 candidates are too large, at most 4096"):
        prepared(tokenizer, [many], duplicates="keep")
