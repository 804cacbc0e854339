"""Conversations as text: the text that TRL makes of them, the end of a completion, and the errors for others."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from exo_fast.data.fields import BadField
from exo_fast.data.tokens import RowTokenizer
from exo_fast.training.data.examples import (
    load_examples,
    load_pairs,
    load_prompts,
    load_samples,
    load_sft,
)
from exo_fast.training.data.groups import tokenize
from exo_fast.training.data.places import Source
from exo_fast.training.errors import InputError

EOS = "</s>"
TEMPLATES = {
    # a line break after EOS, as in ChatML and Zephyr
    "line break": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    # no generation prompt, EOS after answers alone, BOS: Llama 2
    "no generation prompt": "<s>{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }} </s>"
    "{% else %}[{{ m['content'] }}]{% endif %}{% endfor %}",
    # an end of turn that is not EOS: Gemma
    "other end": "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}",
    # more after the generation prompt than before an answer: DeepSeek-R1
    "longer generation prompt": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}",
}


def render(record: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return RowTokenizer(tokenizer).text_of(record)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be brief"}
RECORDS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": [SYSTEM, user("the film")]},
    "prompt to be continued": {"prompt": [user("the film"), assistant("was")]},
    "completion": {"prompt": [user("the film")], "completion": [assistant("was good")]},
    "completion of several messages": {
        "prompt": [user("the film")],
        "completion": [assistant("was good"), user("and"), assistant("long")],
    },
    "preference": {
        "prompt": [SYSTEM, user("the film"), assistant("was"), user("good")],
        "chosen": [assistant("very")],
        "rejected": [assistant("very bad")],
    },
    "implicit prompt": {
        "chosen": [user("the film"), assistant("was good")],
        "rejected": [user("the film"), assistant("was bad")],
    },
    "implicit prompt beside its text": {
        "prompt": "the film",
        "chosen": [user("the film"), assistant("was"), user("what"), assistant("good")],
        "rejected": [user("the film"), assistant("was"), user("what"), assistant("bad")],
    },
    "the same answers": {"chosen": [user("the film"), assistant("a")], "rejected": [user("the film"), assistant("a")]},
    "options": {"prompt": [user("the film")], "chat_template_kwargs": {"more": 1}},
    "text": {"prompt": "the film", "chosen": " was good", "rejected": " was bad"},
}


@pytest.fixture(params=TEMPLATES)
def chat_tokenizer(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return with_template(tokenizer, request.param)


def with_template(tokenizer: PreTrainedTokenizerFast, name: str = "line break") -> PreTrainedTokenizerFast:
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<system>", "<user>", "<assistant>", "<think>", "<end>"]}
    )
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def source(tmp_path: Path, *records: Any) -> Source:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Source(path)


@pytest.mark.parametrize("name", RECORDS)
def test_the_text_is_that_of_trl(name: str, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    record = RECORDS[name]
    theirs = data_utils.maybe_apply_chat_template(data_utils.maybe_extract_prompt(record), chat_tokenizer)
    ours = render(record, chat_tokenizer)
    ours.pop("completion_spans", None)
    assert {name: value for name, value in ours.items() if name != "chat_template_kwargs"}.keys() == theirs.keys() - {
        "chat_template_kwargs"
    }
    for field in theirs.keys() & {"prompt", "chosen", "rejected", "completion"}:
        text = theirs[field]
        end = "<end>" if "<end>" in chat_tokenizer.chat_template else EOS
        if field != "prompt" and end in text:
            head, _, tail = text.rpartition(end)
            assert tail.strip() == ""
            text = head + end
        assert ours[field] == text


def test_exact_text(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = with_template(tokenizer)
    assert render(RECORDS["implicit prompt beside its text"], chat) == {
        "prompt": "<user>the film</s>\n<assistant>was</s>\n<user>what</s>\n<assistant>",
        "chosen": "good</s>",
        "rejected": "bad</s>",
    }
    messages = {"messages": [user("the film"), assistant("was"), user("what"), assistant("good")], "id": 7}
    assert render(messages, chat) == {
        "prompt": "<user>the film</s>\n<assistant>was</s>\n<user>what</s>\n<assistant>",
        "completion": "good</s>",
        "id": 7,
    }
    candidates = {"prompt": [user("a")], "completions": [[assistant("b")], [assistant("c")]], "rewards": [1, 2]}
    expected = {"prompt": "<user>a</s>\n<assistant>", "completions": ["b</s>", "c</s>"], "rewards": [1, 2]}
    assert render(candidates, chat) == expected
    implicit = {"completions": [[user("a"), assistant("b")], [user("a"), assistant("c")]], "rewards": [1, 2]}
    assert render(implicit, chat) == expected


def test_a_completion_goes_on_with_the_message_that_the_prompt_leaves_open(tokenizer: PreTrainedTokenizerFast) -> None:
    record = {
        "prompt": [user("the film"), assistant("was")],
        "chosen": [assistant(" good")],
        "rejected": [assistant("")],
    }
    assert render(record, with_template(tokenizer)) == {
        "prompt": "<user>the film</s>\n<assistant>was",
        "chosen": " good</s>",
        "rejected": "</s>",
    }


def test_every_completion_ends_in_one_end_of_turn(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    records = [
        {**RECORDS["preference"]},
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    ]
    pairs = load_pairs(source(tmp_path, *records), tokenizer=chat_tokenizer)
    groups = tokenize(pairs, chat_tokenizer, num_contrastive=None, max_seq_len=64, max_gen_len=32, progress=False)
    for index in range(len(groups)):
        group = groups.group(index)
        assert group.prompt.count(chat_tokenizer.bos_token_id) == 1
        for ids in group.completions:
            end = "<end>" if "<end>" in chat_tokenizer.chat_template else EOS
            assert [i for i in ids if chat_tokenizer.convert_ids_to_tokens(i) in ("<end>", EOS)] == ids[-1:]
            assert chat_tokenizer.convert_ids_to_tokens(ids[-1]) == end


def test_every_loader_takes_conversations(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = with_template(tokenizer)
    preference, messages = RECORDS["implicit prompt"], {"messages": [user("the film"), assistant("was good")]}
    prompt = "<user>the film</s>\n<assistant>"
    (text,) = load_pairs(
        source(tmp_path, {"prompt": [user("the film")], "chosen": "was good", "rejected": "was bad"}), tokenizer=chat
    )
    assert (text.prompt, text.completions) == (prompt, ["was good</s>", "was bad</s>"])
    (pair,) = load_pairs(source(tmp_path, preference), tokenizer=chat)
    assert (pair.prompt, pair.completions) == (prompt, ["was good</s>", "was bad</s>"])
    (example,) = load_examples(source(tmp_path, preference), loss_type="exo-pref", num_contrastive=None, tokenizer=chat)
    assert example == pair
    for record in (messages, RECORDS["completion"], {"chosen": messages["messages"]}):
        (example,) = load_sft(source(tmp_path, record), tokenizer=chat)
        assert (example.prompt, example.completions) == (prompt, ["was good</s>"])
        (example,) = load_samples(source(tmp_path, record), tokenizer=chat)
        assert (example.prompt, example.completions) == (prompt, ["was good</s>"])
    asked = {"messages": [user("the film")]}
    assert load_prompts(source(tmp_path, preference, messages, asked), tokenizer=chat) == [prompt]


BAD = {
    "not the assistant's": ({"messages": [user("a")]}, load_sft, "no message is the assistant's"),
    "no prompt": ({"messages": [assistant("a")]}, load_sft, "there is no message before the answer"),
    "options that are none": (
        {"messages": [user("a"), assistant("b")], "chat_template_kwargs": [1]},
        load_sft,
        "field `chat_template_kwargs`, value [1]: an object of names and values is needed",
    ),
    "a template of its own": (
        {"messages": [user("a"), assistant("b")], "chat_template_kwargs": {"chat_template": "x"}},
        load_sft,
        "`chat_template` is not the template's to take",
    ),
    "no role": ({"prompt": [{"content": "a"}], "chosen": [assistant("a")]}, load_sft, "field `prompt[0]`, value {'con"),
    "text among conversations": (
        {"chosen": [user("a"), assistant("b")], "rejected": "c"},
        load_pairs,
        "field `rejected`, value 'c': text beside a conversation",
    ),
    "no words of the assistant": (
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [user("c")]},
        load_pairs,
        "no message of the assistant",
    ),
    "empty": ({"prompt": [user("a")], "completion": []}, load_sft, "field `completion`, value []: a list of messages"),
    "prompt of the system": (
        {"prompt": [SYSTEM], "completion": [assistant("a")]},
        load_sft,
        "the last message must come from user, tool or assistant",
    ),
    "ShareGPT without an answer": (
        {"conversations": [{"from": "human", "value": "a"}]},
        load_sft,
        "no message is the assistant's",
    ),
    "nobody's role": ({"conversations": [{"from": "me", "value": "a"}]}, load_sft, "`from` must be one of human"),
}


@pytest.mark.parametrize(("record", "load", "message"), BAD.values(), ids=BAD.keys())
def test_bad_conversations(
    record: Any, load: Any, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError) as error:
        load(source(tmp_path, record), tokenizer=with_template(tokenizer))
    assert message in str(error.value)
    assert "train.jsonl, line 1 (row 0)" in str(error.value)


def test_an_answer_in_parts_is_no_continuation(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    parts = {"role": "assistant", "content": [{"type": "text", "text": "good"}]}
    record = {"prompt": [user("the film"), assistant("was")], "completion": [parts]}
    (example,) = load_sft(source(tmp_path, record), tokenizer=with_template(tokenizer))
    assert "good" in example.completions[0]


def test_templates_that_refuse_or_are_not_there(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    refusing = deepcopy(tokenizer)
    refusing.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadField, match="the chat template refuses it: roles must alternate"):
        render(RECORDS["completion"], refusing)
    records = source(tmp_path, RECORDS["completion"])
    with pytest.raises(InputError, match=r"field `prompt`, value .*: a conversation, and the tokenizer .* has no chat"):
        load_sft(records, tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"line 1 \(row 0\), field `prompt`.*name the model .*apply_chat_template"):
        load_sft(records)
    without_end = deepcopy(with_template(tokenizer))
    without_end.eos_token = None
    assert render(RECORDS["completion"], without_end)["completion"] == "was good</s>"


def test_rows_that_say_one_thing_twice(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """UltraFeedback's binarized rows have the prompt as text, in the candidates, and once more in `messages`."""
    chat = with_template(tokenizer)
    asked, good, bad = user("the film"), assistant("was good"), assistant("was bad")
    row = {"prompt": "the film", "chosen": [asked, good], "rejected": [asked, bad], "messages": [asked, good]}
    row |= {"score_chosen": 8.5, "score_rejected": 2}
    place = source(tmp_path, row)
    options = {"num_contrastive": None, "tokenizer": chat}
    (example,) = load_examples(place, loss_type="exo-rw", **options)
    assert (example.prompt, example.completions) == ("<user>the film</s>\n<assistant>", ["was good</s>", "was bad</s>"])
    assert example.rewards == [8.5, 2.0]
    assert load_pairs(place, tokenizer=chat)[0].completions == example.completions
    assert load_samples(place, tokenizer=chat)[0].completions == example.completions
    assert load_prompts(place, tokenizer=chat) == [example.prompt]
    (learned,) = load_sft(place, tokenizer=chat)
    assert (learned.prompt, learned.completions) == (example.prompt, example.completions[:1])
    repeated = {"prompt": [asked], "chosen": [asked, good], "rejected": [asked, bad]}
    assert load_pairs(source(tmp_path, repeated), tokenizer=chat)[0].completions == example.completions


def test_the_assistants_words_wherever_they_stand(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = with_template(tokenizer)
    greeted = {"messages": [assistant("and"), user("the film"), assistant("was good"), user("long")]}
    place = source(tmp_path, greeted)
    for learn in ("last", "all"):
        (example,) = load_sft(place, tokenizer=chat, learn=learn)
        assert example.prompt == "<assistant>and</s>\n<user>the film</s>\n<assistant>"
        assert example.completions == ["was good</s>"]


def test_pairs_of_which_some_have_scores(tmp_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    place = source(tmp_path, {**pair, "score_chosen": 8, "score_rejected": 2}, pair)
    with pytest.raises(InputError, match="some pairs have score_chosen and score_rejected and others have not"):
        load_examples(place, loss_type="exo-rw", num_contrastive=None)
    assert len(load_examples(place, loss_type="exo-pref", num_contrastive=None)) == 2
