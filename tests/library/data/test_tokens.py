"""Token ids of rows: what is learned is what inference sees, in every kind of tokenizer and template."""

from typing import Any

import chats
import pytest
from transformers import PreTrainedTokenizerFast

from exo_fast.data import examples
from exo_fast.data.fields import BadField
from exo_fast.data.tokens import RowTokenizer, Tokens

HELLO = [{"role": "user", "content": "hello"}]
ANSWER = {"role": "assistant", "content": "good"}


def tokens_of(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], learn: str = "last") -> Tokens:
    rows = RowTokenizer(tokenizer)
    text = rows.text_of(row, learn)
    made = examples.sft("row", text) if "completion" in text else examples.candidates("row", text)
    (tokens,) = rows.tokens([made])
    return tokens


def read(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def pair(chosen: Any, rejected: Any, prompt: Any = HELLO, **more: Any) -> dict[str, Any]:
    as_list = lambda value: value if isinstance(value, list) else [value]  # noqa: E731
    return {"prompt": prompt, "chosen": as_list(chosen), "rejected": as_list(rejected), **more}


def test_a_boundary_lies_between_tokens() -> None:
    """The calls of a tool are written without the thought that the generation prompt opens: both begin with "<t"."""
    tokenizer = chats.byte_level(chats.THINKING)
    call = {"name": "f", "arguments": {"a": 1}}
    tokens = tokens_of(tokenizer, pair(chats.say("", tool_calls=[call]), chats.say("good")))
    assert read(tokenizer, tokens.prompt) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    called, answered = (read(tokenizer, ids) for ids in tokens.candidates)
    assert called == '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert answered == "<think>\n\n</think>\n\ngood<|im_end|>"


def test_the_generation_prompt_is_read_as_inference_reads_it() -> None:
    """Line breaks at the start of an answer would melt into one token with the prompt's line break."""
    tokenizer = chats.byte_level(chats.CHATML)
    asked = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)["input_ids"]
    tokens = tokens_of(tokenizer, pair(chats.say("\n\nthe film"), chats.say("long")))
    assert tokens.prompt == asked
    joint = tokenizer.apply_chat_template([*HELLO, chats.say("\n\nthe film")])["input_ids"]
    assert joint[: len(asked)] != asked  # or this test shows nothing
    assert read(tokenizer, tokens.prompt + tokens.candidates[0]) == read(tokenizer, joint).removesuffix("\n")


def test_an_answer_that_was_begun_goes_on() -> None:
    tokenizer = chats.byte_level(chats.CHATML)
    tokens = tokens_of(tokenizer, pair(chats.say(" was good"), chats.say(" was long"), [*HELLO, chats.say("the film")]))
    assert read(tokenizer, tokens.prompt).endswith("<|im_start|>assistant\nthe film")
    assert [read(tokenizer, ids) for ids in tokens.candidates] == [" was good<|im_end|>", " was long<|im_end|>"]


# An end of the answer and, right behind it, the turn's: Cohere.
TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' %}</think>{% endif %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDS = {  # the template, the tokenizer's EOS, and what an answer and a call end with
    "end of turn is EOS": ("CHATML", "<|im_end|>", "good<|im_end|>", None),
    "end of turn is not EOS": ("CHATML", "<|endoftext|>", "good<|im_end|>", None),
    "an end of text after the end of turn": ("OTHER_ENDS", "<|endoftext|>", "good<|im_end|>", '{"a": 1}<|call|>'),
    "an end of the answer before that of the turn": (TWO_ENDS, "<|im_end|>", "good</think><|im_end|>", None),
    "no end but EOS": ("PLAIN", "<|endoftext|>", "good<|endoftext|>", None),
}


@pytest.mark.parametrize(("template", "eos", "answer", "call"), ENDS.values(), ids=ENDS.keys())
def test_an_answer_ends_with_its_end_of_turn_and_nothing_after(
    template: str, eos: str, answer: str, call: str | None
) -> None:
    tokenizer = chats.byte_level(getattr(chats, template, template), eos)
    made = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    other = chats.say("", tool_calls=[made]) if call else chats.say("long")
    tokens = tokens_of(tokenizer, pair(chats.say("good"), other))
    assert read(tokenizer, tokens.candidates[0]) == answer
    if call:
        assert read(tokenizer, tokens.candidates[1]) == call
    ends = RowTokenizer(tokenizer).ends
    assert {tokens.candidates[0][-1], tokens.candidates[1][-1]} <= ends
    assert tokenizer.eos_token_id in ends
    assert all(i not in ends for ids in tokens.candidates for i in ids[:-1])


@pytest.mark.parametrize("template", ["ZEPHYR", "WITH_BOS", None])
def test_bos_comes_once(template: str | None) -> None:
    tokenizer = chats.metaspace(template and getattr(chats, template))
    row = (
        pair(chats.say("good"), chats.say("long")) if template else {"prompt": "hello", "chosen": " a", "rejected": "b"}
    )
    tokens = tokens_of(tokenizer, row)
    assert tokens.prompt[0] == tokenizer.bos_token_id
    assert [*tokens.prompt, *tokens.candidates[0]].count(tokenizer.bos_token_id) == 1
    rows = RowTokenizer(tokenizer)
    assert rows.prompts([rows.text_of(row)["prompt"]]) == [tokens.prompt]


def test_no_space_comes_into_the_middle_of_a_text() -> None:
    tokenizer = chats.metaspace(chats.ZEPHYR)
    tokens = tokens_of(tokenizer, pair(chats.say("good"), chats.say(" long")))
    assert [read(tokenizer, ids) for ids in tokens.candidates] == ["good</s>", "long</s>"]  # decoding strips one space
    assert tokenizer.convert_ids_to_tokens(tokens.candidates[0])[0].startswith("g")
    assert tokenizer.convert_ids_to_tokens(tokens.candidates[1])[0].startswith("▁")
    whole = read(tokenizer, tokens.prompt + tokens.candidates[0])
    assert whole.endswith("<|assistant|>\ngood</s>")
    # Text without a template too: what follows a line break, and what is cut out of a word.
    for prompt, chosen in (("hello\n", "good"), ("hello wor", "ld")):
        tokens = tokens_of(tokenizer, {"prompt": prompt, "chosen": chosen, "rejected": "x"})
        assert tokens.prompt == tokenizer(prompt)["input_ids"]
        assert read(tokenizer, tokens.prompt + tokens.candidates[0]) == f"<s> {prompt}{chosen}</s>"


def test_an_unknown_token_hides_no_text() -> None:
    """A word that was cut in two is one unknown token, and so is its first half."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, " ": 2, "good": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    tokens = tokens_of(tokenizer, {"prompt": "strange", "chosen": "good good", "rejected": "x"})
    assert tokens.prompt == [0]
    assert tokens.candidates == [[3, 2, 3, 1], [0, 1]]


@pytest.mark.parametrize("template", ["CHATML", "MARKED", "THINKING", "PLAIN", "OTHER_ENDS"])
def test_only_the_words_of_the_assistant_count(template: str) -> None:
    tokenizer = chats.byte_level(getattr(chats, template), "<|endoftext|>")
    turns = [chats.say("good"), chats.user("tool call"), chats.say("long film")]
    tokens = tokens_of(tokenizer, pair(turns, chats.say("x")))
    learned = [i for i, counts in zip(tokens.candidates[0], tokens.learned[0], strict=True) if counts]
    end = "" if template == "PLAIN" else "<|im_end|>"
    think = "\n</think>\n\n" if template == "THINKING" else ""  # which the generation prompt has opened
    tail = "<|endoftext|>" if template == "PLAIN" else end
    assert read(tokenizer, learned) == f"good{end}{think}long film{tail}"
    assert all(tokens.learned[1])
    whole = tokenizer.apply_chat_template([*HELLO, *turns], tokenize=False)
    text = read(tokenizer, tokens.prompt + tokens.candidates[0])
    assert whole.startswith(text) or text.removesuffix("<|endoftext|>") == whole.rstrip()


def test_results_of_tools_never_count() -> None:
    tokenizer = chats.byte_level(chats.CHATML)
    prompt = [*HELLO, chats.say("call")]
    tool = {"role": "tool", "content": "arguments"}
    tokens = tokens_of(
        tokenizer, pair([tool, chats.say("good")], [{**tool, "content": "name"}, chats.say("x")], prompt)
    )
    assert read(tokenizer, tokens.prompt).endswith("<|im_start|>assistant\ncall<|im_end|>\n")
    learned = [i for i, counts in zip(tokens.candidates[0], tokens.learned[0], strict=True) if counts]
    assert read(tokenizer, learned) == "good<|im_end|>"
    with pytest.raises(BadField, match="no message of the assistant"):
        tokens_of(tokenizer, pair([tool], chats.say("x"), prompt))
    # Others' words after the assistant's last words are not learned, and are cut off.
    cut = tokens_of(tokenizer, pair([chats.say("good"), tool], chats.say("x")))
    assert [read(tokenizer, ids) for ids in cut.candidates] == ["good<|im_end|>", "x<|im_end|>"]
    assert cut.learned is None


def test_the_last_turn_or_all_of_them() -> None:
    tokenizer = chats.byte_level(chats.CHATML)
    messages = {"messages": [*HELLO, chats.say("good"), chats.user("film"), chats.say("long")]}
    last, every = (tokens_of(tokenizer, messages, learn) for learn in ("last", "all"))
    assert read(tokenizer, last.candidates[0]) == "long<|im_end|>"
    assert last.learned is None
    assert last.prompt + last.candidates[0] == every.prompt + every.candidates[0]
    learned = [i for i, counts in zip(every.candidates[0], every.learned[0], strict=True) if counts]
    assert read(tokenizer, learned) == "good<|im_end|>long<|im_end|>"


def test_a_turn_that_is_written_otherwise_when_others_follow() -> None:
    """A template that drops earlier words: nobody could know whose words are whose."""
    turns = [chats.say("good"), chats.user("film"), chats.say("long")]
    dropping = "{{ m.content if loop.last or loop.first else '' }}"
    others = dropping.replace("loop.first", "loop.first or m.role == 'assistant'")
    backwards = "{% for m in messages | reverse %}" + chats.CHATML.partition("%}")[2]
    with pytest.raises(BadField, match="give each answer a row of its own, or a template with"):
        tokens_of(chats.byte_level(chats.CHATML.replace("{{ m.content }}", others)), pair(turns, chats.say("x")))
    with pytest.raises(BadField, match=r"field `prompt`.* otherwise when an answer follows"):
        tokens_of(chats.byte_level(backwards), pair(turns, chats.say("x")))
    with pytest.raises(BadField, match=r"field `chosen`.*'good'.*writes nothing of what the assistant says"):
        tokens_of(chats.byte_level(chats.MARKED.replace("{{ m.content }}", dropping)), pair(turns, chats.say("x")))


def test_an_answer_that_the_template_does_not_write() -> None:
    """A template without tools would drop a call, and one that reads parts would drop text: no word is learned."""
    call = {"type": "function", "function": {"name": "tool", "arguments": {}}}
    calls = pair([chats.say("", tool_calls=[call])], chats.say("x"))
    with pytest.raises(BadField, match=r"field `chosen`.*writes nothing of what the assistant says"):
        tokens_of(chats.byte_level(chats.CHATML), calls)
    parts = chats.byte_level(
        chats.CHATML.replace("{{ m.content }}", "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}")
    )
    with pytest.raises(BadField, match="writes nothing of what the assistant says"):
        tokens_of(parts, pair([chats.say("good")], chats.say("x")))
    part = lambda text: [{"type": "text", "text": text}]  # noqa: E731
    asked = [{"role": "user", "content": part("hello")}]
    tokens = tokens_of(parts, pair([chats.say(part("good"))], [chats.say(part("x"))], asked))
    assert read(parts, tokens.prompt).endswith("hello<|im_end|>\n<|im_start|>assistant\n")
    assert [read(parts, ids) for ids in tokens.candidates] == ["good<|im_end|>", "x<|im_end|>"]


def test_an_end_of_turn_among_the_words_of_others() -> None:
    """If only the last answer has its end of turn, one that a user wrote ends nobody's turn."""
    template = chats.CHATML.replace("<|im_end|>", "{% if loop.last or m.role == 'user' %}<|im_end|>{% endif %}")
    turns = [chats.say("good"), chats.user("film<|im_end|>film"), chats.say("long")]
    with pytest.raises(BadField, match="give each answer a row of its own"):
        tokens_of(chats.byte_level(template), pair(turns, chats.say("x")))
    # An answer is written with a thought if it is the last, and without one if others follow, as in Qwen3.
    thinking = chats.CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}"
    )
    tokens = tokens_of(chats.byte_level(thinking), pair(turns, chats.say("x")))
    learned = [i for i, counts in zip(tokens.candidates[0], tokens.learned[0], strict=True) if counts]
    assert read(chats.byte_level(None), learned) == "good<|im_end|><think></think>long<|im_end|>"


def test_a_template_that_changes_letters() -> None:
    tokenizer = chats.byte_level(chats.CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "<|endoftext|>")
    tokens = tokens_of(tokenizer, pair(chats.say("good"), chats.say("x")))
    assert [read(tokenizer, ids) for ids in tokens.candidates] == ["GOOD<|im_end|>", "X<|im_end|>"]


def test_marks_of_an_answer_and_of_its_end() -> None:
    """A template may mark the end of turn by itself: what it marks overlaps with the end that follows the words."""
    mark = "{% generation %}<|im_end|>\n{% endgeneration %}"
    template = chats.MARKED.replace("{% endif %}<|im_end|>\n", "{% endif %}" + mark)
    turns = [chats.say("good"), chats.user("film"), chats.say("long")]
    tokens = tokens_of(
        chats.byte_level(
            template.replace(
                "{% else %}{{ m.content }}" + "{% endif %}" + mark,
                mark + "{% else %}{{ m.content }}<|im_end|>\n{% endif %}",
            )
        ),
        pair(turns, chats.say("x")),
    )
    learned = [i for i, counts in zip(tokens.candidates[0], tokens.learned[0], strict=True) if counts]
    assert read(chats.byte_level(None), learned) == "good<|im_end|>long<|im_end|>"
    # As Llama 2 has it: a space before the end of turn, which is as little the template's to leave out.
    spaced = chats.byte_level(chats.MARKED.replace("<|im_end|>", " <|im_end|>"))
    tokens = tokens_of(spaced, pair(turns, chats.say("x")))
    learned = [i for i, counts in zip(tokens.candidates[0], tokens.learned[0], strict=True) if counts]
    assert read(spaced, learned) == "good <|im_end|>long <|im_end|>"


MISTRAL_V3 = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\\n\\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.system if loop.last }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_prompt_that_is_written_otherwise_when_an_answer_follows() -> None:
    """Mistral v0.3 writes the system's words only before a last message of the user: with an answer behind it, what
    the prompt and the candidates share ends before the user's words, which must not be learned."""
    tokenizer = chats.metaspace(MISTRAL_V3)
    system = {"role": "system", "content": "call"}
    with pytest.raises(BadField, match=r"field `prompt`.*\(the system's words in the user's message"):
        tokens_of(tokenizer, pair([chats.say("good")], chats.say("x"), [system, chats.user("hello")]))
    tokens = tokens_of(tokenizer, pair([chats.say("good")], chats.say("x"), [chats.user("call\n\nhello")]))
    assert read(tokenizer, tokens.prompt) == "<s>[INST] call\n\nhello[/INST]"
    # A call that is written without the words that the prompt has begun: they belong to no candidate.
    calling = chats.CHATML.replace("{{ m.content }}", "{{ m.tool_calls | tojson if m.tool_calls else m.content }}")
    call = {"type": "function", "function": {"name": "tool", "arguments": {}}}
    begun = [*HELLO, chats.say("film")]
    with pytest.raises(BadField, match="otherwise when an answer follows"):
        tokens_of(chats.byte_level(calling), pair([chats.say("good")], chats.say("", tool_calls=[call]), begun))


def test_what_marks_and_spans_leave_nothing_of() -> None:
    nothing = chats.MARKED.replace("{% generation %}{{ m.content }}", "{{ m.content }}{% generation %}")
    nothing = nothing.replace("<|im_end|>", "")
    with pytest.raises(BadField, match="marks none of the assistant's words"):
        tokens_of(chats.byte_level(nothing), pair([chats.say("a"), chats.user("b"), chats.say("c")], chats.say("x")))
    row = {"prompt": "a", "completions": ["good", "film"], "rewards": [1, 0]}
    with pytest.raises(BadField, match=r"completion_spans\[1\].*one at least that is not empty"):
        examples.candidates("row", {**row, "completion_spans": [[[0, 1]], [[1, 1], [3, 3]]]})


def test_halves_of_surrogate_pairs_are_no_text() -> None:
    tokenizer = chats.byte_level(chats.CHATML)
    for row in (pair([chats.say("\ud800")], chats.say("x")), {"prompt": "a", "chosen": "b", "rejected": "\udfff"}):
        with pytest.raises(BadField, match="half a surrogate pair"):
            tokens_of(tokenizer, row)


def test_ids_that_were_drawn_and_spans_of_text() -> None:
    tokenizer = chats.byte_level(None)
    rows = RowTokenizer(tokenizer)
    (a,), (b,) = rows.encode(["a", "b"])
    ids = [[a], [b, tokenizer.eos_token_id]]  # the first was cut short
    drawn = examples.candidates(
        "row", {"prompt": "hello", "completions": ["a", "b"], "rewards": [1, 0], "completion_ids": ids}
    )
    spans = examples.candidates(
        "row",
        {
            "prompt": "hello",
            "completions": ["good film", "x"],
            "rewards": [1, 0],
            "completion_spans": [[[0, 4]], [[0, 1]]],
        },
    )
    first, second = rows.tokens([drawn, spans])
    assert first.candidates == ids
    learned = [i for i, counts in zip(second.candidates[0], second.learned[0], strict=True) if counts]
    assert read(tokenizer, learned) == "good<|im_end|>"  # EOS is ours, and counts
    for bad in ([[0, 4]], [[[0, 99]], [[0, 1]]], [[[3, 1]], [[0, 1]]], [[], [[0, 1]]], [[[0, True]], [[0, 1]]]):
        with pytest.raises(BadField, match="completion_spans"):
            examples.candidates(
                "row", {"prompt": "p", "completions": ["good", "x"], "rewards": [1, 0], "completion_spans": bad}
            )


def test_ids_are_those_of_the_text() -> None:
    """Drawn by this tokenizer for this text: with the end of a turn in the text and in the ids, or in one of them."""
    tokenizer = chats.byte_level(chats.CHATML)
    rows = RowTokenizer(tokenizer)
    good, long, end = rows.encode(["good", "long", "<|im_end|>"])
    row = {"prompt": HELLO, "completions": [[ANSWER], [chats.say("long")]], "rewards": [1, 0]}
    for ids in ([good + end, long + end], [good, long]):
        tokens = tokens_of(tokenizer, {**row, "completion_ids": ids})
        assert (tokens.candidates, tokens.learned) == (ids, None)
    letters = [i for part in rows.encode(["<|", "im_end", "|>"]) for i in part]  # which a model may write
    text = {"prompt": "a", "completions": ["<|im_end|>", "x"], "rewards": [1, 0]}
    ids = [letters, *rows.encode(["x"])]
    assert tokens_of(tokenizer, {**text, "completion_ids": ids}).candidates == ids
    with pytest.raises(BadField, match=r"row, field `completion_ids\[1\]`, value \[.*makes 'good' of it.* is 'long<"):
        tokens_of(tokenizer, {**row, "completion_ids": [good, good]})


def test_ids_of_completions_of_which_parts_count() -> None:
    """Spans are of characters: they do not show which ids count, so all would be learned."""
    tokenizer = chats.byte_level(chats.CHATML)
    turns = [chats.say("good"), chats.user("film"), chats.say("long")]
    spans = [[[0, 4]], [[0, 1]]]
    several = {"prompt": HELLO, "completions": [turns, [chats.say("x")]], "rewards": [1, 0]}
    text = {"prompt": "a", "completions": ["good film", "x"], "rewards": [1, 0], "completion_spans": spans}
    pairs = {"prompt": "a", "chosen": "good film", "rejected": "x", "completion_spans": spans}
    for row in (several, text, pairs):
        with pytest.raises(BadField, match=r"field `completion_ids`, value \[\[5\], \[6\]\]: only parts of these"):
            tokens_of(tokenizer, {**row, "completion_ids": [[5], [6]]})
        with pytest.raises(BadField, match="remove `completion_ids` to tokenise the text"):
            examples.samples("row", RowTokenizer(tokenizer).text_of({**row, "completion_ids": [[5], [6]]}))


def test_a_prompt_beside_answers_in_messages_is_the_users() -> None:
    tokenizer = chats.byte_level(chats.CHATML)
    assert tokens_of(tokenizer, pair(ANSWER, chats.say("x"), "hello")) == tokens_of(
        tokenizer, pair(ANSWER, chats.say("x"))
    )
    assert tokens_of(tokenizer, {"prompt": HELLO, "chosen": "good", "rejected": "x"}) == tokens_of(
        tokenizer, pair(ANSWER, chats.say("x"))
    )


def test_what_stands_inside_a_call_is_no_end() -> None:
    """Gemma 4 writes the text of arguments between special tokens, which generation must not stop at."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.a }}<think></tool_call>{% endfor %}"
        "{% if m.tool_calls %}<|call|>{% else %}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = chats.byte_level(template, "<|endoftext|>")
    ends = {tokenizer.convert_ids_to_tokens(i) for i in RowTokenizer(tokenizer).ends}
    assert ends == {"<|endoftext|>", "<|im_end|>", "<|call|>"}


def test_marks_begin_behind_the_header() -> None:
    """A template may mark the header of a turn and the line break behind it; a model writes neither."""
    marked = chats.CHATML.replace("{% for m in messages %}", "{% for m in messages %}{% if m.role == 'assistant' %}")
    body = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    marked = marked.replace(body, f"{{% generation %}}{body}{{% endgeneration %}}{{% else %}}{body}{{% endif %}}")
    tokenizer = chats.byte_level(marked)
    turns = [chats.say("good"), chats.user("film"), chats.say("long")]
    tokens = tokens_of(tokenizer, pair(turns, chats.say("x")))
    learned = [i for i, counts in zip(tokens.candidates[0], tokens.learned[0], strict=True) if counts]
    assert read(tokenizer, learned) == "good<|im_end|>long<|im_end|>"
