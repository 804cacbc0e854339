"""Rows of other tools in our fields: each accepted form, and the errors for other rows."""

from typing import Any

import pytest

from exo_fast.data.fields import BadField
from exo_fast.data.forms import standard, without_nulls

ASK, YES, NO = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "yes"},
    {"role": "assistant", "content": "no"},
)
BRIEF = {"role": "system", "content": "be brief"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "yes"}
CALL = {"name": "f", "arguments": {"a": 1}}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "our own fields": (
        {"prompt": "q", "completions": ["yes", "no"], "rewards": [1, 0], "id": 7},
        {"prompt": "q", "completions": ["yes", "no"], "rewards": [1, 0], "id": 7},
    ),
    "ShareGPT": ({"conversations": [HUMAN, GPT], "id": 7}, {"messages": [ASK, YES], "id": 7}),
    "ShareGPT with a system": ({"conversations": [HUMAN, GPT], "system": "be brief"}, {"messages": [BRIEF, ASK, YES]}),
    "ShareGPT's system twice": (
        {"conversations": [{"from": "system", "value": "be brief"}, HUMAN, GPT], "system": "other"},
        {"messages": [BRIEF, ASK, YES]},
    ),
    "ShareGPT's tools": (
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "3"},
                GPT,
            ],
            "tools": '[{"name": "f"}]',
        },
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
                {"role": "tool", "content": "3"},
                YES,
            ],
            "tools": [{"name": "f"}],
        },
    ),
    "roles under ShareGPT's name": ({"conversations": [ASK, YES]}, {"messages": [ASK, YES]}),
    "LLaMA-Factory's ranking": (
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "no"}},
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    ),
    "Alpaca": (
        {"instruction": "q", "input": "", "output": "yes"},
        {"prompt": [ASK], "completion": [YES]},
    ),
    "Alpaca with input and history": (
        {"instruction": "a", "input": "b", "output": "yes", "history": [["q", "no"]], "system": "be brief"},
        {"prompt": [BRIEF, ASK, NO, {"role": "user", "content": "a\nb"}], "completion": [YES]},
    ),
    "Alpaca's preference": (
        {"instruction": "q", "input": None, "chosen": "yes", "rejected": "no"},
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    ),
    "Orca": (
        {"system": "be brief", "question": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": [BRIEF, ASK], "chosen": [YES], "rejected": [NO]},
    ),
    "Orca without a system": (
        {"system": "", "question": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    ),
    "OpenOrca": (
        {"system_prompt": "be brief", "question": "q", "response": "yes"},
        {"prompt": [BRIEF, ASK], "completion": [YES]},
    ),
    "UltraFeedback": (
        {
            "instruction": "q",
            "completions": [{"response": "yes", "overall_score": 8.5}, {"response": "no", "overall_score": 3}],
        },
        {"prompt": [ASK], "completions": [[YES], [NO]], "rewards": [8.5, 3]},
    ),
    "ms-swift": (
        {"messages": [ASK, YES], "rejected_response": "no"},
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    ),
    "single messages": (
        {"prompt": [ASK], "chosen": YES, "rejected": NO},
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    ),
    "tools as a text of JSON": ({"messages": [ASK], "tools": '[{"a": null}]'}, {"messages": [ASK], "tools": [{}]}),
    "tools as texts of JSON": ({"messages": [ASK], "tools": ['{"a": 1}']}, {"messages": [ASK], "tools": [{"a": 1}]}),
    "no tools": ({"messages": [ASK], "tools": ""}, {"messages": [ASK], "tools": None}),
    "Arrow's nulls": (
        {
            "messages": [
                {**ASK, "tool_calls": None},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"arguments": {"a": 1, "b": None}}}],
                },
            ],
            "tools": [{"parameters": {"properties": {"a": {"type": "int"}, "b": None}}}],
            "chat_template_kwargs": {"deep": {"x": None, "y": [None, 1]}},
            "chosen": None,
        },
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": {"a": 1}}}]},
            ],
            "tools": [{"parameters": {"properties": {"a": {"type": "int"}}}}],
            "chat_template_kwargs": {"deep": {"y": [None, 1]}},
        },
    ),
}


@pytest.mark.parametrize(("row", "expected"), FORMS.values(), ids=FORMS.keys())
def test_forms(row: dict[str, Any], expected: dict[str, Any]) -> None:
    before = repr(row)
    assert standard(row) == expected
    assert repr(row) == before  # the caller's row stays as it is
    assert standard(standard(row)) == {name: value for name, value in expected.items() if value is not None}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nobody's role": ({"conversations": [{"from": "me", "value": "q"}]}, "`conversations[0]`.*`from` must be one of"),
    "no list": ({"conversations": "q"}, "a list of messages with `from` and `value`"),
    "tools that are no JSON": ({"messages": [ASK], "tools": "[{"}, "field `tools`.*not valid JSON"),
    "tools that are no schemas": ({"messages": [ASK], "tools": [1]}, "a list of tool schemas is needed"),
    "a call that is no JSON": (
        {"conversations": [HUMAN, {"from": "function_call", "value": "f("}]},
        "`conversations[1]`.*not valid JSON",
    ),
    "a history of no pairs": ({"instruction": "q", "output": "a", "history": ["x"]}, "`history[0]`.*question and its"),
    "nothing that was chosen": ({"messages": [YES], "rejected_response": "no"}, "a prompt and the answer that was"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD.keys())
def test_rows_of_no_form(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadField, match=message.replace("[", r"\[").replace("]", r"\]")):
        standard(row)


def test_nulls_in_lists_stay() -> None:
    assert without_nulls({"a": [None, {"b": None, "c": 0}], "d": None}) == {"a": [None, {"c": 0}]}
