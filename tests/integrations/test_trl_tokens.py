"""Token ids of conversations beside TRL's own, for real chat templates: equal, or different for a reason that is ours.

TRL tokenises a conversation whole and cuts it where the ids of the prompt and of the candidates part. Here the model
learns what inference sees: the generation prompt as a server tokenises it, and the answer up to its end of turn. So the
ids differ if the template writes more after the end of turn, if a token would cross the boundary, and if a candidate
goes on with a message that the prompt has begun. The template and the tokenizer alone must explain each difference; an
unexplained one fails the test.
"""

import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chat_forms
import pytest

pytest.importorskip("trl")

import trl

from exo_fast.data.fields import BadField
from exo_fast.integrations.trl import tokenize_candidates
from exo_fast.integrations.trl.trainer import DPOTrainer

ROWS = 1000  # of each form
TAIL = "after the end of turn"
INSIDE = "the prompt ends inside a token"
EDGE = "another's words end inside a token"
LONGER = "the generation prompt is longer than what stands before an answer"
CONTINUED = "the assistant's turn is continued"
EQUAL = "equal"
# Exactly these reasons must occur: the behaviour of each template is known.
REASONS = {
    "chatml": {TAIL, INSIDE, EDGE, CONTINUED},
    "llama-3": {EQUAL, CONTINUED},
    "gemma": {TAIL},
    "mistral": {EQUAL, INSIDE, EDGE},
    "qwen3-thinking": {TAIL, INSIDE, CONTINUED, LONGER},
    "qwen2.5-tools": {TAIL, INSIDE, EDGE, CONTINUED},
    "llama-3.1-tools": {EQUAL, CONTINUED},
}
# The text between two turns of the assistant: the template's, and words that do not count.
BETWEEN = {
    "chatml": r"\n<\|im_start\|>user.*?<\|im_start\|>assistant\n",
    "llama-3": r"<\|start_header_id\|>(?:user|ipython).*?<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
    "gemma": r"\n<start_of_turn>user.*?<start_of_turn>model\n",
    "mistral": r"\[INST\].*?\[/INST\]",
}
BETWEEN |= {"qwen3-thinking": BETWEEN["chatml"], "qwen2.5-tools": BETWEEN["chatml"]}
BETWEEN |= {"llama-3.1-tools": BETWEEN["llama-3"]}
NO_THOUGHT = r"(?:<think>(?:\n\n</think>\n\n)?)?"  # of Qwen3's generation prompt with enable_thinking=False

Message = dict[str, Any]
PARTS = ["the film", " was good", "The", ".", "\n", "\n\n", " ", "  ", "\t", "\r\n", "é", "日本語", "👍🏽", "\u200d",
         "'s", "“quoted”", '"x"', "{'a': 1}", "```python\nprint(1)\n```", "# Title\n\n- one\n- two", "**bold**",
         "a_b", "1234", "<b>", "user", "assistant", "\\n", "{{ x }}", "{% y %}", "ß", "\u0301", "\xa0", "؟", " \n",
         "\n "]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "look", "description": "Finds “films”.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}}}}  # fmt: skip


class Conversations:
    """Random rows of a form: prompt, chosen, rejected."""

    def __init__(self, form: Any, seed: str):
        self.form, self.random = form, random.Random(seed)

    def often(self, share: float) -> bool:
        return self.random.random() < share

    def words(self) -> str:
        if self.often(0.05):
            return ""
        text = "".join(self.random.choices(PARTS, k=self.random.randint(1, 8)))
        edge = self.random.choice(["", "", " ", "\n", "\n\n", "  "])
        return edge + text + self.random.choice(["", "", edge])

    def user(self) -> Message:
        return {"role": "user", "content": self.words()}

    def assistant(self) -> Message:
        message = {"role": "assistant", "content": self.words()}
        if self.form.reasoning and self.often(0.4):
            message["reasoning_content"] = self.words()
        elif self.form.reasoning and self.often(0.2):
            message["content"] = f"<think>\n{self.words()}\n</think>\n\n{message['content']}"
        return message

    def called(self) -> list[Message]:
        """A call of a tool, what it gave, and an answer."""
        call = {"type": "function", "function": {"name": "look", "arguments": {"name": self.words()}}}
        asked = {"role": "assistant", "content": self.words() if self.often(0.3) else "", "tool_calls": [call]}
        return [asked, {"role": "tool", "name": "look", "content": self.words()}, self.assistant()]

    def answer(self) -> list[Message]:
        if self.form.tools and self.often(0.3):
            return self.called()[: self.random.choice([1, 3])]
        if self.often(0.1):
            return [self.assistant(), self.user(), self.assistant()]
        return [self.assistant()]

    def row(self) -> dict[str, Any]:
        prompt = [{"role": "system", "content": self.words()}] if self.form.system and self.often(0.5) else []
        for _ in range(self.random.choice([0, 0, 1, 2, 3])):
            prompt.append(self.user())
            prompt += self.called() if self.form.tools and self.often(0.2) else [self.assistant()]
        prompt.append(self.user())
        chosen, rejected = self.answer(), self.answer()
        if self.often(0.08) and not self.form.alternating:
            prompt.append({"role": "assistant", "content": self.words()})
            chosen, rejected = ([{"role": "assistant", "content": self.words()}] for _ in range(2))
        row: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if self.form.tools and self.often(0.7):
            row["tools"] = [TOOL]
        if self.form.reasoning and self.often(0.3):
            row["chat_template_kwargs"] = {"enable_thinking": self.often(0.3)}
        return row


class Rows(list):
    """The part of a data set that TRL needs, without a detour over Arrow, which would put nulls into the messages."""

    def map(self, function: Any, fn_kwargs: dict[str, Any] | None = None) -> "Rows":
        return Rows(function(dict(row), **(fn_kwargs or {})) for row in self)


def by_trl(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    return DPOTrainer._prepare_dataset(trainer, Rows(rows), tokenizer, arguments, "train")


class Judge:
    """Ids that the rule asks for, from the template and the tokenizer alone, and why TRL's ids are others."""

    def __init__(self, name: str, form: Any, tokenizer: Any):
        self.tokenizer, self.end, self.bos = tokenizer, form.end_of_turn, form.bos or ""
        self.between = BETWEEN[name]
        self.ends = tokenizer.convert_tokens_to_ids([form.end_of_turn, form.eos])

        self.letter = self.ids("a")[0]

    def ids(self, *texts: str) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def inside(self, text: str) -> list[int]:
        """Ids of a text behind a special token, which nothing melts with."""
        return self.ids(self.bos + text)[0][bool(self.bos) :]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def reasons(self, row: dict[str, Any], theirs: dict[str, Any], ours: dict[str, Any]) -> set[str]:
        options = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {}), "tokenize": False}
        write = lambda messages, **how: self.tokenizer.apply_chat_template(messages, **how, **options)  # noqa: E731
        thinks = options.get("enable_thinking", True)
        between = re.compile(self.between + ("" if thinks else NO_THOUGHT), re.DOTALL)
        prompt, answers = row["prompt"], [row["chosen"], row["rejected"]]
        begun = prompt[-1] if prompt[-1]["role"] == "assistant" else None
        if begun is None:
            opening = write(prompt, add_generation_prompt=True)
            whole = [write(prompt + answer) for answer in answers]
        else:
            opening = write(prompt, continue_final_message=True)
            merged = [{**a[0], "content": begun["content"] + a[0]["content"]} for a in answers]
            whole = [write([*prompt[:-1], m, *a[1:]]) for m, a in zip(merged, answers, strict=True)]
        turns = [text[: text.rindex(self.end) + len(self.end)] for text in whole]
        kept, cut = ours["prompt_ids"], [theirs["chosen_ids"], theirs["rejected_ids"]]
        found = {CONTINUED} if begun is not None else set()

        # The prompt
        if all(text.startswith(opening) for text in whole):
            assert kept == self.ids(opening)[0], "the prompt's ids are not those of inference"
        else:
            opening = self.text(kept)
            assert all(text.startswith(opening) for text in whole), "the prompt is no beginning of all"
            assert kept == self.ids(opening)[0], "the prompt's ids are not those of its text"
            assert kept == theirs["prompt_ids"], "the prompt is not what all share"
            found.add(LONGER)

        # The candidates
        for turn, text, ids, marks, other in zip(
            turns, whole, ours["candidate_ids"], ours["candidate_masks"], cut, strict=True
        ):
            rest = turn[len(opening) :]
            assert self.text(kept + ids) == turn, "the text is not what the template writes up to its end of turn"
            assert [i in self.ends for i in ids[-2:]] in ([True], [False, True]), "not one end"
            learned = [i for i, mark in zip(ids, marks, strict=True) if mark]
            assert self.inside_text(learned) == between.sub("", rest), "the wrong words count"
            edges = [len(opening), *(len(opening) + edge for m in between.finditer(rest) for edge in m.span())]
            whole_ids, turn_ids, *upto = self.ids(text, turn, *(turn[:edge] for edge in edges))
            inside = {edge for edge, part in zip(edges, upto, strict=True) if part != turn_ids[: len(part)]}
            if not inside:
                assert kept + ids == turn_ids, "the ids are not those of the text"
            elif len(edges) == 1:
                assert ids == self.inside(rest), "the answer is not tokenised as inside a text"
            if begun is not None:
                continue
            assert theirs["prompt_ids"] + other == whole_ids
            if turn != text:
                assert not text[len(turn) :].strip()
                found.add(TAIL)
            found |= {INSIDE} if len(opening) in inside else set()
            found |= {EDGE} if inside - {len(opening)} else set()
        same = (kept, ours["candidate_ids"]) == (theirs["prompt_ids"], cut)
        assert same == (not found - {LONGER}), f"TRL's ids are {'' if same else 'not '}the same, with {found}"
        return found or {EQUAL}

    def inside_text(self, ids: list[int]) -> str:
        """Return the text of ids inside a text, not at its beginning."""
        return self.text([*self.letter, *ids])[1:]


@pytest.mark.parametrize("name", REASONS)
def test_ids_are_those_of_trl_or_differ_for_a_reason(name: str) -> None:
    form, tokenizer = chat_forms.FORMS[name], chat_forms.chat_tokenizer(name)
    conversations, judge = Conversations(form, name), Judge(name, form, tokenizer)
    rows = [conversations.row() for _ in range(ROWS)]
    counts: Counter[str] = Counter()
    for index, (row, theirs) in enumerate(zip(rows, by_trl(rows, tokenizer), strict=True)):
        ours = tokenize_candidates(row, tokenizer)
        try:
            counts.update(judge.reasons(row, theirs, ours))
        except AssertionError as error:
            raise AssertionError(f"{name}, row {index}: {error}: {row}") from error
    print(
        f"\n{name}: {ROWS:,} rows of which",
        *(f"  {count:,} {reason}" for reason, count in counts.most_common()),
        sep="\n",
    )
    assert set(counts) == REASONS[name]


# Every template that TRL ships, by a few conversations whose words show who says them.
SHIPPED = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))
PARTS_ALONE = ("idefics3", "llava_next", "smolvlm")  # read lists of parts, and refuse text or leave it out
MARK = re.compile(r"</?s>|<\|[^|<>\s'\"]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|<\|[a-z_]+>|<[a-z_]+\|>|</?think>")


def said(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "look", "arguments": {"name": "x"}}, "id": "abcdefghi"}
ASKED, CALLED = said("user", "zqz one"), said("assistant", "", tool_calls=[CALL], reasoning_content="hm")
GAVE, GOOD = said("tool", "zqz", name="look", tool_call_id="abcdefghi"), said("assistant", "good")
TALKS: dict[str, dict[str, Any]] = {
    "single": {"prompt": [ASKED], "chosen": [GOOD]},
    "system": {"prompt": [said("system", "zqz"), ASKED], "chosen": [GOOD]},
    "history": {"prompt": [ASKED, said("assistant", "first"), ASKED], "chosen": [GOOD]},
    "thoughts": {"prompt": [ASKED, said("assistant", "first", reasoning_content="hm"), ASKED], "chosen": [GOOD]},
    "tool history": {"prompt": [ASKED, CALLED, GAVE], "chosen": [GOOD], "tools": [TOOL]},
    "call": {"prompt": [ASKED], "chosen": [CALLED], "tools": [TOOL]},
    "agent": {"prompt": [ASKED], "chosen": [CALLED, GAVE, GOOD], "tools": [TOOL]},
    "turns": {"prompt": [ASKED], "chosen": [GOOD, ASKED, said("assistant", "fine")]},
    "begun": {"prompt": [ASKED, said("assistant", "so")], "chosen": [GOOD]},
    "no thinking": {"prompt": [ASKED], "chosen": [GOOD], "chat_template_kwargs": {"enable_thinking": False}},
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_no_template_makes_the_words_of_others_count(path: Path) -> None:
    """Each conversation is refused, or the assistant's words count and nobody else's."""
    tokenizer = chat_forms.bare_tokenizer("chatml")
    tokenizer.chat_template = path.read_text()
    tokenizer.add_tokens(sorted(set(MARK.findall(tokenizer.chat_template))), special_tokens=True)
    tokenizer.bos_token = "<|endoftext|>"
    refused = []
    for name, talk in TALKS.items():
        try:
            made = tokenize_candidates({**talk, "rejected": [said("assistant", "bad")]}, tokenizer)
        except BadField:
            refused.append(name)
            continue
        chosen, rejected = (
            tokenizer.decode([i for i, mark in zip(ids, marks, strict=True) if mark])
            for ids, marks in zip(made["candidate_ids"], made["candidate_masks"], strict=True)
        )
        assert "zqz" not in chosen + rejected, name
        assert ("look" if name == "call" else "good") in chosen, name
    if not path.stem.startswith(PARTS_ALONE):
        assert not {"single", "history", "begun", "no thinking"} & set(refused)
