"""Rows of a data set as groups: rows left out, errors, and the names of both."""

from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from exo_fast.data.tokens import RowTokenizer
from exo_fast.integrations.trl.candidates import CandidateRows, tokenize_candidates

ROW = {"prompt": "the film ", "completions": ["was good", "was bad", "was long"], "rewards": [1.0, 0.0, 0.5]}


def data_of(rows: list[dict[str, Any]]) -> Dataset:
    """Return a data set with nulls for the fields that a row lacks."""
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def prepared(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], **options: Any) -> Dataset:
    how = {"loss_type": "exo-pref", **options}
    return CandidateRows(tokenizer, "train", **how).prepared(data_of(rows))


def test_a_tie_beside_a_contradiction(tokenizer: PreTrainedTokenizerFast) -> None:
    """A group that one option keeps is still judged by the other."""
    rows = [ROW, {**ROW, "completions": ["was good", "was good", "was bad"], "rewards": [1.0, 0.0, 1.0]}]
    with pytest.raises(ValueError, match=r"row 1: field `rewards`.*different candidates share the highest reward"):
        prepared(tokenizer, rows, duplicates="keep")
    assert len(prepared(tokenizer, rows, duplicates="keep", ties="drop")) == 1
    assert len(prepared(tokenizer, rows, duplicates="keep", ties="share")) == 2
    assert len(prepared(tokenizer, rows, ties="share")) == 1


def test_a_fault_in_the_first_row_has_its_place(tokenizer: PreTrainedTokenizerFast) -> None:
    """The same when the row is read before all others, for the number of candidates of a group."""
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


PAIR = {"prompt": "the film ", "chosen": "was good", "rejected": "was bad"}
SCORED = {**PAIR, "score_chosen": 8.5, "score_rejected": 4}


def test_pairs_have_their_scores_for_rewards(tokenizer: PreTrainedTokenizerFast) -> None:
    """A loss that weighs by rewards takes the scores; one that prefers the better answer needs no scores."""
    assert prepared(tokenizer, [SCORED] * 2, loss_type="dpo-rw")["rewards"] == [[8.5, 4.0]] * 2
    for loss_type, row in (("dpo-pref", SCORED), ("exo-rw", PAIR), ("exo-rw", {**PAIR, "score_chosen": 8.5})):
        assert prepared(tokenizer, [row], loss_type=loss_type)["rewards"] == [[1.0, 0.0]]


@pytest.mark.parametrize("loss_type", ["dpo-rw", "exo-rw"])
def test_rewards_of_two_scales_are_refused(tokenizer: PreTrainedTokenizerFast, loss_type: str) -> None:
    """Some pairs with scores and some without, which would be 1 and 0; a null is no score."""
    half = {**SCORED, "score_rejected": None}
    two = {"prompt": "the ", "completions": ["good", "bad"], "rewards": [3.0, 0.0]}
    for rows in ([SCORED, PAIR], [PAIR, SCORED], [SCORED, half], [two, PAIR, two, SCORED]):
        place = len(rows) - 1
        with pytest.raises(ValueError, match=rf"row {place}: field `score_chosen`.*give all of them scores, or none"):
            prepared(tokenizer, rows, loss_type=loss_type)
        groups = CandidateRows(tokenizer, "train", loss_type).prepared(data_of(rows).to_iterable_dataset())
        with pytest.raises(ValueError, match=rf"row {place}: .*give all of them scores, or none"):
            list(groups)
    assert len(prepared(tokenizer, [two, SCORED], loss_type=loss_type)) == 2  # rewards are of the data's own scale
    assert len(prepared(tokenizer, [SCORED, PAIR], loss_type="dpo-pref")) == 2


def test_several_processes_know_the_first_pair(tokenizer: PreTrainedTokenizerFast) -> None:
    """Each of them sees pairs of one kind alone."""
    two = {"prompt": "the ", "completions": ["good", "bad"], "rewards": [3.0, 0.0]}
    with pytest.raises(ValueError, match=r"row 3: .*give all of them scores, or none"):
        CandidateRows(tokenizer, "train", "exo-rw").prepared(data_of([two, PAIR, two, SCORED]), num_proc=2)


def tokenized(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> Dataset:
    return data_of(rows).map(tokenize_candidates, fn_kwargs={"processing_class": tokenizer})


RULES: dict[str, tuple[dict[str, Any], dict[str, Any], int | str]] = {  # what is left of ROW and another, or the error
    "a tie": ({"rewards": [1.0, 1.0, 0.0]}, {}, "row 1: field `rewards`, .*different candidates share the highest"),
    "a tie left out": ({"rewards": [1.0, 1.0, 0.0]}, {"ties": "drop"}, 1),
    "a tie shared": ({"rewards": [1.0, 1.0, 0.0]}, {"ties": "share"}, 2),
    "duplicates": ({"completions": ["was good"] * 3}, {}, 1),
    "duplicates refused": ({"completions": ["was good"] * 3}, {"duplicates": "error"}, "row 1: field `candidate_ids`"),
    "a long prompt": ({"prompt": "the film was very very long and "}, {"max_length": 9}, 1),
    "few": ({"completions": ["was good", "was bad"], "rewards": [1.0, 0.0]}, {"num_contrastive": 3}, 1),
    "another number": ({"completions": ["was good", "was bad"], "rewards": [1.0, 0.0]}, {}, "2 candidates where"),
}


@pytest.mark.parametrize("name", RULES)
def test_rows_of_token_ids_are_judged_as_text_is(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    change, options, expected = RULES[name]
    text, how = [ROW, {**ROW, **change}], {"loss_type": "exo-pref", **options}
    for data in (data_of(text), tokenized(tokenizer, text), tokenized(tokenizer, text).select_columns(COLUMNS)):
        rows = CandidateRows(tokenizer, "train", **how)
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                rows.prepared(data)
            continue
        groups = rows.prepared(data)
        assert sorted(groups.column_names) == sorted(COLUMNS)
        assert groups.to_list() == prepared(tokenizer, text, **options).to_list()
        assert len(groups) == expected
        assert CandidateRows(tokenizer, "train", **how).prepared(groups).to_list() == groups.to_list()


COLUMNS = ["prompt_ids", "candidate_ids", "candidate_masks", "rewards"]
IDS = {"prompt_ids": [1, 4], "candidate_ids": [[7, 2], [8, 2], [9]], "rewards": [1, 0, 0.5]}
REFS = {"ref_chosen_logps": -1.0, "ref_rejected_logps": [-2.0, -3.0]}


def test_reference_log_probs_go_with_their_candidates(tokenizer: PreTrainedTokenizerFast) -> None:
    (group,) = prepared(tokenizer, [{**IDS, **REFS}]).to_list()
    marks = [[True, True], [True, True], [True]]
    assert group == {**IDS, "candidate_masks": marks, "rewards": [1.0, 0.0, 0.5], **REFS}
    four = {"candidate_ids": [[7, 2], [8, 2], [9, 2], [10, 2]], "rewards": [1, 0, 0.5, 2]}
    row = {**IDS, **four, "ref_chosen_logps": -1.0, "ref_rejected_logps": [-2.0, -3.0, -4.0]}
    halves = prepared(tokenizer, [row], num_contrastive=2)
    assert halves["candidate_ids"] == [four["candidate_ids"][:2], four["candidate_ids"][2:]]
    assert (halves["ref_chosen_logps"], halves["ref_rejected_logps"]) == ([-1.0, -3.0], [[-2.0], [-4.0]])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt_ids": []}, r"field `prompt_ids`, value \[\]: a list of token ids is needed, one at least"),
    "no such column": ({"prompt_ids": None}, "field `prompt_ids`, value None: a list of token ids is needed"),
    "no lists": ({"candidate_ids": [7, 8]}, r"field `candidate_ids`, value \[7, 8\]: a list of token ids for each"),
    "an empty one": ({"candidate_ids": [[7], [], [9]]}, r"field `candidate_ids\[1\]`, value \[\]: a list of token"),
    "a negative id": ({"candidate_ids": [[7], [-1], [9]]}, r"field `candidate_ids\[1\]`, value \[-1\]"),
    "few marks": (
        {"candidate_masks": [[True], [True, True], [True]]},
        "field `candidate_masks`.* a mark for each token",
    ),
    "few rewards": ({"rewards": [1.0]}, "field `rewards`.*one number per completion is needed: 3, not 1 numbers"),
    "few log-probs": (
        {**REFS, "ref_rejected_logps": [-1.0]},
        "field `ref_rejected_logps`.*for each candidate is needed",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_token_columns_are_named(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(ValueError, match=f"train dataset, row 0: {message}"):
        prepared(tokenizer, [{**IDS, **change}])


def test_one_tokenizer_for_all_rows_and_scores_for_rewards(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = RowTokenizer(tokenizer)
    for row in (ROW, PAIR, SCORED):
        assert tokenize_candidates(row, rows) == tokenize_candidates(row, tokenizer)
    assert tokenize_candidates(SCORED, rows)["rewards"] == [1.0, 0.0]
    assert tokenize_candidates(SCORED, rows, scored_pairs=True)["rewards"] == [8.5, 4.0]
    assert tokenize_candidates(PAIR, rows, scored_pairs=True)["rewards"] == [1.0, 0.0]


def test_what_max_length_leaves_nothing_of(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """A prompt that fills it alone, and a candidate whose words that count come after it."""
    logging.enable_propagation()
    long = {**ROW, "prompt": "the film was very very long and "}  # 15 tokens with <s> and spaces; ROW's prompt has 5
    late = {
        **ROW,
        "completions": ["was good", "was bad", "was very long"],
        "completion_spans": [[[0, 8]], [[0, 7]], [[9, 13]]],
    }
    rows = [ROW, long, late]
    assert len(prepared(tokenizer, rows, max_length=8)) == 1
    assert "train dataset: 1 group left out: the prompt alone fills max_length=8; raise it, or shorten" in caplog.text
    assert "train dataset: 1 group left out: none of a candidate's tokens count" in caplog.text
    assert len(prepared(tokenizer, rows, max_length=10)) == 2
    with pytest.raises(ValueError, match=r"no group is left to learn from: .*prompt alone fills max_length=15.*row 0"):
        prepared(tokenizer, [long], max_length=15)
    # The cut at the other end takes only the prompt's tokens.
    assert len(prepared(tokenizer, rows, max_length=8, truncation_mode="keep_end")) == 3
