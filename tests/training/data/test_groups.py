"""Token ids: joined, cut, grouped and batched."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from exo_fast.data.examples import Example
from exo_fast.data.selection import ALIKE, CONTRADICTION, TIE, UNLEARNED
from exo_fast.layout import pack
from exo_fast.training.data.groups import GroupCollator, GroupDataset, SftCollator, tokenize
from exo_fast.training.data.places import Place
from exo_fast.training.errors import InputError

BOS, EOS = 1, 2
WORDS = ("the", "film", "was", "good", "bad", "long", "plot", "and", "but", "very", "fine", "dull", "great")
Ids = Callable[[str], list[int]]


@pytest.fixture
def ids(bare_tokenizer: PreTrainedTokenizerFast) -> Ids:
    return lambda text: bare_tokenizer(text)["input_ids"]


@pytest.fixture
def run(tokenizer: PreTrainedTokenizerFast) -> Callable[..., GroupDataset]:
    defaults = {"tokenizer": tokenizer, "num_contrastive": None, "max_seq_len": 64, "max_gen_len": 16}
    return lambda examples, **options: tokenize(examples, **{**defaults, **options}, progress=False)


def example(prompt: str, *completions: str) -> Example:
    return Example(Place("f.json", 0, 1), prompt, list(completions), [float(k) for k in range(len(completions))])


def test_ids_are_joined_with_bos_before_the_prompt_and_eos_after_each_completion(
    run: Any, ids: Ids, bare_tokenizer: PreTrainedTokenizerFast
) -> None:
    group = run([example("the film", " was good", " was bad")]).group(0)
    assert group.prompt == [BOS, *ids("the film")]
    assert group.completions == [[*ids(" was good"), EOS], [*ids(" was bad"), EOS]]
    # A tokenizer that adds nothing to a text adds nothing here.
    assert run([example("the film", "a", "b")], tokenizer=bare_tokenizer).group(0).prompt == ids("the film")


def test_special_tokens_in_the_text_are_not_doubled(run: Any, ids: Ids) -> None:
    group = run([example("<s>the", "good</s>", "bad")]).group(0)
    assert group.prompt == [BOS, *ids("the")]
    assert group.completions[0] == [*ids("good"), EOS]


def test_completions_are_cut_on_the_right_and_prompts_on_the_left_per_group(run: Any, ids: Ids) -> None:
    prompt, long, short = " ".join(WORDS), " ".join(WORDS[::-1]), "good"
    data = run([example(prompt, long, short, short, short)], num_contrastive=2, max_seq_len=20, max_gen_len=8)
    first, second = data.group(0), data.group(1)
    assert first.completions == [ids(long)[:8], [*ids(short), EOS]]  # cut: no EOS
    # Room is what the group's longest completion leaves; BOS stays.
    assert first.prompt == [BOS, *ids(prompt)[-(20 - 8 - 1) :]]
    assert second.prompt == [BOS, *ids(prompt)[-(20 - 2 - 1) :]]
    assert (data.counts.cut_prompts, data.counts.cut_completions, data.counts.longest_sequence) == (2, 1, 20)
    assert data.counts.longest_group == 12 + 8 + 2


def test_candidates_are_cut_into_consecutive_groups_as_in_the_original(run: Any, ids: Ids) -> None:
    rows = [example("the", *(f"{w} film" for w in WORDS[:6])), example("was", *(f"{w} plot" for w in WORDS[:3]))]
    data = run(rows, num_contrastive=3)
    assert len(data) == 3
    assert [data.group(i).completions[0][0] for i in range(3)] == [ids(WORDS[0])[0], ids(WORDS[3])[0], ids(WORDS[0])[0]]
    assert data.rewards.tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert data.counts.shared_tokens == sum(data.lengths())
    assert data.counts.unshared_tokens == sum(
        len(data.group(i).prompt) + len(c) for i in range(3) for c in data.group(i).completions
    )


def test_tokenizing_in_chunks_changes_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [example(word, "good", "bad") for word in WORDS]
    whole = run(rows)
    monkeypatch.setattr("exo_fast.training.data.groups.EXAMPLES_PER_CALL", 3)
    assert [run(rows).group(i) for i in range(len(rows))] == [whole.group(i) for i in range(len(rows))]


def test_what_cannot_be_tokenized(run: Any, bare_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"f\.json, line 1 \(row 0\), field `prompt`, value '': no tokens"):
        run([example("", "a", "b")], tokenizer=bare_tokenizer)
    assert run([example("", "a", "b")]).group(0).prompt == [BOS]
    without_eos = deepcopy(bare_tokenizer)
    without_eos.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        run([example("a", "b", "c")], tokenizer=without_eos)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_collator(run: Any, share_prompt: bool) -> None:
    data = run([example("the film was", "good", "very bad"), example("the", "fine", "dull")])
    data.ref_logps = torch.tensor([[-1.5, -2.5], [-3.5, -4.5]])
    batch = GroupCollator(pad_token_id=EOS, share_prompt=share_prompt)([data[1], data[0]])
    packed = pack([data.group(1), data.group(0)], share_prompt=share_prompt, pad_token_id=EOS)
    assert torch.equal(batch["input_ids"], packed.input_ids)
    assert torch.equal(torch.from_numpy(batch["cu_seqlens"]), packed.cu_seqlens)
    assert batch["ref_logps"].tolist() == [[-3.5, -4.5], [-1.5, -2.5]]
    assert batch["index"].tolist() == [1, 0]
    assert batch["num_tokens"] == (packed.group_ids >= 0).sum()


def test_ids_that_were_drawn_are_used_as_they_are(run: Any, ids: Ids) -> None:
    # "good</s>" was ended by the model, "very bad" by the limit: no EOS was drawn.
    drawn = [[*ids("good"), EOS], ids("very bad"), [EOS]]
    row = Example(Place("f.json", 0, 1), "the film", ["good", "very bad", ""], [0.0, 1.0, 2.0], drawn)
    data = run([example("was", "a", "b", "c"), row, example("and", "a", "b", "c")])
    assert data.group(1).completions == drawn
    assert data.group(1).prompt == [BOS, *ids("the film")]
    assert data.group(2).completions == [[*ids(text), EOS] for text in "abc"]
    assert drawn[1][-1] != EOS  # and the caller's lists stay as they are
    assert run([row], max_gen_len=2).group(0).completions == [drawn[0], drawn[1][:2], [EOS]]
    assert run([row], num_contrastive=1).group(1).completions == [drawn[1]]


def test_prompts_of_drawn_completions_are_cut_as_they_were_for_sampling(run: Any, ids: Ids) -> None:
    """Prompts are cut to max_seq_len - max_gen_len tokens, however short the completions turned out."""
    prompt = "the film was good but very very long"
    row = Example(Place("f.json", 0, 1), prompt, ["fine", "dull"], [0.0, 1.0], [[*ids("fine"), EOS], ids("dull")])
    cut = run([row], max_seq_len=14, max_gen_len=8).group(0).prompt
    assert cut == [BOS, *ids(prompt)[-5:]]
    assert (
        run([example(prompt, "fine", "dull")], max_seq_len=14, max_gen_len=8).group(0).prompt[1:] == ids(prompt)[-11:]
    )


@pytest.mark.parametrize("wrong", [[5, EOS], [10**6]])
def test_ids_of_another_tokenizer(wrong: list[int], run: Any) -> None:
    row = Example(Place("f.json", 0, 1), "the", ["good"], [0.0], [wrong])
    with pytest.raises(InputError, match=r"f\.json, line 1 \(row 0\), field `completion_ids\[0\]`.*another model"):
        run([row])


def test_one_completion_and_the_weights_of_its_tokens(run: Any, ids: Ids) -> None:
    data = run([example("the film", "was good"), example("the", "bad")])
    assert [data.group(i).completions for i in range(2)] == [[[*ids("was good"), EOS]], [[*ids("bad"), EOS]]]
    assert data.rewards.tolist() == [[0.0], [0.0]]
    batch = SftCollator(pad_token_id=EOS)([data[0], data[1]])
    assert batch["weights"].tolist() == [4.0, 2.0]
    assert batch["weights"].dtype == torch.float32
    assert torch.equal(batch["weights"].diff(), torch.from_numpy(batch["cu_seqlens"]).diff().float().diff())
    assert GroupCollator(pad_token_id=EOS)([data[0], data[1]])["weights"].tolist() == [1.0, 1.0]


SAME = ["good", "bad", "good"]


def test_groups_that_teach_nothing_are_left_out_and_named(run: Any) -> None:
    long = "very " * 10
    rows = [
        example("the", "good", "bad"),
        Example(Place("f.json", 1, 2), "film", ["good", "good"], [1.0, 0.0]),
        Example(Place("f.json", 2, 3), "was", [long + "good", long + "bad"], [1.0, 0.0]),  # cut before they differ
        Example(Place("f.json", 3, 4), "and", ["good", "bad"], [1.0, 1.0]),
    ]
    data = run(rows, loss_type="exo-rw", max_gen_len=8)
    assert len(data) == 2
    assert data.counts.left_out == {ALIKE: 2}
    assert data.counts.left_out_rows == {ALIKE: ["f.json, line 2 (row 1)", "f.json, line 3 (row 2)"]}
    assert len(run(rows, loss_type="exo-rw", max_gen_len=8, duplicates="keep")) == 4
    assert len(run(rows, max_gen_len=8)) == 4  # nothing is judged where nothing is compared
    with pytest.raises(InputError) as error:
        run(rows, loss_type="exo-rw", max_gen_len=8, duplicates="error")
    assert "2 groups cannot be learned from" in str(error.value)
    assert f"f.json, line 3 (row 2), candidates 0, 1: {ALIKE}. duplicates=drop leaves such" in str(error.value)
    with pytest.raises(InputError, match=r"no group is left to learn from:\n  f\.json: 2 groups left out"):
        run(rows[1:3], loss_type="exo-rw", max_gen_len=8)


def test_the_same_text_with_other_rewards(run: Any) -> None:
    contradicting = Example(Place("f.json", 0, 1), "the", SAME, [1.0, 0.5, 0.0])
    agreeing = Example(Place("f.json", 1, 2), "the", SAME, [1.0, 0.5, 1.0])
    data = run([contradicting, agreeing], loss_type="exo-rw")
    assert (len(data), data.counts.left_out) == (1, {CONTRADICTION: 1})
    assert data.rewards.tolist() == [[1.0, 0.5, 1.0]]


def test_ties_for_the_best(run: Any) -> None:
    tied = Example(Place("f.json", 0, 1), "the", ["good", "bad", "long", "plot"], [8.0, 8.0, 7.0, 6.0])
    other = Example(Place("f.json", 1, 2), "the", ["good", "bad", "long", "plot"], [8.0, 7.0, 7.0, 6.0])
    with pytest.raises(
        InputError, match=r"f\.json, line 1 \(row 0\), candidates 0, 1, 2, 3: different candidates share"
    ):
        run([tied, other], loss_type="exo-pref")
    dropped = run([tied, other], loss_type="dpo-pref", ties="drop")
    assert (dropped.rewards.tolist(), dropped.counts.left_out) == ([[8.0, 7.0, 7.0, 6.0]], {TIE: 1})
    assert len(run([tied, other], loss_type="exo-pref", ties="share")) == 2
    assert len(run([tied, other], loss_type="exo-rw")) == 2
    # In groups of two one tie is left, and one is gone.
    pairs = run([tied], loss_type="exo-pref", ties="drop", num_contrastive=2)
    assert (pairs.rewards.tolist(), pairs.counts.left_out) == ([[7.0, 6.0]], {TIE: 1})


def test_a_tie_beside_a_contradiction(run: Any) -> None:
    """A group that one option keeps is still judged by the other."""
    rows = [
        Example(Place("f.json", 0, 1), "the", ["good", "good", "bad"], [1.0, 0.0, 1.0]),
        Example(Place("f.json", 1, 2), "the", ["good", "bad", "long"], [1.0, 0.0, 0.5]),
    ]
    with pytest.raises(InputError, match=r"line 1 \(row 0\), candidates 0, 1, 2: different candidates share"):
        run(rows, loss_type="exo-pref", duplicates="keep")
    dropped = run(rows, loss_type="exo-pref", duplicates="keep", ties="drop")
    assert (len(dropped), dropped.counts.left_out) == (1, {TIE: 1})
    assert len(run(rows, loss_type="exo-pref", duplicates="keep", ties="share")) == 2
    assert run(rows, loss_type="exo-pref", ties="share").counts.left_out == {CONTRADICTION: 1}


def test_groups_are_drawn_where_candidates_do_not_come_out_even(run: Any) -> None:
    rows = [example("the", *WORDS[: 5 + k]) for k in range(3)]
    data = run(rows, num_contrastive=3)
    assert data.rewards.shape == (1 + 2 + 2, 3)
    assert all(row == sorted(set(row)) for row in data.rewards.tolist())
    assert data.rewards[1:3].flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]  # six come out even
    assert torch.equal(run(rows, num_contrastive=3).rewards, data.rewards)


def test_only_what_counts_is_predicted(run: Any, ids: Ids) -> None:
    row = Example(
        Place("f.json", 0, 1), "the", ["good film bad", "plot"], [1.0, 0.0], spans=[[(0, 4), (10, 13)], [(0, 4)]]
    )
    data = run([row], loss_type="exo-rw")
    group = data.group(0)
    assert group.completions == [[*ids("good film bad"), EOS], [*ids("plot"), EOS]]
    assert group.learned == [[True, False, False, False, True, True], [True, True]]
    for share_prompt in (True, False):
        batch = GroupCollator(pad_token_id=EOS, share_prompt=share_prompt)([data[0]])
        assert batch["targets"].tolist() == [*ids("good"), *ids("bad"), EOS, *ids("plot"), EOS]
        assert batch["cu_seqlens"].tolist() == [0, 3, 5]
        read = batch["input_ids"].flatten()[batch["source"]].tolist()
        assert read == [*ids("the"), *ids(" "), *ids("bad"), *ids("the"), *ids("plot")]
    assert run([example("the", "good", "bad")]).learned is None
    # Nothing that counts is left: with a loss the group is left out.
    late = Example(Place("f.json", 0, 1), "the", ["good film bad", "plot"], [1.0, 0.0], spans=[[(10, 13)], [(0, 4)]])
    assert run([row, late], loss_type="exo-rw", max_gen_len=3).counts.left_out == {UNLEARNED: 1}


def test_ids_without_a_token_are_the_models_to_judge(run: Any, ids: Ids) -> None:
    """A head may have more rows than the tokenizer has tokens, and what was drawn was drawn."""
    row = Example(
        Place("f.json", 0, 1), "the", ["good", "bad"], [1.0, 0.0], [[*ids("good"), 60, EOS], [61, *ids("bad")]]
    )
    assert run([row]).group(0).completions == row.completion_ids
    rows = [Example(Place("f.json", i, 1), "the", ["good"], [1.0], [ids("good")]) for i in range(40)]
    rows.append(Example(Place("f.json", 40, 1), "the", ["good"], [1.0], [ids("bad")]))
    with pytest.raises(InputError, match=r"row 40\), field `completion_ids\[0\]`, value \[\d+\]: the tokenizer"):
        run(rows)
