"""Conversations of every form, well-formed and not, through templates of every kind: token ids by the rule, or the one
documented error.

A template is somebody else's program: it may raise, write nothing, write messages otherwise when others follow, drop or
repeat words, and mark anything as the assistant's. Whatever it does, no word of a user, a system or a tool is learned,
unless the template changes the order of the messages, or marks others' words as the assistant's.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import chat_forms
import pytest
from data_files import folder, load, make_tokenizer
from fuzzing import JSON, REFUSED, fuzzed, judge, mutated
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from exo_fast.data.examples import Example
from exo_fast.data.tokens import RowTokenizer
from exo_fast.integrations.trl.candidates import CandidateRows, tokenize_candidates
from exo_fast.training.data.examples import load_examples, load_pairs, load_prompts, load_samples, load_sft
from exo_fast.training.data.groups import tokenize
from exo_fast.training.errors import InputError

THEIRS = "zqz"  # in all words of users, systems and tools, and in no word of the assistant
LIBRARY = ["field `", "has no EOS token"]  # what a ValueError of the library names
LENGTHS = {"max_seq_len": 100_000, "max_gen_len": 50_000, "progress": False}
ENDS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>"}
LOSSLESS = tuple(ENDS)  # tokenizers that decode to what they were given
NAMES = (*LOSSLESS, "words", "no EOS")


class Tokenizers(dict[str, PreTrainedTokenizerBase]):
    """Tokenizers by name."""

    def __repr__(self) -> str:  # which pytest prints with a case that fails
        return "…"


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    """Byte-level and SentencePiece, with BOS and without, EOS the end of turn or not; words; one without EOS."""
    made = Tokenizers({name: chat_forms.bare_tokenizer(name) for name in LOSSLESS})
    made |= {"words": make_tokenizer(), "no EOS": chat_forms.bare_tokenizer("chatml")}
    made["no EOS"].eos_token = None
    return made


# Templates


@dataclass(frozen=True)
class Template:
    """A template's text, with END for the tokenizer's end of turn, and whether it keeps the order of the messages and
    marks nobody else's words."""

    text: str
    honest: bool

    def on(self, tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
        tokenizer.chat_template = self.text.replace("END", ENDS.get(name, "</s>"))
        return tokenizer


# fmt: off
BEFORE = ["", "{{ bos_token or '' }}", "{{ tools | tojson if tools else '' }}", "{{ messages | length }}\n", "\n\n",
          "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}", "{{ messages[0].content }}", "{{ date }}",
          "{% set messages = messages[1:] if messages[0].role == 'system' else messages %}"]
RAISING = ["{% if messages | length > 3 %}{{ raise_exception('zqz') }}{% endif %}", "{{ raise_exception('') }}",
           "{% if add_generation_prompt %}{{ 1 / 0 }}{% endif %}", "{{ messages[7].content }}", "{{ nothing.at.all }}",
           "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}", "{{ 'a' + 1 }}",
           "{% if not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"]
HEADS = ["<{{ m['role'] }}>", "{{ m.role }}: ", "\n[{{ loop.index }}] ", "{{ m.role }}\n", "{{ m.role }}\n\n", "",
         "{% if loop.last %}! {% endif %}{{ m.role }} ", "{{ loop.revindex }}>", "{{ 'x' if loop.first }}"]
SPOKEN = ["{{ m['content'] }}", "{{ m['content'] | trim }}", "{{ m.content or '' }}", "{{ m.content | upper }}",
          "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}"
          "{% endif %}", "{{ m.content[:5] }}", "{{ m.content if loop.last else '' }}", "{{ m.content[0].text }}",
          "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}", "{{ m.content.split('</think>')[-1] }}",
          "{{ '' if m.role == 'user' and loop.index < 3 else m.content }}", " {{ m.content }} ",
          "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"]
STOPS = ["END", "END\n", "END", "END\n\n", "\n", "", "{{ eos_token or '' }}", "END{{ eos_token or '' }}", " END ",
         "{% if m.role == 'assistant' %}END{% endif %}", "{% if not loop.last %}END{% endif %}", "\n---\n", "ENDEND"]
AFTER = ["", "", "{{ eos_token or '' }}", "\n", "bye", "{% if not add_generation_prompt %}END{% endif %}",
         "{{ messages | length }}", "{% if messages[-1].role == 'assistant' %}\n\nEND{% endif %}"]
ASKING = ["<assistant>", "assistant: ", "assistant\n", "assistant\n\n", "<assistant>\n<think>\n", "", "END",
          "{{ messages[-1].content }}", "assistant: <think>\n\n</think>\n\n", "! assistant ",
          "\n[{{ messages | length + 1 }}] "]
ODD = ["", " ", "a", "END", "{{ messages }}", "{% for m in messages[::-1] %}{{ m.role }}{{ m.content }}END{% endfor %}",
       "{% for m in messages %}{{ m.content }}{{ m.content }}END{% endfor %}", "{% generation %}{% endgeneration %}",
       "{% for m in messages %}{{ m.content }}END{% endfor %}{% for m in messages %}{{ m.content }}END{% endfor %}",
       "{% for m in messages | sort(attribute='role') %}{{ m.role }}{{ m.content }}END{% endfor %}", "{{", "{% if %}",
       "{% generation %}{% for m in messages %}{{ m.role }}{{ m.content }}END{% endfor %}{% endgeneration %}",
       "{% for m in messages %}{% generation %}{{ m.content }}END{% endgeneration %}{% endfor %}", "{% generation %}a",
       "{% for m in messages %}{{ m.role }}{% generation %}{% endgeneration %}{{ m.content }}END{% endfor %}",
       "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
       "{{ m.content }}{% endif %}END{% endfor %}", "{% set _ = messages.append(messages[0]) %}a",
       "{{ messages[0].pop('role') }}",
       "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}END{% endif %}{% endfor %}"
       "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}END{% endif %}{% endfor %}"]
# fmt: on
# Like Mistral's templates: the system's words come before the user's last message, or are left out.
MOVING = (
    "{{ bos_token or '' }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% elif m.role == 'assistant' %} {{ m.content }}END{% else %}"
    "[INST] {% if messages[0].role == 'system' and CONDITION %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}"
    "[/INST]{% endif %}{% endfor %}"
)


@st.composite
def templates(draw: st.DrawFn) -> Template:
    """Mostly ones that write each message once and in order."""
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return Template(draw(st.sampled_from(ODD)), honest=False)
    if kind == 1:
        condition = draw(st.sampled_from(["loop.last", "m == asked[-1]", "loop.index < 3"]))
        return Template(MOVING.replace("CONDITION", condition), honest=True)
    pick = lambda choices: draw(st.sampled_from([choices[0]] * len(choices) + choices))  # noqa: E731
    head, spoken, stop = pick(HEADS), pick(SPOKEN), pick(STOPS)
    begin, end = "{% generation %}", "{% endgeneration %}"
    message = head + spoken + stop
    marked = {
        3: head + begin + spoken + end + stop,
        4: head + begin + spoken + stop + end,
        5: begin + message + end,
        6: head + begin + end + spoken + stop,
    }.get(kind)
    if marked is not None:
        message = "{% if m.role == 'assistant' %}" + marked + "{% else %}" + message + "{% endif %}"
    asking = "{% if add_generation_prompt %}" + pick(ASKING) + "{% endif %}"
    text = pick(BEFORE) + "{% for m in messages %}" + message + "{% endfor %}" + pick(AFTER) + asking
    if kind == 2:
        text = pick(RAISING) + text
    if kind == 7:
        at = draw(st.integers(0, len(text)))
        return Template(
            text[:at] + draw(st.sampled_from(["", "{", "}", "%}", "{{ x }}"])) + text[at + 1 :], honest=False
        )
    return Template(text, honest=True)


# Rows


WORDS = st.text(st.sampled_from("ab .\n\té日👍\"'{<"), max_size=8) | st.sampled_from(
    ["the film", " was good\n\n", "", " ", "\n", "b" * 2000, "<think>\na\n</think>\n\nb", "]The", ">\n\n", "a\u2028b"]
)
SPECIAL = st.sampled_from(["<|im_end|>", "</s>", "<s>", "<end_of_turn>", "<eos>", "<|im_start|>assistant\n", "<unk>"])
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": WORDS}), max_size=2)


def theirs(draw: st.DrawFn) -> str:
    words = draw(WORDS) + THEIRS + draw(WORDS)
    return words + draw(SPECIAL) + THEIRS if draw(st.integers(0, 30)) == 0 else words


TOOLS = [
    {"type": "function", "function": {"name": THEIRS, "parameters": {"type": "object", "properties": {THEIRS: {}}}}}
]


@st.composite
def answers(draw: st.DrawFn, several: bool = True) -> list[dict[str, Any]]:
    """Words of the assistant, perhaps in several turns or by a tool."""
    said = {"role": "assistant", "content": draw(WORDS)}
    kind = draw(st.integers(0, 11)) if several else 9
    if kind == 0:
        said["reasoning_content"] = draw(WORDS)
    if kind == 1:
        return [said, {"role": "user", "content": theirs(draw)}, {"role": "assistant", "content": draw(WORDS)}]
    if kind == 2:
        call = {"type": "function", "function": {"name": "look", "arguments": {"a": draw(WORDS)}}}
        called = {**said, "tool_calls": [call]}
        return [called, {"role": "tool", "content": theirs(draw)}, {"role": "assistant", "content": draw(WORDS)}]
    if kind == 3:
        return [{**said, "content": draw(PARTS)}]
    if kind == 4:
        return [{**said, "content": draw(WORDS) + draw(SPECIAL) + draw(WORDS)}]
    return [said]


@st.composite
def prompts(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": theirs(draw)}] if draw(st.booleans()) else []
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        messages += [{"role": "user", "content": theirs(draw)}, *draw(answers())]
    messages.append({"role": "user", "content": theirs(draw)})
    if draw(st.integers(0, 9)) == 0:
        messages.append({"role": "assistant", "content": draw(WORDS)})
    return messages


@st.composite
def conversations(draw: st.DrawFn, kinds: tuple[str, ...] = ("candidates", "pair", "implicit")) -> dict[str, Any]:
    """A well-formed row of messages."""
    prompt = draw(prompts())
    kind = draw(st.sampled_from(kinds))
    row: dict[str, Any] = {"prompt": prompt}
    match kind:
        case "candidates":
            row["completions"] = [draw(answers()) for _ in range(2)]
            row["rewards"] = [1.0, 0.5]
        case "pair":
            row |= {"chosen": draw(answers()), "rejected": draw(answers())}
        case "implicit":
            row = {"chosen": prompt + draw(answers()), "rejected": prompt + draw(answers())}
        case "completion":
            row["completion"] = draw(answers())
        case "messages":
            row = {"messages": prompt + draw(answers())}
        case "beside texts":
            row |= {"chosen": "a b", "rejected": draw(WORDS) + "a"}
    if draw(st.integers(0, 3)) == 0:
        row["tools"] = json.dumps(TOOLS) if draw(st.booleans()) else TOOLS
    if draw(st.integers(0, 5)) == 0:
        row["chat_template_kwargs"] = draw(
            st.sampled_from([{"date": "a"}, '{"date": "b"}', {"enable_thinking": False}])
        )
    return row


def other_forms(draw: st.DrawFn) -> dict[str, Any]:
    """A row as another tool writes it."""
    ask, say, other = theirs(draw), draw(WORDS) + "a", draw(WORDS) + "b"
    match draw(st.sampled_from(["sharegpt", "calls", "ranked", "alpaca", "history", "ranked alpaca", "orca",
                                "ultrafeedback", "scored", "swift", "one message"])):  # fmt: skip
        case "sharegpt":
            turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": say}]
            return {"conversations": turns, "system": draw(st.sampled_from(["", THEIRS]))}
        case "calls":
            call = json.dumps({"name": "look", "arguments": {"a": say}})
            turns = [{"from": "human", "value": ask}, {"from": "function_call", "value": call}]
            turns += [{"from": "observation", "value": ask}, {"from": "gpt", "value": say}]
            return {"conversations": turns, "tools": json.dumps(TOOLS)}
        case "ranked":
            answer = lambda text: {"from": "gpt", "value": text}  # noqa: E731
            return {
                "conversations": [{"from": "human", "value": ask}],
                "chosen": answer(say),
                "rejected": answer(other),
            }
        case "alpaca":
            return {"instruction": ask, "input": draw(st.sampled_from(["", THEIRS])), "output": say}
        case "history":
            return {"instruction": ask, "output": say, "system": THEIRS, "history": [[THEIRS, say], [ask, other]]}
        case "ranked alpaca":
            return {"instruction": ask, "input": "", "chosen": say, "rejected": other}
        case "orca":
            return {"system": THEIRS, "question": ask, "chosen": say, "rejected": other}
        case "ultrafeedback":
            judged = [{"response": say, "overall_score": 4.0}, {"response": other, "overall_score": 7}]
            return {"instruction": ask, "completions": judged}
        case "scored":
            said = [[{"role": "user", "content": ask}, {"role": "assistant", "content": text}] for text in (say, other)]
            return {"prompt": ask, "chosen": said[0], "rejected": said[1], "score_chosen": 7.5, "score_rejected": 1}
        case "swift":
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
            return {"messages": messages, "rejected_response": other}
    return {"prompt": ask, "chosen": {"role": "assistant", "content": say},
            "rejected": {"role": "assistant", "content": other}}  # fmt: skip


# Anything in the place of anything, by names and roles that mean something too.
NAMED = st.dictionaries(
    st.sampled_from(
        ["role", "content", "tool_calls", "function", "name", "arguments", "from", "value", "text", "type"]
    ),
    JSON,
    max_size=3,
)
ROLES = st.sampled_from(["user", "system", "tool", "ipython", "", "User", "assistant ", "human", "observation"])
JUNK = (
    JSON
    | NAMED
    | st.lists(NAMED, max_size=2)
    | ROLES
    | SPECIAL
    | st.sampled_from(["[]", "{", "null", "[null]", "\ud800"])
)


# What must hold


def check(
    result: dict[str, Any], tokenizer: PreTrainedTokenizerBase, name: str, row: Any, honest: bool, whole: bool = False
) -> None:
    """The invariants of the rule, for ids and masks of a row; `whole`: one that nothing was changed in."""
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(ENDS.get(name, "</s>"))}
    candidates, masks = result["candidate_ids"], result["candidate_masks"]
    assert result["prompt_ids"]
    assert len(candidates) == len(masks) == len(result["rewards"]) >= 2
    written = json.dumps(row, ensure_ascii=False)
    plain = not any(str(token) in written for token in tokenizer.added_tokens_decoder.values())
    for ids, marks in zip(candidates, masks, strict=True):
        assert len(ids) == len(marks)
        assert any(marks)
        assert ids[-1] in ends
        if plain and honest and whole and ends_once(tokenizer, ENDS.get(name, "</s>")):
            last = ids[len(marks) - [*reversed(marks), False].index(False) :]
            assert sum(i in ends for i in last) == 1, tokenizer.decode(ids)
        if honest:
            assert THEIRS not in learned_words(tokenizer, ids, marks).lower(), learned_words(tokenizer, ids, marks)


def ends_once(tokenizer: PreTrainedTokenizerBase, end: str) -> bool:
    """Return whether the template writes its end of turn and nothing else after an answer."""
    try:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "answered"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template that refuses this may take others
        return False
    return text.rpartition("answered")[2].strip() == end or text.rpartition("ANSWERED")[2].strip() == end


def learned_words(tokenizer: PreTrainedTokenizerBase, ids: list[int], marks: list[bool]) -> str:
    """Return the text of the tokens that count, run by run."""
    runs: list[list[int]] = [[]]
    for token, mark in zip(ids, marks, strict=True):
        runs[-1:] = [[*runs[-1], token]] if mark else [runs[-1], []]
    return "|".join(tokenizer.batch_decode(runs))


def check_text(result: dict[str, Any], tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> None:
    """Check that the ids spell the text, and the prompt's ids the prompt."""
    rows = RowTokenizer(tokenizer)
    text = rows.text_of(row)
    completions = text["completions"] if "completions" in text else [text["chosen"], text["rejected"]]
    spell = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # noqa: E731
    (prompt,) = rows.prompts([text["prompt"]])
    assert result["prompt_ids"] == prompt
    carrier = tokenizer("a", add_special_tokens=False)["input_ids"]
    for ids, completion in zip(result["candidate_ids"], completions, strict=True):
        spelled = spell(carrier + ids)[1:]
        assert spelled in (completion, completion + tokenizer.eos_token)


@fuzzed(60)
@given(template=templates(), row=conversations(), name=st.sampled_from(NAMES))
def test_templates(tokenizers: Tokenizers, template: Template, row: dict[str, Any], name: str) -> None:
    tokenizer = template.on(tokenizers[name], name)
    before = json.dumps(row)
    result = judge(lambda: tokenize_candidates(row, tokenizer), ValueError, LIBRARY)
    assert json.dumps(row) == before
    if result is not REFUSED:
        check(result, tokenizer, name, row, template.honest, whole=True)
        if name in LOSSLESS:
            check_text(result, tokenizer, row)


@fuzzed(60)
@given(data=st.data(), template=templates(), name=st.sampled_from(NAMES))
def test_hostile_rows(tokenizers: Tokenizers, data: st.DataObject, template: Template, name: str) -> None:
    tokenizer = template.on(tokenizers[name], name)
    row = data.draw(conversations(("candidates", "pair", "implicit", "beside texts")))
    row = data.draw(mutated(row, JUNK))
    if not isinstance(row, dict):
        row = {"prompt": row}
    result = judge(lambda: tokenize_candidates(row, tokenizer), ValueError, LIBRARY)
    if result is not REFUSED:
        check(result, tokenizer, name, row, template.honest)
        if name in LOSSLESS:
            check_text(result, tokenizer, row)


LOADERS: dict[str, tuple[Callable[..., list[Any]], tuple[str, ...]]] = {
    "examples": (partial(load_examples, loss_type="exo-rw", num_contrastive=2), ("candidates", "pair", "implicit")),
    "pairs": (load_pairs, ("candidates", "pair", "implicit", "beside texts")),
    "sft last": (partial(load_sft, learn="last"), ("messages", "completion", "pair")),
    "sft all": (partial(load_sft, learn="all"), ("messages", "messages", "completion")),
    "samples": (load_samples, ("candidates", "pair", "completion")),
    "prompts": (load_prompts, ("candidates", "messages", "completion", "implicit")),
}


def well_read(found: Any, template: Template, tokenizer: Any, name: str, rows: list[Any], place: str) -> None:
    """Rows that a loader gave, judged, and as groups for training beside what the library makes of the same rows."""
    if not isinstance(found, list) or not isinstance(found[0], Example):
        return
    if not all(len(e.completions) == len(e.rewards) == len(found[0].completions) for e in found):
        return
    groups = judge(lambda: tokenize(found, tokenizer, num_contrastive=None, **LENGTHS), InputError, [place, "EOS"])
    if groups is REFUSED:
        return
    assert len(groups) == len(found)
    for index in range(len(groups)):
        group = groups.group(index)
        marks = group.learned or [[True] * len(ids) for ids in group.completions]
        for ids, marked in zip(group.completions, marks, strict=True):
            assert any(marked)
            if template.honest:
                assert THEIRS not in learned_words(tokenizer, ids, marked).lower()
        if len(rows) == len(found) and len(group.completions) == 2:
            made = judge(lambda row=rows[index]: tokenize_candidates(row, tokenizer), ValueError, LIBRARY)
            if made is not REFUSED and len(made["candidate_ids"]) == 2:
                assert made["prompt_ids"] == group.prompt
                assert sorted(made["candidate_ids"]) == sorted(group.completions)
                assert sorted(made["candidate_masks"]) == sorted(marks)


@pytest.mark.parametrize("loader", LOADERS)
@fuzzed(30)
@given(data=st.data(), template=templates(), name=st.sampled_from(NAMES))
def test_loaders(tokenizers: Tokenizers, loader: str, data: st.DataObject, template: Template, name: str) -> None:
    tokenizer = template.on(tokenizers[name], name)
    call, kinds = LOADERS[loader]
    rows = [data.draw(conversations(kinds)) for _ in range(data.draw(st.integers(1, 2)))]
    if data.draw(st.booleans()):
        rows = data.draw(mutated(rows, JUNK))
    written(rows, call, template, tokenizer, name)


@fuzzed(100)
@given(loader=st.sampled_from(list(LOADERS)), data=st.data(), template=templates(), name=st.sampled_from(NAMES))
def test_other_forms(tokenizers: Tokenizers, loader: str, data: st.DataObject, template: Template, name: str) -> None:
    tokenizer = template.on(tokenizers[name], name)
    rows = [other_forms(data.draw)]
    if data.draw(st.integers(0, 2)):
        rows = data.draw(mutated(rows, JUNK))
    written(rows, LOADERS[loader][0], template, tokenizer, name)


def written(rows: Any, call: Callable[..., list[Any]], template: Template, tokenizer: Any, name: str) -> None:
    """The rows as a file, read and judged."""
    rows = rows if isinstance(rows, list) else [rows]
    text = "\n".join(json.dumps(row) for row in rows)
    with folder() as place:
        (place / "train.jsonl").write_text(text)
        found = load(place, place, call, tokenizer)
        if isinstance(found, list):
            read = [json.loads(line) for line in text.splitlines()]
            well_read(found, template, tokenizer, name, read, str(place))


@fuzzed(40)
@given(data=st.data(), template=templates(), name=st.sampled_from(NAMES))
def test_rows_of_a_data_set(tokenizers: Tokenizers, data: st.DataObject, template: Template, name: str) -> None:
    """Rows as ExoDPOTrainer maps them: a batch has a column for each field, with nulls."""
    tokenizer = template.on(tokenizers[name], name)
    rows = [data.draw(conversations()) for _ in range(2)]
    if data.draw(st.booleans()):
        rows = [data.draw(mutated(row, JUNK)) for row in rows]
        rows = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    columns = {field: [row.get(field) for row in rows] for field in {field for row in rows for field in row}}
    options = {
        "num_contrastive": data.draw(st.sampled_from([None, 2, 3])),
        "max_length": data.draw(st.sampled_from([None, 1, 40])),
    }
    mapped = CandidateRows(
        tokenizer, "train", data.draw(st.sampled_from(["exo-rw", "dpo-pref"])), duplicates="keep", ties="share",
        truncation_mode=data.draw(st.sampled_from(["keep_start", "keep_end"])), **options,
    )  # fmt: skip
    mapped.size = mapped.num_contrastive or 2
    found = judge(lambda: mapped(columns, [5, 6]), ValueError, ["train dataset, row 5: ", "train dataset, row 6: "])
    if found is REFUSED:
        return
    assert len({len(column) for column in found.values()}) == 1
    for place, reason in enumerate(found["left_out"]):
        group = {field: found[field][place] for field in ("prompt_ids", "candidate_ids", "candidate_masks", "rewards")}
        if not reason:
            assert len(group["candidate_ids"]) == mapped.size
            check(group, tokenizer, name, rows, template.honest)


@fuzzed(60)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_spans(tokenizers: Tokenizers, data: st.DataObject, name: str) -> None:
    tokenizer = tokenizers[name]
    texts = [data.draw(WORDS) + "a" + data.draw(WORDS) for _ in range(2)]
    spans = [sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=2))) for text in texts]
    row = {
        "prompt": data.draw(WORDS) + "a",
        "completions": texts,
        "rewards": [0, 1],
        "completion_spans": [[s] for s in spans],
    }
    if data.draw(st.integers(0, 2)) == 0:
        row["completion_spans"] = data.draw(mutated(row["completion_spans"], JSON))
    result = judge(lambda: tokenize_candidates(row, tokenizer), ValueError, LIBRARY)
    if result is REFUSED:
        return
    check(result, tokenizer, name, row, honest=True)
    if name in LOSSLESS and row["completion_spans"] is not None:
        check_text(result, tokenizer, row)
        for ids, marks, text, found in zip(
            result["candidate_ids"], result["candidate_masks"], texts, row["completion_spans"], strict=True
        ):
            carrier = tokenizer("a", add_special_tokens=False)["input_ids"]
            kept = [i for i, mark in zip(ids[:-1], marks, strict=False) if mark]
            expected = "".join(text[begin:end] for begin, end in found)
            assert tokenizer.decode(carrier + kept, clean_up_tokenization_spaces=False)[1:] == expected
